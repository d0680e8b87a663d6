"""Fitting the gate: which hidden states, at each exit, lead to the token full depth would choose.

A logistic regression with an L2 penalty on standardised, final-normed hidden states. The penalty is
chosen on prompts left out of the fit: tokens of one text resemble each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from adaptive_gen.decoder import Decoder
from adaptive_gen.gate import Gate
from adaptive_gen.ui import progress

from . import maps
from .collect import along
from .trace import Trace

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
MOST_NUMBERS = 32_000_000  # of one exit's hidden states; further texts are left out


@dataclass(frozen=True)
class Row:
    """How well a measure tells which tokens agree, on texts that nothing was fitted to."""

    confidence: str
    exit_layer: int
    auroc: float | None
    error: float | None  # expected calibration error; None where the raw score is no chance
    tokens: int


def fit(model: Any, trace: Trace, searched: int) -> tuple[Gate, list[Row]]:
    """Fit a probe per exit and judge it beside the other measures.

    Args:
        model: wrapped.
        trace: of all prompts, with texts.
        searched: how many of the first texts to fit on; the others judge.
    """
    width = model.config.get_text_config().hidden_size
    texts = max(2, min(len(trace.lengths), int(MOST_NUMBERS / width / trace.lengths.mean())))
    searched = max(1, searched * texts // len(trace.lengths))
    trace = trace.take(slice(0, texts))
    exits = trace.exit_layers[:-1]
    hidden = hidden_states(model, trace)
    owner = np.repeat(np.arange(texts), trace.lengths)  # the text of each token
    seen = owner < searched
    weights, biases, rows = {}, {}, []
    for k, exit_layer in enumerate(exits):
        agrees = trace.at(next(iter(trace.confidence)), k)[1]
        weight, bias = probe(hidden[k][seen], agrees[seen], owner[seen])
        weights[exit_layer], biases[exit_layer] = (
            torch.tensor(value, dtype=torch.float32) for value in (weight, bias)
        )
        chance = _sigmoid(hidden[k][~seen].astype(np.float64) @ weight + bias)
        unseen = agrees[~seen]
        error = maps.calibration_error(chance, unseen)
        rows.append(Row("gate", exit_layer, maps.auroc(chance, unseen), error, len(unseen)))
        for name in trace.confidence:
            score = trace.at(name, k)[0][~seen]
            rows.append(Row(name, exit_layer, maps.auroc(score, unseen), None, len(unseen)))
    return Gate(weights, biases), rows


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
