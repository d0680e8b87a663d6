"""Finding the point that meets a target when measured, with few and mostly cheap measurements.

Predictions say where to look; what is measured decides. The point that is chosen in the end is
never beside another that may be chosen as well and, as measured, is no worse in either speed or
agreement and better in one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from adaptive_gen.errors import Unreachable
from adaptive_gen.ui import note

from .search import AIM, Candidate, pick, spread
from .target import Target
from .verify import Measured

POINTS = 7  # operating points along the front, besides the ones tried for the target
TRIES = 6  # settings judged before the target counts as out of reach
FURTHER = 3  # judged beyond one that met a disagreement
STEP = 1.01  # how much faster those are predicted to be at least


class Measuring(Protocol):
    """What measures: `verify.Arena`."""

    def look(self, found: Sequence[Candidate]) -> list[Measured]:
        """Many settings, cheaply."""
        ...

    def judge(self, candidate: Candidate, target: Target | None = None) -> Measured:
        """One setting, well."""
        ...


def choose(
    front: Sequence[Candidate], target: Target, arena: Measuring
) -> tuple[Measured, list[Measured]]:
    """Measure points along the front cheaply, then the one for the target well, and its rivals.

    Args:
        front: predicted settings, slowest first.
        target: what to meet.
        arena: where to measure.

    Returns:
        The point that met the target, and all points measured, each once.

    Raises:
        Unreachable: no point met it.
    """
    cheap = arena.look([front[i] for i in spread(front, POINTS, pick(front, target))])
    # What the model of cost and the traces leave out, they leave out everywhere.
    ratio = float(np.median([m.speedup / m.candidate.speedup for m in cheap]))
    gap = float(np.median([m.agreement - m.candidate.agreement for m in cheap]))
    start = pick([corrected(c, ratio / AIM, gap) for c in front], target)
    chosen, tried = seek(front, target, start, arena)
    if chosen is None:
        raise Unreachable(_unreachable(target, together(tried, cheap)))
    if not target.by_speed:
        tried += bolder(front, chosen, [*cheap, *tried], target, arena)
    chosen, rivals = settle(tried, cheap, target, arena)
    return chosen, together([*tried, *rivals], cheap)


def choose_certified(
    front: Sequence[Candidate], certified: Sequence[Candidate], target: Target, arena: Measuring
) -> tuple[Measured, list[Measured]]:
    """The fastest of the certified settings as measured, and points along the front beside it.

    The certificate bears this choice although the prompts are those it was tested on:
    fixed-sequence testing errs with a chance of at most 1 - level in *any* of the settings that it
    certifies, so all their promises hold together, whichever is taken and whatever for.

    Args:
        front: predicted settings, slowest first.
        certified: settings whose risk was certified, slowest predicted first.
        target: a risk.
        arena: where to measure.

    Returns:
        The point, and all points measured, each once.
    """
    shown = [front[i] for i in spread(front, POINTS, 0)]
    allowed = [certified[i] for i in spread(certified, POINTS, len(certified) - 1)]
    cheap = arena.look([*shown, *(c for c in allowed if c not in shown)])
    first = arena.judge(allowed[-1])
    chosen, rivals = settle([first], cheap, target, arena, lambda c: c in certified)
    return chosen, together([first, *rivals], cheap)


def settle(
    tried: Sequence[Measured],
    cheap: Sequence[Measured],
    target: Target,
    arena: Measuring,
    allowed: Callable[[Candidate], bool] = lambda _: True,
) -> tuple[Measured, list[Measured]]:
    """The best of points that meet the target and all their rivals, each measured as well as they.

    A rival is a point that met the target in its cheap measurement and looked as good, see
    `_rivals`. It is taken only if it still meets the target on every prompt. For a disagreement or
    a speed that is a choice by the prompts that the figures are from, as trying one setting after
    another is: the figures are estimates with intervals, and nothing is promised of them. What
    carries a promise is limited by `allowed`, see `choose_certified`.

    Args:
        tried: measured well; at least one of them meets the target.
        cheap: points measured cheaply.
        target: what to meet.
        arena: where to measure.
        allowed: whether a setting may be chosen at all.

    Returns:
        The best point, and the rivals measured well.
    """
    good, rivals = [m for m in tried if target.met(m)], []
    while True:
        best = _best(good, target)
        known = [m.candidate for m in (*tried, *rivals)]
        look = [
            m
            for m in cheap
            if m.candidate not in known
            and allowed(m.candidate)
            and target.met(m)
            and _rivals(m, best, target)
        ]
        if not look:
            return best, rivals
        rival = max(look, key=lambda m: m.speedup).candidate
        note(f"measuring {rival} as well: at a first look it served {target} no worse")
        rivals.append(arena.judge(rival, target))
        if target.met(rivals[-1]):
            good.append(rivals[-1])


def _rivals(cheap: Measured, best: Measured, target: Target) -> bool:
    """Whether a point that meets the target may serve it better than the best so far.

    Where a speed is the target, it has to be as good in both: the first point aims beyond that
    speed for good reason, and one that barely reaches it does so by luck.
    """
    as_fast, as_faithful = cheap.speedup >= best.speedup, cheap.agreement >= best.agreement
    if target.by_speed:
        return as_fast and as_faithful
    return as_fast or (as_faithful and _tied(cheap, best))


def _best(good: Sequence[Measured], target: Target) -> Measured:
    """Of points that meet the target the one that serves it best, which no other of them beats.

    Noise is no reason to give up agreement: of speeds that are tied with the fastest the most
    faithful is taken.
    """
    best = max(good, key=lambda m: (m.agreement, m.speedup))
    if not target.by_speed:
        fastest = max(good, key=lambda m: m.speedup)
        # A tie is no reason to be slower than full depth either, which is as faithful as can be.
        least = min(1.0, fastest.speedup)
        tied = [m for m in good if m.speedup >= least and _tied(m, fastest)]
        best = max(tied, key=lambda m: (m.agreement, m.speedup))
    # Ties are not transitive: what is as fast as this need not be tied with the fastest.
    as_good = [m for m in good if m.speedup >= best.speedup and m.agreement >= best.agreement]
    return max(as_good, key=lambda m: (m.agreement, m.speedup))


def _tied(one: Measured, other: Measured) -> bool:
    """Whether noise may be all that their speeds differ by: each is in the other's interval."""
    (slower, low), (faster, high) = sorted((m.speedup, m.interval) for m in (one, other))
    return faster <= low[1] and slower >= high[0]


def together(well: Sequence[Measured], cheap: Sequence[Measured]) -> list[Measured]:
    """All that were measured, each once and as well as it was."""
    settled = [m.candidate for m in well]
    return [*well, *(m for m in cheap if m.candidate not in settled)]


def corrected(candidate: Candidate, ratio: float, gap: float) -> Candidate:
    """A prediction, moved by how far others were off."""
    return replace(
        candidate,
        speedup=candidate.speedup * ratio,
        latency_ms=candidate.latency_ms / ratio,
        agreement=candidate.agreement + gap,
    )


def seek(
    ordered: Sequence[Candidate], target: Target, start: int, arena: Measuring
) -> tuple[Measured | None, list[Measured]]:
    """Measure along the front from `start` until a point meets the target.

    Each miss tells how far prediction and measurement are apart; the next point is the first one
    that should reach the target if they stay so.

    Args:
        ordered: the front, slowest first.
        target: what to meet.
        start: index of the first point to measure.
        arena: where to measure.

    Returns:
        The point that met the target or None, and every point measured.
    """
    tried: list[Measured] = []
    index = start
    while 0 <= index < len(ordered) and len(tried) < TRIES:
        note(f"measuring {ordered[index]} for {target}")
        measured = arena.judge(ordered[index], target)
        tried.append(measured)
        if target.met(measured):
            return measured, tried
        ratio = measured.speedup / measured.candidate.speedup
        gap = measured.agreement - measured.candidate.agreement
        rest = range(index + 1, len(ordered)) if target.by_speed else range(index - 1, -1, -1)
        hopeful = (i for i in rest if target.met(corrected(ordered[i], ratio, gap)))
        # None looks good enough: the end of the front is the last that could be.
        index = next(hopeful, (rest[-1] if rest else -1))
    return None, tried


def bolder(
    ordered: Sequence[Candidate],
    met: Measured,
    known: Sequence[Measured],
    target: Target,
    arena: Measuring,
) -> list[Measured]:
    """Measure settings that should be faster than one that met the target, and still meet it.

    The way back from misses is made in long steps, and what it ends at may keep more than is asked
    for. What lies between a point that met the target and one that missed it is halved; without a
    miss the fastest is tried that meets the target if it is off as the last that did.

    Args:
        ordered: the front, slowest first.
        met: the one that met the target.
        known: all measured so far, those not worth another look among them.
        target: a disagreement.
        arena: where to measure.

    Returns:
        The points measured, whether or not they met it.
    """
    best, found = met, list[Measured]()
    while len(found) < FURTHER:
        every, least = [*known, *found], best.candidate.speedup
        gap = best.agreement - best.candidate.agreement
        misses = [m.candidate.speedup for m in every if not target.met(m)]
        bound = min((speedup for speedup in misses if speedup > least), default=math.inf)
        hopeful = [
            c
            for c in ordered
            if STEP * least <= c.speedup < bound
            and c not in [m.candidate for m in every]
            and target.met(corrected(c, 1.0, gap))
        ]
        if not hopeful:
            break
        middle = (least + bound) / 2
        candidate = min(hopeful, key=lambda c: abs(c.speedup - min(middle, hopeful[-1].speedup)))
        note(f"measuring {candidate} as well: it should be faster than {best.candidate}")
        found.append(arena.judge(candidate, target))
        if target.met(found[-1]):
            best = found[-1]
    return found


def _unreachable(target: Target, measured: Sequence[Measured]) -> str:
    best = max(measured, key=lambda m: m.speedup if target.by_speed else m.agreement)
    superlative = "fastest" if target.by_speed else "most faithful"
    latency = f", {best.latency_ms:.1f} ms a token," if target.kind == "latency" else ""
    # A best of several looks better than it is, and differs the next time: how sure it is is said.
    low, high = best.interval
    return (
        f"{target} cannot be reached with this model on this device; the {superlative} of "
        f"{len(measured)} settings measured gave {best.speedup:.2f}x (95 % interval {low:.2f} to "
        f"{high:.2f}){latency} at {best.agreement:.0%} agreement over {best.tokens} tokens; "
        f"another run may differ by as much. Ask for {target.easier}, or train the exits further."
    )
