"""Preparing a model for the back end `fused`: its weights side by side, scaled and laid out.

Whether a model has the shape that `fused` computes is decided by comparison with the module back
end, not by its name.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..decoder import Decoder
from .cache import KVCache
from .folding import (
    WIDE,
    as_it_is,
    bias_of,
    faster_order,
    heads_in_pairs,
    in_pairs,
    joined,
    scaled,
    wide,
    with_gain,
)
from .fused import FusedModel, FusedSegment, Layer, Traits
from .int8 import Int8Matrix
from .layer_parts import LayerParts, Unfit, other_layers
from .matrices import Matrix
from .narrow import BITS, NarrowMatrix
from .norms import eps_of, floor_of, gain, is_centred, shifts
from .turns import Turns, rotation_of
from .workspace import Sizes, Workspace


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
        order = faster_order if kept is None else as_it_is
        states = _states(decoder)
        for index, layer in enumerate(layers):
            if {p.dtype for p in layer.parameters() if p.dim() > 1} != {weight.dtype}:
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
        intermediate=parts.down.shape[1],
        floor=floor_of(parts.norms[0]),
        gated=parts.gate is not None or parts.experts is not None,
        centred=is_centred(parts.norms[0]),
        experts=0 if parts.experts is None else len(parts.experts.router),
    )


def _traits(parts: LayerParts) -> Traits:
    eps = {eps_of(norm) for norm in parts.norms}
    eps_of_heads = {eps_of(norm) for norm in (parts.query_norm, parts.key_norm) if norm is not None}
    if max(len(eps), len(eps_of_heads)) > 1:
        raise Unfit("its norms differ in what they add to the mean of the squares")
    normed_first = parts.attention_norm is not None
    if normed_first != (parts.mlp_norm is not None):
        raise Unfit("only one of attention and the MLP is given normed states")
    experts = parts.experts
    if experts is not None and not _plainly_mixed(parts):
        raise Unfit(
            "its mixtures of experts are beside attention, normed themselves, or behind no norm or "
            "one with a bias"
        )
    return Traits(
        normed_first,
        parts.whole_heads,
        parts.parallel,
        parts.activation,
        parts.softcap,
        0 if experts is None else experts.top_k,
        experts is not None and experts.normalised,
        (*eps, *eps_of_heads),
        (parts.mixed_norm is not None, parts.output_norm is not None),
        (
            *(bias is not None for bias in (*parts.biases, *parts.mlp_biases)),
            *(norm is not None and shifts(norm) for norm in (parts.attention_norm, parts.mlp_norm)),
        ),
    )


def _plainly_mixed(parts: LayerParts) -> bool:
    """Whether experts are given normed states without a bias, and what they give is added."""
    behind = parts.mlp_norm is not None and not shifts(parts.mlp_norm)
    return behind and not parts.parallel and parts.output_norm is None


def narrowed(layer: Any, prepared: Layer, model: FusedModel) -> Layer:
    """A prepared layer whose matrices are those of one in half precision; see `NarrowMatrix`."""
    parts, width = LayerParts.of(layer, model.decoder.config), model.turns.paired
    query, key = parts.query, parts.key

    def qkv() -> Tensor:
        turned = (heads_in_pairs(rows, parts.head_dim, width) for rows in (query, key))
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
    mlp = [part for part in (parts.gate, parts.up) if part is not None]
    gate_up = matrix(lambda: torch.cat(mlp), len(mlp) * len(parts.up), parts.mlp_norm)
    router, experts = None, parts.experts
    if experts is not None:
        router = matrix(lambda: experts.router, len(experts.router), parts.mlp_norm)
    return replace(prepared, qkv=first, out=out, gate_up=gate_up, down=down, router=router)


def _layer(parts: LayerParts, paired: int, order: Callable[[Tensor], Tensor]) -> Layer:
    """Prepare one layer: fold in what can be."""
    own = parts.query, parts.key, parts.value
    *biases, out_bias = parts.biases
    q, k, v = (with_gain(weight, parts.attention_norm) for weight in own)
    qb, kb, vb = (bias_of(*each, parts.attention_norm) for each in zip(own, biases, strict=True))
    qk_gain, head_dim = None, parts.head_dim
    if parts.query_norm is not None:
        gains = [gain(norm) for norm in (parts.query_norm, parts.key_norm)]
        by_head = [
            rows.view(-1, head_dim).expand(len(weight) // head_dim, -1)
            for rows, weight in zip(gains, (q, k), strict=True)
        ]
        qk_gain = in_pairs(torch.cat([by_head[0] * parts.scaling, by_head[1]]), paired)
    else:
        q, qb = q * parts.scaling, scaled(qb, parts.scaling)
    q, k, qb, kb = (
        None if x is None else heads_in_pairs(x, head_dim, paired) for x in (q, k, qb, kb)
    )
    qkv = [q, k, v]
    *mlp_biases, down_bias = parts.mlp_biases
    pairs = zip((parts.gate, parts.up), mlp_biases, strict=True)
    mlp = [(weight, bias) for weight, bias in pairs if weight is not None]
    gate_up = [with_gain(weight, parts.mlp_norm) for weight, _ in mlp]
    gate_up_biases = [bias_of(*each, parts.mlp_norm) for each in mlp]
    experts = parts.experts
    router = None if experts is None else with_gain(experts.router, parts.mlp_norm).t()
    return Layer(
        qkv=order(torch.cat(qkv).t()),
        qkv_bias=joined([qb, kb, vb], qkv),
        qk_gain=qk_gain,
        out=order(scaled(parts.out, parts.multiplier).t()),
        out_bias=scaled(out_bias, parts.multiplier),
        gate_up=order(torch.cat(gate_up).t()),
        gate_up_bias=joined(gate_up_biases, gate_up),
        down=order(scaled(parts.down, parts.multiplier).t()),
        down_bias=scaled(down_bias, parts.multiplier),
        mixed_gain=None if parts.mixed_norm is None else gain(parts.mixed_norm),
        output_gain=None if parts.output_norm is None else gain(parts.output_norm),
        router=router,
    )


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
        off = difference(ours.run(hidden, caches[0]), theirs, theirs - hidden, rounding)
        if off is not None:
            raise Unfit(f"its layers compute something else (they differ by {off:.2g})")
        found.append(theirs)
    shapes = [cache.keys_values(index)[0].shape for cache in caches]
    if shapes[0] != shapes[1]:  # back ends take turns on one cache
        raise Unfit("its layers cache keys and values of other heads than they project")
    return found


def difference(
    ours: Tensor, theirs: Tensor, relative_to: Tensor | None = None, rounding: float = 0.0
) -> float | None:
    """By how much two results differ; None if it is rounding."""
    scale = float((theirs if relative_to is None else relative_to).abs().max())
    tolerance = scale * torch.finfo(torch.float32).eps ** 0.5 + rounding
    off = float((ours - theirs).abs().max())
    return None if off <= tolerance else off
