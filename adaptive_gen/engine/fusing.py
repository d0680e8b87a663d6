"""Preparing a model for the back end `fused`: its weights side by side, scaled and laid out.

Whether a model has the shape that `fused` computes is decided by comparison with the module back
end, not by its name.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from .cache import KVCache, side_by_side
from .fused import FusedModel, FusedReadout, FusedSegment, Layer, Matrix
from .int8 import Int8Matrix
from .workspace import Sizes, Workspace


class Unfit(Exception):
    """Why a model cannot be run by this back end; the message is for the user."""


def stacked(model: FusedModel, start: int, stop: int) -> tuple[Matrix, Tensor | None]:
    """The K and V matrices of layers `start`..`stop` side by side, and their bias."""
    first = model.sizes.heads * model.sizes.head_dim  # queries come first and are not needed
    layers = model.layers[start:stop]
    whole = [m.float() if isinstance(m, Int8Matrix) else m for m in (x.qkv for x in layers)]
    stack = torch.cat([matrix[:, first:] for matrix in whole], dim=1)
    biases = [layer.qkv_bias for layer in layers if layer.qkv_bias is not None]
    bias = torch.cat([b[first:] for b in biases]) if biases else None
    if isinstance(layers[0].qkv, Int8Matrix):
        return Int8Matrix.of(stack), bias
    return faster_order(stack), bias


def fuse(decoder: Decoder) -> FusedModel:
    """Prepare a decoder's layers.

    Raises:
        Unfit: they are not of the shape computed here, or on a device or in a dtype it is not for.
    """
    layers: Any = list(decoder.layers)
    weight = next(layers[0].parameters())
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        raise Unfit(
            f"it is {weight.dtype} on {weight.device.type}; fused is for float32 and 64 on CPUs "
            "(load it with dtype=torch.float32)"
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
        model = FusedModel(
            decoder=decoder,
            layers=[_layer(layer) for layer in layers],
            sizes=sizes,
            qk_floor=weight.new_tensor(_floor(getattr(first, "q_norm", None))),
        )
        _compare(model)
    except (AttributeError, RuntimeError) as error:
        raise Unfit(f"its layers are of another shape ({error})") from None
    return model


def fuse_readout(norm: Any, head: nn.Linear) -> FusedReadout | None:
    """Prepare a root-mean-square norm and the head behind it; None if the norm is another."""
    if not hasattr(norm, "variance_epsilon"):
        return None
    matrix = faster_order((head.weight * gain(norm)).t())
    readout = FusedReadout(matrix, head.weight.new_tensor(_floor(norm)))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, head.in_features, generator=generator, dtype=head.weight.dtype)
    return readout if _difference(readout(hidden), head(norm(hidden))) is None else None


def _floor(norm: Any) -> float:
    """The least that a norm of this size divides by; see `FusedModel`."""
    return 0.0 if norm is None else math.sqrt(norm.weight.numel() * norm.variance_epsilon)


def gain(norm: Any) -> Tensor:
    """A norm's gain with the factor that dividing by the length leaves out; see `FusedModel`."""
    return norm.weight * math.sqrt(norm.weight.numel())


def _layer(layer: Any) -> Layer:
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
        qkv=faster_order(torch.cat([q, k, v]).t()),
        qkv_bias=None if biases[0] is None else torch.cat([b for b in biases if b is not None]),
        qk_gain=qk_gain,
        out=faster_order(linears[3].weight.t()),
        out_bias=linears[3].bias,
        gate_up=faster_order(torch.cat([m.weight * mlp_gain for m in linears[4:6]]).t()),
        down=faster_order(linears[6].weight.t()),
    )


def _paired(rows: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, ...] of a projection, each head's in the order of `KVCache.pair`."""
    return (
        side_by_side(rows.unflatten(0, (-1, head_dim)).movedim(1, -1)).movedim(-1, 1).flatten(0, 1)
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
    everything = stacked(model, 0, decoder.n_layers)
    whole = FusedSegment(model, 0, decoder.n_layers, everything, Workspace(model.sizes))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, 10), generator=generator)
    for part in ids.split([5, 1, 3, 1], dim=1):
        hidden = decoder.embed(part, caches[1].lengths[0])
        ours = whole.run(hidden, caches[0])
        theirs = decoder.run(hidden, 0, decoder.n_layers, caches[1])
        difference = _difference(ours, theirs)
        if difference is not None:
            raise Unfit(f"its layers compute something else (they differ by {difference:.2g})")


def _difference(ours: Tensor, theirs: Tensor) -> float | None:
    """By how much two results differ; None if it is rounding."""
    tolerance = float(theirs.abs().max()) * torch.finfo(torch.float32).eps ** 0.5
    difference = float((ours - theirs).abs().max())
    return None if difference <= tolerance else difference
