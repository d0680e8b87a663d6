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

PANEL = 16  # columns of a panel
DEPTH = 4  # the inner size of a product is a multiple of it
_TILE = 4  # tokens that share a reading of a panel: their sums fill the registers of AVX2
_WORD, _LANE = ir.IntType(64), ir.IntType(32)
_SUMS = ("contract", "nsz", "reassoc")


def _adder(tokens: int) -> Any:
    """An intrinsic that adds the product of `tokens` rows with one panel to what stands there.

    Its arguments: rows x [.., in or more], w [panels, in, PANEL], y [.., panels * PANEL], the first
    row of x and y, and the panel.
    """
    chains = max(1, _TILE // tokens)  # sums that do not wait for each other

    def add_panel(context: Any, x: Any, w: Any, y: Any, row: Any, panel: Any) -> Any:
        signature = types.void(x, w, y, types.int64, types.int64)
        align = x.dtype.bitwidth // 8

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip((x, w, y), args[:3], strict=True)
            ]
            (rows, weights, totals), (row, panel) = (a.data for a in arrays), args[3:]
            shapes = [cgutils.unpack_tuple(builder, array.shape) for array in arrays]
            inner, depth, outer = shapes[0][1], shapes[1][1], shapes[2][1]
            vector = ir.VectorType(rows.type.pointee, PANEL)
            undefined = ir.Constant(vector, ir.Undefined)
            first_lane = ir.Constant(ir.VectorType(_LANE, PANEL), [0] * PANEL)

            def vector_at(data: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

            def spread(index: Any) -> Any:
                value = builder.load(builder.gep(rows, [index]))
                lane = builder.insert_element(undefined, value, ir.Constant(_LANE, 0))
                return builder.shuffle_vector(lane, undefined, first_lane)

            each = [builder.add(row, ir.Constant(_WORD, m)) for m in range(tokens)]
            begins = [builder.mul(m, inner) for m in each]
            base = builder.mul(panel, depth)
            before = builder.block
            loop = builder.append_basic_block("rows_of_weights")
            done = builder.append_basic_block("summed")
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(_WORD)
            sums = [[builder.phi(vector) for _ in range(tokens)] for _ in range(chains)]
            grown = []
            for chain in range(chains):
                at = builder.add(k, ir.Constant(_WORD, chain))
                place = builder.mul(builder.add(base, at), ir.Constant(_WORD, PANEL))
                loaded = builder.load(vector_at(weights, place), align=align)
                grown.append([])
                for begin, total in zip(begins, sums[chain], strict=True):
                    product = builder.fmul(spread(builder.add(begin, at)), loaded, flags=_SUMS)
                    grown[-1].append(builder.fadd(total, product, flags=_SUMS))
            following = builder.add(k, ir.Constant(_WORD, chains))
            k.add_incoming(ir.Constant(_WORD, 0), before)
            k.add_incoming(following, loop)
            for chain in range(chains):
                for total, new in zip(sums[chain], grown[chain], strict=True):
                    total.add_incoming(ir.Constant(vector, [0.0] * PANEL), before)
                    total.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

            builder.position_at_end(done)
            for m, *parts in zip(each, *grown, strict=True):
                left = builder.mul(panel, ir.Constant(_WORD, PANEL))
                target = vector_at(totals, builder.add(builder.mul(m, outer), left))
                total = builder.load(target, align=align)
                for part in parts:
                    total = builder.fadd(total, part, flags=_SUMS)
                builder.store(total, target, align=align)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(add_panel)


add_one, add_two, add_three, add_four = map(_adder, range(1, _TILE + 1))
