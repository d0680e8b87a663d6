"""Asking for memory before it is needed, by instructions that do not wait for it."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .processor import AMD, ZEN
from .vectors import word

LINE = 64  # bytes that come from memory at a time
_BYTES = ir.IntType(8).as_pointer()


def ask(builder: Any, address: Any, level: int) -> None:
    """Ask for the line at an address, to be read from cache level `level`."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, *[ir.IntType(32)] * 3])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, locality, data = (ir.Constant(ir.IntType(32), value) for value in (0, 4 - level, 1))
    builder.call(instruction, [address, to_read, locality, data])


def ask_behind(builder: Any, here: Any, line: int, tokens: int, bytes_each: int) -> None:
    """Ask for what will be read some lines later, while weights are read in order.

    Args:
        builder: of instructions.
        here: address of the line that is being read.
        line: which of the lines it is that are read in one go, known when code is made.
        tokens: that are multiplied with the weights.
        bytes_each: of a weight.
    """
    for distance, level, every in _asks(tokens, bytes_each):
        if line % every == 0:
            ask(builder, builder.gep(here, [word(distance)]), level)


def _asks(tokens: int, bytes_each: int) -> tuple[tuple[int, int, int], ...]:
    """What to ask for while weights are read in order.

    Each is how many bytes ahead, into which cache, and once in how many lines: the second cache
    takes lines in pairs, so that every other one is enough where reading waits for instructions
    rather than for memory.

    AMD's processors since Zen 5 look too few lines ahead with any number of tokens. Those before
    follow the memory by themselves as long as they wait for it, where asking disturbs them: Zen 4
    with one token or two, others with one in float32. The more there is to do for each byte, the
    further ahead they are asked. Intel's look too few lines ahead too, and stop at the end of a
    page. Other makers' are taken for Intel's, unmeasured.
    """
    if ZEN >= 5:
        return ((8192, 1, 1),)
    if ZEN == 4:
        if tokens <= 2:
            return ()
        return ((4096, 1, 1),) if tokens < 2 + bytes_each else ((8192, 2, 1),)
    if AMD:
        if bytes_each < 4:
            return ((1024, 1, 1),) if tokens == bytes_each == 1 else ((2048, 1, 1),)
        return () if tokens == 1 else ((1024, 1, 1),)
    if bytes_each == 1:
        return (2048, 1, 1), (8192, 2, 2)
    return ((1024, 1, 1), (4096, 2, 2)) if tokens == 1 else ((2048, 1, 1), (8192, 2, 1))
