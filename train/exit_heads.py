"""Intermediate-layer classifiers (ICT): an LM head of its own for each exit of a frozen model.

The baseline that SoFT makes needless (Sorted LLaMA, section 4; DeeBERT before it). The heads lie
beside the model as `exit_heads.safetensors`; `adaptive-train eval` reads exits through them.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adaptive_gen.errors import ModelError
from adaptive_gen.head import Head
from adaptive_gen.losses import shared_readout
from adaptive_gen.readout import Readout

FILE = "exit_heads.safetensors"
NAME = "exit_heads"


def add_heads(model: Any, exits: Sequence[int]) -> None:
    """Freeze `model` and give each exit but full depth a copy of the LM head to train.

    Args:
        model: a causal LM; gains the module `exit_heads`, which its checkpoints then hold.
        exits: ascending, full depth last.
    """
    model.requires_grad_(False)
    source = model.get_output_embeddings()
    heads = nn.ModuleDict({str(e): copy.deepcopy(source) for e in exits[:-1]})
    setattr(model, NAME, heads.requires_grad_(True))


def readouts(model: Any, exits: Sequence[int]) -> dict[int, Readout]:
    """How each exit of `model` is read out: through a head of its own where it has one."""
    shared = shared_readout(model)
    own = getattr(model, NAME, {})
    return {
        e: Readout(shared.norm, Head(model, own[str(e)])) if str(e) in own else shared
        for e in exits
    }


def save_heads(model: Any, folder: Path) -> None:
    """Write the heads into `folder`."""
    from safetensors.torch import save_file

    state = getattr(model, NAME).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / FILE)


def load_heads(model: Any, folder: Path) -> None:
    """Give `model` the heads that lie in `folder`, if any do.

    Raises:
        ModelError: they are another model's, or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / FILE).is_file():
        return
    try:
        state = load_file(folder / FILE)
        exits = sorted({int(name.split(".")[0]) for name in state})
        add_heads(model, [*exits, model.config.get_text_config().num_hidden_layers])
        getattr(model, NAME).load_state_dict(state)
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder / FILE} does not fit the model: {reason}") from None
    getattr(model, NAME).to(model.device)


def exits_of(model: Any) -> list[int] | None:
    """The exits with heads of their own; None if there are none."""
    return [int(name) for name in getattr(model, NAME)] if hasattr(model, NAME) else None
