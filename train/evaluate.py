"""What each exit of a model is worth on a text: loss, agreement with full depth, confidence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_gen.confidence import margin
from adaptive_gen.exit_readouts import readouts
from adaptive_gen.losses import exit_states
from adaptive_gen.readout import Readout

from .packing import IGNORE, Example, collator


@dataclass(frozen=True)
class ExitScore:
    """One exit, averaged over the evaluated tokens."""

    exit_layer: int
    loss: float
    agreement: float
    confidence: float


@dataclass(frozen=True)
class Evaluation:
    """All exits of one model on the same tokens."""

    tokens: int
    n_layers: int
    exits: tuple[ExitScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


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
    totals = torch.zeros(len(exit_layers), 3, dtype=torch.float64)
    tokens = 0
    for start in range(0, len(examples), batch_size):
        batch = {
            k: v.to(model.device)
            for k, v in collate(list(examples[start : start + batch_size])).items()
        }
        labels = batch.pop("labels")
        ids = batch.pop("input_ids")
        keep = labels[:, 1:] != IGNORE
        targets = labels[:, 1:][keep]
        states = [s[:, :-1][keep] for s in exit_states(model, ids, exit_layers, **batch)]
        for begin in range(0, len(targets), chunk_size):
            part = slice(begin, begin + chunk_size)
            totals += _chunk_scores(ways, [s[part] for s in states], targets[part]).cpu()
        tokens += len(targets)
    means = (totals / max(tokens, 1)).tolist()
    scores = (ExitScore(e, *map(float, m)) for e, m in zip(exit_layers, means, strict=True))
    return Evaluation(tokens, model.config.get_text_config().num_hidden_layers, tuple(scores))


def _chunk_scores(ways: Sequence[Readout], states: list[Tensor], targets: Tensor) -> Tensor:
    """[exits, 3]: sums of cross-entropy, agreement and margin over one chunk of positions."""
    full = ways[-1](states[-1]).argmax(-1)
    rows = []
    for readout, state in zip(ways, states, strict=True):
        logits = readout(state).float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        agree = (logits.argmax(-1) == full).sum()
        rows.append(torch.stack([loss, agree.float(), margin(logits).sum()]))
    return torch.stack(rows).double()
