"""A model's weights as its back ends need them: made once, and anew when the model has changed."""

from collections.abc import Sequence
from ctypes import string_at
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from ..naming import hooked
from .compiled import prepared
from .fused import FusedModel
from .fusing import Kept, fuse, narrowed, stacked
from .graphs import Graphs
from .int8 import quantised
from .layer_parts import Unfit
from .matrices import Matrix
from .narrow import BITS
from .panelled import CompiledModel, missing
from .recorder import Direct
from .team import threads

# Weights are copied, half precision once and all else twice: for `fused`, and in panels. Beyond
# this it is only done when asked for.
MOST_COPIED_BYTES = 4 << 30
_SAMPLED = 8  # numbers of each weight that are looked at to tell whether it has changed


class Watched:
    """Weights that may be trained, merged or moved, so that new copies of them are needed.

    Not all that writes into a weight counts its versions up: fused optimizers do not, nor what is
    done to `.data`, as PEFT's merging is. So a few numbers of each are looked at, too.
    """

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._versions: list[tuple[int, int, int]] = []
        self._places: list[tuple[int, int]] = []  # addresses and bytes, of those in main memory

    def signature(self, weights: Sequence[Any]) -> Any:
        """Differs from an earlier one if these weights do."""
        versions = [
            (w.data_ptr(), w.nbytes, 0 if w.is_inference() else w._version) for w in weights
        ]
        if versions != self._versions:
            here = [w for w in weights if w.is_cpu and w.numel() and w.data_ptr()]
            self._versions, self._places = versions, [_place(w, _middle(w)) for w in here]
        # Weights that lie where they lay, and are as large, can be read where they were.
        samples = [string_at(*place) for place in self._places]
        away = [w for w in weights if not (w.is_cpu or w.is_meta) and w.numel()]
        return versions, samples, [w.detach()[_middle(w)].float().tolist() for w in away]


def _middle(weight: Tensor) -> tuple[Any, ...]:
    """Where a weight's sample is: a first token, for one, is hardly ever trained."""
    if not weight.dim():
        return ()
    *others, length = weight.shape
    first = max(0, min(length // 2, length - _SAMPLED))
    return *(n // 2 for n in others), slice(first, first + _SAMPLED)


def _place(weight: Tensor, middle: tuple[Any, ...]) -> tuple[int, int]:
    """The address and bytes of a weight's sample, or of its first number if others lie apart."""
    sample = weight.detach()[middle]
    count = sample.numel() if sample.is_contiguous() else 1
    return sample.data_ptr(), count * sample.element_size()


def addresses(weights: Sequence[Any]) -> list[int]:
    """Changes when weights were put elsewhere; what was captured reads the old place."""
    return [w.data_ptr() for w in weights]


def _within(module: nn.Module) -> tuple[list[Any], bool]:
    """The parameters of a module and of all below it, and whether one of them is `hooked`.

    What `parameters()` and `modules()` find, without names and sooner: it is asked at every call.
    """
    found, parameters, hooks = [module], [], False
    for this in found:  # which grows meanwhile
        hooks = hooks or hooked(this)
        parameters += [w for w in this._parameters.values() if w is not None]
        found += [child for child in this._modules.values() if child is not None]
    return parameters, hooks


def _copies(weights: Sequence[Any]) -> int:
    """Bytes of the copies that are made of weights."""
    return sum(w.numel() * w.element_size() * (1 if w.dtype in BITS else 2) for w in weights)


class Prepared:
    """What the back ends run instead of a model's own layers.

    `fused`, `compiled` and `graphs` are there once `unfit_for` has found nothing against them.
    """

    def __init__(self, decoder: Decoder, engine: str, weights: str, kept: str):
        """Make nothing yet.

        Args:
            decoder: the model.
            engine: see `Backend`; likewise `weights`.
            weights: "own" or "int8".
            kept: the back end that "auto" keeps to, if there is one.
        """
        self._decoder, self._engine, self._weights, self._kept = decoder, engine, weights, kept
        self.fused: FusedModel | None = None
        self.compiled: CompiledModel | None = None
        self.graphs: Graphs | None = None
        self._compile_s = 0.0
        self._watched, self._signatures = Watched(), dict[str, Any]()
        self._causes: dict[str, str] = {}
        self._stacks: dict[tuple[int, int], tuple[Matrix, Tensor | None]] = {}
        self._parameters: list[Any] = []  # of the layers as they are now

    @property
    def warm_up_s(self) -> float:
        """Seconds spent so far on compiling the layers' kernels and capturing graphs."""
        return self._compile_s + (0.0 if self.graphs is None else self.graphs.warm_up_s)

    def unfit(self) -> str:
        """Why nothing but the modules can run the model as it is now; empty if something may."""
        layers = self._decoder.layers
        if layers.training:
            return "the model is in training mode, which model.eval() ends"
        self._parameters, hooks = _within(layers)
        if hooks:
            return "hooks on its layers, or a forward of their own, would not be called"
        others = {type(w).__name__ for w in self._parameters if type(w) is not nn.Parameter}
        if others:
            return f"its weights are no plain tensors but {', '.join(sorted(others))}"
        return ""

    def unfit_for(self, name: str) -> str:
        """Why a back end cannot run the model as `unfit` has just found it; empty if it can."""
        if name == "fused":
            return self._unfit_for_fused()
        return self._unfit_for_compiled() if name == "compiled" else self._unfit_for_graphs(name)

    def too_large(self, weights: Sequence[Any]) -> bool:
        """Whether copies of weights take more than anybody has asked for."""
        asked_for = self._engine in ("fused", "compiled") or self._weights == "int8"
        return not asked_for and _copies(weights) > MOST_COPIED_BYTES

    def stack(self, start: int, stop: int) -> tuple[Matrix, Tensor | None]:
        """See `fusing.stacked`."""
        assert self.fused is not None
        if (start, stop) not in self._stacks:
            self._stacks[start, stop] = stacked(self.fused, start, stop)
        return self._stacks[start, stop]

    def _unfit_for_compiled(self) -> str:
        """Why compiled code cannot run the model, or with "auto" is not the quicker way."""
        reason = missing(self._decoder.dtype) or self._unprepared()
        if reason:
            return reason
        # Which way is quicker depends on how many threads each has.
        if_quicker = self._engine == "auto" and self._kept != "compiled"
        state = (self._signatures["fused"], torch.get_num_threads(), threads(), if_quicker)
        if state != self._signatures.get("compiled"):
            assert self.fused is not None
            self.compiled, self._causes["compiled"], seconds = prepared(self.fused, if_quicker)
            self._compile_s += seconds
            if self.compiled is not None:
                self.fused, self._stacks = self.compiled.fused, {}
            self._signatures["compiled"] = state  # at last: it may be interrupted
        return self._causes["compiled"]

    def _unfit_for_fused(self) -> str:
        dtype = self._decoder.dtype
        if self._weights == "own" and dtype in BITS:
            return f"it is {dtype}; dtype=torch.float32 loads it as fused needs it"
        return self._unprepared()

    def _unprepared(self) -> str:
        """Why the layers cannot be prepared for other ways to run them than their own."""
        state = self._watched.signature(self._parameters)
        if state != self._signatures.get("fused"):
            self.fused, self._stacks = None, {}
            self._causes["fused"] = self._fuse()
            self._signatures["fused"] = state
        return self._causes["fused"]

    def _fuse(self) -> str:
        if self.too_large(self._parameters):
            return f"copies of its layers would take {_copies(self._parameters) / 2**30:.1f} GiB"
        try:
            self.fused = fuse(self._decoder, self._kept_of_layers())
        except Unfit as error:
            return str(error)
        return ""

    def _kept_of_layers(self) -> Kept | None:
        """See `fuse`."""
        if self._weights == "int8":
            return lambda _, prepared, __: quantised(prepared)
        return narrowed if self._decoder.dtype in BITS else None

    def _unfit_for_graphs(self, name: str) -> str:
        state = addresses(self._parameters)
        if state != self._signatures.get("graphs"):
            self.graphs, self._causes["graphs"] = None, ""
            try:
                self.graphs = Graphs(self._decoder, Direct() if name == "static" else None)
            except Unfit as error:
                self._causes["graphs"] = str(error)
            self._signatures["graphs"] = state
        return self._causes["graphs"]
