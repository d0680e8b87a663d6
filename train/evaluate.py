"""What each exit of a model is worth on a text: loss, agreement with full depth, confidence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_gen.confidence import MEASURES
from adaptive_gen.exit_readouts import readouts
from adaptive_gen.losses import exit_states
from adaptive_gen.readout import Readout
from adaptive_gen.ui import progress

from .asking import Answered
from .metrics import resampled_sums
from .packing import IGNORE, Example, collator

BINS = 15  # of equal width, as Guo et al. (2017) draw them
# What is added up for a token at an exit: cross-entropy, agreement, margin, and per measure and bin
# the confidence less the agreement.
PER_EXIT = 3 + len(MEASURES) * BINS
Interval = tuple[float, float]


@dataclass(frozen=True)
class ExitScore:
    """One exit, averaged over the evaluated tokens.

    Args:
        exit_layer: count of layers.
        loss: cross-entropy, in nats.
        agreement: share of tokens whose likeliest is full depth's.
        confidence: mean margin.
        ece: expected calibration error of each raw confidence as the chance of agreeing with full
            depth, in [0, 1]; empty at full depth, which agrees by definition.
        intervals: 95 % bootstrap intervals over sequences of `loss`, `agreement` and
            `ece MEASURE`; empty for a single sequence.
    """

    exit_layer: int
    loss: float
    agreement: float
    confidence: float
    ece: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All exits of one model on the same tokens."""

    tokens: int
    n_layers: int
    exits: tuple[ExitScore, ...]
    sequences: int = 0
    answers: tuple[Answered, ...] = ()  # what each exit wrote, where anything was asked

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(replace(self, answers=()))
        return {**plain, "answers": [one.as_dict() for one in self.answers]}


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Sequence[Example],
    exit_layers: Sequence[int],
    *,
    batch_size: int = 8,
    chunk_size: int = 1024,
) -> Evaluation:
    """Score every exit on every label of the examples.

    Args:
        model: a causal LM.
        examples: sequences with labels.
        exit_layers: ascending, full depth last.
        batch_size: sequences in one forward pass.
        chunk_size: positions whose logits exist at once.

    Returns:
        Means over tokens; full depth agrees with itself by definition.
    """
    model.eval()
    ways = list(readouts(model, exit_layers).values())
    collate = collator(0)
    sums = torch.zeros(len(examples), 1 + len(ways) * PER_EXIT, dtype=torch.float64)
    starts = range(0, len(examples), batch_size)
    for start in progress(starts, f"scoring {len(exit_layers)} exits", total=len(starts)):
        batch = {
            k: v.to(model.device)
            for k, v in collate(list(examples[start : start + batch_size])).items()
        }
        labels = batch.pop("labels")
        ids = batch.pop("input_ids")
        keep = labels[:, 1:] != IGNORE
        targets = labels[:, 1:][keep]
        owner = start + keep.nonzero()[:, 0].cpu()
        states = [s[:, :-1][keep] for s in exit_states(model, ids, exit_layers, **batch)]
        for begin in range(0, len(targets), chunk_size):
            part = slice(begin, begin + chunk_size)
            cells = _cells(ways, [s[part] for s in states], targets[part])
            sums.index_add_(0, owner[part], cells.cpu())
    n_layers = model.config.get_text_config().num_hidden_layers
    scores = _scores(sums.numpy(), exit_layers)
    return Evaluation(int(sums[:, 0].sum()), n_layers, scores, len(examples))


def _cells(ways: Sequence[Readout], states: list[Tensor], targets: Tensor) -> Tensor:
    """[tokens, 1 + exits * PER_EXIT]: one, and what each exit adds to the sums."""
    full = ways[-1](states[-1]).argmax(-1)
    cells = [torch.ones(len(targets), 1, dtype=torch.float64, device=targets.device)]
    for readout, state in zip(ways, states, strict=True):
        logits = readout(state).float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        agrees = (logits.argmax(-1) == full).float()
        sure = torch.stack([measure(logits) for measure in MEASURES.values()], 1)
        places = (sure * BINS).long().clamp(max=BINS - 1)
        binned = sure.new_zeros(*sure.shape, BINS)
        binned.scatter_(2, places[..., None], (sure - agrees[:, None])[..., None])
        margin = sure[:, list(MEASURES).index("margin")]
        cells += [torch.stack([loss, agrees, margin], 1).double(), binned.flatten(1).double()]
    return torch.cat(cells, 1)


def _scores(sums: NDArray, exit_layers: Sequence[int]) -> tuple[ExitScore, ...]:
    """Scores and their intervals from the sums over each sequence's tokens."""
    found = _means(sums.sum(0))
    ends = {}
    if len(sums) > 1:
        drawn = [_means(draw) for draw in resampled_sums(sums)]
        ends = {
            name: np.percentile([draw[name] for draw in drawn], [2.5, 97.5], axis=0)
            for name in ("loss", "agreement", "ece")
        }
    scores = []
    for k, exit_layer in enumerate(exit_layers):
        inner = exit_layer != exit_layers[-1]
        intervals = {
            name: (float(low), float(high))
            for name in ("loss", "agreement")
            if ends
            for low, high in [ends[name][:, k]]
        }
        if ends and inner:
            for m, measure in enumerate(MEASURES):
                low, high = ends["ece"][:, k, m]
                intervals[f"ece {measure}"] = (float(low), float(high))
        plain = {name: float(found[name][k]) for name in ("loss", "agreement", "confidence")}
        ece = dict(zip(MEASURES, found["ece"][k].tolist(), strict=True)) if inner else {}
        scores.append(ExitScore(exit_layer, **plain, ece=ece, intervals=intervals))
    return tuple(scores)


def _means(totals: NDArray) -> dict[str, NDArray]:
    """Means per exit from sums [1 + exits * PER_EXIT]; `ece` is [exits, measures]."""
    count = max(float(totals[0]), 1.0)
    per_exit = totals[1:].reshape(-1, PER_EXIT) / count
    gaps = np.abs(per_exit[:, 3:].reshape(len(per_exit), len(MEASURES), BINS))
    names = ("loss", "agreement", "confidence")
    return {**{name: per_exit[:, i] for i, name in enumerate(names)}, "ece": gaps.sum(-1)}
