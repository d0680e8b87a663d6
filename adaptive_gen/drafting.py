"""Lossless decoding: whether full depth confirms a draft, and how many drafts are worth making.

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


class DraftLength:
    """How many drafts to make before a deep pass, from how many have been confirmed lately.

    With a chance `a` that a draft stands, k of them and a deep pass yield (1 - a^(k+1)) / (1 - a)
    tokens and cost k * `shallow` + 1 deep passes' time; the best k is tried next. Rows that take
    part in a deep pass are counted as free, which they nearly are while weights dominate.
    """

    def __init__(self, shallow: float, most: int):
        """Start hopeful.

        Args:
            shallow: cost of a draft as a share of a deep pass, in (0, 1).
            most: largest number of drafts.
        """
        self.shallow, self.most = shallow, most
        self._stood, self._judged = 4.0, 5.0
        self.length = self._best()

    def observe(self, stood: int, judged: int) -> int:
        """Take note of a verification of `judged` drafts; return the next number of drafts."""
        # Older evidence fades: the text moves on to easier or harder passages.
        self._stood = 0.9 * self._stood + stood
        self._judged = 0.9 * self._judged + judged
        self.length = self._best()
        return self.length

    def _best(self) -> int:
        chance = min(self._stood / self._judged, 0.999)

        def yield_per_cost(k: int) -> float:
            return (1 - chance ** (k + 1)) / (1 - chance) / (k * self.shallow + 1)

        return max(range(1, self.most + 1), key=yield_per_cost)
