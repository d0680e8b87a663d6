"""The back end `compiled`: what `fused` computes, a segment in one call of compiled code.

`fused` prepares the model and runs what is long, a prompt; `kernels.cpu` runs the few tokens of a
decoding step, which is where calls between operations and products of few rows cost most.

Axes: `rows`, `time`, `hidden`, `layers`, `tokens` (of all rows, without filling).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import KVCache, Span
from .fused import FusedModel, FusedReadout, FusedSegment
from .positions import SLIDING
from .workspace import Sizes, Workspace

MOST_TOKENS = 12  # of a block for which the kernels are quicker than general products
_TRIALS = 5
MATRICES = ("qkv", "out", "gate_up", "down")  # of a `fused.Layer`


def unfit(model: FusedModel) -> str:
    """Why a prepared model cannot be run by compiled code; empty if it can."""
    if find_spec("numba") is None:
        return "numba is not installed"
    sizes = model.sizes
    widths = sizes.hidden, sizes.heads * sizes.head_dim, sizes.intermediate
    if any(width % 4 for width in widths):
        return f"its widths {widths} are no multiples of 4"
    return ""


@dataclass(frozen=True)
class CompiledModel:
    """A `FusedModel` whose matrices are views of one array per kind, as kernels take them."""

    fused: FusedModel
    weights: tuple[Any, ...]  # qkv, out, gate_up, down: [layers, in, out] each
    biases: tuple[Any, ...]  # of qkv and out, and gains of queries and keys; see `kernels.cpu`
    floors: Any
    windows: Any

    @classmethod
    def of(cls, model: FusedModel) -> "CompiledModel":
        """Put the layers' weights together; `model` is better forgotten afterwards."""
        positions = model.decoder.positions
        stacks = [torch.stack([getattr(x, name) for x in model.layers]) for name in MATRICES]
        layers = [
            replace(layer, **{name: stack[i] for name, stack in zip(MATRICES, stacks, strict=True)})
            for i, layer in enumerate(model.layers)
        ]
        floors = stacks[0].new_tensor([model.sizes.floor, float(model.qk_floor)])
        window = positions.window or 0
        return cls(
            replace(model, layers=layers),
            tuple(stack.numpy() for stack in stacks),
            tuple(
                _stacked([getattr(layer, name) for layer in layers], axes, stacks[0])
                for name, axes in (("qkv_bias", 1), ("out_bias", 1), ("qk_gain", 2))
            ),
            floors.numpy(),
            np.array([window if kind == SLIDING else 0 for kind in positions.layer_types]),
        )


def _stacked(parts: list[Tensor | None], axes: int, like: Tensor) -> Any:
    """The parts in one array; without entries where the model has none."""
    found = [part for part in parts if part is not None]
    stack = torch.stack(found) if found else like.new_empty(len(parts), *[0] * axes)
    return stack.contiguous().numpy()


class Desk:
    """Buffers of one generation's decoding steps; what runs in two threads must not share them."""

    def __init__(self, sizes: Sizes, like: Tensor):
        """Make them, in the dtype of `like`."""
        room = -(-MOST_TOKENS // 4) * 4
        every = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        mixed = sizes.heads * sizes.head_dim
        self.hidden = like.new_zeros(room, sizes.hidden)
        self.x = self.hidden.numpy()
        widths = sizes.hidden, every, mixed, 2 * sizes.intermediate
        self._buffers = tuple(like.new_zeros(room, width).numpy() for width in widths)
        self._scores = like.new_zeros(64).numpy()
        self._outs: dict[tuple[int, int], Tensor] = {}
        self._span: Any = None  # the one that is placed

    def buffers(self, seen: int) -> tuple[Any, ...]:
        """What the kernels work in, with room for scores of `seen` keys."""
        if len(self._scores) < seen:
            self._scores = np.zeros(1 << seen.bit_length(), self.x.dtype)
        return (*self._buffers, self._scores)

    def out(self, rows: int, time: int) -> Tensor:
        """The first rows * time hidden states as a block [rows, time, hidden]."""
        if (rows, time) not in self._outs:
            self._outs[rows, time] = self.hidden[: rows * time].view(rows, time, -1)
        return self._outs[rows, time]

    def place(self, model: FusedModel, hidden: Tensor, span: Span) -> None:
        """Work out where a block's tokens stand and how they are rotated, unless that is known."""
        at = span.rows, span.starts, span.counts
        if at == self._span:
            return
        self._span = at
        rows = range(len(span.starts)) if span.rows is None else span.rows
        whole = zip(rows, span.starts, span.counts, strict=True)
        self.tokens = np.array([(r, s + i) for r, s, n in whole for i in range(n)])
        turns = torch.view_as_real(model.decoder.positions.turns(hidden, span))
        self.filling = len(self.tokens) < len(span.starts) * span.time
        if len(turns) < len(span.starts):
            turns = turns.expand(len(span.starts), -1, -1, -1)
        turns = turns.flatten(0, 1)
        if self.filling:
            counted = enumerate(span.counts)
            self.index = torch.tensor([r * span.time + i for r, n in counted for i in range(n)])
            turns = turns[self.index]
        self.turns = turns.contiguous().numpy()


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

    @torch.no_grad()
    def run(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> Tensor:
        """Run the layers on a block [rows, time, hidden]; valid until the next run."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        if sum(span.counts) > MOST_TOKENS:
            return self.long.run(hidden, cache, span)
        from ..kernels import cpu

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

    @torch.no_grad()
    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """K/V of a block for all layers."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        if sum(span.counts) > MOST_TOKENS:
            return self.long.store(hidden, cache, span)
        from ..kernels import cpu

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
            model.biases[0],
            model.biases[2],
            model.floors,
            desk.buffers(span.stop),
        )

    def _begin(self, hidden: Tensor, cache: KVCache, span: Span) -> Any:
        """Lay the block out for the kernels; returns the cache's memory."""
        sizes, desk, cut = self.model.fused.sizes, self.desk, hidden[:, : span.time]
        cache.pair(True)
        kv = cache.hold(self.start, self.stop, span, hidden, sizes.kv_heads, sizes.head_dim)
        desk.place(self.model.fused, cut, span)
        if hidden.data_ptr() != desk.hidden.data_ptr():  # else the segment before this one gave it
            flat = cut.reshape(-1, cut.shape[2])
            rows = flat[desk.index] if desk.filling else flat
            desk.hidden[: len(rows)].copy_(rows)
        return kv.numpy()


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
    for way in ways:
        way()
    seconds = time.perf_counter() - clock
    if if_quicker:
        compiled, fused = (min(_timed(way) for _ in range(_TRIALS)) for way in ways)
        if compiled > fused:
            threads = torch.get_num_threads()
            ratio = compiled / fused
            reason = f"its one thread takes {ratio:.1f} times as long as fused with {threads}"
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
    short = CompiledSegment(model, long, Desk(fused.sizes, like))
    return [lambda: short.run(hidden, caches[0]), lambda: long.run(hidden, caches[1])]


def _timed(run: Callable[[], object]) -> float:
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


class CompiledReadout:
    """The final norm and the LM head, for few rows compiled."""

    def __init__(self, fused: FusedReadout):
        """Take the prepared weights over."""
        self._head, self._floor = fused.head, fused.floor
        assert isinstance(fused.head, Tensor)
        self._long = replace(fused, head=fused.head.contiguous())
        self._matrix, self._least = self._long.head.numpy(), float(fused.floor)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, hidden] after any layer -> logits [rows, vocab]."""
        rows = len(hidden)
        if rows > MOST_TOKENS:
            return self._long(hidden)
        from ..kernels import cpu

        room = -(-rows // cpu.TILE) * cpu.TILE if rows > 1 else 1
        x = hidden.new_empty(room, hidden.shape[1])
        x[:rows] = hidden
        logits = hidden.new_empty(room, self._matrix.shape[1])
        normed = np.empty(x.shape, self._matrix.dtype)
        cpu.read_out(x.numpy(), self._least, self._matrix, normed, logits.numpy(), rows)
        return logits[:rows]
