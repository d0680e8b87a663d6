"""The scheduler's loop for one text, compiled: tokens follow each other without leaving the kernel.

It keeps the rules of `engine.scheduler` for a single greedy row, and the same state: what waits in
front of each segment, and how many tokens each layer holds. What decides an exit is a table of
thresholds, worked out beforehand for every position.

Axes: `tokens`, `segments`, `exits` (segments but the last), `room`, `hidden`.
"""

import math
from typing import Any

from .cpu import compiled, norm, read_out, run_layers, store_layers, summary

LAYERS_RUN, DEEP_PASSES, CAUGHT_UP = range(3)  # of the tallies, as `Scheduler` counts them
MEASURES = ("margin", "max_prob", "entropy", "gate")


@compiled
def _measured(found: Any, vocab: int, measure: int) -> float:
    """A measure of a summary, as `confidence.of_summary` has it."""
    top, second, _, total, entropy = found
    if measure == 2:
        return min(1.0, max(0.0, 1.0 - entropy / math.log(vocab)))
    largest = math.exp(top - total)
    return largest if measure == 1 else largest - math.exp(second - total)


@compiled
def _gate(x: Any, floor: Any, weight: Any, bias: Any, normed: Any) -> float:
    """A probe's confidence in the first hidden state of x [1, hidden in whole panels]."""
    norm(x, floor, normed, 1)
    total = weight.dtype.type(0)
    for n in range(weight.shape[0]):
        total += normed[0, n] * weight[n]
    return 1.0 / (1.0 + math.exp(-(total + bias)))


@compiled
def _place(place: Any, start: int, count: int) -> None:
    """Tokens of the first row from position `start` on."""
    for i in range(count):
        place[i, 0], place[i, 1] = 0, start + i


@compiled
def _store(
    s: int,
    count: int,
    desk: Any,
    kv: Any,
    layers: Any,
    bounds: Any,
    waiting: Any,
    counts: Any,
    lengths: Any,
    tallies: Any,
) -> None:
    """Propagate the first `count` tokens of the desk through segment s, into the next queue."""
    x, place, turns, buffers = desk
    weights, scales, biases, floors, _ = layers
    width, at = buffers[0].shape[1], lengths[s]
    heads = weights[1].shape[2] // kv.shape[5]
    _place(place, at, count)
    store_layers(
        bounds[s],
        bounds[s + 1],
        x,
        place[:count],
        turns[at : at + count],
        kv,
        weights[0],
        scales[0],
        biases[0],
        biases[2],
        floors,
        heads,
        buffers,
    )
    lengths[s] += count
    if s + 1 < len(lengths):
        for i in range(count):
            waiting[s + 1, counts[s + 1] + i, :width] = x[i, :width]
        counts[s + 1] += count
    else:
        tallies[CAUGHT_UP] += count


@compiled
def decode(
    token: int,
    ends: Any,
    embedding: Any,
    layers: Any,
    head: Any,
    gate: Any,
    bounds: Any,
    kv: Any,
    desk: Any,
    waiting: Any,
    counts: Any,
    lengths: Any,
    asked: Any,
    least: Any,
    rules: Any,
    tallies: Any,
    tokens: Any,
    exits: Any,
    confidences: Any,
) -> int:
    """Decode until a token ends the text, or as many as the results have room for.

    Args:
        token: the text's last, which has not been run.
        ends: tokens that end a text.
        embedding: [vocab, hidden].
        layers: weights, scales, biases, floors and windows, see `cpu.run_layers`.
        head: panels, scale and floor of `cpu.read_out`, normed [1, hidden], logits [1, vocab in
            whole panels], and how many of these are tokens.
        gate: weights [exits, hidden] for what `cpu.norm` gives, and biases [exits].
        bounds: layers that have run before each segment, and all of them, [segments + 1].
        kv: see `cpu.run_layers`; has room for all tokens.
        desk: hidden states [room, hidden in whole panels]; places [room, 2]; turns of every
            position; buffers of `cpu.run_layers`. `room` is that of a block which catches up.
        waiting: in front of each segment, [segments, room, hidden]; changed.
        counts: of those, [segments]; changed.
        lengths: tokens that each segment's layers hold, [segments]; changed.
        asked: whether an exit is checked, for each new token, [tokens, exits].
        least: the raw confidence it is left with, [tokens, exits].
        rules: the measure as an index of `MEASURES`, `queue_cap`, and 1 for `propagate`, [3].
        tallies: changed, [3].
        tokens: gets the new tokens, [tokens].
        exits: gets the segment after which each was read out, [tokens].
        confidences: gets the raw confidences of those that left early, [tokens].

    Returns:
        How many tokens it decoded.
    """
    x, place, turns, buffers = desk
    weights, scales, biases, floors, windows = layers
    panels, scale, floor, normed, logits, vocab = head
    measure, cap, propagate = rules
    width, last = embedding.shape[1], len(lengths) - 1
    for i in range(len(tokens)):
        x[0, :width] = embedding[token]
        block = 1
        for s in range(last + 1):
            if propagate and block > 1:
                _store(s, block - 1, desk, kv, layers, bounds, waiting, counts, lengths, tallies)
                x[0, :width] = x[block - 1, :width]
                block = 1
            at = lengths[s]
            _place(place, at, block)
            run_layers(
                bounds[s],
                bounds[s + 1],
                x,
                place[:block],
                turns[at : at + block],
                kv,
                weights,
                scales,
                biases,
                floors,
                windows,
                buffers,
            )
            lengths[s] += block
            tallies[LAYERS_RUN] += bounds[s + 1] - bounds[s]
            exits[i] = s
            if s == last:
                tallies[DEEP_PASSES] += 1
                tallies[CAUGHT_UP] += block - 1
                read_out(x[block - 1 : block], floor, panels, scale, normed, logits)
                token = int(summary(logits[0, :vocab])[2])
                break
            for j in range(block):
                waiting[s + 1, counts[s + 1] + j, :width] = x[j, :width]
            counts[s + 1] += block
            if asked[i, s] and (propagate or counts[s + 1] <= cap):
                newest = x[block - 1 : block]
                if measure == 3:
                    raw = _gate(newest, floor, gate[0][s], gate[1][s], normed)
                    leaves = raw >= least[i, s]
                    if leaves:
                        read_out(newest, floor, panels, scale, normed, logits)
                        token = int(summary(logits[0, :vocab])[2])
                else:
                    read_out(newest, floor, panels, scale, normed, logits)
                    found = summary(logits[0, :vocab])
                    raw = _measured(found, vocab, measure)
                    leaves = raw >= least[i, s]
                    if leaves:
                        token = int(found[2])
                if leaves:
                    confidences[i] = raw
                    break
            block = counts[s + 1]
            for j in range(block):
                x[j, :width] = waiting[s + 1, j, :width]
            counts[s + 1] = 0
        s = exits[i] + 1
        while propagate and s <= last and counts[s] > cap:
            block = counts[s]
            for j in range(block):
                x[j, :width] = waiting[s, j, :width]
            counts[s] = 0
            _store(s, block, desk, kv, layers, bounds, waiting, counts, lengths, tallies)
            s += 1
        tokens[i] = token
        for end in ends:
            if token == end:
                return i + 1
    return len(tokens)
