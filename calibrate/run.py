"""The whole calibration, stage by stage."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_gen.calibration import Calibration
from adaptive_gen.prompts import Prompt
from adaptive_gen.settings import state
from adaptive_gen.ui import note

from .finish import draft, verify_stage
from .stages import (
    Options,
    certify_stage,
    collect_stage,
    gate_stage,
    job,
    profile_stage,
    replay_stage,
    search_stage,
)
from .store import Store
from .target import Target

__all__ = ["Options", "Target", "run"]


def run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    target: Target,
    options: Options,
    work: Path | None = None,
) -> Calibration:
    """Find, measure and return operating points; afterwards the model uses them.

    Args:
        model: wrapped; its exit layers are the ones considered.
        tokenizer: encodes the prompts.
        prompts: different from each other.
        target: what the default operating point must reach.
        options: how.
        work: where stages keep what they found; what lies there of the same job is used again.

    Raises:
        Unreachable: no setting meets the target when measured, or the one that does is slower than
            full depth (`worth.Slower`, which has the figures); the model is as it was.
        AdaptiveGenError: prompts or exits that cannot be used.
    """
    asked = job(model, tokenizer, prompts, options)
    before, gate = state(model).calibration, state(model).gate
    try:
        if work is not None:
            return _run(model, tokenizer, prompts, target, options, Store(work, asked))
        with tempfile.TemporaryDirectory() as directory:
            store = Store(Path(directory), asked)
            return _run(model, tokenizer, prompts, target, options, store)
    except BaseException:
        state(model).calibration, state(model).gate = before, gate
        raise


def _run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    target: Target,
    options: Options,
    store: Store,
) -> Calibration:
    # A former calibration must not colour this one: traces and timing are of the raw model.
    state(model).calibration = state(model).gate = None
    lap = Lap()
    trace = collect_stage(model, tokenizer, prompts, options, store)
    lap("collect")
    cost = profile_stage(model, trace, options, store)
    lap("profile")
    trace = gate_stage(model, trace, target, options, store)
    lap("gate")
    found = search_stage(model, trace, cost, target, options, store)
    state(model).calibration = draft(model, trace, found, cost, options, store.job)
    lap("search")
    steps = []
    if found.promise is not None:
        estimates = replay_stage(model, trace, found, options, store)
        lap("replay")
        steps = certify_stage(model, tokenizer, trace, found, estimates, options, store)
        lap("certify")
    result = verify_stage(model, tokenizer, trace, found, steps, options, store)
    lap("verify")
    lap.tell()
    return result


class Lap:
    """Seconds that each stage took."""

    def __init__(self):
        """Start the clock."""
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def __call__(self, stage: str) -> None:
        """A stage has ended."""
        now = time.perf_counter()
        self._seconds[stage] = now - self._last
        self._last = now

    def tell(self) -> None:
        """Say where the time went."""
        note("; ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self._seconds.items()))
