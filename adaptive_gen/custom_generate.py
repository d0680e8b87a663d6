"""What the `custom_generate/generate.py` of an exported checkpoint calls.

Exported checkpoints outlive releases: the name and signature of `generate` stay as they are.
"""

import copy
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from . import calibration as artefact
from . import exit_readouts
from . import gate as gates
from .generate import AdaptiveMixin
from .wrapping import wrap


def generate(
    inputs: Any = None, generation_config: Any = None, *args: Any, model: Any, **kwargs: Any
) -> Any:
    """Do `model.generate(...)` with `adaptive=True`, unless the caller or the checkpoint says.

    The model is wrapped on its first call, with what lies where it was loaded from: calibration,
    gate, and readouts of exits.

    Args:
        inputs: as transformers' `generate` takes it.
        generation_config: likewise; a field that it lacks is the checkpoint's.
        *args: the other positional arguments of transformers' `generate`.
        model: loaded by transformers, wrapped or not.
        **kwargs: keywords of transformers' `generate` and of ours.
    """
    if not isinstance(model, AdaptiveMixin):
        _wrap(model)
    said = [kwargs.get("adaptive")]
    said += [getattr(c, "adaptive", None) for c in (generation_config, model.generation_config)]
    if all(value is None for value in said):
        if generation_config is None:
            kwargs["adaptive"] = True
        else:  # transformers wants no keywords beside a config
            generation_config = copy.copy(generation_config)
            generation_config.adaptive = True
    stock: Any = type(model)  # the instance's own `generate` may be this function
    return stock.generate(model, inputs, generation_config, *args, **kwargs)


def _wrap(model: Any) -> None:
    """Wrap a model with all that its checkpoint says of its exits."""
    readouts = _file(model, exit_readouts.FILE)
    if readouts is not None and not hasattr(model, exit_readouts.NAME):
        learning = [parameter.requires_grad for parameter in model.parameters()]
        own = list(model.parameters())
        exit_readouts.load_readouts(model, readouts.parent)
        for parameter, wanted in zip(own, learning, strict=True):  # generating freezes nothing
            parameter.requires_grad_(wanted)
    _file(model, gates.FILE_NAME)  # of a repository, so that it lies beside the calibration
    wrap(model, calibration=_file(model, artefact.FILE_NAME))


def _file(model: Any, name: str) -> Path | None:
    """A file of the checkpoint directory or hub repository of a model, if it is there."""
    if not model.name_or_path:
        return None
    try:
        path = cached_file(model.name_or_path, name)
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)
