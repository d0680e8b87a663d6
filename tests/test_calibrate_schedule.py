"""The simulation of the queues, held against the scheduler that generation runs."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from driving import Sure, decode

from adaptive_gen.calibrate.profile import Scripted, scripts, work
from adaptive_gen.calibrate.schedule import simulate
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.rules import Rules
from adaptive_gen.engine.scheduler import Scheduler

EXITS = (2, 3, 5, 9)
KV = ("recompute", "propagate")


@dataclass
class Counted:
    """A decoder without weights and its segments, counting what the scheduler asks of them."""

    n_layers: int = EXITS[-1]
    counts: dict = field(
        default_factory=lambda: dict.fromkeys(
            ("layers", "rows", "doublings", "readouts", "checks"), 0
        )
    )

    def embed(self, ids, start=0):
        return torch.zeros(1, ids.shape[1], 1)

    def normed(self, hidden, exit_layer):
        raise AssertionError("only a gate reads what the head does")

    def readout(self, hidden, exit_layer):
        self.counts["readouts"] += 1
        self.counts["checks"] += exit_layer < self.n_layers
        return torch.zeros(1, 3)


@dataclass
class CountedSegment:
    decoder: Counted
    start: int
    stop: int

    def _count(self, calls, rows, hidden, free):
        size, counts = self.stop - self.start, self.decoder.counts
        counts[calls] = counts.get(calls, 0) + size
        counts[rows] = counts.get(rows, 0) + size * (hidden.shape[1] - free)
        return hidden

    def run(self, hidden, cache, span, newest_only=False):
        size, rows = self.stop - self.start, hidden.shape[1]
        self.decoder.counts["doublings"] += np.log2(rows) * size
        return self._count("layers", "rows", hidden, free=1)

    def store(self, hidden, cache, span):
        self.decoder.counts["fills"] = self.decoder.counts.get("fills", 0) + 1
        self._count("stores", "stored", hidden, free=0)


def run_scheduler(policy, tokens, kv, cap):
    """Depths of the decoded tokens, and the counts, of the real scheduler."""
    decoder = Counted()
    exits = (*sorted(policy.asks), EXITS[-1])  # as `generate` cuts the layers
    segments = [CountedSegment(decoder, a, b) for a, b in zip((0, *exits), exits, strict=False)]
    scheduler = Scheduler(
        decoder, segments, KVCache(EXITS[-1]), policy, Sure(), Rules(kv=kv, queue_cap=cap)
    )
    token = torch.zeros(1, 1, dtype=torch.long)
    depths = [decode(scheduler, token).exit_layer for _ in range(1, tokens)]
    return depths, decoder.counts


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("cap", [1, 2, 5, 100])
@pytest.mark.parametrize("shallow", [0.5, 0.95])
def test_the_simulation_does_the_scheduler_s_work(kv, cap, shallow):
    draw = np.random.default_rng(cap)
    depths = np.where(draw.random(60) < shallow, draw.choice(EXITS[:-1], 60), EXITS[-1]).tolist()
    script = Scripted(depths, asks=frozenset({2, 5}))
    ran, counts = run_scheduler(script, 60, kv, cap)
    below = np.array(EXITS[:-1])
    outcome = simulate(
        EXITS,
        lengths=np.array([60]),
        agrees=np.zeros((1, 60, 3), dtype=bool),
        leaves=np.array(depths)[None, :, None, None] == below[:, None],
        checked=np.isin(below, [2, 5])[:, None],
        kv=kv,
        queue_cap=cap,
    )
    done = {name: float(getattr(outcome.work, name)[0]) for name in counts}
    assert done == pytest.approx(counts)
    assert outcome.mean_depth[0] == pytest.approx((sum(ran) + EXITS[-1]) / 60)
    # The first token and those at full depth agree by definition; the exits never do here.
    assert outcome.agreement[0] == pytest.approx((1 + ran.count(EXITS[-1])) / 60)


@pytest.mark.parametrize("kv", KV)
def test_texts_of_different_lengths_do_not_touch_each_other(kv):
    draw = np.random.default_rng(0)
    lengths = np.array([1, 4, 30, 17])
    agrees = draw.random((4, 30, 3)) < 0.6
    leaves = draw.random((4, 30, 3, 5)) < 0.4
    checked = np.ones((3, 5), dtype=bool)
    together = simulate(EXITS, lengths, agrees, leaves, checked, kv, 4)
    alone = [
        simulate(EXITS, lengths[i : i + 1], agrees[i : i + 1], leaves[i : i + 1], checked, kv, 4)
        for i in range(4)
    ]
    assert together.work.table == pytest.approx(sum(one.work.table for one in alone))
    for figure in ("mean_depth", "agreement"):
        shares = [getattr(one, figure) * one.tokens for one in alone]
        assert getattr(together, figure) == pytest.approx(sum(shares) / together.tokens)


@pytest.mark.parametrize("kv, terms", [("recompute", 8), ("propagate", 9)])
def test_the_profile_s_scripts_tell_all_terms_apart(kv, terms):
    works = [work(script, EXITS, kv, queue_cap=16) for script in scripts(EXITS, tokens=40)]
    table = np.concatenate([w.table for w in works])
    used = table[:, table.any(axis=0)]
    assert used.shape[1] == terms
    assert np.linalg.matrix_rank(used) == terms


def test_a_layer_is_as_cold_as_the_last_token_that_ran_it_went_deep():
    """Depths 4, 1, 1, 3, 4 of 4 behind a prompt at full depth, exits after each layer."""
    depths = [4, 1, 1, 3, 4]
    script = Scripted([4, *depths], frozenset([1, 2, 3]))
    done = work(script, (1, 2, 3, 4), "recompute", 16)
    cold = [4 * 4, 4, 1, 1 + 4 + 4, 3 + 3 + 3 + 4]  # of four layers, by token
    assert done.cold.tolist() == [sum(cold) / 4]
    assert done.layers.tolist() == [sum(depths)]
