"""`load`: a model and its tokenizer from a directory or the hub, wrapped."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from . import calibration as artefact
from .errors import ModelError
from .exit_readouts import load_readouts
from .files import is_nowhere
from .settings import attach, state
from .wrapping import BUILTIN, compare_fingerprint, examined, wrap

PathLike = str | os.PathLike[str]


def load(
    path: PathLike | None = None,
    exit_layers: Iterable[int] | None = None,
    calibration: PathLike | Literal[False] | None = None,
    engine: str = "auto",
    weights: str = "own",
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load and wrap a model with its tokenizer.

    Args:
        path: a checkpoint directory or hub id; None is the built-in model.
        exit_layers: see `wrap`.
        calibration: path of an artefact; default `calibration.json` in the checkpoint directory;
            False is none.
        engine: see `wrap`.
        weights: see `wrap`.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, ...

    Returns:
        (model, tokenizer)

    Raises:
        ModelError: there is no causal LM and tokenizer there.
        CalibrationError, OptionError: see `wrap`.
    """
    model, tokenizer = _read(path, kwargs)
    wrap(model, exit_layers, _found(path, calibration), engine=engine, weights=weights)
    if state(model).calibration is not None:
        compare_fingerprint(model, {"tokenizer": artefact.tokenizer_hash(tokenizer)})
    return model, tokenizer


def look(
    path: PathLike | None = None, calibration: PathLike | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """What `load` gives, to be described and not to generate: no kernel is compiled for it.

    A calibration is taken to be used on the back end that it was made on, as `load` would if it
    can. For arguments and errors see `load`.
    """
    model, tokenizer = _read(path, kwargs)
    found = examined(model, None, _found(path, calibration))
    attach(model, found)
    if found.calibration is not None:
        here = artefact.fingerprint(model, tokenizer=tokenizer)
        del here["engine"]
        compare_fingerprint(model, here)
    return model, tokenizer


def _found(path: PathLike | None, calibration: PathLike | Literal[False] | None) -> PathLike | None:
    """The calibration that was named, or the one in the checkpoint directory, if any."""
    directory = Path(BUILTIN if path is None else path)
    if calibration is None and (directory / artefact.FILE_NAME).is_file():
        return directory
    return calibration or None


def _read(path: PathLike | None, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A causal LM with the readouts of its exits, and its tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path is None:
        path = BUILTIN
        if not torch.cuda.is_available():
            kwargs.setdefault("dtype", torch.float32)  # stored in 16 bits, which CPUs are slow in
    if not isinstance(path, str | os.PathLike):
        raise ModelError(
            f"load() takes a directory or a hub id, and got {type(path).__name__}; wrap() takes a "
            "model that is loaded already."
        )
    directory = Path(path)
    if is_nowhere(str(path)):
        raise ModelError(
            f"there is no model directory {str(path)!r}. Give one that holds config.json, weights "
            "and a tokenizer, a hub id of the form owner/name, or leave it out for the built-in "
            "model."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path)
        load_readouts(model, directory)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{path} cannot be loaded as a causal LM with its tokenizer: {reason[0]} "
            "Give a directory saved with save_pretrained."
        ) from error
    return model, tokenizer
