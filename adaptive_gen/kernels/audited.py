"""Comparing the tokens of a text with what full depth chooses, compiled.

The states of tokens that wait come through all layers with the next token that goes so deep, and
then are read out as well. Where tokens are drawn it is the likeliest ones that are compared.

- `audit`: what waits: how many tokens, [1], which token was likeliest at each of them, and the
  segments after which they left, [room] each, no room where nobody compares; and, of the tokens
  that left after each segment, how many full depth would have chosen and how many were compared,
  [segments, 2]; and a record of `engine.promise`, whose test each of them is a turn of.
"""

from typing import Any

from ..engine import promise
from .jit import exact, inner
from .screen import look, token_of

_observe = exact(promise.observe)


@inner
def audited(audit: Any) -> bool:
    """Whether somebody compares."""
    return len(audit[1]) > 0


@inner
def note(token: int, s: int, audit: Any) -> None:
    """Let a token wait that was likeliest after segment s."""
    waiting, tokens, exits, _, _ = audit
    tokens[waiting[0]], exits[waiting[0]] = token, s
    waiting[0] += 1


@inner
def alarms(audit: Any) -> int:
    """How often the promise has been found broken."""
    return audit[4][3][promise.RAISED]


@inner
def _count(agrees: bool, s: int, audit: Any) -> None:
    """Count a token that left after segment s."""
    counts, record = audit[3], audit[4]
    counts[s, 0] += agrees
    counts[s, 1] += 1
    _observe(agrees, record)


@inner
def compare(block: int, x: Any, head: Any, audit: Any) -> int:
    """Compare what waits with what full depth finds likeliest.

    Args:
        block: states on the desk: of the tokens that wait, and of one that came as deep itself.
        x: the desk.
        head: see `screen`.
        audit: see above; changed.

    Returns:
        The likeliest token by the last state.
    """
    waiting, tokens, exits, _, _ = audit
    most, token = head[4].shape[0], -1
    for start in range(0, block, most):
        rows = min(most, block - start)
        look(x[start : start + rows], head)
        for row in range(rows):
            token = token_of(row, head)
            if start + row < waiting[0]:
                _count(token == tokens[start + row], exits[start + row], audit)
    waiting[0] = 0
    _count(True, len(audit[3]) - 1, audit)
    return token
