"""The scheduler's loop for several greedy texts, compiled; see `decode`, whose words are used here.

Every text goes as deep as it needs: a pass runs one segment for the texts whose newest token waits
in front of it, with all that waits there for them. What changes with several texts:

- `desk`: besides hidden states [room, hidden in whole panels] and places [room, 2], turns of the
  tokens on it [room, kinds, head_dim / 2, 2]; newest hidden states [rows, hidden in whole panels];
  rows that take part and where their newest token lies, [2, rows]; then turns of every position
  and buffers. `room` is that of a block of all rows.
- `state`: what waits is [segments, rows, room of a row, hidden in whole panels], how much of it and
  the lengths [segments, rows]; then the segment each row's newest token waits in front of, -1 if it
  has left, [rows]; passes of the first segment since the others had their turn, [1]; tallies [3].
- `asking`: tables as there, by position; where each row's next token is in them, [rows]; measure;
  what one that leaves is worth, and records [rows, exits, 4].
- `results`: [rows, tokens] each, and how many there are, [rows].
"""

from typing import Any

from .cpu import copy, run_layers
from .decode import CAUGHT_UP, DEEP_PASSES, LAYERS_RUN, among, due, embed, gate_of, observe
from .freshness import borrowing
from .screen import GATE, leaves, look, token_of


@borrowing
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


@borrowing
def _advance(s: int, model: Any, desk: Any, state: Any) -> int:
    """Run segment s for the rows that wait there; returns how many they are."""
    x, place, turn, _, taking, turns, buffers = desk
    kv, waiting, counts, lengths, stages, _, tallies = state
    bounds, last = model[4], counts.shape[0] - 1
    rows = block = 0
    for r in range(len(stages)):
        if stages[r] != s:
            continue
        for i in range(counts[s, r]):
            at = lengths[s, r] + i
            copy(waiting[s, r, i], x[block])
            place[block, 0], place[block, 1] = r, at
            copy(turns[at].reshape(-1), turn[block].reshape(-1))
            block += 1
        taking[0, rows], taking[1, rows] = r, block - 1
        lengths[s, r] += counts[s, r]
        counts[s, r] = 0
        rows += 1
    run_layers(
        bounds[s],
        bounds[s + 1],
        block,
        x,
        place[:block],
        turn[:block],
        kv,
        model[1],
        buffers,
    )
    tallies[LAYERS_RUN] += bounds[s + 1] - bounds[s]
    if s == last:
        tallies[DEEP_PASSES] += 1
        tallies[CAUGHT_UP] += block - rows
        return rows
    for t in range(block):
        r = place[t, 0]
        copy(x[t], waiting[s + 1, r, counts[s + 1, r]])
        counts[s + 1, r] += 1
    for n in range(rows):
        stages[taking[0, n]] = s + 1
    return rows


@borrowing
def _ask(
    s: int, rows: int, cap: int, model: Any, desk: Any, state: Any, asking: Any, results: Any
) -> None:
    """Let rows that have run segment s leave there, if they may."""
    x, _, _, newest, taking, _, _ = desk
    _, _, counts, _, stages, _, _ = state
    asked, least, firsts, measure, worth, records = asking
    tokens, exits, confidences, done = results
    head, gates, last, asks = model[2], model[3], counts.shape[0] - 1, 0
    for n in range(rows):
        r = taking[0, n]
        at = firsts[r] + done[r]
        if s < last:
            may = asked[at, s] and counts[s + 1, r] <= cap
            if not may or not due(records[r, s], worth[s]):
                continue
        copy(x[taking[1, n]], newest[asks])
        if s < last and measure == GATE:
            raw = gate_of(newest[asks : asks + 1], head[2], gates[0][s], gates[1][s], head[3])
            observe(records[r, s], worth[s], raw >= least[at, s])
            if raw < least[at, s]:
                continue
            confidences[r, done[r]] = raw
        taking[0, asks] = r
        asks += 1
    if not asks:
        return
    look(newest[:asks], head)
    for n in range(asks):
        r = taking[0, n]
        i = done[r]
        if s < last and measure != GATE:
            raw, token = leaves(n, least[firsts[r] + i, s], measure, head)
            observe(records[r, s], worth[s], token >= 0)
            if token < 0:
                continue
            confidences[r, i] = raw
        else:
            token = token_of(n, head)
        tokens[r, i], exits[r, i] = token, s
        done[r] += 1
        stages[r] = -1


@borrowing
def decode(
    newest: Any,
    ends: Any,
    most: Any,
    cap: int,
    shallow_passes: int,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    results: Any,
) -> None:
    """Decode until a text ends, or has as many new tokens as it may.

    Args:
        newest: of texts whose last token has not been run, that token, [rows].
        ends: tokens that end a text.
        most: new tokens of each text, [rows]; none at all if one of them may have none.
        cap: most tokens of a row that may wait in front of a segment.
        shallow_passes: see `rules.Rules`.
        model: see above; likewise `desk`, `state`, `asking`, `results`.
    """
    _, waiting, counts, _, stages, shallow, _ = state
    tokens, _, _, done = results
    going = True
    for r in range(len(most)):
        going = going and done[r] < most[r]
    while going:
        for r in range(len(stages)):
            if stages[r] == -1:
                token = tokens[r, done[r] - 1] if done[r] else newest[r]
                embed(model[0], token, waiting[0, r, 0])
                counts[0, r], stages[r] = 1, 0
        s = _next_segment(stages, shallow, shallow_passes)
        rows = _advance(s, model, desk, state)
        _ask(s, rows, cap, model, desk, state, asking, results)
        for r in range(len(stages)):
            left = stages[r] == -1
            if left and (done[r] == most[r] or among(tokens[r, done[r] - 1], ends)):
                going = False
