"""How sure a sample makes a promise: p-values for "the mean loss is above the tolerated risk".

Every test takes losses of independently drawn prompts and the risk, and returns the chance, at
most, of losses this small if the true mean were that risk or more. One unit is one *prompt*: tokens
of one text hang together and would promise several times too much.

Axes: `...` any leading axes, `n` prompts.

Sources: exact binomial (Clopper and Pearson 1934); betting (Waudby-Smith and Ramdas 2024,
arXiv 2010.09686); Hoeffding-Bentkus (Angelopoulos et al., arXiv 2110.01052).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from adaptive_gen.errors import DataError

Test = Callable[[NDArray, float, float], NDArray]

# Beyond this many prompts a promise is not for this tool to make.
MOST_PROMPTS = 1 << 20


def binomial(losses: NDArray, risk: float, delta: float) -> NDArray:
    """Exact p-value [...] for losses [..., n] of 0 or 1; `delta` plays no part."""
    if np.any((losses != 0) & (losses != 1)):
        raise ValueError("the binomial test takes losses of 0 and 1 only")
    return binom.cdf(losses.sum(-1), losses.shape[-1], risk)


def betting(losses: NDArray, risk: float, delta: float) -> NDArray:
    """Waudby-Smith-Ramdas p-value [...] for losses [..., n] of at most 1, in the order given.

    A gambler stakes against "the mean is `risk` or more", each time sized by what the losses so far
    vary. If that claim is true the game is unfair to the gambler, and one over the largest fortune
    ever reached is a p-value. `delta` tunes the stakes to the level tested at; the p-value is valid
    whatever it is.
    """
    n = losses.shape[-1]
    seen = np.arange(2, n + 2)
    mean = (0.5 + losses.cumsum(-1)) / seen
    variance = (0.25 + ((losses - mean) ** 2).cumsum(-1)) / seen
    # A stake may depend only on the losses before it.
    before = np.concatenate([np.full_like(variance[..., :1], 0.25), variance[..., :-1]], axis=-1)
    stake = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (n * before)))
    fortune = np.log1p(-stake * (losses - risk)).cumsum(-1).max(-1)
    return np.exp(-np.maximum(fortune, 0.0))


def hoeffding_bentkus(losses: NDArray, risk: float, delta: float) -> NDArray:
    """The smaller of Hoeffding's and Bentkus's p-values [...] for losses [..., n] in [0, 1].

    What CALM certifies with; here for comparison. `delta` plays no part.
    """
    n = losses.shape[-1]
    total = losses.sum(-1)
    mean = np.minimum(total / n, risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(mean > 0, mean * np.log(mean / risk), 0.0)
        divergence += (1 - mean) * np.log((1 - mean) / (1 - risk))
    # A sum that is whole up to rounding must not be rounded up once more.
    bentkus = math.e * binom.cdf(np.ceil(total - 1e-9), n, risk)
    return np.minimum(1.0, np.minimum(np.exp(-n * divergence), bentkus))


def upper_limit(test: Test, losses: NDArray, delta: float) -> float:
    """The smallest risk that the losses [n] rule out at level `delta`; 1 if they rule out none."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if test(losses, middle, delta) <= delta:
            high = middle
        else:
            low = middle
    return high


def fewest(test: Test, risk: float, delta: float) -> int:
    """How many prompts it takes to promise `risk` when not one of them loses anything."""

    def enough(n: int) -> bool:
        return bool(test(np.zeros(n), risk, delta) <= delta)

    high = 1
    while not enough(high):
        if high >= MOST_PROMPTS:
            return high
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def check_enough(test: Test, n: int, risk: float, delta: float) -> None:
    """Refuse a promise that `n` prompts cannot carry, however well they come out.

    Raises:
        DataError: with the prompts it takes, and the risk that `n` can carry.
    """
    needed = fewest(test, risk, delta)
    if n >= needed:
        return
    possible = upper_limit(test, np.zeros(max(n, 1)), delta)
    raise DataError(
        f"{n} prompts are too few to promise a risk of {risk:g} with {1 - delta:.0%} confidence: "
        f"it takes {needed} to certify on, even if none of them differs. Give more prompts, or a "
        f"risk of {math.ceil(possible * 1000) / 1000:g} or more."
    )
