"""The live check on a calibration's promise: counts of agreement, and a guard that acts on them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .policy import Check, ExitPolicy
from .report import Audit

ALARM = 20.0  # wealth at which the promise counts as broken: a false alarm has probability 1/20
RAISES = 3  # alarms that each halve the doubt an exit may have; the next one ends all exits


class BrokenPromise:
    """A sequential test of "each token disagrees with probability at most 1 - floor".

    A gambler bets on disagreement at odds that are fair if the promise just holds; as long as it
    does, the wealth reaches `ALARM` with probability at most 1 / ALARM, however long one watches
    (Ville's inequality). Several stakes are played at once, since the true rate is not known.
    Source: Waudby-Smith & Ramdas 2023 (arXiv 2010.09686), betting with a mixture over stakes.
    """

    def __init__(self, floor: float):
        """Start with a wealth of 1; `floor` in (0, 1) is the agreement promised."""
        self.allowed = 1 - floor
        # Below 1 / allowed no bet can lose everything.
        self._stakes = np.geomspace(0.05, 0.9, 8) / self.allowed
        self._log_wealth = np.zeros(len(self._stakes))

    @property
    def wealth(self) -> float:
        """Of all stakes together."""
        return float(np.exp(self._log_wealth).mean())

    def observe(self, agrees: bool) -> bool:
        """Play one token; whether the promise now counts as broken."""
        self._log_wealth += np.log1p(self._stakes * (float(not agrees) - self.allowed))
        return self.wealth >= ALARM


class GuardedPolicy:
    """Another policy that becomes stricter whenever its promise is found broken.

    Each alarm halves the doubt, 1 - confidence, an exit may have; after `RAISES` of them nothing
    exits any more.
    """

    def __init__(self, policy: ExitPolicy, floor: float):
        """Guard `policy`; `floor` in (0, 1) is the agreement to keep."""
        self.policy, self.floor = policy, floor
        self.alarms: list[int] = []  # audited tokens at each alarm
        self._seen = 0
        self._test = BrokenPromise(floor)

    def observe(self, agrees: bool) -> None:
        """Take note of one audited token."""
        self._seen += 1
        if len(self.alarms) <= RAISES and self._test.observe(agrees):
            self.alarms.append(self._seen)
            self._test = BrokenPromise(self.floor)

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Ask the inner policy unless all trust is gone."""
        return len(self.alarms) <= RAISES and self.policy.may_exit(exit_layer, position)

    def should_exit(self, check: Check) -> bool:
        """Ask the inner policy, with the doubt doubled for every alarm."""
        factor = 2 ** len(self.alarms)
        if factor > 1:
            measure = check.measure
            check = replace(
                check,
                confidence=_doubted(check.confidence, factor),
                measure=lambda name: _doubted(measure(name), factor),
            )
        return self.policy.should_exit(check)


def _doubted(confidence: float, factor: int) -> float:
    return max(0.0, 1 - factor * (1 - confidence))


class Auditor:
    """Counts agreement by exit layer."""

    def __init__(self, guard: GuardedPolicy | None = None):
        """Count nothing yet; tell the `guard` of everything counted."""
        self._agreeing: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()
        self._guard = guard

    def count(self, exit_layer: int, agrees: bool) -> None:
        """Count one token."""
        self._tokens[exit_layer] += 1
        self._agreeing[exit_layer] += agrees
        if self._guard is not None:
            self._guard.observe(agrees)

    def add(self, compared: Mapping[int, tuple[int, int]]) -> None:
        """Count many tokens at once: exit layer -> those that agree, and all; nobody guards."""
        for exit_layer, (agreeing, tokens) in compared.items():
            self._agreeing[exit_layer] += agreeing
            self._tokens[exit_layer] += tokens

    def result(self, new_tokens: int) -> Audit:
        """The account, for a generation of `new_tokens`."""
        tokens = self._tokens.total()
        return Audit(
            agreement=self._agreeing.total() / tokens if tokens else math.nan,
            tokens=tokens,
            unaudited=new_tokens - tokens,
            by_exit={e: (self._agreeing[e], n) for e, n in sorted(self._tokens.items())},
            floor=self._guard.floor if self._guard else None,
            alarms=tuple(self._guard.alarms) if self._guard else (),
        )
