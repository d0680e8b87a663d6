"""Attention's inner loops on CPUs, as LLVM instructions for numba: LANES numbers at a time.

A score is a sum over a head's dimensions, which lie side by side, so a compiler sums one key's
products within a register, step by step. Here the products of LANES keys are summed together: each
step halves what is left of all of them, and the last one leaves a score in every lane.

What is read and written is float32 and given by its address.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .exponential import exp_lanes
from .processor import LANES

_instructions: Any = intrinsic  # whose functions are called without their first argument

_CHAINS = 4  # sums that do not wait for each other
_WORD, _LANE = ir.IntType(64), ir.IntType(32)
_SUMS = ("contract", "nsz", "reassoc")


def _word(value: int) -> Any:
    return ir.Constant(_WORD, value)


def _lane(index: int) -> Any:
    return ir.Constant(_LANE, index)


def _lanes(indices: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(_LANE, len(indices)), [*indices])


_EVEN, _ODD = _lanes(range(0, 2 * LANES, 2)), _lanes(range(1, 2 * LANES, 2))


_NUMBER = ir.FloatType()
_VECTOR = ir.VectorType(_NUMBER, LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)
_BYTES = 4  # of a number


def _at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """A pointer to the number with an index, or to those from there on."""
    place = builder.add(address, builder.mul(index, _word(_BYTES)))
    return builder.inttoptr(place, kind.as_pointer())


def _load(builder: Any, address: Any, index: Any) -> Any:
    """LANES numbers from an index on."""
    return builder.load(_at(builder, address, index, _VECTOR), align=_BYTES)


def _store(builder: Any, value: Any, address: Any, index: Any) -> None:
    builder.store(value, _at(builder, address, index, _VECTOR), align=_BYTES)


def _repeat(builder: Any, value: Any) -> Any:
    """A value in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, _lane(0))
    return builder.shuffle_vector(first, undefined, _lanes([0] * LANES))


def _spread(builder: Any, address: Any, index: Any) -> Any:
    """The number with an index in every lane."""
    return _repeat(builder, builder.load(_at(builder, address, index, _NUMBER)))


def _add_product(builder: Any, total: Any, one: Any, other: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other, flags=_SUMS), flags=_SUMS)


def loop(
    builder: Any,
    start: Any,
    stop: Any,
    step: int,
    begin: list[Any],
    body: Callable[[Any, list[Any]], list[Any]],
) -> list[Any]:
    """From `start` on, as long as another `step` fits below `stop`; what `begin` has become."""
    before = builder.block
    head = builder.append_basic_block("more")
    inside = builder.append_basic_block("again")
    after = builder.append_basic_block("through")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_WORD)
    values = [builder.phi(value.type) for value in begin]
    index.add_incoming(start, before)
    following = builder.add(index, _word(step))
    builder.cbranch(builder.icmp_signed("<=", following, stop), inside, after)
    builder.position_at_end(inside)
    grown = body(index, values)
    index.add_incoming(following, builder.block)
    for value, first, new in zip(values, begin, grown, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(new, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return [index, *values]


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
        rows = [builder.add(keys, builder.mul(step, _word(key))) for key in range(LANES)]

        def products(d: Any, sums: list[Any]) -> list[Any]:
            part = _load(builder, query, d)
            return [
                _add_product(builder, total, part, _load(builder, row, d))
                for total, row in zip(sums, rows, strict=True)
            ]

        _, *sums = loop(builder, _word(0), size, LANES, [_ZEROS] * LANES, products)
        while len(sums) > 1:
            sums = [
                builder.fadd(
                    builder.shuffle_vector(one, other, _EVEN),
                    builder.shuffle_vector(one, other, _ODD),
                    flags=_SUMS,
                )
                for one, other in zip(sums[::2], sums[1::2], strict=True)
            ]
        _store(builder, sums[0], scores, _word(0))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@_instructions
def share_out(context: Any, scores: Any, count: Any, factor: Any) -> Any:
    """Make the first `count` scores shares of 1, but for a factor, which is put where that says.

    There is room for a multiple of LANES scores; the rest may hold anything, before and after.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, count, factor = args
        places = ir.Constant(ir.VectorType(_WORD, LANES), [*range(LANES)])
        lowest = ir.Constant(_VECTOR, [float("-inf")] * LANES)

        def known(start: Any, numbers: Any, others: Any) -> Any:
            """LANES numbers, of the scores from `start` on; others where there is none."""
            left = _repeat(builder, builder.sub(count, start))
            return builder.select(builder.icmp_signed("<", places, left), numbers, others)

        def larger(one: Any, other: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", one, other), one, other)

        def through(unknown: Any, body: Any, grow: Any) -> Any:
            """Let what `body` makes of all scores grow together; `unknown` adds nothing to it."""

            def whole(j: Any, so_far: list[Any]) -> list[Any]:
                return [grow(so_far[0], body(j))]

            def rest(j: Any, so_far: list[Any]) -> list[Any]:
                return [grow(so_far[0], known(j, body(j), unknown))]

            done, *so_far = loop(builder, _word(0), count, LANES, [unknown], whole)
            stop = builder.add(count, _word(LANES - 1))
            return loop(builder, done, stop, LANES, so_far, rest)[1]

        def folded(numbers: Any, grow: Any) -> Any:
            """What all lanes grow to together, in each of them."""
            width = LANES
            while width > 1:
                width //= 2
                others = _lanes([(lane + width) % LANES for lane in range(LANES)])
                numbers = grow(numbers, builder.shuffle_vector(numbers, numbers, others))
            return numbers

        def add(one: Any, other: Any) -> Any:
            return builder.fadd(one, other, flags=_SUMS)

        def share(j: Any) -> Any:
            power = exp_lanes(builder, builder.fsub(_load(builder, scores, j), most))
            _store(builder, power, scores, j)
            return power

        most = folded(through(lowest, lambda j: _load(builder, scores, j), larger), larger)
        total = folded(through(_ZEROS, share, add), add)
        one = builder.fdiv(ir.Constant(_NUMBER, 1.0), builder.extract_element(total, _lane(0)))
        builder.store(one, _at(builder, factor, _word(0), _NUMBER))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@_instructions
def add_values(
    context: Any, shares: Any, count: Any, values: Any, step: Any, out: Any, anew: Any
) -> Any:
    """Add `count` values, `step` bytes each, times their shares to LANES dimensions of `out`.

    What stood there is forgotten if this is `anew`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shares, count, values, step, out, anew = args

        def add(total: Any, key: Any) -> Any:
            value = _load(builder, builder.add(values, builder.mul(key, step)), _word(0))
            return _add_product(builder, total, _spread(builder, shares, key), value)

        def several(key: Any, sums: list[Any]) -> list[Any]:
            return [add(total, builder.add(key, _word(n))) for n, total in enumerate(sums)]

        def one(key: Any, sums: list[Any]) -> list[Any]:
            return [add(sums[0], key)]

        before = builder.select(anew, _ZEROS, _load(builder, out, _word(0)))
        begin = [before, *[_ZEROS] * (_CHAINS - 1)]
        done, *sums = loop(builder, _word(0), count, _CHAINS, begin, several)
        while len(sums) > 1:
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = [builder.fadd(one, other, flags=_SUMS) for one, other in pairs]
        _, total = loop(builder, done, count, 1, sums, one)
        _store(builder, total, out, _word(0))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.boolean), generate


@_instructions
def multiply_lanes(context: Any, numbers: Any, factor: Any) -> Any:
    """Multiply LANES numbers by one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, factor = _load(builder, args[0], _word(0)), _spread(builder, args[1], _word(0))
        _store(builder, builder.fmul(numbers, factor, flags=_SUMS), args[0], _word(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_instructions
def turn_pairs(context: Any, numbers: Any, turns: Any) -> Any:
    """Rotate LANES numbers, which are pairs side by side, by as many of (cos, sin)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, turns = (_load(builder, address, _word(0)) for address in args)

        def order(vector: Any, indices: list[int]) -> Any:
            return builder.shuffle_vector(vector, vector, _lanes(indices))

        cos = order(turns, [lane & ~1 for lane in range(LANES)])
        sin = order(turns, [lane | 1 for lane in range(LANES)])
        signs = ir.Constant(_VECTOR, [(-1.0, 1.0)[lane % 2] for lane in range(LANES)])
        others = builder.fmul(order(numbers, [lane ^ 1 for lane in range(LANES)]), signs)
        turned = builder.fmul(numbers, cos, flags=_SUMS)
        turned = _add_product(builder, turned, others, sin)
        _store(builder, turned, args[0], _word(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_instructions
def copy_lanes(context: Any, source: Any, target: Any) -> Any:
    """Copy LANES numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, _load(builder, args[0], _word(0)), args[1], _word(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
