"""The back end `fused`: Llama-shaped layers as few, plain tensor operations on the CPU.

On small models most of a decoding step is spent between the operations: module calls, norms in six
steps, rotary embeddings that concatenate. Here a layer is four matrix products and about twenty
cheap operations over weights prepared once: q, k and v side by side, gate and up side by side, norm
gains and the attention scale folded in, each matrix in the memory order that is faster here.

Whether a model has the shape this file computes is decided by comparison with the module back end,
not by its name. Axes: `rows`, `time`, `hidden`, `heads`, `kv_heads`, `head_dim`; matrix products
see rows and time as one axis.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoder import Decoder
from .cache import KVCache, Span
from .positions import SLIDING


class Unfit(Exception):
    """Why a model cannot be run by this back end; the message is for the user."""


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
    """Prepared copies of a decoder's layers."""

    decoder: Decoder
    layers: list[Layer]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    qk_eps: float

    def prepare(self, hidden: Tensor, span: Span) -> tuple[Tensor, Tensor, Any]:
        """Rotary cos [rows or 1, time, 1, head_dim], half of sin, and masks by layer type."""
        block = self.decoder.positions.block(hidden, span, boolean=True)
        cos, sin = next(iter(block.embeddings.values()))
        return cos[:, :, None], sin[:, :, None, : self.head_dim // 2], block.masks

    def rotated(self, qk: Tensor, gain: Tensor | None, cos: Tensor, half_sin: Tensor) -> Tensor:
        """Norm queries and keys [..., heads, head_dim] where the family does, and rotate them."""
        if gain is not None:
            qk = normed(qk, self.qk_eps) * gain
        low, high = qk.chunk(2, dim=-1)
        turned = qk * cos
        half = self.head_dim // 2
        turned.narrow(-1, 0, half).addcmul_(high, half_sin, value=-1)
        turned.narrow(-1, half, half).addcmul_(low, half_sin)
        return turned


@dataclass(frozen=True)
class FusedSegment:
    """Layers `start`..`stop` of a `FusedModel`."""

    model: FusedModel
    start: int
    stop: int
    stacked: tuple[Tensor, Tensor | None]  # K and V matrices of all its layers, and their bias

    def run(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> Tensor:
        """Run the layers on a block [rows, time, hidden]."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        cos, half_sin, masks = self.model.prepare(hidden, span)
        x = hidden.flatten(0, 1)
        for index in range(self.start, self.stop):
            layer = self.model.layers[index]
            qkv = product(normed(x, self.model.eps), layer.qkv, layer.qkv_bias)
            qkv = qkv.view(*hidden.shape[:2], -1, self.model.head_dim)
            qk, value = qkv.split((self.model.heads + self.model.kv_heads, self.model.kv_heads), 2)
            qk = self.model.rotated(qk, layer.qk_gain, cos, half_sin)
            query, key = qk.split((self.model.heads, self.model.kv_heads), 2)
            keys, values = cache.write(key.transpose(1, 2), value.transpose(1, 2), index, span)
            mask = masks[self.model.decoder.positions.layer_types[index]]
            x = torch.addmm(x, self._attend(query, keys, values, mask, layer.window), layer.out)
            if layer.out_bias is not None:
                x += layer.out_bias
            gate, up = torch.mm(normed(x, self.model.eps), layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), layer.down)
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

    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """K/V of a block for all layers: one product, one rotation, then a write per layer."""
        model = self.model
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        cos, half_sin, _ = model.prepare(hidden, span)
        layers = self.stop - self.start
        kv = product(normed(hidden.flatten(0, 1), model.eps), *self.stacked)
        kv = kv.view(*hidden.shape[:2], layers, 2, model.kv_heads, model.head_dim)
        gains = [layer.qk_gain for layer in model.layers[self.start : self.stop]]
        gain = None
        if gains[0] is not None:
            gain = torch.stack([g[model.heads :] for g in gains if g is not None])
        keys = model.rotated(kv[..., 0, :, :], gain, cos[:, :, None], half_sin[:, :, None])
        for i in range(layers):
            cache.write(
                keys[:, :, i].transpose(1, 2), kv[:, :, i, 1].transpose(1, 2), self.start + i, span
            )


def normed(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, without a gain."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt_()


def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ matrix + bias` for rows [n, in]."""
    return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)


def segment(model: FusedModel, start: int, stop: int) -> FusedSegment:
    """The segment of layers `start`..`stop`, with its K/V matrices stacked for `store`."""
    first = model.heads * model.head_dim  # queries come first and are not needed
    layers = model.layers[start:stop]
    stack = torch.cat([layer.qkv[:, first:] for layer in layers], dim=1)
    biases = [layer.qkv_bias for layer in layers if layer.qkv_bias is not None]
    bias = torch.cat([b[first:] for b in biases]) if biases else None
    return FusedSegment(model, start, stop, (faster_order(stack), bias))


def fuse(decoder: Decoder) -> FusedModel:
    """Prepare a decoder's layers.

    Raises:
        Unfit: they are not of the shape computed here, or on a device or in a dtype it is not for.
    """
    layers: Any = list(decoder.layers)
    weight = next(layers[0].parameters())
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        raise Unfit(
            f"it is {weight.dtype} on {weight.device.type}; fused is for float32 and 64 on CPUs"
        )
    if decoder.positions.rotary_by_type:
        raise Unfit("its rotary embeddings differ by layer")
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        raise Unfit(f"{decoder.config._attn_implementation} makes its own masks")
    try:
        first = layers[0].self_attn
        kv_heads = first.k_proj.out_features // first.head_dim
        model = FusedModel(
            decoder=decoder,
            layers=[_layer(decoder, i, layer) for i, layer in enumerate(layers)],
            heads=first.q_proj.out_features // first.head_dim,
            kv_heads=kv_heads,
            head_dim=first.head_dim,
            eps=layers[0].input_layernorm.variance_epsilon,
            qk_eps=getattr(getattr(first, "q_norm", None), "variance_epsilon", 0.0),
        )
        _compare(model)
    except (AttributeError, RuntimeError) as error:
        raise Unfit(f"its layers are of another shape ({error})") from None
    return model


def _layer(decoder: Decoder, index: int, layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    for module in linears:
        if type(module) is not nn.Linear:
            raise Unfit(f"it has a {type(module).__name__} in place of a linear layer")
    if any(m.bias is not None for m in linears[4:]):
        raise Unfit("its MLP has biases")
    scale = attention.scaling
    q, k, v = (m.weight * layer.input_layernorm.weight for m in linears[:3])
    biases = [m.bias for m in linears[:3]]
    gain = None
    if hasattr(attention, "q_norm"):
        heads = q.shape[0] // attention.head_dim, k.shape[0] // attention.head_dim
        q_gain, k_gain = attention.q_norm.weight * scale, attention.k_norm.weight
        gain = torch.cat([q_gain.expand(heads[0], -1), k_gain.expand(heads[1], -1)])
    else:
        q = q * scale
        biases[0] = None if biases[0] is None else biases[0] * scale
    sliding = decoder.positions.layer_types[index] == SLIDING
    mlp_gain = layer.post_attention_layernorm.weight
    return Layer(
        qkv=faster_order(torch.cat([q, k, v]).t()),
        qkv_bias=None if biases[0] is None else torch.cat([b for b in biases if b is not None]),
        qk_gain=gain,
        out=faster_order(linears[3].weight.t()),
        out_bias=linears[3].bias,
        gate_up=faster_order(torch.cat([m.weight * mlp_gain for m in linears[4:6]]).t()),
        down=faster_order(linears[6].weight.t()),
        window=decoder.positions.window if sliding else None,
    )


def faster_order(matrix: Tensor) -> Tensor:
    """The [in, out] `matrix` in the memory order in which one row is multiplied sooner here."""
    by_column, by_row = matrix.t().contiguous().t(), matrix.contiguous()
    row = matrix.new_ones(1, matrix.shape[0])

    def seconds(candidate: Tensor) -> float:
        clock = time.perf_counter()
        torch.mm(row, candidate)
        return time.perf_counter() - clock

    trials = [(seconds(by_column), seconds(by_row)) for _ in range(7)]
    best = [min(times) for times in zip(*trials, strict=True)]
    return by_row if best[1] < best[0] else by_column


def _compare(model: FusedModel) -> None:
    """Raise `Unfit` unless random tokens come out as the module back end gives them."""
    decoder = model.decoder
    caches = KVCache(decoder.n_layers), KVCache(decoder.n_layers)
    whole = segment(model, 0, decoder.n_layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, 10), generator=generator)
    for part in ids.split([5, 1, 3, 1], dim=1):
        hidden = decoder.embed(part)
        ours = whole.run(hidden, caches[0])
        theirs = decoder.run(hidden, 0, decoder.n_layers, caches[1])
        tolerance = float(theirs.abs().max()) * torch.finfo(torch.float32).eps ** 0.5
        difference = float((ours - theirs).abs().max())
        if not difference <= tolerance:
            raise Unfit(f"its layers compute something else (they differ by {difference:.2g})")
