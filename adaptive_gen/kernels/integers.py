"""What products with weights in 8 bits as integers have in common, whatever the instruction.

States are rounded to 16 bits with a factor for each token; see `dots` and `pairs`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .ahead import ask, ask_behind
from .jit import inner
from .processor import LANES
from .vectors import every, load, place_of, word

LARGEST = 127 * 256  # of 16 bits, so that a byte holds the upper half however it is rounded
# What a state may be off by, as a share of the largest one of its token: half a step, and rounding.
ROUNDING = 0.51 / LARGEST
# A token of smaller states is one of zeros: in float32 there are no steps of it.
_LEAST = 1e-30


@inner
def scaled(row: Any) -> Any:
    """What states [in] are multiplied by before they are rounded, and what a step of them is.

    Where one of them is nan or infinite a step is nan; in float64 it has float32's range.
    """
    number = row.dtype.type
    largest, numbers = number(0), True
    for n in range(row.shape[0]):
        size = abs(row[n])
        largest = max(largest, size)
        # Asked of each: a compiler may take what is summed of all for a product with their sum.
        numbers &= size < number(np.inf)
    steps = number(LARGEST) / largest if largest >= number(_LEAST) else number(0)
    return steps, largest / number(LARGEST) if numbers else number(np.nan)


class Panel:
    """Where a product of a few tokens with a panel of bytes reads and writes."""

    def __init__(
        self, context: Any, builder: Any, signature: Any, args: Any, tokens: int, columns: int
    ):
        """Make the instructions that work it out.

        Args:
            context: numba's; likewise `signature` and `args`, of what `panels._adder` describes.
            builder: of instructions.
            signature: see above.
            args: see above.
            tokens: how many.
            columns: of a panel.
        """
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:4], args[:4], strict=True)
        ]
        self.states, self.weights, self._scales, self._totals = (array.data for array in arrays)
        row, panel, tile, tiles = args[4:]
        shapes = [cgutils.unpack_tuple(builder, array.shape) for array in arrays]
        self._builder, self._columns, self._tokens = builder, word(columns), tokens
        self.inner = shapes[1][1]
        each = [builder.add(row, word(m)) for m in range(tokens)]
        self.begins = [builder.mul(m, shapes[0][1]) for m in each]  # of each token's states
        # What `scaled` says of a step stands behind two bytes for each of them.
        self.tails = [builder.add(b, builder.mul(self.inner, word(2))) for b in self.begins]
        self._left = builder.mul(panel, self._columns)  # the panel's first column
        self._places = [builder.add(builder.mul(m, shapes[3][1]), self._left) for m in each]
        self._base = builder.mul(self._left, self.inner)
        # Each call goes through its part of the next panel in smaller steps than it reads.
        self._step = builder.udiv(self._columns, tiles)
        behind = builder.add(self._base, builder.mul(self.inner, self._columns))
        part = builder.mul(builder.mul(tile, self.inner), self._step)
        self._following = builder.add(behind, part)

    def row(self, k: Any) -> Any:
        """Where the weights of row k stand."""
        return self._builder.add(self._base, self._builder.mul(k, self._columns))

    def ask(self, k: Any, shared: bool) -> None:
        """Ask for memory when row k is read, a line's first; see `panels._adder`."""
        builder = self._builder
        if shared:
            soon = builder.add(self._following, builder.mul(k, self._step))
            ask(builder, builder.gep(self.weights, [soon]), level=2)
        else:
            here = builder.gep(self.weights, [self.row(k)])
            ask_behind(builder, here, 0, self._tokens, bytes_each=1)

    def add(self, token: int, part: int, product: Any) -> None:
        """Add a register's products, as numbers of the totals' dtype, times what steps are."""
        builder, numbers = self._builder, product.type
        step = load(builder, self.states, self.tails[token], ir.FloatType(), align=1)
        if numbers.element != ir.FloatType():
            step = builder.fpext(step, numbers.element)
        column = builder.add(self._left, word(LANES * part))
        scale = load(builder, self._scales, column, numbers, align=4)
        product = builder.fmul(product, builder.fmul(every(builder, step, LANES), scale))
        place = builder.add(self._places[token], word(LANES * part))
        at = place_of(builder, self._totals, place, numbers)
        builder.store(builder.fadd(builder.load(at, align=4), product), at, align=4)

    @property
    def numbers(self) -> Any:
        """A register of the totals' dtype."""
        return ir.VectorType(self._totals.type.pointee, LANES)
