"""Lossless decoding of one text, compiled: drafts, the deep pass that judges them, and again.

It keeps the rules of `decoding.TokenLoop` for a single row. Names and axes are those of
`decode`; besides, `drafts` are tokens that left early and are not yet judged.
"""

from typing import Any

from ..engine import drafts as drafting
from .choosing import NONE, choose, prepare, unsay
from .decode import CAUGHT_UP, among, descend, run, take, wait
from .jit import entry, exact, inner

_observe = exact(drafting.observe)
_best_length = exact(drafting.best_length)


@inner
def _flush(model: Any, desk: Any, state: Any) -> int:
    """Run all that waits through to the end; returns the length of the block on the desk."""
    x, (_, _, counts, _, tallies) = desk[0], state
    last, block = len(counts) - 1, 0
    for s in range(1, last + 1):
        block = take(s, x, state)
        if block:
            run(s, block, block, model, desk, state)
            if s < last:
                wait(s + 1, block, x, state)
    tallies[CAUGHT_UP] += block
    return block


@inner
def _judge(at: int, drafted: Any, first: int, wanted: int, x: Any, head: Any, choosing: Any) -> Any:
    """Compare drafts with what full depth chooses.

    Args:
        at: index of the first draft's position.
        drafted: the drafts, [drafts].
        first: where hidden states begin on the desk that choose in the place of each draft.
        wanted: how many these are; one more than drafts if a token follows them.
        x: the desk.
        head: of the model.
        choosing: see `kernels.choosing`.

    Returns:
        How many drafts stood, and the token full depth chose in the place of the next one, or of
        the token that follows all; -1 if all stood and none follows.
    """
    for token in drafted:
        unsay(0, token, choosing)
    most = head[4].shape[0]
    for start in range(0, wanted, most):
        rows = min(most, wanted - start)
        prepare(x[first + start : first + start + rows], False, head, choosing)
        for row in range(rows):
            token = choose(at + start + row, 0, row, head, choosing)
            if start + row == len(drafted) or token != drafted[start + row]:
                return start + row, token
    return len(drafted), -1


@entry
def decode(
    token: int,
    ends: Any,
    count: int,
    shallow: float,
    cap: int,
    record: Any,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> int:
    """Decode until a token ends the text or, with a deep pass, `count` tokens are decoded.

    Args:
        token: the text's last, which has not been run; nothing waits.
        ends: tokens that end a text.
        count: tokens to decode at least; the results have room for more, and the drafts are judged
            where it ends.
        shallow: of `drafting.best_length`.
        cap: most tokens that may wait in front of a segment, however many drafts are worth it.
        record: of `drafting.observe`; changed.
        model: see `decode`; likewise `desk`, `state`, `asking`, `choosing`, `results`.

    Returns:
        How many tokens it decoded, all of which stand; the last may be `NONE`.
    """
    x, (tokens, exits, _) = desk[0], results
    lengths = state[3]
    last, held, done = len(lengths) - 1, lengths[0], 0
    while done < count:
        length = _best_length(record, shallow, cap)
        drafts, ended = 0, False
        while True:
            at = done + drafts
            token, block = descend(
                at, token, length, 0, 1, model, desk, state, asking, choosing, results
            )
            if token < 0:
                break
            drafts += 1
            if at + 1 == len(tokens) or among(token, ends):
                ended, block = True, _flush(model, desk, state)
                break
        wanted = drafts if ended else drafts + 1
        drafted = tokens[done : done + drafts]
        stood, token = _judge(done, drafted, block - wanted, wanted, x, model[2], choosing)
        _observe(record, stood, min(drafts, stood + 1))
        done += stood
        if token != -1:
            tokens[done], exits[done] = token, last
            done += 1
        # The last token has not been run, and what came after a draft that fell is forgotten.
        lengths[:] = held + done
        if done == len(tokens) or token == NONE or among(tokens[done - 1], ends):
            break
        token = tokens[done - 1]
    return done
