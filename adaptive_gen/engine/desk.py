"""What one generation's decoding steps by compiled kernels work on.

Axes: `rows`, `time`, `hidden`, `tokens` (of all rows, without filling).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import Span
from .machine_code import kernel
from .panelled import padding
from .team import helpers, threads
from .turns import Turns
from .workspace import Sizes


class Desk:
    """Buffers of one generation's decoding steps; what runs in two threads must not share them."""

    def __init__(self, sizes: Sizes, turns: Turns, like: Tensor, room: int):
        """Make them.

        Args:
            sizes: of the model.
            turns: of the model.
            like: in whose dtype.
            room: most tokens of a block.
        """
        self.room = room
        every = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        mixed = sizes.heads * sizes.head_dim
        self._all = like.new_zeros(room, sizes.hidden + padding(sizes.hidden))
        self.hidden, self.x = self._all[:, : sizes.hidden], self._all.numpy()
        wide = sizes.wide
        # Bytes of a layer's largest matrix, of which an expert's is one.
        self._largest = sizes.hidden * max(every, wide) * like.element_size()
        whole = sizes.hidden + padding(sizes.hidden)
        widths = sizes.hidden, every + padding(every), mixed, wide + padding(wide), whole
        self._buffers = tuple(like.new_zeros(room, width).numpy() for width in widths)
        self._routing = _routing(sizes, like, room)
        self._plan = np.zeros(kernel("attending").PLAN, np.int64)
        self._work = (*self._buffers, self._scores(64))
        self._memory: tuple[Any, Any] = (None, None)  # a cache's, as tensor and as array
        self._tokens = np.zeros((room, 2), np.int64)
        self._outs: dict[tuple[int, int], Tensor] = {}
        self._turning = turns
        self._turns: Any = like.new_zeros(0, len(turns), sizes.head_dim // 2, 2).numpy()
        self._span: Any = None  # the one that is placed

    def _scores(self, room: int) -> Any:
        """For attention to fewer than `room` keys, in each thread."""
        return np.zeros((threads(), kernel("attending").TOGETHER, room), self.x.dtype)

    def buffers(self, seen: int) -> tuple[Any, ...]:
        """What the kernels work in, with room for scores of `seen` keys."""
        scores = self._work[-1]
        if scores.shape[2] <= seen or len(scores) < threads():
            self._work = (*self._buffers, self._scores(max(64, 1 << seen.bit_length())))
        return *self._work, self._plan, helpers(self._largest), self._routing

    def memory(self, kv: Tensor) -> Any:
        """The memory of a cache as an array."""
        if self._memory[0] is not kv:
            self._memory = kv, kv.numpy()
        return self._memory[1]

    def out(self, rows: int, time: int) -> Tensor:
        """The first rows * time hidden states as a block [rows, time, hidden]."""
        if (rows, time) not in self._outs:
            self._outs[rows, time] = self.hidden[: rows * time].view(rows, time, -1)
        return self._outs[rows, time]

    def place(self, hidden: Tensor, span: Span) -> None:
        """Work out where a block's tokens stand and how they are rotated, unless that is known."""
        at = span.rows, span.starts, span.counts
        if at == self._span:
            return
        self._span = at
        count = sum(span.counts)
        self.tokens = self._tokens[:count]
        rows = range(len(span.starts)) if span.rows is None else span.rows
        first = 0
        for row, start, length in zip(rows, span.starts, span.counts, strict=True):
            for i in range(length):
                self.tokens[first + i, 0], self.tokens[first + i, 1] = row, start + i
            first += length
        self.filling = count < len(span.starts) * span.time
        if self.filling:
            counted = enumerate(span.counts)
            self.index = torch.tensor([r * span.time + i for r, n in counted for i in range(n)])
        if self._turning.tabled:
            turns = self.turns_until(hidden, span.stop)
            alone = len(span.starts) == 1
            self.turns = turns[span.starts[0] : span.stop] if alone else turns[self.tokens[:, 1]]
            return
        turns = torch.view_as_real(self._turning(hidden, span))
        turns = turns.expand(len(span.starts), *turns.shape[1:]).flatten(0, 1)
        turns = turns[self.index] if self.filling else turns
        self.turns = turns.contiguous().numpy()

    def turns_until(self, like: Tensor, stop: int) -> Any:
        """Cos and sin at the positions below `stop` or more, [.., kinds, head_dim / 2, 2]."""
        if len(self._turns) < stop:
            self._turns = torch.view_as_real(self._turning.table(like, stop)).numpy()
        return self._turns


def _routing(sizes: Sizes, like: Tensor, room: int) -> tuple[Any, ...]:
    """What `kernels.experts` works in; without room where a model has none."""
    experts, hidden = sizes.experts, sizes.hidden if sizes.experts else 0
    widths = experts + padding(experts), experts, hidden, hidden + padding(hidden)
    buffers = (like.new_zeros(room, width).numpy() for width in widths)
    return *buffers, np.zeros(room, np.int64)
