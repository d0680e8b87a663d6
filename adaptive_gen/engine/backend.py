"""Which back end runs a model's segments, and what reads them out."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..confidence import Confidences
from ..decoder import Decoder
from ..errors import ModelError, OptionError
from ..naming import hooked
from . import graphs
from .batch import BatchStretch, LosslessBatchStretch
from .cache import KVCache
from .choosing import Choice
from .compiled import CompiledSegment, NarrowSegment, in_pieces, longest, most_tokens
from .compiled_readout import CompiledConfidences, CompiledReadout
from .desk import Desk
from .folding import WIDE, wide
from .fused import FusedModel, FusedSegment
from .fused_readout import FusedReadout, fuse_readout, narrow_readout
from .graphs import GraphReadout, SummedConfidences
from .int8 import quantised_readout
from .machine_code import compiling
from .narrow import BITS
from .prepared import Prepared, Watched, addresses
from .scheduler import Scheduler
from .segment import Segment, module_segments
from .stretch import LosslessStretch, Pace, Stretch, unfit
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
        self._measured_on = measured_on
        measured_on = measured_on.removesuffix("-int8")
        keeps = engine == "auto" and measured_on in (*TRIED["auto"], "module")
        self._kept = measured_on if keeps else ""
        self.name, self.reason = "module", ""
        self._prepared = Prepared(decoder, engine, weights, self._kept)
        self._compiled_stretches: set[tuple[str, str]] = set()
        self._watched, self._readout_signature = Watched(), None  # of the norm and the head
        self._readout: FusedReadout | CompiledReadout | GraphReadout | None = None
        self._paces: dict[tuple[str, int], Pace] = {}
        self._narrow = False  # whether the latest segments work in float32 and the model in less
        self._compile_s = 0.0  # spent on compiling stretches

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, pickled ones too, prepare weights of their own."""
        return type(self), (self.decoder, self.engine, self.weights, self._measured_on)

    @property
    def warm_up_s(self) -> float:
        """Seconds spent so far on compiling kernels and capturing graphs."""
        return self._compile_s + self._prepared.warm_up_s

    @torch.no_grad()
    def segments(self, exit_layers: Sequence[int]) -> list[Segment]:
        """One segment before each of the ascending `exit_layers`.

        Raises:
            ModelError: the back end that `engine` insists on cannot be had.
        """
        self.name, self.reason = self._choose()
        self._narrow = False
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
            assert self._prepared.graphs is not None
            return [*graphs.segments(self._prepared.graphs, exit_layers)]
        fused = self._prepared.fused
        assert fused is not None
        self._narrow = self.decoder.dtype not in WIDE
        compiled = self._prepared.compiled if self.name == "compiled" else None
        if self.weights == "int8":
            self.name += "-int8"
        bounds = list(zip([0, *exit_layers[:-1]], exit_layers, strict=True))
        if compiled is None:
            return self._long_segments(fused, bounds)
        desk = Desk(fused.sizes, fused.turns, fused.qk_floors, most_tokens())
        most, cut = longest(fused), in_pieces(fused)
        longs = [None] * len(bounds) if cut else self._long_segments(fused, bounds)
        return [
            CompiledSegment(compiled, *each, desk, most, long)
            for each, long in zip(bounds, longs, strict=True)
        ]

    def _long_segments(self, model: FusedModel, bounds: list[tuple[int, int]]) -> list[Segment]:
        """What runs blocks of many tokens."""
        if model.narrow:
            return [NarrowSegment(self.decoder, *each) for each in bounds]
        workspace = Workspace(model.sizes, len(model.turns))
        return [
            FusedSegment(model, *each, self._prepared.stack(*each), workspace) for each in bounds
        ]

    def embed(self) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """(ids, starts) -> hidden states before the first of the latest segments.

        See `Decoder.embed`.
        """
        decoder, plain = self.decoder, self.decoder.plain_embedding
        if not self._narrow:
            return decoder.embed
        if plain is None:
            return lambda *args: wide(decoder.embed(*args))
        table, factor, positions = plain

        # Multiplied and added in float32, as everything that follows.
        def embed(ids: Tensor, starts: Sequence[int]) -> Tensor:
            found = wide(F.embedding(ids, table)) * factor
            if positions is None:
                return found
            at = torch.tensor(starts)[:, None] + torch.arange(ids.shape[1])
            return found + wide(F.embedding(at, positions))

        return embed

    def normed(self) -> Callable[[Tensor, int], Tensor]:
        """(hidden states, exit layer) -> what the LM head sees there, for the latest segments."""
        decoder, dtype = self.decoder, self.decoder.dtype
        if not self._narrow:
            return decoder.normed

        @functools.cache
        def final_norm() -> Any:  # as it is now: its weights may be others for the next text
            return wide(decoder.plain_readout[0]) if decoder.plain_readout else None

        def norm(hidden: Tensor, exit_layer: int) -> Tensor:
            if exit_layer not in decoder.own and final_norm() is not None:
                return final_norm()(hidden)
            return wide(decoder.normed(hidden.to(dtype), exit_layer))

        return norm

    def cache(self, capacity: int, batch: int) -> KVCache:
        """An empty cache for the latest segments, with room for `capacity` tokens at first."""
        if self.name in ON_SLABS and self._prepared.graphs is not None:
            return self._prepared.graphs.cache(capacity, batch)
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
    def widens(self) -> bool:
        """Whether the latest segments read weights in half precision, but work in float32."""
        return self._narrow and self.weights == "own"

    def _shared_readout(self) -> FusedReadout | CompiledReadout | GraphReadout | None:
        """The final norm and LM head prepared; None where the model's own have to do."""
        parts = self.decoder.plain_readout
        if self.name == "module" or parts is None or any(map(hooked, parts[:2])):
            return None
        weights = [getattr(module, "weight", None) for module in parts[:2]]
        biases = [getattr(module, "bias", None) for module in parts[:2]]
        weights += [bias for bias in biases if bias is not None]
        if any(type(w) is not nn.Parameter for w in weights):
            return None
        if self.name in ON_SLABS:
            state: Any = (self._prepared.graphs, addresses(weights))
        elif self._prepared.too_large(weights):
            return None
        else:
            state = (self.name, self._watched.signature(weights))
        if state != self._readout_signature:
            self._readout, self._readout_signature = self._made_readout(*parts), state
        return self._readout

    def confidences(self, confidences: Confidences) -> Confidences:
        """The confidences in what the latest `readout` gives, the quickest way there is."""
        if self.name in ON_SLABS and isinstance(self._readout, GraphReadout):
            return SummedConfidences(confidences, self._readout)
        if self.name.startswith("compiled"):
            return CompiledConfidences(confidences)
        return confidences

    def stretch(
        self, scheduler: Scheduler, choice: Choice, audited: bool = False
    ) -> Stretch | None:
        """What decodes texts in stretches, of the latest segments, if that can be done.

        Args:
            scheduler: of these texts; its rows have a draft length each if deep passes must confirm
                what leaves, or none has.
            choice: of their tokens.
            audited: whether to compare what leaves with full depth's.
        """
        if not self.name.startswith("compiled") or unfit(scheduler):
            return None
        pace = self._paces.setdefault((self.name, len(scheduler.rows)), Pace())
        drafts, several = scheduler.rows[0].draft_length is not None, len(scheduler.rows) > 1
        if audited and choice.penalty != 1:  # which hangs on what had been said by then
            return None
        if several:
            kind = LosslessBatchStretch if drafts else BatchStretch
        else:
            kind = LosslessStretch if drafts else Stretch
        found = kind(scheduler, pace, choice, audited)
        if (type(found).__name__, self.name) not in self._compiled_stretches:
            self._compiled_stretches.add((type(found).__name__, self.name))
            clock = time.perf_counter()
            with compiling():
                nothing = [0] * len(scheduler.rows)
                found.run(nothing, nothing, frozenset(), nothing)
            self._compile_s += time.perf_counter() - clock
        return found

    def _made_readout(
        self, norm: Any, head: Any, factor: float, softcap: float | None
    ) -> FusedReadout | CompiledReadout | GraphReadout | None:
        if self.name in ON_SLABS:
            assert self._prepared.graphs is not None
            plain = factor == 1 and softcap is None
            return graphs.readout(self._prepared.graphs, norm, head) if plain else None
        if self.widens and head.weight.dtype in BITS:
            made = narrow_readout(norm, head, factor, softcap)
            return CompiledReadout(made, wide(norm)) if made else None
        to_round = self.weights == "int8"
        made = fuse_readout(norm, head, factor, softcap, to_round)
        if made is not None and to_round:
            made = quantised_readout(made)
        if made is None or not self.name.startswith("compiled"):
            return made
        return CompiledReadout(made, wide(norm))

    def _choose(self) -> tuple[str, str]:
        """The back end to use, and why those before it cannot run the model as it is now."""
        tried = TRIED[self.engine]
        if self._kept:
            tried = (self._kept, *(name for name in tried if name != self._kept))
        if not tried:
            return "module", "engine='module' was asked for"
        if self._kept == "module" and self.weights == "own":
            return "module", "the calibration was made on it"
        common = self._prepared.unfit()
        if common:
            return "module", common
        reasons: dict[str, list[str]] = {}
        for name in tried:
            reason = self._prepared.unfit_for(name)
            if not reason:
                kept = "the calibration was made on it" if name == self._kept else ""
                return name, kept or _told(reasons)
            reasons.setdefault(reason, []).append(name)
        return "module", _told(reasons) if len(tried) > 1 else next(iter(reasons))


def _told(reasons: Mapping[str, Sequence[str]]) -> str:
    """Why back ends cannot be had: reason -> their names."""
    return "; ".join(f"not {' or '.join(names)}, because {why}" for why, names in reasons.items())
