"""Preparing a model for the back end `fused`: its weights side by side, scaled and laid out.

Whether a model has the shape that `fused` computes is decided by comparison with the module back
end, not by its name.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decoder import Decoder
from .cache import KVCache, side_by_side
from .fused import FusedModel, FusedReadout, FusedSegment, Layer, Matrix, Traits, normed
from .int8 import Int8Matrix
from .layer_parts import LayerParts, Unfit, other_layers
from .narrow import BITS, NarrowMatrix
from .norms import eps_of, floor_of, gain, is_centred, is_norm, shift, shifts
from .turns import Turns, rotation_of
from .workspace import Sizes, Workspace

WIDE = (torch.float32, torch.float64)  # what hidden states and sums are in here


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


Kept = Callable[[Any, Layer, FusedModel], Layer]


def fuse(decoder: Decoder, kept: Kept | None = None) -> FusedModel:
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
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        raise Unfit(f"{decoder.config._attn_implementation} makes its own masks")
    try:
        model = _empty(decoder, layers)
        order = faster_order if kept is None else _as_it_is
        states = _states(decoder)
        for index, layer in enumerate(layers):
            if {p.dtype for p in layer.parameters() if p.dim() == 2} != {weight.dtype}:
                raise Unfit("its layers' weights are not all of one dtype")
            layer, own = wide(layer), layer
            parts = LayerParts.of(layer, decoder.config)
            if (_sizes(parts), _traits(parts)) != (model.sizes, model.traits):
                raise Unfit("its layers differ in kind")
            model.layers.append(_layer(parts, model.turns.paired, order))
            reference = decoder if layer is own else decoder.with_layer(index, layer)
            states = _compared(model, reference, index, states)
            if kept is not None:
                model.layers[index] = kept(own, model.layers[index], model)
    except Unfit:
        raise
    except Exception as error:  # whatever it is: the modules can run what they are made for
        raise other_layers(layers[0], error) from None
    return model


def _empty(decoder: Decoder, layers: list[Any]) -> FusedModel:
    """What is known of a decoder before its layers are prepared."""
    first = LayerParts.of(wide(layers[0]), decoder.config)
    rotations = [rotation_of(decoder, index) for index in range(decoder.n_layers)]
    return FusedModel(
        decoder,
        [],
        _sizes(first),
        _traits(first),
        Turns(decoder.positions, rotations, first.head_dim),
        wide(first.query[:0]).new_tensor([floor_of(first.query_norm), floor_of(first.key_norm)]),
    )


def _sizes(parts: LayerParts) -> Sizes:
    return Sizes(
        hidden=parts.query.shape[1],
        heads=parts.query.shape[0] // parts.head_dim,
        kv_heads=parts.key.shape[0] // parts.head_dim,
        head_dim=parts.head_dim,
        intermediate=parts.up.shape[0],
        floor=floor_of(parts.norms[0]),
        gated=parts.gate is not None,
        centred=is_centred(parts.norms[0]),
    )


def _traits(parts: LayerParts) -> Traits:
    eps = {eps_of(norm) for norm in parts.norms}
    eps_of_heads = {eps_of(norm) for norm in (parts.query_norm, parts.key_norm) if norm is not None}
    if max(len(eps), len(eps_of_heads)) > 1:
        raise Unfit("its norms differ in what they add to the mean of the squares")
    normed_first = parts.attention_norm is not None
    if normed_first != (parts.mlp_norm is not None):
        raise Unfit("only one of attention and the MLP is given normed states")
    return Traits(
        normed_first,
        parts.whole_heads,
        parts.parallel,
        parts.activation,
        parts.softcap,
        (*eps, *eps_of_heads),
        (parts.mixed_norm is not None, parts.output_norm is not None),
        (
            *(bias is not None for bias in (*parts.biases, *parts.mlp_biases)),
            *(norm is not None and shifts(norm) for norm in (parts.attention_norm, parts.mlp_norm)),
        ),
    )


def wide(thing: Any) -> Any:
    """A tensor or module as it is if it is in float32 or 64, else a copy in float32."""
    dtype = thing.dtype if isinstance(thing, Tensor) else next(thing.parameters()).dtype
    if dtype in WIDE:
        return thing
    return thing.float() if isinstance(thing, Tensor) else copy.deepcopy(thing).float()


def fuse_readout(
    norm: Any,
    head: nn.Linear,
    factor: float = 1.0,
    softcap: float | None = None,
    to_round: bool = False,
) -> FusedReadout | None:
    """Prepare a norm and the head behind it; None if the norm is of another kind.

    Args:
        norm: before the head.
        head: the LM head.
        factor: of the logits.
        softcap: what they are bent below.
        to_round: whether it does not matter how the head lies in memory, as it will be rounded.
    """
    if not is_norm(norm):
        return None
    norm, weight = wide(norm), wide(head.weight)
    order = _as_it_is if to_round else faster_order
    matrix = order((weight * (gain(norm) * factor)).t())
    bias = _bias_of(norm, head, factor)
    readout = FusedReadout(matrix, weight.new_tensor(floor_of(norm)), bias, is_centred(norm))
    hidden = _hidden(norm)
    own = None if head.bias is None else wide(head.bias)
    expected = F.linear(norm(hidden), weight, own) * factor
    if _difference(readout(hidden), expected) is not None:
        return None
    return replace(readout, softcap=softcap)


def narrow_readout(
    norm: Any, head: nn.Linear, factor: float = 1.0, softcap: float | None = None
) -> FusedReadout | None:
    """The same for a head in half precision that is read as it is."""
    if not is_norm(norm):
        return None
    norm, own = wide(norm), head.weight.detach()
    floor, centred = norm.weight.new_tensor(floor_of(norm)), is_centred(norm)
    gains, hidden = gain(norm), _hidden(norm)
    if _difference(normed(hidden, floor, centred) * gains + shift(norm), norm(hidden)) is not None:
        return None
    bias, gains = _bias_of(norm, head, factor), gains * factor
    matrix = NarrowMatrix(lambda: own, gains, gains.new_ones(len(own)))
    return FusedReadout(matrix, floor, bias, centred, softcap)


def _bias_of(norm: Any, head: nn.Linear, factor: float) -> Tensor | None:
    """What a head adds to its logits, and what the norm before it leads to; None if nothing."""
    bias = _added(head.weight, head.bias, norm)
    return None if bias is None else bias * factor


def _added(weight: Tensor, bias: Tensor | None, norm: Any) -> Tensor | None:
    """The bias of a matrix [out, in], and what a norm before it leads to; None if neither."""
    bias = None if bias is None else wide(bias.detach())
    if norm is None or not shifts(norm):
        return bias
    moved = wide(weight.detach()) @ shift(norm)
    return moved if bias is None else moved + bias


def _joined(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The biases of matrices [out, in] side by side; None if there is none."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, weights, strict=True)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias for bias, w in pairs])


def _hidden(norm: Any) -> Tensor:
    """Random hidden states [3, hidden]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, norm.weight.numel(), generator=generator, dtype=norm.weight.dtype)


def narrowed(layer: Any, prepared: Layer, model: FusedModel) -> Layer:
    """A prepared layer whose matrices are those of one in half precision; see `NarrowMatrix`."""
    parts, paired = LayerParts.of(layer, model.decoder.config), model.turns.paired
    query, key = parts.query, parts.key

    def qkv() -> Tensor:
        turned = (_paired(rows, parts.head_dim, paired) for rows in (query, key))
        return torch.cat([*turned, parts.value])

    def matrix(make: Callable[[], Tensor], size: int, norm: Any = None) -> NarrowMatrix:
        factor = None if norm is None else gain(wide(norm))
        return NarrowMatrix(lambda: make().detach(), factor, torch.ones(size))

    first = matrix(qkv, len(query) + 2 * len(key), parts.attention_norm)
    if prepared.qk_gain is None:
        first.scale[: len(query)] = parts.scaling
    out = matrix(lambda: parts.out, len(parts.out))
    down = matrix(lambda: parts.down, len(parts.down))
    for added in (out, down):
        added.scale.mul_(parts.multiplier)
    wide_parts = [part for part in (parts.gate, parts.up) if part is not None]
    gate_up = matrix(lambda: torch.cat(wide_parts), len(wide_parts) * len(parts.up), parts.mlp_norm)
    return replace(prepared, qkv=first, out=out, gate_up=gate_up, down=down)


def _layer(parts: LayerParts, paired: int, order: Callable[[Tensor], Tensor]) -> Layer:
    """Prepare one layer: fold in what can be."""
    own = parts.query, parts.key, parts.value
    *biases, out_bias = parts.biases
    q, k, v = (_with_gain(weight, parts.attention_norm) for weight in own)
    qb, kb, vb = (_added(*each, parts.attention_norm) for each in zip(own, biases, strict=True))
    qk_gain, head_dim = None, parts.head_dim
    if parts.query_norm is not None:
        gains = [gain(norm) for norm in (parts.query_norm, parts.key_norm)]
        by_head = [
            rows.view(-1, head_dim).expand(len(weight) // head_dim, -1)
            for rows, weight in zip(gains, (q, k), strict=True)
        ]
        qk_gain = _in_pairs(torch.cat([by_head[0] * parts.scaling, by_head[1]]), paired)
    else:
        q, qb = q * parts.scaling, _times(qb, parts.scaling)
    q, k, qb, kb = (None if x is None else _paired(x, head_dim, paired) for x in (q, k, qb, kb))
    qkv = [q, k, v]
    *mlp_biases, down_bias = parts.mlp_biases
    wide_parts = [*zip((parts.gate, parts.up), mlp_biases, strict=True)]
    mlp = [(weight, bias) for weight, bias in wide_parts if weight is not None]
    gate_up = [_with_gain(weight, parts.mlp_norm) for weight, _ in mlp]
    gate_up_biases = [_added(*each, parts.mlp_norm) for each in mlp]
    return Layer(
        qkv=order(torch.cat(qkv).t()),
        qkv_bias=_joined([qb, kb, vb], qkv),
        qk_gain=qk_gain,
        out=order(_times(parts.out, parts.multiplier).t()),
        out_bias=_times(out_bias, parts.multiplier),
        gate_up=order(torch.cat(gate_up).t()),
        gate_up_bias=_joined(gate_up_biases, gate_up),
        down=order(_times(parts.down, parts.multiplier).t()),
        down_bias=_times(down_bias, parts.multiplier),
        mixed_gain=None if parts.mixed_norm is None else gain(parts.mixed_norm),
        output_gain=None if parts.output_norm is None else gain(parts.output_norm),
    )


def _times(weight: Any, factor: float) -> Any:
    """A weight times a factor, if there is one; not a copy if that changes nothing."""
    return weight if weight is None or factor == 1.0 else weight * factor


def _with_gain(weight: Tensor, norm: Any) -> Tensor:
    """A weight [out, in] for what a norm gives without its gain."""
    return weight if norm is None else weight * gain(norm)


def _paired(rows: Tensor, head_dim: int, width: int) -> Tensor:
    """Rows [heads * head_dim, ...] of a projection, each head's in the order of `KVCache.pair`."""
    by_head = rows.unflatten(0, (-1, head_dim)).movedim(1, -1)
    return _in_pairs(by_head, width).movedim(-1, 1).flatten(0, 1)


def _in_pairs(x: Tensor, width: int) -> Tensor:
    """The first `width` of the last coordinates in the order of `KVCache.pair`."""
    return torch.cat([side_by_side(x[..., :width]), x[..., width:]], dim=-1)


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
    ours = FusedSegment(model, index, index + 1, stack, Workspace(model.sizes, len(model.turns)))
    found = []
    for hidden in states:
        theirs = decoder.run(hidden, index, index + 1, caches[1])
        # What a layer adds counts: one coordinate may be a thousand times as large as that.
        rounding = 8 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
        difference = _difference(ours.run(hidden, caches[0]), theirs, theirs - hidden, rounding)
        if difference is not None:
            raise Unfit(f"its layers compute something else (they differ by {difference:.2g})")
        found.append(theirs)
    shapes = [cache.keys_values(index)[0].shape for cache in caches]
    if shapes[0] != shapes[1]:  # back ends take turns on one cache
        raise Unfit("its layers cache keys and values of other heads than they project")
    return found


def _difference(
    ours: Tensor, theirs: Tensor, relative_to: Tensor | None = None, rounding: float = 0.0
) -> float | None:
    """By how much two results differ; None if it is rounding."""
    scale = float((theirs if relative_to is None else relative_to).abs().max())
    tolerance = scale * torch.finfo(torch.float32).eps ** 0.5 + rounding
    difference = float((ours - theirs).abs().max())
    return None if difference <= tolerance else difference
