"""The stages of a calibration, each a function of what the ones before it found.

    collect -> profile -> search -> replay -> certify -> verify

Every stage keeps its result in the store; the commands of the same names run one of them, and
`calibrate run` all.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_gen.bench import MAX_NEW_TOKENS
from adaptive_gen.calibration import fingerprint
from adaptive_gen.confidence import DEFAULT, GATE
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.prompts import Prompt, digest, inputs
from adaptive_gen.settings import state
from adaptive_gen.ui import note

from . import certify as certification
from . import losses, maps, quality, search, worth
from . import trace as traces
from .collect import SHARD, collect
from .cost import Cost
from .found import Found
from .gate import with_gate
from .profile import profile
from .prompts import ordered
from .search import Traced
from .store import Store
from .target import Target
from .trace import Trace

PROFILE_TOKENS = 40  # a context as long as in use, and full queues that force deep passes
CLEARLY = 1.01  # how much better another measure must look than the default one
# Share of the prompts to search on. A certificate needs many prompts that nothing has seen.
SEARCHED = {"risk": 0.4}
HALF = 0.5


@dataclass(frozen=True)
class Options:
    """How to calibrate."""

    confidence: str = "best"  # a measure, or "best": the one that predicts most here
    kv: str = "recompute"
    max_new_tokens: int = MAX_NEW_TOKENS  # as the benchmark, so that both measure the same
    rounds: int = 3  # of the chosen point's measurement
    seed: int = 0  # the order of the prompts, and so which are searched on
    thresholds: str = "single"  # or "per-exit"
    loss: str = "prefix"  # of a certificate
    level: float = 0.95  # of a certificate
    least_gain: float | None = None  # to go on with a prediction; None is worth.LEAST_GAIN

    def __post_init__(self) -> None:
        """Check what goes together.

        Raises:
            OptionError: a gate is asked for where none can be replayed.
        """
        if self.confidence == GATE and self.kv == "propagate":
            raise OptionError(
                "--confidence gate cannot be calibrated with --kv propagate; leave one of them out."
            )


def job(model: Any, tokenizer: Any, prompts: Sequence[Prompt], options: Options) -> dict[str, Any]:
    """What makes collected traces usable for a run: the same job, the same traces.

    Raises:
        ModelError: there is no exit to calibrate.
    """
    wrapped = state(model)
    if len(wrapped.exit_layers) < 2:
        raise ModelError(
            f"the model has no exit below its {wrapped.n_layers} layers, so there is nothing "
            "to calibrate. Give it some with --exit-layers, best those it was trained for."
        )
    return {
        "fingerprint": fingerprint(model, wrapped.backend.name, tokenizer),
        "exit_layers": list(wrapped.exit_layers),
        "queue_cap": wrapped.queue_cap,
        "prompts": len(prompts),
        "prompts_sha256": digest(prompts),
        "kv": options.kv,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "shard": SHARD,
    }


def collect_stage(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], options: Options, store: Store
) -> Trace:
    """Full-depth texts and what every exit would have said along them."""
    ids = inputs(model, tokenizer, ordered(prompts, options.seed), options.max_new_tokens)
    found = collect(model, ids, state(model).exit_layers, options.max_new_tokens, store.directory)
    traces.save(found, store.directory / "traces.npz")
    return found


def prompt_ids(trace: Trace, model: Any) -> list[Tensor]:
    """Token ids [1, time] of the prompts that the texts began with."""
    pairs = zip(trace.texts, trace.lengths.tolist(), strict=True)
    return [torch.from_numpy(text[:-new])[None].to(model.device) for text, new in pairs]


def profile_stage(model: Any, trace: Trace, options: Options, store: Store) -> Cost:
    """What layers, rows and readouts cost on this device."""
    found = profile(
        model,
        prompt_ids(trace.take(slice(0, 16)), model),
        trace.exit_layers,
        kv=options.kv,
        # The gate is yet to be fitted; its price follows from the others', see `Traced`.
        measure=DEFAULT if options.confidence in ("best", GATE) else options.confidence,
        tokens=min(PROFILE_TOKENS, options.max_new_tokens),
    )
    store.write("cost", asdict(found))
    return found


def searched_on(trace: Trace, target: Target) -> int:
    """How many of the first texts the search sees."""
    return round(len(trace.lengths) * SEARCHED.get(target.kind, HALF) + 1e-9)


def gate_stage(model: Any, trace: Trace, target: Target, options: Options, store: Store) -> Trace:
    """Fit a gate where one may be chosen; the trace with its confidence as one more measure."""
    # The replay of `propagate` reads confidences off other hidden states, and off logits alone.
    if options.confidence not in ("best", GATE) or options.kv == "propagate":
        return trace
    gate, trace = with_gate(model, trace, searched_on(trace, target))
    state(model).gate = gate
    gate.save(store.directory, "--work")
    traces.save(trace, store.directory / "traces.npz")
    return trace


def search_stage(
    model: Any, trace: Trace, cost: Cost, target: Target, options: Options, store: Store
) -> Found:
    """The measure to use and its front, the one predicted to serve the target best.

    Raises:
        DataError: too few prompts for what is to be certified.
        Unreachable: adaptive depth is predicted not to pay here.
    """
    searched, promise = searched_on(trace, target), None
    if target.kind == "risk":
        promise = certification.Promise(target.value, options.level, options.loss)
        promise.check_enough(len(trace.lengths) - searched)
    seen, unseen = trace.split(searched)
    curves = {m: curves_of(seen, m) for m in seen.confidence}
    names = list(curves) if options.confidence == "best" else [options.confidence]
    best: tuple[tuple[bool, float], str, list[search.Candidate], search.Placement] | None = None
    for name in names:
        traced = Traced.of(seen, curves[name], name, cost, options.kv, state(model).queue_cap)
        dial = search.candidates(traced)
        front = search.front(dial if options.thresholds == "single" else search.per_exit(traced))
        # A risk is judged later; until then the middle of the road stands for it.
        aim = Target("disagreement", target.value / 4) if target.kind == "risk" else target
        point = front[search.pick(front, aim)]
        served = point.agreement if target.by_speed else point.speedup
        met = aim.met(point)
        if best is None or (met, served) > (best[0][0], best[0][1] * CLEARLY):
            best = ((met, served), name, front, search.placement(dial))
    assert best is not None
    _, measure, front, placement = best
    worth.check(front, target, cost, seen, options.least_gain)
    quality = tuple(asdict(row) for row in maps.qualities(unseen, curves))
    found = Found(target, promise, measure, curves, tuple(front), searched, quality, placement)
    store.write("search", found.document())
    return found


def replay_stage(
    model: Any, trace: Trace, found: Found, options: Options, store: Store
) -> tuple[list[search.Candidate], list[float]]:
    """Mean loss of every setting of the front on the texts it was searched on."""
    seen, _ = trace.split(found.searched)
    if options.kv == "propagate":
        # Every setting costs a pass over all texts: a choice of them has to do.
        keep = search.spread(found.front, 2 * certification.MOST_STEPS, 0)
        front = [found.front[i] for i in keep]
    else:
        front = list(found.front)
    # What a replay cannot tell is put in order by the loss nearest to it.
    name = "exact" if options.loss in ("exact", "em") else "prefix"
    means = [
        float(losses.replayed(model, seen, found.rule(c), name, options.kv).mean()) for c in front
    ]
    store.write("replay", {"front": [asdict(c) for c in front], "loss": name, "means": means})
    return front, means


def certify_stage(
    model: Any,
    tokenizer: Any,
    trace: Trace,
    found: Found,
    estimates: tuple[Sequence[search.Candidate], Sequence[float]],
    options: Options,
    store: Store,
) -> list[certification.Step]:
    """Test settings, careful ones first, on texts that nothing has seen.

    Raises:
        OptionError: the search was for no risk.
    """
    promise = found.promise
    if promise is None:
        raise OptionError(
            "there is nothing to certify: the search was for no risk. Run `calibrate search` with "
            "--max-risk."
        )
    _, unseen = trace.split(found.searched)
    order = certification.sequence(*estimates, promise.max_risk)
    judge = losses_of(model, tokenizer, unseen, found, options)
    steps = certification.certify(order, judge, promise)
    good = [s for s in steps if s.certified]
    if good:
        note(f"certified {len(good)} of {len(steps)} settings tested; fastest {good[-1].candidate}")
    store.write("certify", [asdict(step) for step in steps])
    return steps


def losses_of(
    model: Any, tokenizer: Any, trace: Trace, found: Found, options: Options
) -> Callable[[search.Candidate], NDArray[np.float64]]:
    """What a setting loses on each of the texts [texts], by the loss that is to be certified.

    Args:
        model: wrapped, with the `draft` as its calibration where the loss takes decoding.
        tokenizer: the model's.
        trace: of the texts.
        found: by the search.
        options: name the loss.
    """

    def judged(candidate: search.Candidate) -> NDArray[np.float64]:
        rule = found.rule(candidate)
        if options.loss in losses.REPLAYED:
            return losses.replayed(model, trace, rule, options.loss, options.kv)
        settings = {"kv": options.kv, "max_new_tokens": options.max_new_tokens}
        pairs = losses.decoded(model, trace, candidate, rule, **settings)
        loss = quality.losses(tokenizer)[options.loss]
        return np.array([loss(*pair) for pair in pairs])

    return judged


def curves_of(trace: Trace, measure: str) -> dict[int, Any]:
    """Exit layer -> confidence map of one measure."""
    exits = enumerate(trace.exit_layers[:-1])
    return {exit_layer: maps.fit(*trace.at(measure, k)) for k, exit_layer in exits}
