"""Which back end runs a model's segments, and its prepared weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..confidence import Confidences
from ..decoder import Decoder
from ..errors import ModelError, OptionError
from . import graphs
from .cache import KVCache
from .fused import FusedModel, FusedReadout
from .fusing import Unfit, fuse, fuse_readout, segment
from .graphs import GraphReadout, Graphs, SummedConfidences
from .recorder import Direct
from .segment import Segment, module_segments

# What is tried, in order, before the module back end, which always can. "auto" takes `graphs` once
# it has been measured on a GPU; docs/gpu.md says what is missing.
TRIED = {
    "auto": ("fused",),
    "graphs": ("graphs",),
    "static": ("static",),
    "fused": ("fused",),
    "module": (),
}
ENGINES = tuple(TRIED)
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


def _addresses(weights: Sequence[Any]) -> list[int]:
    """Changes when weights were put elsewhere; what was captured reads the old place."""
    return [w.data_ptr() for w in weights]


class Backend:
    """Makes segments for one model: on the back end that is wanted, if it can, else on module.

    `name` is the back end the latest segments run on, and `reason` why that is not one tried
    before it.
    """

    def __init__(self, decoder: Decoder, engine: str = "auto"):
        """Choose.

        Args:
            decoder: the model.
            engine: "auto" takes `fused` if it can; "fused", "graphs" and "static" insist; "module"
                is the model's own layers.
        """
        if engine not in ENGINES:
            raise OptionError(f"engine={engine!r} is unknown; use one of {', '.join(ENGINES)}.")
        self.decoder, self.engine = decoder, engine
        self.name, self.reason = "module", ""
        self._signatures: dict[str, Any] = {}
        self._causes: dict[str, str] = {}
        self._fused: FusedModel | None = None
        self._graphs: Graphs | None = None
        self._segments: dict[tuple[int, int], Segment] = {}
        self._readout_signature: Any = None
        self._readout: FusedReadout | GraphReadout | None = None

    @property
    def warm_up_s(self) -> float:
        """Seconds spent so far on capturing graphs."""
        return 0.0 if self._graphs is None else self._graphs.warm_up_s

    @torch.no_grad()
    def segments(self, exit_layers: Sequence[int]) -> list[Segment]:
        """One segment before each of the ascending `exit_layers`.

        Raises:
            ModelError: the back end that `engine` insists on cannot be had.
        """
        self.name, self.reason = self._choose()
        if self.name == "module" and self.engine not in ("auto", "module"):
            raise ModelError(
                f"engine={self.engine!r} cannot run {self.decoder.name}: {self.reason}. "
                "Use engine='auto' or 'module'."
            )
        if self.name == "module":
            return module_segments(self.decoder, exit_layers)
        if self.name != "fused":
            assert self._graphs is not None
            return [*graphs.segments(self._graphs, exit_layers)]
        return [
            self._fused_segment(start, stop)
            for start, stop in zip([0, *exit_layers[:-1]], exit_layers, strict=True)
        ]

    def cache(self, capacity: int, batch: int) -> KVCache:
        """An empty cache for the latest segments, with room for `capacity` tokens at first."""
        if self.name in ("graphs", "static") and self._graphs is not None:
            return self._graphs.cache(capacity, batch)
        return KVCache(self.decoder.n_layers, capacity, batch)

    @torch.no_grad()
    def readout(self) -> Callable[[Tensor], Tensor]:
        """Hidden states [rows, hidden] -> logits [rows, vocab], for the latest segments."""
        parts = self.decoder.plain_readout
        if self.name == "module" or parts is None or any(map(_hooked, parts)):
            return self.decoder.readout
        weights = [getattr(module, "weight", None) for module in parts]
        if any(type(w) is not nn.Parameter for w in weights):
            return self.decoder.readout
        if self.name != "fused":
            assert self._graphs is not None
            signature: Any = (self._graphs, _addresses(weights))
        elif self._too_large(weights):
            return self.decoder.readout
        else:
            signature = _signature(weights)
        if signature != self._readout_signature:
            self._readout, self._readout_signature = self._made_readout(*parts), signature
        return self._readout or self.decoder.readout

    def confidences(
        self, confidences: Confidences, readout: Callable[[Tensor], Tensor]
    ) -> Confidences:
        """The confidences in what `readout` gives, the quickest way there is."""
        if isinstance(readout, GraphReadout):
            return SummedConfidences(confidences, readout)
        return confidences

    def _made_readout(self, norm: Any, head: Any) -> FusedReadout | GraphReadout | None:
        if self.name == "fused":
            return fuse_readout(norm, head)
        assert self._graphs is not None
        return graphs.readout(self._graphs, norm, head)

    def _fused_segment(self, start: int, stop: int) -> Segment:
        assert self._fused is not None
        if (start, stop) not in self._segments:
            self._segments[start, stop] = segment(self._fused, start, stop)
        return self._segments[start, stop]

    def _too_large(self, weights: Sequence[Any]) -> bool:
        return self.engine == "auto" and _size(weights) > MOST_COPIED_BYTES

    def _choose(self) -> tuple[str, str]:
        """The back end to use, and why those before it cannot run the model as it is now."""
        tried = TRIED[self.engine]
        if not tried:
            return "module", "engine='module' was asked for"
        common = self._unfit()
        if common:
            return "module", common
        reasons = []
        for name in tried:
            reason = self._unfit_for_fused() if name == "fused" else self._unfit_for_graphs(name)
            if not reason:
                return name, "; ".join(reasons)
            reasons.append(reason if len(tried) == 1 else f"not {name}, because {reason}")
        return "module", "; ".join(reasons)

    def _unfit(self) -> str:
        """Why nothing but the modules can run the model as it is now; empty if something may."""
        layers = self.decoder.layers
        if layers.training:
            return "the model is in training mode"
        if any(map(_hooked, layers.modules())):
            return "hooks on its layers would not be called"
        weights = list(layers.parameters())
        quantised = {type(w).__name__ for w in weights if type(w) is not nn.Parameter}
        if quantised:
            return f"its weights are no plain tensors but {', '.join(sorted(quantised))}"
        return ""

    def _unfit_for_fused(self) -> str:
        weights = list(self.decoder.layers.parameters())
        if self._too_large(weights):
            return f"copies of its layers would take {_size(weights) / 2**30:.1f} GiB"
        signature = _signature(weights)
        if signature != self._signatures.get("fused"):
            self._fused, self._segments, self._signatures["fused"] = None, {}, signature
            try:
                self._fused = fuse(self.decoder)
            except Unfit as error:
                self._causes["fused"] = str(error)
        return "" if self._fused is not None else self._causes["fused"]

    def _unfit_for_graphs(self, name: str) -> str:
        signature = _addresses(list(self.decoder.layers.parameters()))
        if signature != self._signatures.get("graphs"):
            self._graphs, self._signatures["graphs"] = None, signature
            try:
                self._graphs = Graphs(self.decoder, Direct() if name == "static" else None)
            except Unfit as error:
                self._causes["graphs"] = str(error)
        return "" if self._graphs is not None else self._causes["graphs"]
