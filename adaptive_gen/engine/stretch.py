"""Stretches: many tokens of one text in one call of compiled code.

The scheduler asks and queues between segments, in Python, for every mode there is. Where a text is
alone, greedy, and its exits hang on thresholds, the same rules run in `kernels.decode`, on the
scheduler's own queues and cache: it can go on from there at any token, and neither can tell.
"""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..confidence import GATE
from ..policy import ByThreshold
from . import compiled
from .compiled import CompiledConfidences, CompiledReadout, CompiledSegment, Desk
from .drafts import DraftLength
from .fusing import gain
from .scheduler import Scheduler

# How long a stretch may take: tokens are shown when it ends. Fewer tokens than that share the few
# dozen microseconds of a call.
SECONDS, MOST = 0.01, 64


class Emitted(NamedTuple):
    """One decoded token."""

    token: int
    exit_layer: int
    confidence: float  # as the policy would have been shown it; nan at full depth


class Stretch:
    """Decodes the text of a scheduler that has one row and is past its prompt."""

    _rows_read = 1  # hidden states to read out at once

    def __init__(self, scheduler: Scheduler):
        """Prepare what stays the same; `unfit` must have found no reason not to."""
        self._scheduler, first = scheduler, scheduler.segments[0]
        readout, rules = scheduler.readout, scheduler.rules
        assert isinstance(first, CompiledSegment) and isinstance(readout, CompiledReadout)
        self._compiled = model = first.model
        self._like = like = model.fused.qk_floor
        sizes = model.fused.sizes
        # A queue holds at most `queue_cap` tokens when a block comes through it.
        self._room = 1 + rules.queue_cap * scheduler.last
        self._desk = Desk(sizes, like, self._room)
        width = self._desk.x.shape[1]
        queues = like.new_zeros(scheduler.last + 1, 1, self._room, width)
        self._queues, self._waiting = queues[..., : sizes.hidden], queues[:, 0].numpy()
        self._places = np.zeros((self._room, 2), np.int64)
        layers = model.weights, model.scales, model.biases, model.floors, model.windows
        embedding = scheduler.decoder.plain_embedding
        assert embedding is not None
        panels = readout.panels
        logits = np.zeros((self._rows_read, panels.shape[0] * panels.shape[2]), _dtype(like))
        normed = np.zeros((self._rows_read, sizes.hidden), logits.dtype)
        head = panels, readout.scale, readout.floor, normed, logits, readout.vocab
        bounds = np.array([0, *(segment.stop for segment in scheduler.segments)])
        self._model = embedding.weight.detach().numpy(), layers, head, self._gate(), bounds
        measure = scheduler.confidences.measure
        self._measure = compiled.decode_kernel().MEASURES.index(measure)
        self._least: dict[tuple[int, float], float] = {}
        self._pace = 1

    def _gate(self) -> tuple[Any, Any]:
        """The weights of each exit's probe for hidden states divided by their length, and bias."""
        scheduler = self._scheduler
        gate = scheduler.confidences.gate if scheduler.confidences.measure == GATE else None
        hidden, dtype = self._compiled.fused.sizes.hidden, _dtype(self._like)
        weights, biases = np.zeros((scheduler.last, hidden), dtype), np.zeros(scheduler.last, dtype)
        if gate is not None and scheduler.decoder.plain_readout is not None:
            factor = gain(scheduler.decoder.plain_readout[0]).detach()
            for i, segment in enumerate(scheduler.segments[:-1]):
                if segment.stop in gate.weights:
                    weights[i] = (gate.weights[segment.stop] * factor).numpy()
                    biases[i] = float(gate.biases[segment.stop])
        return weights, biases

    def run(self, token: int, most: float, ends: frozenset[int]) -> list[Emitted]:
        """Decode some tokens.

        Args:
            token: the text's last, which has not been run.
            most: tokens to decode.
            ends: tokens that end the text.

        Returns:
            At least one, unless `most` is 0; the last of them may have ended the text.
        """
        scheduler, cache = self._scheduler, self._scheduler.cache
        count = int(min(most, self._pace))
        room = int(min(most, count + self._surplus))
        sizes, starts = self._compiled.fused.sizes, [s.start for s in scheduler.segments]
        lengths = np.array([cache.lengths[start][0] for start in starts])
        stop = int(lengths[0]) + room
        memory = cache.memory(stop, self._like, sizes.kv_heads, sizes.head_dim)
        cache.pair(True)
        turns = self._desk.turns_until(scheduler.decoder.positions, self._like, stop)
        desk = self._desk.x, self._places, turns, self._desk.buffers(stop)
        for queue, buffer in zip(scheduler.queues, self._queues, strict=True):
            queue.wait_in(buffer)
        waiting = np.array([queue.counts[0] for queue in scheduler.queues])
        tallies = np.zeros(3, np.int64)
        state = self._desk.memory(memory), self._waiting, waiting, lengths, tallies
        asking = (*self._thresholds(scheduler.rows[0].position + 1, room), self._measure)
        results = np.zeros(room, np.int64), np.zeros(room, np.int64), np.full(room, math.nan)
        clock = time.perf_counter()
        stops = np.array([*ends], np.int64)
        done = self._decode(token, stops, count, self._model, desk, state, asking, results)
        if done:
            each = (time.perf_counter() - clock) / done
            self._pace = max(1, min(MOST, int(SECONDS / each)))
        scheduler.go_on(done, lengths.tolist(), waiting.tolist(), tallies.tolist())
        return self._emitted(*(result[:done].tolist() for result in results))

    @property
    def _surplus(self) -> int:
        """Tokens that may be decoded beyond those asked for."""
        return 0

    def _decode(self, token: int, ends: Any, count: int, *args: Any) -> int:
        """Call the kernel; see `kernels.decode`."""
        rules = self._scheduler.rules
        propagate = int(rules.kv == "propagate")
        return compiled.decode_kernel().decode(token, ends, rules.queue_cap, propagate, *args)

    def _emitted(
        self, tokens: list[int], exits: list[int], confidences: list[float]
    ) -> list[Emitted]:
        scheduler, found = self._scheduler, []
        for token, index, raw in zip(tokens, exits, confidences, strict=True):
            exit_layer, confidence = scheduler.segments[index].stop, math.nan
            if index < scheduler.last:
                confidence = scheduler.confidences.calibrated(raw, exit_layer)
            found.append(Emitted(token, exit_layer, confidence))
        return found

    def _thresholds(self, first: int, count: int) -> tuple[Any, Any]:
        """Where exits are checked and what raw confidence leaves, [count, exits] each."""
        policy, exits = self._scheduler.policy, self._scheduler.segments[:-1]
        assert isinstance(policy, ByThreshold)
        asked = np.zeros((count, len(exits)), np.bool_)
        least = np.zeros((count, len(exits)))
        for i in range(count):
            for j, segment in enumerate(exits):
                if policy.may_exit(segment.stop, first + i):
                    asked[i, j] = True
                    least[i, j] = self._raw(segment.stop, policy.least(segment.stop, first + i))
        return asked, least

    def _raw(self, exit_layer: int, least: float) -> float:
        key = exit_layer, least
        if key not in self._least:
            self._least[key] = self._scheduler.confidences.raw_of(least, exit_layer)
        return self._least[key]


class LosslessStretch(Stretch):
    """A stretch in which tokens that leave early are drafts, and full depth has the last word."""

    _rows_read = 8

    def __init__(self, scheduler: Scheduler, drafts: DraftLength):
        """Prepare.

        Args:
            scheduler: nothing waits in its queues.
            drafts: how many are worth making; learns from what becomes of them.
        """
        super().__init__(scheduler)
        self._drafts = drafts

    @property
    def _surplus(self) -> int:
        return self._room  # the drafts of one deep pass, and the token that it chooses itself

    def _decode(self, token: int, ends: Any, count: int, *args: Any) -> int:
        drafts, (row,) = self._drafts, self._scheduler.rows
        done = compiled.lossless_kernel().decode(
            token, ends, count, drafts.shallow, drafts.most, drafts.record, *args
        )
        row.cap, row.drafts = drafts.length, 0
        return done


def _dtype(like: torch.Tensor) -> Any:
    """The numpy dtype of a tensor."""
    return like.numpy().dtype


def unfit(scheduler: Scheduler) -> str:
    """Why a scheduler's text cannot be decoded in stretches; empty if it can."""
    confidences, policy = scheduler.confidences, scheduler.policy
    embedding = scheduler.decoder.plain_embedding
    if len(scheduler.rows) > 1:
        return "it is one of a batch"
    if not (
        all(isinstance(segment, CompiledSegment) for segment in scheduler.segments)
        and isinstance(scheduler.readout, CompiledReadout)
        and type(confidences) is CompiledConfidences
    ):
        return "its segments, readout or confidences are not compiled"
    reads = getattr(policy, "confidence", None)
    if not isinstance(policy, ByThreshold) or reads not in (None, confidences.measure):
        return "its policy asks for more than one confidence"
    if scheduler.rules.prefill != "full":
        return "its prompt may wait in the queues"
    if not scheduler.decoder.positions.tabled:
        return "its rotary embedding depends on its length"
    if (
        type(embedding) is not nn.Embedding
        or embedding.max_norm is not None
        or bool(embedding._forward_hooks or embedding._forward_pre_hooks)
    ):
        return "its embedding is more than a table"
    return ""
