"""`wrap`: a transformers model learns `generate(adaptive=True, ...)`."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import calibration as artefact
from . import exits
from . import gate as gates
from .confidence import GATE
from .decoder import Decoder, probe
from .engine.backend import Backend
from .engine.rules import QUEUE_CAP
from .errors import CalibrationError, ModelError, OptionError
from .gate import Gate
from .generate import AdaptiveMixin, adaptive_class
from .settings import FIELDS, State, attach, state

BUILTIN = Path(__file__).parent / "builtin"


def wrap(
    model: Any,
    exit_layers: Iterable[int] | None = None,
    calibration: artefact.Calibration | str | os.PathLike[str] | None = None,
    queue_cap: int = QUEUE_CAP,
    engine: str = "auto",
    weights: str = "own",
) -> Any:
    """Teach a loaded causal LM `generate(adaptive=True, ...)`, in place.

    Args:
        model: any transformers causal LM that can be run layer by layer; it is probed for that. A
            PEFT model too: the causal LM inside it is wrapped, adapters and all.
        exit_layers: layers after which a token may leave, counts in 1..n_layers. Default: the
            calibration's, else `model.config.exit_layers`, else those with readouts of their own,
            else the quarter points.
        calibration: an artefact or the path of one.
        queue_cap: most tokens that wait for their deep layers before a deep pass is forced.
        engine: "compiled" runs decoding steps in machine code, for the families that the README's
            table says (CPU; float32 and float64 with two copies of the layers' weights, bfloat16
            and float16 with one and hidden states in float32), "fused" as few plain operations (one
            copy; float32 and float64), "module" calls the model's own layers. "auto" keeps to the
            one the calibration was made on; without one it takes the first of these that can run
            the model with 4 GiB of copies, and "compiled" only if a trial finds it no slower than
            the next. Both use torch's threads. The first process of an installation compiles, under
            a minute once for each kind of kernel. "graphs" captures Llama-shaped layers in CUDA
            graphs, "static" is the same without capturing, on any device.
        weights: "own", or "int8": `compiled` and `fused` read weights rounded to 8 bits, faster and
            not quite the same model (the README says by how much). The model's own weights stay as
            they are; they may be in half precision, and hidden states are then float32.

    Returns:
        The same object; `isinstance` with its own class still holds.

    Raises:
        ModelError: the model fails the probe.
        OptionError: an exit layer that does not exist.
        CalibrationError: a calibration that cannot be read or is another model's.
    """
    if isinstance(model, str | os.PathLike):
        raise ModelError(
            f"wrap() takes a model that is loaded, and got {str(model)!r}; adaptive_gen.load() "
            "takes its directory or hub id."
        )
    given, model = model, _under_adapters(model)
    found = examined(model, exit_layers, calibration, queue_cap, engine, weights)
    # Prepares the weights now: the first token need not wait for it.
    found.backend.segments(found.exit_layers)
    attach(model, found)
    if found.calibration is not None:  # weights are read for it, which may lie on a disk
        compare_fingerprint(model, artefact.fingerprint(model, found.backend.name))
    _teach(model)
    return given


def examined(
    model: Any,
    exit_layers: Iterable[int] | None,
    calibration: artefact.Calibration | str | os.PathLike[str] | None,
    queue_cap: int = QUEUE_CAP,
    engine: str = "auto",
    weights: str = "own",
) -> State:
    """What `wrap` will store on a model that no adapters hide, before any weights are prepared.

    For arguments and errors see `wrap`.
    """
    if isinstance(queue_cap, bool) or not isinstance(queue_cap, int) or queue_cap < 1:
        raise OptionError(
            f"queue_cap={queue_cap!r} is no number of tokens that may wait; give 1 or more, such "
            f"as {QUEUE_CAP}."
        )
    if not hasattr(model, "_sample") or not hasattr(model, "generation_config"):
        raise ModelError(
            f"{type(model).__name__} has no generate(); adaptive depth needs a transformers causal "
            "LM, such as AutoModelForCausalLM.from_pretrained(...) gives."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder; a causal LM is needed.")
    decoder = Decoder(model)
    gate = None
    if isinstance(calibration, str | os.PathLike):
        gate = _gate_beside(Path(calibration))
        calibration = artefact.load(calibration)
    if calibration is not None and not isinstance(calibration, artefact.Calibration):
        raise CalibrationError(
            f"calibration={calibration!r} is none; give the path of a calibration.json, of the "
            "directory that holds one, or what adaptive_gen.calibration.load makes of it."
        )
    if calibration is not None:
        _check_fit(calibration, decoder.n_layers)
    if exit_layers is None and calibration is not None:
        exit_layers = calibration.exit_layers
    if exit_layers is None:
        exit_layers = getattr(decoder.config, "exit_layers", None) or list(decoder.own)
    exit_layers = exit_layers or exits.quarter_points(decoder.n_layers)
    normalised = exits.normalise(exit_layers, decoder.n_layers)
    probe(model, decoder)
    made_on = {} if calibration is None else calibration.fingerprint
    backend = Backend(decoder, engine, weights, measured_on=made_on.get("engine", ""))
    return State(decoder, backend, normalised, calibration, queue_cap, gate)


def _teach(model: Any) -> None:
    """Give the model our `generate` and its generation config our fields."""
    if not isinstance(model, AdaptiveMixin):
        model.__class__ = adaptive_class(type(model))
    for name in FIELDS:
        if not hasattr(model.generation_config, name):
            setattr(model.generation_config, name, None)
    # Saved as derived from the model configuration, a generation config loses our fields on reload.
    model.generation_config._from_model_config = False


def _gate_beside(calibration: Path) -> Gate | None:
    """The gate in the directory of a calibration, if one was fitted."""
    directory = calibration if calibration.is_dir() else calibration.parent
    return Gate.load(directory) if (directory / gates.FILE_NAME).is_file() else None


def _under_adapters(model: Any) -> Any:
    """The causal LM inside a PEFT model; any other model itself."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not hasattr(model, "get_base_model"):
        return model
    if config.is_prompt_learning:
        raise ModelError(
            f"{config.peft_type.value} adapters feed the model learned prompts besides tokens, "
            "which adaptive depth cannot honour. Use LoRA or the like, or the model without it."
        )
    return model.get_base_model()


def _check_fit(calibration: artefact.Calibration, n_layers: int) -> None:
    if calibration.n_layers != n_layers:
        raise CalibrationError(
            f"the calibration is of a model with {calibration.n_layers} layers; this one has "
            f"{n_layers}. Run `calibrate run` for this model."
        )


def compare_fingerprint(model: Any, here: Mapping[str, Any]) -> None:
    """Say, once, what the calibration was made on if that is not what it is used on.

    Generation works all the same, but whatever was certified is so no longer.

    Args:
        model: wrapped.
        here: what it is used on, as much as is known; see `artefact.fingerprint`.
    """
    wrapped = state(model)
    calibration = wrapped.calibration
    if calibration is None:
        return
    made = calibration.fingerprint
    if "model" in here and wrapped.gate is not None and calibration.confidence == GATE:
        here = {**here, "gate": wrapped.gate.digest}
    differing = artefact.differences(made, here)
    if differing:
        withdrawn = "its certificate is withdrawn and " if calibration.certified else ""
        wrapped.calibration = calibration.without_certificates()
        wrapped.measured_here = False
        named = [f"another {key}{_both(key, made, here)}" for key in differing]
        wrapped.tell_once(
            f"the calibration was made on {' and '.join(named)}: {withdrawn}its agreement and "
            "speed are not promised here. Run `calibrate run` to have them measured."
        )
    elif calibration.certified and _decodes_otherwise(model, calibration):
        wrapped.calibration = calibration.without_certificates()
        wrapped.tell_once(
            f"the calibration is certified for greedy decoding with kv={calibration.kv}, and this "
            "model's generation config says otherwise: its certificate is withdrawn. Set "
            "do_sample=False there, or run `calibrate run`."
        )


def _both(key: str, made: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs, where it has a name that says something: the others are hashes."""
    return f" ({made[key]}, not {here[key]})" if key in ("dtype", "device", "engine") else ""


def _decodes_otherwise(model: Any, calibration: artefact.Calibration) -> bool:
    config = model.generation_config
    kv = getattr(config, "kv", None)
    return bool(config.do_sample) or kv not in (None, calibration.kv)
