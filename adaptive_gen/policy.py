"""Exit policies: (exit layer, confidence, position) -> leave here or go on.

A policy knows nothing of models. The engine asks it at every exit layer below full depth, shallow
first; full depth always emits. `position` counts the new tokens of the text, from 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class ExitPolicy(Protocol):
    """What the engine asks. Ten lines of your own are a policy: no base class is needed."""

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether any confidence could leave here; if not, no readout is computed."""
        ...

    def should_exit(self, exit_layer: int, confidence: float, position: int) -> bool:
        """Whether the token leaves at `exit_layer` with this `confidence` in [0, 1]."""
        ...


@dataclass(frozen=True)
class NeverExit:
    """Every token runs at full depth, with no readout on the way."""

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """No."""
        return False

    def should_exit(self, exit_layer: int, confidence: float, position: int) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class FixedExit:
    """Every token leaves at one exit layer, however sure it is; the static sub-model."""

    exit_layer: int

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Only at the fixed exit."""
        return exit_layer == self.exit_layer

    def should_exit(self, exit_layer: int, confidence: float, position: int) -> bool:
        """Only at the fixed exit."""
        return exit_layer == self.exit_layer


@dataclass(frozen=True)
class ThresholdPolicy:
    """Leave at the first exit layer whose confidence reaches its threshold.

    An exit that has no threshold, or one of 1 or more, is never taken and never checked: 1.0 means
    full depth even where rounding makes a confidence exactly 1.
    """

    thresholds: Mapping[int, float]  # exit layer -> smallest confidence that exits

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether the threshold of this exit can be reached."""
        return self.thresholds.get(exit_layer, 1.0) < 1.0

    def should_exit(self, exit_layer: int, confidence: float, position: int) -> bool:
        """Whether `confidence` reaches the threshold of this exit."""
        threshold = self.thresholds.get(exit_layer, 1.0)
        return threshold < 1.0 and confidence >= threshold


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

    def at(self, exit_layer: int, position: int) -> float:
        """The threshold in force for the `position`-th new token."""
        base = self.thresholds.get(exit_layer, 1.0)
        if base >= 1.0:
            return 1.0
        decay = math.exp(-self.rate * position / self.horizon)
        return min(1.0, max(0.0, (1 - self.amplitude) * base + self.amplitude * decay))

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether the threshold in force can be reached."""
        return self.at(exit_layer, position) < 1.0

    def should_exit(self, exit_layer: int, confidence: float, position: int) -> bool:
        """Whether `confidence` reaches the threshold in force."""
        return self.may_exit(exit_layer, position) and confidence >= self.at(exit_layer, position)


@dataclass(frozen=True)
class MinimumExit:
    """Another policy, kept from leaving before `exit_layer` layers have run."""

    policy: ExitPolicy
    exit_layer: int

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Ask the inner policy from the minimum on."""
        return exit_layer >= self.exit_layer and self.policy.may_exit(exit_layer, position)

    def should_exit(self, exit_layer: int, confidence: float, position: int) -> bool:
        """Ask the inner policy from the minimum on."""
        return exit_layer >= self.exit_layer and self.policy.should_exit(
            exit_layer, confidence, position
        )
