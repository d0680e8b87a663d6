"""`export`: a sub-model, or the whole model, as a plain checkpoint that any engine can load.

What is written is read back and compared with the model it came from, bit for bit, decodes if it
brings its own `generate`, and only then is moved to its place, whole.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from . import calibration as artefact
from . import exit_readouts, exits, export_place
from .decoder import Decoder
from .errors import ModelError, OptionError, OutputError
from .export_card import write_card
from .export_check import check_equal, check_generates
from .generate import AdaptiveMixin
from .settings import FIELDS, State, state

SHIM = Path(__file__).with_name("checkpoint_generate.py")


def export(
    model: Any,
    out_dir: str | os.PathLike[str],
    exit_layer: int | None = None,
    *,
    tokenizer: Any = None,
    with_generate: bool = False,
    force: bool = False,
) -> Path:
    """Write the first `exit_layer` layers, the final norm and the LM head as a checkpoint.

    Stock transformers gives that checkpoint's logits equal to the exit's, bit for bit; a drafter
    for the whole model needs nothing else.

    Args:
        model: a causal LM, wrapped or not, with all its weights in memory.
        out_dir: must not exist, be empty, or hold an earlier export, unchanged, and nothing else.
        exit_layer: layers to keep, 1..n_layers; None is the whole model, with its exits and its
            calibration.
        tokenizer: goes along; default: the one that lies where the model was loaded from, if any.
        with_generate: add `custom_generate/generate.py`, with which plain transformers and
            `transformers serve` decode adaptively where adaptive_gen is installed. A sub-model then
            has the exits below `exit_layer`, and no calibration: that is the whole model's.
        force: replace any other checkpoint in `out_dir` too.

    Returns:
        `out_dir`.

    Raises:
        OptionError: no such exit layer, or nothing to do.
        ModelError: the model cannot be cut off there: quantised, adapted, partly offloaded, or the
            layers depend on how many there are; or it could not decode by its own `generate`.
        OutputError: `out_dir` is taken or cannot be written.
    """
    if exit_layer is None and not with_generate:
        raise OptionError(
            "nothing says what to export; give exit_layer=N for a sub-model, or with_generate=True "
            "for the whole model."
        )
    if not hasattr(model, "generation_config"):
        raise ModelError(
            f"export() takes a loaded causal LM, and got {type(model).__name__}; "
            "adaptive_gen.load() gives one."
        )
    decoder = Decoder(model)
    layers = decoder.n_layers if exit_layer is None else exit_layer
    exits.normalise([layers], decoder.n_layers)
    _check_exportable(model)
    out = Path(out_dir)
    source = Path(model.name_or_path) if model.name_or_path else None
    if source is not None and source.is_dir() and out.resolve() == source.resolve():
        raise OutputError(f"{out} is what the model was loaded from; name another directory.")
    export_place.check_free(out, force)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder: what is moved within a file system appears whole or not at all.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
            made = Path(name) / "checkpoint"
            made.mkdir()
            _save(model, decoder, layers, made, with_exits=exit_layer is None or with_generate)
            _save_company(model, tokenizer, layers, made, with_generate=with_generate)
            loaded = check_equal(model, decoder, layers, made)
            if with_generate:
                check_generates(_state_of(model), loaded, tokenizer)
            export_place.mark(made, _described(model, layers, decoder.n_layers))
            export_place.move(made, out)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error}. Name a directory you may write to."
        ) from error
    return out


def _check_exportable(model: Any) -> None:
    name = type(model).__name__
    if getattr(model, "peft_config", None):
        raise ModelError(
            f"this {name} carries adapters; merge them first, with merge_and_unload(), and export "
            "the result."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"this {name} is quantised; export the model it was made from, then quantise that."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"this {name} has weights outside memory; load it without device_map, or on a device "
            "that holds all of it."
        )


def _save(model: Any, decoder: Decoder, layers: int, made: Path, with_exits: bool) -> None:
    """Config, generation config and weights of the first `layers` layers."""
    [prefix] = [name for name, module in model.named_modules() if module is decoder.layers]
    dropped = tuple(f"{prefix}.{index}." for index in range(layers, decoder.n_layers))
    dropped += (f"{exit_readouts.NAME}.",)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(dropped)}
    weights |= exit_readouts.as_the_model_s(model, layers)
    before = {name: getattr(model.config, name) for name in ("dtype", "architectures")}
    try:
        model.save_pretrained(made, state_dict=weights)  # notes both in the model's own config
        config = model.config.to_dict()
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    if with_exits:
        _text_part(config)["exit_layers"] = _exits_within(model, decoder, layers)
    else:
        _text_part(config).pop("exit_layers", None)
    if "head" in exit_readouts.own_of(model, layers):
        _text_part(config)["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    if with_exits:
        exit_readouts.save_readouts(model, made, below=layers)
    depth = decoder.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    _cut_config(_text_part(config), depth, layers, decoder.n_layers)
    type(model.config).from_dict(config).save_pretrained(made)
    # A wrapped model has our fields, mostly empty, in its generation config.
    generation = type(model.generation_config).from_dict(model.generation_config.to_dict())
    for name in FIELDS:
        kept = with_exits and name not in ("policy", "exit_layers")
        if hasattr(generation, name) and not (kept and getattr(generation, name) is not None):
            delattr(generation, name)
    generation._from_model_config = False
    generation.save_pretrained(made)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    return config["text_config"] if "text_config" in config else config


def _state_of(model: Any) -> State | None:
    return state(model) if isinstance(model, AdaptiveMixin) else None


def _exits_within(model: Any, decoder: Decoder, layers: int) -> list[int]:
    """The exits a checkpoint of `layers` layers has: those below, and its own end."""
    wrapped = _state_of(model)
    known = wrapped.exit_layers if wrapped else getattr(decoder.config, "exit_layers", None)
    known = known or exits.quarter_points(decoder.n_layers)
    return list(exits.normalise([e for e in known if e < layers], layers))


def _cut_config(config: dict[str, Any], depth: str, layers: int, n_layers: int) -> None:
    """Set the field `depth`; shorten what names every layer, such as `layer_types`."""
    config[depth] = layers
    for name, value in config.items():
        if "layer" in name and name != "exit_layers" and isinstance(value, list):
            if len(value) == n_layers:
                config[name] = value[:layers]


def _save_company(
    model: Any, tokenizer: Any, layers: int, made: Path, *, with_generate: bool
) -> None:
    """Tokenizer, calibration with its gate, licence, shim and card."""
    source = Path(model.name_or_path) if model.name_or_path else None
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
    wrapped = _state_of(model)
    calibration = wrapped.calibration if wrapped is not None else None
    if wrapped is not None and calibration is not None and layers == calibration.n_layers:
        artefact.save(calibration, made)
        if wrapped.gate is not None:
            wrapped.gate.save(made)
    if source is not None and source.is_dir():
        for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*"):
            for file in source.glob(pattern):
                shutil.copy(file, made)
    if with_generate:
        (made / "custom_generate").mkdir()
        shutil.copyfile(SHIM, made / "custom_generate" / "generate.py")
    write_card(made, model, layers, calibration, with_generate=with_generate)


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    if not model.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError):
        return None


def _described(model: Any, layers: int, n_layers: int) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    from . import __version__

    return {
        "adaptive_gen": __version__,
        "exit_layer": layers,
        "n_layers": n_layers,
        "model": artefact.fingerprint(model)["model"],  # of the whole model's weights
    }
