"""Stretches: many tokens in one call of compiled code.

The scheduler asks and queues between segments, in Python, for every mode there is. Where exits hang
on thresholds, and tokens on what `choosing` knows, the same rules run in `kernels.decode`, on the
scheduler's own queues and cache: it can go on from there at any token, and neither can tell.
Lossless texts have `kernels.lossless`, and batches (`batch.BatchStretch`) `kernels.batch` and
`kernels.batch_lossless`.
"""

import math
import time
from typing import Any

import numpy as np
import torch

from ..audit import GuardedPolicy
from ..confidence import GATE
from ..draws import no_numbers
from ..policy import ByThreshold
from ..report import Step
from .choosing import Choice, Choosing
from .compiled import CompiledSegment, most_tokens
from .compiled_readout import CompiledConfidences, CompiledReadout
from .desk import Desk
from .lasting import makes_lasting
from .machine_code import kernel
from .promise import nothing
from .scheduler import Scheduler

# How long a stretch may take: tokens are shown when it ends, and 20 times a second looks steady.
# They share the half millisecond of Python around a call whose weights emptied the caches.
SECONDS, MOST = 0.05, 64
_AT_ONCE = 8  # states that full depth reads out together, to judge or to compare by them
MOST_WAITING = 4096  # tokens, of all rows, to keep buffers for


class Pace:
    """How many tokens a stretch may decode, by how long those before it took."""

    tokens = 1

    def keep(self, seconds: float, tokens: int) -> None:
        """Learn from a stretch."""
        if tokens:
            self.tokens = max(1, min(MOST, int(SECONDS * tokens / seconds)))


class Stretch:
    """Decodes the text of a scheduler that has one row and is past its prompt.

    What several rows need (`batch.BatchStretch`) is prepared here as well.
    """

    _rows_read = 1  # hidden states to read out at once

    def __init__(self, scheduler: Scheduler, pace: Pace, choice: Choice, audited: bool = False):
        """Prepare what stays the same; `unfit` must have found no reason not to.

        Args:
            scheduler: of the text.
            pace: of the model's texts.
            choice: of its tokens.
            audited: whether full depth says, later, what it would have chosen.
        """
        self._scheduler, first = scheduler, scheduler.segments[0]
        readout, rules = scheduler.readout, scheduler.rules
        assert isinstance(first, CompiledSegment) and isinstance(readout, CompiledReadout)
        self._compiled = model = first.model
        self._like = like = model.fused.qk_floors
        sizes = model.fused.sizes
        # A queue holds at most `queue_cap` tokens of a row when a block comes through it.
        self._room, rows = 1 + rules.queue_cap * scheduler.last, len(scheduler.rows)
        self._desk = Desk(sizes, model.fused.turns, like, rows * self._room)
        width = self._desk.x.shape[1]
        queues = like.new_zeros(scheduler.last + 1, rows, self._room, width)
        self._queues, self._waiting = queues[..., : sizes.hidden], queues.numpy()
        self._views: list[torch.Tensor] = []  # of the queues, for the rows there are
        self._places = np.zeros((rows * self._room, 2), np.int64)
        plain = scheduler.decoder.plain_embedding
        assert plain is not None
        positions = plain.table.new_zeros(0, 1) if plain.positions is None else plain.positions
        tables = [_as_table(each) for each in (plain.table, positions)]
        (table, _), (self._positions, _) = tables
        factor, kinds = like.new_tensor([plain.factor]).numpy(), np.array([k for _, k in tables])
        if audited:
            self._rows_read = max(self._rows_read, _AT_ONCE)
        head = readout.with_room(self._rows_read)
        bounds = np.array([0, *(segment.stop for segment in scheduler.segments)])
        embedding = table, self._positions, factor, kinds
        self._model = embedding, model.layers, head, self._gate(), bounds
        measure = scheduler.confidences.measure
        self._measure = kernel("screen").MEASURES.index(measure)
        # Exit layer -> confidences asked for, and the raw ones that give them.
        self._raw: dict[int, dict[float, float]] = {s.stop: {} for s in scheduler.segments}
        self._pace, self._choosing = pace, Choosing(choice, readout.vocab, rows)
        policy, room = scheduler.policy, self._room if audited else 0
        record = policy.record if isinstance(policy, GuardedPolicy) else nothing()
        self._audit = _comparing(rows, room, len(scheduler.segments), record)

    def _gate(self) -> tuple[Any, Any]:
        """The weights of each exit's probe for hidden states divided by their length, and bias."""
        scheduler, readout = self._scheduler, self._scheduler.readout
        assert isinstance(readout, CompiledReadout)
        gate = scheduler.confidences.gate if scheduler.confidences.measure == GATE else None
        hidden, dtype = self._compiled.fused.sizes.hidden, _dtype(self._like)
        weights, biases = np.zeros((scheduler.last, hidden), dtype), np.zeros(scheduler.last, dtype)
        if gate is not None:
            for i, segment in enumerate(scheduler.segments[:-1]):
                if segment.stop in gate.weights:
                    weight = gate.weights[segment.stop].to(readout.norm_gain)
                    weights[i] = (weight * readout.norm_gain).numpy()
                    biases[i] = float(gate.biases[segment.stop] + weight @ readout.norm_shift)
        return weights, biases

    @makes_lasting
    def run(
        self, tokens: list[int], most: list[int], ends: frozenset[int], places: list[int]
    ) -> list[list[Step]]:
        """Decode some tokens.

        Args:
            tokens: each text's last, which has not been run.
            most: tokens to decode of each text.
            ends: tokens that end a text.
            places: of the texts in their batch, which some may have left.

        Returns:
            For each text at least one, unless `most` is 0; the last of them may have ended it.

        Raises:
            ModelError: nothing can be drawn from the model's logits.
        """
        scheduler, (row,) = self._scheduler, self._scheduler.rows
        lengths = self._lengths()[:, 0].copy()
        most = self._placeable(most, lengths[:1])
        count = self._choosing.most(min(*most, self._pace.tokens))
        room = min(*most, max(count, self._choosing.most(count, self._surplus)))
        memory, turns, buffers = self._room_until(int(lengths[0]) + room)
        waiting, tallies = self._in_front()[:, 0].copy(), np.zeros(3, np.int64)
        first = row.position + 1
        tables, thrift = self._thresholds(first, room), scheduler.thrift
        asking = *tables, self._measure, thrift.worth, thrift.records[0]
        results = np.zeros(room, np.int64), np.zeros(room, np.int64), np.full(room, math.nan)
        choosing = self._choosing.arrays(first, first + room, places)
        clock = time.perf_counter()
        done = self._decode(
            tokens[0],
            np.array([*ends], np.int64),
            count,
            self._model,
            (self._desk.x, self._places, turns, buffers),
            (memory, self._waiting[:, 0], waiting, lengths, tallies),
            asking,
            choosing,
            results,
        )
        self._pace.keep(time.perf_counter() - clock, done)
        state = lengths[:, None].tolist(), waiting[:, None].tolist(), tallies.tolist()
        scheduler.go_on([row.position + done], [-1], *state)
        return [self._emitted(*(result[:done].tolist() for result in results))]

    def compared(self) -> dict[int, tuple[int, int]]:
        """Audited since last asked: exit layer -> tokens full depth chooses too, and all."""
        stops, totals = (segment.stop for segment in self._scheduler.segments), self._audit[3]
        counts = totals.tolist()
        totals[:] = 0
        return {stop: (same, of) for stop, (same, of) in zip(stops, counts, strict=True) if of}

    def _placeable(self, most: list[int], held: Any) -> list[int]:
        """How many tokens of each text to decode, `most` or what there are learned positions for.

        Args:
            most: see `run`.
            held: tokens of each text that were run, less those that are not judged yet, [rows].

        Raises:
            IndexError: there is none left, as the model's own embedding says.
        """
        if not len(self._positions):
            return most
        left = len(self._positions) - held
        for count, more, position in zip(most, left.tolist(), held.tolist(), strict=True):
            if count > 0 >= more:
                token = torch.zeros(1, 1, dtype=torch.int64)
                self._scheduler.decoder.embed(token, [position])
        return np.minimum(most, np.maximum(left, 0)).tolist()

    def _lengths(self) -> Any:
        """Tokens of each row that each segment's layers hold, [segments, rows]."""
        lengths = self._scheduler.cache.lengths
        return np.array([lengths[segment.start] for segment in self._scheduler.segments])

    def _room_until(self, stop: int) -> tuple[Any, Any, Any]:
        """Keys and values, turns and buffers for positions below `stop`."""
        cache, sizes = self._scheduler.cache, self._compiled.fused.sizes
        memory = cache.memory(stop, self._like, sizes.kv_heads, sizes.head_dim)
        cache.pair(self._compiled.fused.turns.paired)
        turns = self._desk.turns_until(self._like, stop)
        return self._desk.memory(memory), turns, self._desk.buffers(stop)

    def _in_front(self) -> Any:
        """Let the scheduler's queues wait in ours; returns how much waits, [segments, rows]."""
        queues, rows = self._scheduler.queues, len(self._scheduler.rows)
        if not self._views or len(self._views[0]) != rows:
            self._views = [queue[:rows] for queue in self._queues]
        for queue, view in zip(queues, self._views, strict=True):
            queue.wait_in(view)
        return np.array([queue.counts for queue in queues])

    @property
    def _surplus(self) -> int:
        """Tokens that may be decoded beyond those asked for."""
        return 0

    def _decode(self, token: int, ends: Any, count: int, *args: Any) -> int:
        """Call the kernel; see `kernels.decode`."""
        rules = self._scheduler.rules
        propagate = int(rules.kv == "propagate")
        return kernel("decode").decode(token, ends, rules.queue_cap, propagate, self._audit, *args)

    def _emitted(self, tokens: list[int], exits: list[int], confidences: list[float]) -> list[Step]:
        if kernel("choosing").NONE in tokens[-1:]:
            raise no_numbers()
        last, calibrated = self._scheduler.last, self._scheduler.confidences.calibrated
        stops = [segment.stop for segment in self._scheduler.segments]
        return [
            Step(token, stops[s], math.nan if s == last else calibrated(raw, stops[s]))
            for token, s, raw in zip(tokens, exits, confidences, strict=True)
        ]

    def _thresholds(self, first: int, count: int) -> tuple[Any, Any]:
        """Where exits are checked and what raw confidence leaves, [count, exits] each."""
        policy, exits = self._scheduler.policy, self._scheduler.segments[:-1]
        assert isinstance(policy, ByThreshold)
        asked = np.zeros((count, len(exits)), np.bool_)
        least = np.zeros((count, len(exits)))
        positions = range(first, first + count)
        for j, exit_layer in enumerate(segment.stop for segment in exits):
            raw = self._raw[exit_layer]
            asked[:, j] = [policy.may_exit(exit_layer, position) for position in positions]
            for i in asked[:, j].nonzero()[0].tolist():
                chance = policy.least(exit_layer, first + i)
                if chance not in raw:
                    raw[chance] = self._scheduler.confidences.raw_of(chance, exit_layer)
                least[i, j] = raw[chance]
        return asked, least


class LosslessStretch(Stretch):
    """A stretch in which tokens that leave early are drafts, and full depth has the last word."""

    _rows_read = _AT_ONCE

    @property
    def _surplus(self) -> int:
        return self._room  # the drafts of one deep pass, and the token that it chooses itself

    def _decode(self, token: int, ends: Any, count: int, *args: Any) -> int:
        (row,) = self._scheduler.rows
        drafts = row.draft_length
        assert drafts is not None, "the row knows how much it drafts"
        done = kernel("lossless").decode(
            token, ends, count, drafts.shallow, drafts.most, drafts.record, *args
        )
        row.cap, row.drafts = drafts.length, 0
        return done


def _comparing(rows: int, room: int, segments: int, record: tuple[Any, ...]) -> tuple[Any, ...]:
    """What compares as many tokens as there is room for, see `kernels.audited`."""
    waiting = np.zeros(rows, np.int64), *np.zeros((2, rows, room), np.int64)
    return *waiting, np.zeros((segments, 2), np.int64), record


def _as_table(weights: torch.Tensor) -> tuple[Any, int]:
    """An embedding's weights [rows, hidden] as `kernels.tables` takes them, and their dtype."""
    kinds = kernel("tables").KINDS
    kind = kinds.index(str(weights.dtype).removeprefix("torch."))
    return weights.detach().contiguous().view(torch.uint8).numpy(), kind


def _dtype(like: torch.Tensor) -> Any:
    """The numpy dtype of a tensor."""
    return like.numpy().dtype


def unfit(scheduler: Scheduler) -> str:
    """Why a scheduler's texts cannot be decoded in stretches; empty if they can."""
    confidences, policy = scheduler.confidences, scheduler.policy
    embedding = scheduler.decoder.plain_embedding
    if len(scheduler.rows) > most_tokens():
        return f"it is one of more than {most_tokens()}"
    if len(scheduler.rows) * scheduler.rules.queue_cap * scheduler.last > MOST_WAITING:
        return "so many tokens may wait that buffers for all of them are too large"
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
    if embedding is None:
        return "its embedding is more than a table and a factor"
    return ""
