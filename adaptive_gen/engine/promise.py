"""A sequential test of the promise "each token disagrees with probability at most 1 - floor".

A gambler bets on disagreement at odds that are fair if the promise just holds; as long as it does,
the wealth reaches `ALARM` with probability at most 1 / ALARM, however long one watches (Ville's
inequality). Several stakes are played at once, since the true rate is not known. After an alarm the
test begins anew. Source: Waudby-Smith & Ramdas 2023 (arXiv 2010.09686), betting with a mixture over
stakes.

`observe` and `raised` are plain enough to be compiled, and `kernels.audited` does. The account is a
record: stakes and the logarithm of what each has won, [stakes] each; the disagreement promised,
[1]; tokens seen and alarms raised, [2]; and the tokens seen at each alarm, [alarms] at most.
"""

import math
from typing import Any

import numpy as np

ALARM = 20.0  # wealth at which the promise counts as broken: a false alarm has probability 1/20
SEEN, RAISED = range(2)
_STAKES = 8


def begin(floor: float, alarms: int) -> tuple[Any, ...]:
    """The record of a test that begins, with a wealth of 1.

    Args:
        floor: the agreement promised, in (0, 1).
        alarms: after so many nobody tests any more.
    """
    # Below 1 / allowed no bet can lose everything.
    stakes = np.geomspace(0.05, 0.9, _STAKES) / (1 - floor)
    counts = np.zeros(2, np.int64), np.zeros(alarms, np.int64)
    return stakes, np.zeros(_STAKES), np.array([1 - floor]), *counts


def nothing() -> tuple[Any, ...]:
    """The record of a test that nobody asked for."""
    return np.zeros(0), np.zeros(0), np.ones(1), np.zeros(2, np.int64), np.zeros(0, np.int64)


def raised(record: Any) -> int:
    """How many alarms there have been."""
    _, _, _, counts, _ = record
    return counts[RAISED]


def observe(agrees: bool, record: Any) -> bool:
    """Play one token; whether the promise now counts as broken, which begins the test anew."""
    stakes, won, allowed, counts, alarms = record
    counts[SEEN] += 1
    if counts[RAISED] == len(alarms):
        return False
    outcome = (0.0 if agrees else 1.0) - allowed[0]
    wealth = 0.0
    for n in range(len(stakes)):
        won[n] += math.log1p(stakes[n] * outcome)
        wealth += math.exp(won[n]) / len(stakes)
    if wealth < ALARM:
        return False
    for n in range(len(stakes)):
        won[n] = 0.0
    alarms[counts[RAISED]] = counts[SEEN]
    counts[RAISED] += 1
    return True
