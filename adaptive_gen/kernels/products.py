"""Matrix products of a few tokens, over panels of weights, alone or with helpers (see `team`)."""

from typing import Any

from numba import types
from numba.extending import overload
from numba.np.numpy_support import carray

from . import dots, pairs
from . import team as words
from .half import BFLOAT16, FLOAT16
from .jit import compiled, entry, inner
from .panels import ADDERS, MOST, PANEL, TILE, add_tile
from .processor import PAIRS
from .team import (
    BFLOATS,
    BYTES,
    DOTS,
    FLOATS,
    HALVES,
    MASK,
    bfloats_at,
    bytes_at,
    floats_at,
    halves_at,
    unsigned_at,
)

rounded = pairs.rounded if PAIRS else dots.rounded
add_one, add_two, add_three, add_four, add_five, add_six = ADDERS[:6]
# Where six is the most the other names are needed too, for code that is never reached.
add_seven, add_eight = (*ADDERS[6:], *ADDERS[:2])[:2]


@inner
def _add_rest(x: Any, w: Any, scale: Any, y: Any, tokens: int, row: int, panel: int) -> None:
    """One panel's product with the tokens from `row` on, at most `MOST`; there may be none."""
    left = tokens - row
    if left == 1:
        add_one(x, w, scale, y, row, panel, 0, 1)
    elif left == 2:
        add_two(x, w, scale, y, row, panel, 0, 1)
    elif left == 3:
        add_three(x, w, scale, y, row, panel, 0, 1)
    elif left == 4:
        add_four(x, w, scale, y, row, panel, 0, 1)
    elif left == 5:
        add_five(x, w, scale, y, row, panel, 0, 1)
    elif left == 6:
        add_six(x, w, scale, y, row, panel, 0, 1)
    elif MOST > 6:
        if left == 7:
            add_seven(x, w, scale, y, row, panel, 0, 1)
        elif left == 8:
            add_eight(x, w, scale, y, row, panel, 0, 1)


@inner
def add_panels(x: Any, w: Any, scale: Any, y: Any, tokens: int, first: int, last: int) -> None:
    """`add_product` for the panels `first`..`last`."""
    tiles = tokens // TILE if tokens > MOST else 0
    for panel in range(first, last):
        for tile in range(tiles):
            add_tile(x, w, scale, y, TILE * tile, panel, tile, tiles)
        _add_rest(x, w, scale, y, tokens, TILE * tiles, panel)


def _kind(x: Any, w: Any) -> Any:
    """What `team.KIND` says of weights and states; -1 if they are not shared."""
    raise NotImplementedError


@overload(_kind, inline="always")
def _kind_of(x: Any, w: Any) -> Any:
    kind = -1
    if x.dtype == types.float32:
        kinds = {types.float32: FLOATS, types.int8: BYTES, types.uint8: DOTS}
        kinds |= {BFLOAT16: BFLOATS, FLOAT16: HALVES}
        kind = kinds.get(w.dtype, -1)

    def known(x: Any, w: Any) -> Any:
        return kind

    return known


def _add(x: Any, w: Any, scale: Any, y: Any, tokens: int, team: Any, first: int) -> None:
    """`add_product`, with the states as they are multiplied with these weights."""
    raise NotImplementedError


@overload(_add, inline="always")
def _add_for(x: Any, w: Any, scale: Any, y: Any, tokens: int, team: Any, first: int) -> Any:
    def same(x: Any, w: Any, scale: Any, y: Any, tokens: int, team: Any, first: int) -> None:
        _add_states(x, _kind(x, w), w, scale, y, tokens, team, first)

    def as_bytes(x: Any, w: Any, scale: Any, y: Any, tokens: int, team: Any, first: int) -> None:
        _add_rounded(x, w, scale, y, tokens, team, first)

    return as_bytes if w.dtype == types.uint8 else same


@compiled
def _add_rounded(x: Any, w: Any, scale: Any, y: Any, tokens: int, team: Any, first: int) -> None:
    """The same, of states rounded to bytes."""
    # Held here while helpers read it: what is called only borrows it.
    states = rounded(x, w.shape[1], tokens)
    _add_states(states, _kind(x, w), w, scale, y, tokens, team, first)


@inner
def _add_states(
    states: Any,
    kind: int,
    w: Any,
    scale: Any,
    y: Any,
    tokens: int,
    team: Any,
    first: int,
) -> None:
    panels = w.shape[0]
    panel_bytes = w.shape[1] * w.shape[2] * w.itemsize
    threads = min(team[words.HELPERS] + 1, (panels - first) * panel_bytes // words.LEAST_BYTES)
    alone = kind < 0 or threads < 2
    if alone or not _shared(kind, threads, states, w, scale, y, tokens, team, first):
        add_panels(states, w, scale, y, tokens, first, panels)


@entry
def add_product(x: Any, w: Any, scale: Any, y: Any, tokens: int, team: Any, first: int = 0) -> None:
    """Add x @ (w * scale) to y, for the first `tokens` of both.

    Each column of y is one thread's work from beginning to end, so the sums are the same however
    many threads there are.

    Args:
        x: [.., in or more]; `in` is a multiple of `DEPTH`.
        w: [panels, in, PANEL], column n of the matrix in panel n // PANEL; of x's dtype, int8,
            uint8 as `dots` or `pairs` has it, or for x in float32 one of `half`'s two.
        scale: of each column, [panels * PANEL].
        y: [.., panels * PANEL].
        tokens: at least 1.
        team: who may help, see `team`.
        first: panel to begin with.
    """
    _add(x, w, scale, y, tokens, team, first)


@inner
def _shared(
    kind: int,
    threads: int,
    states: Any,
    w: Any,
    scale: Any,
    y: Any,
    tokens: int,
    team: Any,
    first: int,
) -> bool:
    """Do the product in several threads, unless they share something else; whether it is done."""
    panels, panel_bytes = w.shape[0], w.shape[1] * w.shape[2] * w.itemsize
    if not words.acquire(team, words.BUSY):
        return False
    per_chunk = max(
        (panels - first) // (words.SHARES * threads), words.CHUNK_BYTES // panel_bytes, 1
    )
    chunks = (panels - first + per_chunk - 1) // per_chunk
    job = team[words.JOB : words.JOB + words.JOB_WORDS]
    job[words.X], job[words.X_WIDTH] = states.ctypes.data, states.shape[1]
    job[words.W], job[words.DEPTH_OF] = w.ctypes.data, w.shape[1]
    job[words.SCALE] = scale.ctypes.data
    job[words.Y], job[words.Y_WIDTH] = y.ctypes.data, y.shape[1]
    job[words.TOKENS], job[words.FIRST], job[words.LAST] = tokens, first, panels
    job[words.PER_CHUNK], job[words.KIND] = per_chunk, kind
    words.post(team, chunks, threads - 1)
    own = 0
    while True:
        index = words.add(team, words.CLAIM, 1) & MASK
        if index >= chunks:
            break
        start = first + index * per_chunk
        add_panels(states, w, scale, y, tokens, start, min(start + per_chunk, panels))
        own += 1
    words.finish(team, chunks - own)
    return True


@compiled
def help_product(team: Any, index: int) -> None:
    """Do a chunk of the shared product."""
    job = team[words.JOB : words.JOB + words.JOB_WORDS]
    first, last, per_chunk = job[words.FIRST], job[words.LAST], job[words.PER_CHUNK]
    start = first + index * per_chunk
    stop, tokens, depth = min(start + per_chunk, last), job[words.TOKENS], job[words.DEPTH_OF]
    width = job[words.X_WIDTH]
    x = carray(floats_at(job[words.X]), (tokens, width))
    y = carray(floats_at(job[words.Y]), (tokens, job[words.Y_WIDTH]))
    scale = carray(floats_at(job[words.SCALE]), (last * PANEL,))
    if job[words.KIND] == FLOATS:
        w = carray(floats_at(job[words.W]), (last, depth, PANEL))
        add_panels(x, w, scale, y, tokens, start, stop)
    elif job[words.KIND] == DOTS:
        states = carray(bytes_at(job[words.X]), (tokens, width))
        stored = carray(unsigned_at(job[words.W]), (last, depth, PANEL))
        add_panels(states, stored, scale, y, tokens, start, stop)
    elif job[words.KIND] == BFLOATS:
        bfloats = carray(bfloats_at(job[words.W]), (last, depth, PANEL))
        add_panels(x, bfloats, scale, y, tokens, start, stop)
    elif job[words.KIND] == HALVES:
        halves = carray(halves_at(job[words.W]), (last, depth, PANEL))
        add_panels(x, halves, scale, y, tokens, start, stop)
    else:
        steps = carray(bytes_at(job[words.W]), (last, depth, PANEL))
        add_panels(x, steps, scale, y, tokens, start, stop)
