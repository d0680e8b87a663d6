"""The last stage: measure what was found on prompts it was not found on, and write it all down."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from adaptive_gen import calibration as artefact
from adaptive_gen.bench import environment
from adaptive_gen.calibration import Calibration, OperatingPoint
from adaptive_gen.confidence import GATE, MEASURES
from adaptive_gen.settings import state

from . import batches, evidence, quality, seek, worth
from . import certify as certification
from .cost import Cost
from .found import Found
from .stages import Options, prompt_ids
from .store import Store
from .trace import Trace
from .verify import Arena, Measured


def draft(
    model: Any, trace: Trace, found: Found, cost: Cost, options: Options, job: Any
) -> Calibration:
    """The calibration without its points: what gives thresholds their meaning."""
    recipe = {
        **environment(model),
        "target": {found.target.kind: found.target.value},
        **dataclasses.asdict(options),
        **{name: job[name] for name in ("prompts", "prompts_sha256")},
        "tokens_traced": trace.tokens,
        "searched": found.searched,
        "cost": dataclasses.asdict(cost),
        "quality": list(found.quality),
    }
    gate = state(model).gate if found.measure == GATE else None
    made_on = {**job["fingerprint"], "kv": options.kv, "decoding": "greedy"}
    return Calibration(
        n_layers=trace.n_layers,
        confidence=found.measure,
        kv=options.kv,
        maps={m: by_exit for m, by_exit in found.curves.items() if m in (*MEASURES, found.measure)},
        points=(),
        default=0,
        fingerprint=made_on if gate is None else {**made_on, "gate": gate.digest},
        recipe=recipe,
        placement=found.placement,
    )


def verify_stage(
    model: Any,
    tokenizer: Any,
    trace: Trace,
    found: Found,
    steps: Sequence[certification.Step],
    options: Options,
    store: Store,
) -> Calibration:
    """Measured operating points, the default one meeting the target; the model uses them.

    Args:
        model: wrapped, with the `draft` as its calibration.
        tokenizer: decodes texts for the report and for losses of what they say.
        trace: of all prompts.
        found: by the search.
        steps: of the certification; empty where nothing was to be certified.
        options: how.
        store: gets the evidence for the report.

    Raises:
        Unreachable: no setting meets the target; as `Slower`, with what was measured, where the
            one that does is slower than full depth.
    """
    base = state(model).calibration
    assert base is not None
    _, unseen = trace.split(found.searched)
    prompts = prompt_ids(unseen, model)
    arena = Arena(
        model,
        prompts,
        found.measure,
        options.kv,
        options.max_new_tokens,
        options.rounds,
        quality.losses(tokenizer),
    )
    promise, certificate = found.promise, None
    if promise is None:
        chosen, measured = seek.choose(found.front, found.target, arena)
    else:
        good = {s.candidate: s for s in certification.certified(steps, promise, len(prompts))}
        chosen, measured = seek.choose_certified(found.front, list(good), found.target, arena)
        step = good[chosen.candidate]
        certificate = certification.certificate(
            steps,
            step,
            promise,
            len(prompts),
            options.max_new_tokens,
            decoded_risk=chosen.quality[promise.loss][0],
        )
    measured.sort(key=lambda m: m.speedup)
    points = [_point(m, trace.n_layers) for m in measured]
    default = measured.index(chosen)
    points[default] = dataclasses.replace(points[default], certificate=certificate)
    gains = {1: chosen.speedup}
    result = dataclasses.replace(base, points=tuple(points), default=default, batches=gains)
    store.write("evidence", evidence.gather(tokenizer, unseen, found, chosen, arena))
    worth.check_measured(result, found.target, options.least_gain)
    gains |= batches.gains(model, prompts, arena.settings(chosen.candidate), options.max_new_tokens)
    state(model).calibration = result
    artefact.save(result, store.directory, "--work")
    return result


def _point(measured: Measured, n_layers: int) -> OperatingPoint:
    c = measured.candidate
    return OperatingPoint(
        threshold=c.dial,
        exit_layers=c.exit_layers,
        mean_depth=measured.mean_depth,
        layer_speedup=n_layers / measured.mean_depth,
        agreement=measured.agreement,
        predicted_speedup=c.speedup,
        wall_speedup=measured.speedup,
        wall_speedup_interval=measured.interval,
        tokens=measured.tokens,
        latency_ms=measured.latency_ms,
        decode_speedup=measured.decode_speedup,
        quality=measured.quality,
    )
