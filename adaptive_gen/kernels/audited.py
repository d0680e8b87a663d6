"""Decoding of one text whose tokens are compared with what full depth chooses, compiled.

It decodes as `decode` does. The states of tokens that wait come through all layers with the next
token that goes so deep, and then are read out as well. Names and axes are those of `decode`;
besides:

- `audit`: what waits: how many tokens, [1], which they are, and the segments after which they left,
  [room] each; and, of the tokens that left after each segment, how many full depth chooses too and
  how many were compared, [segments, 2].
"""

from typing import Any

from .decode import among, descend
from .jit import entry, inner
from .screen import look, token_of


@inner
def _compare(block: int, x: Any, head: Any, audit: Any) -> int:
    """Compare what waits with what full depth chooses, by the block's states but the last.

    Returns:
        The token that full depth chooses by the last.
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
    return token


@entry
def decode(
    token: int,
    ends: Any,
    cap: int,
    audit: Any,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> int:
    """Decode until a token ends the text, or as many as the results have room for.

    Args:
        token: the text's last, which has not been run.
        ends: tokens that end a text.
        cap: see `descend`.
        audit: see above; changed.
        model: see `decode`; likewise `desk`, `state`, `asking`, `choosing`, `results`.

    Returns:
        How many tokens it decoded.
    """
    x, (tokens, exits, _), (waiting, left, after, counts) = desk[0], results, audit
    last = len(state[2]) - 1
    for i in range(len(tokens)):
        token, block = descend(i, token, cap, 0, 1, model, desk, state, asking, choosing, results)
        if token >= 0:
            left[waiting[0]], after[waiting[0]] = token, exits[i]
            waiting[0] += 1
        else:
            token = _compare(block, x, model[2], audit)
            tokens[i], exits[i] = token, last
            counts[last, 0] += 1
            counts[last, 1] += 1
        if among(token, ends):
            return i + 1
    return len(tokens)
