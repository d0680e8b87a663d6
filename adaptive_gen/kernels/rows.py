"""Hidden states row by row: copied, normed, multiplied.

- `norming`: what a norm divides by at least, and whether it first takes off each state's mean, as
  LayerNorm does and a root-mean-square norm does not.
"""

from typing import Any

import numpy as np

from .exponential import softened
from .jit import inner


@inner
def copy(row: Any, into: Any) -> None:
    """Write as many numbers of a row as `into` has room for."""
    for n in range(into.shape[0]):
        into[n] = row[n]


@inner
def begin(y: Any, bias: Any, tokens: int) -> None:
    """Let each token's sums begin with a bias, which may be shorter or empty, and zeros."""
    given = bias.shape[0]
    for m in range(tokens):
        row = y[m]
        for n in range(given):
            row[n] = bias[n]
        for n in range(given, row.shape[0]):
            row[n] = 0


@inner
def soften(y: Any, softcap: float, tokens: int) -> None:
    """Bend numbers so that they stay below a cap, if it is not 0."""
    if softcap != 0:
        cap = y.dtype.type(softcap)
        for m in range(tokens):
            row = y[m]
            for n in range(row.shape[0]):
                row[n] = softened(row[n], cap)


@inner
def norm(x: Any, norming: Any, out: Any, tokens: int) -> None:
    """Divide each token's hidden state by its length or more, see `FusedModel`."""
    floor, centred = norming
    for m in range(tokens):
        row, into = x[m], out[m]
        mean = x.dtype.type(0)
        if centred:
            for n in range(into.shape[0]):
                mean += row[n]
            mean /= x.dtype.type(into.shape[0])
        total = x.dtype.type(floor * floor)
        for n in range(into.shape[0]):
            off = row[n] - mean
            total += off * off
        factor = x.dtype.type(1) / np.sqrt(total)
        for n in range(into.shape[0]):
            into[n] = (row[n] - mean) * factor


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
def add_normed(x: Any, norming: Any, gain: Any, normed: Any, y: Any, tokens: int) -> None:
    """Add what `norm` makes of x, times a gain [hidden], to y."""
    norm(x, norming, normed, tokens)
    for m in range(tokens):
        row, into = normed[m], y[m]
        for n in range(gain.shape[0]):
            into[n] += row[n] * gain[n]
