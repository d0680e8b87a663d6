"""From traces to the setting that is tried: cost model, candidates, front, pick."""

from dataclasses import replace

import numpy as np
import pytest
from driving import Sure, decode

from adaptive_gen.calibrate import maps, search, worth
from adaptive_gen.calibrate.cost import TERMS, Cost, fit
from adaptive_gen.calibrate.histogram import tables
from adaptive_gen.calibrate.schedule import Work
from adaptive_gen.calibrate.search import Candidate, Traced
from adaptive_gen.calibrate.target import Target
from adaptive_gen.calibrate.trace import Trace, padded
from adaptive_gen.calibration import ConfidenceMap
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.rules import Rules
from adaptive_gen.engine.scheduler import Scheduler
from adaptive_gen.errors import OptionError, Unreachable

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
    price = cost(layers=1.0, readouts=2.0)
    found = search.candidates(Traced.of(trace, {2: IDENTITY}, "margin", price, "recompute", 16))
    [at_09] = [c for c in found if abs(c.threshold - 0.9) < 0.02 and c.threshold <= 0.95][-1:]
    # Tokens 1, 2, 4 leave: depths 8 2 2 8 2; only token 2 disagrees.
    assert at_09.mean_depth == pytest.approx(22 / 5)
    assert at_09.agreement == pytest.approx(4 / 5)
    # Full depth: 4 * 8 layers + 4 readouts = 40 s. Adaptive: 2 + 2 + 8 + 2 layer calls (pending
    # rows ride along) and 4 checks + 1 readout at full depth = 24 s.
    assert at_09.speedup == pytest.approx(40 / 24)


def test_exits_are_placed_where_they_are_predicted_to_pay_and_nowhere_else():
    # Two exits; the first is never sure enough, the second leaves at every threshold up to 0.9.
    text = [[0.1, 0.9]] * 6
    trace = trace_of([text], [[[1, 1]] * 6], (2, 4, 8))
    curves = {2: IDENTITY, 4: IDENTITY}
    price = cost(layers=1.0, readouts=1.0)
    traced = Traced.of(trace, curves, "margin", price, "recompute", 16)
    placed = dict(search.placement(search.candidates(traced)))
    assert set(placed) == set(search.THRESHOLDS)
    assert {exits for t, exits in placed.items() if t <= 0.9} == {(4,)}
    assert {exits for t, exits in placed.items() if t > 0.9} == {()}


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
    found = search.candidates(Traced.of(trace, curves, "margin", price, "recompute", 3))
    assert len(found) == len(search.THRESHOLDS) * 7

    class Follows:
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
            policy = Follows(text, threshold, checked)
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


@pytest.mark.parametrize("exits", [1, 2, 3])
def test_the_histogram_is_every_tuple_followed_token_by_token(exits):
    draw = np.random.default_rng(exits)
    layers = (*(2, 3, 5, 9)[:exits], 12)
    chance = np.round(draw.random((400, exits)), 2)  # so that some lie on a threshold
    agrees = draw.random((400, exits)) < chance
    grid = np.array([0.2, 0.5, 0.8, 0.9, search.NEVER])
    found = tables(layers, chance, agrees, grid)
    for index in np.ndindex(found.layers.shape):
        thresholds = grid[list(index)]
        depth = checks = at_full = agreed = skipped = 0
        for token in range(400):
            for k in range(exits):
                checks += thresholds[k] <= 1
                if chance[token, k] >= thresholds[k]:
                    depth, agreed = depth + layers[k], agreed + agrees[token, k]
                    skipped += layers[-1] - layers[k]
                    break
            else:
                depth, at_full, agreed = depth + layers[-1], at_full + 1, agreed + 1
        assert found.layers[index] == pytest.approx(depth, rel=1e-9)
        assert found.readouts[index] == pytest.approx(checks + at_full, rel=1e-9)
        assert found.checks[index] == pytest.approx(checks, rel=1e-9)
        assert found.agreed[index] == pytest.approx(agreed, rel=1e-9)
        assert found.skipped[index] == pytest.approx(skipped, rel=1e-9)


def random_trace(texts=40, time=30, exits=(2, 4, 8)):
    draw = np.random.default_rng(3)
    confidence = draw.random((texts, time, len(exits) - 1)) ** 0.5
    # The shallow exit agrees less than it is sure, the deep one more.
    agrees = draw.random(confidence.shape) < confidence * np.array([0.8, 1.0])
    return trace_of(list(confidence), list(agrees), exits)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_without_queues_the_histogram_prices_as_the_simulation_does(kv):
    trace = random_trace()
    price = cost(texts=3.0, tokens=0.5, layers=1.0, readouts=0.7, checks=0.2)
    traced = Traced.of(trace, {2: IDENTITY, 4: IDENTITY}, "margin", price, kv, 10_000)
    grid = np.array([0.3, 0.6, 0.9, search.NEVER])
    speed, agreed = search._histogram(traced, grid)
    pairs = np.stack(np.meshgrid(grid, grid, indexing="ij")).reshape(2, -1)
    outcome = traced.simulate(pairs)
    assert 1 / speed == pytest.approx(price.time(outcome.work), rel=1e-9)
    assert agreed + len(trace.lengths) == pytest.approx(outcome.agreement * trace.tokens, rel=1e-9)


def test_thresholds_of_their_own_find_what_one_for_all_cannot():
    trace = random_trace()
    price = cost(layers=1.0, readouts=0.1)
    traced = Traced.of(trace, {2: IDENTITY, 4: IDENTITY}, "margin", price, "recompute", 16)
    one, own = search.front(search.candidates(traced)), search.front(search.per_exit(traced))
    target = Target("disagreement", 0.15)
    best = [found[search.pick(found, target)] for found in (one, own)]
    assert best[1].speedup > best[0].speedup * 1.01
    assert best[1].agreement >= 0.85
    assert isinstance(best[1].dial, dict) and set(best[1].dial) < {2, 4, 8}
    assert best[0].dial == best[0].threshold


def test_too_many_exits_for_thresholds_of_their_own_are_refused():
    trace = random_trace(2, 3, exits=(1, 2, 3))
    wide = replace(
        trace,
        exit_layers=tuple(range(1, 8)),
        confidence={"margin": np.zeros((2, 3, 6))},
        agrees=np.zeros((2, 3, 6), dtype=bool),
    )
    curves = dict.fromkeys(range(1, 7), IDENTITY)
    traced = Traced.of(wide, curves, "margin", cost(layers=1.0), "recompute", 16)
    with pytest.raises(OptionError, match="up to 5 exits; there are 6"):
        search.per_exit(traced)


def test_where_looking_costs_more_than_layers_the_answer_is_no():
    trace = random_trace()
    for readouts, layers, says in (
        (0.1, 1.0, None),
        (20.0, 1.0, "do not use adaptive depth .* give or take 0% .* as long as 20.0 layers"),
        (20.0, 0.0, "do not use adaptive depth .* as long as all 8 layers or more"),
    ):
        price = cost(layers=layers, readouts=readouts)
        traced = Traced.of(trace, {2: IDENTITY, 4: IDENTITY}, "margin", price, "recompute", 16)
        front = search.front(search.candidates(traced))
        target = Target("disagreement", 0.05)
        if says is None:
            worth.check(front, target, price, trace)
            continue
        with pytest.raises(Unreachable, match=says):
            worth.check(front, target, price, trace)


def test_an_exit_that_never_fires_is_left_out_where_a_check_costs():
    draw = np.random.default_rng(0)
    # Exit 2 is never sure, exit 4 always.
    confidence = np.stack([draw.random((50, 40)) * 0.3, 0.95 + draw.random((50, 40)) * 0.05], -1)
    trace = trace_of(list(confidence), list(np.ones_like(confidence)), (2, 4, 8))
    curves = {2: IDENTITY, 4: IDENTITY}
    price = cost(layers=1.0, readouts=1.0)
    found = search.candidates(Traced.of(trace, curves, "margin", price, "recompute", 16))
    assert {c.exit_layers for c in search.front(found)} == {(4, 8)}


def test_a_cost_model_finds_the_constants_of_the_machine_again():
    draw = np.random.default_rng(0)
    true = {"texts": 4e-3, "tokens": 2e-4, "layers": 1e-4, "rows": 2e-5, "readouts": 3e-4}
    true |= {"doublings": 4e-5, "checks": 1e-4}
    works = [
        Work(*(np.array([n]) for n in (1, *draw.integers(20, 400, 7), 0, 0, 0))) for _ in range(12)
    ]
    seconds = np.array([sum(getattr(w, t)[0] * s for t, s in true.items()) for w in works])
    found = fit(works, seconds, prefill_s=0.01)
    assert found.residual < 1e-9
    # What no text needed has no price, or by rounding one that no clock can tell from none.
    expected = dict.fromkeys(found.seconds, 0.0) | true | {"texts": 0.014}
    assert found.seconds == pytest.approx(expected, abs=1e-15)
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
