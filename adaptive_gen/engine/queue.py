"""What waits in front of a segment: hidden states of each row's pending tokens, oldest first.

Axes: `rows`, `time`, `hidden`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import Span

_ROOM = 32  # tokens a row has room for at first; the buffer doubles when that runs out


class Queue:
    """A buffer [batch, capacity, hidden] and the number of tokens in it for each row.

    Most blocks only pass through an empty queue, so one may be lent: it stays where it is and is
    copied only if something else is about to use that place (`own`).
    """

    def __init__(self, batch: int = 1):
        """Start empty."""
        self.counts = [0] * batch
        self._buffer: Tensor | None = None
        self._lent: Tensor | None = None

    def lend(self, block: Tensor, counts: Sequence[int], rows: tuple[int, ...] | None) -> None:
        """`push` a block that stays as it is until `own` is called."""
        if rows is None and len(counts) == 1 and not self.counts[0]:
            self._lent, self.counts[0] = block, counts[0]
        else:
            self.push(block, counts, rows)

    def own(self) -> None:
        """Copy what is lent: its place is about to be used for something else."""
        if self._lent is not None:
            block, self._lent = self._lent, None
            counts, self.counts[0] = [self.counts[0]], 0
            self.push(block, counts)

    def wait_in(self, buffer: Tensor) -> None:
        """Keep what waits in `buffer` [batch, capacity, hidden] from now on; it must have room."""
        self.own()
        if self._buffer is not buffer:
            if self._buffer is not None:
                held = max(self.counts)
                buffer[:, :held] = self._buffer[:, :held]
            self._buffer = buffer

    def push(
        self, block: Tensor, counts: Sequence[int], rows: tuple[int, ...] | None = None
    ) -> None:
        """Append `counts[i]` tokens of the block [rows, time, hidden] to each of `rows`."""
        self.own()
        held = self.counts if rows is None else [self.counts[row] for row in rows]
        if rows is None and len(held) == 1:
            buffer = self._buffer = self._with_room(block, held[0] + counts[0])
            buffer.narrow(1, held[0], counts[0]).copy_(block)
            self.counts[0] += counts[0]
            return
        span = Span(tuple(held), tuple(counts), rows)
        buffer = self._buffer = self._with_room(block, span.stop)
        if span.even and rows is None:
            buffer.narrow(1, span.starts[0], span.time).copy_(block)
        else:
            every = range(len(self.counts)) if rows is None else rows
            index = torch.tensor(every, device=block.device)[:, None]
            buffer[index, span.positions(block.device)] = block
        for row, start, count in zip(rows or range(len(held)), span.starts, counts, strict=True):
            self.counts[row] = start + count

    def take(self, rows: tuple[int, ...] | None = None) -> tuple[Tensor, list[int]]:
        """Remove all that waits for `rows` (None: all).

        Returns:
            The tokens [rows, time, hidden], each row's first, filled up at the end; and how many of
            them there are for each row. The tokens are valid until the next `push`, and no longer
            than they were when they are lent.
        """
        if self._lent is not None:
            block, self._lent = self._lent, None
            counts, self.counts[0] = [self.counts[0]], 0
            return block[:, : counts[0]] if block.shape[1] > counts[0] else block, counts
        assert self._buffer is not None
        every = range(len(self.counts)) if rows is None else rows
        counts = [self.counts[row] for row in every]
        for row in every:
            self.counts[row] = 0
        block = self._buffer.narrow(1, 0, max(counts))
        if rows is not None:
            block = block.index_select(0, torch.tensor(rows, device=block.device))
        return block, counts

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, which are numbered anew in the order given."""
        self.own()
        self.counts = [self.counts[row] for row in rows]
        if self._buffer is not None:
            self._buffer = self._buffer[list(rows)]

    def _with_room(self, block: Tensor, length: int) -> Tensor:
        buffer = self._buffer
        if buffer is not None and buffer.shape[1] >= length:
            return buffer
        capacity = max(_ROOM, 1 << (length - 1).bit_length())
        # Zeros: filling is computed on, and nan would spread.
        grown = block.new_zeros(len(self.counts), capacity, block.shape[2])
        if buffer is not None:
            grown[:, : buffer.shape[1]] = buffer
        return grown


def newest(block: Tensor, counts: Sequence[int]) -> Tensor:
    """The last token of each row of a block [rows, time, hidden] -> [rows, hidden]."""
    if len({*counts}) == 1:
        return block[:, counts[0] - 1]
    index = torch.tensor([count - 1 for count in counts], device=block.device)
    return block[torch.arange(len(counts), device=block.device), index]


def latest(block: Tensor, counts: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The last `wanted[i]` tokens of each row of a block, row after row: [sum, hidden]."""
    if len(counts) == 1:
        return block[0, counts[0] - wanted[0] : counts[0]]
    parts = [block[i, n - w : n] for i, (n, w) in enumerate(zip(counts, wanted, strict=True))]
    return torch.cat(parts)
