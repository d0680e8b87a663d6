"""The inner loop of matrix products on CPUs, as LLVM instructions for numba.

A matrix lies in *panels* of 16 columns, so that a product reads memory in order and its sums stay
in registers. Loops over arrays leave both to a compiler's guess, which was two times slower with
four tokens.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ahead import LINE, ask, ask_behind
from .dots import dots
from .half import BFLOAT16, FLOAT16, widened
from .pairs import pairs
from .processor import CONVERTS_FLOAT16, DOTS, INTEGERS, WIDE
from .vectors import SUMS, WORD, every, word

PANEL = 16  # columns of a panel
DEPTH = 4  # the inner size of a product is a multiple of it
# AVX2's registers hold a panel's sums for six tokens; AVX-512's have four times as many numbers.
MOST = 8 if WIDE else 6  # tokens that share a reading of a panel
TILE = 8 if WIDE else 4  # of more tokens, those that do
_BYTES = ir.IntType(8).as_pointer()


def _nothing(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """What helpers get for weights that there are none of: this processor lacks the instruction."""
    return context.get_dummy_value()


def _adder(tokens: int, shared: bool = False) -> Any:
    """An intrinsic that adds the product of `tokens` rows with one panel to what stands there.

    Its arguments: rows x [.., in or more], w [panels, in, PANEL] of x's dtype, int8, one of
    `half`'s two, or with x and w in bytes as `dots` or `pairs` has them; what each column of w is
    multiplied by, [panels * PANEL], y [.., panels * PANEL], the first row of x and y, the panel,
    and which of how many calls for this panel it is. It asks for memory before it is needed: in the
    order it reads, see `ahead`; or, where a panel's calls are several, for the next panel, a job
    that they share, so that memory is not idle while a panel is used again.
    """
    # Sums that do not wait for each other: as many as the processor has under way at a time.
    chains = max(chains for chains in (1, 2, DEPTH) if chains == 1 or chains * tokens <= TILE)

    def add_panel(
        context: Any,
        x: Any,
        w: Any,
        scale: Any,
        y: Any,
        row: Any,
        panel: Any,
        tile: Any,
        tiles: Any,
    ) -> Any:
        signature = types.void(x, w, scale, y, *[types.int64] * 4)
        if w.dtype == types.uint8 and INTEGERS:
            return signature, (dots if DOTS else pairs)(tokens, shared, PANEL)
        if w.dtype == types.uint8 or (w.dtype == FLOAT16 and not CONVERTS_FLOAT16):
            return signature, _nothing
        number = x.dtype.bitwidth // 8

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip((x, w, scale, y), args[:4], strict=True)
            ]
            rows, weights, scales, totals = (a.data for a in arrays)
            row, panel, tile, tiles = args[4:]
            shapes = [cgutils.unpack_tuple(builder, array.shape) for array in arrays]
            inner, depth, outer = shapes[0][1], shapes[1][1], shapes[3][1]
            vector = ir.VectorType(rows.type.pointee, PANEL)

            def vector_at(data: Any, index: Any) -> Any:
                """PANEL numbers from an index on; they are aligned as one of them."""
                kind = ir.VectorType(data.type.pointee, PANEL)
                return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

            def load(data: Any, index: Any, bytes_each: int) -> Any:
                return builder.load(vector_at(data, index), align=bytes_each)

            def spread(index: Any) -> Any:
                return every(builder, builder.load(builder.gep(rows, [index])), PANEL)

            each = [builder.add(row, word(m)) for m in range(tokens)]
            begins = [builder.mul(m, inner) for m in each]
            base = builder.mul(panel, depth)
            # Each call goes through its part of the next panel in smaller steps than it reads.
            of_row = word(PANEL * w.dtype.bitwidth // 8)
            step = builder.udiv(of_row, tiles)
            part = builder.mul(builder.mul(tile, depth), step)
            whole_panels = builder.mul(builder.mul(builder.add(panel, word(1)), depth), of_row)
            following_panel = builder.gep(
                builder.bitcast(weights, _BYTES), [builder.add(whole_panels, part)]
            )
            before = builder.block
            loop = builder.append_basic_block("rows_of_weights")
            done = builder.append_basic_block("summed")
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(WORD)
            sums = [[builder.phi(vector) for _ in range(tokens)] for _ in range(chains)]
            grown = [list(chain) for chain in sums]
            weight_bytes = w.dtype.bitwidth // 8
            for turn in range(DEPTH):
                at = builder.add(k, word(turn))
                place = builder.mul(builder.add(base, at), word(PANEL))
                if shared:
                    ask(builder, builder.gep(following_panel, [builder.mul(at, step)]), level=2)
                else:
                    here = builder.bitcast(builder.gep(weights, [place]), _BYTES)
                    begin, of_turn = turn * PANEL * weight_bytes, PANEL * weight_bytes
                    for start in range(-begin % LINE, of_turn, LINE):
                        at_line = builder.gep(here, [word(start)])
                        ask_behind(builder, at_line, (begin + start) // LINE, tokens, weight_bytes)
                loaded = load(weights, place, weight_bytes)
                if w.dtype == types.int8:
                    loaded = builder.sitofp(loaded, vector)
                elif w.dtype in (BFLOAT16, FLOAT16):
                    loaded = widened(builder, loaded, w.dtype)
                chain = grown[turn % chains]
                for m, begin in enumerate(begins):
                    product = builder.fmul(spread(builder.add(begin, at)), loaded, flags=SUMS)
                    chain[m] = builder.fadd(chain[m], product, flags=SUMS)
            following = builder.add(k, word(DEPTH))
            k.add_incoming(word(0), before)
            k.add_incoming(following, loop)
            for chain in range(chains):
                for total, new in zip(sums[chain], grown[chain], strict=True):
                    total.add_incoming(ir.Constant(vector, [0.0] * PANEL), before)
                    total.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

            builder.position_at_end(done)
            left = builder.mul(panel, word(PANEL))
            factor = load(scales, left, number)
            for m, product, *others in zip(each, *grown, strict=True):
                for other in others:
                    product = builder.fadd(product, other, flags=SUMS)
                at = builder.add(builder.mul(m, outer), left)
                product = builder.fmul(product, factor, flags=SUMS)
                total = builder.fadd(load(totals, at, number), product, flags=SUMS)
                builder.store(total, vector_at(totals, at), align=number)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(add_panel)


ADDERS = tuple(_adder(n) for n in range(1, MOST + 1))
add_tile = _adder(TILE, shared=True)
