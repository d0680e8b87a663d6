"""The scheduler's loop for one text, compiled: tokens follow each other without leaving the kernel.

It keeps the rules of `engine.scheduler` for a single row, and the same state: what waits in
front of each segment, and how many tokens each layer holds. What decides an exit is a table of
thresholds, worked out beforehand for every position.

What belongs together travels together:

- `model`: embedding, see `embed`; layers, see `run_layers`; the head, see `screen`; the gates'
  weights [exits, hidden], for what `norm` gives, and biases [exits]; layers that have run before
  each segment, and all of them, [segments + 1].
- `desk`: hidden states [room, hidden in whole panels]; places [room, 2]; turns of every position;
  buffers of `run_layers`. `room` is that of a block which catches up.
- `state`, which changes: keys and values, see `run_layers`, with room for all tokens; what
  waits in front of each segment, [segments, room, hidden in whole panels], and how much,
  [segments]; tokens that each segment's layers hold, [segments]; tallies [3].
- `asking`: whether an exit is checked, for each new token, [tokens, exits]; the raw confidence it
  is left with, [tokens, exits]; the measure as an index of `screen.MEASURES`; what is known of the
  exits' checks, see `thrift.due`: what one that leaves is worth, [exits], and the records, [exits,
  4], which change.
- `choosing`: see `kernels.choosing`.
- `results`, which get the new tokens, the segment after which each was read out, and the raw
  confidences of those that left early, [tokens] each.

Axes: `tokens`, `segments`, `exits` (segments but the last), `room`, `hidden`.
"""

import math
from typing import Any

from ..engine import thrift
from .audited import alarms, audited, compare, note, tally
from .choosing import NONE, choose, plain, prepare
from .jit import entry, exact, inner
from .layers import run_layers, store_layers
from .rows import copy, norm
from .screen import GATE, leaves, look
from .tables import add_row

due = exact(thrift.due)
observe = exact(thrift.observe)

LAYERS_RUN, DEEP_PASSES, CAUGHT_UP = range(3)  # of the tallies, as `Scheduler` counts them


@inner
def gate_of(x: Any, norming: Any, weight: Any, bias: Any, normed: Any) -> float:
    """A probe's confidence in the first hidden state of x [1, hidden in whole panels]."""
    norm(x, norming, normed, 1)
    total = weight.dtype.type(0)
    for n in range(weight.shape[0]):
        total += normed[0, n] * weight[n]
    return 1.0 / (1.0 + math.exp(-(total + bias)))


@inner
def _check(i: int, s: int, newest: Any, model: Any, asking: Any, choosing: Any) -> Any:
    """The raw confidence after segment s, and the token if token i of the text leaves there.

    A token below 0 goes on.
    """
    _, _, head, gate, _ = model
    _, least, measure, worth, records = asking
    if measure == GATE:
        raw = gate_of(newest, head[2], gate[0][s], gate[1][s], head[3])
        token = -1
        if raw >= least[i, s]:
            prepare(newest, False, head, choosing)
            token = choose(i, 0, 0, head, choosing)
    else:
        look(newest, head)
        raw, token = leaves(0, least[i, s], measure, head)
        if token >= 0 and not plain(choosing):
            prepare(newest, True, head, choosing)
            token = choose(i, 0, 0, head, choosing)
    observe(records[s], worth[s], token >= 0)
    return raw, token


@inner
def _set_out(place: Any, start: int, count: int) -> None:
    """Tokens of the first row from position `start` on."""
    for i in range(count):
        place[i, 0], place[i, 1] = 0, start + i


@inner
def wait(s: int, block: int, x: Any, state: Any) -> None:
    """Put the first `block` tokens of the desk in front of segment s."""
    _, waiting, counts, _, _ = state
    for i in range(block):
        copy(x[i], waiting[s, counts[s] + i])
    counts[s] += block


@inner
def take(s: int, x: Any, state: Any) -> int:
    """Lay all that waits in front of segment s on the desk; returns how much it is."""
    _, waiting, counts, _, _ = state
    block = counts[s]
    for i in range(block):
        copy(waiting[s, i], x[i])
    counts[s] = 0
    return block


@inner
def run(s: int, block: int, wanted: int, model: Any, desk: Any, state: Any) -> None:
    """Run segment s on the first `block` tokens of the desk; see `run_layers` for `wanted`."""
    x, place, turns, buffers = desk
    kv, _, _, lengths, tallies = state
    bounds, at = model[4], lengths[s]
    _set_out(place, at, block)
    run_layers(
        bounds[s],
        bounds[s + 1],
        wanted,
        x,
        place[:block],
        turns[at : at + block],
        kv,
        model[1],
        buffers,
    )
    lengths[s] += block
    tallies[LAYERS_RUN] += bounds[s + 1] - bounds[s]


@inner
def _store(s: int, block: int, model: Any, desk: Any, state: Any) -> None:
    """Propagate the first `block` tokens of the desk through segment s, into the next queue."""
    x, place, turns, buffers = desk
    kv, _, _, lengths, tallies = state
    bounds, at = model[4], lengths[s]
    _set_out(place, at, block)
    store_layers(
        bounds[s],
        bounds[s + 1],
        x,
        place[:block],
        turns[at : at + block],
        kv,
        model[1],
        buffers,
    )
    lengths[s] += block
    if s + 1 < len(lengths):
        wait(s + 1, block, x, state)
    else:
        tallies[CAUGHT_UP] += block


@inner
def descend(
    i: int,
    token: int,
    cap: int,
    propagate: int,
    judged: int,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> Any:
    """Run the text's last token, as deep as token i of the results needs.

    Args:
        i: index of the token to choose.
        token: the one before it.
        cap: most tokens that may wait in front of a segment.
        propagate: 1 if skipped layers get their keys and values that way.
        judged: 1 if all states of a block that went through all layers are read, 0 if the last is.
        model: see above; likewise `desk`, `state`, `asking`, `choosing`, `results`.

    Returns:
        The token, or -1 if it went through all layers: then its hidden state is the last of a block
        on the desk; and the length of that block.
    """
    x = desk[0]
    counts, (tokens, exits, confidences) = state[2], results
    asked, _, _, worth, records = asking
    last = len(counts) - 1
    embed(model[0], token, state[3][0], x[0])
    block = 1
    for s in range(last):
        if propagate and block > 1:
            _store(s, block - 1, model, desk, state)
            copy(x[block - 1], x[0])
            block = 1
        run(s, block, block, model, desk, state)
        wait(s + 1, block, x, state)
        may = asked[i, s] and (propagate or counts[s + 1] <= cap)
        if may and due(records[s], worth[s]):
            raw, chosen = _check(i, s, x[block - 1 : block], model, asking, choosing)
            if chosen >= 0:
                tokens[i], exits[i], confidences[i] = chosen, s, raw
                return chosen, block
        block = take(s + 1, x, state)
    if propagate and block > 1:
        _store(last, block - 1, model, desk, state)
        copy(x[block - 1], x[0])
        block = 1
    run(last, block, block if judged else 1, model, desk, state)
    state[4][DEEP_PASSES] += 1
    state[4][CAUGHT_UP] += block - 1
    return -1, block


@inner
def embed(embedding: Any, token: int, at: int, x: Any) -> None:
    """Write a token's hidden state before the first layer.

    Args:
        embedding: a table [vocab, ..] and what is added at each position, a table likewise,
            without rows where that is nothing; a factor of the first, [1]; and the dtypes of both,
            [2], see `tables`.
        token: whose.
        at: its position.
        x: [hidden or more].
    """
    table, positions, factor, kinds = embedding
    for n in range(x.shape[0]):
        x[n] = 0
    add_row(table, kinds[0], token, factor[0], x)
    if positions.shape[0]:
        add_row(positions, kinds[1], at, x.dtype.type(1), x)


@inner
def among(token: int, ends: Any) -> bool:
    """Whether a token ends a text."""
    for end in ends:
        if token == end:
            return True
    return False


@entry
def decode(
    token: int,
    ends: Any,
    cap: int,
    propagate: int,
    audit: Any,
    model: Any,
    desk: Any,
    state: Any,
    asking: Any,
    choosing: Any,
    results: Any,
) -> int:
    """Decode until a token ends the text, as many as the results have room for, or to an alarm.

    Args:
        token: the text's last, which has not been run.
        ends: tokens that end a text.
        cap: see `descend`; likewise the rest.
        propagate: 1 if skipped layers get their keys and values that way.
        audit: see `kernels.audited`; changed.
        model: see above; likewise `desk`, `state`, `asking`, `choosing`, `results`.

    Returns:
        How many tokens it decoded; the last is `NONE` if it has no logits to be chosen by.
    """
    x, counts, head, (tokens, exits, _) = desk[0], state[2], model[2], results
    last, compares, alarms_before = len(counts) - 1, int(audited(audit)), alarms(audit)
    for i in range(len(tokens)):
        chosen, block = descend(
            i, token, cap, propagate, compares, model, desk, state, asking, choosing, results
        )
        if chosen >= 0:
            if compares:
                note(0, chosen, 0, exits[i], head, choosing, audit)
        else:
            if compares:
                chosen = compare(0, 0, block, x, head, audit)
                tally(True, last, audit)
            if chosen < 0 or not plain(choosing):
                prepare(x[block - 1 : block], False, head, choosing)
                chosen = choose(i, 0, 0, head, choosing)
            tokens[i], exits[i] = chosen, last
        s = exits[i] + 1
        while propagate and s <= last and counts[s] > cap:
            _store(s, take(s, x, state), model, desk, state)
            s += 1
        token = chosen
        if token == NONE or among(token, ends) or alarms(audit) > alarms_before:
            return i + 1
    return len(tokens)
