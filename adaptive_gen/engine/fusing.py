"""Preparing a model for the back end `fused`: its weights side by side, scaled and laid out.

Whether a model has the shape that `fused` computes is decided by comparison with the module back
end, not by its name.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoder import Decoder
from .cache import KVCache, side_by_side
from .fused import FusedModel, FusedReadout, FusedSegment, Layer, Matrix, normed
from .int8 import Int8Matrix
from .narrow import BITS, NarrowMatrix
from .workspace import Sizes, Workspace

WIDE = (torch.float32, torch.float64)  # what hidden states and sums are in here


class Unfit(Exception):
    """Why a model cannot be run by this back end; the message is for the user."""


def stacked(model: FusedModel, start: int, stop: int) -> tuple[Matrix, Tensor | None]:
    """The K and V matrices of layers `start`..`stop` side by side, and their bias."""
    first = model.sizes.heads * model.sizes.head_dim  # queries come first and are not needed
    layers = model.layers[start:stop]
    whole = [m if isinstance(m, Tensor) else m.float() for m in (x.qkv for x in layers)]
    stack = torch.cat([matrix[:, first:] for matrix in whole], dim=1)
    biases = [layer.qkv_bias for layer in layers if layer.qkv_bias is not None]
    bias = torch.cat([b[first:] for b in biases]) if biases else None
    if isinstance(layers[0].qkv, Int8Matrix):
        return Int8Matrix.of(stack), bias
    return faster_order(stack), bias


def fuse(decoder: Decoder, kept: Callable[[Any, Layer], Layer] | None = None) -> FusedModel:
    """Prepare a decoder's layers, one after the other.

    Args:
        decoder: whose layers they are.
        kept: makes of each layer, the model's own and the prepared one, what is kept of it, once
            that is known to be right. Layers in half precision are only prepared for that: their
            hidden states are then float32.

    Raises:
        Unfit: they are not of the shape computed here, or on a device or in a dtype it is not for.
    """
    layers: Any = list(decoder.layers)
    weight = next(layers[0].parameters())
    known = WIDE if kept is None else (*WIDE, *BITS)
    if weight.device.type != "cpu" or weight.dtype not in known:
        raise Unfit(
            f"it is {weight.dtype} on {weight.device.type}; compiled and fused are for CPUs and "
            "for float32, float64, bfloat16 and float16"
        )
    if decoder.positions.rotary_by_type:
        raise Unfit("its rotary embeddings differ by layer")
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        raise Unfit(f"{decoder.config._attn_implementation} makes its own masks")
    try:
        first = layers[0].self_attn
        sizes = Sizes(
            hidden=first.q_proj.in_features,
            heads=first.q_proj.out_features // first.head_dim,
            kv_heads=first.k_proj.out_features // first.head_dim,
            head_dim=first.head_dim,
            intermediate=layers[0].mlp.up_proj.out_features,
            floor=_floor(layers[0].input_layernorm),
        )
        floor = _floor(getattr(first, "q_norm", None))
        model = FusedModel(decoder, [], sizes, wide(weight[:0]).new_tensor(floor))
        order = faster_order if kept is None else _as_it_is
        states = _states(decoder)
        for index, layer in enumerate(layers):
            if {p.dtype for p in layer.parameters() if p.dim() == 2} != {weight.dtype}:
                raise Unfit("its layers' weights are not all of one dtype")
            layer, own = wide(layer), layer
            model.layers.append(_layer(layer, order))
            reference = decoder if layer is own else decoder.with_layer(index, layer)
            states = _compared(model, reference, index, states)
            if kept is not None:
                model.layers[index] = kept(own, model.layers[index])
    except (AttributeError, RuntimeError) as error:
        raise Unfit(f"its layers are of another shape ({error})") from None
    return model


def wide(thing: Any) -> Any:
    """A tensor or module as it is if it is in float32 or 64, else a copy in float32."""
    dtype = thing.dtype if isinstance(thing, Tensor) else next(thing.parameters()).dtype
    if dtype in WIDE:
        return thing
    return thing.float() if isinstance(thing, Tensor) else copy.deepcopy(thing).float()


def fuse_readout(norm: Any, head: nn.Linear, to_round: bool = False) -> FusedReadout | None:
    """Prepare a root-mean-square norm and the head behind it; None if the norm is another.

    It does not matter how the head lies in memory if it is going to be rounded.
    """
    if not hasattr(norm, "variance_epsilon"):
        return None
    norm, weight = wide(norm), wide(head.weight)
    order = _as_it_is if to_round else faster_order
    matrix = order((weight * gain(norm)).t())
    readout = FusedReadout(matrix, weight.new_tensor(_floor(norm)))
    hidden = _hidden(norm)
    expected = F.linear(norm(hidden), weight)
    return readout if _difference(readout(hidden), expected) is None else None


def narrow_readout(norm: Any, head: nn.Linear) -> FusedReadout | None:
    """The same for a head in half precision that is read as it is."""
    if not hasattr(norm, "variance_epsilon"):
        return None
    norm, own = wide(norm), head.weight.detach()
    floor, factor, hidden = norm.weight.new_tensor(_floor(norm)), gain(norm).detach(), _hidden(norm)
    if _difference(normed(hidden, floor) * factor, norm(hidden)) is not None:
        return None
    return FusedReadout(NarrowMatrix(lambda: own, factor, factor.new_ones(len(own))), floor)


def _hidden(norm: Any) -> Tensor:
    """Random hidden states [3, hidden]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, norm.weight.numel(), generator=generator, dtype=norm.weight.dtype)


def narrowed(layer: Any, prepared: Layer) -> Layer:
    """A prepared layer whose matrices are those of one in half precision; see `NarrowMatrix`."""
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, out = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def qkv() -> Tensor:
        return torch.cat([_paired(q, attention.head_dim), _paired(k, attention.head_dim), v])

    def matrix(make: Callable[[], Tensor], size: int, norm: Any = None) -> NarrowMatrix:
        factor = None if norm is None else gain(wide(norm)).detach()
        return NarrowMatrix(lambda: make().detach(), factor, torch.ones(size))

    first = matrix(qkv, len(q) + 2 * len(k), layer.input_layernorm)
    if prepared.qk_gain is None:
        first.scale[: len(q)] = attention.scaling
    return replace(
        prepared,
        qkv=first,
        out=matrix(lambda: out, len(out)),
        gate_up=matrix(lambda: torch.cat([gate, up]), 2 * len(up), layer.post_attention_layernorm),
        down=matrix(lambda: down, len(down)),
    )


def _floor(norm: Any) -> float:
    """The least that a norm of this size divides by; see `FusedModel`."""
    return 0.0 if norm is None else math.sqrt(norm.weight.numel() * norm.variance_epsilon)


def gain(norm: Any) -> Tensor:
    """A norm's gain with the factor that dividing by the length leaves out; see `FusedModel`."""
    return norm.weight * math.sqrt(norm.weight.numel())


def _layer(layer: Any, order: Callable[[Tensor], Tensor]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    for module in linears:
        if type(module) is not nn.Linear:
            kind = f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
            raise Unfit(f"it has {kind} in place of a linear layer")
    if any(m.bias is not None for m in linears[4:]):
        raise Unfit("its MLP has biases")
    scale = attention.scaling
    input_gain, mlp_gain = gain(layer.input_layernorm), gain(layer.post_attention_layernorm)
    q, k, v = (m.weight * input_gain for m in linears[:3])
    biases = [m.bias for m in linears[:3]]
    qk_gain = None
    if hasattr(attention, "q_norm"):
        heads = q.shape[0] // attention.head_dim, k.shape[0] // attention.head_dim
        q_gain, k_gain = gain(attention.q_norm) * scale, gain(attention.k_norm)
        qk_gain = side_by_side(
            torch.cat([q_gain.expand(heads[0], -1), k_gain.expand(heads[1], -1)])
        )
    else:
        q = q * scale
        biases[0] = None if biases[0] is None else biases[0] * scale
    q, k = (_paired(m, attention.head_dim) for m in (q, k))
    biases[:2] = (None if b is None else _paired(b, attention.head_dim) for b in biases[:2])
    return Layer(
        qkv=order(torch.cat([q, k, v]).t()),
        qkv_bias=None if biases[0] is None else torch.cat([b for b in biases if b is not None]),
        qk_gain=qk_gain,
        out=order(linears[3].weight.t()),
        out_bias=linears[3].bias,
        gate_up=order(torch.cat([m.weight * mlp_gain for m in linears[4:6]]).t()),
        down=order(linears[6].weight.t()),
    )


def _paired(rows: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, ...] of a projection, each head's in the order of `KVCache.pair`."""
    return (
        side_by_side(rows.unflatten(0, (-1, head_dim)).movedim(1, -1)).movedim(-1, 1).flatten(0, 1)
    )


def _as_it_is(matrix: Tensor) -> Tensor:
    return matrix


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


def _states(decoder: Decoder) -> list[Tensor]:
    """Random tokens before the first layer, as a prompt, one token, a block and one token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, 10), generator=generator)
    bounds = pairwise([0, 5, 6, 9, 10])
    return [wide(decoder.embed(ids[:, start:stop], start)) for start, stop in bounds]


def _compared(
    model: FusedModel, decoder: Decoder, index: int, states: list[Tensor]
) -> list[Tensor]:
    """What the module back end's layer `index` makes of `states`; `Unfit` if ours makes others."""
    caches = KVCache(decoder.n_layers), KVCache(decoder.n_layers)
    stack = model.layers[index].qkv, None  # which is not needed to run it
    ours = FusedSegment(model, index, index + 1, stack, Workspace(model.sizes))
    found = []
    for hidden in states:
        theirs = decoder.run(hidden, index, index + 1, caches[1])
        difference = _difference(ours.run(hidden, caches[0]), theirs)
        if difference is not None:
            raise Unfit(f"its layers compute something else (they differ by {difference:.2g})")
        found.append(theirs)
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float | None:
    """By how much two results differ; None if it is rounding."""
    tolerance = float(theirs.abs().max()) * torch.finfo(torch.float32).eps ** 0.5
    difference = float((ours - theirs).abs().max())
    return None if difference <= tolerance else difference
