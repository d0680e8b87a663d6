"""The back end `compiled`: what `fused` computes, a segment in one call of compiled code.

`fused` prepares the model; `kernels.layers` runs the few tokens of a decoding step, which is where
calls between operations and products of few rows cost most. What is long, a prompt, runs by
`fused`, by the model's own layers, or by the kernels piece by piece, whichever is quick.

Axes: `rows`, `time`, `hidden`, `layers`, `tokens` (of all rows, without filling).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import KVCache, Span
from .desk import Desk
from .fused import FusedModel, FusedSegment
from .machine_code import compiling, kernel
from .panelled import CompiledModel, unfit
from .rules import QUEUE_CAP
from .segment import ModuleSegment, Segment
from .team import threads
from .workspace import Workspace

# Of rows to read out, for which the kernels are quicker than general products on any number of
# threads; and of a block's tokens, or of texts, where both have as many threads: there the kernels
# do as well up to a hundred.
MOST_ROWS, MOST_TOKENS = 16, 96
_TRIALS = 5
# How long the threads of the last way stay awake and keep the cores from those of the next.
_SPINNING_S = 0.03
_TRIED, _FAR = 1024, 2  # width of a matrix that is tried; how much longer is far longer
_DOUBT = 1.1  # noise in a trial's ratio, which must not change a machine's choice from run to run


@dataclass(frozen=True)
class CompiledSegment:
    """Layers `start`..`stop` of a `CompiledModel`."""

    model: CompiledModel
    start: int
    stop: int
    desk: Desk  # shared by the segments of one generation
    longest: int  # tokens of a row that are not yet many, if the desk has room for those of all
    long: Segment | None  # the same layers, for blocks of many tokens; None: they come in pieces

    def run(
        self, hidden: Tensor, cache: KVCache, span: Span | None = None, newest_only: bool = False
    ) -> Tensor:
        """Run the layers on a block [rows, time, hidden]; valid until the next run."""
        span = span or cache.span(self.start, (hidden.shape[1],) * cache.batch)
        if self._is_long(span):
            if self.long is not None:
                return self.long.run(hidden, cache, span, newest_only)
            out = hidden.clone()
            for rows, times, piece in self._pieces(hidden, cache, span):
                out[rows, times] = self.run(hidden[rows, times], cache, piece, newest_only)
            return out
        model, desk = self.model, self.desk
        kv = self._begin(hidden, cache, span)
        kernel("layers").run_layers(
            self.start,
            self.stop,
            1 if newest_only and hidden.shape[0] == 1 else len(desk.tokens),
            desk.x,
            desk.tokens,
            desk.turns,
            kv,
            model.layers,
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
        if self._is_long(span):
            if self.long is not None:
                return self.long.store(hidden, cache, span)
            for rows, times, piece in self._pieces(hidden, cache, span):
                self.store(hidden[rows, times], cache, piece)
            return
        model, desk = self.model, self.desk
        kv = self._begin(hidden, cache, span)
        kernel("layers").store_layers(
            self.start,
            self.stop,
            desk.x,
            desk.tokens,
            desk.turns,
            kv,
            model.layers,
            desk.buffers(span.stop),
        )

    def _is_long(self, span: Span) -> bool:
        return sum(span.counts) > self.desk.room or span.time > self.longest

    def _pieces(
        self, hidden: Tensor, cache: KVCache, span: Span
    ) -> Iterator[tuple[list[int], slice, Span]]:
        """The `pieces` of a block, for all of which there is room in the cache at once."""
        sizes = self.model.fused.sizes
        cache.memory(span.stop, hidden, sizes.kv_heads, sizes.head_dim)
        return pieces(span, self.desk.room)

    def _begin(self, hidden: Tensor, cache: KVCache, span: Span) -> Any:
        """Lay the block out for the kernels; returns the cache's memory."""
        sizes, desk = self.model.fused.sizes, self.desk
        # Nothing here needs to be told that there are no gradients, which takes its time too.
        hidden = hidden.detach() if hidden.requires_grad else hidden
        cut = hidden if hidden.shape[1] == span.time else hidden[:, : span.time]
        cache.pair(self.model.fused.turns.paired)
        kv = cache.hold(self.start, self.stop, span, hidden, sizes.kv_heads, sizes.head_dim)
        desk.place(cut, span)
        if desk.filling:
            rows = cut.reshape(-1, sizes.hidden)[desk.index]
            desk.hidden[: rows.shape[0]] = rows
            return desk.memory(kv)
        place = desk.out(*cut.shape[:2])
        if cut is not place:  # else the segment before this one gave it
            place.copy_(cut)
        return desk.memory(kv)


def pieces(span: Span, most: int) -> Iterator[tuple[list[int], slice, Span]]:
    """Cut a block into some of at most so many tokens, each row's in order.

    Yields:
        A piece's rows and times in the block, and its place in the cache.
    """
    counts = span.counts
    for first_row in range(0, len(counts), most):
        first, rows = 0, [*range(first_row, min(first_row + most, len(counts)))]
        while rows:
            step = most // len(rows)
            piece = Span(
                tuple(span.starts[row] + first for row in rows),
                tuple(min(step, counts[row] - first) for row in rows),
                tuple(rows if span.rows is None else (span.rows[row] for row in rows)),
            )
            yield rows, slice(first, first + piece.time), piece
            first += step
            rows = [row for row in rows if counts[row] > first]


@dataclass(frozen=True)
class NarrowSegment(ModuleSegment):
    """The model's own layers, in their own dtype, between hidden states in float32."""

    def run(
        self, hidden: Tensor, cache: KVCache, span: Span | None = None, newest_only: bool = False
    ) -> Tensor:
        """Run the layers on a block."""
        return super().run(self._narrowed(hidden), cache, span).to(hidden.dtype)

    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """Store the block's keys and values."""
        super().store(self._narrowed(hidden), cache, span)

    def _narrowed(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.decoder.dtype)


def most_tokens() -> int:
    """How many tokens of a block the kernels run sooner than general products."""
    return max(MOST_ROWS, MOST_TOKENS * threads() // max(torch.get_num_threads(), threads()))


def longest(model: FusedModel) -> int:
    """How many tokens of a row the kernels run, if a block has room for those of all rows.

    Where torch is quick in bfloat16, its products of many tokens are quicker than the kernels',
    which are float32. But what waits in front of a segment, or of two, has to be computed as it is
    one by one.
    """
    narrow = model.narrow and model.decoder.dtype == torch.bfloat16
    return 1 + 2 * QUEUE_CAP if narrow and not in_pieces(model) else most_tokens()


def in_pieces(model: FusedModel) -> bool:
    """Whether the kernels run many tokens of a model too.

    They do in 8 bits, where torch's product is for few tokens, and rounds states to bfloat16; and
    in half precision, if torch is slow. Rotations that depend on how long a text is are those of a
    whole prompt, and not of its pieces.
    """
    slow = model.rounded or (model.narrow and is_slow(model.decoder.dtype))
    return slow and model.turns.tabled


@lru_cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch takes far longer for products in a dtype than in float32, by a trial.

    Processors without instructions for it take some eight times as long.
    """
    weights = torch.ones(_TRIED, _TRIED, dtype=torch.float32, device="cpu")
    times = []
    for kind in (torch.float32, dtype):
        x, w = weights[:MOST_TOKENS].to(kind), weights.to(kind)
        times.append(min(_timed(partial(F.linear, x, w)) for _ in range(_TRIALS)))
    return times[1] > times[0] * _FAR


def prepared(model: FusedModel, if_quicker: bool) -> tuple[CompiledModel | None, str, float]:
    """Compile what runs `model`.

    Args:
        model: a prepared one; it is better forgotten afterwards.
        if_quicker: only if a token then takes no longer than by `fused`, or by the model's own
            layers if they are in half precision, by a trial.

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
        compiled, long = map(min, zip(*trials, strict=True))
        if compiled > long * _DOUBT:
            other = "module" if model.narrow else "fused"
            reason = f"it takes {compiled / long:.1f} times as long as {other} here"
            return None, reason, seconds
    return made, "", seconds


def _ways(model: CompiledModel) -> list[Callable[[], object]]:
    """Runs of one token through all layers: compiled, and as blocks of many are run."""
    fused = model.fused
    n_layers, stack = len(fused.layers), (fused.layers[0].qkv, None)
    like = fused.qk_floors
    if fused.narrow:
        long = NarrowSegment(fused.decoder, 0, n_layers)
    else:
        long = FusedSegment(fused, 0, n_layers, stack, Workspace(fused.sizes, len(fused.turns)))
    hidden = like.new_ones(1, 1, fused.sizes.hidden)
    caches = KVCache(n_layers), KVCache(n_layers)
    desk = Desk(fused.sizes, fused.turns, like, room=1)
    short = CompiledSegment(model, 0, n_layers, desk, longest=1, long=long)
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
