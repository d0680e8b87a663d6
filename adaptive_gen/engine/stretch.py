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

    def __init__(self, scheduler: Scheduler):
        """Prepare what stays the same; `unfit` must have found no reason not to."""
        self._scheduler, first = scheduler, scheduler.segments[0]
        readout, rules = scheduler.readout, scheduler.rules
        assert isinstance(first, CompiledSegment) and isinstance(readout, CompiledReadout)
        self._model = model = first.model
        self._like = like = model.fused.qk_floor
        sizes = model.fused.sizes
        # A queue holds at most `queue_cap` tokens when a block comes through it.
        room = 1 + rules.queue_cap * scheduler.last
        self._desk = Desk(sizes, like, room)
        width = self._desk.x.shape[1]
        queues = like.new_zeros(scheduler.last + 1, 1, room, width)
        self._queues, self._waiting = queues[..., : sizes.hidden], queues[:, 0].numpy()
        self._places = np.zeros((room, 2), np.int64)
        self._bounds = np.array([0, *(segment.stop for segment in scheduler.segments)])
        layers = model.weights, model.scales, model.biases, model.floors, model.windows
        embedding = scheduler.decoder.plain_embedding
        assert embedding is not None
        panels = readout.panels
        logits = np.zeros((1, panels.shape[0] * panels.shape[2]), _dtype(like))
        normed = np.zeros((1, sizes.hidden), logits.dtype)
        head = panels, readout.scale, readout.floor, normed, logits, readout.vocab
        self._fixed = embedding.weight.detach().numpy(), layers, head, self._gate(), self._bounds
        measure = scheduler.confidences.measure
        propagate = int(rules.kv == "propagate")
        self._rules = compiled.decode_kernel().MEASURES.index(measure), rules.queue_cap, propagate
        self._least: dict[tuple[int, float], float] = {}
        self._pace = 1

    def _gate(self) -> tuple[Any, Any]:
        """The weights of each exit's probe for hidden states divided by their length, and bias."""
        scheduler = self._scheduler
        gate = scheduler.confidences.gate if scheduler.confidences.measure == GATE else None
        hidden, dtype = self._model.fused.sizes.hidden, _dtype(self._like)
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
        sizes, starts = self._model.fused.sizes, [s.start for s in scheduler.segments]
        lengths = np.array([cache.lengths[start][0] for start in starts])
        stop = int(lengths[0]) + count
        memory = cache.memory(stop, self._like, sizes.kv_heads, sizes.head_dim)
        cache.pair(True)
        turns = self._desk.turns_until(scheduler.decoder.positions, self._like, stop)
        desk = self._desk.x, self._places, turns, self._desk.buffers(stop)
        asked, least = self._thresholds(scheduler.rows[0].position + 1, count)
        for queue, buffer in zip(scheduler.queues, self._queues, strict=True):
            queue.wait_in(buffer)
        waiting = np.array([queue.counts[0] for queue in scheduler.queues])
        tallies = np.zeros(3, np.int64)
        tokens, exits = np.zeros(count, np.int64), np.zeros(count, np.int64)
        confidences = np.zeros(count)
        clock = time.perf_counter()
        done = compiled.decode_kernel().decode(
            token,
            np.array([*ends], np.int64),
            *self._fixed,
            self._desk.memory(memory),
            desk,
            self._waiting,
            waiting,
            lengths,
            asked,
            least,
            self._rules,
            tallies,
            tokens,
            exits,
            confidences,
        )
        if done:
            each = (time.perf_counter() - clock) / done
            self._pace = max(1, min(MOST, int(SECONDS / each)))
        scheduler.go_on(done, lengths.tolist(), waiting.tolist(), tallies.tolist())
        return self._emitted(tokens[:done].tolist(), exits[:done].tolist(), confidences.tolist())

    def _emitted(
        self, tokens: list[int], exits: list[int], confidences: list[float]
    ) -> list[Emitted]:
        scheduler, found = self._scheduler, []
        for token, index, raw in zip(tokens, exits, confidences, strict=False):
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
    if scheduler.rules.read_drafts:
        return "deep passes read out what they catch up"
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
