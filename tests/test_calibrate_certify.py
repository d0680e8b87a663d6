"""Certification: order, stopping, and how often the whole pipeline promises too much."""

import numpy as np
import pytest

from adaptive_gen.calibrate import certify, choices, maps, quality, report
from adaptive_gen.calibrate.certify import Promise
from adaptive_gen.calibrate.cost import TERMS, Cost
from adaptive_gen.calibrate.replay import LOSSES, Rule, replay
from adaptive_gen.calibrate.search import Candidate, Traced, candidates, front
from adaptive_gen.calibrate.trace import Trace
from adaptive_gen.certificate import LOSSES as WORDS
from adaptive_gen.certificate import Certificate, parse
from adaptive_gen.errors import DataError, Unreachable

PROMISE = Promise(0.1, 0.95, "prefix")


def candidate(speedup, threshold=0.9):
    return Candidate(threshold, (4, 8), 6.0, 0.9, speedup)


def test_settings_are_tested_from_careful_to_fast_and_only_if_faster():
    found = [candidate(s) for s in (1.5, 1.2, 1.1, 1.4, 1.9)]
    ordered = certify.sequence(found, [0.05, 0.01, 0.02, 0.05, 0.9], max_risk=0.1)
    assert [(c.speedup, e) for c, e in ordered] == [(1.2, 0.01), (1.5, 0.05)]


def test_one_setting_is_tried_even_where_none_looks_good():
    assert len(certify.sequence([candidate(1.2), candidate(1.5)], [0.8, 0.9], 0.1)) == 1


def test_a_long_front_is_thinned_evenly_with_both_ends():
    found = [candidate(1 + i / 100) for i in range(200)]
    ordered = certify.sequence(found, [i / 1000 for i in range(200)], max_risk=0.5)
    assert len(ordered) == certify.MOST_STEPS
    assert [ordered[0][0].speedup, ordered[-1][0].speedup] == [1.0, 2.99]


def test_testing_stops_at_the_first_failure_and_looks_no_further():
    looked = []

    def losses_of(c):
        looked.append(c.speedup)
        return np.full(200, {1.1: 0.0, 1.2: 0.05, 1.3: 0.2}[c.speedup])

    steps = certify.certify([(candidate(s), 0.0) for s in (1.1, 1.2, 1.3, 1.4)], losses_of, PROMISE)
    assert looked == [1.1, 1.2, 1.3]
    assert [s.certified for s in steps] == [True, True, False]
    assert certify.certified(steps, PROMISE, 200)[-1].candidate.speedup == 1.2
    with pytest.raises(Unreachable, match=r"--max-risk 0.1 cannot be certified .* 200 prompts"):
        certify.certified(steps[2:], PROMISE, 200)


def test_too_few_prompts_are_refused_before_anything_is_tested():
    with pytest.raises(DataError, match="it takes 59 to certify"):
        Promise(0.05, 0.95, "exact").check_enough(58)
    Promise(0.05, 0.95, "exact").check_enough(59)


def test_a_certificate_says_what_it_covers_and_survives_the_file():
    steps = [certify.Step(candidate(1.2), 0.01, 0.02, 0.001, True)]
    found = certify.certificate(steps, steps[0], PROMISE, 150, 64, decoded_risk=0.02)
    words = found.statement("recompute", {"dtype": "float32", "device": "cpu"})
    for part in ("150 prompts", "at most 0.1", "at most 0.05", "float32", "recompute", "64 new"):
        assert part in words
    for part in ("single text", "sampling", "longer texts", "other kinds of prompts"):
        assert part in words.split("It says nothing of")[1]
    document = {**vars(found), "steps": list(found.steps)}
    assert parse(document) == found
    for wrong in ({"loss": "hope"}, {"max_risk": 1.5}, {"level": 0}, {"surprise": 1}):
        with pytest.raises((ValueError, TypeError)):
            parse({**document, **wrong})
    assert isinstance(found, Certificate)


def test_every_loss_that_can_be_asked_for_has_a_test_and_words():
    asked = set(choices.LOSSES)
    assert asked == set(certify.TESTS) == set(WORDS) == set(report.PLAINLY)
    assert asked <= set(quality.losses(None))


TEXTS, LENGTH = 2000, 8


def population(seed=0):
    """Traces of many texts, each with a difficulty of its own, so that its tokens hang together."""
    draw = np.random.default_rng(seed)
    ease = draw.normal(size=(TEXTS, 1, 1)) + draw.normal(size=(TEXTS, LENGTH, 1)) + 3.5
    score = ease + np.array([0.0, 1.0])
    chance = 1 / (1 + np.exp(-score))
    raw = 1 / (1 + np.exp(-(score + draw.normal(size=score.shape)) / 2))
    agrees = draw.random(chance.shape) < chance
    return Trace((2, 4, 8), np.full(TEXTS, LENGTH), {"margin": raw}, agrees)


def sample(trace, index):
    return Trace(
        trace.exit_layers, trace.lengths[index], {"margin": trace.confidence["margin"][index]},
        trace.agrees[index],
    )  # fmt: skip


def one_calibration(everyone, index, promise, careless=False):
    """The pipeline's own steps on a sample; the true risk of what it certifies, or None."""
    seen, unseen = sample(everyone, index[:40]), sample(everyone, index[40:])
    curves = {e: maps.fit(*seen.at("margin", k)) for k, e in enumerate((2, 4))}
    cost = Cost({**dict.fromkeys(TERMS, 0.0), "layers": 1.0, "readouts": 0.5}, 0.0)
    found = front(candidates(Traced.of(seen, curves, "margin", cost, "recompute", 16)))[::2]

    def losses(trace, c):
        rule = Rule("margin", curves, c.thresholds)
        return LOSSES[promise.loss](replay(trace, rule, kv="recompute", queue_cap=16))

    ordered = certify.sequence(found, [losses(seen, c).mean() for c in found], promise.max_risk)
    steps = certify.certify(ordered, lambda c: losses(unseen, c), promise)
    if careless:
        good = [s for s in steps if s.risk <= promise.max_risk]
    else:
        good = [s for s in steps if s.certified]
    if not good:
        return None
    best = max(good, key=lambda s: s.candidate.speedup)
    return float(losses(everyone, best.candidate).mean())


def violations(promise, trials, monkeypatch, careless=False):
    """Share of calibrations that certify a setting whose true risk is above the promised one."""
    monkeypatch.setattr(
        "adaptive_gen.calibrate.search.THRESHOLDS",
        (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.97, 0.985),
    )
    everyone, draw = population(), np.random.default_rng(1)
    risks = [
        one_calibration(everyone, draw.integers(TEXTS, size=140), promise, careless)
        for _ in range(trials)
    ]
    made = [risk for risk in risks if risk is not None]
    assert len(made) > trials / 2, "a pipeline that certifies nothing shows nothing"
    return sum(risk > promise.max_risk for risk in made) / trials


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "risk"), [("prefix", 0.1), ("exact", 0.25)])
def test_the_whole_pipeline_breaks_its_promise_no_more_often_than_it_says(loss, risk, monkeypatch):
    assert violations(Promise(risk, 0.95, loss), 500, monkeypatch) <= 0.065


@pytest.mark.slow
def test_a_pipeline_that_trusts_the_mean_is_caught(monkeypatch):
    assert violations(Promise(0.25, 0.95, "exact"), 200, monkeypatch, careless=True) > 0.065
