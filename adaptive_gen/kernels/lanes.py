"""Attention's inner loops on CPUs, as LLVM instructions for numba: LANES numbers at a time.

A score is a sum over a head's dimensions, which lie side by side, so a compiler sums one key's
products within a register, step by step. Here the products of LANES keys are summed together: each
step halves what is left of all of them, and the last one leaves a score in every lane.

What is read and written is float32 and given by its address.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .exponential import exp_lanes
from .processor import LANES
from .vectors import SUMS, WORD, every, folded, lane, lanes, larger, loop, word

_instructions: Any = intrinsic  # whose functions are called without their first argument

_UNDER_WAY = 8  # sums that do not wait for each other
_PART = 4  # numbers of a register's parts, within which processors move them quickest
_NUMBER = ir.FloatType()
_VECTOR = ir.VectorType(_NUMBER, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)
_BYTES = 4  # of a number


def _at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """A pointer to the number with an index, or to those from there on."""
    place = builder.add(address, builder.mul(index, word(_BYTES)))
    return builder.inttoptr(place, kind.as_pointer())


def _load(builder: Any, address: Any, index: Any) -> Any:
    """LANES numbers from an index on."""
    return builder.load(_at(builder, address, index, _VECTOR), align=_BYTES)


def _store(builder: Any, value: Any, address: Any, index: Any) -> None:
    builder.store(value, _at(builder, address, index, _VECTOR), align=_BYTES)


def _spread(builder: Any, address: Any, index: Any) -> Any:
    """The number with an index in every lane."""
    return every(builder, builder.load(_at(builder, address, index, _NUMBER)), LANES)


def _halves(width: int) -> list[Any]:
    """For each half of what is left of two sums, the one whose sum with the other halves them.

    `width` numbers of each sum are left, and as many sums lie side by side as that leaves room for.
    What is left of the first vector's sums comes before that of the second's.
    """
    if width > LANES // _PART:  # within each part
        places = [
            [
                part + which * LANES + at
                for part in range(0, LANES, _PART)
                for which in range(2)
                for at in range(first, _PART, 2)
            ]
            for first in range(2)
        ]
    else:  # whole parts
        places = [
            [at + n for at in range(first * _PART, 2 * LANES, 2 * _PART) for n in range(_PART)]
            for first in range(2)
        ]
    return [lanes(each) for each in places]


def _add_product(builder: Any, total: Any, one: Any, other: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other, flags=SUMS), flags=SUMS)


def by_lanes(x: Any) -> Any:
    """Whether arrays of this dtype are worked on by these functions, known when code is made."""
    raise NotImplementedError


@overload(by_lanes, inline="always")
def _by_lanes_of(x: Any) -> Any:
    floats = x.dtype == types.float32

    def known(x: Any) -> Any:
        return floats

    return known


@_instructions
def score_keys(context: Any, query: Any, size: Any, keys: Any, step: Any, scores: Any) -> Any:
    """Scores of LANES keys, from the one at `keys` on, `step` bytes each; `size` dimensions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        query, size, keys, step, scores = args
        rows = [builder.add(keys, builder.mul(step, word(key))) for key in range(LANES)]

        def products(d: Any, sums: list[Any]) -> list[Any]:
            part = _load(builder, query, d)
            return [
                _add_product(builder, total, part, _load(builder, row, d))
                for total, row in zip(sums, rows, strict=True)
            ]

        _, *sums = loop(builder, word(0), size, LANES, [_ZEROS] * LANES, products)
        while len(sums) > 1:
            first, second = _halves(len(sums))
            sums = [
                builder.fadd(
                    builder.shuffle_vector(one, other, first),
                    builder.shuffle_vector(one, other, second),
                    flags=SUMS,
                )
                for one, other in zip(sums[::2], sums[1::2], strict=True)
            ]
        _store(builder, sums[0], scores, word(0))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@_instructions
def share_out(context: Any, scores: Any, count: Any, factor: Any) -> Any:
    """Make the first `count` scores shares of 1, but for a factor, which is put where that says.

    There is room for a multiple of LANES scores; the rest may hold anything, before and after.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, count, factor = args
        places = ir.Constant(ir.VectorType(WORD, LANES), [*range(LANES)])
        lowest = ir.Constant(_VECTOR, [float("-inf")] * LANES)

        def known(start: Any, numbers: Any, others: Any) -> Any:
            """LANES numbers, of the scores from `start` on; others where there is none."""
            left = every(builder, builder.sub(count, start), LANES)
            return builder.select(builder.icmp_signed("<", places, left), numbers, others)

        def through(unknown: Any, body: Any, grow: Any) -> Any:
            """Let what `body` makes of all scores grow together; `unknown` adds nothing to it."""

            def whole(j: Any, so_far: list[Any]) -> list[Any]:
                return [grow(so_far[0], body(j))]

            def rest(j: Any, so_far: list[Any]) -> list[Any]:
                return [grow(so_far[0], known(j, body(j), unknown))]

            done, *so_far = loop(builder, word(0), count, LANES, [unknown], whole)
            stop = builder.add(count, word(LANES - 1))
            return loop(builder, done, stop, LANES, so_far, rest)[1]

        def add(one: Any, other: Any) -> Any:
            return builder.fadd(one, other, flags=SUMS)

        def share(j: Any) -> Any:
            power = exp_lanes(builder, builder.fsub(_load(builder, scores, j), most))
            _store(builder, power, scores, j)
            return power

        raise_to = partial(larger, builder)
        most = through(lowest, lambda j: _load(builder, scores, j), raise_to)
        most = folded(builder, most, raise_to)
        total = folded(builder, through(_ZEROS, share, add), add)
        one = builder.fdiv(ir.Constant(_NUMBER, 1.0), builder.extract_element(total, lane(0)))
        builder.store(one, _at(builder, factor, word(0), _NUMBER))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _values_adder(parts: int) -> Any:
    """`add_values` for as many registers' dimensions at once, which share the reading of shares."""
    chains = _UNDER_WAY // parts

    def add_values(
        context: Any, shares: Any, count: Any, values: Any, step: Any, out: Any, anew: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            shares, count, values, step, out, anew = args

            def add(totals: list[Any], key: Any) -> list[Any]:
                share = _spread(builder, shares, key)
                value = builder.add(values, builder.mul(key, step))
                return [
                    _add_product(builder, total, share, _load(builder, value, word(LANES * part)))
                    for part, total in enumerate(totals)
                ]

            def several(key: Any, sums: list[Any]) -> list[Any]:
                return [
                    total
                    for chain in range(chains)
                    for total in add(
                        sums[parts * chain : parts * (chain + 1)], builder.add(key, word(chain))
                    )
                ]

            def one(key: Any, sums: list[Any]) -> list[Any]:
                return add(sums, key)

            places = [word(LANES * part) for part in range(parts)]
            before = [builder.select(anew, _ZEROS, _load(builder, out, place)) for place in places]
            begin = [*before, *[_ZEROS] * (parts * (chains - 1))]
            done, *sums = loop(builder, word(0), count, chains, begin, several)
            while len(sums) > parts:
                half = len(sums) // 2
                together = zip(sums[:half], sums[half:], strict=True)
                sums = [builder.fadd(one, other, flags=SUMS) for one, other in together]
            _, *totals = loop(builder, done, count, 1, sums, one)
            for place, total in zip(places, totals, strict=True):
                _store(builder, total, out, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.boolean), generate

    return _instructions(add_values)


# Add `count` values, `step` bytes each, times their shares to what stands in `out`, for LANES
# dimensions, or twice or four times as many. What stood there is forgotten if this is `anew`.
add_values, add_values_twice, add_values_four_times = map(_values_adder, (1, 2, 4))


@_instructions
def multiply_lanes(context: Any, numbers: Any, factor: Any) -> Any:
    """Multiply LANES numbers by one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, factor = _load(builder, args[0], word(0)), _spread(builder, args[1], word(0))
        _store(builder, builder.fmul(numbers, factor, flags=SUMS), args[0], word(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_instructions
def turn_pairs(context: Any, numbers: Any, turns: Any) -> Any:
    """Rotate LANES numbers, which are pairs side by side, by as many of (cos, sin)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, turns = (_load(builder, address, word(0)) for address in args)

        def order(vector: Any, indices: list[int]) -> Any:
            return builder.shuffle_vector(vector, vector, lanes(indices))

        cos = order(turns, [lane & ~1 for lane in range(LANES)])
        sin = order(turns, [lane | 1 for lane in range(LANES)])
        signs = ir.Constant(_VECTOR, [(-1.0, 1.0)[lane % 2] for lane in range(LANES)])
        others = builder.fmul(order(numbers, [lane ^ 1 for lane in range(LANES)]), signs)
        turned = builder.fmul(numbers, cos, flags=SUMS)
        turned = _add_product(builder, turned, others, sin)
        _store(builder, turned, args[0], word(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_instructions
def copy_lanes(context: Any, source: Any, target: Any) -> Any:
    """Copy LANES numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, _load(builder, args[0], word(0)), args[1], word(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
