"""Compiled CPU kernels: decoder layers on a few tokens, by numba.

A decoding step reads every weight once, so its time is that of the memory, if nothing else takes
longer. Two things do in a framework: calling a dozen operations per layer, and products of two to
eight rows, which general libraries pack for throughput. Here a run of layers is one call, and the
weights lie as they are read: in panels of 16 columns, whose sums stay in registers.

Everything works on numpy arrays of one float dtype, but for weights (see `products.add_product`).
Axes: `tokens`, `hidden`, `heads`, `kv_heads`, `head_dim`, `layers`, `panels`.
"""

import math
from typing import Any

import numpy as np

from .attending import attend
from .exponential import exp
from .jit import entry, inner
from .lanes import LANES, by_lanes, copy_lanes, turn_pairs
from .panels import PANEL
from .products import add_product
from .rows import add_normed, apply_gain, copy, norm

NORMED_FIRST, WHOLE_HEADS, APPROXIMATE_GELU = range(3)  # of a model's traits
# GELU's approximation is x / (1 + exp(-_STEEP * (x + _CUBIC * x^3))).
_STEEP, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


@inner
def _turn(heads: Any, turn: Any) -> None:
    """Rotate [heads, head_dim] by [head_dim / 2, (cos, sin)], pairs side by side."""
    for h in range(heads.shape[0]):
        head = heads[h]
        for d in range(turn.shape[0]):
            real, imaginary = head[2 * d], head[2 * d + 1]
            head[2 * d] = real * turn[d, 0] - imaginary * turn[d, 1]
            head[2 * d + 1] = real * turn[d, 1] + imaginary * turn[d, 0]


@inner
def _norm_heads(heads: Any, gain: Any, floor: float, whole: bool) -> None:
    """Norm queries or keys [heads, head_dim], head by head or as a whole; there may be none."""
    together = max(1, heads.shape[0]) if whole else 1
    for first in range(0, heads.shape[0], together):
        total = heads.dtype.type(floor * floor)
        for h in range(first, first + together):
            head = heads[h]
            for d in range(head.shape[0]):
                total += head[d] * head[d]
        factor = heads.dtype.type(1) / np.sqrt(total)
        for h in range(first, first + together):
            head = heads[h]
            for d in range(head.shape[0]):
                head[d] *= factor * gain[h, d]


@inner
def _place(
    projected: Any,
    first: int,
    heads: int,
    turns: Any,
    kv: Any,
    layer: int,
    place: Any,
    gains: Any,
    floors: Any,
    whole: bool,
    kind: int,
) -> None:
    """Norm and rotate queries and keys, in place, and put keys and values into the cache.

    Args:
        projected: queries, keys and values of each token, [room, qkv in whole panels].
        first: head to begin with: `heads` leaves the queries out.
        heads: queries of a token.
        turns: see `run_layers`; likewise `kv`, `place` and `floors`.
        layer: which one.
        gains: of queries and keys, [heads + kv_heads, head_dim], if there are any.
        whole: whether all heads are normed together.
        kind: of rotation.
    """
    head_dim, kv_heads, kinds = kv.shape[5], kv.shape[3], turns.shape[1]
    turned, every = heads + kv_heads, heads + 2 * kv_heads
    wide = by_lanes(kv) and head_dim % LANES == 0
    for m in range(place.shape[0]):
        row, position = place[m, 0], place[m, 1]
        if gains.shape[0]:
            by_head = projected[m, : every * head_dim].reshape(every, head_dim)
            _norm_heads(by_head[first:heads], gains[first:heads], floors[1], whole)
            _norm_heads(by_head[heads:turned], gains[heads:turned], floors[2], whole)
        if wide:
            at = projected.ctypes.data + 4 * m * projected.shape[1]
            turn = turns.ctypes.data + 4 * (m * kinds + kind) * head_dim
            for n in range(first * head_dim, turned * head_dim, LANES):
                turn_pairs(at + 4 * n, turn + 4 * (n % head_dim))
            into = kv.ctypes.data + layer * kv.strides[0] + row * kv.strides[2]
            into += position * kv.strides[4]
            for h in range(kv_heads):
                key, value = at + 4 * (heads + h) * head_dim, at + 4 * (turned + h) * head_dim
                for n in range(0, 4 * head_dim, 4 * LANES):
                    copy_lanes(key + n, into + n)
                    copy_lanes(value + n, into + kv.strides[1] + n)
                into += kv.strides[3]
            continue
        by_head = projected[m, : every * head_dim].reshape(every, head_dim)
        _turn(by_head[first:turned], turns[m, kind])
        for h in range(kv_heads):
            copy(by_head[heads + h], kv[layer, 0, row, h, position])
            copy(by_head[turned + h], kv[layer, 1, row, h, position])


@inner
def _add_bias(y: Any, bias: Any, tokens: int) -> None:
    for m in range(tokens):
        row = y[m]
        for n in range(bias.shape[0]):
            row[n] += bias[n]


@inner
def _given(x: Any, floor: float, norms: bool, gain: Any, normed: Any, tokens: int) -> None:
    """Write what attention or the MLP is given of hidden states: normed or as they are."""
    if norms:
        norm(x, floor, normed, tokens)
        apply_gain(gain, normed, normed, tokens)
    else:
        for m in range(tokens):
            copy(x[m], normed[m])


@inner
def _activate(wide: Any, width: int, approximate_gelu: bool, tokens: int) -> None:
    """Let the gates, `width` numbers of each token, through to what lies behind them."""
    one = wide.dtype.type(1)
    steep, cubic = wide.dtype.type(_STEEP), wide.dtype.type(_CUBIC)
    for m in range(tokens):
        gate, up = wide[m, :width], wide[m, width : 2 * width]
        if approximate_gelu:
            for n in range(width):
                g = gate[n]
                gate[n] = g / (one + exp(-steep * (g + cubic * g * g * g))) * up[n]
        else:
            for n in range(width):
                gate[n] = gate[n] / (one + exp(-gate[n])) * up[n]


@entry
def run_layers(
    start: int,
    stop: int,
    wanted: int,
    x: Any,
    place: Any,
    turns: Any,
    kv: Any,
    layers: Any,
    buffers: Any,
) -> None:
    """Run layers `start`..`stop` on tokens, in place.

    Args:
        start: first layer.
        stop: one more than the last.
        wanted: how many tokens at the end of the block are to have come out of the last layer
            afterwards. It gives the others their keys and values, and that is all.
        x: hidden states, [room, hidden in whole panels].
        place: [tokens, 2], each token's row of the cache and its position. Tokens of one row come
            in order; each sees those before it and the row's in the cache.
        turns: [tokens, kinds, head_dim / 2, 2], cos and sin at each token's position.
        kv: [layers, 2, rows, kv_heads, capacity, head_dim]; gets the tokens' keys and values.
        layers: what they are made of, each by layer:
            weights: qkv, out, gate and up, down, each [layers, panels, in, PANEL]; see
            `add_product`.
            scales: of their columns, each [layers, panels * PANEL].
            biases: of qkv and out, each [layers, out]; gains of queries and keys, [layers, heads +
            kv_heads, head_dim]; and gains of hidden states before qkv and before gate and up, and
            of what attention and the MLP give, [layers, hidden] each. A model without one has none
            in the second axis; without the last two it does not norm what they are of.
            floors: what norms of hidden states, of queries and of keys divide by at least, [3].
            windows: how many positions a token sees, [layers]; 0 is all.
            rotations: which kind each layer turns by, [layers].
            traits: [3], by NORMED_FIRST, WHOLE_HEADS and APPROXIMATE_GELU.
        buffers: normed [room, hidden], projections [room, qkv in whole panels], mixed [room,
            heads * head_dim], gate_up [room, 2 * intermediate in whole panels], added [room,
            hidden in whole panels], scores and a plan, see `attending.attend`, and who helps, see
            `team`.
    """
    weights, scales, biases, floors, windows, rotations, traits = layers
    qkv, out, gate_up, down = weights
    qkv_scale, out_scale, gate_up_scale, down_scale = scales
    qkv_bias, out_bias, gains, first_gain, second_gain, mixed_gain, output_gain = biases
    normed, projected, mixed, wide, added, scores, plan, team = buffers
    tokens, width = place.shape[0], down.shape[2]
    heads = out.shape[2] // kv.shape[5]
    norms, whole, gelu = traits[NORMED_FIRST], traits[WHOLE_HEADS], traits[APPROXIMATE_GELU]
    for layer in range(start, stop):
        _given(x, floors[0], norms, first_gain[layer], normed, tokens)
        projected[:tokens] = 0
        add_product(normed, qkv[layer], qkv_scale[layer], projected, tokens, team)
        _add_bias(projected, qkv_bias[layer], tokens)
        norming = gains[layer], floors, whole, rotations[layer]
        _place(projected, 0, heads, turns, kv, layer, place, *norming)
        left_out = tokens - wanted if layer == stop - 1 else 0
        going, queries, y = tokens - left_out, projected[left_out:], x[left_out:]
        attend(queries, mixed, kv, layer, place[left_out:], windows[layer], scores, plan, team)
        if mixed_gain.shape[1]:
            added[:going] = 0
            add_product(mixed, out[layer], out_scale[layer], added, going, team)
            _add_bias(added, out_bias[layer], going)
            add_normed(added, floors[0], mixed_gain[layer], normed, y, going)
        else:
            add_product(mixed, out[layer], out_scale[layer], y, going, team)
            _add_bias(y, out_bias[layer], going)
        _given(y, floors[0], norms, second_gain[layer], normed, going)
        wide[:going] = 0
        add_product(normed, gate_up[layer], gate_up_scale[layer], wide, going, team)
        _activate(wide, width, gelu, going)
        if output_gain.shape[1]:
            added[:going] = 0
            add_product(wide, down[layer], down_scale[layer], added, going, team)
            add_normed(added, floors[0], output_gain[layer], normed, y, going)
        else:
            add_product(wide, down[layer], down_scale[layer], y, going, team)


@entry
def store_layers(
    start: int,
    stop: int,
    x: Any,
    place: Any,
    turns: Any,
    kv: Any,
    layers: Any,
    buffers: Any,
) -> None:
    """Give layers `start`..`stop` the tokens' keys and values only; see `run_layers`."""
    weights, scales, biases, floors, _, rotations, traits = layers
    qkv, qkv_scale, heads = weights[0], scales[0], weights[1].shape[2] // kv.shape[5]
    qkv_bias, gains, first_gain = biases[0], biases[2], biases[3]
    norms, whole = traits[NORMED_FIRST], traits[WHOLE_HEADS]
    normed, projected, team = buffers[0], buffers[1], buffers[7]
    tokens, first = place.shape[0], heads * kv.shape[5] // PANEL
    for layer in range(start, stop):
        _given(x, floors[0], norms, first_gain[layer], normed, tokens)
        projected[:tokens] = 0
        add_product(normed, qkv[layer], qkv_scale[layer], projected, tokens, team, first)
        _add_bias(projected, qkv_bias[layer], tokens)
        norming = gains[layer], floors, whole, rotations[layer]
        _place(projected, heads, heads, turns, kv, layer, place, *norming)
