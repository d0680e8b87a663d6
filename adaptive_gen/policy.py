"""Exit policies: a check at an exit layer -> leave here or go on.

A policy knows nothing of models. The engine asks it at every exit layer below full depth, shallow
first; full depth always emits. Policies are values: they are combined by wrapping one another.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, eq=False)
class Check:
    """What a policy sees of one token at one exit layer."""

    exit_layer: int
    position: int  # of the token among the new ones of its text, from 0
    confidence: float  # in [0, 1]: the call's measure, calibrated where there is a calibration
    earlier: tuple["Check", ...] = ()  # of the same token at shallower exits, shallow to deep
    # Token and other measures cost something, so they are computed for the policy that asks.
    choose: Callable[[], int] = field(default=lambda: -1, repr=False)
    measure: Callable[[str], float] = field(default=lambda name: math.nan, repr=False)

    @property
    def token(self) -> int:
        """The token this exit would choose: the largest logit."""
        return self.choose()

    def by(self, confidence: str | None) -> float:
        """Another measure of the same readout by name ("margin", "max_prob", "entropy").

        Calibrated where there is a calibration; None is the call's own.
        """
        return self.confidence if confidence is None else self.measure(confidence)


@runtime_checkable
class ExitPolicy(Protocol):
    """What the engine asks. Ten lines of your own are a policy: no base class is needed."""

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether any confidence could leave here; if not, no readout is computed."""
        ...

    def should_exit(self, check: Check) -> bool:
        """Whether the token leaves here."""
        ...


@runtime_checkable
class ByThreshold(ExitPolicy, Protocol):
    """A policy that looks at nothing but the confidence, and says how much of it is enough.

    Compiled code can then decide for it, many tokens at a time. An attribute `confidence`, where a
    policy has one, names a measure other than the call's.
    """

    def least(self, exit_layer: int, position: int) -> float:
        """The smallest confidence that leaves, where `may_exit` holds; inf for none."""
        ...


@dataclass(frozen=True)
class NeverExit:
    """Every token runs at full depth, with no readout on the way."""

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """No."""
        return False

    def least(self, exit_layer: int, position: int) -> float:
        """None is enough."""
        return math.inf

    def should_exit(self, check: Check) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class FixedExit:
    """Every token leaves at one exit layer, however sure it is; the static sub-model."""

    exit_layer: int

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Only at the fixed exit."""
        return exit_layer == self.exit_layer

    def least(self, exit_layer: int, position: int) -> float:
        """Any is enough."""
        return -math.inf

    def should_exit(self, check: Check) -> bool:
        """Only at the fixed exit."""
        return check.exit_layer == self.exit_layer


@dataclass(frozen=True)
class ThresholdPolicy:
    """Leave at the first exit layer whose confidence reaches its threshold.

    An exit that has no threshold, or one of 1 or more, is never taken and never checked: 1.0 means
    full depth even where rounding makes a confidence exactly 1.
    """

    thresholds: Mapping[int, float]  # exit layer -> smallest confidence that exits
    confidence: str | None = None  # a measure by name; None is the call's

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether the threshold of this exit can be reached."""
        return self.thresholds.get(exit_layer, 1.0) < 1.0

    def least(self, exit_layer: int, position: int) -> float:
        """The threshold of this exit."""
        return self.thresholds.get(exit_layer, 1.0)

    def should_exit(self, check: Check) -> bool:
        """Whether the confidence reaches the threshold of this exit."""
        threshold = self.thresholds.get(check.exit_layer, 1.0)
        return threshold < 1.0 and check.by(self.confidence) >= threshold


@dataclass(frozen=True)
class DecayingThreshold:
    """CALM's threshold, stricter for early tokens, whose mistakes every later token sees.

    threshold(t) = clip((1 - amplitude) * threshold + amplitude * exp(-rate * t / horizon), 0, 1).
    Source: Schuster et al. 2022 (arXiv 2207.07061), where amplitude = 0.1 and rate = 4. (Their
    released code multiplies instead: threshold * (0.9 + 0.1 * exp(...)); this is the paper's form.)
    """

    thresholds: Mapping[int, float]  # exit layer -> threshold after the decay, in [0, 1]
    horizon: int  # new tokens over which it decays, usually max_new_tokens
    amplitude: float = 0.1
    rate: float = 4.0

    def least(self, exit_layer: int, position: int) -> float:
        """The threshold in force for the `position`-th new token."""
        base = self.thresholds.get(exit_layer, 1.0)
        if base >= 1.0:
            return 1.0
        decay = math.exp(-self.rate * position / self.horizon)
        return min(1.0, max(0.0, (1 - self.amplitude) * base + self.amplitude * decay))

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether the threshold in force can be reached."""
        return self.least(exit_layer, position) < 1.0

    def should_exit(self, check: Check) -> bool:
        """Whether the confidence reaches the threshold in force."""
        threshold = self.least(check.exit_layer, check.position)
        return threshold < 1.0 and check.confidence >= threshold


@dataclass(frozen=True)
class MinimumExit:
    """Another policy, kept from leaving before `exit_layer` layers have run."""

    policy: ExitPolicy
    exit_layer: int

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Ask the inner policy from the minimum on."""
        return exit_layer >= self.exit_layer and self.policy.may_exit(exit_layer, position)

    def should_exit(self, check: Check) -> bool:
        """Ask the inner policy from the minimum on."""
        return check.exit_layer >= self.exit_layer and self.policy.should_exit(check)


@dataclass(frozen=True)
class FirstAtFullDepth:
    """Another policy, kept from leaving early for the first `tokens` new tokens.

    They are the ones every later token sees, and often the ones that decide what is answered.
    """

    policy: ExitPolicy
    tokens: int

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Ask the inner policy after the first tokens."""
        return position >= self.tokens and self.policy.may_exit(exit_layer, position)

    def should_exit(self, check: Check) -> bool:
        """Ask the inner policy after the first tokens."""
        return check.position >= self.tokens and self.policy.should_exit(check)


@dataclass(frozen=True)
class Patience:
    """Leave when the latest `exits` checked exits, this one included, choose the same token.

    Source: PABEE (Zhou et al. 2020, arXiv 2006.04152), with classes being tokens.
    """

    exits: int = 2

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Always: an exit that cannot be left at still has a choice to compare with."""
        return True

    def should_exit(self, check: Check) -> bool:
        """Whether enough exits in a row agree."""
        before = self.exits - 1
        if len(check.earlier) < before:
            return False
        return all(c.token == check.token for c in check.earlier[len(check.earlier) - before :])


class AllOf:
    """Leave where every one of several policies would."""

    def __init__(self, *policies: ExitPolicy):
        """Combine `policies`."""
        self.policies = policies

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether all could."""
        return all(p.may_exit(exit_layer, position) for p in self.policies)

    def should_exit(self, check: Check) -> bool:
        """Whether all would."""
        return all(p.should_exit(check) for p in self.policies)


class AnyOf:
    """Leave where at least one of several policies would."""

    def __init__(self, *policies: ExitPolicy):
        """Combine `policies`."""
        self.policies = policies

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether any could."""
        return any(p.may_exit(exit_layer, position) for p in self.policies)

    def should_exit(self, check: Check) -> bool:
        """Whether any would, of those that could."""
        return any(
            p.may_exit(check.exit_layer, check.position) and p.should_exit(check)
            for p in self.policies
        )
