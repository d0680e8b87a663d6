"""The whole calibration: collect, map, profile, search, measure, and the artefact of it all."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from adaptive_gen.bench import MAX_NEW_TOKENS, environment
from adaptive_gen.calibration import Calibration, ConfidenceMap, OperatingPoint, fingerprint
from adaptive_gen.confidence import DEFAULT, MEASURES
from adaptive_gen.errors import ModelError
from adaptive_gen.prompts import Prompt, digest, inputs
from adaptive_gen.settings import state

from . import maps, search, verify
from .collect import collect
from .cost import Cost
from .profile import profile
from .prompts import halves
from .search import Candidate, Target
from .trace import Trace
from .verify import Measured

Curves = Mapping[str, Mapping[int, ConfidenceMap]]

PROFILE_TOKENS = 40
CLEARLY = 1.01  # how much better another measure must look than the default one


@dataclass(frozen=True)
class Options:
    """How to calibrate."""

    confidence: str = "best"  # a measure, or "best": the one that predicts most here
    kv: str = "recompute"
    max_new_tokens: int = MAX_NEW_TOKENS  # as the benchmark, so that both measure the same
    rounds: int = 3  # of the chosen point's measurement
    seed: int = 0  # which prompts fall into which half


@dataclass(frozen=True)
class Quality:
    """How well one measure tells at one exit which tokens will agree, on unseen prompts."""

    confidence: str
    exit_layer: int
    agreement: float
    auroc: float | None  # None where all agree, or none
    error_before: float  # expected calibration error of the raw confidence
    error_after: float  # and of the mapped one


def run(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], target: Target, options: Options
) -> Calibration:
    """Find, measure and return operating points; afterwards the model uses them.

    Args:
        model: wrapped; its exit layers are the ones considered.
        tokenizer: encodes the prompts.
        prompts: different from each other.
        target: what the default operating point must reach.
        options: how.

    Raises:
        Unreachable: no setting meets the target when measured; the model is as it was.
        AdaptiveGenError: prompts or exits that cannot be used.
    """
    if len(state(model).exit_layers) < 2:
        raise ModelError(
            f"the model has no exit below its {state(model).n_layers} layers, so there is nothing "
            "to calibrate. Give it some with --exit-layers, best those it was trained for."
        )
    before = state(model).calibration
    try:
        found = _run(model, tokenizer, prompts, target, options)
    except BaseException:
        state(model).calibration = before
        raise
    state(model).calibration = found
    return found


def _run(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], target: Target, options: Options
) -> Calibration:
    # A former calibration must not colour this one: traces and timing are of the raw model.
    state(model).calibration = None
    halved = halves(prompts, options.seed)
    search_ids, verify_ids = (inputs(model, tokenizer, h, options.max_new_tokens) for h in halved)
    both = collect(
        model, [*search_ids, *verify_ids], state(model).exit_layers, options.max_new_tokens
    )
    trace, unseen = both.split(len(search_ids))
    curves = {m: _curves(trace, m) for m in MEASURES}
    cost = _profile(model, search_ids, options)
    measure, front = _search(trace, curves, cost, target, options, state(model).queue_cap)
    recipe = {
        **environment(model),
        "target": {target.kind: target.value},
        **dataclasses.asdict(options),
        "prompts": len(prompts),
        "prompts_sha256": digest(prompts),
        "tokens_traced": both.tokens,
        "cost": dataclasses.asdict(cost),
        "quality": [dataclasses.asdict(row) for row in _qualities(unseen, curves)],
    }
    draft = Calibration(
        n_layers=trace.n_layers,
        confidence=measure,
        kv=options.kv,
        maps=curves,
        points=(),
        default=0,
        fingerprint=fingerprint(model, state(model).backend.name),
        recipe=recipe,
    )
    return _measured(model, verify_ids, draft, front, target, options)


def _measured(
    model: Any,
    prompts: Sequence[Any],
    draft: Calibration,
    front: list[Candidate],
    target: Target,
    options: Options,
) -> Calibration:
    """The draft with operating points that were measured, the default one meeting the target."""
    state(model).calibration = draft  # thresholds mean what its maps say
    try_out = partial(
        verify.verify,
        model,
        prompts,
        confidence=draft.confidence,
        kv=draft.kv,
        max_new_tokens=options.max_new_tokens,
    )
    chosen, measured = verify.choose(front, target, try_out, rounds=options.rounds)
    measured.sort(key=lambda m: m.speedup)
    return dataclasses.replace(
        draft,
        points=tuple(_point(m, draft.n_layers) for m in measured),
        default=measured.index(chosen),
    )


def _profile(model: Any, prompts: Sequence[Any], options: Options) -> Cost:
    return profile(
        model,
        prompts,
        state(model).exit_layers,
        kv=options.kv,
        measure=DEFAULT if options.confidence == "best" else options.confidence,
        tokens=min(PROFILE_TOKENS, options.max_new_tokens),
    )


def _curves(trace: Trace, measure: str) -> dict[int, ConfidenceMap]:
    exits = enumerate(trace.exit_layers[:-1])
    return {exit_layer: maps.fit(*trace.at(measure, k)) for k, exit_layer in exits}


def _search(
    trace: Trace,
    curves: Curves,
    cost: Cost,
    target: Target,
    options: Options,
    queue_cap: int,
) -> tuple[str, list[Candidate]]:
    """The measure to use and its front: the one that is predicted to serve the target best."""
    names = list(MEASURES) if options.confidence == "best" else [options.confidence]
    best: tuple[tuple[bool, float], str, list[Candidate]] | None = None
    for name in names:
        found = search.candidates(
            trace, curves[name], name, cost, kv=options.kv, queue_cap=queue_cap
        )
        front = search.front(found)
        point = front[search.pick(front, target)]
        served = point.agreement if target.kind == "speedup" else point.speedup
        met = target.met(point.speedup, point.agreement)
        if best is None or (met, served) > (best[0][0], best[0][1] * CLEARLY):
            best = ((met, served), name, front)
    assert best is not None
    return best[1:]


def _point(measured: Measured, n_layers: int) -> OperatingPoint:
    c = measured.candidate
    return OperatingPoint(
        threshold=c.threshold,
        exit_layers=c.exit_layers,
        mean_depth=measured.mean_depth,
        layer_speedup=n_layers / measured.mean_depth,
        agreement=measured.agreement,
        predicted_speedup=c.speedup,
        wall_speedup=measured.speedup,
        wall_speedup_interval=measured.interval,
        tokens=measured.tokens,
    )


def _qualities(trace: Trace, curves: Curves) -> list[Quality]:
    rows = []
    for measure in curves:
        for k, exit_layer in enumerate(trace.exit_layers[:-1]):
            raw, agrees = trace.at(measure, k)
            mapped = maps.apply(curves[measure][exit_layer], raw)
            rows.append(
                Quality(
                    confidence=measure,
                    exit_layer=exit_layer,
                    agreement=float(agrees.mean()),
                    auroc=maps.auroc(raw, agrees),
                    error_before=maps.calibration_error(raw, agrees),
                    error_after=maps.calibration_error(mapped, agrees),
                )
            )
    return rows
