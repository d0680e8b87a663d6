"""The keywords of `generate(adaptive=True, ...)`, turned into what the engine runs with.

They travel as fields of transformers' `GenerationConfig`, so transformers itself merges, copies and
saves them; here they are checked and completed from the calibration.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import confidence as measures
from . import exits
from .calibration import Calibration, OperatingPoint
from .certificate import Certificate
from .confidence import Confidences
from .coverage import coverage
from .decoder import Decoder
from .engine.backend import Backend
from .engine.rules import KV_POLICIES, PREFILLS, QUEUE_CAP, Rules
from .errors import CalibrationError, ModelError, OptionError
from .gate import Gate
from .keywords import (
    check_audit_floor,
    check_policy,
    check_speedup,
    check_switch,
    check_threshold,
)
from .policy import ExitPolicy, FixedExit, NeverExit, ThresholdPolicy

log = logging.getLogger("adaptive_gen")

DEFAULT_THRESHOLD = 0.9
# Keywords of ours that `generate` accepts; None means "not said".
FIELDS = (
    "adaptive",
    "threshold",
    "target_speedup",
    "confidence",
    "kv",
    "lossless",
    "audit",
    "audit_floor",
    "prefill",
    "schedule",
    "exit_layers",
    "policy",
)
SWITCHES = ("adaptive", "lossless", "audit")
_ATTRIBUTE = "_adaptive_gen_state"
# Runs of the first segment between the turns of the deeper ones, by schedule.
SCHEDULES = {"stepwise": 1, "lockstep": 4}


@dataclass
class State:
    """What a wrapped model carries besides its own weights."""

    decoder: Decoder
    backend: Backend
    exit_layers: tuple[int, ...]  # normalised: full depth last
    calibration: Calibration | None = None
    queue_cap: int = QUEUE_CAP
    gate: Gate | None = None
    measured_here: bool = True  # whether the calibration's figures are of what runs here
    told: set[str] = field(default_factory=set)

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return self.decoder.n_layers

    def tell_once(self, message: str) -> None:
        """Log a warning the first time it comes up with this model."""
        if message not in self.told:
            self.told.add(message)
            log.warning(message)


def attach(model: Any, state: State) -> None:
    """Store `state` on `model`, where `state(model)` finds it."""
    setattr(model, _ATTRIBUTE, state)


def state(model: Any) -> State:
    """What `wrap` stored on `model`; raises `ModelError` if it is not wrapped."""
    found = getattr(model, _ATTRIBUTE, None)
    if found is None:
        raise ModelError(
            f"this {type(model).__name__} is not wrapped; call adaptive_gen.wrap(model) first."
        )
    return found


@dataclass(frozen=True)
class Settings:
    """One call's choices, complete."""

    exit_layers: tuple[int, ...]
    policy: ExitPolicy
    confidences: Confidences
    rules: Rules
    lossless: bool = False
    audit: bool = False
    audit_floor: float | None = None
    certificate: Certificate | None = None  # of the operating point, if our keywords leave it
    changed: tuple[str, ...] = ()  # our keywords that withdraw it
    unchecked: str = ""  # why no exit is checked although the calibration has some

    @property
    def kv(self) -> str:
        """How skipped layers get their K/V; "recompute" where none is skipped."""
        return self.rules.kv


def resolve(config: Any, state: State, rows: int = 1) -> Settings:
    """Check the adaptive fields of a generation config and complete them.

    Args:
        config: any object with the attributes `FIELDS`, each possibly None or absent.
        state: the wrapped model's.
        rows: texts that are generated together.

    Raises:
        OptionError: a value out of range, or two that exclude each other.
        CalibrationError: `target_speedup` without a calibration.
        Unreachable: `target_speedup` beyond every operating point.
    """
    given = {name: getattr(config, name, None) for name in FIELDS}
    for name in SWITCHES:
        check_switch(name, given[name])
    if sum(given[name] is not None for name in ("threshold", "target_speedup", "policy")) > 1:
        raise OptionError(
            "threshold, target_speedup and policy each decide when to exit; give one of them."
        )
    calibration = state.calibration
    point = _operating_point(given, calibration)
    layers, unchecked, thrifty = _checked(given, point, state, rows)
    if given["policy"] is not None:
        check_policy(given["policy"], layers)
    audit_floor = check_audit_floor(given["audit_floor"])
    policy = given["policy"] or _threshold_policy(given["threshold"], point, layers, state)
    certificate, changed = coverage(calibration, point, given, layers)
    if unchecked:
        policy = NeverExit()
    if isinstance(policy, ThresholdPolicy | NeverExit | FixedExit):  # the same at every position
        # Layers between which nothing is asked run as one segment: each segment has its price.
        layers = tuple(e for e in layers if e == layers[-1] or policy.may_exit(e, 0))
    rules, lossless = replace(_rules(given, state), thrifty=thrifty), bool(given["lossless"])
    if len(layers) == 1:
        # Nothing can leave, so nothing is drafted and nothing ever waits: what such texts would be
        # decoded by is slower, several of them above all, and comes to the same.
        plain = {"kv": KV_POLICIES[0], "prefill": PREFILLS[0], "read_drafts": False}
        rules, lossless = replace(rules, **plain), False
    return Settings(
        exit_layers=layers,
        policy=policy,
        confidences=_confidences(given["confidence"], layers, state),
        rules=rules,
        lossless=lossless,
        audit=bool(given["audit"]) or audit_floor is not None,
        audit_floor=audit_floor,
        certificate=certificate,
        changed=changed,
        unchecked=unchecked,
    )


def _checked(
    given: Mapping[str, Any], point: OperatingPoint | None, state: State, rows: int
) -> tuple[tuple[int, ...], str, bool]:
    """The exits to check, full depth last; why none if they would not pay; whether to find out.

    The caller's `exit_layers` are checked whatever they cost, and so are exits with thresholds of
    their own and what a policy asks. Else a calibrated point brings its own, and at one threshold
    for all the calibration knows which exits are worth their readouts. Where nothing was measured,
    the text has to show it (`engine.thrift`).
    """
    calibration, threshold = state.calibration, given["threshold"]
    if given["exit_layers"] is not None:
        return exits.normalise(given["exit_layers"], state.n_layers), "", False
    if given["policy"] is not None or isinstance(threshold, Mapping):
        return state.exit_layers, "", False
    never_or_always = threshold in (0, 1)  # which promise just that
    if calibration is None:
        return state.exit_layers, "", not never_or_always
    if point is not None:
        return point.exit_layers, calibration.unpaid(rows), False
    asked_for = ("confidence", "kv", "lossless", "audit", "audit_floor", "prefill")
    if not isinstance(threshold, float) or any(given[name] for name in asked_for):
        # They are priced otherwise than the placement is.
        return state.exit_layers, "", not never_or_always
    placed = calibration.placed(threshold)
    if placed is None:
        return state.exit_layers, "", not never_or_always
    if not placed:
        reason = f"exits are not checked: at threshold {threshold:g} none is predicted to pay"
        return state.exit_layers, f"{reason}; exit_layers=[...] checks them all the same", False
    return (*placed, state.n_layers), calibration.unpaid(rows), False


def _rules(given: Mapping[str, Any], state: State) -> Rules:
    """How tokens move through the queues."""
    for name, known in (("kv", KV_POLICIES), ("prefill", PREFILLS), ("schedule", SCHEDULES)):
        if given[name] is not None and given[name] not in known:
            raise OptionError(f"{name}={given[name]!r} is unknown; use one of {', '.join(known)}.")
    audited = given["audit"] or given["audit_floor"] is not None
    if given["lossless"] and audited:
        raise OptionError(
            "lossless=True already lets full depth check every token; leave audit out."
        )
    exact = {"lossless": given["lossless"], "audit": audited, "prefill": given["prefill"] == "lazy"}
    needing = next((name for name, asked in exact.items() if asked), None)
    kv = given["kv"] or (state.calibration.kv if state.calibration else KV_POLICIES[0])
    if needing and given["kv"] == "propagate":
        raise OptionError(
            f"{needing} needs the full-depth states of all tokens, which kv='propagate' never "
            "computes; leave one of the two out."
        )
    return Rules(
        kv="recompute" if needing else kv,
        queue_cap=state.queue_cap,
        prefill=given["prefill"] or PREFILLS[0],
        shallow_passes=SCHEDULES[given["schedule"] or "stepwise"],
        read_drafts=bool(given["lossless"] or audited),
    )


def _operating_point(
    given: Mapping[str, Any], calibration: Calibration | None
) -> OperatingPoint | None:
    """The calibrated point in force: the one asked for by speed, or the default if nothing is."""
    target = given["target_speedup"]
    if target is not None:
        check_speedup(target)
        if calibration is None:
            raise CalibrationError(
                f"target_speedup={target:g} needs a calibration and this model has none. "
                f"Run `calibrate run MODEL --target-speedup {target:g}`, or give a threshold."
            )
        return calibration.for_speedup(target)
    if given["threshold"] is None and given["policy"] is None and calibration is not None:
        return calibration.point
    return None


def _threshold_policy(
    threshold: Any, point: OperatingPoint | None, layers: tuple[int, ...], state: State
) -> ThresholdPolicy:
    if point is not None:
        threshold = point.threshold
    elif threshold is None:
        threshold = DEFAULT_THRESHOLD
        state.tell_once(
            f"no threshold given and no calibration found: using threshold={threshold} on the raw "
            "confidence. `calibrate run` finds one for this model."
        )
    elif state.calibration is None and _is_a_dial(threshold):
        state.tell_once(
            "no calibration found: the threshold is compared with the raw confidence, which means "
            "something else at every exit. `calibrate run` makes it a chance of agreement."
        )
    if isinstance(threshold, Mapping):
        return ThresholdPolicy(_per_exit(threshold, layers))
    return ThresholdPolicy(dict.fromkeys(layers[:-1], check_threshold(threshold)))


def _is_a_dial(threshold: Any) -> bool:
    """Whether a confidence is compared at all: 0 always exits and 1 never does."""
    values = threshold.values() if isinstance(threshold, Mapping) else [threshold]
    return any(value not in (0, 1) for value in values)


def _per_exit(thresholds: Mapping[Any, Any], layers: tuple[int, ...]) -> dict[int, float]:
    """Thresholds by exit layer; a configuration file's keys arrive as strings."""
    by_layer = {}
    for key, value in thresholds.items():
        layer = int(key) if str(key).isdigit() else key
        if layer not in layers:
            raise OptionError(
                f"threshold names exit layer {key!r}, which is not checked; the exit layers are "
                f"{', '.join(map(str, layers))}. Give exit_layers=[...] with it to change them."
            )
        by_layer[layer] = check_threshold(value)
    return by_layer


def _confidences(name: str | None, layers: tuple[int, ...], state: State) -> Confidences:
    calibration = state.calibration
    if name is None:
        name = calibration.confidence if calibration is not None else measures.DEFAULT
    maps = calibration.maps if calibration is not None else {}
    confidences = Confidences(name, maps, state.gate)
    if state.gate is not None and confidences.reads_hidden:
        # Its probes are fitted as chances of agreement, which do without a map.
        missing = [layer for layer in layers[:-1] if layer not in state.gate.exit_layers]
        if missing:
            raise OptionError(
                f"the gate has no probe for exit layer {', '.join(map(str, missing))}; it has "
                f"{', '.join(map(str, state.gate.exit_layers))}. Give those as exit_layers."
            )
        return confidences
    unmapped = [layer for layer in layers[:-1] if layer not in maps.get(name, {})]
    if calibration is not None and unmapped:
        state.tell_once(
            f"the calibration has no {name} map for exit layer {', '.join(map(str, unmapped))}: "
            "the raw confidence is used there."
        )
    return confidences
