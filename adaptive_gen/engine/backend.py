"""Which back end runs a model's segments, and its prepared weights."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..confidence import Confidences
from ..decoder import Decoder
from ..errors import ModelError, OptionError
from . import graphs
from .batch import BatchStretch
from .cache import KVCache
from .compiled import CompiledSegment, NarrowSegment, longest, most_tokens, prepared
from .compiled_readout import CompiledConfidences, CompiledReadout
from .desk import Desk
from .drafts import DraftLength
from .fused import FusedModel, FusedReadout, FusedSegment, Matrix
from .fusing import WIDE, Unfit, fuse, fuse_readout, narrow_readout, narrowed, stacked, wide
from .graphs import GraphReadout, Graphs, SummedConfidences
from .int8 import quantised, quantised_readout
from .machine_code import compiling
from .narrow import BITS
from .panelled import CompiledModel, missing
from .recorder import Direct
from .scheduler import Scheduler
from .segment import Segment, module_segments
from .stretch import LosslessStretch, Pace, Stretch, unfit
from .team import threads
from .workspace import Workspace

# What is tried, in order, before the module back end, which always can. "auto" takes `graphs` once
# it has been measured on a GPU; docs/gpu.md says what is missing.
TRIED = {
    "auto": ("compiled", "fused"),
    "graphs": ("graphs",),
    "static": ("static",),
    "compiled": ("compiled",),
    "fused": ("fused",),
    "module": (),
}
ENGINES = tuple(TRIED)
ON_SLABS = ("graphs", "static")  # back ends that keep their state at fixed addresses
WEIGHTS = ("own", "int8")
# Weights are copied, half precision once and all else twice: for `fused`, and in panels. Beyond
# this it is only done when asked for.
MOST_COPIED_BYTES = 4 << 30


def _hooked(module: Any) -> bool:
    """Whether calling the module does more than its class says; accelerate has hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module))


def _within(module: nn.Module) -> list[nn.Module]:
    """A module and all below it: what `modules()` finds, without names and sooner."""
    found = [module]
    for this in found:  # which grows meanwhile
        found += [child for child in this._modules.values() if child is not None]
    return found


def _weights(module: nn.Module) -> list[Any]:
    """The parameters of a module and all below it."""
    own = (part._parameters.values() for part in _within(module))
    return [weight for weights in own for weight in weights if weight is not None]


def _copies(weights: Sequence[Any]) -> int:
    """Bytes of the copies that are made of weights."""
    return sum(w.numel() * w.element_size() * (1 if w.dtype in BITS else 2) for w in weights)


def _signature(weights: Sequence[Any]) -> list[tuple[int, int]]:
    """Changes when weights were trained, merged or moved since, so that new copies are needed."""
    return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]


def _addresses(weights: Sequence[Any]) -> list[int]:
    """Changes when weights were put elsewhere; what was captured reads the old place."""
    return [w.data_ptr() for w in weights]


class Backend:
    """Makes segments for one model: on the back end that is wanted, if it can, else on module.

    `name` is the back end the latest segments run on, and `reason` why that is not one tried
    before it.
    """

    def __init__(
        self, decoder: Decoder, engine: str = "auto", weights: str = "own", measured_on: str = ""
    ):
        """Choose.

        Args:
            decoder: the model.
            engine: "auto" takes `compiled` where it is quicker, else `fused`, if it can;
                "compiled", "fused", "graphs" and "static" insist; "module" is the model's own
                layers.
            weights: "own" are the model's; "int8" are rounded to 8 bits, for `compiled` or `fused`.
            measured_on: name of the back end a calibration was made on, which "auto" keeps to if it
                can: what was measured, or certified, is true of that one.
        """
        for name, value, known in (("engine", engine, ENGINES), ("weights", weights, WEIGHTS)):
            if value not in known:
                raise OptionError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
        if weights == "int8" and engine not in ("auto", "compiled", "fused"):
            raise OptionError(
                f"weights='int8' is for the back ends compiled and fused, not for "
                f"engine={engine!r}; leave one of the two out."
            )
        self.decoder, self.engine, self.weights = decoder, engine, weights
        measured_on = measured_on.removesuffix("-int8")
        keeps = engine == "auto" and measured_on in (*TRIED["auto"], "module")
        self._kept = measured_on if keeps else ""
        self.name, self.reason = "module", ""
        self._signatures: dict[str, Any] = {}
        self._causes: dict[str, str] = {}
        self._fused: FusedModel | None = None
        self._compiled: CompiledModel | None = None
        self._graphs: Graphs | None = None
        self._stacks: dict[tuple[int, int], tuple[Matrix, Tensor | None]] = {}
        self._readout_signature: Any = None
        self._readout: FusedReadout | CompiledReadout | GraphReadout | None = None
        self._paces: dict[tuple[str, int], Pace] = {}
        self._compile_s = 0.0

    @property
    def warm_up_s(self) -> float:
        """Seconds spent so far on compiling kernels and capturing graphs."""
        return self._compile_s + (0.0 if self._graphs is None else self._graphs.warm_up_s)

    @torch.no_grad()
    def segments(self, exit_layers: Sequence[int]) -> list[Segment]:
        """One segment before each of the ascending `exit_layers`.

        Raises:
            ModelError: the back end that `engine` insists on cannot be had.
        """
        self.name, self.reason = self._choose()
        if self.name == "module" and self.weights == "int8":
            raise ModelError(
                f"weights='int8' cannot run {self.decoder.name}: {self.reason}. Leave it out."
            )
        if self.name == "module" and self.engine not in ("auto", "module"):
            raise ModelError(
                f"engine={self.engine!r} cannot run {self.decoder.name}: {self.reason}. "
                "Use engine='auto' or 'module'."
            )
        if self.name == "module":
            return module_segments(self.decoder, exit_layers)
        if self.name in ON_SLABS:
            assert self._graphs is not None
            return [*graphs.segments(self._graphs, exit_layers)]
        assert self._fused is not None
        segments = self._long_segments(self._fused, exit_layers)
        compiled = self._compiled if self.name == "compiled" else None
        if self.weights == "int8":
            self.name += "-int8"
        if compiled is None:
            return segments
        desk = Desk(self._fused.sizes, self._fused.qk_floor, most_tokens())
        most = longest(self._fused)
        return [CompiledSegment(compiled, segment, desk, most) for segment in segments]

    def _long_segments(self, model: FusedModel, exit_layers: Sequence[int]) -> list[Segment]:
        """What runs blocks of many tokens."""
        bounds = list(zip([0, *exit_layers[:-1]], exit_layers, strict=True))
        if model.narrow:
            return [NarrowSegment(self.decoder, *each) for each in bounds]
        workspace = Workspace(model.sizes)
        return [FusedSegment(model, *each, self._stack(*each), workspace) for each in bounds]

    def embed(self) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """(ids, starts) -> hidden states before the first of the latest segments.

        See `Decoder.embed`.
        """
        decoder = self.decoder
        return (lambda *args: wide(decoder.embed(*args))) if self._narrow else decoder.embed

    def normed(self) -> Callable[[Tensor, int], Tensor]:
        """(hidden states, exit layer) -> what the LM head sees there, for the latest segments."""
        decoder, dtype = self.decoder, self.decoder.dtype
        if not self._narrow:
            return decoder.normed

        def norm(hidden: Tensor, exit_layer: int) -> Tensor:
            if exit_layer not in decoder.own:
                return decoder.normed(hidden, exit_layer)
            return wide(decoder.normed(hidden.to(dtype), exit_layer))

        return norm

    def cache(self, capacity: int, batch: int) -> KVCache:
        """An empty cache for the latest segments, with room for `capacity` tokens at first."""
        if self.name in ON_SLABS and self._graphs is not None:
            return self._graphs.cache(capacity, batch)
        return KVCache(self.decoder.n_layers, capacity, batch)

    @torch.no_grad()
    def readout(self) -> Callable[[Tensor, int], Tensor]:
        """(hidden states [rows, hidden], exit layer) -> logits, for the latest segments."""
        shared, own = self._shared_readout(), self.decoder.own
        if shared is None and not self._narrow:
            return self.decoder.readout
        if shared is not None and not own:
            return shared

        def read(hidden: Tensor, exit_layer: int) -> Tensor:
            if shared is not None and exit_layer not in own:
                return shared(hidden)
            # The model's own modules take what its own layers would have given.
            return wide(self.decoder.readout(hidden.to(self.decoder.dtype), exit_layer))

        return read

    @property
    def _narrow(self) -> bool:
        """Whether the latest segments work in float32 and the model in less."""
        return self.name not in ("module", *ON_SLABS) and self.decoder.dtype not in WIDE

    @property
    def widens(self) -> bool:
        """Whether the latest segments read weights in half precision, but work in float32."""
        return self._narrow and self.weights == "own"

    def _shared_readout(self) -> FusedReadout | CompiledReadout | GraphReadout | None:
        """The final norm and LM head prepared; None where the model's own have to do."""
        parts = self.decoder.plain_readout
        if self.name == "module" or parts is None or any(map(_hooked, parts)):
            return None
        weights = [getattr(module, "weight", None) for module in parts]
        if any(type(w) is not nn.Parameter for w in weights):
            return None
        if self.name in ON_SLABS:
            signature: Any = (self._graphs, _addresses(weights))
        elif self._too_large(weights):
            return None
        else:
            signature = (self.name, _signature(weights))
        if signature != self._readout_signature:
            self._readout, self._readout_signature = self._made_readout(*parts), signature
        return self._readout

    def confidences(self, confidences: Confidences) -> Confidences:
        """The confidences in what the latest `readout` gives, the quickest way there is."""
        if self.name in ON_SLABS and isinstance(self._readout, GraphReadout):
            return SummedConfidences(confidences, self._readout)
        if self.name.startswith("compiled"):
            return CompiledConfidences(confidences)
        return confidences

    def stretch(self, scheduler: Scheduler, drafts: DraftLength | None = None) -> Stretch | None:
        """What decodes texts in stretches, of the latest segments, if that can be done.

        Args:
            scheduler: of these texts.
            drafts: how many tokens may leave before a deep pass must confirm them; None: those that
                leave need not be confirmed.
        """
        if not self.name.startswith("compiled") or unfit(scheduler, drafts is not None):
            return None
        pace = self._paces.setdefault((self.name, len(scheduler.rows)), Pace())
        if drafts is not None:
            found = LosslessStretch(scheduler, pace, drafts)
        else:
            found = (BatchStretch if len(scheduler.rows) > 1 else Stretch)(scheduler, pace)
        if self._signatures.get(type(found).__name__) != self.name:
            self._signatures[type(found).__name__] = self.name
            clock = time.perf_counter()
            with compiling():
                found.run([0] * len(scheduler.rows), [0] * len(scheduler.rows), frozenset())
            self._compile_s += time.perf_counter() - clock
        return found

    def _made_readout(
        self, norm: Any, head: Any
    ) -> FusedReadout | CompiledReadout | GraphReadout | None:
        if self.name in ON_SLABS:
            assert self._graphs is not None
            return graphs.readout(self._graphs, norm, head)
        if self.widens and head.weight.dtype in BITS:
            made = narrow_readout(norm, head)
            return CompiledReadout(made) if made else None
        to_round = self.weights == "int8"
        made = fuse_readout(norm, head, to_round)
        if made is not None and to_round:
            made = quantised_readout(made)
        return CompiledReadout(made) if made and self.name.startswith("compiled") else made

    def _stack(self, start: int, stop: int) -> tuple[Matrix, Tensor | None]:
        assert self._fused is not None
        if (start, stop) not in self._stacks:
            self._stacks[start, stop] = stacked(self._fused, start, stop)
        return self._stacks[start, stop]

    def _too_large(self, weights: Sequence[Any]) -> bool:
        asked_for = self.engine in ("fused", "compiled") or self.weights == "int8"
        return not asked_for and _copies(weights) > MOST_COPIED_BYTES

    def _choose(self) -> tuple[str, str]:
        """The back end to use, and why those before it cannot run the model as it is now."""
        tried = TRIED[self.engine]
        if self._kept:
            tried = (self._kept, *(name for name in tried if name != self._kept))
        if not tried:
            return "module", "engine='module' was asked for"
        if self._kept == "module" and self.weights == "own":
            return "module", "the calibration was made on it"
        common = self._unfit()
        if common:
            return "module", common
        reasons = []
        for name in tried:
            reason = self._unfit_for(name)
            if not reason:
                kept = "the calibration was made on it" if name == self._kept else ""
                return name, kept or "; ".join(reasons)
            reasons.append(reason if len(tried) == 1 else f"not {name}, because {reason}")
        return "module", "; ".join(reasons)

    def _unfit(self) -> str:
        """Why nothing but the modules can run the model as it is now; empty if something may."""
        layers = self.decoder.layers
        if layers.training:
            return "the model is in training mode"
        if any(map(_hooked, _within(layers))):
            return "hooks on its layers would not be called"
        weights = _weights(layers)
        others = {type(w).__name__ for w in weights if type(w) is not nn.Parameter}
        if others:
            return f"its weights are no plain tensors but {', '.join(sorted(others))}"
        return ""

    def _unfit_for(self, name: str) -> str:
        if name == "fused":
            return self._unfit_for_fused()
        return self._unfit_for_compiled() if name == "compiled" else self._unfit_for_graphs(name)

    def _unfit_for_compiled(self) -> str:
        """Why compiled code cannot run the model, or with "auto" is not the quicker way."""
        reason = missing(self.decoder.dtype) or self._unprepared()
        if reason:
            return reason
        # Which way is quicker depends on how many threads each has.
        if_quicker = self.engine == "auto" and self._kept != "compiled"
        signature = (self._signatures["fused"], torch.get_num_threads(), threads(), if_quicker)
        if signature != self._signatures.get("compiled"):
            assert self._fused is not None
            self._signatures["compiled"] = signature
            self._compiled, self._causes["compiled"], seconds = prepared(self._fused, if_quicker)
            self._compile_s += seconds
            if self._compiled is not None:
                self._fused, self._stacks = self._compiled.fused, {}
        return self._causes["compiled"]

    def _unfit_for_fused(self) -> str:
        if self.weights == "own" and self.decoder.dtype in BITS:
            return f"it is {self.decoder.dtype}; dtype=torch.float32 loads it as fused needs it"
        return self._unprepared()

    def _unprepared(self) -> str:
        """Why the layers cannot be prepared for other ways to run them than their own."""
        weights = _weights(self.decoder.layers)
        if self._too_large(weights):
            return f"copies of its layers would take {_copies(weights) / 2**30:.1f} GiB"
        signature = _signature(weights)
        if signature != self._signatures.get("fused"):
            self._fused, self._stacks, self._signatures["fused"] = None, {}, signature
            try:
                self._fused = fuse(self.decoder, self._kept_of_layers())
            except Unfit as error:
                self._causes["fused"] = str(error)
        return "" if self._fused is not None else self._causes["fused"]

    def _kept_of_layers(self) -> Callable[[Any, Any], Any] | None:
        """See `fuse`."""
        if self.weights == "int8":
            return lambda _, prepared: quantised(prepared)
        return narrowed if self.decoder.dtype in BITS else None

    def _unfit_for_graphs(self, name: str) -> str:
        signature = _addresses(_weights(self.decoder.layers))
        if signature != self._signatures.get("graphs"):
            self._graphs, self._signatures["graphs"] = None, signature
            try:
                self._graphs = Graphs(self.decoder, Direct() if name == "static" else None)
            except Unfit as error:
                self._causes["graphs"] = str(error)
        return "" if self._graphs is not None else self._causes["graphs"]
