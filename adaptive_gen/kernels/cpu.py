"""Compiled CPU kernels: decoder layers on a few tokens, by numba.

A decoding step reads every weight once, so its time is that of the memory, if nothing else takes
longer. Two things do in a framework: calling a dozen operations per layer, and products of two to
eight rows, which general libraries pack for throughput. Here a run of layers is one call, and the
weights lie as they are read: in panels of 16 columns, whose sums stay in registers.

Everything works on numpy arrays of one float dtype. Axes: `tokens`, `hidden`, `heads`, `kv_heads`,
`head_dim`, `layers`, `panels`.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .panels import PANEL
from .products import add_product, compiled


def _bits_of_power(context: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for int32 in -126..127: put where a float has its exponent."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bias, shift = (ir.Constant(ir.IntType(32), value) for value in (127, 23))
        bits = builder.shl(builder.add(args[0], bias), shift)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


_power_of_two: Any = intrinsic(_bits_of_power)


def _exp(x: Any) -> Any:
    """The exponential; in float32 without a call, so that loops over it are vectors."""
    raise NotImplementedError


# exp(r) for |r| <= log(2) / 2, to 2e-8: its Taylor coefficients from the highest.
_TERMS = tuple(np.float32(1 / math.factorial(n)) for n in range(6, -1, -1))
_LOG2E, _LEAST, _MOST = np.float32(math.log2(math.e)), np.float32(-87), np.float32(88)
# log(2) in two parts, the first with few bits, so that n * _LN2_HIGH is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)


@overload(_exp, inline="always")
def _exp_of(x: Any) -> Any:
    def library_exp(x: Any) -> Any:
        return math.exp(x)

    def exp(x: Any) -> Any:
        x = min(max(x, _LEAST), _MOST)
        n = np.floor(x * _LOG2E + np.float32(0.5))
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        y = _TERMS[0]
        y = y * r + _TERMS[1]
        y = y * r + _TERMS[2]
        y = y * r + _TERMS[3]
        y = y * r + _TERMS[4]
        y = y * r + _TERMS[5]
        y = y * r + _TERMS[6]
        return y * _power_of_two(np.int32(n))

    return exp if x == types.float32 else library_exp


@compiled
def norm(x: Any, floor: float, out: Any, tokens: int) -> None:
    """Divide each token's hidden state by its length or more, see `FusedModel`."""
    for m in range(tokens):
        row, into = x[m], out[m]
        total = x.dtype.type(floor * floor)
        for n in range(into.shape[0]):
            total += row[n] * row[n]
        factor = x.dtype.type(1) / np.sqrt(total)
        for n in range(into.shape[0]):
            into[n] = row[n] * factor


@compiled
def _turn(heads: Any, turn: Any) -> None:
    """Rotate [heads, head_dim] by [head_dim / 2, (cos, sin)], pairs side by side."""
    for h in range(heads.shape[0]):
        head = heads[h]
        for d in range(turn.shape[0]):
            real, imaginary = head[2 * d], head[2 * d + 1]
            head[2 * d] = real * turn[d, 0] - imaginary * turn[d, 1]
            head[2 * d + 1] = real * turn[d, 1] + imaginary * turn[d, 0]


@compiled
def _norm_heads(heads: Any, gain: Any, floor: float) -> None:
    """Norm queries and keys [heads, head_dim], head by head."""
    for h in range(heads.shape[0]):
        head = heads[h]
        total = heads.dtype.type(floor * floor)
        for d in range(head.shape[0]):
            total += head[d] * head[d]
        factor = heads.dtype.type(1) / np.sqrt(total)
        for d in range(head.shape[0]):
            head[d] *= factor * gain[h, d]


@compiled
def _attend(query: Any, keys: Any, values: Any, scores: Any, out: Any) -> None:
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
        scores[j] = _exp(scores[j] - most)
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


@compiled
def _add_bias(y: Any, bias: Any, tokens: int) -> None:
    for m in range(tokens):
        row = y[m]
        for n in range(bias.shape[0]):
            row[n] += bias[n]


@compiled
def run_layers(
    start: int,
    stop: int,
    x: Any,
    place: Any,
    turns: Any,
    kv: Any,
    weights: Any,
    scales: Any,
    biases: Any,
    floors: Any,
    windows: Any,
    buffers: Any,
) -> None:
    """Run layers `start`..`stop` on tokens, in place.

    Args:
        start: first layer.
        stop: one more than the last.
        x: hidden states, [room, hidden in whole panels].
        place: [tokens, 2], each token's row of the cache and its position. Tokens of one row come
            in order; each sees those before it and the row's in the cache.
        turns: [tokens, head_dim / 2, 2], cos and sin at each token's position.
        kv: [layers, 2, rows, kv_heads, capacity, head_dim]; gets the tokens' keys and values.
        weights: qkv, out, gate and up, down, each [layers, panels, in, PANEL].
        scales: of their columns, each [layers, panels * PANEL].
        biases: of qkv and out, each [layers, out], and gains of queries and keys, [layers, heads +
            kv_heads, head_dim]; a model without them has none in the second axis.
        floors: what norms of hidden states, and of queries and keys, divide by at least.
        windows: of each layer, how many positions a token sees; 0 is all.
        buffers: normed [room, hidden], projections [room, qkv in whole panels], mixed [room,
            heads * head_dim], gate_up [room, 2 * intermediate in whole panels], scores [capacity],
            and who helps with products, see `team`.
    """
    qkv, out, gate_up, down = weights
    qkv_scale, out_scale, gate_up_scale, down_scale = scales
    qkv_bias, out_bias, gains = biases
    normed, projected, mixed, wide, scores, team = buffers
    tokens, head_dim, kv_heads = place.shape[0], kv.shape[5], kv.shape[3]
    heads = out.shape[2] // head_dim
    group, inner = heads // kv_heads, down.shape[2]
    every = (heads + 2 * kv_heads) * head_dim
    one = x.dtype.type(1)
    for layer in range(start, stop):
        norm(x, floors[0], normed, tokens)
        projected[:tokens] = 0
        add_product(normed, qkv[layer], qkv_scale[layer], projected, tokens, team)
        _add_bias(projected, qkv_bias[layer], tokens)
        for m in range(tokens):
            row, position = place[m, 0], place[m, 1]
            by_head = projected[m, :every].reshape(heads + 2 * kv_heads, head_dim)
            if gains.shape[1]:
                _norm_heads(by_head[: heads + kv_heads], gains[layer], floors[1])
            _turn(by_head[: heads + kv_heads], turns[m])
            for h in range(kv_heads):
                kv[layer, 0, row, h, position] = by_head[heads + h]
                kv[layer, 1, row, h, position] = by_head[heads + kv_heads + h]
        window = windows[layer]
        for m in range(tokens):
            row, seen = place[m, 0], place[m, 1] + 1
            first = max(0, seen - window) if window else 0
            by_head = projected[m, :every].reshape(heads + 2 * kv_heads, head_dim)
            into = mixed[m].reshape(heads, head_dim)
            for h in range(heads):
                keys = kv[layer, 0, row, h // group, first:seen]
                values = kv[layer, 1, row, h // group, first:seen]
                _attend(by_head[h], keys, values, scores, into[h])
        add_product(mixed, out[layer], out_scale[layer], x, tokens, team)
        _add_bias(x, out_bias[layer], tokens)
        norm(x, floors[0], normed, tokens)
        wide[:tokens] = 0
        add_product(normed, gate_up[layer], gate_up_scale[layer], wide, tokens, team)
        for m in range(tokens):
            gate, up = wide[m, :inner], wide[m, inner : 2 * inner]
            for n in range(inner):
                gate[n] = gate[n] / (one + _exp(-gate[n])) * up[n]
        add_product(wide, down[layer], down_scale[layer], x, tokens, team)


@compiled
def store_layers(
    start: int,
    stop: int,
    x: Any,
    place: Any,
    turns: Any,
    kv: Any,
    qkv: Any,
    qkv_scale: Any,
    qkv_bias: Any,
    gains: Any,
    floors: Any,
    heads: int,
    buffers: Any,
) -> None:
    """Give layers `start`..`stop` the tokens' keys and values only.

    Arguments are those of `run_layers`; `heads` are the queries'.
    """
    normed, projected, team = buffers[0], buffers[1], buffers[5]
    tokens, head_dim, kv_heads = place.shape[0], kv.shape[5], kv.shape[3]
    every = (heads + 2 * kv_heads) * head_dim
    norm(x, floors[0], normed, tokens)
    for layer in range(start, stop):
        projected[:tokens] = 0
        first = heads * head_dim // PANEL
        add_product(normed, qkv[layer], qkv_scale[layer], projected, tokens, team, first)
        _add_bias(projected, qkv_bias[layer], tokens)
        for m in range(tokens):
            row, position = place[m, 0], place[m, 1]
            by_head = projected[m, :every].reshape(heads + 2 * kv_heads, head_dim)
            keys = by_head[heads : heads + kv_heads]
            if gains.shape[1]:
                _norm_heads(keys, gains[layer, heads:], floors[1])
            _turn(keys, turns[m])
            for h in range(kv_heads):
                kv[layer, 0, row, h, position] = keys[h]
                kv[layer, 1, row, h, position] = by_head[heads + kv_heads + h]


@compiled
def read_out(x: Any, floor: float, head: Any, scale: Any, normed: Any, out: Any, team: Any) -> None:
    """Logits of hidden states: norm and LM head.

    Args:
        x: [tokens, hidden].
        floor: what the norm divides by at least.
        head: [panels, hidden, PANEL].
        scale: of its columns.
        normed: [tokens, hidden].
        out: gets the logits, [tokens, vocab in whole panels].
        team: see `add_product`.
    """
    tokens = x.shape[0]
    norm(x, floor, normed, tokens)
    out[:] = 0
    add_product(normed, head, scale, out, tokens, team)


@compiled
def summary(row: Any) -> Any:
    """The fields of `confidence.Summary` for logits [vocab]."""
    top = row[0]
    for n in range(row.shape[0]):
        top = max(top, row[n])
    total = weighted = row.dtype.type(0)
    for n in range(row.shape[0]):
        gap = row[n] - top
        share = _exp(gap)
        total += share
        weighted += share * gap
    second, token, found = row.dtype.type(-np.inf), 0, False
    for n in range(row.shape[0]):
        if row[n] > second:
            if row[n] == top and not found:
                token, found = n, True
            else:
                second = row[n]
    log = np.log(total)
    exact = np.float64  # what Python makes of them
    return exact(top), exact(second), exact(token), exact(top + log), exact(log - weighted / total)


@compiled
def summarise(logits: Any, out: Any) -> None:
    """The fields of `confidence.Summary` for each row of logits [tokens, vocab], [tokens, 5]."""
    for m in range(logits.shape[0]):
        found = summary(logits[m])
        for i in range(5):
            out[m, i] = found[i]
