"""Llama-shaped layers as steps over static buffers, on the model's own weights.

Nothing is copied: a layer holds the parameters themselves, so weights that change in place are
seen. What a step does depends on no Python value that changes from token to token; lengths and
positions are read from the plan on the device.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..decoder import Decoder
from ..kernels.operations import Operations
from ..kernels.plan import Heads
from .layer_parts import Unfit, other_layers
from .positions import SLIDING
from .slab import Slab, Workspace


@dataclass(frozen=True)
class StaticLayer:
    """One decoder layer's own weights, [out, in] each."""

    qkv: tuple[Tensor, Tensor, Tensor]
    qkv_bias: tuple[Tensor | None, Tensor | None, Tensor | None]
    out: Tensor
    out_bias: Tensor | None
    gate: Tensor
    up: Tensor
    down: Tensor
    input_norm: tuple[Tensor, float]  # gain and eps
    mlp_norm: tuple[Tensor, float]
    qk_norms: tuple[Tensor, Tensor, float] | None  # gains of queries and keys, and eps
    scale: float
    window: int | None


@dataclass(frozen=True)
class StaticModel:
    """A decoder's layers and what computes them."""

    layers: list[StaticLayer]
    heads: Heads
    operations: Operations

    def run(self, start: int, stop: int, slab: Slab, work: Workspace) -> None:
        """Run layers `start`..`stop` on the workspace's tokens, from its input to its output."""
        do, x = self.operations, work.hidden
        for index in range(start, stop):
            layer, keys, values = self.layers[index], slab.keys[index], slab.values[index]
            projected = do.project(x, *layer.input_norm, layer.qkv, layer.qkv_bias)
            query = do.write(
                projected, self.heads, layer.qk_norms, slab.table, work.plan, keys, values
            )
            mixed = do.attend(query, keys, values, work.plan, layer.scale, layer.window)
            x = x + F.linear(mixed, layer.out, layer.out_bias)
            inner = do.gated(x, *layer.mlp_norm, layer.gate, layer.up)
            x = x + F.linear(inner, layer.down)
        work.out.copy_(x)

    def store(self, start: int, stop: int, slab: Slab, work: Workspace) -> None:
        """Give layers `start`..`stop` the K/V of the workspace's tokens, as they are."""
        heads = Heads(0, self.heads.kv, self.heads.dim)
        for index in range(start, stop):
            layer, do = self.layers[index], self.operations
            kv, bias = layer.qkv[1:], layer.qkv_bias[1:]
            projected = do.project(work.hidden, *layer.input_norm, kv, bias)
            keys, values = slab.keys[index], slab.values[index]
            do.write(projected, heads, layer.qk_norms, slab.table, work.plan, keys, values)


def build(decoder: Decoder, operations: Operations) -> StaticModel:
    """A decoder's layers as a `StaticModel`.

    Raises:
        Unfit: they are not of the shape computed here.
    """
    layers: Any = list(decoder.layers)
    if decoder.positions.rotary_by_type or not decoder.positions.tabled:
        raise Unfit("its rotary embeddings depend on the layer or on the length of the text")
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        raise Unfit(f"{decoder.config._attn_implementation} makes its own masks")
    try:
        first = layers[0].self_attn
        dim = first.head_dim
        heads = Heads(first.q_proj.out_features // dim, first.k_proj.out_features // dim, dim)
        return StaticModel(
            [_layer(decoder, i, layer) for i, layer in enumerate(layers)], heads, operations
        )
    except AttributeError as error:
        raise other_layers(layers[0], error) from None


def _layer(decoder: Decoder, index: int, layer: Any) -> StaticLayer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, out = (getattr(attention, f"{name}_proj") for name in "qkvo")
    linears = [q, k, v, out, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    for module in linears:
        if type(module) is not nn.Linear:
            kind = f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
            raise Unfit(f"it has {kind} in place of a linear layer")
    if any(m.bias is not None for m in linears[4:]):
        raise Unfit("its MLP has biases")
    sliding = decoder.positions.layer_types[index] == SLIDING
    norms = None
    if hasattr(attention, "q_norm"):
        gain, eps = norm_of(attention.q_norm)
        norms = gain, norm_of(attention.k_norm)[0], eps
    return StaticLayer(
        qkv=(q.weight.detach(), k.weight.detach(), v.weight.detach()),
        qkv_bias=(_detached(q.bias), _detached(k.bias), _detached(v.bias)),
        out=out.weight.detach(),
        out_bias=_detached(out.bias),
        gate=mlp.gate_proj.weight.detach(),
        up=mlp.up_proj.weight.detach(),
        down=mlp.down_proj.weight.detach(),
        input_norm=norm_of(layer.input_layernorm),
        mlp_norm=norm_of(layer.post_attention_layernorm),
        qk_norms=norms,
        scale=attention.scaling,
        window=decoder.positions.window if sliding else None,
    )


def norm_of(norm: Any) -> tuple[Tensor, float]:
    """A root-mean-square norm's gain and eps; `AttributeError` for another norm."""
    return norm.weight.detach(), norm.variance_epsilon


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
