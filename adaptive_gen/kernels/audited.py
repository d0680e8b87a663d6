"""Comparing the tokens of texts with what full depth chooses, compiled.

The states of tokens that wait come through all layers with the next token of their text that goes
so deep, and then are read out as well. Where tokens are drawn it is the likeliest ones that are
compared.

- `audit`: what waits: how many tokens, [rows], which token was likeliest at each of them, and the
  segments after which they left, [rows, room] each, no room where nobody compares; of the tokens
  that left after each segment, how many full depth would have chosen and how many were compared,
  [segments, 2]; and a record of `engine.promise`, whose test each of them is a turn of.

Axes: `rows` of the batch, `segments`, `room`.
"""

from typing import Any

from ..engine import promise
from .choosing import plain
from .jit import exact, inner
from .screen import look, token_of

_observe = exact(promise.observe)
_raised = exact(promise.raised)


@inner
def audited(audit: Any) -> bool:
    """Whether somebody compares."""
    return audit[1].shape[1] > 0


@inner
def alarms(audit: Any) -> int:
    """How often the promise has been found broken."""
    return _raised(audit[4])


@inner
def note(row: int, token: int, read: int, s: int, head: Any, choosing: Any, audit: Any) -> None:
    """Let what left after segment s wait for full depth.

    Args:
        row: whose.
        token: which one left.
        read: where its state is among those that were read out for it.
        s: the segment.
        head: see `screen`.
        choosing: see `kernels.choosing`.
        audit: see above; changed.
    """
    waiting, tokens, exits, _, _ = audit
    tokens[row, waiting[row]] = token if plain(choosing) else token_of(read, head)
    exits[row, waiting[row]] = s
    waiting[row] += 1


@inner
def tally(agrees: bool, s: int, audit: Any) -> None:
    """Count a token that left after segment s."""
    counts, record = audit[3], audit[4]
    counts[s, 0] += agrees
    counts[s, 1] += 1
    _observe(agrees, record)


@inner
def compare(row: int, first: int, states: int, x: Any, head: Any, audit: Any) -> int:
    """Compare what waits with what full depth finds likeliest.

    Args:
        row: whose.
        first: where the states of what waits begin on the desk.
        states: how many there are, of tokens behind them too.
        x: the desk.
        head: see `screen`.
        audit: see above; changed.

    Returns:
        The likeliest token by the last state.
    """
    waiting, tokens, exits, _, _ = audit
    most, token = head[4].shape[0], -1
    for start in range(0, states, most):
        block = min(most, states - start)
        look(x[first + start : first + start + block], head)
        for n in range(block):
            token = token_of(n, head)
            if start + n < waiting[row]:
                tally(token == tokens[row, start + n], exits[row, start + n], audit)
    waiting[row] = 0
    return token
