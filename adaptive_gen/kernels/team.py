"""Products and attention that several threads share.

One thread decodes; *helpers* wait for work worth sharing. What they share is an array of words, so
that no thread waits for another that has nothing to do with its work: a product is cut into chunks,
whoever is there takes the next one, and the thread that decodes does all that nobody else takes. A
helper which the system has put aside costs nothing but its own chunk's delay.

`team` is that array, int64, one cache line for each word that threads write in turn:

- HELPERS: threads that may take part besides the one that decodes. 0 shares nothing.
- BUSY: 1 while something is shared; a second text decoded at the same time works alone meanwhile.
- CLAIM: chunks of the work, in the upper half, and the next one that nobody has taken.
- DONE: chunks that helpers have finished.
- from JOB: the work itself, as addresses and sizes, and how many helpers it is worth.
- from AWAKE, a line each: whether a helper is in `serve`; `engine.team` wakes it if not.

A chunk may be claimed only while CLAIM says that there is one, and the thread that decodes goes on
only when every claimed chunk is done: so the job stands still while anybody works on it.
"""

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import exact

LINE = 8  # words of a cache line
HELPERS, BUSY, CLAIM, DONE, JOB = (LINE * n for n in range(5))
# Words of the job, from JOB on.
X, X_WIDTH, W, DEPTH_OF, SCALE, Y, Y_WIDTH, TOKENS, FIRST, LAST, PER_CHUNK, KIND = range(12)
PLACE, SCORES, KV_HEADS, WINDOW, STRIDES = range(12, 17)  # and three more strides
SOFTCAP = 20
JOB_WORDS = 21
SEATS = JOB + JOB_WORDS
AWAKE = JOB + 3 * LINE
# Products with weights of five kinds, whose sums are float32, and whose states but with bytes as
# integers (DOTS); and attention.
FLOATS, BYTES, DOTS, BFLOATS, HALVES, ATTENTION = range(6)

HALF = 32
MASK = (1 << HALF) - 1
LEAST_BYTES = 1 << 16  # to read for each thread: less is read while a helper notices it
CHUNK_BYTES = 1 << 14  # about, at least, so that claims are rare
SHARES = 4  # chunks for each thread: those who start late, or are slow, take fewer
# Rests of an idle helper before it sleeps, some milliseconds: what the thread that decodes does by
# itself meanwhile, as attention to a long text, must not cost the rest of a call its helpers.
PATIENCE = 100_000
YIELD_AFTER = 64  # rests, then another thread may have the core


_WORD = ir.IntType(64)
_ORDER = "seq_cst"
_instructions: Any = intrinsic  # whose functions are called without their first argument


def _word(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """The address of a word of the team."""
    team = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(team.data, [args[1]])


def _call(builder: Any, returns: Any, name: str, *args: Any) -> None:
    """Call a function of LLVM's or the system's."""
    kind = ir.FunctionType(returns, [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@_instructions
def peek(context: Any, team: Any, index: Any) -> Any:
    """Read a word that other threads write."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature, args), _ORDER, 8)

    return types.int64(team, types.int64), generate


@_instructions
def put(context: Any, team: Any, index: Any, value: Any) -> Any:
    """Write a word that other threads read, after all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _word(context, builder, signature, args), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(team, types.int64, types.int64), generate


@_instructions
def add(context: Any, team: Any, index: Any, value: Any) -> Any:
    """Add to a word; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _word(context, builder, signature, args)
        return builder.atomic_rmw("add", address, args[2], _ORDER)

    return types.int64(team, types.int64, types.int64), generate


@_instructions
def acquire(context: Any, team: Any, index: Any) -> Any:
    """Make a word 1; whether it was 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _word(context, builder, signature, args)
        zero, one = (ir.Constant(_WORD, value) for value in (0, 1))
        found = builder.cmpxchg(address, zero, one, _ORDER, _ORDER)
        return builder.extract_value(found, 1)

    return types.boolean(team, types.int64), generate


@_instructions
def _rest(context: Any) -> Any:
    """Let the core's other thread have it for a moment; processors ask for that in a spin."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            _call(builder, ir.VoidType(), "llvm.x86.sse2.pause")
        elif machine in ("aarch64", "arm64"):
            _call(builder, ir.VoidType(), "llvm.aarch64.hint", ir.Constant(word, 1))
        return context.get_dummy_value()

    return types.void(), generate


@_instructions
def _yield(context: Any) -> Any:
    """Let another thread have the core, where the system has such a call by this name."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if sys.platform != "win32":
            _call(builder, ir.IntType(32), "sched_yield")
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(kind: Any) -> Any:
    """An intrinsic that makes an address, given as an int64, a pointer to numbers of a kind."""

    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return _instructions(at)


floats_at, integers_at = _pointer(types.float32), _pointer(types.int64)
doubles_at = _pointer(types.float64)
bytes_at, unsigned_at = _pointer(types.int8), _pointer(types.uint8)
bfloats_at, halves_at = _pointer(types.uint16), _pointer(types.int16)  # bits, see `half`


@exact
def spin(count: int) -> None:
    """Wait a moment for another thread, the `count`th time in a row."""
    _rest()
    if count % YIELD_AFTER == YIELD_AFTER - 1:
        _yield()


@exact
def post(team: Any, chunks: int, seats: int) -> None:
    """Offer what stands in JOB, to so many helpers."""
    team[SEATS] = seats
    put(team, DONE, 0)
    put(team, CLAIM, chunks << HALF)


@exact
def finish(team: Any, others: int) -> None:
    """Wait for the chunks that helpers have taken, and let others share something."""
    waits = 0
    while peek(team, DONE) < others:
        spin(waits)
        waits += 1
    put(team, BUSY, 0)
