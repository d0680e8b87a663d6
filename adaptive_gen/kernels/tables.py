"""Rows of embedding tables of any dtype: told by a number, so that the same code reads them all."""

from typing import Any

from .half import number
from .jit import inner
from .team import bfloats_at, doubles_at, floats_at, halves_at

KINDS = ("float32", "float64", "bfloat16", "float16")
FLOATS, DOUBLES, BFLOATS, HALVES = range(4)


@inner
def _add(numbers: Any, count: int, factor: Any, x: Any) -> None:
    for n in range(count):
        x[n] += number(numbers[n]) * factor


@inner
def add_row(table: Any, kind: int, row: int, factor: Any, x: Any) -> None:
    """Add a row of a table, times a factor, to x.

    Args:
        table: bytes, [rows, bytes of a row].
        kind: the dtype they are numbers of, as an index of `KINDS`.
        row: which.
        factor: of all its numbers.
        x: [numbers of a row, or more].
    """
    size = table.shape[1]
    at = table.ctypes.data + row * size
    if kind == FLOATS:
        _add(floats_at(at), size // 4, factor, x)
    elif kind == DOUBLES:
        _add(doubles_at(at), size // 8, factor, x)
    elif kind == BFLOATS:
        _add(bfloats_at(at), size // 2, factor, x)
    else:
        _add(halves_at(at), size // 2, factor, x)
