"""A key/value cache in which every row of every layer may hold another number of tokens.

Axes: `batch`, `kv_heads`, `time`, `head_dim`. A token that left early has keys and values in the
shallow layers only; it gets the deep ones when it is caught up or propagated. A row's tokens reach
every layer in text order, so the number a layer holds is also the position its next token takes.
"""

from collections.abc import Sequence
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Span:
    """Where a block [rows, time, ...] stands: row i has `counts[i]` tokens from `starts[i]` on.

    Rows with fewer tokens than `time` are filled up at the end; what is computed for the filling
    goes to places that the row's next tokens overwrite and that no mask lets anybody see.
    """

    def __init__(
        self, starts: tuple[int, ...], counts: tuple[int, ...], rows: tuple[int, ...] | None = None
    ):
        """Place a block.

        Args:
            starts: each row's first position.
            counts: each row's tokens.
            rows: of the cache, ascending; None is all of them.
        """
        self.starts, self.counts, self.rows = starts, counts, rows
        self.time = max(counts)  # length of the block's time axis
        self.stop = max(starts) + self.time  # one more than its largest position, filling included
        # What each row holds afterwards.
        self.stops = tuple(map(add, starts, counts))
        # Whether all rows start at one position and have equally many tokens.
        self.even = len(starts) == 1 or (len({*starts}) == 1 and len({*counts}) == 1)
        self._positions: Tensor | None = None
        self._row_index: Tensor | None = None

    def positions(self, device: Any) -> Tensor:
        """Of all tokens, [rows, time] int64; [1, time] where all rows have the same."""
        if self._positions is None:
            starts = [self.starts[:1] if self.even else self.starts]
            self._positions = torch.tensor(starts).t() + torch.arange(self.time)
        return self._positions.to(device)

    def row_index(self, device: Any) -> Tensor:
        """`rows` as a tensor; only for a span that names them."""
        if self._row_index is None:
            self._row_index = torch.tensor(self.rows)
        return self._row_index.to(device)


class Slots(NamedTuple):
    """A block's place in a run of layers, and what its tokens may see there."""

    places: Tensor  # [layers, 2, rows, kv_heads, time, head_dim], to be written
    keys: Tensor  # [layers, rows * kv_heads, head_dim, keys], those of the block included
    values: Tensor  # [layers, rows * kv_heads, keys, head_dim]


class KVCache:
    """Keys and values of a batch of texts, a buffer per layer and a length per layer and row.

    Decoder layers of transformers only ever call `update`, which is all this class shares with
    transformers' own caches.
    """

    def __init__(self, n_layers: int, capacity: int = 64, batch: int = 1):
        """Make an empty cache.

        Args:
            n_layers: decoder layers of the model.
            capacity: tokens to make room for at first; buffers double when they run out.
            batch: rows.
        """
        self.capacity, self.batch = capacity, batch
        self.lengths: list[tuple[int, ...]] = [(0,) * batch] * n_layers
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers
        self._whole: Tensor | None = None  # the buffer that all of these are views of, if they are
        # The same cut out for a run of layers: whole, keys with time last, values.
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._paired = 0

    def span(
        self, layer_idx: int, counts: Sequence[int], rows: tuple[int, ...] | None = None
    ) -> Span:
        """The place of the next `counts` tokens of `rows` (None: all) in a layer."""
        held = self.lengths[layer_idx]
        starts = held if rows is None else tuple(held[row] for row in rows)
        return Span(starts, tuple(counts), rows)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a block with a token of every row at every step to one layer; see `write`."""
        span = self.span(layer_idx, (key.shape[2],) * self.batch)
        return self.write(key, value, layer_idx, span)

    def write(
        self, key: Tensor, value: Tensor, layer_idx: int, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Append a block to one layer.

        Args:
            key: [rows, kv_heads, time, head_dim] of the new tokens, rotated.
            value: the same shape (head_dim may differ).
            layer_idx: index of the layer, from 0.
            span: where the block belongs; its starts are the rows' lengths in this layer.

        Returns:
            Keys and values [rows, kv_heads, `span.stop`, head_dim] of the span's rows, views of the
            buffers where these are all rows and of their dtype; what is beyond a row's tokens means
            nothing.
        """
        keys = self._keys[layer_idx] = self._with_room(self._keys[layer_idx], key, span.stop)
        values = self._values[layer_idx] = self._with_room(
            self._values[layer_idx], value, span.stop
        )
        self._lengthen(layer_idx, span)
        return (
            self._put(keys, key, span).to(key.dtype),
            self._put(values, value, span).to(value.dtype),
        )

    def slots(self, start: int, stop: int, span: Span, like: Tensor) -> Slots:
        """Where a block with equally many tokens of every row goes in layers `start`..`stop`.

        Args:
            start: first layer.
            stop: one more than the last.
            span: an even one, of all rows; the layers count as holding it.
            like: keys and values of one layer, [2, rows, kv_heads, time, head_dim].
        """
        whole = self._whole_with_room(like, span.stop)
        if (start, stop) not in self._parts:
            part = whole[start:stop]
            keys, values = part.flatten(2, 3).unbind(1)
            self._parts[start, stop] = part, keys.transpose(2, 3), values
        part, keys, values = self._parts[start, stop]
        self.lengths[start:stop] = [span.stops] * (stop - start)
        places = part.narrow(4, span.starts[0], span.time)
        return Slots(places, keys.narrow(3, 0, span.stop), values.narrow(2, 0, span.stop))

    def memory(self, stop: int, like: Tensor, kv_heads: int, head_dim: int) -> Tensor:
        """The memory of all layers, with room for `stop` tokens; see `hold`."""
        whole = self._whole
        if whole is None or whole.shape[4] < stop:
            block = like.new_empty(2, self.batch, kv_heads, 1, head_dim)
            whole = self._whole_with_room(block, stop)
        return whole

    def hold(
        self, start: int, stop: int, span: Span, like: Tensor, kv_heads: int, head_dim: int
    ) -> Tensor:
        """The memory of all layers, after which layers `start`..`stop` count as holding a span.

        Args:
            start: first layer.
            stop: one more than the last.
            span: whose keys and values the caller writes.
            like: decides dtype and device.
            kv_heads: of every layer.
            head_dim: of keys and of values.

        Returns:
            [layers, 2 (keys, values), batch, kv_heads, capacity, head_dim].
        """
        whole = self.memory(span.stop, like, kv_heads, head_dim)
        self._lengthen(start, span)
        self.lengths[start:stop] = [self.lengths[start]] * (stop - start)
        return whole

    def pair(self, width: int) -> None:
        """Say how the keys' coordinates are ordered that are written and read from now on.

        Most rotary embeddings turn coordinate i together with i + width / 2, of the first `width`.
        Paired keys have the two side by side, which makes them complex numbers; `width` 0 leaves
        them as the model has them. Scores do not depend on it.
        """
        if self._paired != width:
            for keys in self._keys:
                if keys is not None and self._paired:
                    keys[..., : self._paired] = apart(keys[..., : self._paired])
                if keys is not None and width:
                    keys[..., :width] = side_by_side(keys[..., :width])
            self._paired = width

    def _put(self, buffer: Tensor, block: Tensor, span: Span) -> Tensor:
        """Write the block and return the span's rows of the buffer, up to its last token."""
        if span.rows is None and span.even:
            buffer.narrow(2, span.starts[0], span.time).copy_(block)
            return buffer.narrow(2, 0, span.stop)
        rows = (
            torch.arange(self.batch, device=block.device)
            if span.rows is None
            else span.row_index(block.device)
        )
        # Indices on both sides of a slice bring their axes to the front: [rows, time, kv_heads, ..]
        written = block.transpose(1, 2).to(buffer.dtype)
        buffer[rows[:, None], :, span.positions(block.device)] = written
        seen = buffer.narrow(2, 0, span.stop)
        return seen if span.rows is None else seen.index_select(0, rows)

    def _lengthen(self, layer_idx: int, span: Span) -> None:
        stops = span.stops
        if span.rows is not None:
            changed = dict(zip(span.rows, stops, strict=True))
            held = enumerate(self.lengths[layer_idx])
            stops = tuple(changed.get(row, length) for row, length in held)
        self.lengths[layer_idx] = stops

    def _with_room(self, buffer: Tensor | None, block: Tensor, length: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= length:
            return buffer
        self._whole = None
        self.capacity = max(self.capacity, 1 << (length - 1).bit_length())
        _, heads, _, head_dim = block.shape
        # Zeros, because a masked value still meets its weight of 0, and 0 * nan is nan.
        like = block if buffer is None else buffer
        grown = like.new_zeros(self.batch, heads, self.capacity, head_dim)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def _whole_with_room(self, like: Tensor, length: int) -> Tensor:
        """The buffers of all layers as one, [layers, 2, batch, kv_heads, capacity, head_dim]."""
        if self._whole is not None and self._whole.shape[4] >= length:
            return self._whole
        self._parts.clear()
        self.capacity = max(self.capacity, 1 << (length - 1).bit_length())
        _, _, heads, _, head_dim = like.shape
        shape = len(self.lengths), 2, self.batch, heads, self.capacity, head_dim
        self._whole = whole = like.new_zeros(shape)
        for part, buffers in enumerate((self._keys, self._values)):
            for layer, held in enumerate(buffers):
                if held is not None:
                    whole[layer, part, :, :, : held.shape[2]] = held
            buffers[:] = whole[:, part].unbind()
        return whole

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by one layer's fullest row; the name transformers' layers may ask by."""
        return max(self.lengths[layer_idx])

    def keys_values(self, layer_idx: int, row: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of one row of one layer, [1, kv_heads, time, head_dim] each.

        Coordinates are in the model's own order.
        """
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if keys is None or values is None:
            raise IndexError(f"layer {layer_idx} holds no tokens yet")
        length = self.lengths[layer_idx][row]
        keys, values = keys[row : row + 1, :, :length], values[row : row + 1, :, :length]
        if self._paired:
            keys = torch.cat([apart(keys[..., : self._paired]), keys[..., self._paired :]], -1)
        return keys, values

    def truncate(self, length: int, row: int = 0) -> None:
        """Forget a row's tokens from position `length` on; shorter layers stay as they are."""
        self.lengths = [
            (*held[:row], min(held[row], length), *held[row + 1 :]) for held in self.lengths
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, which are numbered anew in the order given."""
        self._whole = None
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    buffers[layer] = buffer[list(rows)]
        self.lengths = [tuple(held[row] for row in rows) for held in self.lengths]
        self.batch = len(rows)


class Block:
    """What a layer is given as its cache: writes its K/V at one span of a `KVCache`."""

    def __init__(self, cache: KVCache, span: Span):
        """Bind the two."""
        self._cache, self._span = cache, span

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the block; see `KVCache.write`."""
        return self._cache.write(key, value, layer_idx, self._span)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by one layer's fullest row."""
        return self._cache.get_seq_length(layer_idx)


class StoreOnly(Block):
    """A cache that stops a decoder layer as soon as its keys and values are stored.

    Running a layer with it costs the layer's norm and K/V projections (and, in most families, the
    query's) but neither attention nor MLP: KV propagation for any family.
    """

    class Stored(Exception):
        """Raised through the layer once there is nothing left to do in it."""

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the block, then leave the layer."""
        super().update(key, value, layer_idx)
        raise self.Stored


def side_by_side(x: Tensor) -> Tensor:
    """A copy with last coordinates i and i + size / 2 beside each other; see `KVCache.pair`."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def apart(x: Tensor) -> Tensor:
    """What undoes `side_by_side`."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
