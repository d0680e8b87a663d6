"""Fitting the gate: which hidden states, at each exit, lead to the token full depth would choose.

A logistic regression with an L2 penalty on standardised, final-normed hidden states. The penalty is
chosen on prompts left out of the fit: tokens of one text resemble each other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from adaptive_gen.confidence import GATE
from adaptive_gen.decoder import Decoder
from adaptive_gen.gate import Gate
from adaptive_gen.ui import progress

from .collect import along
from .trace import Trace

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
MOST_NUMBERS = 32_000_000  # of one exit's hidden states; further texts are left out


def with_gate(model: Any, trace: Trace, searched: int) -> tuple[Gate, Trace]:
    """A gate fitted on the first texts, and the trace with what it says as one more measure.

    What the trace has of the texts it was fitted on is said by two other gates, each fitted on the
    other half of them: a probe knows its own texts too well, and maps fitted to that would promise
    too much.

    Args:
        model: wrapped.
        trace: of all prompts, with texts.
        searched: how many of the first texts to fit on, as far as they fit into memory.
    """
    width = model.config.get_text_config().hidden_size
    fitted = max(2, min(searched, int(MOST_NUMBERS / width / trace.lengths.mean())))
    held = trace.take(slice(0, fitted))
    hidden, owner = hidden_states(model, held), np.repeat(np.arange(fitted), held.lengths)
    values = np.zeros(trace.agrees.shape)
    weights, biases = {}, {}
    for k, exit_layer in enumerate(trace.exit_layers[:-1]):
        agrees = held.at(next(iter(held.confidence)), k)[1]
        score = np.empty(len(owner))
        for half in (owner % 2 == 0, owner % 2 == 1):
            weight, bias = probe(hidden[k][~half], agrees[~half], owner[~half])
            score[half] = _sigmoid(hidden[k][half].astype(np.float64) @ weight + bias)
        values[:fitted][held.real, k] = score
        weight, bias = probe(hidden[k], agrees, owner)
        weights[exit_layer] = torch.tensor(weight, dtype=torch.float32)
        biases[exit_layer] = torch.tensor(bias, dtype=torch.float32)
    gate = Gate(weights, biases)
    for start in range(fitted, len(trace.lengths), fitted):
        texts = slice(start, start + fitted)
        part = trace.take(texts)
        for k, states in enumerate(hidden_states(model, part)):
            chance = gate(torch.from_numpy(states), trace.exit_layers[k])
            values[texts][part.real, k] = chance.numpy()
    return gate, replace(trace, confidence={**trace.confidence, GATE: values})


@torch.no_grad()
def hidden_states(model: Any, trace: Trace) -> list[NDArray[np.float32]]:
    """Per exit, [tokens, hidden] after the final norm: the rows that choose the new tokens."""
    decoder = Decoder(model)
    exits = trace.exit_layers[:-1]
    found: list[list[NDArray]] = [[] for _ in exits]
    pairs = list(zip(trace.texts, trace.lengths.tolist(), strict=True))
    for text, new in progress(pairs, "reading hidden states", total=len(pairs)):
        ids = torch.from_numpy(text[:-1])[None].to(model.device)
        for k, (exit_layer, hidden) in enumerate(along(decoder, ids, exits)):
            found[k].append(decoder.normed(hidden[0, -new:], exit_layer).float().cpu().numpy())
    return [np.concatenate(rows) for rows in found]


def probe(
    hidden: NDArray, agrees: NDArray, owner: NDArray, penalties: Sequence[float] = PENALTIES
) -> tuple[NDArray[np.float64], float]:
    """Weight [hidden] and bias of one exit.

    Args:
        hidden: [tokens, hidden].
        agrees: [tokens].
        owner: [tokens], the text of each token.
        penalties: strengths to choose from.
    """
    x, y = hidden.astype(np.float64), agrees.astype(np.float64)
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - centre) / scale
    # Every fourth text judges the penalties.
    texts = np.unique(owner)
    judges = np.isin(owner, texts[::4]) if len(texts) > 3 else np.zeros(len(y), bool)
    penalty = penalties[len(penalties) // 2]
    if judges.any():
        trials = [
            _log_loss(x[judges] @ w + b, y[judges])
            for w, b in (_logistic(x[~judges], y[~judges], p) for p in penalties)
        ]
        penalty = penalties[int(np.argmin(trials))]
    weight, bias = _logistic(x, y, penalty)
    return weight / scale, float(bias - weight @ (centre / scale))


def _logistic(x: NDArray, y: NDArray, penalty: float) -> tuple[NDArray, float]:
    """Minimise the mean log loss plus half the penalty times the squared weights."""

    def loss(parameters: NDArray) -> tuple[float, NDArray]:
        weight, bias = parameters[:-1], parameters[-1]
        score = x @ weight + bias
        off = (_sigmoid(score) - y) / len(y)
        gradient = np.append(x.T @ off + penalty * weight, off.sum())
        return _log_loss(score, y) + penalty / 2 * float(weight @ weight), gradient

    start = np.zeros(x.shape[1] + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return found.x[:-1], float(found.x[-1])


def _log_loss(score: NDArray, y: NDArray) -> float:
    return float((np.logaddexp(0, score) - y * score).mean())


def _sigmoid(score: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-np.clip(score, -500, 500)))
