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

from .integers import Panel, scaled
from .jit import compiled
from .processor import LANES
from .vectors import LANE, every, load, loop, word

PAIR = 2  # rows of weights that are multiplied at a time
ROWS = 512  # whose products, of 127 * `integers.LARGEST` at most, fit an int32 together
_UNROLLED = 4  # rows of a turn of the loop, which are a line of memory

_INTEGERS = ir.VectorType(LANE, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_BYTES = ir.VectorType(ir.IntType(8), 2 * LANES)


@compiled
def rounded(x: Any, inner: int, tokens: int) -> Any:
    """States [.., inner or more] as int16, and a step of them: bytes [tokens, 2 * inner + 4]."""
    out = np.empty((tokens, 2 * inner + 4), np.int8)
    for m in range(tokens):
        row = x[m, :inner]
        steps, step = scaled(row)
        shorts = out[m, : 2 * inner].view(np.int16)
        for n in range(inner):
            shorts[n] = np.int32(np.rint(row[n] * steps))
        out[m, 2 * inner :].view(np.float32)[0] = step
    return out


def pairs(tokens: int, shared: bool, panel_columns: int) -> Any:
    """What `panels._adder` generates for weights in bytes, with states as `rounded` gives them."""
    parts = panel_columns // LANES

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        panel = Panel(context, builder, signature, args, tokens, panel_columns)
        numbers = panel.numbers

        def add_pair(k: Any, sums: list[Any]) -> list[Any]:
            """Sums [tokens, parts], one after the other, with the two rows from k on."""
            at, wide = panel.row(k), []
            for part in range(parts):
                start = builder.add(at, word(PAIR * LANES * part))
                stored = load(builder, panel.weights, start, _BYTES, align=1)
                wide.append(builder.sext(stored, _SHORTS))
            grown = []
            for begin in panel.begins:
                start = builder.add(begin, builder.mul(k, word(PAIR)))
                two = every(builder, load(builder, panel.states, start, LANE, align=1), LANES)
                grown += [
                    _add_products(builder, sums[len(grown) + n], w, two) for n, w in enumerate(wide)
                ]
            return grown

        def add_rows(k: Any, sums: list[Any]) -> list[Any]:
            panel.ask(k, shared)
            for turn in range(0, _UNROLLED, PAIR):
                sums = add_pair(builder.add(k, word(turn)), sums)
            return sums

        def add_block(start: Any, so_far: list[Any]) -> list[Any]:
            """What all sums are with those of a block of rows."""
            stop = builder.add(start, word(ROWS))
            stop = builder.select(builder.icmp_signed("<", stop, panel.inner), stop, panel.inner)
            zeros = [ir.Constant(_INTEGERS, [0] * LANES)] * len(so_far)
            _, *sums = loop(builder, start, stop, _UNROLLED, zeros, add_rows)
            return [
                builder.fadd(one, builder.sitofp(total, numbers))
                for one, total in zip(so_far, sums, strict=True)
            ]

        none = [ir.Constant(numbers, [0.0] * LANES)] * (tokens * parts)
        end = builder.add(panel.inner, word(ROWS - 1))  # so that the rest is a block too
        _, *sums = loop(builder, word(0), end, ROWS, none, add_block)
        for token in range(tokens):
            for part in range(parts):
                panel.add(token, part, sums[token * parts + part])
        return context.get_dummy_value()

    return generate


def _add_products(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """Add the products of int16, two at a time, to a vector of int32."""
    kind = ir.FunctionType(_INTEGERS, [_SHORTS, _SHORTS])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
    product = builder.call(instruction, [one, builder.bitcast(other, _SHORTS)])
    return builder.add(total, product)
