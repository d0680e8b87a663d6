"""Stretches of several texts, each of which goes as deep as it needs."""

import math
import time
from typing import Any

import numpy as np

from ..report import Step
from .choosing import Choice
from .lasting import makes_lasting
from .machine_code import kernel
from .scheduler import Scheduler
from .stretch import LosslessStretch, Pace, Stretch


class BatchStretch(Stretch):
    """Decodes the texts of a scheduler whose prompts have been run; texts may be dropped."""

    def __init__(self, scheduler: Scheduler, pace: Pace, choice: Choice, audited: bool = False):
        """Prepare what stays the same."""
        self._rows_read = max(self._rows_read, len(scheduler.rows))
        super().__init__(scheduler, pace, choice, audited)
        room, width = self._desk.x.shape
        fused = self._compiled.fused
        pairs = fused.sizes.head_dim // 2
        turn = self._like.new_zeros(room, len(fused.turns), pairs, 2).numpy()
        reading = self._like.new_zeros(self._rows_read, width).numpy()
        notes = np.zeros((4, len(scheduler.rows)), np.int64)
        self._tops = self._places, turn, reading, notes

    @makes_lasting
    def run(
        self, tokens: list[int], most: list[int], ends: frozenset[int], places: list[int]
    ) -> list[list[Step]]:
        """See `Stretch.run`; of some texts there may be nothing new."""
        scheduler, rows = self._scheduler, self._scheduler.rows
        chosen = np.array([len(row.unjudged) for row in rows])
        lengths = self._lengths()
        most = self._placeable(most, lengths[0] - chosen)
        count = self._choosing.most(min(*most, self._pace.tokens))
        width = max(count, self._choosing.most(count, self._surplus), 1 + int(chosen.max()))
        stages = np.array([row.stage for row in rows])
        # Of what is next to stand; a row's newest token may be on its way already.
        starts = np.array([row.position for row in rows]) + (stages < 0) - chosen
        limits = np.minimum(most, width)
        memory, turns, buffers = self._room_until(int((lengths[0] + limits - chosen).max()))
        shallow, tallies = np.array([scheduler.shallow]), np.zeros(3, np.int64)
        waiting = self._in_front()
        desk = self._desk.x, *self._tops, turns, buffers
        state = memory, self._waiting, waiting, lengths, stages, shallow, tallies
        first, behind = int(starts.min()), int((starts + limits).max())
        tables = self._thresholds(first, behind - first)
        thrift = scheduler.thrift
        asking = *tables, starts - first, self._measure, thrift.worth, thrift.records
        choosing = self._choosing.arrays(first, behind, places)
        results = self._drafted(width)
        clock = time.perf_counter()
        stood = self._decode_rows(
            (np.array(tokens), np.array([*ends], np.int64)),
            count,
            limits,
            np.array([row.cap for row in rows]),
            (self._model, desk, state, asking, choosing, (*results, chosen)),
        )
        self._pace.keep(time.perf_counter() - clock, int(stood.max()))
        scheduler.go_on(
            (starts + chosen - (stages < 0)).tolist(),
            stages.tolist(),
            lengths.tolist(),
            waiting.tolist(),
            tallies.tolist(),
        )
        scheduler.shallow = int(shallow[0])
        found = []
        for row, *result, drafts, n in zip(
            rows, *results, chosen.tolist(), stood.tolist(), strict=True
        ):
            row.unjudged = [*zip(*(part[n:drafts].tolist() for part in result), strict=True)]
            row.drafts = len(row.unjudged)
            found.append(self._emitted(*(part[:n].tolist() for part in result)))
        return found

    def _drafted(self, width: int) -> tuple[Any, Any, Any]:
        """Room for tokens, segments and confidences, [rows, width], what is not judged in front."""
        rows = self._scheduler.rows
        shape = len(rows), width
        results = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, math.nan)
        for r, row in enumerate(rows):
            for i, draft in enumerate(row.unjudged):
                for result, part in zip(results, draft, strict=True):
                    result[r, i] = part
        return results

    def _decode_rows(self, tokens: Any, count: int, most: Any, caps: Any, parts: Any) -> Any:
        """Call the kernel; see `kernels.batch`.

        Args:
            tokens: each text's last, and those that end one.
            count: tokens to decode.
            most: how many end each text, [rows].
            caps: see there; likewise `parts`.
            parts: what the kernel works on.

        Returns:
            How many tokens of each row stand.
        """
        rules, (*_, (*_, chosen)) = self._scheduler.rules, parts
        how = rules.shallow_passes, int(rules.kv == "propagate"), self._audit
        kernel("batch").decode(*tokens, most, caps, *how, *parts)
        return chosen


class LosslessBatchStretch(LosslessStretch, BatchStretch):
    """Stretches of several texts in which full depth has the last word."""

    def _decode_rows(self, tokens: Any, count: int, most: Any, caps: Any, parts: Any) -> Any:
        rows, (*others, results) = self._scheduler.rows, parts
        lengths = [row.draft_length for row in rows if row.draft_length is not None]
        assert len(lengths) == len(rows), "every row knows how much it drafts"
        records, stood = np.stack([length.record for length in lengths]), np.zeros_like(caps)
        kernel("batch_lossless").decode(
            *tokens,
            count,
            most,
            caps,
            self._scheduler.rules.shallow_passes,
            (records, lengths[0].shallow, lengths[0].most),
            *others,
            (*results, stood),
        )
        for row, length, record, cap in zip(rows, lengths, records, caps.tolist(), strict=True):
            length.record[:], row.cap = record, cap
        return stood
