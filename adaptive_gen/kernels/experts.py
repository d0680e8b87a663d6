"""Compiled CPU kernels: mixtures of experts, of which each token goes through a few.

What is read for one token is the matrices of its own experts. Tokens of a block that have one in
common read it together.

Axes: `tokens`, `hidden`, `experts`, `panels`.
"""

from typing import Any

from .activations import activate
from .exponential import exp
from .jit import inner
from .products import add_product
from .rows import begin, copy


@inner
def _share(logits: Any, shares: Any, top_k: int, normalised: bool) -> None:
    """Write what share each of a token's experts [experts] has; 0 of those it does not go to."""
    number = shares.dtype.type
    top = logits[0]
    for e in range(1, shares.shape[0]):
        top = max(top, logits[e])
    total = number(0)
    for e in range(shares.shape[0]):
        logits[e] = exp(logits[e] - top)
        total += logits[e]
        shares[e] = 0
    chosen = number(0)
    for _ in range(top_k):
        best = 0
        for e in range(1, shares.shape[0]):
            if logits[e] > logits[best]:
                best = e
        shares[best] = logits[best]
        chosen += logits[best]
        logits[best] = -1  # less than any exponential
    factor = number(1) / (chosen if normalised else total)
    for e in range(shares.shape[0]):
        shares[e] *= factor


@inner
def add_mixture(
    normed: Any,
    router: Any,
    matrices: Any,
    kinds: Any,
    wide: Any,
    routing: Any,
    y: Any,
    tokens: int,
    team: Any,
) -> None:
    """Add to y what a layer's experts make of what its MLP is given.

    Args:
        normed: what that is, [room, hidden].
        router: its matrix [panels, hidden, PANEL], and the scale of its columns.
        matrices: gate and up, and down, each [experts, panels, in, PANEL] and followed by the
            scale of its columns, [experts, panels * PANEL].
        kinds: the activation, how many experts a token has, and whether their shares add up to 1.
        wide: buffer, [room, gate and up in whole panels].
        routing: buffers: logits [room, experts in whole panels], shares [room, experts], given
            [room, hidden], made [room, hidden in whole panels] and which tokens, [room].
        y: hidden states, [room, hidden in whole panels].
        tokens: how many.
        team: who helps, see `team`.
    """
    weights, weights_scale = router
    gate_up, gate_up_scale, down, down_scale = matrices
    activation, top_k, normalised = kinds
    logits, shares, given, made, which = routing
    nothing = made[0, :0]
    begin(logits, nothing, tokens)
    add_product(normed, weights, weights_scale, logits, tokens, team)
    for m in range(tokens):
        _share(logits[m], shares[m], top_k, normalised)
    for e in range(gate_up.shape[0]):
        count = 0
        for m in range(tokens):
            if shares[m, e] != 0:  # nor nan, which is handed on
                copy(normed[m], given[count])
                which[count] = m
                count += 1
        if count == 0:
            continue
        begin(wide, nothing, count)
        add_product(given, gate_up[e], gate_up_scale[e], wide, count, team)
        activate(wide, down.shape[2], activation, True, count)
        for n in range(count):
            share, row = shares[which[n], e], wide[n]
            for i in range(down.shape[2]):
                row[i] *= share
        begin(made, nothing, count)
        add_product(wide, down[e], down_scale[e], made, count, team)
        for n in range(count):
            row, into = made[n], y[which[n]]
            for i in range(row.shape[0]):
                into[i] += row[i]
