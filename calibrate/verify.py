"""Verification: what predicted settings really do, on prompts the search has not seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_gen.bench import mean_depth
from adaptive_gen.errors import Unreachable
from adaptive_gen.paired import Runs, agreement, interval, measure, wall_speedup
from adaptive_gen.ui import note

from .search import Candidate, Target, pick, spread

POINTS = 7  # operating points along the front, besides the ones tried for the target
FEW = 12  # prompts to measure those with, once
TRIES = 6  # settings measured well before the target counts as out of reach


@dataclass(frozen=True)
class Measured:
    """One setting, predicted and measured."""

    candidate: Candidate
    speedup: float  # tokens per second over full depth, whole calls
    interval: tuple[float, float]  # 95 % bootstrap over prompts
    agreement: float
    mean_depth: float
    tokens: int


def verify(
    model: Any,
    prompts: Sequence[Tensor],
    found: Sequence[Candidate],
    *,
    confidence: str,
    kv: str,
    max_new_tokens: int,
    rounds: int,
    few: bool = False,
) -> list[Measured]:
    """Decode with every setting and at full depth, taking turns, and compare.

    Args:
        model: wrapped, with the calibration whose maps the thresholds refer to.
        prompts: token ids [1, time] each.
        found: settings.
        confidence: the measure that decides.
        kv: "recompute" or "propagate".
        max_new_tokens: texts end there, or earlier by themselves.
        rounds: repetitions.
        few: only the first `FEW` prompts.
    """
    shared = {"adaptive": True, "confidence": confidence, "kv": kv}
    arms: dict[str, dict[str, Any]] = {"full_depth": {**shared, "threshold": 1.0}}
    for i, c in enumerate(found):
        arms[str(i)] = {**shared, "threshold": c.threshold, "exit_layers": list(c.exit_layers)}
    runs = measure(
        model,
        prompts[:FEW] if few else prompts,
        arms,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        description=f"measuring {len(found)} setting{'s' * (len(found) > 1)}",
    )
    return [_judge(model, c, runs[str(i)], runs["full_depth"]) for i, c in enumerate(found)]


def _judge(model: Any, candidate: Candidate, runs: Runs, full: Runs) -> Measured:
    return Measured(
        candidate=candidate,
        speedup=wall_speedup(runs, full),
        interval=interval(runs, full),
        agreement=agreement(model, runs),
        mean_depth=mean_depth(runs),
        tokens=int(runs.new_tokens.sum()),
    )


def choose(
    front: Sequence[Candidate],
    target: Target,
    try_out: Callable[..., list[Measured]],
    rounds: int,
) -> tuple[Measured, list[Measured]]:
    """Measure points along the front cheaply, then the one for the target well.

    Args:
        front: predicted settings, slowest first.
        target: what to meet.
        try_out: `verify` with everything bound but the settings, `rounds` and `few`.
        rounds: repetitions of the good measurement.

    Returns:
        The point that met the target, and all points measured, each once.

    Raises:
        Unreachable: no point met it.
    """
    kept = [front[i] for i in spread(front, POINTS, pick(front, target))]
    cheap = try_out(kept, rounds=1, few=True)
    # What the model of cost and the traces leave out, they leave out everywhere.
    ratio = float(np.median([m.speedup / m.candidate.speedup for m in cheap]))
    gap = float(np.median([m.agreement - m.candidate.agreement for m in cheap]))
    likely = [replace(c, speedup=c.speedup * ratio, agreement=c.agreement + gap) for c in front]

    def well(candidate: Candidate) -> Measured:
        exits = ", ".join(map(str, candidate.exit_layers[:-1]))
        note(f"measuring threshold {candidate.threshold:g} at exit {exits} for {target}")
        return try_out([candidate], rounds=rounds)[0]

    chosen, tried = seek(front, target, pick(likely, target), well)
    if chosen is None:
        raise Unreachable(_unreachable(target, [*cheap, *tried]))
    settled = [m.candidate for m in tried]
    return chosen, [*tried, *(m for m in cheap if m.candidate not in settled)]


def _unreachable(target: Target, measured: Sequence[Measured]) -> str:
    by_speed = target.kind == "speedup"
    best = max(measured, key=lambda m: m.speedup if by_speed else m.agreement)
    superlative = "fastest" if by_speed else "most faithful"
    return (
        f"{target} cannot be reached with this model on this device; the {superlative} setting "
        f"measured gives {best.speedup:.2f}x at {best.agreement:.1%} agreement. Ask for that or "
        "less, or train the exits further."
    )


def seek(
    ordered: Sequence[Candidate],
    target: Target,
    start: int,
    try_out: Callable[[Candidate], Measured],
) -> tuple[Measured | None, list[Measured]]:
    """Measure along the front from `start` until a point meets the target.

    Each miss tells how far prediction and measurement are apart; the next point is the first one
    that should reach the target if they stay so.

    Args:
        ordered: the front, slowest first.
        target: what to meet.
        start: index of the first point to measure.
        try_out: measures one point.

    Returns:
        The point that met the target or None, and every point measured.
    """
    tried: list[Measured] = []
    faster = target.kind == "speedup"
    index = start
    while 0 <= index < len(ordered) and len(tried) < TRIES:
        measured = try_out(ordered[index])
        tried.append(measured)
        if target.met(measured.speedup, measured.agreement):
            return measured, tried
        ratio = measured.speedup / measured.candidate.speedup
        gap = measured.agreement - measured.candidate.agreement
        rest = range(index + 1, len(ordered)) if faster else range(index - 1, -1, -1)
        hopeful = (
            i for i in rest if target.met(ordered[i].speedup * ratio, ordered[i].agreement + gap)
        )
        # None looks good enough: the end of the front is the last that could be.
        index = next(hopeful, (rest[-1] if rest else -1))
    return None, tried
