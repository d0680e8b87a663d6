"""Weights in half precision, read as they are stored and multiplied as float32, without loss.

Neither numpy nor numba knows bfloat16, and numba knows float16 in part: so arrays of them come as
their bits, integers of a type that says which of the two they are.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .processor import CONVERTS_FLOAT16

BFLOAT16, FLOAT16 = types.uint16, types.int16  # what the bits are called


def widened(builder: Any, numbers: Any, kind: Any) -> Any:
    """LLVM's instructions that make float32 of a vector of bits, or of a single one's.

    Args:
        builder: of instructions.
        numbers: the bits.
        kind: which of the two they are.
    """

    def like(element: Any) -> Any:
        count = getattr(numbers.type, "count", 0)
        return ir.VectorType(element, count) if count else element

    single, wide = like(ir.FloatType()), like(ir.IntType(32))
    if kind == FLOAT16:
        return builder.fpext(builder.bitcast(numbers, like(ir.HalfType())), single)
    upper_half = ir.Constant(wide, [16] * wide.count if hasattr(wide, "count") else 16)
    return builder.bitcast(builder.shl(builder.zext(numbers, wide), upper_half), single)


def _float_of(context: Any, bits: Any) -> Any:
    """The float32 that a number is of which these are the bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return widened(builder, args[0], bits)

    return types.float32(bits), generate


_float_of_bits: Any = intrinsic(_float_of)


def number(stored: Any) -> Any:
    """A number as it is calculated with: one in half precision, given by its bits, as float32."""
    raise NotImplementedError


@overload(number, inline="always")
def _number_of(stored: Any) -> Any:
    def same(stored: Any) -> Any:
        return stored

    def wider(stored: Any) -> Any:
        return _float_of_bits(stored)

    if stored == FLOAT16 and not CONVERTS_FLOAT16:
        # There are no such weights here (`panelled.missing`), and what would convert them is a
        # function that not every system has.
        return same
    return wider if stored in (BFLOAT16, FLOAT16) else same
