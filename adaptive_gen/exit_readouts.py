"""Readouts of the exits' own, beside a frozen model: a head, a norm, or a small block.

`head` is the intermediate-layer classifier that SoFT makes needless (Sorted LLaMA, section 4;
DeeBERT before it). `norm` and `block` leave the LM head to be shared, after Balcony (arXiv
2503.05005), with the difference that a block here has no attention: an exit then needs no keys and
values of its own, and every KV policy works unchanged. They lie beside the model as
`exit_readouts.safetensors`; full depth is the frozen model itself.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import ModelError, OptionError
from .head import Head
from .naming import Parts
from .readout import Readout

FILE = "exit_readouts.safetensors"
NAME = "exit_readouts"
KINDS = ("head", "norm", "block")


class Block(nn.Module):
    """A gated MLP around which the hidden state passes: h + down(silu(gate(n)) * up(n))."""

    def __init__(self, hidden: int, width: int):
        """Start as the identity.

        Args:
            hidden: size of the states.
            width: of the MLP.
        """
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        normed = self.norm(hidden)
        return hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def add_readouts(model: Any, exits: Sequence[int], kind: str, width: int = 0) -> None:
    """Freeze `model` and give each exit but full depth a readout of its own to train.

    At the start it reads out what the model's own norm and head do.

    Args:
        model: a causal LM; gains the module `exit_readouts`, which its checkpoints then hold.
        exits: ascending, full depth last.
        kind: one of `KINDS`. A block comes with a norm.
        width: of a block's MLP; 0 is as wide as the model's.

    Raises:
        OptionError: another kind.
    """
    if kind not in KINDS:
        raise OptionError(f"exit readout {kind!r} is unknown; give {', '.join(KINDS)}.")
    model.requires_grad_(False)
    text = model.config.get_text_config()
    hidden = text.hidden_size
    width = width or getattr(text, "intermediate_size", None) or 4 * hidden
    like = model.get_output_embeddings()
    added = nn.ModuleDict()
    for exit_layer in exits[:-1]:
        own = nn.ModuleDict()
        if kind == "head":
            own["head"] = copy.deepcopy(like)
        else:
            own["norm"] = copy.deepcopy(Parts(model).readout_norm)
        if kind == "block":
            own["block"] = Block(hidden, width).to(like.weight.device, like.weight.dtype)
        added[str(exit_layer)] = own
    setattr(model, NAME, added.requires_grad_(True))


def readouts(model: Any, exits: Sequence[int]) -> dict[int, Readout]:
    """How each exit of `model` is read out: through what it has of its own, else as full depth."""
    norm, shared = Parts(model).readout_norm, Head(model)
    found = {}
    for exit_layer in exits:
        own = own_of(model, exit_layer)
        before = own.get("norm", norm)
        if "block" in own:
            before = nn.Sequential(own["block"], before)
        head = Head(model, own["head"]) if "head" in own else shared
        found[exit_layer] = Readout(before, head)
    return found


def own_of(model: Any, exit_layer: int) -> dict[str, Any]:
    """The modules that an exit has of its own, by name: head, norm, block."""
    added = getattr(model, NAME, {})
    return dict(added[str(exit_layer)]) if str(exit_layer) in added else {}


def exits_of(model: Any) -> list[int]:
    """The exits with readouts of their own."""
    return [int(name) for name in getattr(model, NAME, {})]


def as_the_model_s(model: Any, exit_layer: int) -> dict[str, Tensor]:
    """Weights that an exit has of its own, named as the model names its final norm and head.

    Raises:
        ModelError: a block, for which a plain checkpoint has no place.
    """
    own = own_of(model, exit_layer)
    if "block" in own:
        raise ModelError(
            f"exit {exit_layer} has a block of its own, for which a plain checkpoint has no place. "
            "Export an exit without one, or the whole model with with_generate=True."
        )
    places = {"norm": Parts(model).readout_norm, "head": model.get_output_embeddings()}
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(places[part])]}.{name}": value
        for part, module in own.items()
        for name, value in module.state_dict().items()
    }


def save_readouts(model: Any, folder: Path, below: float = math.inf) -> None:
    """Write the readouts of the exits below the exit layer `below` into `folder`, if any are."""
    from safetensors.torch import save_file

    if not hasattr(model, NAME):
        return
    state = getattr(model, NAME).state_dict()
    kept = {k: v.contiguous() for k, v in state.items() if int(k.split(".")[0]) < below}
    if kept:
        save_file(kept, folder / FILE)


def load_readouts(model: Any, folder: Path) -> None:
    """Give `model` the readouts that lie in `folder`, if any do; the model is then frozen.

    Raises:
        ModelError: they are another model's, or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / FILE
    if not path.is_file():
        return
    try:
        state = load_file(path)
        exits = sorted({int(name.split(".")[0]) for name in state})
        parts = {name.split(".")[1] for name in state}
        kind = next(kind for kind in ("block", "norm", "head") if kind in parts)
        wide = next((len(v) for k, v in state.items() if k.endswith("block.gate.weight")), 0)
        full = model.config.get_text_config().num_hidden_layers
        if exits[-1] >= full:
            raise ValueError(f"exit {exits[-1]} of {full} layers")
        add_readouts(model, [*exits, full], kind, wide)
        getattr(model, NAME).load_state_dict(state)
    except (SafetensorError, ValueError, IndexError, StopIteration, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["it holds no readout"])[0]
        raise ModelError(f"{path} does not fit the model: {reason}") from None
    getattr(model, NAME).to(model.device, model.dtype)
