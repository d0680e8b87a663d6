"""Lossless decoding of several texts, compiled: each drafts, goes deep and is judged by itself.

It keeps the rules of `decoding.TokenLoop`. Names and axes are those of `batch`;
besides, `drafts` are tokens that left early and are not yet judged.

- `drafting`: what became of each row's drafts, see `drafts.observe`, [rows, 4], which changes; and
  `shallow` and `most` of `drafts.best_length`.
- `results`: as there, drafts included; and how many of them stand, [rows].
"""

import math
from typing import Any

from ..engine import drafts
from .batch import advance, ask, feed, run
from .choosing import NONE, choose, prepare, unsay
from .decode import CAUGHT_UP, among
from .jit import entry, exact, inner
from .rows import copy

_observe = exact(drafts.observe)
_best_length = exact(drafts.best_length)


@inner
def _flush(flushed: Any, model: Any, desk: Any, state: Any) -> int:
    """Run all that waits for some rows through to the end; returns how many they are.

    Args:
        flushed: 0 for these rows, -1 for others, [rows]; changed.
        model: see `batch`; likewise `desk`, `state`.
    """
    counts, tallies = state[2], state[6]
    block = rows = 0
    for s in range(1, counts.shape[0]):
        for r in range(len(flushed)):
            if flushed[r] >= 0:
                flushed[r] = s if counts[s, r] else 0
        block, rows = run(s, flushed, model, desk, state)
    tallies[CAUGHT_UP] += block
    return rows


@inner
def _settle(
    r: int,
    stood: int,
    token: int,
    wanted: int,
    caps: Any,
    drafting: Any,
    state: Any,
    results: Any,
) -> None:
    """Let a row go on behind its drafts that stood, and the token that full depth chose then.

    Args:
        r: the row.
        stood: how many drafts did.
        token: full depth's; -1 if all stood and none follows.
        wanted: tokens of the row that a deep pass has just run and nobody had judged.
        caps: see above; likewise `drafting`, `state`, `results`.
    """
    tokens, exits, confidences, chosen, sure = results
    lengths, stages, (records, shallow, most) = state[3], state[4], drafting
    drafted, staying = chosen[r] - sure[r], stood
    sure[r] += stood
    if token != -1:
        i = sure[r]
        tokens[r, i], exits[r, i], confidences[r, i] = token, lengths.shape[0] - 1, math.nan
        sure[r] += 1
        staying += 1
    # The last token has not been run, and what came after a draft that fell is forgotten.
    for s in range(lengths.shape[0]):
        lengths[s, r] -= wanted - staying
    chosen[r], stages[r] = sure[r], -1
    _observe(records[r], stood, min(drafted, stood + 1))
    caps[r] = _best_length(records[r], shallow, most)


@inner
def _judge(
    rows: int,
    follows: int,
    caps: Any,
    drafting: Any,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> None:
    """Compare drafts with what full depth chooses in their places.

    Args:
        rows: that a deep pass has just run.
        follows: 1 if a token of theirs follows the drafts, 0 if these end the text.
        caps: see above; likewise the rest.
    """
    x, _, _, reading, notes, _, _ = desk
    tokens, _, _, chosen, sure = results
    head, firsts = model[2], asking[2]
    for n in range(rows):
        r = notes[0, n]
        notes[2, n] = chosen[r] - sure[r] + follows
        for i in range(sure[r], chosen[r]):
            unsay(r, tokens[r, i], choosing)
    n = i = 0  # the state to look at next: the row's, and which of those that are wanted of it
    settled = -1
    while n < rows:
        count, m, j = 0, n, i
        while n < rows and count < reading.shape[0]:
            copy(x[notes[1, n] - notes[2, n] + 1 + i], reading[count])
            count, i = count + 1, i + 1
            if i == notes[2, n]:
                n, i = n + 1, 0
        prepare(reading[:count], False, head, choosing)
        for read in range(count):
            r, wanted = notes[0, m], notes[2, m]
            if settled < m:
                token = choose(firsts[r] + sure[r] + j, r, read, head, choosing)
                if j + follows == wanted or token != tokens[r, sure[r] + j]:
                    _settle(r, j, token, wanted, caps, drafting, state, results)
                    settled = m
                elif j + 1 == wanted:
                    _settle(r, j + 1, -1, wanted, caps, drafting, state, results)
                    settled = m
            j += 1
            if j == wanted:
                m, j = m + 1, 0


@entry
def decode(
    newest: Any,
    ends: Any,
    count: int,
    most: Any,
    caps: Any,
    shallow_passes: int,
    drafting: Any,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> None:
    """Decode until a text ends, or `count` tokens of one stand.

    Args:
        newest: of texts whose last token has not been run, that token, [rows].
        ends: tokens that end a text.
        count: tokens to decode.
        most: where each text ends by itself, or its room, [rows].
        caps: of each row, as many as are worth drafting, [rows]; changed.
        shallow_passes: see `rules.Rules`.
        drafting: see above; likewise `model`, `desk`, `state`, `asking`,
            `choosing`, `results`.
    """
    stages, (tokens, _, _, chosen, sure) = state[4], results
    flushed, last, going = desk[4][3, : len(stages)], len(model[4]) - 2, count > 0
    while going:
        feed(newest, model, state, results[:4])
        s, rows = advance(shallow_passes, 0, model, desk, state)
        if s == last:
            _judge(rows, 1, caps, drafting, model, desk, state, asking, choosing, results)
        else:
            ask(s, rows, caps, 0, model, desk, state, asking, choosing, results[:4])
        ended = 0
        for r in range(len(stages)):
            last_draft = chosen[r] - 1
            flushed[r] = -1
            if stages[r] == -1 and last_draft >= sure[r]:
                if chosen[r] == most[r] or among(tokens[r, last_draft], ends):
                    flushed[r] = 0
                    ended += 1
        if ended:
            rows = _flush(flushed, model, desk, state)
            _judge(rows, 0, caps, drafting, model, desk, state, asking, choosing, results)
        for r in range(len(stages)):
            if sure[r] >= count or sure[r] == most[r]:
                going = False
            elif stages[r] == -1 and sure[r] and chosen[r] == sure[r]:
                token = tokens[r, sure[r] - 1]
                going = going and token != NONE and not among(token, ends)
