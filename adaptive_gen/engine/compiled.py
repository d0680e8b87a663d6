"""The back end `compiled`: what `fused` computes, a segment in one call of compiled code.

`fused` prepares the model and runs what is long, a prompt; `kernels.cpu` runs the few tokens of a
decoding step, which is where calls between operations and products of few rows cost most.

Axes: `rows`, `time`, `hidden`, `layers`, `tokens` (of all rows, without filling).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import KVCache, Span
from .fused import FusedModel, FusedSegment, Matrix
from .int8 import Int8Matrix
from .positions import SLIDING, Positions
from .workspace import Sizes, Workspace

PANEL, DEPTH = 16, 4  # of `kernels.panels`, which needs numba
# Of rows, for which the kernels are quicker than general products on any number of threads, and of
# a block's tokens where both have as many threads: there the kernels do as well up to a hundred.
MOST_ROWS, MOST_TOKENS = 16, 96
_TRIALS = 5
# How long the threads of the last way stay awake and keep the cores from those of the next.
_SPINNING_S = 0.03
_DOUBT = 1.1  # noise in a trial's ratio, which must not change a machine's choice from run to run
PATIENCE_S = 3.0  # what a first run of compiled code may take before somebody is told why
MATRICES = ("qkv", "out", "gate_up", "down")  # of a `fused.Layer`


log = logging.getLogger("adaptive_gen")


@contextmanager
def compiling() -> Iterator[None]:
    """Say what takes so long, should this be the first time on a machine that code is run."""
    told = threading.Timer(
        PATIENCE_S,
        log.warning,
        ["compiling decoding kernels for this CPU: it takes up to a minute, once on a machine."],
    )
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()


@lru_cache
def kernel(name: str) -> Any:
    """A module of `kernels`; only a process that decodes on a CPU has to load numba for one."""
    return import_module(f"..kernels.{name}", __package__)


def helpers(matrix_bytes: int) -> Any:
    """Who helps the kernels with matrices of up to so many bytes; what they take for `team`."""
    worth = matrix_bytes // kernel("team").LEAST_BYTES - 1
    return import_module(".team", __package__).ready(worth)


def threads() -> int:
    """How many threads the kernels may have."""
    return import_module(".team", __package__).threads()


def most_tokens() -> int:
    """How many tokens of a block the kernels run sooner than general products."""
    return max(MOST_ROWS, MOST_TOKENS * threads() // max(torch.get_num_threads(), threads()))


def unfit(model: FusedModel) -> str:
    """Why a prepared model cannot be run by compiled code; empty if it can."""
    if find_spec("numba") is None:
        return "numba is not installed"
    sizes = model.sizes
    widths = sizes.hidden, sizes.heads * sizes.head_dim, sizes.intermediate
    if any(width % DEPTH for width in widths):
        return f"its widths {widths} are no multiples of {DEPTH}"
    return ""


@dataclass(frozen=True)
class CompiledModel:
    """A `FusedModel`, and its matrices once more in panels; see `kernels.panels`."""

    fused: FusedModel
    weights: tuple[Any, ...]  # qkv, out, gate_up, down: [layers, panels, in, PANEL] each
    scales: tuple[Any, ...]  # of their columns: [layers, panels * PANEL] each
    biases: tuple[Any, ...]  # of qkv and out, and gains of queries and keys; see `kernels.cpu`
    floors: Any
    windows: Any

    @classmethod
    def of(cls, model: FusedModel) -> "CompiledModel":
        """Copy the layers' weights."""
        positions, layers = model.decoder.positions, model.layers
        like, window = model.qk_floor, positions.window or 0
        parts = [_stack([getattr(layer, name) for layer in layers], like) for name in MATRICES]
        return cls(
            model,
            tuple(weights for weights, _ in parts),
            tuple(scales for _, scales in parts),
            tuple(
                _stacked([getattr(layer, name) for layer in layers], axes, like)
                for name, axes in (("qkv_bias", 1), ("out_bias", 1), ("qk_gain", 2))
            ),
            like.new_tensor([model.sizes.floor, float(model.qk_floor)]).numpy(),
            np.array([window if kind == SLIDING else 0 for kind in positions.layer_types]),
        )


def _stack(matrices: list[Matrix], like: Tensor) -> tuple[Any, Any]:
    weights, scales = zip(*(in_panels(matrix, like) for matrix in matrices), strict=True)
    return np.stack(weights), np.stack(scales)


def in_panels(matrix: Matrix, like: Tensor) -> tuple[Any, Any]:
    """An [in, out] matrix as [panels, in, PANEL] with zeros at the end, and its columns' scale.

    What is not rounded has a scale of 1, in the dtype of `like`.
    """
    if isinstance(matrix, Int8Matrix):
        steps, scale = matrix.steps.t(), matrix.scale.to(like.dtype)
    else:
        steps, scale = matrix, like.new_ones(matrix.shape[1])
    inner, outer = steps.shape
    padded = F.pad(steps, (0, padding(outer))).view(inner, -1, PANEL)
    return padded.transpose(0, 1).contiguous().numpy(), F.pad(scale, (0, padding(outer))).numpy()


def padding(columns: int) -> int:
    """Columns that are missing to whole panels."""
    return -columns % PANEL


def _stacked(parts: list[Tensor | None], axes: int, like: Tensor) -> Any:
    """The parts in one array; without entries where the model has none."""
    found = [part for part in parts if part is not None]
    stack = torch.stack(found) if found else like.new_empty(len(parts), *[0] * axes)
    return stack.contiguous().numpy()


class Desk:
    """Buffers of one generation's decoding steps; what runs in two threads must not share them."""

    def __init__(self, sizes: Sizes, like: Tensor, room: int):
        """Make them for blocks of up to `room` tokens, in the dtype of `like`."""
        self.room = room
        every = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        mixed = sizes.heads * sizes.head_dim
        self._all = like.new_zeros(room, sizes.hidden + padding(sizes.hidden))
        self.hidden, self.x = self._all[:, : sizes.hidden], self._all.numpy()
        wide = 2 * sizes.intermediate
        self._largest = sizes.hidden * wide * like.element_size()  # bytes of a layer's matrix
        widths = sizes.hidden, every + padding(every), mixed, wide + padding(wide)
        self._buffers = tuple(like.new_zeros(room, width).numpy() for width in widths)
        self._work = (*self._buffers, self._scores(64))
        self._memory: tuple[Any, Any] = (None, None)  # a cache's, as tensor and as array
        self._tokens = np.zeros((room, 2), np.int64)
        self._outs: dict[tuple[int, int], Tensor] = {}
        self._turns = like.new_zeros(0, sizes.head_dim // 2, 2).numpy()  # of every position
        self._span: Any = None  # the one that is placed

    def _scores(self, room: int) -> Any:
        """For attention to `room` keys, a row for each thread."""
        return np.zeros((threads(), room), self.x.dtype)

    def buffers(self, seen: int) -> tuple[Any, ...]:
        """What the kernels work in, with room for scores of `seen` keys."""
        if self._work[-1].shape[1] < seen:
            self._work = (*self._buffers, self._scores(1 << seen.bit_length()))
        return *self._work, helpers(self._largest)

    def memory(self, kv: Tensor) -> Any:
        """The memory of a cache as an array."""
        if self._memory[0] is not kv:
            self._memory = kv, kv.numpy()
        return self._memory[1]

    def out(self, rows: int, time: int) -> Tensor:
        """The first rows * time hidden states as a block [rows, time, hidden]."""
        if (rows, time) not in self._outs:
            self._outs[rows, time] = self.hidden[: rows * time].view(rows, time, -1)
        return self._outs[rows, time]

    def place(self, positions: Positions, hidden: Tensor, span: Span) -> None:
        """Work out where a block's tokens stand and how they are rotated, unless that is known."""
        at = span.rows, span.starts, span.counts
        if at == self._span:
            return
        self._span = at
        count = sum(span.counts)
        self.tokens = self._tokens[:count]
        rows = range(len(span.starts)) if span.rows is None else span.rows
        first = 0
        for row, start, length in zip(rows, span.starts, span.counts, strict=True):
            for i in range(length):
                self.tokens[first + i, 0], self.tokens[first + i, 1] = row, start + i
            first += length
        self.filling = count < len(span.starts) * span.time
        if self.filling:
            counted = enumerate(span.counts)
            self.index = torch.tensor([r * span.time + i for r, n in counted for i in range(n)])
        if positions.tabled:
            turns = self.turns_until(positions, hidden, span.stop)
            alone = len(span.starts) == 1
            self.turns = turns[span.starts[0] : span.stop] if alone else turns[self.tokens[:, 1]]
            return
        turns = torch.view_as_real(positions.turns(hidden, span))
        turns = turns.expand(len(span.starts), -1, -1, -1).flatten(0, 1)
        turns = turns[self.index] if self.filling else turns
        self.turns = turns.contiguous().numpy()

    def turns_until(self, positions: Positions, like: Tensor, stop: int) -> Any:
        """Cos and sin of the positions below `stop` or more, [.., head_dim / 2, 2]."""
        if len(self._turns) < stop:
            everything = Span((0,), (1 << stop.bit_length(),))
            self._turns = torch.view_as_real(positions.turns(like, everything))[0].numpy()
        return self._turns


@dataclass(frozen=True)
class CompiledSegment:
    """Layers `start`..`stop` of a `CompiledModel`."""

    model: CompiledModel
    long: FusedSegment  # the same layers, for blocks of many tokens
    desk: Desk  # shared by the segments of one generation

    @property
    def start(self) -> int:
        """Layers that have run before it."""
        return self.long.start

    @property
    def stop(self) -> int:
        """Layers that have run after it."""
        return self.long.stop

    def run(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> Tensor:
        """Run the layers on a block [rows, time, hidden]; valid until the next run."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        if sum(span.counts) > self.desk.room:
            return self.long.run(hidden, cache, span)
        cpu = kernel("cpu")
        model, desk = self.model, self.desk
        kv = self._begin(hidden, cache, span)
        cpu.run_layers(
            self.start,
            self.stop,
            desk.x,
            desk.tokens,
            desk.turns,
            kv,
            model.weights,
            model.scales,
            model.biases,
            model.floors,
            model.windows,
            desk.buffers(span.stop),
        )
        if not desk.filling:
            return desk.out(*hidden.shape[:2])
        out = hidden.clone()
        out.view(-1, hidden.shape[2])[desk.index] = desk.hidden[: len(desk.tokens)]
        return out

    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """K/V of a block for all layers."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        if sum(span.counts) > self.desk.room:
            return self.long.store(hidden, cache, span)
        cpu = kernel("cpu")
        model, desk = self.model, self.desk
        kv = self._begin(hidden, cache, span)
        cpu.store_layers(
            self.start,
            self.stop,
            desk.x,
            desk.tokens,
            desk.turns,
            kv,
            model.weights[0],
            model.scales[0],
            model.biases[0],
            model.biases[2],
            model.floors,
            model.fused.sizes.heads,
            desk.buffers(span.stop),
        )

    def _begin(self, hidden: Tensor, cache: KVCache, span: Span) -> Any:
        """Lay the block out for the kernels; returns the cache's memory."""
        sizes, desk = self.model.fused.sizes, self.desk
        # Nothing here needs to be told that there are no gradients, which takes its time too.
        hidden = hidden.detach() if hidden.requires_grad else hidden
        cut = hidden if hidden.shape[1] == span.time else hidden[:, : span.time]
        cache.pair(True)
        kv = cache.hold(self.start, self.stop, span, hidden, sizes.kv_heads, sizes.head_dim)
        desk.place(self.model.fused.decoder.positions, cut, span)
        if desk.filling:
            rows = cut.reshape(-1, sizes.hidden)[desk.index]
            desk.hidden[: rows.shape[0]] = rows
            return desk.memory(kv)
        place = desk.out(*cut.shape[:2])
        if cut is not place:  # else the segment before this one gave it
            place.copy_(cut)
        return desk.memory(kv)


def prepared(model: FusedModel, if_quicker: bool) -> tuple[CompiledModel | None, str, float]:
    """Compile what runs `model`.

    Args:
        model: a prepared one; it is better forgotten afterwards.
        if_quicker: only if a token then takes no longer than by `fused`, by a trial.

    Returns:
        The compiled model or None, why it is None, and the seconds that compiling took; machine
        code is kept on disk, so that only the first process on a machine compiles.
    """
    reason = unfit(model)
    if reason:
        return None, reason, 0.0
    made = CompiledModel.of(model)
    clock = time.perf_counter()
    ways = _ways(made)
    with compiling():
        for way in ways:
            way()
    seconds = time.perf_counter() - clock
    if if_quicker:
        trials = [[_timed(way) for way in ways] for _ in range(_TRIALS)]
        compiled, fused = map(min, zip(*trials, strict=True))
        if compiled > fused * _DOUBT:
            reason = f"it takes {compiled / fused:.1f} times as long as fused here"
            return None, reason, seconds
    return made, "", seconds


def _ways(model: CompiledModel) -> list[Callable[[], object]]:
    """Runs of one token through all layers: compiled, and fused."""
    fused = model.fused
    n_layers, stack = len(fused.layers), (fused.layers[0].qkv, None)
    like = fused.qk_floor
    long = FusedSegment(fused, 0, n_layers, stack, Workspace(fused.sizes))
    hidden = like.new_ones(1, 1, fused.sizes.hidden)
    caches = KVCache(n_layers), KVCache(n_layers)
    short = CompiledSegment(model, long, Desk(fused.sizes, like, room=1))
    return [lambda: short.run(hidden, caches[0]), lambda: long.run(hidden, caches[1])]


def _timed(run: Callable[[], object]) -> float:
    """Seconds of a run among others of its kind, as in a text."""
    if max(torch.get_num_threads(), threads()) > 1:
        time.sleep(_SPINNING_S)
    run()
    run()
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock
