"""Attention of a few tokens to the keys in the cache, alone or with helpers (see `team`).

Axes as in `layers`; a *pair* is a token of the block and one of the queries' heads.
"""

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from . import team as words
from .exponential import exp, softened
from .jit import compiled, entry, inner
from .lanes import (
    LANES,
    add_values,
    add_values_four_times,
    add_values_twice,
    by_lanes,
    multiply_lanes,
    score_keys,
    share_out,
)
from .team import ATTENTION, LEAST_BYTES, MASK, SHARES, floats_at, integers_at

TOGETHER = 8  # queries that read keys and values together
NEAR = 64  # values that stay in the first cache meanwhile
# Of each of them: where the query and the result stand, how many keys it sees, its own scores.
QUERY, OUT, SEEN, OWN = range(4)
# Words that the thread which decodes plans in: what goes together, and the job.
PLAN = 4 * TOGETHER + words.JOB_WORDS


@inner
def attend_head(query: Any, keys: Any, values: Any, softcap: Any, scores: Any, out: Any) -> None:
    """One head's attention to [keys, head_dim]; `scores` has room for them."""
    count, size = keys.shape
    most = query.dtype.type(-np.inf)
    for j in range(count):
        scores[j] = _product(query, keys[j])
        if softcap.shape[0]:
            scores[j] = softened(scores[j], softcap[0])
        most = max(most, scores[j])
    total = query.dtype.type(0)
    for j in range(count):
        scores[j] = exp(scores[j] - most)
        total += scores[j]
    for d in range(size):
        out[d] = 0
    for j in range(count):
        share, value = scores[j] / total, values[j]
        for d in range(size):
            out[d] += share * value[d]


@inner
def _product(query: Any, key: Any) -> Any:
    total = query.dtype.type(0)
    for d in range(query.shape[0]):
        total += query[d] * key[d]
    return total


@entry
def attend(
    projected: Any,
    mixed: Any,
    kv: Any,
    layer: int,
    place: Any,
    window: int,
    softcap: Any,
    scores: Any,
    plan: Any,
    team: Any,
) -> None:
    """Attention of a block's tokens, whose own keys and values are in the cache.

    Args:
        projected: [room, qkv in whole panels], queries first.
        mixed: gets what each head makes of the values, [room, heads * head_dim].
        kv: the cache, [layers, 2, rows, kv_heads, capacity, head_dim].
        layer: which one.
        place: [tokens, 2], row and position.
        window: positions a token sees; 0 is all.
        softcap: what scores are bent below, [1], of the queries' dtype; or of length 0.
        scores: [threads, TOGETHER, more than any token's keys], the last a multiple of LANES.
        plan: int64, [PLAN].
        team: see there.
    """
    tokens, head_dim = place.shape[0], kv.shape[5]
    pairs = tokens * (mixed.shape[1] // head_dim)
    if not by_lanes(kv):
        for pair in range(pairs):
            own = window, softcap, scores[0, 0]
            _attend_pair(pair, projected, mixed, kv, layer, place, *own)
        return
    together, job = plan[: 4 * TOGETHER].reshape(TOGETHER, 4), plan[4 * TOGETHER :]
    job[words.X], job[words.X_WIDTH] = projected.ctypes.data, projected.shape[1]
    job[words.Y], job[words.Y_WIDTH] = mixed.ctypes.data, mixed.shape[1]
    job[words.W], job[words.DEPTH_OF] = kv[layer].ctypes.data, head_dim
    for axis in range(4):
        job[words.STRIDES + axis] = kv.strides[axis + 1]
    job[words.KV_HEADS], job[words.WINDOW] = kv.shape[3], window
    job[words.SOFTCAP] = softcap.ctypes.data if softcap.shape[0] else 0
    job[words.PLACE], job[words.TOKENS] = place.ctypes.data, tokens
    job[words.SCALE], job[words.SCORES] = scores.ctypes.data, scores.shape[2]
    longest = place[tokens - 1, 1] + 1
    longest = min(longest, window) if window else longest
    read = 2 * pairs * longest * head_dim * kv.itemsize
    threads = min(team[words.HELPERS] + 1, read // LEAST_BYTES, scores.shape[0])
    if threads < 2 or not words.acquire(team, words.BUSY):
        _attend_pairs(job, place, 0, pairs, 0, together)
        return
    # Queries that share keys stay together where that leaves each thread some.
    group = pairs // tokens // kv.shape[3]
    if kv.shape[3] >= 2 * threads:
        least = group * tokens
    else:
        least = group if pairs >= 2 * threads * group else 1
    per_chunk = max(pairs // (SHARES * threads * least), 1) * least
    chunks = (pairs + per_chunk - 1) // per_chunk
    job[words.KIND], job[words.PER_CHUNK], job[words.LAST] = ATTENTION, per_chunk, pairs
    for word in range(words.JOB_WORDS):
        team[words.JOB + word] = job[word]
    words.post(team, chunks, threads - 1)
    own = 0
    while True:
        index = words.add(team, words.CLAIM, 1) & MASK
        if index >= chunks:
            break
        last = min((index + 1) * per_chunk, pairs)
        _attend_pairs(job, place, index * per_chunk, last, 0, together)
        own += 1
    words.finish(team, chunks - own)


@inner
def _attend_pair(
    pair: int,
    projected: Any,
    mixed: Any,
    kv: Any,
    layer: int,
    place: Any,
    window: int,
    softcap: Any,
    scores: Any,
) -> None:
    """One token's attention by one head; `scores` has room for its keys."""
    head_dim = kv.shape[5]
    heads = mixed.shape[1] // head_dim
    m, h = pair // heads, pair % heads
    group = heads // kv.shape[3]
    row, seen = place[m, 0], place[m, 1] + 1
    first = max(0, seen - window) if window else 0
    keys = kv[layer, 0, row, h // group, first:seen]
    values = kv[layer, 1, row, h // group, first:seen]
    start, stop = h * head_dim, (h + 1) * head_dim
    attend_head(projected[m, start:stop], keys, values, softcap, scores, mixed[m, start:stop])


@inner
def _attend_pairs(
    job: Any, place: Any, first_pair: int, last_pair: int, thread: int, together: Any
) -> None:
    """The same by addresses, for pairs `first_pair`..`last_pair`, whoever does it.

    So it is the same machine code, and rounds alike, in every thread. Pairs are counted by the head
    of the keys, then by token, then by the queries' head; those that see the same keys go together.
    """
    tokens, head_dim = job[words.TOKENS], job[words.DEPTH_OF]
    group = job[words.Y_WIDTH] // head_dim // job[words.KV_HEADS]
    own_scores = job[words.SCALE] + 4 * job[words.SCORES] * TOGETHER * thread
    window = job[words.WINDOW]
    kv_head = first_pair // (group * tokens)
    m, g = first_pair % (group * tokens) // group, first_pair % group
    pair = first_pair
    while pair < last_pair:
        row, first, count = place[m, 0], _first_seen(place[m, 1], window), 0
        keys = job[words.W] + row * job[words.STRIDES + 1] + kv_head * job[words.STRIDES + 2]
        keys += first * job[words.STRIDES + 3]
        while pair < last_pair and count < TOGETHER and m < tokens:
            if place[m, 0] != row or _first_seen(place[m, 1], window) != first:
                break
            at = 4 * (kv_head * group + g) * head_dim
            together[count, QUERY] = job[words.X] + 4 * m * job[words.X_WIDTH] + at
            together[count, OUT] = job[words.Y] + 4 * m * job[words.Y_WIDTH] + at
            together[count, SEEN] = place[m, 1] + 1 - first
            together[count, OWN] = own_scores + 4 * job[words.SCORES] * count
            pair, count, g = pair + 1, count + 1, g + 1
            if g == group:
                g, m = 0, m + 1
        _attend_together(together[:count], head_dim, keys, job)
        if m == tokens:
            m, kv_head = 0, kv_head + 1


@inner
def _first_seen(position: int, window: int) -> int:
    return max(0, position + 1 - window) if window else 0


@inner
def _attend_together(together: Any, head_dim: int, keys: int, job: Any) -> None:
    """Attention by several queries to the keys from `keys` on, those that see fewest first.

    together: [queries, 4], see `QUERY`.
    """
    step, room = job[words.STRIDES + 3], job[words.SCORES]
    values, count, wide = keys + job[words.STRIDES], len(together), head_dim % LANES == 0
    longest = together[count - 1, SEEN]
    # A score is worked out here and nowhere else: bits do not depend on what goes together.
    for j in range(0, longest if wide else 0, LANES):
        for n in range(count):
            seen = together[n, SEEN]
            if j < seen and seen >= LANES:
                at = min(j, seen - LANES)  # some of the last for the second time
                own = together[n, OWN] + 4 * at
                score_keys(together[n, QUERY], head_dim, keys + at * step, step, own)
    for n in range(count):
        query, seen, own = together[n, QUERY], together[n, SEEN], together[n, OWN]
        if not wide or seen < LANES:
            _score_each(query, head_dim, keys, step, seen, own)
        if job[words.SOFTCAP]:
            _soften(own, seen, job[words.SOFTCAP])
        share_out(own, seen, own + 4 * (room - 1))
    size, one, two, four = 4 * head_dim, 4 * LANES, 8 * LANES, 16 * LANES
    for j in range(0, longest, NEAR):
        for n in range(count):
            own, seen, out = together[n, OWN] + 4 * j, together[n, SEEN], together[n, OUT]
            seen, of, d = min(NEAR, seen - j), values + j * step, 0
            if not wide:
                _add_each(own, seen, of, step, out, head_dim, j == 0)
                continue
            while size - d >= four:
                add_values_four_times(own, seen, of + d, step, out + d, j == 0)
                d += four
            if size - d >= two:
                add_values_twice(own, seen, of + d, step, out + d, j == 0)
                d += two
            if size - d >= one:
                add_values(own, seen, of + d, step, out + d, j == 0)
    for n in range(count):
        out, factor = together[n, OUT], together[n, OWN] + 4 * (room - 1)
        if wide:
            for d in range(0, 4 * head_dim, 4 * LANES):
                multiply_lanes(out + d, factor)
        else:
            _multiply(out, head_dim, factor)


# Below, arrays are made of addresses within small functions only: numba has dropped the last write
# to such an array in a function that had another compiled into it.


@compiled
def _score_each(query: int, size: int, keys: int, step: int, count: int, scores: int) -> None:
    of, found = carray(floats_at(query), (size,)), carray(floats_at(scores), (count,))
    for j in range(count):
        found[j] = _product(of, carray(floats_at(keys + j * step), (size,)))


@compiled
def _soften(scores: int, count: int, softcap: int) -> None:
    of, cap = carray(floats_at(scores), (count,)), carray(floats_at(softcap), (1,))[0]
    for j in range(count):
        of[j] = softened(of[j], cap)


@compiled
def _add_each(
    shares: int, count: int, values: int, step: int, out: int, size: int, anew: bool
) -> None:
    of, total = carray(floats_at(shares), (max(count, 0),)), carray(floats_at(out), (size,))
    if anew:
        total[:] = 0
    for j in range(count):
        value = carray(floats_at(values + j * step), (size,))
        for d in range(size):
            total[d] += of[j] * value[d]


@compiled
def _multiply(numbers: int, size: int, factor: int) -> None:
    of, by = carray(floats_at(numbers), (size,)), carray(floats_at(factor), (1,))
    for n in range(size):
        of[n] *= by[0]


@compiled
def help_attend(team: Any, index: int, helper: int) -> None:
    """Do a chunk of the attention that is shared."""
    job = team[words.JOB : words.JOB + words.JOB_WORDS]
    per_chunk = job[words.PER_CHUNK]
    last = min((index + 1) * per_chunk, job[words.LAST])
    together = np.empty((TOGETHER, 4), np.int64)
    place = carray(integers_at(job[words.PLACE]), (job[words.TOKENS], 2))
    _attend_pairs(job, place, index * per_chunk, last, helper + 1, together)
