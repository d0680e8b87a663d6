"""The loop: queues of hidden states in front of segments, and what runs when.

    token -> embed -> [queue 0] segment 0 -> exit? -> [queue 1] segment 1 -> exit? -> ... -> readout

A step runs one segment on everything that waits in front of it. A token that leaves early simply
stays in the next queue (it is *pending*); when a later token goes deeper, the pending ones go with
it, older first, as one causal block. In memory-bound decoding the weights are read once for all of
them, and in the mode `recompute` every K/V is what a full-depth forward of the text gives.

Axes: `batch` (1), `time`, `hidden`, `vocab`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..decoder import Decoder
from ..policy import ExitPolicy
from .cache import KVCache
from .segment import Segment

KV_POLICIES = ("recompute", "propagate")
# Pending rows are nearly free until a pass stops being bound by reading weights: about 16 on a CPU.
QUEUE_CAP = 16


class Readout(NamedTuple):
    """What one token's run through the layers ends with."""

    logits: Tensor  # [1, vocab]
    exit_layer: int
    confidence: float  # what the policy was shown; nan at full depth, where nothing was asked


class Scheduler:
    """Decodes one text: prompt at full depth, then one token at a time, each to its own depth."""

    def __init__(
        self,
        decoder: Decoder,
        segments: Sequence[Segment],
        cache: KVCache,
        policy: ExitPolicy,
        confidence: Callable[[Tensor, int], float],
        kv: str = "recompute",
        queue_cap: int = QUEUE_CAP,
    ):
        """Set up empty queues.

        Args:
            decoder: embeds and reads out.
            segments: the model's layers, in order, without gaps.
            cache: empty.
            policy: asked at the end of every segment but the last.
            confidence: (logits [1, vocab], exit layer) -> [0, 1].
            kv: how skipped layers get their K/V, "recompute" or "propagate".
            queue_cap: most tokens that may wait in front of one segment, at least 1.
        """
        self.decoder, self.segments, self.cache = decoder, segments, cache
        self.policy, self.confidence = policy, confidence
        self.kv, self.queue_cap = kv, queue_cap
        self.queues: list[list[Tensor]] = [[] for _ in segments]  # each [1, time, hidden]
        self.deep_passes = 0  # runs of the last segment while decoding
        self.caught_up = 0  # pending tokens that got the last segment's K/V

    def prefill(self, ids: Tensor) -> Readout:
        """Run the prompt [1, time] at full depth and read out its last token.

        Every later token attends to these keys, so an approximation here would never fade.
        """
        hidden = self.decoder.embed(ids)
        for segment in self.segments:
            hidden = segment.run(hidden, self.cache)
        return Readout(self.decoder.readout(hidden[:, -1]), self.decoder.n_layers, float("nan"))

    def decode(self, token: Tensor, position: int) -> Readout:
        """Run one token [1, 1] until the policy is satisfied with the readout.

        Args:
            token: the newest token of the text.
            position: index, among the new tokens, of the token this readout chooses.
        """
        self.queues[0].append(self.decoder.embed(token, self.cache.lengths[0]))
        last = len(self.segments) - 1
        for index in range(last):
            newest = self._advance(index)
            exit_layer = self.segments[index].stop
            if self._must_go_on(index + 1) or not self.policy.may_exit(exit_layer, position):
                continue
            logits = self.decoder.readout(newest[:, -1])
            confidence = self.confidence(logits, exit_layer)
            if self.policy.should_exit(exit_layer, confidence, position):
                self._leave(index + 1)
                return Readout(logits, exit_layer, confidence)
        newest = self._advance(last)
        self.deep_passes += 1
        return Readout(self.decoder.readout(newest[:, -1]), self.decoder.n_layers, float("nan"))

    def flush(self) -> None:
        """Give every pending token its K/V in all layers; nothing waits afterwards."""
        for index, queue in enumerate(self.queues):
            if queue and self.kv == "recompute":
                self._advance(index)
                self.caught_up += index == len(self.segments) - 1
            elif queue:
                self._propagate(index)

    def waiting(self, index: int) -> int:
        """Tokens that wait in front of segment `index`."""
        return sum(rows.shape[1] for rows in self.queues[index])

    def _advance(self, index: int) -> Tensor:
        """Run segment `index` on all that waits; return the rows it ran, the newest last."""
        queue = self.queues[index]
        if self.kv == "propagate" and len(queue) > 1:
            newest = queue.pop()
            self._propagate(index)
            queue.append(newest)
        rows = queue[0] if len(queue) == 1 else torch.cat(queue, dim=1)
        queue.clear()
        out = self.segments[index].run(rows, self.cache)
        if index + 1 < len(self.segments):
            self.queues[index + 1].append(out)
        else:
            self.caught_up += rows.shape[1] - 1
        return out

    def _propagate(self, index: int) -> None:
        """Store K/V of all that waits in front of segment `index` and pass it on unchanged."""
        queue = self.queues[index]
        rows = queue[0] if len(queue) == 1 else torch.cat(queue, dim=1)
        queue.clear()
        self.segments[index].store(rows, self.cache)
        if index + 1 < len(self.segments):
            self.queues[index + 1].append(rows)
        else:
            self.caught_up += rows.shape[1]

    def _must_go_on(self, index: int) -> bool:
        """Whether the queue in front of segment `index` is too full to leave one more token in."""
        return self.kv == "recompute" and self.waiting(index) > self.queue_cap

    def _leave(self, index: int) -> None:
        """Leave the newest token pending; propagation empties a full queue at once, being cheap."""
        while (
            self.kv == "propagate"
            and index < len(self.segments)
            and self.waiting(index) > self.queue_cap
        ):
            self._propagate(index)
            index += 1
