"""Lossless decoding: whether full depth confirms a draft.

Axes: `drafts`, `vocab`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .report import Step


class Draft(NamedTuple):
    """A token that left early and waits for full depth to confirm it."""

    step: Step
    top: int  # the token with the largest processed score, which an audit compares
    chances: Tensor | None  # [vocab] it was drawn from; None if it is the largest score


def confirm(draft: Draft, scores: Tensor) -> int | None:
    """Whether full depth, with processed `scores` [1, vocab], lets a draft stand.

    Without sampling it stands if full depth chooses the same. With sampling it stands with
    probability min(1, p/q), and its replacement is drawn from the part of p that q lacks, which
    together gives full depth's distribution p exactly (Leviathan et al. 2023, arXiv 2211.17192).

    Returns:
        None if it stands, else the token in its place.
    """
    if draft.chances is None:
        choice = int(scores.argmax(-1))
        return None if choice == draft.step.token else choice
    full = scores.softmax(-1)[0]
    drafted = draft.chances
    if float(torch.rand((), device=full.device) * drafted[draft.step.token]) < float(
        full[draft.step.token]
    ):
        return None
    lacking = (full - drafted).clamp_(min=0)
    # Rounding may leave nothing where the two distributions are equal.
    return int(torch.multinomial(lacking if bool(lacking.sum() > 0) else full, 1))
