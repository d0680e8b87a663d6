"""The bounds promise no more than they keep: simulated at the edge of what they may certify."""

import math

import numpy as np
import pytest
from scipy.stats import beta, norm

from adaptive_gen.calibrate import bounds
from adaptive_gen.errors import DataError

DELTA, TRIALS = 0.05, 2000
# 0.05 and three standard errors of 2,000 trials.
ALLOWED = 0.065


def bernoulli(draw, shape, risk):
    return (draw.random(shape) < risk).astype(float)


def two_point(draw, shape, risk):
    return 0.5 * (draw.random(shape) < 2 * risk)


def skewed(draw, shape, risk):
    return draw.beta(0.3, 0.3 * (1 - risk) / risk, shape)


def gains(draw, shape, risk):
    """Losses with a mean of `risk` that are often below zero."""
    return np.where(draw.random(shape) < (1 + risk) / 2, 1.0, -1.0)


def false_certification(test, losses, risk, n):
    """Share of samples from a population whose mean *is* `risk` that get it certified."""
    draw = np.random.default_rng(n)
    sample = losses(draw, (TRIALS, n), risk)
    return float((test(sample, risk, DELTA) <= DELTA).mean())


CASES = [
    (test, losses, risk, n)
    for test, kinds in (
        (bounds.binomial, [bernoulli]),
        (bounds.betting, [bernoulli, two_point, skewed, gains]),
        (bounds.hoeffding_bentkus, [bernoulli, two_point, skewed]),
    )
    for losses in kinds
    for risk in (0.05, 0.3)
    for n in (50, 100, 500)
]


@pytest.mark.parametrize(("test", "losses", "risk", "n"), CASES)
def test_no_bound_certifies_the_boundary_more_often_than_it_says(test, losses, risk, n):
    assert false_certification(test, losses, risk, n) <= ALLOWED


def normal_approximation(losses, risk, delta):
    """Not a bound: the normal approximation."""
    n = losses.shape[-1]
    spread = losses.std(-1) / math.sqrt(n) + 1e-12
    return norm.cdf((losses.mean(-1) - risk) / spread)


def half_samples_added(losses, risk, delta):
    """Not a bound: two halves' best fortunes added, as a published implementation has it."""
    middle = losses.shape[-1] // 2
    parts = (losses[..., :middle], losses[..., middle:])
    return 1 / sum(1 / bounds.betting(part, risk, delta) for part in parts)


@pytest.mark.parametrize(
    ("test", "risk", "n"), [(normal_approximation, 0.05, 50), (half_samples_added, 0.3, 500)]
)
def test_a_bound_that_promises_too_much_is_caught(test, risk, n):
    assert false_certification(test, bernoulli, risk, n) > ALLOWED


@pytest.mark.parametrize(("misses", "n"), [(0, 59), (3, 100), (20, 72)])
def test_the_binomial_limit_is_clopper_and_pearson_s(misses, n):
    losses = np.arange(n) < misses
    limit = bounds.upper_limit(bounds.binomial, losses, DELTA)
    assert limit == pytest.approx(beta.ppf(1 - DELTA, misses + 1, n - misses), abs=2e-6)


def test_betting_is_the_product_written_out():
    losses = np.random.default_rng(0).beta(0.5, 4, 40)
    risk, fortune, best, mean, spread = 0.2, 1.0, 1.0, 0.5, 0.25
    for i, loss in enumerate(losses, start=1):
        stake = min(1, math.sqrt(2 * math.log(20) / (40 * spread / i)))
        fortune *= 1 - stake * (loss - risk)
        best = max(best, fortune)
        mean = (0.5 + losses[:i].sum()) / (i + 1)
        spread += (loss - mean) ** 2
    assert bounds.betting(losses, risk, DELTA) == pytest.approx(1 / best)


def test_betting_rules_out_more_than_hoeffding_bentkus_where_losses_vary_little():
    losses = np.random.default_rng(0).beta(2, 60, 300)
    limits = [
        bounds.upper_limit(t, losses, DELTA) for t in (bounds.betting, bounds.hoeffding_bentkus)
    ]
    assert losses.mean() < limits[0] < limits[1] * 0.9


@pytest.mark.parametrize(("risk", "n"), [(0.01, 299), (0.02, 149), (0.05, 59), (0.1, 29)])
def test_the_fewest_prompts_are_those_of_the_formula(risk, n):
    assert bounds.fewest(bounds.binomial, risk, DELTA) == n
    bounds.check_enough(bounds.binomial, n, risk, DELTA)
    with pytest.raises(DataError, match=f"it takes {n}"):
        bounds.check_enough(bounds.binomial, n - 1, risk, DELTA)


def test_the_risk_named_in_a_refusal_is_one_that_can_be_promised():
    with pytest.raises(DataError) as error:
        bounds.check_enough(bounds.betting, 40, 0.01, DELTA)
    possible = float(str(error.value).split("risk of ")[-1].split(" or more")[0])
    bounds.check_enough(bounds.betting, 40, possible, DELTA)
