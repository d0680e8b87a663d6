"""The stages of a calibration as commands, each reading what the ones before it left in --work."""

import os
from typing import Any

from adaptive_gen import exits, ui
from adaptive_gen.errors import CalibrationError
from adaptive_gen.options import Json, Model, load_model

from . import choices


def collect(
    work: choices.Work,
    model: Model = None,
    prompts: choices.Prompts = None,
    exit_layers: choices.ExitLayers = None,
    kv: choices.Kv = "recompute",
    max_new_tokens: choices.MaxNewTokens = 64,
    seed: choices.Seed = 0,
) -> None:
    """Stage 1: full-depth texts, and what every exit would have said along them."""
    choices.check("--kv", kv, choices.KV)
    choices.check_length(max_new_tokens)
    layers = exits.parse(exit_layers) if exit_layers is not None else None
    from .prompts import prompt_set

    asked = prompt_set(prompts)
    loaded, tokenizer = load_model(model, exit_layers=layers, calibration=False)
    from .stages import Options, collect_stage, job
    from .store import Store

    options = Options(kv=kv, max_new_tokens=max_new_tokens, seed=seed)
    store = Store(work, job(loaded, tokenizer, asked, options))
    trace = collect_stage(loaded, tokenizer, asked, options, store)
    if os.environ.get("RANK", "0") == "0":
        ui.note(f"{trace.tokens} tokens of {len(trace.lengths)} texts in {work}")


def profile(work: choices.Work, model: Model = None) -> None:
    """Stage 2: what layers, waiting rows and readouts cost on this device."""
    session = _open(work, model)
    from .stages import profile_stage

    cost = profile_stage(session.model, session.trace, session.options, session.store)
    rows = [(term, 1000 * seconds) for term, seconds in cost.seconds.items()]
    ui.table("milliseconds", ("term", "each"), rows)
    ui.note(f"largest error on the timed runs: {cost.residual:.1%}")


def search(
    work: choices.Work,
    model: Model = None,
    target_speedup: choices.TargetSpeedup = None,
    latency_ms: choices.LatencyMs = None,
    max_disagreement: choices.MaxDisagreement = None,
    max_risk: choices.MaxRisk = None,
    confidence_level: choices.Level = None,
    loss: choices.Loss = None,
    thresholds: choices.Thresholds = "single",
    confidence: choices.Confidence = "best",
) -> None:
    """Stage 3: which exits to check, and at which threshold."""
    aim = choices.target(target_speedup, latency_ms, max_disagreement, max_risk)
    promised = choices.promised(aim[0], loss, confidence_level)
    choices.check("--thresholds", thresholds, choices.THRESHOLDS)
    choices.check("--confidence", confidence, choices.MEASURES)
    chosen = {**promised, "thresholds": thresholds}
    session = _open(work, model, confidence=confidence, **chosen)
    from .stages import gate_stage, search_stage
    from .target import Target

    asked = Target(*aim)
    found = search_stage(
        session.model,
        gate_stage(session.model, session.trace, asked, session.options, session.store),
        session.cost,
        asked,
        session.options,
        session.store,
    )
    ui.note(f"{len(found.front)} settings on the front, by {found.measure}")


def replay(work: choices.Work, model: Model = None) -> None:
    """Stage 4: what every setting of the front loses, without generating."""
    session = _open(work, model)
    from .stages import replay_stage

    front, means = replay_stage(
        session.model, session.trace, session.found, session.options, session.store
    )
    rows = [(str(c), c.speedup, mean) for c, mean in zip(front, means, strict=True)]
    ui.table("replayed", ("setting", "predicted", "mean loss"), rows)


def certify(work: choices.Work, model: Model = None) -> None:
    """Stage 5: the settings whose risk can be promised."""
    session = _open(work, model)
    from .stages import certify_stage

    session.use_draft()
    steps = certify_stage(
        session.model,
        session.tokenizer,
        session.trace,
        session.found,
        session.replayed,
        session.options,
        session.store,
    )
    rows = [(str(s.candidate), s.risk, s.p_value, s.certified) for s in steps]
    ui.table("tested in this order", ("setting", "mean loss", "p-value", "certified"), rows)


def verify(
    work: choices.Work, model: Model = None, out: choices.Out = None, as_json: Json = False
) -> None:
    """Stage 6: measure the settings on prompts not searched on, and write calibration.json."""
    directory = choices.home(out, model)
    session = _open(work, model)
    from . import install, tables
    from .finish import verify_stage
    from .worth import Slower

    session.use_draft()
    try:
        found = verify_stage(
            session.model,
            session.tokenizer,
            session.trace,
            session.found,
            session.steps if session.found.promise is not None else [],
            session.options,
            session.store,
        )
    except Slower as error:
        install.refuse(error, directory, work, as_json)
    install.write(found, directory, work)
    tables.show(found, as_json)


COMMANDS = (collect, profile, search, replay, certify, verify)


def _open(work: Any, model: str | None, **changes: Any) -> Any:
    """The calibration in `work` with its model.

    Raises:
        CalibrationError: nothing was collected there, or from another model.
    """
    from .session import Session
    from .store import Store

    store = Store(work)
    loaded, tokenizer = load_model(model, exit_layers=store.job["exit_layers"], calibration=False)
    session = Session(loaded, tokenizer, store, changes)
    if session.differing:
        raise CalibrationError(
            f"{work} was collected from another {' and '.join(session.differing)}. Name the same "
            "model, or another directory with --work."
        )
    return session
