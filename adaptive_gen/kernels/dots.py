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
from .vectors import LANE, every, loop, word

QUAD = 4  # rows of weights that are multiplied at a time
OFFSET = 128
_LARGEST = 127 * 256  # of 16 bits, so that a byte holds the upper half however it is rounded
# What a state may be off by, as a share of the largest one of its token: half a step, and rounding.
ROUNDING = 0.51 / _LARGEST
# Behind its two bytes for each weight a token has its factor and what `OFFSET` adds to the sums.
_TAIL = 12

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
    out = np.empty((tokens, 2 * inner + _TAIL), np.int8)
    for m in range(tokens):
        row = x[m, :inner]
        largest = total = row.dtype.type(0)
        for n in range(inner):
            largest = max(largest, abs(row[n]))
            total += row[n]
        steps = row.dtype.type(_LARGEST) / largest if largest > 0 else largest
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
        tail[:4].view(np.float32)[0] = largest / row.dtype.type(_LARGEST) + 0 * total
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
        states, weights, scales, totals = (array.data for array in arrays)
        row, panel, tile, tiles = args[4:]
        shapes = [cgutils.unpack_tuple(builder, array.shape) for array in arrays]
        width, inner, outer = shapes[0][1], shapes[1][1], shapes[3][1]
        number = totals.type.pointee
        numbers = ir.VectorType(number, LANES)

        def address(data: Any, index: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

        def dot(total: Any, unsigned: Any, signed: Any) -> Any:
            kind = ir.FunctionType(_INTEGERS, [_INTEGERS, _OPERAND, _OPERAND])
            name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
            instruction = cgutils.get_or_insert_function(builder.module, kind, name)
            operands = (builder.bitcast(operand, _OPERAND) for operand in (unsigned, signed))
            return builder.call(instruction, [total, *operands])

        each = [builder.add(row, word(m)) for m in range(tokens)]
        begins = [builder.mul(m, width) for m in each]
        halves = [[begin, builder.add(begin, inner)] for begin in begins]
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
            loaded = [
                builder.load(
                    address(weights, builder.add(place, word(QUAD * LANES * part)), _INTEGERS),
                    align=1,
                )
                for part in range(parts)
            ]
            grown = []
            for start in (start for of_token in halves for start in of_token):
                four = builder.load(address(states, builder.add(start, k), LANE), align=1)
                signed = every(builder, four, LANES)
                for part in loaded:
                    grown.append(dot(sums[len(grown)], part, signed))
            return grown

        def add_quads(k: Any, sums: list[Any]) -> list[Any]:
            """The same with a quad for each chain."""
            count = len(sums) // chains
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

        left = builder.mul(panel, columns)
        for m, begin in enumerate(begins):
            tail = builder.add(begin, builder.mul(inner, word(2)))
            factor = builder.load(address(states, tail, ir.FloatType()), align=1)
            factor = builder.fpext(factor, number) if number != ir.FloatType() else factor
            offsets = [
                every(
                    builder,
                    builder.load(address(states, builder.add(tail, word(at)), LANE), align=1),
                    LANES,
                )
                for at in (4, 8)
            ]
            for part in range(parts):
                upper, lower = (
                    builder.sitofp(
                        builder.sub(sums[(2 * m + half) * parts + part], offsets[half]), numbers
                    )
                    for half in range(2)
                )
                weight = ir.Constant(numbers, [256.0] * LANES)
                product = builder.fadd(builder.fmul(upper, weight), lower)
                at = builder.add(left, word(LANES * part))
                scale = builder.load(address(scales, at, numbers), align=4)
                product = builder.fmul(product, builder.fmul(every(builder, factor, LANES), scale))
                place = address(totals, builder.add(builder.mul(each[m], outer), at), numbers)
                total = builder.fadd(builder.load(place, align=4), product)
                builder.store(total, place, align=4)
        return context.get_dummy_value()

    return generate
