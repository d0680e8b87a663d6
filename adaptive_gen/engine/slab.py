"""Buffers at fixed addresses, and a K/V cache that lives in them.

A captured graph reads and writes the addresses it was captured with. So the buffers of a batch, a
*slab*, outlive the generation that used them and are lent to the next one; a `SlabCache` is a
`KVCache` on a slab it has for itself.

Axes: `slots` (rows of the buffers), `kv_heads`, `capacity`, `head_dim`, `tokens`, `hidden`.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.plan import Heads, Plan
from .cache import KVCache, Span
from .lasting import lasting

_KEPT = 2  # slabs that wait to be lent again; more would only hold memory


class Workspace:
    """Input, output and plan of a step with room for `tile` tokens."""

    def __init__(self, tile: int, slots: int, capacity: int, like: Tensor):
        """Make buffers; `like` is [.., hidden] and decides dtype and device."""
        self._slots, self._dump = slots, capacity - 1
        with lasting():
            self.hidden = like.new_zeros(tile, like.shape[-1])
            self.out = torch.zeros_like(self.hidden)
            self._numbers = torch.zeros(3 * tile + 3 * slots, dtype=torch.int64, device=like.device)
            self._source, of_slots, positions, *by_slot = self._numbers.split(
                [tile, tile, tile, slots, slots, slots]
            )
            self.plan = Plan(of_slots, positions, *by_slot)
        self._tile = tile

    def fill(self, block: Tensor, span: Span, slots: Sequence[int]) -> None:
        """Lay out the tokens of a block [rows, time, hidden].

        Args:
            block: its filling is left out.
            span: its place; the rows are those of `slots`.
            slots: of each row.
        """
        rows = list(zip(slots, span.starts, span.counts, strict=True))
        of_slots = [slot for slot, _, count in rows for _ in range(count)]
        positions = [start + i for _, start, count in rows for i in range(count)]
        source = [r * span.time + i for r, count in enumerate(span.counts) for i in range(count)]
        spare = self._tile - len(source)
        by_slot = [[0] * self._slots for _ in range(3)]
        first = 0
        for slot, start, count in rows:
            for values, value in zip(by_slot, (first, count, start), strict=True):
                values[slot] = value
            first += count
        numbers = [*source, *[0] * spare, *of_slots, *[0] * spare]
        numbers += [*positions, *[self._dump] * spare, *by_slot[0], *by_slot[1], *by_slot[2]]
        self._numbers.copy_(_staged(numbers, self._numbers.device), non_blocking=True)
        torch.index_select(block.flatten(0, 1), 0, self._source, out=self.hidden)

    def result(self, span: Span) -> Tensor:
        """The output as a block of its own, [rows, time, hidden]; the filling is zeros."""
        rows, used = len(span.counts), sum(span.counts)
        if used == rows * span.time:
            return self.out[:used].clone().view(rows, span.time, -1)
        block = self.out.new_zeros(rows * span.time, self.out.shape[1])
        block.index_copy_(0, self._source[:used], self.out[:used])
        return block.view(rows, span.time, -1)


def _staged(numbers: list[int], device: torch.device) -> Tensor:
    """A tensor to copy to the device without waiting for it.

    Pinned memory is only reused by torch once the copies out of it are done.
    """
    staged = torch.tensor(numbers)
    return staged.pin_memory() if device.type == "cuda" else staged


class Slab:
    """K/V buffers of all layers, rotary tables, and what was captured on them."""

    def __init__(
        self, n_layers: int, slots: int, capacity: int, heads: Heads, table: tuple[Tensor, Tensor]
    ):
        """Make empty buffers.

        Args:
            n_layers: of the model.
            slots: rows.
            capacity: positions; the last one is where filling is written to.
            heads: of keys and values.
            table: rotary cos and sin, [capacity or more, head_dim] each; dtype and device too.
        """
        self.slots, self.capacity = slots, capacity
        shape = 2, n_layers, slots, heads.kv, capacity, heads.dim
        with lasting():
            self._whole = table[0].new_zeros(shape)
            cos, sin = (part[:capacity].contiguous() for part in table)
            self.table = cos, sin
        self.keys, self.values = (list(part.unbind()) for part in self._whole.unbind())
        self._workspaces: dict[int, Workspace] = {}
        # (kind, start, stop, tile) -> what runs it
        self.recorded: dict[tuple[str, int, int, int], Callable[[], None]] = {}

    def clear(self) -> None:
        """Forget K/V: a masked value still meets its weight of 0, and 0 * nan is nan."""
        self._whole.zero_()

    def take_over(self, other: "Slab") -> None:
        """Copy another slab's K/V, which is shorter."""
        self._whole[:, :, :, :, : other.capacity].copy_(other._whole)

    def workspace(self, tile: int, like: Tensor) -> Workspace:
        """Buffers for `tile` tokens with hidden states `like` these."""
        if tile not in self._workspaces:
            self._workspaces[tile] = Workspace(tile, self.slots, self.capacity, like)
        return self._workspaces[tile]


class Slabs:
    """Lends slabs and takes them back."""

    def __init__(self, make: Callable[[int, int], Slab]):
        """`make(slots, capacity)` gives a new one."""
        self._make = make
        self._free: list[Slab] = []

    def take(self, slots: int, length: int) -> Slab:
        """A cleared slab for texts of up to `length` tokens."""
        for slab in self._free:
            if slab.slots == slots and slab.capacity > length:
                self._free.remove(slab)
                slab.clear()
                return slab
        return self._make(slots, max(64, 1 << length.bit_length()))

    def give(self, slab: Slab) -> None:
        """Take a slab back once nobody reads it; the longest-waiting one makes room."""
        self._free = [*self._free, slab][-_KEPT:]


class SlabCache(KVCache):
    """A `KVCache` whose rows are slots of a slab; dropping rows moves nothing."""

    def __init__(self, n_layers: int, capacity: int, batch: int, slabs: Slabs):
        """Borrow a slab; it goes back when nothing refers to this cache any more."""
        super().__init__(n_layers, capacity, batch)
        self._slabs = slabs
        self.taken = tuple(range(batch))  # each row's slot
        self._borrow(slabs.take(batch, capacity))

    def _borrow(self, slab: Slab) -> None:
        self.slab = slab
        self._return = weakref.finalize(self, self._slabs.give, slab)

    def reserve(self, length: int) -> None:
        """Make room for texts of `length` tokens: in another slab if this one is too short."""
        if length < self.slab.capacity:
            return
        larger = self._slabs.take(self.slab.slots, length)
        larger.take_over(self.slab)
        self._return.detach()  # a slab once too short is not worth keeping
        self._borrow(larger)

    def of(self, span: Span) -> tuple[int, ...]:
        """The slots of a span's rows."""
        return self.taken if span.rows is None else tuple(self.taken[row] for row in span.rows)

    def lengthen(self, start: int, stop: int, span: Span) -> None:
        """Note that layers `start`..`stop` have got the span's K/V."""
        for layer_idx in range(start, stop):
            self._lengthen(layer_idx, span)

    def write(
        self, key: Tensor, value: Tensor, layer_idx: int, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Append a block to one layer; see `KVCache.write`."""
        self.reserve(span.stop)
        self._lengthen(layer_idx, span)
        keys, values = self.slab.keys[layer_idx], self.slab.values[layer_idx]
        slots = self.of(span)
        return self._written(keys, key, span, slots), self._written(values, value, span, slots)

    def _written(self, buffer: Tensor, block: Tensor, span: Span, slots: tuple[int, ...]) -> Tensor:
        seen = buffer.narrow(2, 0, span.stop)
        index = torch.tensor(slots, device=block.device)
        # Indices on both sides of a slice bring their axes to the front: [rows, time, kv_heads, ..]
        seen[index[:, None], :, span.positions(block.device)] = block.transpose(1, 2)
        return seen if slots == tuple(range(len(buffer))) else seen.index_select(0, index)

    def keys_values(self, layer_idx: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of one row of one layer, [1, kv_heads, time, head_dim] each."""
        slot, length = self.taken[row], self.lengths[layer_idx][row]
        if not any(self.lengths[layer_idx]):
            raise IndexError(f"layer {layer_idx} holds no tokens yet")
        buffers: Any = self.slab.keys[layer_idx], self.slab.values[layer_idx]
        keys, values = (buffer[slot : slot + 1, :, :length] for buffer in buffers)
        return keys, values

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, which are numbered anew in the order given."""
        self.taken = tuple(self.taken[row] for row in rows)
        self.lengths = [tuple(held[row] for row in rows) for held in self.lengths]
        self.batch = len(rows)
