"""A key/value cache whose layers may hold different numbers of tokens.

Axes: `batch` (1), `kv_heads`, `time`, `head_dim`. A token that left early has keys and values in
the shallow layers only; it gets the deep ones when it is caught up or propagated. Tokens reach
every layer in text order, so a layer's length is also the position its next token takes.
"""

from typing import Any

from torch import Tensor


class KVCache:
    """Keys and values of one text, a buffer and a length per layer.

    Decoder layers of transformers only ever call `update`, which is all this class shares with
    transformers' own caches.
    """

    def __init__(self, n_layers: int, capacity: int = 64):
        """Make an empty cache.

        Args:
            n_layers: decoder layers of the model.
            capacity: tokens to make room for at first; buffers double when they run out.
        """
        self.capacity = capacity
        self.lengths = [0] * n_layers
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a block to one layer.

        Args:
            key: [batch, kv_heads, time, head_dim] of the new tokens, rotated.
            value: the same shape (head_dim may differ).
            layer_idx: index of the layer, from 0.

        Returns:
            Keys and values of all the layer's tokens, as views of the buffers.
        """
        start = self.lengths[layer_idx]
        stop = start + key.shape[2]
        keys = self._keys[layer_idx] = self._with_room(self._keys[layer_idx], key, stop)
        values = self._values[layer_idx] = self._with_room(self._values[layer_idx], value, stop)
        keys.narrow(2, start, stop - start).copy_(key)
        values.narrow(2, start, stop - start).copy_(value)
        self.lengths[layer_idx] = stop
        return keys.narrow(2, 0, stop), values.narrow(2, 0, stop)

    def _with_room(self, buffer: Tensor | None, block: Tensor, length: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= length:
            return buffer
        self.capacity = max(self.capacity, 1 << (length - 1).bit_length())
        batch, heads, _, head_dim = block.shape
        grown = block.new_empty(batch, heads, self.capacity, head_dim)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by one layer; the name transformers' layers may ask by."""
        return self.lengths[layer_idx]

    def keys_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [batch, kv_heads, time, head_dim] each."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if keys is None or values is None:
            raise IndexError(f"layer {layer_idx} holds no tokens yet")
        length = self.lengths[layer_idx]
        return keys[:, :, :length], values[:, :, :length]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on; shorter layers stay as they are."""
        self.lengths = [min(held, length) for held in self.lengths]


class StoreOnly:
    """A cache that stops a decoder layer as soon as its keys and values are stored.

    Running a layer with it costs the layer's norm and K/V projections (and, in most families, the
    query's) but neither attention nor MLP: KV propagation for any family.
    """

    class Stored(Exception):
        """Raised through the layer once there is nothing left to do in it."""

    def __init__(self, cache: KVCache):
        self._cache = cache

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> None:
        """Store the block, then leave the layer."""
        self._cache.update(key, value, layer_idx)
        raise self.Stored

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by one layer."""
        return self._cache.get_seq_length(layer_idx)
