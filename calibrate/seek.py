"""Finding the point that meets a target when measured, with few and mostly cheap measurements."""

from collections.abc import Sequence
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
    """Measure points along the front cheaply, then the one for the target well.

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
        raise Unreachable(_unreachable(target, [*cheap, *tried]))
    return chosen, together(tried, cheap)


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


def _unreachable(target: Target, measured: Sequence[Measured]) -> str:
    best = max(measured, key=lambda m: m.speedup if target.by_speed else m.agreement)
    superlative = "fastest" if target.by_speed else "most faithful"
    latency = f", {best.latency_ms:.1f} ms a token," if target.kind == "latency" else ""
    return (
        f"{target} cannot be reached with this model on this device; the {superlative} setting "
        f"measured gives {best.speedup:.2f}x{latency} at {best.agreement:.1%} agreement. Ask for "
        "that or less, or train the exits further."
    )
