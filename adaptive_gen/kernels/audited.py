"""Comparing the tokens of a text with what full depth chooses, compiled.

The states of tokens that wait come through all layers with the next token that goes so deep, and
then are read out as well. Where tokens are drawn it is the likeliest ones that are compared.

- `audit`: what waits: how many tokens, [1], which token was likeliest at each of them, and the
  segments after which they left, [room] each, no room where nobody compares; and, of the tokens
  that left after each segment, how many full depth would have chosen and how many were compared,
  [segments, 2].
"""

from typing import Any

from .jit import inner
from .screen import look, token_of


@inner
def audited(audit: Any) -> bool:
    """Whether somebody compares."""
    return len(audit[1]) > 0


@inner
def note(token: int, s: int, audit: Any) -> None:
    """Let a token wait that was likeliest after segment s."""
    waiting, tokens, exits, _ = audit
    tokens[waiting[0]], exits[waiting[0]] = token, s
    waiting[0] += 1


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
    waiting, tokens, exits, counts = audit
    most, token = head[4].shape[0], -1
    for start in range(0, block, most):
        rows = min(most, block - start)
        look(x[start : start + rows], head)
        for row in range(rows):
            token = token_of(row, head)
            if start + row < waiting[0]:
                s = exits[start + row]
                counts[s, 0] += token == tokens[start + row]
                counts[s, 1] += 1
    waiting[0] = 0
    for n in range(2):
        counts[len(counts) - 1, n] += 1
    return token
