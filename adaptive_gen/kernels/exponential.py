"""The exponential as loops of compiled code need it."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


def _bits_of_power(context: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for int32 in -126..127: put where a float has its exponent."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bias, shift = (ir.Constant(ir.IntType(32), value) for value in (127, 23))
        bits = builder.shl(builder.add(args[0], bias), shift)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


_power_of_two: Any = intrinsic(_bits_of_power)


def exp(x: Any) -> Any:
    """The exponential; in float32 without a call, so that loops over it are vectors."""
    raise NotImplementedError


# exp(r) for |r| <= log(2) / 2, to 2e-8: its Taylor coefficients from the highest.
_TERMS = tuple(np.float32(1 / math.factorial(n)) for n in range(6, -1, -1))
_LOG2E, _LEAST, _MOST = np.float32(math.log2(math.e)), np.float32(-87), np.float32(88)
# log(2) in two parts, the first with few bits, so that n * _LN2_HIGH is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_FUSED = ("contract",)


@overload(exp)
def _exp_of(x: Any) -> Any:
    def library_exp(x: Any) -> Any:
        return math.exp(x)

    def polynomial(x: Any) -> Any:
        x = min(max(x, _LEAST), _MOST)
        n = np.floor(x * _LOG2E + np.float32(0.5))
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        y = _TERMS[0]
        y = y * r + _TERMS[1]
        y = y * r + _TERMS[2]
        y = y * r + _TERMS[3]
        y = y * r + _TERMS[4]
        y = y * r + _TERMS[5]
        y = y * r + _TERMS[6]
        return y * _power_of_two(np.int32(n))

    return polynomial if x == types.float32 else library_exp


def softened(x: Any, cap: Any) -> Any:
    """Bend a number so that it stays below a cap: cap * tanh(x / cap)."""
    raise NotImplementedError


_TWO = np.float32(2)


@overload(softened)
def _softened_of(x: Any, cap: Any) -> Any:
    def library_tanh(x: Any, cap: Any) -> Any:
        return cap * math.tanh(x / cap)

    def by_exp(x: Any, cap: Any) -> Any:
        return cap - cap * _TWO / (np.float32(1) + exp(x * (_TWO / cap)))

    return by_exp if x == types.float32 else library_tanh


def normal_tail(x: Any) -> Any:
    """How likely a standard normal number is above x, for x >= 0."""
    raise NotImplementedError


# Abramowitz and Stegun, 7.1.26, whose error is at most 8e-8 here.
_NEAR_ONE = np.float32(0.3275911 / math.sqrt(2))
_TAIL = tuple(
    np.float32(term / 2)
    for term in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
)


@overload(normal_tail)
def _normal_tail_of(x: Any) -> Any:
    def library_tail(x: Any) -> Any:
        return 0.5 * math.erfc(x / math.sqrt(2))

    def polynomial(x: Any) -> Any:
        t = np.float32(1) / (np.float32(1) + _NEAR_ONE * x)
        y = _TAIL[0]
        y = y * t + _TAIL[1]
        y = y * t + _TAIL[2]
        y = y * t + _TAIL[3]
        y = y * t + _TAIL[4]
        return y * t * exp(np.float32(-0.5) * x * x)

    return polynomial if x == types.float32 else library_tail


def exp_lanes(builder: Any, x: Any) -> Any:
    """The same for LLVM's vectors of float32, which must not be above 0."""
    kind, lanes = x.type, x.type.count
    integers = ir.VectorType(ir.IntType(32), lanes)

    def every(value: Any, kind: Any = kind) -> Any:
        return ir.Constant(kind, [value if kind is integers else float(value)] * lanes)

    def add_product(total: Any, one: Any, other: Any) -> Any:
        return builder.fadd(total, builder.fmul(one, other, flags=_FUSED), flags=_FUSED)

    x = builder.select(builder.fcmp_ordered(">", x, every(_LEAST)), x, every(_LEAST))
    # The nearest whole number, for what is below 0 is cut off towards it.
    whole = builder.fptosi(add_product(every(-0.5), x, every(_LOG2E)), integers)
    n = builder.sitofp(whole, kind)
    r = add_product(add_product(x, n, every(-_LN2_HIGH)), n, every(-_LN2_LOW))
    y = every(_TERMS[0])
    for term in _TERMS[1:]:
        y = add_product(every(term), y, r)
    exponent = builder.add(whole, every(127, integers))
    power = builder.bitcast(builder.shl(exponent, every(23, integers)), kind)
    return builder.fmul(y, power)
