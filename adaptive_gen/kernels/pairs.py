"""Products with weights in 8 bits as integers, on processors that have AVX2 and nothing newer.

Their instruction multiplies sixteen int16 by sixteen and adds up neighbours, to eight int32: twice
what float32 gives, and a weight is only widened, not converted. Activations are rounded to 16 bits
with a factor for each token. Sums of integers are exact, and those of `ROWS` rows fit an int32;
what is lost is the rounding of activations, as with `dots`.

Weights lie [panels, in, PANEL] as others do, but every `PAIR` rows of a panel are interleaved, so
that the bytes of a column lie together.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .ahead import ask, ask_behind
from .dots import LARGEST, TAIL
from .freshness import compiled
from .processor import LANES
from .vectors import LANE, every, load, loop, place_of, word

PAIR = 2  # rows of weights that are multiplied at a time
ROWS = 512  # whose products, of 127 * LARGEST at most, fit an int32 together
_UNROLLED = 4  # rows of a turn of the loop, which are a line of memory

_INTEGERS = ir.VectorType(LANE, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_BYTES = ir.VectorType(ir.IntType(8), 2 * LANES)


@compiled
def rounded(x: Any, inner: int, tokens: int) -> Any:
    """States [.., inner or more] as int16, seen as bytes: [tokens, 2 * inner + tail].

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
        shorts = out[m, : 2 * inner].view(np.int16)
        for n in range(inner):
            shorts[n] = np.int32(np.rint(row[n] * steps))
        tail = out[m, 2 * inner :]
        tail[:4].view(np.float32)[0] = largest / row.dtype.type(LARGEST) + 0 * total
    return out


def pairs(tokens: int, shared: bool, panel_columns: int) -> Any:
    """What `panels._adder` generates for weights in bytes, with states as `rounded` gives them."""
    parts = panel_columns // LANES

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:4], args[:4], strict=True)
        ]
        states, weights, scales, totals = (array.data for array in arrays)
        row, panel, tile, tiles = args[4:]
        shapes = [cgutils.unpack_tuple(builder, array.shape) for array in arrays]
        width, inner = shapes[0][1], shapes[1][1]
        each = [builder.add(row, word(m)) for m in range(tokens)]
        begins = [builder.mul(m, width) for m in each]
        columns = word(panel_columns)
        base = builder.mul(builder.mul(panel, inner), columns)
        # Each call goes through its part of the next panel in smaller steps than it reads.
        step = builder.udiv(columns, tiles)
        behind = builder.mul(builder.mul(builder.add(panel, word(1)), inner), columns)
        following = builder.add(behind, builder.mul(builder.mul(tile, inner), step))
        number = totals.type.pointee
        numbers = ir.VectorType(number, LANES)

        def add_pair(k: Any, sums: list[Any]) -> list[Any]:
            """Sums [tokens, parts], one after the other, with the two rows from k on."""
            at = builder.add(base, builder.mul(k, columns))
            wide = []
            for part in range(parts):
                start = builder.add(at, word(PAIR * LANES * part))
                stored = load(builder, weights, start, _BYTES, align=1)
                wide.append(builder.sext(stored, _SHORTS))
            grown = []
            for begin in begins:
                start = builder.add(begin, builder.mul(k, word(PAIR)))
                two = every(builder, load(builder, states, start, LANE, align=1), LANES)
                grown += [
                    _add_products(builder, sums[len(grown) + n], w, two) for n, w in enumerate(wide)
                ]
            return grown

        def add_rows(k: Any, sums: list[Any]) -> list[Any]:
            if shared:
                soon = builder.add(following, builder.mul(k, step))
                ask(builder, builder.gep(weights, [soon]), level=2)
            else:
                here = builder.gep(weights, [builder.add(base, builder.mul(k, columns))])
                ask_behind(builder, here, 0, tokens, bytes_each=1)
            for turn in range(0, _UNROLLED, PAIR):
                sums = add_pair(builder.add(k, word(turn)), sums)
            return sums

        def add_block(start: Any, so_far: list[Any]) -> list[Any]:
            """What all sums are with those of a block of rows."""
            stop = builder.add(start, word(ROWS))
            stop = builder.select(builder.icmp_signed("<", stop, inner), stop, inner)
            zeros = [ir.Constant(_INTEGERS, [0] * LANES)] * len(so_far)
            _, *sums = loop(builder, start, stop, _UNROLLED, zeros, add_rows)
            return [
                builder.fadd(one, builder.sitofp(total, numbers))
                for one, total in zip(so_far, sums, strict=True)
            ]

        none = [ir.Constant(numbers, [0.0] * LANES)] * (tokens * parts)
        end = builder.add(inner, word(ROWS - 1))  # so that the rest is a block too
        _, *sums = loop(builder, word(0), end, ROWS, none, add_block)
        left = builder.mul(panel, columns)
        for m, begin in zip(each, begins, strict=True):
            tail = builder.add(begin, builder.mul(inner, word(2)))
            factor = load(builder, states, tail, ir.FloatType(), align=1)
            factor = builder.fpext(factor, number) if number != ir.FloatType() else factor
            for part in range(parts):
                column = builder.add(left, word(LANES * part))
                scale = load(builder, scales, column, numbers, align=4)
                scale = builder.fmul(every(builder, factor, LANES), scale)
                at = builder.add(builder.mul(m, shapes[3][1]), column)
                at = place_of(builder, totals, at, numbers)
                product = builder.fmul(sums.pop(0), scale)
                builder.store(builder.fadd(builder.load(at, align=4), product), at, align=4)
        return context.get_dummy_value()

    return generate


def _add_products(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """Add the products of int16, two at a time, to a vector of int32."""
    kind = ir.FunctionType(_INTEGERS, [_SHORTS, _SHORTS])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
    product = builder.call(instruction, [one, builder.bitcast(other, _SHORTS)])
    return builder.add(total, product)
