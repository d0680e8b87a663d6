"""Weights as prepared layers have them: with norms, factors and biases folded in.

Axes: `out`, `in`.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import side_by_side
from .norms import gain, shift, shifts

WIDE = (torch.float32, torch.float64)  # what hidden states and sums are in here


def wide(thing: Any) -> Any:
    """A tensor or module as it is if it is in float32 or 64, else a copy in float32."""
    dtype = thing.dtype if isinstance(thing, Tensor) else next(thing.parameters()).dtype
    if dtype in WIDE:
        return thing
    return thing.float() if isinstance(thing, Tensor) else copy.deepcopy(thing).float()


def bias_of(weight: Tensor, bias: Tensor | None, norm: Any) -> Tensor | None:
    """The bias of a matrix [out, in], and what a norm before it leads to; None if neither."""
    bias = None if bias is None else wide(bias.detach())
    if norm is None or not shifts(norm):
        return bias
    moved = wide(weight.detach()) @ shift(norm)
    return moved if bias is None else moved + bias


def joined(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The biases of matrices [out, in] side by side; None if there is none."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, weights, strict=True)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias for bias, w in pairs])


def scaled(weight: Any, factor: float) -> Any:
    """A weight times a factor, if there is one; not a copy if that changes nothing."""
    return weight if weight is None or factor == 1.0 else weight * factor


def with_gain(weight: Tensor, norm: Any) -> Tensor:
    """A weight [out, in] for what a norm gives without its gain."""
    return weight if norm is None else weight * gain(norm)


def heads_in_pairs(rows: Tensor, head_dim: int, width: int) -> Tensor:
    """Rows [heads * head_dim, ...] of a projection, each head's in the order of `KVCache.pair`."""
    by_head = rows.unflatten(0, (-1, head_dim)).movedim(1, -1)
    return in_pairs(by_head, width).movedim(-1, 1).flatten(0, 1)


def in_pairs(x: Tensor, width: int) -> Tensor:
    """The first `width` of the last coordinates in the order of `KVCache.pair`."""
    return torch.cat([side_by_side(x[..., :width]), x[..., width:]], dim=-1)


def as_it_is(matrix: Tensor) -> Tensor:
    """A matrix in the memory order that it has."""
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
