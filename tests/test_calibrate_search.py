"""From traces to the operating point that is tried: cost model, candidates, front, pick, seek."""

from dataclasses import replace

import numpy as np
import pytest
from driving import Sure, decode

from adaptive_gen.calibrate import maps, search
from adaptive_gen.calibrate.cost import TERMS, Cost, fit
from adaptive_gen.calibrate.schedule import Work
from adaptive_gen.calibrate.search import Candidate, Target
from adaptive_gen.calibrate.trace import Trace, padded
from adaptive_gen.calibrate.verify import Measured, choose, seek
from adaptive_gen.calibration import ConfidenceMap
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.scheduler import Rules, Scheduler
from adaptive_gen.errors import Unreachable

IDENTITY = ConfidenceMap((0.0, 1.0), (0.0, 1.0))


def cost(**seconds):
    return Cost({**dict.fromkeys(TERMS, 0.0), **seconds}, residual=0.0)


def trace_of(confidence, agrees, exit_layers):
    texts = [np.array(text) for text in confidence]
    return Trace(
        exit_layers=exit_layers,
        lengths=np.array([len(text) for text in texts]),
        confidence={"margin": padded(texts, len(exit_layers) - 1)},
        agrees=padded([np.array(text, dtype=bool) for text in agrees], len(exit_layers) - 1),
    )


def test_a_hand_made_trace_gives_the_figures_worked_out_on_paper():
    # One text, five tokens, one exit at layer 2 of 8. Token 0 is the prompt's and full depth.
    trace = trace_of([[[1.0], [0.95], [0.95], [0.5], [0.95]]], [[[1], [1], [0], [1], [1]]], (2, 8))
    found = search.candidates(
        trace,
        {2: IDENTITY},
        "margin",
        cost(layers=1.0, readouts=2.0),
        kv="recompute",
        queue_cap=16,
    )
    [at_09] = [c for c in found if abs(c.threshold - 0.9) < 0.02 and c.threshold <= 0.95][-1:]
    # Tokens 1, 2, 4 leave: depths 8 2 2 8 2; only token 2 disagrees.
    assert at_09.mean_depth == pytest.approx(22 / 5)
    assert at_09.agreement == pytest.approx(4 / 5)
    # Full depth: 4 * 8 layers + 4 readouts = 40 s. Adaptive: 2 + 2 + 8 + 2 layer calls (pending
    # rows ride along) and 4 checks + 1 readout at full depth = 24 s.
    assert at_09.speedup == pytest.approx(40 / 24)


def test_every_candidate_is_what_the_scheduler_does_with_the_trace():
    from test_calibrate_schedule import EXITS, Counted, CountedSegment

    draw = np.random.default_rng(0)
    shapes = [(n, 3) for n in (12, 40, 25)]
    confidence = [draw.random(shape) for shape in shapes]
    trace = trace_of(
        confidence, [draw.random(s) < c for s, c in zip(shapes, confidence, strict=True)], EXITS
    )
    curves = {e: maps.fit(*trace.at("margin", k)) for k, e in enumerate(EXITS[:-1])}
    price = cost(texts=3.0, tokens=0.5, layers=1.0, rows=0.1, readouts=0.7)
    found = search.candidates(trace, curves, "margin", price, kv="recompute", queue_cap=3)
    assert len(found) == len(search.THRESHOLDS) * 7

    class Traced:
        """Leaves where the trace's mapped confidence reaches the threshold."""

        def __init__(self, text, threshold, checked):
            self.text, self.threshold, self.checked = text, threshold, checked

        def may_exit(self, exit_layer, position):
            return exit_layer in self.checked

        def should_exit(self, check):
            place = EXITS.index(check.exit_layer)
            raw = trace.confidence["margin"][self.text, check.position, place]
            return curves[check.exit_layer](raw) >= self.threshold

    def simulate(threshold, checked):
        depth, agreed, seconds = 0, 0, 0.0
        for text, length in enumerate(trace.lengths.tolist()):
            decoder = Counted()
            ends = (*checked, EXITS[-1])
            segments = [
                CountedSegment(decoder, a, b) for a, b in zip((0, *ends), ends, strict=False)
            ]
            policy = Traced(text, threshold, checked)
            scheduler = Scheduler(
                decoder, segments, KVCache(EXITS[-1]), policy, Sure(), Rules(queue_cap=3)
            )
            depths = [EXITS[-1]]
            depths += [decode(scheduler, token()).exit_layer for _ in range(1, length)]
            for position, exit_layer in enumerate(depths):
                full = exit_layer == EXITS[-1]
                agreed += full or trace.agrees[text, position, EXITS.index(exit_layer)]
            depth += sum(depths)
            counts = {"texts": 1, "tokens": length - 1, **decoder.counts}
            seconds += sum(n * price.seconds[term] for term, n in counts.items())
        return depth / trace.tokens, agreed / trace.tokens, seconds

    full_s = simulate(1.0, ())[2]
    for candidate in draw.choice(np.array(found, dtype=object), 25, replace=False):
        depth, agreement, seconds = simulate(candidate.threshold, candidate.exit_layers[:-1])
        assert candidate.mean_depth == pytest.approx(depth, abs=1e-9)
        assert candidate.agreement == pytest.approx(agreement, abs=1e-9)
        assert candidate.speedup == pytest.approx(full_s / seconds, abs=1e-9)


def token():
    import torch

    return torch.zeros(1, 1, dtype=torch.long)


def test_an_exit_that_never_fires_is_left_out_where_a_check_costs():
    draw = np.random.default_rng(0)
    # Exit 2 is never sure, exit 4 always.
    confidence = np.stack([draw.random((50, 40)) * 0.3, 0.95 + draw.random((50, 40)) * 0.05], -1)
    trace = trace_of(list(confidence), list(np.ones_like(confidence)), (2, 4, 8))
    curves = {2: IDENTITY, 4: IDENTITY}
    found = search.candidates(
        trace, curves, "margin", cost(layers=1.0, readouts=1.0), kv="recompute", queue_cap=16
    )
    assert {c.exit_layers for c in search.front(found)} == {(4, 8)}


def test_a_cost_model_finds_the_constants_of_the_machine_again():
    draw = np.random.default_rng(0)
    true = {"tokens": 2e-4, "layers": 1e-4, "rows": 2e-5, "readouts": 3e-4}
    works = [
        Work(*(np.array([n]) for n in (1, 40, *draw.integers(20, 400, 3), 0, 0))) for _ in range(6)
    ]
    seconds = np.array([sum(getattr(w, t)[0] * s for t, s in true.items()) for w in works])
    found = fit(works, seconds, prefill_s=0.01)
    assert found.residual < 1e-9
    assert {t: s for t, s in found.seconds.items() if s} == pytest.approx({**true, "texts": 0.01})
    assert found.time(works[0]) == pytest.approx([seconds[0] + 0.01])


FRONT = [
    Candidate(t, (4, 8), 6.0, agreement, speedup)
    for t, agreement, speedup in ((0.99, 0.99, 1.1), (0.9, 0.97, 1.3), (0.7, 0.9, 1.6))
]


def test_the_front_keeps_only_what_nothing_beats():
    beaten = [
        Candidate(0.8, (4, 8), 6.0, 0.96, 1.25),
        Candidate(0.95, (2, 8), 6.0, 0.97, 1.29),
        Candidate(0.5, (2, 8), 6.0, 0.9, 1.6),  # a twin
    ]
    for order in (1, -1):
        kept = search.front([*FRONT, *beaten][::order])
        assert [(c.speedup, c.agreement) for c in kept] == [(c.speedup, c.agreement) for c in FRONT]


@pytest.mark.parametrize(
    "kind, value, index",
    [
        ("speedup", 1.2, 1),
        ("speedup", 1.3, 1),
        ("speedup", 2.0, 2),
        ("disagreement", 0.05, 1),
        ("disagreement", 0.5, 2),
        ("disagreement", 0.001, 0),
    ],
)
def test_pick_takes_the_best_point_that_meets_the_target(kind, value, index):
    assert search.pick(FRONT, Target(kind, value)) == index


def measuring(slower=1.0, worse=0.0):
    """A machine on which everything is `slower` times as fast as predicted, and less agreeing."""

    def try_out(candidate):
        speedup, agreement = candidate.speedup * slower, candidate.agreement - worse
        return Measured(candidate, speedup, (speedup, speedup), agreement, 6.0, 100)

    return try_out


def long_front():
    speeds = np.linspace(1.0, 2.0, 41)
    return [Candidate(2 - s / 2, (4, 8), 6.0, 1.2 - s / 5, float(s)) for s in speeds.tolist()]


def test_a_missed_speed_is_sought_further_along_the_front():
    front, target = long_front(), Target("speedup", 1.5)
    start = search.pick(front, target)
    chosen, tried = seek(front, target, start, measuring(slower=0.9))
    assert len(tried) == 2
    assert tried[0].candidate is front[start]
    # 1.5 / 0.9 = 1.667: the first point that reaches it, no faster one.
    assert chosen.candidate.speedup == pytest.approx(1.675)


def test_a_missed_agreement_is_sought_the_other_way():
    front, target = long_front(), Target("disagreement", 0.05)
    chosen, tried = seek(front, target, search.pick(front, target), measuring(worse=0.02))
    assert len(tried) == 2
    assert chosen.agreement >= 0.95
    assert chosen.candidate.agreement == pytest.approx(0.97, abs=0.006)


def test_a_target_out_of_reach_names_the_best_measured_point():
    def try_out(candidates, rounds, few=False):
        return [measuring(slower=0.6)(c) for c in candidates]

    with pytest.raises(Unreachable, match=r"--target-speedup 1\.5 .* 1\.20x at 80\.0% agreement"):
        choose(long_front(), Target("speedup", 1.5), try_out, rounds=1)


def test_cheap_measurements_correct_the_first_try_and_are_kept():
    calls = []

    def try_out(candidates, rounds, few=False):
        calls.append((candidates, rounds, few))
        return [measuring(slower=0.9)(c) for c in candidates]

    chosen, points = choose(long_front(), Target("speedup", 1.5), try_out, rounds=3)
    assert chosen.candidate.speedup == pytest.approx(1.675)
    assert calls[0][1:] == (1, True)
    assert calls[1:] == [([chosen.candidate], 3, False)], "the corrected pick is right at once"
    assert points[0] is chosen
    assert len({p.candidate for p in points}) == len(points)
    assert {p.candidate for p in points} == {chosen.candidate, *calls[0][0]}


def test_a_slower_prediction_is_never_tried_for_more_speed():
    front, target = long_front(), Target("speedup", 1.2)
    # A machine that gets slower with every try.
    chosen, tried = seek(
        front,
        target,
        0,
        lambda c: replace(measuring()(c), speedup=0.5),
    )
    assert chosen is None
    order = [m.candidate.speedup for m in tried]
    assert order == sorted(set(order))
