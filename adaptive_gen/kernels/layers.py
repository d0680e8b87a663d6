"""Compiled CPU kernels: decoder layers on a few tokens, by numba.

A decoding step reads every weight once, so its time is that of the memory, if nothing else takes
longer. Two things do in a framework: calling a dozen operations per layer, and products of two to
eight rows, which general libraries pack for throughput. Here a run of layers is one call, and the
weights lie as they are read: in panels of 16 columns, whose sums stay in registers.

Everything works on numpy arrays of one float dtype, but for weights (see `products.add_product`).
Axes: `tokens`, `hidden`, `heads`, `kv_heads`, `head_dim`, `layers`, `panels`.
"""

from typing import Any

import numpy as np

from .activations import activate
from .attending import attend
from .experts import add_mixture
from .jit import entry, inner
from .lanes import LANES, by_lanes, copy_lanes, turn_pairs
from .panels import PANEL
from .products import add_product
from .rows import add_normed, apply_gain, begin, copy, norm

# Of a model's traits.
NORMED_FIRST, CENTRED, WHOLE_HEADS, PARALLEL, GATED, ACTIVATION, TOP_K, NORMALISED = range(8)


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
def _total(y: Any, added: Any, gain: Any, bias: Any, tokens: int) -> Any:
    """Where attention or the MLP adds to: the hidden states, or elsewhere if that is normed first.

    Its bias is there already.
    """
    if gain.shape[1]:
        begin(added, bias, tokens)
        return added
    for m in range(tokens):
        row = y[m]
        for n in range(bias.shape[0]):
            row[n] += bias[n]
    return y


@inner
def _given(x: Any, norming: Any, norms: bool, gain: Any, normed: Any, tokens: int) -> None:
    """Write what attention or the MLP is given of hidden states: normed or as they are."""
    if norms:
        norm(x, norming, normed, tokens)
        apply_gain(gain, normed, normed, tokens)
    else:
        for m in range(tokens):
            copy(x[m], normed[m])


@inner
def _norming(floors: Any, traits: Any) -> Any:
    """How hidden states are normed; see `rows`."""
    return floors[0], traits[CENTRED] != 0


@inner
def _add_mlp(
    layer: int,
    normed: Any,
    router: Any,
    matrices: Any,
    traits: Any,
    bias: Any,
    wide: Any,
    routing: Any,
    total: Any,
    tokens: int,
    team: Any,
) -> None:
    """Add to `total` what a layer's MLP, or its mixture of them, makes of what it is given."""
    weights, weights_scale = router
    if weights.shape[1]:
        choosing = weights[layer], weights_scale[layer]
        kinds = traits[ACTIVATION], traits[TOP_K], traits[NORMALISED]
        add_mixture(normed, choosing, matrices, kinds, wide, routing, total, tokens, team)
    else:
        gate_up, gate_up_scale, down, down_scale = matrices
        begin(wide, bias, tokens)
        add_product(normed, gate_up[0], gate_up_scale[0], wide, tokens, team)
        activate(wide, down.shape[2], traits[ACTIVATION], traits[GATED], tokens)
        add_product(wide, down[0], down_scale[0], total, tokens, team)


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
            weights: qkv and out, [layers, panels, in, PANEL] each, see `add_product`; gate and up,
            and down, [layers, experts, panels, in, PANEL] each, where one MLP is one expert.
            scales: of their columns, likewise, with panels * PANEL for panels, in and PANEL.
            biases: likewise, each [layers, out]. A model without one has none in the second axis.
            gains: of queries and keys, [layers, heads + kv_heads, head_dim]; and of hidden states
            before qkv and before gate and up, and of what attention and the MLP give, [layers,
            hidden] each, likewise. Without the first or the last two, what they are of is not
            normed.
            floors: what norms of hidden states, of queries and of keys divide by at least, [3].
            windows: how many positions a token sees, [layers]; 0 is all.
            softcap: of scores, see `attending.attend`.
            rotations: which kind each layer turns by, [layers].
            router: what chooses experts, [layers, panels, hidden, PANEL], and the scale of its
            columns; without panels where there is one MLP. Else MLPs are behind attention, have
            no biases, and what they give is not normed.
            traits: [8]: whether attention and the MLP are given normed states, and less their mean;
            whether heads are normed together; whether the MLP is given what attention is, and not
            what that made of it; whether it has a gate; and the index in `ACTIVATIONS` of what
            the gate, or all of it, goes through; of experts how many a token has, and whether their
            shares add up to 1.
        buffers: normed [room, hidden], projections [room, qkv in whole panels], mixed [room,
            heads * head_dim], gate_up [room, gate and up in whole panels], added [room, hidden in
            whole panels], scores and a plan, see `attending.attend`, who helps, see `team`, and
            those of `experts.add_mixture`.
    """
    weights, scales, biases, gains, floors, windows, softcap, rotations, router, traits = layers
    qkv, out, gate_up, down = weights
    qkv_scale, out_scale, gate_up_scale, down_scale = scales
    qkv_bias, out_bias, gate_up_bias, down_bias = biases
    qk_gain, first_gain, second_gain, mixed_gain, output_gain = gains
    normed, projected, mixed, wide, added, scores, plan, team, routing = buffers
    tokens, heads = place.shape[0], out.shape[2] // kv.shape[5]
    norms, norming, whole = traits[NORMED_FIRST], _norming(floors, traits), traits[WHOLE_HEADS]
    parallel = traits[PARALLEL]
    for layer in range(start, stop):
        _given(x, norming, norms, first_gain[layer], normed, tokens)
        begin(projected, qkv_bias[layer], tokens)
        add_product(normed, qkv[layer], qkv_scale[layer], projected, tokens, team)
        heading = qk_gain[layer], floors, whole, rotations[layer]
        _place(projected, 0, heads, turns, kv, layer, place, *heading)
        left_out = tokens - wanted if layer == stop - 1 else 0
        going, queries, y = tokens - left_out, projected[left_out:], x[left_out:]
        if parallel:
            _given(y, norming, norms, second_gain[layer], normed, going)
        seeing = windows[layer], softcap
        attend(queries, mixed, kv, layer, place[left_out:], *seeing, scores, plan, team)
        total = _total(y, added, mixed_gain, out_bias[layer], going)
        add_product(mixed, out[layer], out_scale[layer], total, going, team)
        if mixed_gain.shape[1]:
            add_normed(added, norming, mixed_gain[layer], normed, y, going)
        if not parallel:
            _given(y, norming, norms, second_gain[layer], normed, going)
        total = _total(y, added, output_gain, down_bias[layer], going)
        matrices = gate_up[layer], gate_up_scale[layer], down[layer], down_scale[layer]
        given = gate_up_bias[layer], wide, routing, total, going, team
        _add_mlp(layer, normed, router, matrices, traits, *given)
        if output_gain.shape[1]:
            add_normed(added, norming, output_gain[layer], normed, y, going)


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
    weights, scales, biases, gains, floors, _, _, rotations, _, traits = layers
    qkv, qkv_scale, heads = weights[0], scales[0], weights[1].shape[2] // kv.shape[5]
    qkv_bias, qk_gain, first_gain = biases[0], gains[0], gains[1]
    norms, norming, whole = traits[NORMED_FIRST], _norming(floors, traits), traits[WHOLE_HEADS]
    normed, projected, team = buffers[0], buffers[1], buffers[7]
    tokens, first = place.shape[0], heads * kv.shape[5] // PANEL
    for layer in range(start, stop):
        _given(x, norming, norms, first_gain[layer], normed, tokens)
        begin(projected, qkv_bias[layer], tokens)
        add_product(normed, qkv[layer], qkv_scale[layer], projected, tokens, team, first)
        heading = qk_gain[layer], floors, whole, rotations[layer]
        _place(projected, heads, heads, turns, kv, layer, place, *heading)
