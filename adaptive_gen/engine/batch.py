"""Stretches of several texts, each of which goes as deep as it needs."""

import math
import time

import numpy as np

from ..report import Step
from .machine_code import kernel
from .scheduler import Scheduler
from .stretch import Pace, Stretch


class BatchStretch(Stretch):
    """Decodes the texts of a scheduler whose prompts have been run; texts may be dropped."""

    def __init__(self, scheduler: Scheduler, pace: Pace):
        """Prepare what stays the same."""
        self._rows_read = len(scheduler.rows)
        super().__init__(scheduler, pace)
        room, width = self._desk.x.shape
        fused = self._compiled.fused
        pairs = fused.sizes.head_dim // 2
        turn = self._like.new_zeros(room, len(fused.turns), pairs, 2).numpy()
        newest = self._like.new_zeros(self._rows_read, width).numpy()
        taking = np.zeros((2, self._rows_read), np.int64)
        self._tops = self._places, turn, newest, taking

    def run(self, tokens: list[int], most: list[int], ends: frozenset[int]) -> list[list[Step]]:
        """See `Stretch.run`; of some texts there may be nothing new."""
        scheduler, rows = self._scheduler, self._scheduler.rows
        count = min(*most, self._pace.tokens)
        starts = np.array([row.position + (row.stage < 0) for row in rows])
        lengths = self._lengths()
        # A row's newest token may be on its way already.
        stop = int(lengths[0].max()) + count + 1
        memory, turns, buffers = self._room_until(stop)
        stages = np.array([row.stage for row in rows])
        shallow, tallies = np.array([scheduler.shallow]), np.zeros(3, np.int64)
        waiting = self._in_front()
        desk = self._desk.x, *self._tops, turns, buffers
        state = memory, self._waiting, waiting, lengths, stages, shallow, tallies
        first = int(starts.min())
        tables = self._thresholds(first, int(starts.max()) - first + count + 1)
        thrift = scheduler.thrift
        asking = *tables, starts - first, self._measure, thrift.worth, thrift.records
        shape, done = (len(rows), max(1, count)), np.zeros(len(rows), np.int64)
        results = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, math.nan)
        clock = time.perf_counter()
        rules = scheduler.rules
        kernel("batch").decode(
            np.array(tokens),
            np.array([*ends], np.int64),
            np.full(len(rows), count),
            rules.queue_cap,
            rules.shallow_passes,
            self._model,
            desk,
            state,
            asking,
            (*results, done),
        )
        self._pace.keep(time.perf_counter() - clock, int(done.max()))
        scheduler.go_on(
            (starts + done - (stages < 0)).tolist(),
            stages.tolist(),
            lengths.tolist(),
            waiting.tolist(),
            tallies.tolist(),
        )
        scheduler.shallow = int(shallow[0])
        of_rows = zip(*results, done.tolist(), strict=True)
        return [self._emitted(*(r[:n].tolist() for r in found)) for *found, n in of_rows]
