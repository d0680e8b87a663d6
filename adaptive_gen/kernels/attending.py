"""Attention of a few tokens to the keys in the cache, alone or with helpers (see `team`).

Axes as in `cpu`; a *pair* is a token of the block and a head, `heads` * token + head.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numba.np.numpy_support import carray

from . import team as words
from .exponential import exp
from .products import compiled
from .team import ATTENTION, LEAST_BYTES, MASK, SHARES, floats_at, integers_at


@compiled
def attend_head(query: Any, keys: Any, values: Any, scores: Any, out: Any) -> None:
    """One head's attention to [keys, head_dim]; `scores` has room for them."""
    zero = query.dtype.type(0)
    count, size = keys.shape
    most = query.dtype.type(-np.inf)
    j = 0
    while j + 4 <= count:  # four sums at a time keep the adders busy
        p, q, r, s = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        a, b, c, e = zero, zero, zero, zero
        for d in range(size):
            of = query[d]
            a += of * p[d]
            b += of * q[d]
            c += of * r[d]
            e += of * s[d]
        scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = a, b, c, e
        most = max(max(most, a), max(b, max(c, e)))
        j += 4
    while j < count:
        p, a = keys[j], zero
        for d in range(size):
            a += query[d] * p[d]
        scores[j] = a
        most = max(most, a)
        j += 1
    total = zero
    for j in range(count):
        scores[j] = exp(scores[j] - most)
        total += scores[j]
    for d in range(size):
        out[d] = zero
    j = 0
    while j + 4 <= count:
        a, b, c, e = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
        p, q, r, s = values[j], values[j + 1], values[j + 2], values[j + 3]
        for d in range(size):
            out[d] += (a * p[d] + b * q[d]) + (c * r[d] + e * s[d])
        j += 4
    while j < count:
        a, p = scores[j], values[j]
        for d in range(size):
            out[d] += a * p[d]
        j += 1
    factor = query.dtype.type(1) / total
    for d in range(size):
        out[d] *= factor


def _addressed(x: Any) -> Any:
    """Whether attention to keys of this dtype goes by addresses, and may be shared."""
    raise NotImplementedError


@overload(_addressed, inline="always")
def _addressed_of(x: Any) -> Any:
    floats = x.dtype == types.float32

    def known(x: Any) -> Any:
        return floats

    return known


@compiled
def attend(
    projected: Any,
    mixed: Any,
    kv: Any,
    layer: int,
    place: Any,
    window: int,
    scores: Any,
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
        scores: [threads, capacity].
        team: see there.
    """
    tokens, head_dim = place.shape[0], kv.shape[5]
    pairs = tokens * (mixed.shape[1] // head_dim)
    if not _addressed(kv) or kv.strides[4] != head_dim * kv.itemsize:
        for pair in range(pairs):
            _attend_pair(pair, projected, mixed, kv, layer, place, window, scores[0])
        return
    job = np.empty(words.JOB_WORDS, np.int64)
    job[words.X], job[words.X_WIDTH] = projected.ctypes.data, projected.shape[1]
    job[words.Y], job[words.Y_WIDTH] = mixed.ctypes.data, mixed.shape[1]
    job[words.W], job[words.DEPTH_OF] = kv[layer].ctypes.data, head_dim
    for axis in range(3):
        job[words.STRIDES + axis] = kv.strides[axis + 1]
    job[words.KV_HEADS], job[words.WINDOW] = kv.shape[3], window
    job[words.PLACE], job[words.TOKENS] = place.ctypes.data, tokens
    job[words.SCALE], job[words.SCORES] = scores.ctypes.data, scores.shape[1]
    longest = place[tokens - 1, 1] + 1
    longest = min(longest, window) if window else longest
    read = 2 * pairs * longest * head_dim * kv.itemsize
    threads = min(team[words.HELPERS] + 1, read // LEAST_BYTES, scores.shape[0])
    if threads < 2 or not words.acquire(team, words.BUSY):
        _attend_pairs(job, 0, pairs, 0)
        return
    per_chunk = max(pairs // (SHARES * threads), 1)
    chunks = (pairs + per_chunk - 1) // per_chunk
    job[words.KIND], job[words.PER_CHUNK], job[words.LAST] = ATTENTION, per_chunk, pairs
    team[words.JOB : words.JOB + words.JOB_WORDS] = job
    words.post(team, chunks, threads - 1)
    own = 0
    while True:
        index = words.add(team, words.CLAIM, 1) & MASK
        if index >= chunks:
            break
        _attend_pairs(job, index * per_chunk, min((index + 1) * per_chunk, pairs), 0)
        own += 1
    words.finish(team, chunks - own)


@compiled
def _attend_pair(
    pair: int,
    projected: Any,
    mixed: Any,
    kv: Any,
    layer: int,
    place: Any,
    window: int,
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
    attend_head(projected[m, start:stop], keys, values, scores, mixed[m, start:stop])


@compiled
def _attend_pairs(job: Any, first_pair: int, last_pair: int, thread: int) -> None:
    """The same by addresses, for pairs `first_pair`..`last_pair`, whoever does it.

    So it is the same machine code, and rounds alike, in every thread.
    """
    tokens, head_dim, room = job[words.TOKENS], job[words.DEPTH_OF], job[words.SCORES]
    projected = carray(floats_at(job[words.X]), (tokens, job[words.X_WIDTH]))
    mixed = carray(floats_at(job[words.Y]), (tokens, job[words.Y_WIDTH]))
    place = carray(integers_at(job[words.PLACE]), (tokens, 2))
    scores = carray(floats_at(job[words.SCALE] + 4 * room * thread), (room,))
    of_kind, of_row, of_head = (
        job[words.STRIDES],
        job[words.STRIDES + 1],
        job[words.STRIDES + 2],
    )
    heads, window = job[words.Y_WIDTH] // head_dim, job[words.WINDOW]
    group = heads // job[words.KV_HEADS]
    for pair in range(first_pair, last_pair):
        m, h = pair // heads, pair % heads
        seen = place[m, 1] + 1
        first = max(0, seen - window) if window else 0
        at = job[words.W] + place[m, 0] * of_row + (h // group) * of_head + 4 * first * head_dim
        shape = seen - first, head_dim
        keys, values = carray(floats_at(at), shape), carray(floats_at(at + of_kind), shape)
        start, stop = h * head_dim, (h + 1) * head_dim
        attend_head(projected[m, start:stop], keys, values, scores, mixed[m, start:stop])


@compiled
def help_attend(team: Any, index: int, helper: int) -> None:
    """Do a chunk of the attention that is shared."""
    job = team[words.JOB : words.JOB + words.JOB_WORDS]
    per_chunk = job[words.PER_CHUNK]
    last = min((index + 1) * per_chunk, job[words.LAST])
    _attend_pairs(job, index * per_chunk, last, helper + 1)
