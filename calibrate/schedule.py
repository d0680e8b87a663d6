"""What the engine would do with traced tokens, for many settings at once and without running it.

A simulation of the scheduler's queues (adaptive_gen/engine/scheduler.py): who leaves where, which
segments run on how many rows, how many readouts are made. Exact as long as the texts are the traced
ones; the tests hold it against the scheduler itself.

Axes: `texts`, `time`, `settings`; `exits` below full depth.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Work:
    """Counts of what costs time, [settings] each; the fields are the terms of the cost model."""

    texts: NDArray  # prefills
    tokens: NDArray  # decoding steps; the first new token of a text belongs to its prefill
    layers: NDArray  # layer calls, whatever the rows
    cold: NDArray  # the same, each by the share of all layers that ran since its layer's last call
    rows: NDArray  # rows beyond the first, summed over the layer calls
    doublings: NDArray  # log2 of the rows, first one included, summed over the layer calls
    readouts: NDArray  # norm + LM head, at full depth too
    checks: NDArray  # those at exits: confidence and policy besides, and the segment that ends
    fills: NDArray  # segment calls that only store keys and values
    stores: NDArray  # layer calls of those
    stored: NDArray  # rows of those

    def gated(self) -> "Work":
        """The same work with checks that read no logits: one readout a token, where it leaves."""
        return replace(self, readouts=self.tokens + np.zeros_like(self.readouts))

    @property
    def table(self) -> NDArray:
        """All counts side by side, [settings, terms]."""
        return np.stack([getattr(self, f.name) for f in fields(self)], axis=-1)


@dataclass(frozen=True)
class Outcome:
    """The outcome of every setting, [settings] each."""

    tokens: int  # new tokens, first ones included
    mean_depth: NDArray
    agreement: NDArray
    work: Work
    depths: NDArray[np.int16]  # [texts, time, settings]: layers each token ran; 0 is padding


def simulate(
    exit_layers: tuple[int, ...],
    lengths: NDArray,
    agrees: NDArray,
    leaves: NDArray,
    checked: NDArray,
    kv: str,
    queue_cap: int,
) -> Outcome:
    """Run the queues over traced texts.

    Args:
        exit_layers: ascending; the last is full depth.
        lengths: [texts], new tokens of each.
        agrees: [texts, time, exits], the exit's choice is full depth's.
        leaves: [texts, time, exits, settings], the token would leave if it were asked there.
        checked: [exits, settings], the exit is asked at all.
        kv: "recompute" or "propagate".
        queue_cap: most tokens that wait in front of a segment.
    """
    queues = _Queues(exit_layers, lengths, checked, kv, queue_cap)
    for time in range(1, int(lengths.max(initial=1))):
        real = np.flatnonzero(time < lengths)
        queues.step(time, real, leaves[real, time], agrees[real, time])
    return queues.outcome()


class _Queues:
    """The waiting rows of every text under every setting, and the work done so far."""

    def __init__(
        self,
        exit_layers: tuple[int, ...],
        lengths: NDArray,
        checked: NDArray,
        kv: str,
        queue_cap: int,
    ):
        self.exit_layers, self.checked, self.kv, self.cap = exit_layers, checked, kv, queue_cap
        self.sizes = np.diff(exit_layers, prepend=0)  # layers per segment
        self.lengths, settings = lengths, checked.shape[1]
        self.waiting = np.zeros((len(exit_layers), len(lengths), settings), dtype=np.int64)
        self.depths = np.zeros((len(lengths), int(lengths.max(initial=1)), settings), np.int16)
        # The prompt runs at full depth, and so does the new token it ends with.
        self.depths[:, 0] = exit_layers[-1]
        # Neighbouring segments are one where the exit between them is not checked.
        self.begins = np.concatenate([np.ones((1, settings), bool), checked])
        # How deep the last token went that ran each segment; the prompt went to the end.
        self.reached = np.full(self.waiting.shape, exit_layers[-1], dtype=np.int16)
        self.cold = np.zeros(settings)
        self.agreed, self.layers, self.rows, self.readouts, self.checks = (
            np.zeros(settings, dtype=np.int64) for _ in range(5)
        )
        self.doublings = np.zeros(settings)
        self.fills, self.stores, self.stored = (np.zeros_like(self.agreed) for _ in range(3))

    def step(self, time: int, texts: NDArray, leaves: NDArray, agrees: NDArray) -> None:
        """Decode one token of each of `texts`.

        Args:
            time: the token's place among the new tokens.
            texts: [n] rows that have this token.
            leaves: [n, exits, settings].
            agrees: [n, exits].
        """
        waiting = self.waiting[:, texts]  # a copy, written back below
        depth = np.full(waiting.shape[1:], self.exit_layers[-1], dtype=np.int16)
        going = np.ones(waiting.shape[1:], dtype=bool)
        waiting[0] += 1
        last = len(self.exit_layers) - 1
        for s in range(last):
            self._advance(waiting, s, going)
            asked = going & self.checked[s]
            if self.kv == "recompute":
                asked &= waiting[s + 1] <= self.cap
            self.readouts += asked.sum(0)
            self.checks += asked.sum(0)
            left = asked & leaves[:, s]
            depth[left] = self.exit_layers[s]
            self.agreed += (left & agrees[:, s, None]).sum(0)
            if self.kv == "propagate":
                self._spill(waiting, s + 1, left)
            going = going & ~left
        self._advance(waiting, last, going)
        self.readouts += going.sum(0)
        self.agreed += going.sum(0)
        self.waiting[:, texts] = waiting
        self.depths[texts, time] = depth
        ran = depth > (np.array(self.exit_layers) - self.sizes)[:, None, None]
        reached = self.reached[:, texts]
        shares = self.sizes / self.exit_layers[-1]
        self.cold += np.einsum("s,snk->k", shares, np.where(ran, reached, 0))
        self.reached[:, texts] = np.where(ran, depth, reached)

    def _advance(self, waiting: NDArray, s: int, going: NDArray) -> None:
        """Run segment `s` where a token goes on, on all that waits there."""
        block = np.where(going, waiting[s], 0)
        older = np.maximum(block - 1, 0)
        self.layers += going.sum(0) * self.sizes[s]
        if self.kv == "recompute":
            self.rows += older.sum(0) * self.sizes[s]
            self.doublings += np.log2(older + 1).sum(0) * self.sizes[s]
        else:
            self.fills += (older > 0).sum(0) * self.begins[s]
            self.stores += (older > 0).sum(0) * self.sizes[s]
            self.stored += older.sum(0) * self.sizes[s]
        waiting[s] -= block
        if s + 1 < len(waiting):
            waiting[s + 1] += block

    def _spill(self, waiting: NDArray, s: int, left: NDArray) -> None:
        """Propagate a queue that a leaving token has overfilled, and the ones that overfills."""
        while s < len(waiting) and left.any():
            left = left & (waiting[s] > self.cap)
            block = np.where(left, waiting[s], 0)
            self.fills += left.sum(0) * self.begins[s]
            self.stores += left.sum(0) * self.sizes[s]
            self.stored += block.sum(0) * self.sizes[s]
            waiting[s] -= block
            if s + 1 < len(waiting):
                waiting[s + 1] += block
            s += 1

    def outcome(self) -> Outcome:
        texts, tokens = len(self.lengths), int(self.lengths.sum())
        one = np.ones_like(self.agreed)
        return Outcome(
            tokens=tokens,
            mean_depth=self.depths.sum((0, 1), dtype=np.int64) / tokens,
            agreement=(self.agreed + texts) / tokens,
            work=Work(
                texts=one * texts,
                tokens=one * (tokens - texts),
                layers=self.layers,
                cold=self.cold,
                rows=self.rows,
                doublings=self.doublings,
                readouts=self.readouts,
                checks=self.checks,
                fills=self.fills,
                stores=self.stores,
                stored=self.stored,
            ),
            depths=self.depths,
        )
