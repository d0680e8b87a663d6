"""The LM head of the back end `compiled`, and the confidences in what it says."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..confidence import Confidences, Summary
from .compiled import MOST_ROWS
from .fused_readout import FusedReadout
from .int8 import COLUMNS, Int8Matrix
from .machine_code import kernel
from .matrices import Matrix
from .narrow import NarrowMatrix
from .norms import gain, shift
from .panelled import PANEL, gain_of, in_panels, padding
from .team import helpers

# A smaller head is read as quickly as a screen and what that leaves.
SCREENED_BYTES = 1 << 16


class CompiledReadout:
    """The final norm and the LM head, for few rows compiled."""

    def __init__(self, fused: FusedReadout, norm: Any):
        """Take the prepared weights over.

        Args:
            fused: has them.
            norm: the final one, whose gain and shift are in the head too.
        """
        self.norm_gain, self.norm_shift = gain(norm), shift(norm)
        self._long, self._norming = fused, (float(fused.floor), fused.centred)
        self.panels, self.scale = in_panels(fused.head, fused.floor)
        head, factor = fused.head, gain_of(fused.head)
        self.vocab = head.shape[1] if isinstance(head, Tensor) else len(head.scale)
        self._softcap = float(fused.softcap or 0.0)
        bias = fused.floor.new_zeros(0) if fused.bias is None else fused.bias
        self._bias = F.pad(bias, (0, padding(len(bias)))).numpy()
        self._gain = fused.floor.new_zeros(0).numpy() if factor is None else factor.numpy()
        self._screen = _screen(head, fused.floor)

    def __call__(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """Hidden states [rows, hidden] after any layer -> logits [rows, vocab]."""
        rows = hidden.shape[0]
        if rows > MOST_ROWS and isinstance(self._long.head, NarrowMatrix | Int8Matrix):
            return torch.cat([self(part) for part in hidden.split(MOST_ROWS)])
        if rows > MOST_ROWS:
            return self._long(hidden)
        reading = kernel("readout")
        logits = hidden.new_empty(rows, self.vocab + padding(self.vocab))
        x = (hidden if hidden.is_contiguous() else hidden.contiguous()).detach().numpy()
        normed = np.empty(x.shape, x.dtype)
        head = self._norming, self._gain, self.panels, self.scale, self._bias, self._softcap
        reading.read_out(x, *head, normed, logits.numpy(), self._team())
        return logits if logits.shape[1] == self.vocab else logits[:, : self.vocab]

    def _team(self) -> Any:
        return helpers(self.panels.nbytes)

    def with_room(self, rows: int) -> tuple[Any, ...]:
        """The head as `kernels.screen` has it, with buffers of its own for `rows` hidden states."""
        panels, dtype = self.panels.shape[0], self.scale.dtype
        normed = np.zeros((rows, self.panels.shape[1]), dtype)
        gained = np.zeros_like(normed) if len(self._gain) else normed
        logits = np.zeros((rows, panels * PANEL), dtype)
        screen = *self._screen, np.zeros(panels, np.bool_)
        head = self.panels, self.scale, self._norming, normed, logits, self.vocab, screen
        return *head, self._team(), self._gain, gained, self._bias, self._softcap


def _screen(head: Matrix, like: Tensor) -> tuple[Any, ...]:
    """Steps, scale, doubt and its powers as `kernels.screen` has them, for a head [hidden, vocab].

    There are none for a small head, nor for one that is in 8 bits itself.
    """
    if isinstance(head, Int8Matrix) or _bytes(head) < SCREENED_BYTES:
        none = like.new_zeros(0).numpy()
        # In the dtype of one that there is, so that the same compiled code takes both.
        kept = np.uint8 if kernel("processor").INTEGERS else np.int8
        return np.zeros((0, 0, PANEL), kept), none, none, none, none
    steps, scales, doubts = [], [], []
    for part in _columns(head):
        rounded = Int8Matrix.of(part)
        stored = rounded.float().to(part.dtype)
        lost = torch.linalg.vector_norm(part - stored, dim=0)
        longer = torch.linalg.vector_norm(part, dim=0).maximum(
            torch.linalg.vector_norm(stored, dim=0)
        )
        doubts.append(lost + _share_lost(part) * longer)
        steps.append(rounded.steps)
        scales.append(rounded.scale)
    doubt = torch.cat(doubts)
    doubt = F.pad(doubt, (0, padding(len(doubt)))).view(-1, PANEL).amax(1)
    powers = (part.numpy() for part in (doubt, doubt.exp(), (-doubt).exp()))
    return *in_panels(Int8Matrix(torch.cat(steps), torch.cat(scales)), like), *powers


def _share_lost(columns: Tensor) -> float:
    """How far products with a vector of length 1 at most may be off besides, per column's length.

    Both the exact product and that in 8 bits round their sums, and the latter may round the vector.
    """
    inner = columns.shape[0]
    sums = 4 * inner * torch.finfo(columns.dtype).eps
    rounding = kernel("integers").ROUNDING if kernel("processor").INTEGERS else 0.0
    return sums + rounding * math.sqrt(inner)


def _bytes(head: Tensor | NarrowMatrix) -> int:
    weights = head if isinstance(head, Tensor) else head.rows()
    return weights.numel() * weights.element_size()


def _columns(head: Tensor | NarrowMatrix) -> Iterator[Tensor]:
    """A head's columns, some at a time, [hidden, columns] float32 or float64."""
    if isinstance(head, Tensor):
        yield from head.split(COLUMNS, dim=1)
        return
    for start in range(0, len(head.scale), COLUMNS):
        yield head.float(start, start + COLUMNS)


class CompiledConfidences(Confidences):
    """`Confidences` that read the logits once for all they need."""

    def __init__(self, confidences: Confidences):
        """Measure as `confidences` does."""
        super().__init__(confidences.measure, confidences.maps, confidences.gate)

    def __call__(self, logits: Tensor, exit_layer: int, measure: str | None = None) -> list[float]:
        """The confidence in each row of logits [rows, vocab]; see `Confidences`."""
        reading = kernel("readout")
        rows = np.empty((logits.shape[0], 5))
        reading.summarise(logits.contiguous().numpy(), rows)
        found = [Summary(*row) for row in rows.tolist()]
        return self.of_summaries(found, logits.shape[-1], exit_layer, measure)
