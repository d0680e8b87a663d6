"""What is asked of all logits of a hidden state, as LLVM instructions for numba.

Logits are [panels * PANEL], what is said of their panels [panels]; all without gaps. What is behind
the last whole panel is not looked at.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .exponential import exp_lanes
from .panels import PANEL
from .processor import LANES
from .vectors import SUMS, every, folded, lane, larger, loop, turned, word

_BYTE = ir.IntType(8)  # what a bool is
_instructions: Any = intrinsic  # whose functions are called without their first argument


class _Logits:
    """The logits that an intrinsic is given, a register of them at a time, and the other arrays."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any):
        """Find them among the arguments, of which the first are the logits."""
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, args, strict=True)
            if isinstance(kind, types.Array)
        ]
        self._builder, (self._logits, *self._said) = builder, [array.data for array in arrays]
        self.number = self._logits.type.pointee
        self.lanes = LANES if self.number == ir.FloatType() else LANES // 2
        self.vector = ir.VectorType(self.number, self.lanes)
        (length,) = cgutils.unpack_tuple(builder, arrays[0].shape)
        self.stop = builder.mul(builder.udiv(length, word(PANEL)), word(PANEL))

    def constant(self, value: float) -> Any:
        """A number in every lane."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def every(self, value: Any) -> Any:
        """A value in every lane."""
        return every(self._builder, value, self.lanes)

    def load(self, index: Any) -> Any:
        """Logits from one on."""
        place = self._builder.gep(self._logits, [index])
        return self._builder.load(self._builder.bitcast(place, self.vector.as_pointer()), align=4)

    def said(self, which: int, index: Any) -> Any:
        """What an array behind the logits says of a logit's panel."""
        panel = self._builder.udiv(index, word(PANEL))
        return self._builder.load(self._builder.gep(self._said[which], [panel]))

    def through(self, begin: list[Any], body: Any) -> list[Any]:
        """What `begin` becomes over all logits of whole panels."""
        return loop(self._builder, word(0), self.stop, self.lanes, begin, body)[1:]


def _two_largest(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    logits = _Logits(context, builder, signature, args)
    doubted = len(args) > 1

    def with_more(pair: list[Any], best: Any, second: Any) -> list[Any]:
        """The two largest numbers of each lane, of two pairs."""
        lower = builder.select(builder.fcmp_ordered(">", best, pair[0]), pair[0], best)
        others = larger(builder, second, pair[1])
        return [larger(builder, best, pair[0]), larger(builder, lower, others)]

    def with_logits(index: Any, pair: list[Any]) -> list[Any]:
        numbers = logits.load(index)
        if doubted:
            numbers = builder.fsub(numbers, logits.every(logits.said(0, index)))
        return with_more(pair, numbers, lowest)

    lowest = logits.constant(float("-inf"))
    pair = logits.through([lowest, lowest], with_logits)
    width = logits.lanes
    while width > 2:
        width //= 2
        pair = with_more(pair, *(turned(builder, numbers, width) for numbers in pair))
    # LLVM 22 gets the last step wrong where it makes it one of single numbers (float64, AVX-512).
    ends = [[builder.extract_element(numbers, lane(n)) for numbers in pair] for n in (0, 1)]
    found = with_more(ends[0], *ends[1])
    return context.make_tuple(builder, signature.return_type, found)


@_instructions
def two_of_panels(context: Any, logits: Any) -> Any:
    """The two largest logits of whole panels, which may be equal; nan is lower than anything."""
    return types.UniTuple(logits.dtype, 2)(logits), _two_largest


@_instructions
def two_certain(context: Any, logits: Any, off: Any) -> Any:
    """What the two largest are at least, if all logits of a panel may be off by so much."""
    return types.UniTuple(logits.dtype, 2)(logits, off), _two_largest


@_instructions
def reaches(context: Any, logits: Any, panel: Any, off: Any, bar: Any) -> Any:
    """Whether a logit of a panel is as high as the bar if all of them are off by so much."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits = _Logits(context, builder, signature, args)
        start, (off, bar) = builder.mul(args[1], word(PANEL)), map(logits.every, args[2:])
        bits = ir.IntType(logits.lanes)
        found = ir.Constant(bits, 0)
        for first in range(0, PANEL, logits.lanes):
            highest = builder.fadd(logits.load(builder.add(start, word(first))), off)
            high = builder.fcmp_ordered(">=", highest, bar)
            found = builder.or_(found, builder.bitcast(high, bits))
        return builder.icmp_unsigned("!=", found, ir.Constant(bits, 0))

    return types.boolean(logits, types.int64, logits.dtype, logits.dtype), generate


@_instructions
def mass(context: Any, logits: Any, top: Any, grow: Any, shrink: Any, exact: Any) -> Any:
    """The sum over all tokens of exp(logit - top): at most, and at least.

    A panel's part may be too small by the factor `grow` and too large by `shrink`, unless its
    logits are exact. No logit is above `top`. Exponentials are float32 whatever the logits are, and
    a nan is taken for the lowest of them.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits = _Logits(context, builder, signature, args)
        highest, one = logits.every(args[1]), ir.Constant(logits.number, 1.0)
        narrow = ir.VectorType(ir.FloatType(), logits.lanes)

        def add(total: Any, part: Any) -> Any:
            return builder.fadd(total, part, flags=SUMS)

        def with_logits(index: Any, sums: list[Any]) -> list[Any]:
            below = builder.fsub(logits.load(index), highest)
            if logits.number == ir.FloatType():
                share = exp_lanes(builder, below)
            else:
                share = exp_lanes(builder, builder.fptrunc(below, narrow))
                share = builder.fpext(share, logits.vector)
            known = builder.icmp_unsigned("!=", logits.said(2, index), ir.Constant(_BYTE, 0))
            factors = (builder.select(known, one, logits.said(side, index)) for side in (0, 1))
            parts = (builder.fmul(share, logits.every(factor), flags=SUMS) for factor in factors)
            return [*map(add, sums, parts)]

        sums = logits.through([logits.constant(0.0)] * 2, with_logits)
        found = [builder.extract_element(folded(builder, s, add), lane(0)) for s in sums]
        return context.make_tuple(builder, signature.return_type, found)

    number = logits.dtype
    return types.UniTuple(number, 2)(logits, number, grow, shrink, exact), generate
