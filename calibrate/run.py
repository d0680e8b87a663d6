"""The whole calibration, stage by stage."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_gen.calibration import Calibration
from adaptive_gen.prompts import Prompt
from adaptive_gen.settings import state

from .finish import draft, verify_stage
from .stages import (
    Options,
    certify_stage,
    collect_stage,
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
        Unreachable: no setting meets the target when measured; the model is as it was.
        AdaptiveGenError: prompts or exits that cannot be used.
    """
    asked = job(model, tokenizer, prompts, options)
    before = state(model).calibration
    try:
        if work is not None:
            return _run(model, tokenizer, prompts, target, options, Store(work, asked))
        with tempfile.TemporaryDirectory() as directory:
            store = Store(Path(directory), asked)
            return _run(model, tokenizer, prompts, target, options, store)
    except BaseException:
        state(model).calibration = before
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
    state(model).calibration = None
    trace = collect_stage(model, tokenizer, prompts, options, store)
    cost = profile_stage(model, trace, options, store)
    found = search_stage(model, trace, cost, target, options, store)
    state(model).calibration = draft(model, trace, found, cost, options, store.job)
    steps = []
    if found.promise is not None:
        estimates = replay_stage(model, trace, found, options, store)
        steps = certify_stage(model, trace, found, estimates, options, store)
    return verify_stage(model, tokenizer, trace, found, steps, options, store)
