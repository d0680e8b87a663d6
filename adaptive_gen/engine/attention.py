"""Attention of the back end `fused`: one block of tokens over the cache, layer after layer.

Axes: `rows`, `time`, `keys`, `heads`, `kv_heads`, `head_dim`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import KVCache, Span
from .positions import SLIDING, Positions
from .workspace import Room

_FEW = 24  # tokens of a block for which batched products beat torch's general kernel


class Attention:
    """Writes a block's keys and values into layers `start`..`stop`, and attends to them."""

    def __init__(
        self,
        room: Room,
        positions: Positions,
        cache: KVCache,
        span: Span,
        start: int,
        stop: int,
        softcap: float | None,
    ):
        """Make the views of all layers at once: they take little more time than those of one."""
        self._softcap = softcap
        self._room, self._cache, self._span = room, cache, span
        self._types, self._start = positions.layer_types, start
        self._few = span.time <= _FEW or softcap is not None  # which torch's kernel does not know
        # Rows alike share one buffer, and only need to be told where their own block hides things.
        self._alike = span.rows is None and span.even
        limited = positions.window is not None and span.stop > positions.window
        sliding = limited and SLIDING in positions.types
        self._window = positions.window if sliding else None
        self._blocked: dict[str, Tensor | None] = dict.fromkeys(positions.types)
        if not (self._alike and self._few) or (sliding and span.time > 1):
            masks = positions.masks(room.hidden, span)
            self._blocked = {k: None if m is None else ~m for k, m in masks.items()}
        if self._alike:
            slots = cache.slots(start, stop, span, room.kv)
            self._places, self._keys = slots.places.unbind(), slots.keys.unbind()
            self._values = slots.values.unbind()
        if self._few:
            self._scores = room.mixed.new_empty(*room.mixed.shape[:2], span.stop)
        if self._few and span.time > 1:
            by_time = self._scores.view(-1, span.time, span.stop)
            self._newest = by_time.narrow(2, span.stop - span.time, span.time)

    def __call__(self, index: int) -> Tensor:
        """Attention of layer `index` -> [rows * time, heads * head_dim]."""
        sliding = self._window is not None and self._types[index] == SLIDING
        if not self._alike:
            key, value = self._room.kv
            keys, values = self._cache.write(key, value, index, self._span)
            if not self._few:
                return self._general(keys, values, self._blocked[self._types[index]])
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
            return self._products(keys.transpose(1, 2), values, index)
        at = index - self._start
        self._places[at].copy_(self._room.kv)
        keys, values = self._keys[at], self._values[at]
        if not self._few:
            rows = len(self._room.query)
            keys, values = (x.unflatten(0, (rows, -1)) for x in (keys.transpose(1, 2), values))
            return self._general(keys, values, self._blocked[self._types[index]])
        if sliding and self._span.time == 1:
            return self._last(keys, values)
        return self._products(keys, values, index)

    def _products(self, keys: Tensor, values: Tensor, index: int) -> Tensor:
        """By two batched products; keys [rows * kv_heads, head_dim, keys]."""
        room, scores = self._room, self._scores
        torch.bmm(room.grouped(), keys, out=scores)
        soften(scores, self._softcap)
        blocked = self._blocked[self._types[index]]
        if blocked is not None:  # [rows or 1, 1, time, keys]
            rows, time = len(room.query), self._span.time
            scores.view(rows, -1, time, scores.shape[-1]).masked_fill_(blocked, -torch.inf)
        elif self._span.time > 1:
            self._newest.masked_fill_(room.later, -torch.inf)
        torch.bmm(torch.softmax(scores, -1), values, out=room.mixed)
        return room.joined()

    def _last(self, keys: Tensor, values: Tensor) -> Tensor:
        """One token of each row over the last keys that a sliding window shows it."""
        assert self._window is not None
        first = keys.shape[-1] - self._window
        scores = torch.bmm(self._room.grouped(), keys[:, :, first:])
        soften(scores, self._softcap)
        torch.bmm(torch.softmax(scores, -1), values[:, first:], out=self._room.mixed)
        return self._room.joined()

    def _general(self, keys: Tensor, values: Tensor, blocked: Tensor | None) -> Tensor:
        """By torch's kernel; keys [rows, kv_heads, keys, head_dim]."""
        query = self._room.query
        mixed = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=None if blocked is None else ~blocked,
            is_causal=blocked is None,
            scale=1.0,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)


def soften(numbers: Tensor, softcap: float | None) -> Tensor:
    """Bend numbers so that they stay below a cap, if there is one, in place."""
    return numbers if softcap is None else numbers.div_(softcap).tanh_().mul_(softcap)
