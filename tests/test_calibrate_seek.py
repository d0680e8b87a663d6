"""From predicted settings to a measured one that meets the target, and when to stop measuring."""

from dataclasses import replace

import numpy as np
import pytest

from adaptive_gen.calibrate import search
from adaptive_gen.calibrate.search import Candidate
from adaptive_gen.calibrate.seek import choose, seek
from adaptive_gen.calibrate.target import Target
from adaptive_gen.calibrate.verify import Measured, missed
from adaptive_gen.errors import Unreachable


class Machine:
    """On which everything is `slower` times as fast as predicted, and less agreeing."""

    def __init__(self, slower=1.0, worse=0.0):
        self.slower, self.worse, self.judged = slower, worse, []

    def judge(self, candidate, target=None):
        self.judged.append(candidate)
        speedup, agreement = candidate.speedup * self.slower, candidate.agreement - self.worse
        interval, latency = (speedup, speedup), candidate.latency_ms / self.slower
        return Measured(candidate, speedup, interval, agreement, 6.0, 100, latency)

    def look(self, found):
        return [Machine(self.slower, self.worse).judge(c) for c in found]


def long_front():
    speeds = np.linspace(1.0, 2.0, 41)
    return [Candidate(2 - s / 2, (4, 8), 6.0, 1.2 - s / 5, s, 12 / s) for s in speeds.tolist()]


def test_a_missed_speed_is_sought_further_along_the_front():
    front, target = long_front(), Target("speedup", 1.5)
    start = search.pick(front, target)
    chosen, tried = seek(front, target, start, Machine(slower=0.9))
    assert len(tried) == 2
    assert tried[0].candidate is front[start]
    # 1.5 / 0.9 = 1.667: the first point that reaches it, no faster one.
    assert chosen.candidate.speedup == pytest.approx(1.675)


def test_a_latency_is_sought_like_the_speed_that_gives_it():
    # Full depth takes 12 ms: 8 ms are a speed of 1.5.
    chosen, _ = seek(long_front(), Target("latency", 8.0), 20, Machine(slower=0.9))
    assert chosen.candidate.speedup == pytest.approx(1.675)
    assert chosen.latency_ms <= 8


def test_a_missed_agreement_is_sought_the_other_way():
    front, target = long_front(), Target("disagreement", 0.05)
    chosen, tried = seek(front, target, search.pick(front, target), Machine(worse=0.02))
    assert len(tried) == 2
    assert chosen.agreement >= 0.95
    assert chosen.candidate.agreement == pytest.approx(0.97, abs=0.006)


def test_a_target_out_of_reach_names_the_best_measured_point():
    with pytest.raises(Unreachable, match=r"--target-speedup 1\.5 .* 1\.20x at 80\.0% agreement"):
        choose(long_front(), Target("speedup", 1.5), Machine(slower=0.6))


def test_cheap_measurements_correct_the_first_try_and_are_kept():
    machine = Machine(slower=0.9)
    chosen, points = choose(long_front(), Target("speedup", 1.5), machine)
    # 1.5 / 0.9 and a little more, so that noise does not make it a miss.
    assert 1.675 <= chosen.candidate.speedup <= 1.5 / 0.9 * 1.06
    assert machine.judged == [chosen.candidate], "the corrected pick is right at once"
    assert points[0] is chosen
    assert len({p.candidate for p in points}) == len(points) > 5


def test_a_slower_prediction_is_never_tried_for_more_speed():
    class Slowing(Machine):
        def judge(self, candidate, target=None):
            return replace(super().judge(candidate), speedup=0.5)

    chosen, tried = seek(long_front(), Target("speedup", 1.2), 0, Slowing())
    assert chosen is None
    order = [m.candidate.speedup for m in tried]
    assert order == sorted(set(order))


@pytest.mark.parametrize(
    ("target", "speedup", "interval", "agreement", "final", "is_missed"),
    [
        (Target("speedup", 1.5), 1.45, (1.3, 1.6), 0.9, False, False),  # may still be reached
        (Target("speedup", 1.5), 1.3, (1.2, 1.49), 0.9, False, True),
        (Target("latency", 8.0), 1.3, (1.2, 1.49), 0.9, False, True),  # 10.4 ms now
        (Target("latency", 8.0), 1.3, (1.2, 1.75), 0.9, False, False),
        (Target("disagreement", 0.05), 1.3, (1.2, 1.4), 0.94, False, False),  # few tokens yet
        (Target("disagreement", 0.05), 1.3, (1.2, 1.4), 0.94, True, True),
        (Target("disagreement", 0.05), 1.3, (1.2, 1.4), 0.80, False, True),
        (Target("risk", 0.05), 0.5, (0.4, 0.6), 0.1, True, False),  # certified, not measured
        (None, 0.5, (0.4, 0.6), 0.1, True, False),
    ],
)
def test_measuring_stops_when_the_target_is_certainly_missed(
    target, speedup, interval, agreement, final, is_missed
):
    candidate = Candidate(0.9, (4, 8), 6.0, 0.9, 1.5)
    so_far = Measured(candidate, speedup, interval, agreement, 6.0, 300, 8 * 1.3 / 1.0)
    assert missed(target, so_far, final) is is_missed
