"""Products with weights in 8 bits as integers, on processors with an instruction for it.

The instruction multiplies four bytes by four and adds all of it to an int32, in each lane of a
register: four times what float32 gives, and no weight has to be converted. Activations are rounded
to 16 bits with a factor for each token and come as two bytes: a product is 256 times that of the
upper ones plus that of the lower ones. Sums of integers are exact, so what is lost is the rounding
of activations, 1/65000 of the largest one of a token.

The instruction takes one of its operands without a sign. So weights, of -127..127, are stored with
`OFFSET` added, which a token's bytes take back, added up once for all columns.

Weights lie [panels, in, PANEL] as others do, but every `QUAD` rows of a panel are interleaved, so
that the bytes of a column lie together.
"""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from .ahead import ask, ask_behind
from .freshness import compiled
from .processor import LANES
from .vectors import LANE, every, load, loop, place_of, word

QUAD = 4  # rows of weights that are multiplied at a time
OFFSET = 128
LARGEST = 127 * 256  # of 16 bits, so that a byte holds the upper half however it is rounded
# What a state may be off by, as a share of the largest one of its token: half a step, and rounding.
ROUNDING = 0.51 / LARGEST
# Behind its two bytes for each weight a token has its factor and what `OFFSET` adds to the sums.
TAIL = 12

_INTEGERS = ir.VectorType(LANE, LANES)
_OF_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
# LLVM calls the operands' bytes by their name since 22.
_OPERAND = _OF_BYTES if binding.llvm_version_info[0] >= 22 else _INTEGERS
_CHAINED = 2  # tokens with whose sums alone the processor would have too little under way


@compiled
def rounded(x: Any, inner: int, tokens: int) -> Any:
    """States [.., inner or more] as bytes, [tokens, 2 * inner + tail]: upper ones, lower ones.

    Where one of them is nan or infinite, so is their factor.
    """
    out = np.empty((tokens, 2 * inner + TAIL), np.int8)
    for m in range(tokens):
        row = x[m, :inner]
        largest = total = row.dtype.type(0)
        for n in range(inner):
            largest = max(largest, abs(row[n]))
            total += row[n]
        steps = row.dtype.type(LARGEST) / largest if largest > 0 else largest
        upper, lower = out[m, :inner], out[m, inner : 2 * inner]
        upper_sum = lower_sum = np.int32(0)
        for n in range(inner):
            step = np.int32(np.rint(row[n] * steps))
            high = (step + np.int32(128)) >> np.int32(8)
            low = step - (high << np.int32(8))
            upper[n], lower[n] = high, low
            upper_sum += high
            lower_sum += low
        tail = out[m, 2 * inner :]
        tail[:4].view(np.float32)[0] = largest / row.dtype.type(LARGEST) + 0 * total
        offsets = tail[4:].view(np.int32)
        offsets[0], offsets[1] = OFFSET * upper_sum, OFFSET * lower_sum
    return out


def dots(tokens: int, shared: bool, panel_columns: int) -> Any:
    """What `panels._adder` generates for weights in bytes, with states as `rounded` gives them."""
    parts, chains = panel_columns // LANES, 2 if tokens <= _CHAINED else 1

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:4], args[:4], strict=True)
        ]
        states, weights, _, _ = (array.data for array in arrays)
        row, panel, tile, tiles = args[4:]
        shapes = [cgutils.unpack_tuple(builder, array.shape) for array in arrays]
        width, inner = shapes[0][1], shapes[1][1]
        each = [builder.add(row, word(m)) for m in range(tokens)]
        begins = [builder.mul(m, width) for m in each]
        # Where upper bytes begin, then lower ones, of each token.
        halves = [at for begin in begins for at in (begin, builder.add(begin, inner))]
        columns = word(panel_columns)
        base = builder.mul(builder.mul(panel, inner), columns)
        # Each call goes through its part of the next panel in smaller steps than it reads.
        step = builder.udiv(columns, tiles)
        behind = builder.mul(builder.mul(builder.add(panel, word(1)), inner), columns)
        following = builder.add(behind, builder.mul(builder.mul(tile, inner), step))

        def add_quad(k: Any, sums: list[Any]) -> list[Any]:
            """Sums [tokens, halves, parts], one after the other, with the rows from k on."""
            place = builder.add(base, builder.mul(k, columns))
            if shared:
                soon = builder.add(following, builder.mul(k, step))
                ask(builder, builder.gep(weights, [soon]), level=2)
            else:
                ask_behind(builder, builder.gep(weights, [place]), 0, tokens, bytes_each=1)
            starts = [builder.add(place, word(QUAD * LANES * part)) for part in range(parts)]
            loaded = [load(builder, weights, start, _INTEGERS, align=1) for start in starts]
            grown = []
            for start in halves:
                four = load(builder, states, builder.add(start, k), LANE, align=1)
                signed = every(builder, four, LANES)
                grown += [
                    _dot(builder, sums[len(grown) + n], w, signed) for n, w in enumerate(loaded)
                ]
            return grown

        def add_quads(k: Any, sums: list[Any]) -> list[Any]:
            """The same with a quad for each chain."""
            return [
                total
                for chain in range(chains)
                for total in add_quad(
                    builder.add(k, word(QUAD * chain)), sums[count * chain : count * (chain + 1)]
                )
            ]

        count = tokens * 2 * parts
        zeros = [ir.Constant(_INTEGERS, [0] * LANES)] * count * chains
        done, *sums = loop(builder, word(0), inner, QUAD * chains, zeros, add_quads)
        sums, *others = (sums[count * chain : count * (chain + 1)] for chain in range(chains))
        for chain in others:
            sums = [builder.add(one, other) for one, other in zip(sums, chain, strict=True)]
        if chains > 1:
            _, *sums = loop(builder, done, inner, QUAD, sums, add_quad)
        tails = [builder.add(begin, builder.mul(inner, word(2))) for begin in begins]
        left = builder.mul(panel, columns)
        places = [builder.add(builder.mul(m, shapes[3][1]), left) for m in each]
        _add_to_totals(builder, [array.data for array in arrays], sums, tails, left, places)
        return context.get_dummy_value()

    return generate


def _add_to_totals(
    builder: Any, data: list[Any], sums: list[Any], tails: list[Any], left: Any, places: list[Any]
) -> None:
    """Add what a panel's sums of integers stand for to the totals.

    Args:
        builder: of instructions.
        data: of states, weights, scales and totals.
        sums: [tokens, halves, parts], one after the other.
        tails: where each token's tail begins.
        left: the panel's first column.
        places: the same, in the totals of each token.
    """
    states, _, scales, totals = data
    number, parts = totals.type.pointee, len(sums) // (2 * len(tails))
    numbers = ir.VectorType(number, LANES)
    for m, (tail, place) in enumerate(zip(tails, places, strict=True)):
        factor = load(builder, states, tail, ir.FloatType(), align=1)
        factor = builder.fpext(factor, number) if number != ir.FloatType() else factor
        ends = [builder.add(tail, word(at)) for at in (4, 8)]
        offsets = [every(builder, load(builder, states, e, LANE, align=1), LANES) for e in ends]
        for part in range(parts):
            upper, lower = (
                builder.sitofp(
                    builder.sub(sums[(2 * m + half) * parts + part], offsets[half]), numbers
                )
                for half in range(2)
            )
            weight = ir.Constant(numbers, [256.0] * LANES)
            product = builder.fadd(builder.fmul(upper, weight), lower)
            scale = load(builder, scales, builder.add(left, word(LANES * part)), numbers, align=4)
            product = builder.fmul(product, builder.fmul(every(builder, factor, LANES), scale))
            at = place_of(builder, totals, builder.add(place, word(LANES * part)), numbers)
            builder.store(builder.fadd(builder.load(at, align=4), product), at, align=4)


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """The instruction that all of this is for."""
    kind = ir.FunctionType(_INTEGERS, [_INTEGERS, _OPERAND, _OPERAND])
    name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
    instruction = cgutils.get_or_insert_function(builder.module, kind, name)
    operands = (builder.bitcast(operand, _OPERAND) for operand in (unsigned, signed))
    return builder.call(instruction, [total, *operands])
