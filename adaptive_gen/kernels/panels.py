"""The inner loop of matrix products on CPUs, as LLVM instructions for numba.

A matrix lies in *panels* of 16 columns, so that a product reads memory in order and its sums stay
in registers. Loops over arrays leave both to a compiler's guess, which was two times slower with
four tokens.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .half import BFLOAT16, FLOAT16, widened

PANEL = 16  # columns of a panel
DEPTH = 4  # the inner size of a product is a multiple of it
# A panel's sums for four tokens fill the registers of AVX2; AVX-512 has four times as many numbers.
WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
TILE = 8 if WIDE else 4  # tokens that share a reading of a panel
_WORD, _LANE = ir.IntType(64), ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()
_LINE = 64  # bytes that come from memory at a time
_CPU = binding.get_host_cpu_name()  # such as "znver4"
_AMD = _CPU.startswith(("zn", "bd", "bt"))
_ZEN_5 = _CPU.startswith("znver") and int(_CPU[5:] or 0) >= 5
_SUMS = ("contract", "nsz", "reassoc")


def _one() -> Any:
    return ir.Constant(_WORD, 1)


def _prefetch(builder: Any, address: Any, into: int) -> None:
    """Ask for a line of memory, to be read from cache level `into`, and do not wait."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, *[ir.IntType(32)] * 3])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, locality, data = (ir.Constant(ir.IntType(32), value) for value in (0, 4 - into, 1))
    builder.call(instruction, [address, to_read, locality, data])


def _asks(tokens: int, bytes_each: int) -> tuple[tuple[int, int, int], ...]:
    """What to ask for while weights are read in order.

    Each is how many bytes ahead, into which cache, and once in how many lines: the second cache
    takes lines in pairs, so that every other one is enough where reading waits for instructions
    rather than for memory.

    AMD's processors since Zen 5 look too few lines ahead with any number of tokens. Those before
    follow the memory by themselves with one token, where asking disturbs them. Intel's look too few
    lines ahead too, and stop at the end of a page. Other makers' are taken for Intel's, unmeasured.
    """
    if _ZEN_5:
        return ((8192, 1, 1),)
    if _AMD:
        return () if tokens == 1 else ((1024, 1, 1),)
    if bytes_each == 1:
        return (2048, 1, 1), (8192, 2, 2)
    return ((1024, 1, 1), (4096, 2, 2)) if tokens == 1 else ((2048, 1, 1), (8192, 2, 1))


def _adder(tokens: int, shared: bool = False) -> Any:
    """An intrinsic that adds the product of `tokens` rows with one panel to what stands there.

    Its arguments: rows x [.., in or more], w [panels, in, PANEL] of x's dtype, int8 or
    one of `half`'s two, what each column of w is multiplied by, [panels * PANEL], y [.., panels *
    PANEL], the first row of x and y, the panel, and which of how many calls for this panel it is.
    It asks for memory before it is needed: in the order it reads, see `_asks`; or, where a panel's
    calls are several, for the next panel, a job that they share, so that memory is not idle while a
    panel is used again.
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
            undefined = ir.Constant(vector, ir.Undefined)
            first_lane = ir.Constant(ir.VectorType(_LANE, PANEL), [0] * PANEL)

            def vector_at(data: Any, index: Any) -> Any:
                """PANEL numbers from an index on; they are aligned as one of them."""
                kind = ir.VectorType(data.type.pointee, PANEL)
                return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())

            def load(data: Any, index: Any, bytes_each: int) -> Any:
                return builder.load(vector_at(data, index), align=bytes_each)

            def spread(index: Any) -> Any:
                value = builder.load(builder.gep(rows, [index]))
                lane = builder.insert_element(undefined, value, ir.Constant(_LANE, 0))
                return builder.shuffle_vector(lane, undefined, first_lane)

            each = [builder.add(row, ir.Constant(_WORD, m)) for m in range(tokens)]
            begins = [builder.mul(m, inner) for m in each]
            base = builder.mul(panel, depth)
            # Each call goes through its part of the next panel in smaller steps than it reads.
            of_row = ir.Constant(_WORD, PANEL * w.dtype.bitwidth // 8)
            step = builder.udiv(of_row, tiles)
            part = builder.mul(builder.mul(tile, depth), step)
            whole_panels = builder.mul(builder.mul(builder.add(panel, _one()), depth), of_row)
            following_panel = builder.gep(
                builder.bitcast(weights, _BYTES), [builder.add(whole_panels, part)]
            )
            before = builder.block
            loop = builder.append_basic_block("rows_of_weights")
            done = builder.append_basic_block("summed")
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(_WORD)
            sums = [[builder.phi(vector) for _ in range(tokens)] for _ in range(chains)]
            grown = [list(chain) for chain in sums]
            weight_bytes = w.dtype.bitwidth // 8
            for turn in range(DEPTH):
                at = builder.add(k, ir.Constant(_WORD, turn))
                place = builder.mul(builder.add(base, at), ir.Constant(_WORD, PANEL))
                if shared:
                    soon = builder.gep(following_panel, [builder.mul(at, step)])
                    _prefetch(builder, soon, into=2)
                else:
                    here = builder.bitcast(builder.gep(weights, [place]), _BYTES)
                    begin, of_turn = turn * PANEL * weight_bytes, PANEL * weight_bytes
                    for line in range(-begin % _LINE, of_turn, _LINE):
                        for ahead, level, every in _asks(tokens, weight_bytes):
                            if (begin + line) // _LINE % every == 0:
                                soon = builder.gep(here, [ir.Constant(_WORD, line + ahead)])
                                _prefetch(builder, soon, into=level)
                loaded = load(weights, place, weight_bytes)
                if w.dtype == types.int8:
                    loaded = builder.sitofp(loaded, vector)
                elif w.dtype in (BFLOAT16, FLOAT16):
                    loaded = widened(builder, loaded, w.dtype)
                chain = grown[turn % chains]
                for m, begin in enumerate(begins):
                    product = builder.fmul(spread(builder.add(begin, at)), loaded, flags=_SUMS)
                    chain[m] = builder.fadd(chain[m], product, flags=_SUMS)
            following = builder.add(k, ir.Constant(_WORD, DEPTH))
            k.add_incoming(ir.Constant(_WORD, 0), before)
            k.add_incoming(following, loop)
            for chain in range(chains):
                for total, new in zip(sums[chain], grown[chain], strict=True):
                    total.add_incoming(ir.Constant(vector, [0.0] * PANEL), before)
                    total.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

            builder.position_at_end(done)
            left = builder.mul(panel, ir.Constant(_WORD, PANEL))
            factor = load(scales, left, number)
            for m, product, *others in zip(each, *grown, strict=True):
                for other in others:
                    product = builder.fadd(product, other, flags=_SUMS)
                at = builder.add(builder.mul(m, outer), left)
                product = builder.fmul(product, factor, flags=_SUMS)
                total = builder.fadd(load(totals, at, number), product, flags=_SUMS)
                builder.store(total, vector_at(totals, at), align=number)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(add_panel)


ADDERS = tuple(_adder(n) for n in range(1, TILE + 1))
add_tile = _adder(TILE, shared=True)
