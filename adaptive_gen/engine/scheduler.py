"""The loop: queues of hidden states in front of segments, and what runs when.

    token -> embed -> [queue 0] segment 0 -> exit? -> [queue 1] segment 1 -> exit? -> ... -> readout

A step runs one segment on everything that waits in front of it, for the rows whose newest token
waits there too. A token that leaves early simply stays in the next queue (it is *pending*); when a
later token of its row goes deeper, the pending ones go with it, older first, as one causal block.
In memory-bound decoding the weights are read once for all of them, and in the mode `recompute`
every K/V is what a full-depth forward of the text gives.

Everything else is a choice made over these queues. A prompt is a block of tokens that must go to
the end (or need not: lazy prefill). Rows of a batch meet in front of a segment or run it apart.
A deep pass may read out all it runs, which is what checks drafts and audits exits.

Axes: `rows`, `time`, `hidden`, `vocab`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..confidence import Confidences
from ..decoder import Decoder
from ..policy import Check, ExitPolicy
from .cache import KVCache
from .lasting import makes_lasting
from .queue import Queue, latest, newest
from .rules import Readout, Row, Rules
from .segment import Segment
from .thrift import Thrift, worth_of


class Scheduler:
    """Decodes a batch of texts, each token to its own depth."""

    def __init__(
        self,
        decoder: Decoder,
        segments: Sequence[Segment],
        cache: KVCache,
        policy: ExitPolicy,
        confidences: Confidences,
        rules: Rules | None = None,
        readout: Callable[[Tensor, int], Tensor] | None = None,
        embed: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        normed: Callable[[Tensor, int], Tensor] | None = None,
    ):
        """Set up empty queues.

        Args:
            decoder: the model.
            segments: the model's layers, in order, without gaps.
            cache: with a row per text, empty or as far as its text has been run before.
            policy: asked at the end of every segment but the last.
            confidences: what the policy is shown.
            rules: how tokens move.
            readout: (hidden, exit layer) -> logits [rows, vocab]; None is the decoder's own.
            embed: (ids, starts) -> hidden states before the first segment; likewise.
            normed: (hidden, exit layer) -> hidden as the head sees it; likewise.
        """
        self.decoder, self.segments, self.cache = decoder, segments, cache
        self.policy, self.confidences = policy, confidences
        self.rules = rules or Rules()
        self.readout = readout or decoder.readout
        self.embed = embed or decoder.embed
        self.normed = normed or decoder.normed
        self.queues = [Queue(cache.batch) for _ in segments]
        self.rows = [Row(cap=self.rules.queue_cap) for _ in range(cache.batch)]
        exit_layers = [segment.stop for segment in segments]
        worth = worth_of(decoder, exit_layers, confidences) if self.rules.thrifty else None
        self.thrift = Thrift(exit_layers, worth, cache.batch)
        self.deep_passes = 0  # runs of the last segment while decoding
        self.caught_up = 0  # pending tokens that got the last segment's K/V
        self.layers_run = 0  # while decoding: layers whose weights were read, over all passes
        self.shallow = 0  # runs of segment 0 since the deeper ones had their turn

    @property
    def last(self) -> int:
        """Index of the deepest segment."""
        return len(self.segments) - 1

    @makes_lasting
    def prefill(self, ids: Tensor, counts: Sequence[int] | None = None) -> None:
        """Put the prompts in front of the first segment.

        Unless it is lazy, they go through at full depth: every later token attends to these keys,
        so an approximation here would never fade.

        Args:
            ids: [rows, time], each row's tokens first, filled up at the end. What the cache holds
                already goes before them.
            counts: tokens of each row; None is `time` for all.
        """
        counts = counts or [ids.shape[1]] * len(self.rows)
        self.queues[0].push(self.embed(ids, self.cache.lengths[0]), counts)
        for row, count, held in zip(self.rows, counts, self.cache.lengths[0], strict=True):
            row.stage, row.prompt, row.deep = 0, held + count, self.rules.prefill == "full"

    @makes_lasting
    def feed(self, rows: tuple[int, ...], tokens: Tensor) -> None:
        """Put the next token [rows, 1] of each of `rows` in front of the first segment."""
        every = None if len(rows) == len(self.rows) else rows
        starts = [self.cache.lengths[0][row] for row in rows]
        self.queues[0].lend(self.embed(tokens, starts), [1] * len(rows), every)
        for index in rows:
            row = self.rows[index]
            row.stage, row.deep, row.checks = 0, False, ()
            row.position += 1

    def go_on(
        self,
        positions: list[int],
        stages: list[int],
        lengths: list[list[int]],
        waiting: list[list[int]],
        tallies: list[int],
    ) -> None:
        """Take over what a `stretch.Stretch` has done.

        Args:
            positions: of each row's newest token, see `Row`.
            stages: likewise, where it waits.
            lengths: tokens that each segment's layers hold now, [segments, rows].
            waiting: in front of each segment, [segments, rows].
            tallies: layers run, deep passes and tokens caught up meanwhile.
        """
        for row, position, stage in zip(self.rows, positions, stages, strict=True):
            row.position, row.stage, row.deep, row.checks = position, stage, False, ()
        for segment, queue, held, counts in zip(
            self.segments, self.queues, lengths, waiting, strict=True
        ):
            layers = segment.stop - segment.start
            self.cache.lengths[segment.start : segment.stop] = [tuple(held)] * layers
            queue.counts = counts
        for name, tally in zip(("layers_run", "deep_passes", "caught_up"), tallies, strict=True):
            setattr(self, name, getattr(self, name) + tally)

    @makes_lasting
    def step(self) -> Readout | None:
        """Run one segment; return the rows that left at its end, if any did."""
        index = self._next_segment()
        rows = tuple(i for i, row in enumerate(self.rows) if row.stage == index)
        out, counts = self._advance(index, rows)
        if index == self.last:
            return self._finish(rows, out, counts)
        return self._ask(index, rows, newest(out, counts))

    @makes_lasting
    def flush(self, rows: tuple[int, ...] | None = None) -> list[Tensor] | None:
        """Give every pending token of `rows` (None: all) its K/V in all layers.

        Returns:
            Each row's full-depth logits of the tokens that had left since its last deep pass,
            [drafts, vocab], if the rules ask for them.
        """
        every = rows or tuple(range(len(self.rows)))
        drafts: dict[int, Tensor] = {}
        for index, queue in enumerate(self.queues):
            waiting = tuple(row for row in every if queue.counts[row])
            if not waiting:
                continue
            block, counts = queue.take(self._selection(waiting))
            if self.rules.kv == "propagate":
                self._store(index, waiting, block, counts)
                continue
            out = self._run(index, waiting, block, counts)
            if index == self.last:
                self.caught_up += sum(counts)
                if self.rules.read_drafts:
                    drafts = dict(zip(waiting, self._read(waiting, out, counts, 0), strict=True))
        for row in every:
            self.rows[row].drafts = 0
        return [drafts[row] for row in every] if drafts else None

    def rewind(self, row: int, length: int) -> None:
        """Forget a row's tokens from position `length` on, just after a deep pass of the row."""
        assert not any(queue.counts[row] for queue in self.queues), "tokens of the row are pending"
        self.cache.truncate(length, row)
        self.rows[row].position = length - self.rows[row].prompt

    @makes_lasting
    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, which are numbered anew in the order given."""
        self.cache.keep(rows)
        for queue in self.queues:
            queue.keep(rows)
        self.rows = [self.rows[row] for row in rows]
        self.thrift.keep(rows)

    def _next_segment(self) -> int:
        """The shallowest segment a newest token waits in front of, the first not too often."""
        stages = {row.stage for row in self.rows} - {-1}
        deeper = stages - {0}
        if deeper and (0 not in stages or self.shallow >= self.rules.shallow_passes):
            return min(deeper)
        self.shallow = self.shallow + 1 if deeper else 1
        return 0

    def _advance(self, index: int, rows: tuple[int, ...]) -> tuple[Tensor, list[int]]:
        """Run segment `index` on all that waits for `rows`; each row's newest token comes last."""
        block, counts = self.queues[index].take(self._selection(rows))
        decoding = self._decoding(rows)
        if self.rules.kv == "propagate" and decoding and max(counts) > 1:
            last_tokens = newest(block, counts)[:, None]
            self._store(index, rows, block, [count - 1 for count in counts])
            block, counts = last_tokens, [1] * len(rows)
        out = self._run(index, rows, block, counts)
        if decoding and index == self.last:
            self.deep_passes += 1
            self.caught_up += sum(counts) - len(rows)
        return out, counts

    def _run(self, index: int, rows: tuple[int, ...], block: Tensor, counts: list[int]) -> Tensor:
        """Run segment `index` on a block and queue the result in front of the next one."""
        segment, selection = self.segments[index], self._selection(rows)
        self._keep_lent()
        span = self.cache.span(segment.start, counts, selection)
        newest_only = index == self.last and not self._must_judge(rows)
        out = segment.run(block, self.cache, span, newest_only)
        if index < self.last:
            self.queues[index + 1].lend(out, counts, selection)
        if self._decoding(rows):
            self.layers_run += segment.stop - segment.start
        return out

    def _store(self, index: int, rows: tuple[int, ...], block: Tensor, counts: list[int]) -> None:
        """Store K/V of tokens in front of segment `index` and pass them on unchanged."""
        segment, selection = self.segments[index], self._selection(rows)
        block = block[:, : max(counts)]
        self._keep_lent()
        segment.store(block, self.cache, self.cache.span(segment.start, counts, selection))
        if index < self.last:
            self.queues[index + 1].push(block, counts, selection)
        else:
            self.caught_up += sum(counts)

    def _keep_lent(self) -> None:
        """A segment is about to overwrite what the last one gave, which may still wait."""
        for queue in self.queues:
            queue.own()

    def _ask(self, index: int, rows: tuple[int, ...], hidden: Tensor) -> Readout | None:
        """Let the policy decide which rows leave with `hidden` [rows, hidden] after a segment."""
        exit_layer = self.segments[index].stop
        asked = []  # places among `rows`
        for place, i in enumerate(rows):
            self.rows[i].stage = index + 1
            position = self.rows[i].position
            if self._must_go_on(index + 1, i) or not self.policy.may_exit(exit_layer, position):
                continue
            if self.thrift.due(i, index):
                asked.append(place)
        if not asked:
            return None
        hidden = _pick(hidden, asked)
        if self.confidences.reads_hidden:
            logits = None
            # A policy may ask an earlier check for its token when deeper segments have run.
            hidden = hidden.clone()
            normed = self.normed(hidden, exit_layer)
            confidences = self.confidences.of_hidden(normed, exit_layer)
        else:
            logits = self.readout(hidden, exit_layer)
            confidences = self.confidences(logits, exit_layer)
        leaving = []  # places among those asked
        for place, (i, confidence) in enumerate(
            zip([rows[place] for place in asked], confidences, strict=True)
        ):
            check = self._check(exit_layer, i, confidence, hidden, logits, place)
            self.rows[i].checks += (check,)
            leaves = self.policy.should_exit(check)
            self.thrift.observe(i, index, leaves)
            if leaves:
                leaving.append(place)
        if not leaving:
            return None
        if logits is None:
            logits = self.readout(_pick(hidden, leaving), exit_layer)
        else:
            logits = _pick(logits, leaving)
        left = tuple(rows[asked[place]] for place in leaving)
        for i in left:
            self.rows[i].stage = -1
            self.rows[i].drafts += 1
        self._empty_full_queues(index + 1, left)
        return Readout(left, logits, exit_layer, [confidences[place] for place in leaving])

    def _check(
        self,
        exit_layer: int,
        row: int,
        confidence: float,
        hidden: Tensor,
        logits: Tensor | None,
        place: int,
    ) -> Check:
        """What the policy sees of one row; what it may not want is computed when it asks."""

        def own() -> Tensor:
            if logits is not None:
                return logits[place : place + 1]
            return self.readout(hidden[place : place + 1], exit_layer)

        return Check(
            exit_layer,
            self.rows[row].position,
            confidence,
            self.rows[row].checks,
            choose=lambda: int(own().argmax()),
            measure=lambda name: self.confidences(own(), exit_layer, name)[0],
        )

    def _finish(self, rows: tuple[int, ...], out: Tensor, counts: list[int]) -> Readout:
        """Read out rows that have been through all layers."""
        drafts = None
        if self._must_judge(rows):
            read = self._read(rows, out, counts, 1)
            logits = torch.stack([part[-1] for part in read])
            drafts = [part[:-1] for part in read]
        else:
            logits = self.readout(newest(out, counts), self.decoder.n_layers)
        for i in rows:
            self.rows[i].stage, self.rows[i].drafts = -1, 0
        return Readout(rows, logits, self.decoder.n_layers, [math.nan] * len(rows), drafts)

    def _read(
        self, rows: tuple[int, ...], out: Tensor, counts: list[int], newest_too: int
    ) -> list[Tensor]:
        """Logits of each row's drafts [drafts + newest_too, vocab] in the last segment's output."""
        wanted = [self.rows[i].drafts + newest_too for i in rows]
        drafts = latest(out, counts, wanted)
        return list(self.readout(drafts, self.decoder.n_layers).split(wanted))

    def _must_judge(self, rows: tuple[int, ...]) -> bool:
        """Whether full depth has to say something on tokens that left before."""
        return self.rules.read_drafts and any(self.rows[i].drafts for i in rows)

    def _must_go_on(self, index: int, row: int) -> bool:
        """Whether a row must not leave: its queue in front of segment `index` is too full."""
        this = self.rows[row]
        if this.deep or self.rules.kv == "propagate":
            return this.deep
        held = self.cache.lengths[self.segments[index].start][row]
        prompt = max(0, this.prompt - held)  # a lazy prompt waits there as well
        return self.queues[index].counts[row] > this.cap + prompt

    def _empty_full_queues(self, index: int, rows: tuple[int, ...]) -> None:
        """Propagation, being cheap, empties a queue as soon as it is full."""
        while self.rules.kv == "propagate" and index <= self.last:
            rows = tuple(i for i in rows if self.queues[index].counts[i] > self.rows[i].cap)
            if not rows:
                break
            self._store(index, rows, *self.queues[index].take(self._selection(rows)))
            index += 1

    def _decoding(self, rows: tuple[int, ...]) -> bool:
        """Whether a pass over `rows` is part of decoding; prompts go together, before anything."""
        return any(self.rows[i].position > 0 for i in rows)

    def _selection(self, rows: tuple[int, ...]) -> tuple[int, ...] | None:
        """`rows` as cache and queues take them: None where they are all."""
        return None if len(rows) == len(self.rows) else rows


def _pick(values: Tensor, places: list[int]) -> Tensor:
    """Some rows of [rows, ...]; all of them without a copy."""
    return values if len(places) == values.shape[0] else values[places]
