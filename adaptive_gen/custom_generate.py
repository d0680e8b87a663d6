"""What the `custom_generate/generate.py` of an exported checkpoint calls.

Exported checkpoints outlive releases: the name and signature of `generate` stay as they are.
"""

import copy
from typing import Any

from transformers.utils.hub import cached_file

from . import calibration as artefact
from .generate import AdaptiveMixin
from .wrapping import wrap


def generate(
    inputs: Any = None, generation_config: Any = None, *args: Any, model: Any, **kwargs: Any
) -> Any:
    """Do `model.generate(...)` with `adaptive=True`, unless the caller or the checkpoint says.

    The model is wrapped on its first call, with the calibration that lies where it was loaded from.

    Args:
        inputs: as transformers' `generate` takes it.
        generation_config: likewise; a field that it lacks is the checkpoint's.
        *args: the other positional arguments of transformers' `generate`.
        model: loaded by transformers, wrapped or not.
        **kwargs: keywords of transformers' `generate` and of ours.
    """
    if not isinstance(model, AdaptiveMixin):
        wrap(model, calibration=_calibration(model.name_or_path))
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


def _calibration(name: str) -> artefact.Calibration | None:
    """The artefact in a checkpoint directory or hub repository, if there is one."""
    if not name:
        return None
    try:
        path = cached_file(name, artefact.FILE_NAME)
    except (OSError, ValueError):
        return None
    return artefact.load(path) if path is not None else None
