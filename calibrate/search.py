"""The search: which exits to check, at which threshold, for how much speed and agreement.

With one threshold for all exits, every threshold of a grid with every subset of the exits is
simulated on the traces and priced by the cost model. With thresholds of their own, all tuples are
evaluated from a histogram and the best of them simulated. A check costs a readout, so an exit that
rarely fires is left out: that is decided here by price, not by a rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from adaptive_gen.calibration import ConfidenceMap, Placement
from adaptive_gen.confidence import GATE
from adaptive_gen.errors import OptionError

from . import maps
from .cost import Cost
from .histogram import Tables, tables
from .schedule import Outcome, Work, simulate
from .target import Target
from .trace import Trace

# Chances of agreement: fine near certainty, where most of the choice is.
THRESHOLDS = tuple(np.round(1 - np.geomspace(0.7, 0.002, 48), 4).tolist())
MOST_SUBSETS = 31  # all subsets of five exits; of more exits only small subsets and the whole
AT_ONCE = 512  # settings simulated together, to bound memory
# Thresholds per exit when each has its own, by number of exits: at most about 65,000 tuples.
GRID = {1: 200, 2: 120, 3: 40, 4: 16, 5: 9}
NEVER = 2.0  # in a tuple: above every chance, the exit is not checked
AIM = 1.03  # how far beyond a speed a prediction should lie, being a prediction


@dataclass(frozen=True)
class Candidate:
    """One setting with what the traces and the cost model predict of it."""

    threshold: float | tuple[float, ...]  # of all checked exits, or one of each
    exit_layers: tuple[int, ...]  # checked exits, full depth last
    mean_depth: float
    agreement: float
    speedup: float  # wall clock, whole calls
    latency_ms: float = 0.0  # per new token, whole calls

    @property
    def thresholds(self) -> dict[int, float]:
        """Of every checked exit."""
        exits = self.exit_layers[:-1]
        if isinstance(self.threshold, tuple):
            return dict(zip(exits, self.threshold, strict=True))
        return dict.fromkeys(exits, self.threshold)

    @property
    def dial(self) -> float | dict[int, float]:
        """The threshold as `generate` and the artefact take it."""
        return self.thresholds if isinstance(self.threshold, tuple) else self.threshold

    def __str__(self) -> str:
        """Thresholds and exits, for a note."""
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        numbers = ", ".join(f"{t:g}" for t in values)
        return f"threshold {numbers} at exit {', '.join(map(str, self.exit_layers[:-1]))}"


def subsets(exits: Sequence[int]) -> list[tuple[int, ...]]:
    """Sets of exits below full depth worth checking, smaller first."""
    found = [c for size in range(1, len(exits) + 1) for c in combinations(exits, size)]
    if len(found) <= MOST_SUBSETS:
        return found
    return [c for c in found if len(c) <= 2 or len(c) == len(exits)]


@dataclass(frozen=True)
class Traced:
    """One measure's traces with all that prices a setting on them."""

    trace: Trace
    chance: NDArray[np.float64]  # [texts, time, exits]: mapped confidences
    cost: Cost
    kv: str
    queue_cap: int
    gated: bool = False  # checks read no logits

    @classmethod
    def of(
        cls,
        trace: Trace,
        curves: Mapping[int, ConfidenceMap],
        measure: str,
        cost: Cost,
        kv: str,
        queue_cap: int,
    ) -> "Traced":
        """Map the recorded confidences of `measure`."""
        raw = trace.confidence[measure]
        columns = [maps.apply(curves[e], raw[..., k]) for k, e in enumerate(trace.exit_layers[:-1])]
        return cls(trace, np.stack(columns, axis=-1), cost, kv, queue_cap, measure == GATE)

    @property
    def exits(self) -> tuple[int, ...]:
        """Exit layers below full depth."""
        return self.trace.exit_layers[:-1]

    def simulate(self, thresholds: NDArray) -> Outcome:
        """Follow the queues; thresholds [exits, settings], above 1 where an exit is not checked."""
        leaves = self.chance[..., None] >= thresholds
        t = self.trace
        found = simulate(
            t.exit_layers, t.lengths, t.agrees, leaves, thresholds <= 1, self.kv, self.queue_cap
        )
        return replace(found, work=found.work.gated()) if self.gated else found

    def full_depth_s(self) -> float:
        """Predicted seconds of all texts at full depth."""
        return self.cost.time(self.simulate(np.full((len(self.exits), 1), NEVER)).work)[0]


def candidates(traced: Traced) -> list[Candidate]:
    """Simulate and price every threshold of the grid with every subset of the exits."""
    settings = [
        (t, [t if e in subset else NEVER for e in traced.exits])
        for subset in subsets(traced.exits)
        for t in THRESHOLDS
    ]
    return _priced(traced, settings)


def placement(dial: Sequence[Candidate]) -> Placement:
    """For every threshold of the grid the exits that are worth a check there, by price alone.

    None are where no gain beyond a prediction's error is predicted over full depth: a check costs a
    readout, and the higher the threshold, the fewer checks are repaid.

    Args:
        dial: every threshold with every subset of the exits.
    """
    best: dict[float, tuple[float, tuple[int, ...]]] = {t: (AIM, ()) for t in THRESHOLDS}
    for candidate in dial:
        assert not isinstance(candidate.threshold, tuple)
        if candidate.speedup > best[candidate.threshold][0]:
            best[candidate.threshold] = candidate.speedup, candidate.exit_layers[:-1]
    return tuple((t, exits) for t, (_, exits) in sorted(best.items()))


def per_exit(traced: Traced) -> list[Candidate]:
    """The best of all tuples of thresholds, one for each exit, simulated and priced.

    Raises:
        OptionError: there are too many exits for that.
    """
    exits = traced.exits
    if len(exits) not in GRID:
        raise OptionError(
            f"thresholds of their own are searched for up to {max(GRID)} exits; there are "
            f"{len(exits)}. Name some of them with --exit-layers."
        )
    grid = np.append(np.round(1 - np.geomspace(0.7, 0.002, GRID[len(exits)] - 1), 4), NEVER)
    speed, agreed = _histogram(traced, grid)
    best = _staircase(speed, agreed)
    tuples = np.stack(np.unravel_index(best, (len(grid),) * len(exits)), axis=-1)
    settings = []
    for indices in tuples:
        values = grid[indices].tolist()
        checked = tuple(v for v in values if v <= 1)
        if checked:
            settings.append((checked, values))
    return _priced(traced, settings)


def _histogram(traced: Traced, grid: NDArray) -> tuple[NDArray, NDArray]:
    """Predicted speed and agreeing tokens of every tuple, flat."""
    trace = traced.trace
    decoded = trace.real.copy()
    decoded[:, 0] = False  # the first new token belongs to the prompt's pass
    t = tables(trace.exit_layers, traced.chance[decoded], trace.agrees[decoded], grid)
    zero = np.zeros(t.layers.size)
    recompute = traced.kv == "recompute"
    work = Work(
        texts=zero + len(trace.lengths),
        tokens=zero + decoded.sum(),
        layers=t.layers.ravel(),
        cold=_cold(traced, t, decoded.sum()),
        rows=t.skipped.ravel() if recompute else zero,
        doublings=_doublings(t) if recompute else zero,
        readouts=t.readouts.ravel(),
        checks=t.checks.ravel(),
        fills=zero if recompute else t.fills.ravel(),
        stores=zero if recompute else t.blocks.ravel(),
        stored=zero if recompute else t.skipped.ravel(),
    )
    work = work.gated() if traced.gated else work
    return 1 / traced.cost.time(work), t.agreed.ravel()


def _cold(traced: Traced, t: Tables, tokens: int) -> NDArray[np.float64]:
    """As if the layers in front of the first exit came after tokens of average depth."""
    depth = t.layers.ravel() / tokens
    return t.layers.ravel() - traced.exits[0] * tokens * (1 - depth / traced.trace.n_layers)


def _doublings(t: Tables) -> NDArray[np.float64]:
    """As if the rows that wait were spread evenly over the layer calls that find some."""
    waiting = np.divide(t.skipped, t.blocks, out=np.zeros_like(t.blocks), where=t.blocks > 0)
    return (t.blocks * np.log2(1 + waiting)).ravel()


def _staircase(speed: NDArray, agreed: NDArray, most: int = 400) -> NDArray:
    """Indices of the points that no other beats, thinned evenly to about `most`."""
    order = np.lexsort((-agreed, -speed))
    best = np.maximum.accumulate(agreed[order])
    kept = order[np.flatnonzero(np.diff(best, prepend=-1) > 0)]
    return kept[np.unique(np.linspace(0, len(kept) - 1, most).astype(int))]


def _priced(traced: Traced, settings: Sequence[tuple[float | tuple[float, ...], list[float]]]):
    """Candidates of (threshold as asked for, threshold of every exit) pairs."""
    full_s, found = traced.full_depth_s(), []
    for start in range(0, len(settings), AT_ONCE):
        part = settings[start : start + AT_ONCE]
        outcome = traced.simulate(np.array([values for _, values in part]).T)
        seconds = traced.cost.time(outcome.work)
        figures = zip(outcome.mean_depth, outcome.agreement, full_s / seconds, seconds, strict=True)
        for (threshold, values), (depth, agreement, speedup, s) in zip(part, figures, strict=True):
            checked = (e for e, v in zip(traced.exits, values, strict=True) if v <= 1)
            layers = (*checked, traced.trace.n_layers)
            numbers = (depth, agreement, speedup, 1000 * s / outcome.tokens)
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

    For a speed that is the most faithful point that reaches it; for a disagreement, the fastest
    point that keeps to it.
    """
    good = [i for i, c in enumerate(ordered) if target.met(c)]
    if target.by_speed:
        return good[0] if good else len(ordered) - 1
    return good[-1] if good else 0


def spread(ordered: Sequence[Candidate], count: int, keep: int) -> list[int]:
    """Indices of about `count` points, evenly spaced in speed on the front, `keep` among them."""
    speeds = np.array([c.speedup for c in ordered])
    wanted = np.linspace(speeds[0], speeds[-1], count)
    nearest = {int(np.abs(speeds - w).argmin()) for w in wanted}
    return sorted(nearest | {keep})
