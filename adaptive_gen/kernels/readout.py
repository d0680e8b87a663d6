"""What hidden states say: logits, the two largest, and what a confidence needs of them."""

from typing import Any

import numpy as np

from .exponential import exp
from .jit import entry, inner
from .logits import two_of_panels
from .panels import PANEL
from .products import add_product
from .rows import apply_gain, begin, norm, soften


@entry
def read_out(
    x: Any,
    norming: Any,
    gain: Any,
    head: Any,
    scale: Any,
    bias: Any,
    softcap: float,
    normed: Any,
    out: Any,
    team: Any,
) -> None:
    """Logits of hidden states: norm and LM head.

    Args:
        x: [tokens, hidden].
        norming: see `rows`.
        gain: see `apply_gain`.
        head: [panels, hidden, PANEL].
        scale: of its columns.
        bias: of the logits, [vocab in whole panels], or of length 0.
        softcap: what they are bent below; 0 leaves them.
        normed: [tokens, hidden].
        out: gets the logits, [tokens, vocab in whole panels].
        team: see `add_product`.
    """
    tokens = x.shape[0]
    norm(x, norming, normed, tokens)
    apply_gain(gain, normed, normed, tokens)
    begin(out, bias, tokens)
    add_product(normed, head, scale, out, tokens, team)
    soften(out, softcap, tokens)


@inner
def best_two(row: Any) -> Any:
    """The largest of some numbers and the second, which may be as large."""
    top, second = two_of_panels(row)
    for number in row[row.shape[0] // PANEL * PANEL :]:
        if number > top:
            top, second = number, top
        elif number > second:
            second = number
    return top, second


@inner
def first_of(largest: Any, row: Any) -> int:
    """Where the largest number of a row is, the first of equals."""
    n = 0
    while row[n] < largest:
        n += 1
    return n


@inner
def summary(row: Any) -> Any:
    """The fields of `confidence.Summary` for logits [vocab]."""
    top, second = best_two(row)
    total = weighted = row.dtype.type(0)
    for n in range(row.shape[0]):
        gap = row[n] - top
        share = exp(gap)
        total += share
        weighted += share * gap
    token = first_of(top, row)
    log = np.log(total)
    exact = np.float64  # what Python makes of them
    return exact(top), exact(second), exact(token), exact(top + log), exact(log - weighted / total)


@entry
def summarise(logits: Any, out: Any) -> None:
    """The fields of `confidence.Summary` for each row of logits [tokens, vocab], [tokens, 5]."""
    for m in range(logits.shape[0]):
        found = summary(logits[m])
        for i in range(5):
            out[m, i] = found[i]
