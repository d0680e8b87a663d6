"""Matrices of prepared layers, whatever their weights are kept as, and products with them.

Axes: `n` (rows), `in`, `out`.
"""

import torch
from torch import Tensor

from .int8 import Int8Matrix
from .narrow import NarrowMatrix

Matrix = Tensor | Int8Matrix | NarrowMatrix  # [in, out]


def product(
    x: Tensor, matrix: Matrix, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`x @ matrix + bias` for rows [n, in]."""
    if not isinstance(matrix, Tensor):
        found = matrix(x)
        out = found.to(x.dtype) if out is None else out.copy_(found)
        return out if bias is None else out.add_(bias)
    if bias is None:
        return torch.mm(x, matrix, out=out)
    return torch.addmm(bias, x, matrix, out=out)


def add_product(total: Tensor, x: Tensor, matrix: Matrix, bias: Tensor | None) -> None:
    """Add `x @ matrix + bias` to `total`, in place."""
    if isinstance(matrix, Tensor):
        total.addmm_(x, matrix)
    else:
        total += matrix(x)
    if bias is not None:
        total += bias


def columns(matrix: Matrix, start: int, stop: int) -> Matrix:
    """The columns `start`..`stop` of a matrix."""
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(matrix.steps[start:stop], matrix.scale[start:stop])
    return matrix.float(start, stop) if isinstance(matrix, NarrowMatrix) else matrix[:, start:stop]
