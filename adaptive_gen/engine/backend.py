"""Which back end runs a model's segments, and its prepared weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from ..errors import ModelError, OptionError
from .fused import FusedModel, FusedReadout, FusedSegment, Matrix
from .fusing import Unfit, fuse, fuse_readout, stacked
from .int8 import quantised, quantised_readout
from .segment import Segment, module_segments
from .workspace import Workspace

ENGINES = ("auto", "fused", "module")
WEIGHTS = ("own", "int8")
# `fused` works on copies of the layers' weights; beyond this they are only made when asked for.
MOST_COPIED_BYTES = 2 << 30


def _hooked(module: Any) -> bool:
    """Whether calling the module does more than its class says; accelerate has hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _size(weights: Sequence[Any]) -> int:
    return sum(w.numel() * w.element_size() for w in weights)


def _signature(weights: Sequence[Any]) -> list[tuple[int, int]]:
    """Changes when weights were trained, merged or moved since, so that new copies are needed."""
    return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]


class Backend:
    """Makes segments for one model: fused where that is possible and wanted, else module.

    `name` is the back end the latest segments run on, and `reason` why that is not `fused`.
    """

    def __init__(self, decoder: Decoder, engine: str = "auto", weights: str = "own"):
        """Choose.

        Args:
            decoder: the model.
            engine: "auto" takes `fused` if it can; "fused" insists; "module" never does.
            weights: "own" are the model's; "int8" are rounded to 8 bits, which insists on `fused`.
        """
        for name, value, known in (("engine", engine, ENGINES), ("weights", weights, WEIGHTS)):
            if value not in known:
                raise OptionError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
        self.decoder, self.engine, self.weights = decoder, engine, weights
        self.name, self.reason = "module", ""
        self._signature: Any = None
        self._cause = ""
        self._fused: FusedModel | None = None
        self._stacks: dict[tuple[int, int], tuple[Matrix, Tensor | None]] = {}
        self._readout_signature: Any = None
        self._readout: FusedReadout | None = None

    @torch.no_grad()
    def segments(self, exit_layers: Sequence[int]) -> list[Segment]:
        """One segment before each of the ascending `exit_layers`.

        Raises:
            ModelError: `engine="fused"` was asked for and cannot be had.
        """
        self.reason = self._unfit()
        fused = "fused-int8" if self.weights == "int8" else "fused"
        self.name = "module" if self.reason else fused
        if self.reason and self.weights == "int8":
            raise ModelError(
                f"weights='int8' cannot run {self.decoder.name}: {self.reason}. Leave it out."
            )
        if self.reason and self.engine == "fused":
            raise ModelError(
                f"engine='fused' cannot run {self.decoder.name}: {self.reason}. "
                "Use engine='auto' or 'module'."
            )
        if self.reason:
            return module_segments(self.decoder, exit_layers)
        assert self._fused is not None
        workspace = Workspace(self._fused.sizes)
        return [
            FusedSegment(self._fused, start, stop, self._stack(start, stop), workspace)
            for start, stop in zip([0, *exit_layers[:-1]], exit_layers, strict=True)
        ]

    @torch.no_grad()
    def readout(self) -> Callable[[Tensor, int], Tensor]:
        """(hidden states [rows, hidden], exit layer) -> logits, for the latest segments."""
        shared = self._shared_readout()
        if shared is None:
            return self.decoder.readout
        if not self.decoder.own:
            return lambda hidden, _: shared(hidden)
        own = self.decoder.own

        def read(hidden: Tensor, exit_layer: int) -> Tensor:
            return own[exit_layer](hidden) if exit_layer in own else shared(hidden)

        return read

    def _shared_readout(self) -> FusedReadout | None:
        """The final norm and LM head prepared; None where the model's own have to do."""
        parts = self.decoder.plain_readout
        if self.name == "module" or parts is None or any(map(_hooked, parts)):
            return None
        weights = [getattr(module, "weight", None) for module in parts]
        if any(type(w) is not nn.Parameter for w in weights) or self._too_large(weights):
            return None
        signature = _signature(weights)
        if signature != self._readout_signature:
            self._readout, self._readout_signature = fuse_readout(*parts), signature
            if self._readout is not None and self.weights == "int8":
                self._readout = quantised_readout(self._readout)
        return self._readout

    def _stack(self, start: int, stop: int) -> tuple[Matrix, Tensor | None]:
        assert self._fused is not None
        if (start, stop) not in self._stacks:
            self._stacks[start, stop] = stacked(self._fused, start, stop)
        return self._stacks[start, stop]

    def _too_large(self, weights: Sequence[Any]) -> bool:
        asked_for = self.engine == "fused" or self.weights == "int8"
        return not asked_for and _size(weights) > MOST_COPIED_BYTES

    def _unfit(self) -> str:
        """Why `fused` cannot run the model as it is now; empty if it can."""
        layers = self.decoder.layers
        if self.engine == "module":
            return "engine='module' was asked for"
        if layers.training:
            return "the model is in training mode"
        if any(map(_hooked, layers.modules())):
            return "hooks on its layers would not be called"
        weights = list(layers.parameters())
        others = {type(w).__name__ for w in weights if type(w) is not nn.Parameter}
        if others:
            return f"its weights are no plain tensors but {', '.join(sorted(others))}"
        if self._too_large(weights):
            return f"copies of its layers would take {_size(weights) / 2**30:.1f} GiB"
        signature = _signature(weights)
        if signature != self._signature:
            self._fused, self._stacks, self._signature = None, {}, signature
            try:
                self._fused = fuse(self.decoder)
                if self.weights == "int8":
                    self._fused = quantised(self._fused)
            except Unfit as error:
                self._cause = str(error)
        return "" if self._fused is not None else self._cause
