"""The live check on a calibration's promise: counts of agreement, and a guard that acts on them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from .engine import promise
from .policy import ByThreshold, Check, ExitPolicy
from .report import Audit

RAISES = 3  # alarms that each halve the doubt an exit may have; the next one ends all exits


def guarded(policy: ExitPolicy, floor: float) -> "GuardedPolicy":
    """A policy that acts when less than `floor`, in (0, 1), of the audited tokens agree."""
    kind = GuardedThresholds if isinstance(policy, ByThreshold) else GuardedPolicy
    return kind(policy, floor)


class GuardedPolicy:
    """Another policy that becomes stricter whenever its promise is found broken.

    Each alarm halves the doubt, 1 - confidence, an exit may have; after `RAISES` of them nothing
    exits any more.
    """

    def __init__(self, policy: ExitPolicy, floor: float):
        """Guard `policy`; `floor` in (0, 1) is the agreement to keep."""
        self.policy, self.floor = policy, floor
        self.record = promise.begin(floor, RAISES + 1)  # which compiled code keeps as well

    @property
    def alarms(self) -> list[int]:
        """Audited tokens at each alarm."""
        *_, alarms = self.record
        return alarms[: promise.raised(self.record)].tolist()

    @property
    def _factor(self) -> int:
        """By how much doubts are multiplied."""
        return 2 ** int(promise.raised(self.record))

    def observe(self, agrees: bool) -> None:
        """Take note of one audited token."""
        promise.observe(agrees, self.record)

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Ask the inner policy unless all trust is gone."""
        return self._factor <= 2**RAISES and self.policy.may_exit(exit_layer, position)

    def should_exit(self, check: Check) -> bool:
        """Ask the inner policy, with the doubt doubled for every alarm."""
        factor = self._factor
        if factor > 1:
            measure = check.measure
            check = replace(
                check,
                confidence=_doubted(check.confidence, factor),
                measure=lambda name: _doubted(measure(name), factor),
            )
        return self.policy.should_exit(check)


class GuardedThresholds(GuardedPolicy):
    """A guarded policy that is one by thresholds, and stays one."""

    policy: ByThreshold

    @property
    def confidence(self) -> str | None:
        """The measure that the inner policy reads; None is the call's."""
        return getattr(self.policy, "confidence", None)

    def least(self, exit_layer: int, position: int) -> float:
        """The inner policy's, whose distance to 1 each alarm halves; 0 and less stay."""
        least = self.policy.least(exit_layer, position)
        return 1 - (1 - least) / self._factor if 0 < least < 1 else least

    def should_exit(self, check: Check) -> bool:
        """Whether the inner policy lets a sure token leave, and this one is sure enough now."""
        if self._factor == 1:
            return self.policy.should_exit(check)
        sure = replace(check, confidence=1.0, measure=lambda name: 1.0)
        enough = check.by(self.confidence) >= self.least(check.exit_layer, check.position)
        return enough and self.policy.should_exit(sure)


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
        """Count many tokens at once: exit layer -> those that agree, and all.

        Compiled code has told the guard, in its record.
        """
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
