"""LLVM instructions that all kernels' inner loops are made of: vectors, and loops over them."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

WORD, LANE = ir.IntType(64), ir.IntType(32)
# What may be done with sums, as in all other code of kernels; see `jit`.
SUMS = ("contract", "nsz", "reassoc")


def word(value: int) -> Any:
    """A number known when code is made, for addresses and counts."""
    return ir.Constant(WORD, value)


def lane(index: int) -> Any:
    """One, for lanes of vectors."""
    return ir.Constant(LANE, index)


def lanes(indices: Sequence[int]) -> Any:
    """Several, for shuffling."""
    return ir.Constant(ir.VectorType(LANE, len(indices)), [*indices])


def place_of(builder: Any, data: Any, index: Any, kind: Any) -> Any:
    """A pointer to something of a kind that begins with the number with an index."""
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def load(builder: Any, data: Any, index: Any, kind: Any, align: int) -> Any:
    """What is there."""
    return builder.load(place_of(builder, data, index, kind), align=align)


def every(builder: Any, value: Any, count: int) -> Any:
    """A vector with a value in each of its lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = builder.insert_element(undefined, value, lane(0))
    return builder.shuffle_vector(first, undefined, lanes([0] * count))


def larger(builder: Any, one: Any, other: Any) -> Any:
    """The larger numbers of two vectors; of a pair that has a nan, the other's."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def turned(builder: Any, numbers: Any, by: int) -> Any:
    """A vector whose lanes have moved, round its end."""
    count = numbers.type.count
    order = lanes([(lane + by) % count for lane in range(count)])
    return builder.shuffle_vector(numbers, numbers, order)


def folded(builder: Any, numbers: Any, grow: Callable[[Any, Any], Any]) -> Any:
    """What all lanes grow to together, in each of them."""
    width = numbers.type.count
    while width > 1:
        width //= 2
        numbers = grow(numbers, turned(builder, numbers, width))
    return numbers


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
    index = builder.phi(WORD)
    values = [builder.phi(value.type) for value in begin]
    index.add_incoming(start, before)
    following = builder.add(index, word(step))
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
