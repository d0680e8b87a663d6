"""The back end `graphs`: static-shape steps captured once and replayed, for CUDA.

On a GPU a decoding loop in Python is bound by launching kernels, whatever they do. Here a segment
on a tile of tokens is one captured graph: the host copies hidden states and a plan of positions to
fixed addresses, replays, and reads nothing back. A check's outcome arrives in pinned memory, where
the host waits for it without asking the device. Prompts, which are long, go through the model's own
layers. The back end `static` runs the same code call by call, on any device.

Axes: `rows`, `time`, `tokens`, `hidden`, `vocab`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..confidence import Confidences, Summary
from ..decoder import Decoder
from ..kernels import operations, plain
from .cache import KVCache, Span
from .layer_parts import Unfit
from .recorder import Captured, Recorder
from .slab import Slab, SlabCache, Slabs, Workspace, lasting
from .static import StaticModel, build, norm_of

# Tokens that a step has room for. A GPU reads the weights in the time that a few dozen tokens take,
# and what a token gives does not depend on its neighbours while the tile is the same: a draft and
# its verification, a text alone and in a small batch.
TILES = (32, 64, 128, 256)
_PATIENCE_S = 5.0  # the longest wait for a flag before the device is asked what is wrong


def tile_for(tokens: int) -> int | None:
    """The smallest tile with room for so many tokens; None if there is none."""
    return next((tile for tile in TILES if tokens <= tile), None)


class Graphs:
    """A model's steps, its slabs, and what was recorded."""

    def __init__(self, decoder: Decoder, recorder: Recorder | None = None):
        """Prepare.

        Args:
            decoder: of the model.
            recorder: what to do with a step; None captures CUDA graphs.

        Raises:
            Unfit: the model cannot be run like this, or comes out differently.
        """
        weight = next(decoder.layers.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        if recorder is None and self.device.type != "cuda":
            raise Unfit(f"it is on {self.device.type}, and graphs are captured on CUDA devices")
        if len({(w.device, w.dtype) for w in decoder.layers.parameters()}) > 1:
            raise Unfit("its layers differ in device or dtype")
        self.decoder = decoder
        self.recorder = recorder or Captured(self.device)
        self.model: StaticModel = build(decoder, operations.best_for(weight.detach()))
        self.slabs = Slabs(self._slab)
        clock = time.perf_counter()
        try:
            _compare(self)
        except RuntimeError as error:
            raise Unfit(f"its steps cannot be recorded ({str(error).splitlines()[0]})") from None
        self._compared_s = time.perf_counter() - clock

    @property
    def warm_up_s(self) -> float:
        """Seconds spent so far on capturing and on comparing, prefills not included."""
        return self.recorder.seconds + self._compared_s

    def cache(self, capacity: int, batch: int) -> SlabCache:
        """An empty cache whose steps can be replayed."""
        return SlabCache(self.decoder.n_layers, capacity, batch, self.slabs)

    def close(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether two results differ by rounding only."""
        # Norms and softmax work in float32 even in a float64 model.
        precision = max(torch.finfo(self.dtype).eps, torch.finfo(torch.float32).eps)
        difference = float((ours - theirs).abs().max())
        return difference <= float(theirs.abs().max()) * precision**0.5

    def _slab(self, slots: int, capacity: int) -> Slab:
        with lasting():
            like = torch.empty(1, 1, 1, dtype=self.dtype, device=self.device)
            cos, sin = self.decoder.positions.table(like, capacity)
        return Slab(self.decoder.n_layers, slots, capacity, self.model.heads, (cos, sin))

    def recorded(
        self, kind: str, layers: tuple[int, int], tile: int, slab: Slab, work: Workspace
    ) -> Callable[[], None]:
        """What runs `layers` (start, stop) on a tile of a slab; `kind` "store" stores their K/V."""
        key = kind, *layers, tile
        if key not in slab.recorded:
            step: Any = getattr(self.model, kind)
            slab.recorded[key] = self.recorder.record(lambda: step(*layers, slab, work))
        return slab.recorded[key]


@dataclass(frozen=True)
class GraphSegment:
    """Layers `start`..`stop` of a `Graphs`."""

    graphs: Graphs
    start: int
    stop: int

    @torch.no_grad()
    def run(
        self, hidden: Tensor, cache: KVCache, span: Span | None = None, newest_only: bool = False
    ) -> Tensor:
        """Run the layers on a block [rows, time, hidden]."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        work = self._replay("run", hidden, cache, span)
        if work is None:
            return self.graphs.decoder.run(hidden, self.start, self.stop, cache, span)
        return work.result(span)

    @torch.no_grad()
    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """Give the layers the block's keys and values only."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        if self._replay("store", hidden, cache, span) is None:
            self.graphs.decoder.store(hidden, self.start, self.stop, cache, span)

    def _replay(self, kind: str, hidden: Tensor, cache: KVCache, span: Span) -> Workspace | None:
        """Run a step; None if the block has too many tokens or the cache is another's."""
        tile = tile_for(sum(span.counts))
        if tile is None or not isinstance(cache, SlabCache):
            return None
        cache.reserve(max(span.stops))
        work = cache.slab.workspace(tile, hidden)
        work.fill(hidden, span, cache.of(span))
        self.graphs.recorded(kind, (self.start, self.stop), tile, cache.slab, work)()
        cache.lengthen(self.start, self.stop, span)
        return work


def segments(graphs: Graphs, exit_layers: Sequence[int]) -> list[GraphSegment]:
    """One segment before each of the ascending `exit_layers`."""
    starts = [0, *exit_layers[:-1]]
    return [
        GraphSegment(graphs, start, stop) for start, stop in zip(starts, exit_layers, strict=True)
    ]


class _Desk:
    """Where the readout of a tile puts what it finds, on the device and on the host."""

    def __init__(self, tile: int, head: Tensor):
        device, pinned = head.device, head.is_cuda
        with lasting():
            self.hidden = head.new_zeros(tile, head.shape[1])
            self.logits = head.new_zeros(tile, head.shape[0])
            self.summary = torch.zeros(tile, plain.SUMMARY, device=device)
            self.count = torch.zeros(1, dtype=torch.int64, device=device)
            self._summary = torch.zeros(tile, plain.SUMMARY, pin_memory=pinned)
            self._count = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self._seen, self.expected = self._count.numpy(), 0  # the same memory, read without torch
        self.replay: Callable[[], None] = lambda: None

    def tell(self) -> None:
        """Send the summary to the host and then, behind it, that it is there."""
        self._summary.copy_(self.summary, non_blocking=True)
        self.count.add_(1)
        self._count.copy_(self.count, non_blocking=True)

    def settle(self) -> None:
        """Count from here, after whatever ran while recording."""
        if self.hidden.is_cuda:
            torch.cuda.synchronize(self.hidden.device)
        self.expected = int(self._seen[0])

    def await_summary(self, rows: int) -> list[Summary]:
        """The latest summaries, as soon as they are here."""
        deadline = time.perf_counter() + _PATIENCE_S
        while self._seen[0] < self.expected:
            if time.perf_counter() > deadline:
                torch.cuda.synchronize(self.hidden.device)  # raises what went wrong, if anything
                deadline = float("inf")
        return [Summary(*row) for row in self._summary[:rows].tolist()]


class GraphReadout:
    """Final norm and LM head as one replayed step, which also sums the logits up for a check."""

    def __init__(self, graphs: Graphs, norm: Any, head: Any):
        """Prepare.

        Args:
            graphs: whose recorder and operations are used.
            norm: the final root-mean-square norm.
            head: a linear layer without bias.

        Raises:
            AttributeError: another kind of norm.
        """
        self._graphs, self._norm, self._head = graphs, norm_of(norm), head.weight.detach()
        self._desks: dict[int, _Desk] = {}
        self._latest: tuple[Tensor, _Desk] | None = None
        self._lock = threading.Lock()  # threads that generate with one model share the desks

    @torch.no_grad()
    def __call__(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """Hidden states [rows, hidden] after any layer -> logits [rows, vocab]."""
        tile = tile_for(len(hidden))
        if tile is None:
            return self._graphs.decoder.readout(hidden)
        with self._lock:
            desk = self._desks.get(tile) or self._furnish(tile)
            desk.hidden[: len(hidden)].copy_(hidden)
            desk.replay()
            desk.expected += 1
            logits = desk.logits[: len(hidden)].clone()
            self._latest = logits, desk
        return logits

    def summaries(self, logits: Tensor) -> list[Summary] | None:
        """What is known of these logits without computing on them; None if nothing is."""
        with self._lock:
            if self._latest is None or self._latest[0] is not logits:
                return None
            return self._latest[1].await_summary(len(logits))

    def _furnish(self, tile: int) -> _Desk:
        desk = self._desks[tile] = _Desk(tile, self._head)
        read_out = self._graphs.model.operations.read_out

        def step() -> None:
            read_out(desk.hidden, *self._norm, self._head, desk.logits, desk.summary)
            desk.tell()

        desk.replay = self._graphs.recorder.record(step)
        desk.settle()
        return desk


def readout(graphs: Graphs, norm: Any, head: Any) -> GraphReadout | None:
    """A `GraphReadout`, if it gives what the decoder's own readout gives."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, head.in_features, generator=generator).to(graphs.device, graphs.dtype)
    theirs = graphs.decoder.readout(hidden)
    try:
        made = GraphReadout(graphs, norm, head)
        ours = made(hidden)
    except (AttributeError, RuntimeError):
        return None
    return made if graphs.close(ours, theirs) else None


class SummedConfidences(Confidences):
    """`Confidences` of readouts that were summed up on the device as they were made."""

    def __init__(self, confidences: Confidences, readout: GraphReadout):
        """Measure as `confidences` does, asking `readout` first."""
        super().__init__(confidences.measure, confidences.maps, confidences.gate)
        self._readout = readout

    def __call__(self, logits: Tensor, exit_layer: int, measure: str | None = None) -> list[float]:
        """The confidence in each row of logits [rows, vocab]; see `Confidences`."""
        summaries = self._readout.summaries(logits)
        if summaries is None:
            return super().__call__(logits, exit_layer, measure)
        return self.of_summaries(summaries, logits.shape[-1], exit_layer, measure)


@torch.no_grad()
def _compare(graphs: Graphs) -> None:
    """Raise `Unfit` unless random tokens come out as the module back end gives them."""
    decoder = graphs.decoder
    cache, expected = graphs.cache(16, 1), KVCache(decoder.n_layers)
    whole = GraphSegment(graphs, 0, decoder.n_layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, 10), generator=generator)
    for part in ids.to(graphs.device).split([5, 1, 3, 1], dim=1):
        hidden = decoder.embed(part, expected.lengths[0])
        ours = whole.run(hidden, cache)
        theirs = decoder.run(hidden, 0, decoder.n_layers, expected)
        if not graphs.close(ours, theirs):
            difference = float((ours - theirs).abs().max())
            raise Unfit(f"its layers compute something else (they differ by {difference:.2g})")
