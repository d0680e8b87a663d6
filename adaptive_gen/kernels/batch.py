"""The scheduler's loop for several texts, compiled; see `decode`, whose words are used here.

Every text goes as deep as it needs: a pass runs one segment for the texts whose newest token waits
in front of it, with all that waits there for them. What changes with several texts:

- `desk`: besides hidden states [room, hidden in whole panels] and places [room, 2], turns of the
  tokens on it [room, kinds, head_dim / 2, 2]; hidden states to read out [reading, hidden in whole
  panels]; notes on rows that take part, [4, rows]: which they are, where on the desk their newest
  token lies, and two that a step may use; then turns of every position and buffers. `room`
  is that of a block of all rows.
- `state`: what waits is [segments, rows, room of a row, hidden in whole panels], how much of it and
  the lengths [segments, rows]; then the segment each row's newest token waits in front of, -1 if it
  has left, [rows]; passes of the first segment since the others had their turn, [1]; tallies [3].
- `asking`: tables as there, by position; where each row's next token is in them, [rows]; measure;
  what one that leaves is worth, and records [rows, exits, 4].
- `caps`: most tokens of each row that may wait in front of a segment, [rows].
- `choosing`: see `kernels.choosing`, for positions as `asking` has them.
- `results`: [rows, tokens] each, and how many are chosen, [rows].
"""

import math
from typing import Any

from .audited import alarms, audited, compare, note, tally
from .choosing import NONE, choose, plain, prepare
from .decode import CAUGHT_UP, DEEP_PASSES, LAYERS_RUN, among, due, embed, gate_of, observe
from .jit import entry, inner
from .layers import run_layers, store_layers
from .rows import copy
from .screen import GATE, leaves, look


@inner
def _next_segment(stages: Any, shallow: Any, shallow_passes: int) -> int:
    """What runs next, as `Scheduler` has it."""
    first, deeper = False, 0
    for stage in stages:
        if stage == 0:
            first = True
        elif stage > 0 and (deeper == 0 or stage < deeper):
            deeper = stage
    if deeper and (not first or shallow[0] >= shallow_passes):
        return deeper
    shallow[0] = shallow[0] + 1 if deeper else 1
    return 0


@inner
def _lay_out(s: int, stages: Any, staying: int, desk: Any, state: Any) -> Any:
    """Lay what waits in front of segment s on the desk, for rows whose stage it is.

    Args:
        s: which one.
        stages: of each row, [rows].
        staying: how many of each row stay where they are, the newest: 0 or 1.
        desk: see above; likewise `state`.

    Returns:
        The length of the block, and how many rows it is of.
    """
    x, place, turn, _, notes, turns, _ = desk
    _, waiting, counts, lengths, _, _, _ = state
    rows = block = 0
    for r in range(len(stages)):
        if stages[r] != s:
            continue
        count = counts[s, r] - staying
        for i in range(count):
            at = lengths[s, r] + i
            copy(waiting[s, r, i], x[block])
            place[block, 0], place[block, 1] = r, at
            copy(turns[at].reshape(-1), turn[block].reshape(-1))
            block += 1
        if count and staying:
            copy(waiting[s, r, count], waiting[s, r, 0])
        notes[0, rows], notes[1, rows] = r, block - 1
        lengths[s, r] += count
        counts[s, r] = staying
        rows += 1
    return block, rows


@inner
def _pass_on(s: int, block: int, desk: Any, state: Any) -> None:
    """Let the block on the desk wait in front of segment s."""
    x, place, (_, waiting, counts, _, _, _, _) = desk[0], desk[1], state
    for t in range(block):
        r = place[t, 0]
        copy(x[t], waiting[s, r, counts[s, r]])
        counts[s, r] += 1


@inner
def run(s: int, stages: Any, model: Any, desk: Any, state: Any) -> Any:
    """Run segment s on all that waits there for rows whose stage it is, and let it wait further on.

    Args:
        s: which one.
        stages: of each row, [rows]; others than s are left out.
        model: see above; likewise `desk`, `state`.

    Returns:
        The length of the block, which is on the desk, and how many rows it is of.
    """
    x, place, turn, _, _, _, buffers = desk
    bounds, tallies = model[4], state[6]
    block, rows = _lay_out(s, stages, 0, desk, state)
    if block:
        run_layers(
            bounds[s],
            bounds[s + 1],
            block,
            x,
            place[:block],
            turn[:block],
            state[0],
            model[1],
            buffers,
        )
        tallies[LAYERS_RUN] += bounds[s + 1] - bounds[s]
        if s + 2 < len(bounds):
            _pass_on(s + 1, block, desk, state)
    return block, rows


@inner
def _store(s: int, stages: Any, staying: int, model: Any, desk: Any, state: Any) -> None:
    """Propagate what waits in front of segment s, into the next queue; see `_lay_out`."""
    x, place, turn, _, _, _, buffers = desk
    bounds = model[4]
    block, _ = _lay_out(s, stages, staying, desk, state)
    if not block:
        return
    store_layers(
        bounds[s],
        bounds[s + 1],
        x,
        place[:block],
        turn[:block],
        state[0],
        model[1],
        buffers,
    )
    if s + 2 < len(bounds):
        _pass_on(s + 1, block, desk, state)
    else:
        state[6][CAUGHT_UP] += block


@inner
def advance(shallow_passes: int, propagate: int, model: Any, desk: Any, state: Any) -> Any:
    """Run what comes next, for the rows that wait there.

    Args:
        shallow_passes: see `decode`; likewise `propagate`.
        propagate: 1 or 0.
        model: see above; likewise `desk`, `state`.

    Returns:
        The segment, and how many rows.
    """
    _, _, counts, _, stages, shallow, tallies = state
    s, last = _next_segment(stages, shallow, shallow_passes), counts.shape[0] - 1
    if propagate:
        _store(s, stages, 1, model, desk, state)
    block, rows = run(s, stages, model, desk, state)
    if s == last:
        tallies[DEEP_PASSES] += 1
        tallies[CAUGHT_UP] += block - rows
    else:
        for n in range(rows):
            stages[desk[4][0, n]] = s + 1
    return s, rows


@inner
def ask(
    s: int,
    rows: int,
    caps: Any,
    propagate: int,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> int:
    """Let rows leave that have run a segment, if they may.

    Args:
        s: the segment.
        rows: how many have run it; the notes say which.
        caps: see above; likewise the rest.
        propagate: see `decode`.

    Returns:
        How many states were read out for a choice; the notes say of which rows.
    """
    x, _, _, reading, notes, _, _ = desk
    _, _, counts, _, stages, _, _ = state
    asked, least, firsts, measure, worth, records = asking
    tokens, exits, confidences, chosen = results
    head, gates, last, asks = model[2], model[3], counts.shape[0] - 1, 0
    for n in range(rows):
        r = notes[0, n]
        at = firsts[r] + chosen[r]
        if s < last:
            may = asked[at, s] and (propagate or counts[s + 1, r] <= caps[r])
            if not may or not due(records[r, s], worth[s]):
                continue
        copy(x[notes[1, n]], reading[asks])
        if s < last and measure == GATE:
            raw = gate_of(reading[asks : asks + 1], head[2], gates[0][s], gates[1][s], head[3])
            observe(records[r, s], worth[s], raw >= least[at, s])
            if raw < least[at, s]:
                continue
            confidences[r, chosen[r]] = raw
        notes[0, asks] = r
        asks += 1
    if not asks:
        return 0
    if s == last or measure == GATE:
        prepare(reading[:asks], False, head, choosing)
    else:
        asks = _sure(s, asks, desk, asking, results, head, choosing)
    for n in range(asks):
        r = notes[0, n]
        i = chosen[r]
        if s == last or measure == GATE or not plain(choosing):
            token = choose(firsts[r] + i, r, n, head, choosing)
            if token == NONE and s < last:
                confidences[r, i] = math.nan
                continue
            tokens[r, i] = token
        exits[r, i] = s
        chosen[r] += 1
        stages[r] = -1
    return asks


@inner
def _sure(s: int, asks: int, desk: Any, asking: Any, results: Any, head: Any, choosing: Any) -> int:
    """Of rows whose states are to be read out, keep those that leave after segment s.

    Args:
        s: the segment.
        asks: how many are asked; their notes and states become those of the rows that leave.
        desk: see above; likewise `asking`, `results`.
        head: see `screen`.
        choosing: see `kernels.choosing`; the states are prepared for it, if it has a say.

    Returns:
        How many leave.
    """
    reading, notes = desk[3], desk[4]
    _, least, firsts, measure, worth, records = asking
    tokens, _, confidences, chosen = results
    look(reading[:asks], head)
    leaving = 0
    for n in range(asks):
        r = notes[0, n]
        i = chosen[r]
        raw, token = leaves(n, least[firsts[r] + i, s], measure, head)
        observe(records[r, s], worth[s], token >= 0)
        if token >= 0:
            tokens[r, i], confidences[r, i] = token, raw
            copy(reading[n], reading[leaving])
            notes[0, leaving] = r
            leaving += 1
    if leaving and not plain(choosing):
        prepare(reading[:leaving], False, head, choosing)
    return leaving


@inner
def _empty_full(s: int, caps: Any, model: Any, desk: Any, state: Any) -> None:
    """Propagate what waits behind segment s for rows that have just left, where it is too much."""
    _, _, counts, _, stages, _, _ = state
    emptied, last = desk[4][2, : len(stages)], counts.shape[0] - 1
    for r in range(len(stages)):
        emptied[r] = s if stages[r] == -1 else -1
    for deeper in range(s + 1, last + 1):
        for r in range(len(stages)):
            full = emptied[r] == deeper - 1 and counts[deeper, r] > caps[r]
            emptied[r] = deeper if full else -1
        _store(deeper, emptied, 0, model, desk, state)


@inner
def feed(newest: Any, model: Any, state: Any, results: Any) -> None:
    """Put the last token of texts whose token has left in front of the first segment."""
    _, waiting, counts, lengths, stages, _, _ = state
    tokens, _, _, chosen = results
    for r in range(len(stages)):
        if stages[r] == -1:
            token = tokens[r, chosen[r] - 1] if chosen[r] else newest[r]
            embed(model[0], token, lengths[0, r], waiting[0, r, 0])
            counts[0, r], stages[r] = 1, 0


@inner
def _audit_deep(rows: int, model: Any, desk: Any, choosing: Any, audit: Any) -> None:
    """Compare what waited of rows whose newest tokens came through all layers, and count those.

    Args:
        rows: how many; the notes say which, and the block of all their tokens is on the desk.
        model: see above; likewise `desk`, `choosing`.
        audit: see `kernels.audited`; changed.
    """
    x, notes, places, last = desk[0], desk[4], choosing[1], len(model[4]) - 2
    for n in range(rows):
        place = places[notes[0, n]]
        waiting = audit[0][place]
        compare(place, notes[1, n] - waiting, waiting, x, model[2], audit)
    for _ in range(rows):
        tally(True, last, audit)


@inner
def _note_early(
    s: int, read: int, head: Any, notes: Any, stages: Any, choosing: Any, results: Any, audit: Any
) -> None:
    """Let what left after segment s wait for full depth, of rows whose states were read out."""
    tokens, _, _, chosen = results
    for n in range(read):
        r = notes[0, n]
        if stages[r] == -1:
            note(choosing[1][r], tokens[r, chosen[r] - 1], n, s, head, choosing, audit)


@entry
def decode(
    newest: Any,
    ends: Any,
    most: Any,
    caps: Any,
    shallow_passes: int,
    propagate: int,
    audit: Any,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> None:
    """Decode until a text ends, has as many new tokens as it may, or to an alarm.

    Args:
        newest: of texts whose last token has not been run, that token, [rows].
        ends: tokens that end a text.
        most: new tokens of each text, [rows]; none at all if one of them may have none.
        caps: see above.
        shallow_passes: see `rules.Rules`.
        propagate: 1 if skipped layers get their keys and values that way.
        audit: see `kernels.audited`; changed.
        model: see above; likewise `desk`, `state`, `asking`, `choosing`, `results`.
    """
    stages, (tokens, _, _, chosen) = state[4], results
    last, compares, alarms_before = len(model[4]) - 2, audited(audit), alarms(audit)
    going = True
    for r in range(len(most)):
        going = going and chosen[r] < most[r]
    while going:
        feed(newest, model, state, results)
        s, rows = advance(shallow_passes, propagate, model, desk, state)
        if compares and s == last:
            _audit_deep(rows, model, desk, choosing, audit)
        read = ask(s, rows, caps, propagate, model, desk, state, asking, choosing, results)
        if compares and s < last:
            _note_early(s, read, model[2], desk[4], stages, choosing, results, audit)
        going = alarms(audit) == alarms_before
        if propagate:
            _empty_full(s, caps, model, desk, state)
        for r in range(len(stages)):
            left = stages[r] == -1
            if not left:
                continue
            token = tokens[r, chosen[r] - 1]
            if chosen[r] == most[r] or token == NONE or among(token, ends):
                going = False
