"""Confidence maps and the two numbers that judge a confidence."""

import numpy as np
import pytest

from adaptive_gen.calibrate import maps
from adaptive_gen.calibrate.trace import Trace
from adaptive_gen.calibration import ConfidenceMap


def test_a_map_recovers_the_chance_that_tokens_were_drawn_with():
    draw = np.random.default_rng(0)
    raw = draw.random(20_000)
    agrees = draw.random(20_000) < raw**2
    at = np.linspace(0.05, 0.95, 19)
    assert np.abs(maps.apply(maps.fit(raw, agrees), at) - at**2).max() < 0.05


def test_a_map_ascends_with_few_knots_even_where_confidence_misleads():
    draw = np.random.default_rng(0)
    raw = draw.random(5_000)
    curve = maps.fit(raw, draw.random(5_000) < 0.5 + 0.3 * np.sin(30 * raw) + 0.1 * raw)
    assert 2 < len(curve.raw) <= maps.MOST_KNOTS
    assert np.all(np.diff(curve.raw) > 0)
    assert np.all(np.diff(curve.chance) > 0)


def test_many_levels_are_merged_down_to_the_limit():
    # 100 levels of 50 tokens each; level i has i/2 agreements: nothing to pool by isotonic alone.
    raw = np.repeat(np.arange(100) / 100, 50)
    agrees = np.concatenate([np.arange(50) < i / 2 for i in range(100)])
    curve = maps.fit(raw, agrees)
    assert len(curve.raw) == maps.MOST_KNOTS
    assert np.abs(maps.apply(curve, np.arange(100) / 100) - np.arange(100) / 100).max() < 0.05


@pytest.mark.parametrize("agreed, chance", [(True, 41 / 42), (False, 1 / 42)])
def test_forty_tokens_that_all_agree_promise_no_certainty(agreed, chance):
    curve = maps.fit(np.linspace(0.8, 0.9, 40), np.full(40, agreed))
    assert curve.chance == pytest.approx((chance,))
    assert curve.raw == pytest.approx((0.85,))


def test_tokens_of_equal_confidence_share_one_knot():
    curve = maps.fit(np.array([0.5] * 8), np.array([True] * 6 + [False] * 2))
    assert curve.raw == (0.5,)
    assert curve.chance == pytest.approx((0.7,))


def test_applying_a_map_to_an_array_is_calling_it_for_each_value():
    draw = np.random.default_rng(1)
    raw = draw.random(500)
    curve = maps.fit(raw, draw.random(500) < raw)
    at = np.linspace(0, 1, 101)
    assert maps.apply(curve, at) == pytest.approx([curve(x) for x in at.tolist()])


def test_auroc_counts_pairs_in_order_and_ties_as_half():
    # Pairs (agreeing, other): .9>.5, .9>.1, .5=.5, .5>.1: 3.5 of 4.
    score = np.array([0.9, 0.5, 0.5, 0.1])
    agrees = np.array([True, True, False, False])
    assert maps.auroc(score, agrees) == 3.5 / 4
    assert maps.auroc(score, np.ones(4, dtype=bool)) is None


def test_calibration_error_is_the_mean_gap_of_equal_bins():
    # Lower half says .2 and agrees never, upper half says .9 and agrees always: gaps .2 and .1.
    chance = np.array([0.9, 0.2] * 10)
    assert maps.calibration_error(chance, chance > 0.5, bins=2) == pytest.approx(0.15)


def judged(fit, tokens=60_000):
    """The quality of a map fitted to one half of synthetic tokens, on the other half."""
    draw = np.random.default_rng(3)
    raw = draw.random((2, tokens // 10, 10, 1))
    agrees = draw.random(raw.shape) < raw**0.5
    lengths = np.full(tokens // 10, 10)
    seen, unseen = (
        Trace((1, 2), lengths, {"margin": raw[half]}, agrees[half]) for half in range(2)
    )
    curve = fit(*seen.at("margin", 0))
    return maps.qualities(unseen, {"margin": {1: curve}})[0]


def test_a_promised_nine_in_ten_is_kept_on_tokens_not_fitted_to():
    row = judged(maps.fit)
    assert row.tokens == 60_000 and row.near > 500
    assert 0.885 < row.near_agreement < 0.915
    assert row.error_after < 0.02 < row.error_before


def test_a_map_that_promises_too_much_is_found_out():
    lying = ConfidenceMap((0.0, 0.3, 1.0), (0.5, 0.9, 0.95))
    row = judged(lambda *seen: lying)
    assert row.near > 500 and row.near_agreement < 0.8
