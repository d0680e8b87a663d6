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

from .integers import Panel, scaled
from .jit import compiled
from .processor import LANES
from .vectors import LANE, every, load, loop, word

QUAD = 4  # rows of weights that are multiplied at a time
OFFSET = 128
# Behind its two bytes for each weight a token has a step and what `OFFSET` adds to the two sums.
_TAIL = 12

_INTEGERS = ir.VectorType(LANE, LANES)
_OF_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
# LLVM calls the operands' bytes by their name since 22.
_OPERAND = _OF_BYTES if binding.llvm_version_info[0] >= 22 else _INTEGERS
_CHAINED = 2  # tokens with whose sums alone the processor would have too little under way


@compiled
def rounded(x: Any, inner: int, tokens: int) -> Any:
    """States [.., inner or more] as bytes, [tokens, 2 * inner + tail]: upper ones, lower ones."""
    out = np.empty((tokens, 2 * inner + _TAIL), np.int8)
    for m in range(tokens):
        row = x[m, :inner]
        steps, step = scaled(row)
        upper, lower = out[m, :inner], out[m, inner : 2 * inner]
        upper_sum = lower_sum = np.int32(0)
        for n in range(inner):
            state = np.int32(np.rint(row[n] * steps))
            high = (state + np.int32(128)) >> np.int32(8)
            low = state - (high << np.int32(8))
            upper[n], lower[n] = high, low
            upper_sum += high
            lower_sum += low
        tail = out[m, 2 * inner :]
        tail[:4].view(np.float32)[0] = step
        offsets = tail[4:].view(np.int32)
        offsets[0], offsets[1] = OFFSET * upper_sum, OFFSET * lower_sum
    return out


def dots(tokens: int, shared: bool, panel_columns: int) -> Any:
    """What `panels._adder` generates for weights in bytes, with states as `rounded` gives them."""
    parts, chains = panel_columns // LANES, 2 if tokens <= _CHAINED else 1

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        panel = Panel(context, builder, signature, args, tokens, panel_columns)
        # Where upper bytes begin, then lower ones, of each token.
        halves = [at for begin in panel.begins for at in (begin, builder.add(begin, panel.inner))]

        def add_quad(k: Any, sums: list[Any]) -> list[Any]:
            """Sums [tokens, halves, parts], one after the other, with the rows from k on."""
            panel.ask(k, shared)
            place = panel.row(k)
            starts = [builder.add(place, word(QUAD * LANES * part)) for part in range(parts)]
            loaded = [load(builder, panel.weights, start, _INTEGERS, align=1) for start in starts]
            grown = []
            for start in halves:
                four = load(builder, panel.states, builder.add(start, k), LANE, align=1)
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
        done, *sums = loop(builder, word(0), panel.inner, QUAD * chains, zeros, add_quads)
        sums, *others = (sums[count * chain : count * (chain + 1)] for chain in range(chains))
        for chain in others:
            sums = [builder.add(one, other) for one, other in zip(sums, chain, strict=True)]
        if chains > 1:
            _, *sums = loop(builder, done, panel.inner, QUAD, sums, add_quad)
        for token in range(tokens):
            ends = [builder.add(panel.tails[token], word(at)) for at in (4, 8)]
            offsets = [load(builder, panel.states, end, LANE, align=1) for end in ends]
            offsets = [every(builder, offset, LANES) for offset in offsets]
            for part in range(parts):
                upper, lower = (
                    builder.sitofp(
                        builder.sub(sums[(2 * token + half) * parts + part], offsets[half]),
                        panel.numbers,
                    )
                    for half in range(2)
                )
                weight = ir.Constant(panel.numbers, [256.0] * LANES)
                panel.add(token, part, builder.fadd(builder.fmul(upper, weight), lower))
        return context.get_dummy_value()

    return generate


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """The instruction that all of this is for."""
    kind = ir.FunctionType(_INTEGERS, [_INTEGERS, _OPERAND, _OPERAND])
    name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
    instruction = cgutils.get_or_insert_function(builder.module, kind, name)
    operands = (builder.bitcast(operand, _OPERAND) for operand in (unsigned, signed))
    return builder.call(instruction, [total, *operands])
