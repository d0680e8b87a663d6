"""Hidden states row by row: copied, normed, multiplied."""

from typing import Any

import numpy as np

from .jit import inner


@inner
def copy(row: Any, into: Any) -> None:
    """Write as many numbers of a row as `into` has room for."""
    for n in range(into.shape[0]):
        into[n] = row[n]


@inner
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


@inner
def apply_gain(gain: Any, x: Any, out: Any, tokens: int) -> None:
    """Multiply normed hidden states by what the weights behind them do not have folded in, if any.

    Args:
        gain: [hidden], or of length 0.
        x: [.., hidden].
        out: likewise; may be x itself.
        tokens: of both.
    """
    for m in range(tokens):
        row, into = x[m], out[m]
        for n in range(gain.shape[0]):
            into[n] = row[n] * gain[n]


@inner
def add_normed(x: Any, floor: float, gain: Any, normed: Any, y: Any, tokens: int) -> None:
    """Add what `norm` makes of x, times a gain [hidden], to y."""
    norm(x, floor, normed, tokens)
    for m in range(tokens):
        row, into = normed[m], y[m]
        for n in range(gain.shape[0]):
            into[n] += row[n] * gain[n]
