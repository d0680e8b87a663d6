"""The search: which exits to check, at which threshold, for how much speed and agreement.

Every threshold of one grid with every subset of the exits is simulated on the traces and priced by
the cost model. A check costs a readout, so an exit that rarely fires is left out: that is decided
here by price, not by a rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from adaptive_gen.calibration import ConfidenceMap

from . import maps
from .cost import Cost
from .schedule import Outcome, simulate
from .trace import Trace

# Chances of agreement: fine near certainty, where most of the choice is.
THRESHOLDS = tuple(np.round(1 - np.geomspace(0.7, 0.002, 48), 4).tolist())
MOST_SUBSETS = 31  # all subsets of five exits; of more exits only small subsets and the whole
AT_ONCE = 512  # settings simulated together, to bound memory


@dataclass(frozen=True)
class Candidate:
    """One setting with what the traces and the cost model predict of it."""

    threshold: float
    exit_layers: tuple[int, ...]  # checked exits, full depth last
    mean_depth: float
    agreement: float
    speedup: float  # wall clock, whole calls


@dataclass(frozen=True)
class Target:
    """What the user asked for."""

    kind: str  # "speedup" or "disagreement"
    value: float

    def met(self, speedup: float, agreement: float) -> bool:
        """Whether a point with these figures is good enough."""
        if self.kind == "speedup":
            return speedup >= self.value
        return 1 - agreement <= self.value

    def __str__(self) -> str:
        """The option that asks for it."""
        option = "target-speedup" if self.kind == "speedup" else "max-disagreement"
        return f"--{option} {self.value:g}"


def subsets(exits: Sequence[int]) -> list[tuple[int, ...]]:
    """Sets of exits below full depth worth checking, smaller first."""
    found = [c for size in range(1, len(exits) + 1) for c in combinations(exits, size)]
    if len(found) <= MOST_SUBSETS:
        return found
    return [c for c in found if len(c) <= 2 or len(c) == len(exits)]


def candidates(
    trace: Trace,
    curves: Mapping[int, ConfidenceMap],
    measure: str,
    cost: Cost,
    *,
    kv: str,
    queue_cap: int,
) -> list[Candidate]:
    """Simulate and price every threshold with every subset of the exits.

    Args:
        trace: full-depth texts.
        curves: exit layer -> confidence map of `measure`.
        measure: which recorded confidence decides.
        cost: this device's cost model.
        kv: "recompute" or "propagate".
        queue_cap: the engine's.
    """
    exits = trace.exit_layers[:-1]
    raw = trace.confidence[measure]
    columns = [maps.apply(curves[e], raw[..., k]) for k, e in enumerate(exits)]
    chance = np.stack(columns, axis=-1)  # [texts, time, exits]

    def run(thresholds: NDArray, checked: NDArray) -> Outcome:
        leaves = chance[..., None] >= thresholds
        return simulate(
            trace.exit_layers, trace.lengths, trace.agrees, leaves, checked, kv, queue_cap
        )

    full_s = cost.time(run(np.ones(1), np.zeros((len(exits), 1), dtype=bool)).work)[0]
    settings = [(t, subset) for subset in subsets(exits) for t in THRESHOLDS]
    found = []
    for start in range(0, len(settings), AT_ONCE):
        part = settings[start : start + AT_ONCE]
        checked = np.array([[e in subset for _, subset in part] for e in exits])
        outcome = run(np.array([t for t, _ in part]), checked)
        speedup = full_s / cost.time(outcome.work)
        figures = zip(part, outcome.mean_depth, outcome.agreement, speedup, strict=True)
        for (threshold, subset), *numbers in figures:
            layers = (*subset, trace.n_layers)
            found.append(Candidate(threshold, layers, *map(float, numbers)))
    return found


def front(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both speed and agreement, slowest first."""
    best: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (-c.speedup, -c.agreement)):
        if not best or candidate.agreement > best[-1].agreement:
            best.append(candidate)
    return best[::-1]


def pick(ordered: Sequence[Candidate], target: Target) -> int:
    """Index of the front's best point for the target, or of the nearest miss.

    For a speed-up that is the most faithful point that reaches it; for a disagreement, the fastest
    point that keeps to it.
    """
    good = [i for i, c in enumerate(ordered) if target.met(c.speedup, c.agreement)]
    if target.kind == "speedup":
        return good[0] if good else len(ordered) - 1
    return good[-1] if good else 0


def spread(ordered: Sequence[Candidate], count: int, keep: int) -> list[int]:
    """Indices of about `count` points, evenly spaced in speed on the front, `keep` among them."""
    speeds = np.array([c.speedup for c in ordered])
    wanted = np.linspace(speeds[0], speeds[-1], count)
    nearest = {int(np.abs(speeds - w).argmin()) for w in wanted}
    return sorted(nearest | {keep})
