"""The back end `fused`: Llama-shaped layers as few, plain tensor operations on the CPU.

On small models most of a decoding step is spent between the operations: module calls, norms in six
steps, rotary embeddings that concatenate. Here a layer is four matrix products and about twenty
cheap operations over weights prepared once: q, k and v side by side, gate and up side by side, norm
gains and the attention scale folded in. `fusing` prepares them. On one token even making a view
costs as much as the arithmetic, so buffers and views are made once for all layers of a segment.

Axes: `rows`, `time`, `hidden`, `heads`, `kv_heads`, `head_dim`; matrix products
see rows and time as one axis.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..decoder import Decoder
from .cache import KVCache, Span


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights, as [in, out] matrices with the norm gains folded in."""

    qkv: Tensor  # [hidden, (heads + 2 kv_heads) * head_dim]
    qkv_bias: Tensor | None
    qk_gain: Tensor | None  # [heads + kv_heads, head_dim], where queries and keys are normed
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor  # [hidden, 2 * intermediate]
    down: Tensor
    window: int | None


@dataclass(frozen=True)
class FusedModel:
    """Prepared copies of a decoder's layers.

    A root-mean-square norm is `x / hypot(|x|, sqrt(size * eps))` times the square root of the size,
    which is folded into the weights with the gain: three cheap operations, measured at a quarter of
    the time of the textbook's five.
    """

    decoder: Decoder
    layers: list[Layer]
    heads: int
    kv_heads: int
    head_dim: int
    floor: Tensor  # sqrt(hidden * eps), a scalar
    qk_floor: Tensor  # the same of the norms of queries and keys

    def place(self, hidden: Tensor, span: Span) -> tuple[Tensor, Tensor, Any]:
        """Rotary cos [rows or 1, time, 1, head_dim], half of sin, and masks by layer type."""
        block = self.decoder.positions.block(hidden, span, boolean=True)
        cos, sin = next(iter(block.embeddings.values()))
        return cos[:, :, None], sin[:, :, None, : self.head_dim // 2], block.masks


class Rotation:
    """Norms and rotates queries and keys [..., heads, head_dim], always the same buffers."""

    def __init__(self, source: Tensor, cos: Tensor, half_sin: Tensor, floor: Tensor):
        """Make the views once: together they cost more than the arithmetic on one token."""
        self._source, self._cos, self._half_sin, self._floor = source, cos, half_sin, floor
        self.turned = torch.empty_like(source, memory_format=torch.contiguous_format)
        self._low, self._high = source.chunk(2, dim=-1)
        self._turned_low, self._turned_high = self.turned.chunk(2, dim=-1)

    def __call__(self, gain: Tensor | None) -> Tensor:
        """Rotate what is in the source now; the result is valid until the next call."""
        if gain is not None:
            size = torch.linalg.vector_norm(self._source, dim=-1, keepdim=True)
            self._source.div_(size.hypot_(self._floor)).mul_(gain)
        torch.mul(self._source, self._cos, out=self.turned)
        self._turned_low.addcmul_(self._high, self._half_sin, value=-1)
        self._turned_high.addcmul_(self._low, self._half_sin)
        return self.turned


@dataclass(frozen=True)
class FusedSegment:
    """Layers `start`..`stop` of a `FusedModel`."""

    model: FusedModel
    start: int
    stop: int
    stacked: tuple[Tensor, Tensor | None]  # K and V matrices of all its layers, and their bias

    @torch.no_grad()
    def run(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> Tensor:
        """Run the layers on a block [rows, time, hidden]."""
        model, types = self.model, self.model.decoder.positions.layer_types
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        cos, half_sin, masks = model.place(hidden, span)
        x = hidden.flatten(0, 1).clone()  # the sum of all layers' outputs so far, in place
        # Buffers for all layers, and the views into them.
        x_normed, size = torch.empty_like(x), x.new_empty(len(x), 1)
        qkv = x.new_empty(len(x), model.layers[0].qkv.shape[1])
        by_head = qkv.view(*hidden.shape[:2], -1, model.head_dim)
        qk, value = by_head.split((model.heads + model.kv_heads, model.kv_heads), 2)
        rotate = Rotation(qk, cos, half_sin, model.qk_floor)
        query, key = rotate.turned.split((model.heads, model.kv_heads), 2)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        gate_up = x.new_empty(len(x), model.layers[0].gate_up.shape[1])
        gate, up = gate_up.chunk(2, dim=-1)
        write = cache.writer(self.start, self.stop, span, key)
        for index in range(self.start, self.stop):
            layer = model.layers[index]
            product(normed(x, model.floor, size, x_normed), layer.qkv, layer.qkv_bias, qkv)
            rotate(layer.qk_gain)
            keys, values = write(key, value, index)
            mixed = self._attend(query, keys, values, masks[types[index]], layer.window)
            x.addmm_(mixed, layer.out)
            if layer.out_bias is not None:
                x += layer.out_bias
            torch.mm(normed(x, model.floor, size, x_normed), layer.gate_up, out=gate_up)
            x.addmm_(F.silu(gate).mul_(up), layer.down)
        return x.view_as(hidden)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, window: int | None
    ) -> Tensor:
        """Attention of a block's queries [rows, time, heads, head_dim] -> [rows * time, hidden]."""
        rows, time = query.shape[:2]
        if time == 1:
            return self._attend_once(query, keys, values, mask, window)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=1.0,
            enable_gqa=self.model.heads != self.model.kv_heads,
        )
        return mixed.transpose(1, 2).reshape(rows * time, -1)

    def _attend_once(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, window: int | None
    ) -> Tensor:
        """A token of each row: two small batched products beat the general kernel."""
        rows, length = keys.shape[0], keys.shape[2]
        if window is not None and length > window and rows == 1:
            keys, values, mask = keys[:, :, -window:], values[:, :, -window:], None
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        grouped = query.reshape(keys.shape[0], -1, self.model.head_dim)
        scores = torch.bmm(grouped, keys.transpose(1, 2))
        if mask is not None:  # [rows or 1, 1, 1, keys]
            by_row = scores.view(rows, -1, scores.shape[-1])
            by_row.masked_fill_(~mask[:, 0], -torch.inf)
        return torch.bmm(scores.softmax(-1), values).view(rows, -1)

    @torch.no_grad()
    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """K/V of a block for all layers: one product, one rotation, then a write per layer."""
        model = self.model
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        cos, half_sin, _ = model.place(hidden, span)
        layers = self.stop - self.start
        x = hidden.flatten(0, 1)
        x = normed(x, model.floor, x.new_empty(len(x), 1), torch.empty_like(x))
        kv = product(x, *self.stacked).view(
            *hidden.shape[:2], layers, 2, model.kv_heads, model.head_dim
        )
        gains = [layer.qk_gain for layer in model.layers[self.start : self.stop]]
        gain = None
        if gains[0] is not None:
            gain = torch.stack([g[model.heads :] for g in gains if g is not None])
        rotate = Rotation(kv[..., 0, :, :], cos[:, :, None], half_sin[:, :, None], model.qk_floor)
        # [layers, rows, kv_heads, time, head_dim]
        keys, values = rotate(gain).permute(2, 0, 3, 1, 4), kv[..., 1, :, :].permute(2, 0, 3, 1, 4)
        write = cache.writer(self.start, self.stop, span, keys[0])
        for i, (key, value) in enumerate(zip(keys.unbind(), values.unbind(), strict=True)):
            write(key, value, self.start + i)


@dataclass(frozen=True)
class FusedReadout:
    """The final norm and the LM head of a `Decoder`."""

    head: Tensor  # [hidden, vocab]
    floor: Tensor  # of the norm; see `FusedModel`

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, hidden] after any layer -> logits [rows, vocab]."""
        size = hidden.new_empty(len(hidden), 1)
        return torch.mm(normed(hidden, self.floor, size, torch.empty_like(hidden)), self.head)


def normed(x: Tensor, floor: Tensor, size: Tensor, out: Tensor) -> Tensor:
    """Root-mean-square norm of rows [n, hidden] without its factor (see `FusedModel`)."""
    torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=size)
    return torch.div(x, size.hypot_(floor), out=out)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`x @ matrix + bias` for rows [n, in]."""
    if bias is None:
        return torch.mm(x, matrix, out=out)
    return torch.addmm(bias, x, matrix, out=out)
