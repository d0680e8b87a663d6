"""Exit policies: values that decide from (exit layer, confidence, position)."""

import math

import pytest

from adaptive_gen import (
    AllOf,
    AnyOf,
    Check,
    DecayingThreshold,
    ExitPolicy,
    FirstAtFullDepth,
    FixedExit,
    MinimumExit,
    NeverExit,
    Patience,
    ThresholdPolicy,
)

EXITS = (2, 4, 6)


def first_exit(policy, confidences, position=0):
    """The exit layer a token with these confidences leaves at; None is full depth."""
    for layer, confidence in zip(EXITS, confidences, strict=True):
        if policy.may_exit(layer, position) and policy.should_exit(
            Check(layer, position, confidence)
        ):
            return layer
    return None


def test_the_first_exit_that_reaches_its_threshold_is_taken():
    policy = ThresholdPolicy({2: 0.9, 4: 0.5, 6: 0.5})
    assert first_exit(policy, (0.95, 0.99, 0.99)) == 2
    assert first_exit(policy, (0.9, 0.0, 0.0)) == 2
    assert first_exit(policy, (0.8, 0.6, 0.0)) == 4
    assert first_exit(policy, (0.8, 0.4, 0.49)) is None


def test_a_threshold_of_one_is_full_depth_even_for_certainty():
    policy = ThresholdPolicy(dict.fromkeys(EXITS, 1.0))
    assert first_exit(policy, (1.0, 1.0, 1.0)) is None
    assert not any(policy.may_exit(layer, 0) for layer in EXITS)


def test_a_threshold_of_zero_takes_the_first_exit():
    assert first_exit(ThresholdPolicy(dict.fromkeys(EXITS, 0.0)), (0.0, 0.0, 0.0)) == 2


def test_an_exit_without_threshold_is_not_taken():
    assert first_exit(ThresholdPolicy({4: 0.1}), (1.0, 0.2, 1.0)) == 4


def test_never_and_fixed():
    assert first_exit(NeverExit(), (1.0, 1.0, 1.0)) is None
    assert first_exit(FixedExit(4), (1.0, 0.0, 1.0)) == 4


def test_the_decaying_threshold_is_calms():
    policy = DecayingThreshold({2: 0.8}, horizon=100)
    for position in (0, 1, 50, 400):
        expected = min(1.0, 0.9 * 0.8 + 0.1 * math.exp(-4 * position / 100))
        assert policy.least(2, position) == pytest.approx(expected)
    assert policy.should_exit(Check(2, 99, 0.75)) and not policy.should_exit(Check(2, 0, 0.75))
    assert DecayingThreshold({2: 1.0}, horizon=100).may_exit(2, 10_000) is False


def test_the_minimum_exit_holds_another_policy_back():
    policy = MinimumExit(ThresholdPolicy(dict.fromkeys(EXITS, 0.0)), 4)
    assert first_exit(policy, (1.0, 1.0, 1.0)) == 4


def check(exit_layer, confidence, token=7, earlier=(), position=0, measures=None):
    return Check(
        exit_layer,
        position,
        confidence,
        earlier,
        choose=lambda: token,
        measure=lambda name: measures[name],
    )


def test_patience_waits_for_exits_that_agree():
    first, second = check(2, 0.0, token=5), check(4, 0.0, token=5)
    other = check(4, 0.0, token=6)
    policy = Patience(exits=2)
    assert policy.may_exit(2, 0) and not policy.should_exit(first)
    assert policy.should_exit(check(4, 0.0, token=5, earlier=(first,)))
    assert not policy.should_exit(check(4, 0.0, token=6, earlier=(first,)))
    assert policy.should_exit(check(6, 0.0, token=6, earlier=(first, other)))
    assert not Patience(exits=3).should_exit(check(6, 0.0, token=5, earlier=(first, other)))
    assert Patience(exits=3).should_exit(check(6, 0.0, token=5, earlier=(first, second)))


def test_measures_combine_by_and_and_or():
    sure = ThresholdPolicy({2: 0.5})
    certain = ThresholdPolicy({2: 0.5, 4: 0.5}, confidence="entropy")
    both, either = AllOf(sure, certain), AnyOf(sure, certain)
    for margin, entropy in ((0.9, 0.9), (0.9, 0.1), (0.1, 0.9), (0.1, 0.1)):
        seen = check(2, margin, measures={"entropy": entropy})
        assert both.should_exit(seen) == (margin > 0.5 and entropy > 0.5)
        assert either.should_exit(seen) == (margin > 0.5 or entropy > 0.5)
    assert not both.may_exit(4, 0) and either.may_exit(4, 0)
    # At exit 4 only one of the two has a say, however sure the other's measure is.
    assert not either.should_exit(check(4, 0.9, measures={"entropy": 0.1}))


def test_the_first_tokens_are_held_at_full_depth():
    policy = FirstAtFullDepth(ThresholdPolicy(dict.fromkeys(EXITS, 0.0)), tokens=3)
    assert [first_exit(policy, (1.0, 1.0, 1.0), p) for p in range(5)] == [None] * 3 + [2, 2]


def test_ten_lines_of_your_own_are_a_policy():
    class Even:
        def may_exit(self, exit_layer, position):
            return position % 2 == 0

        def should_exit(self, check):
            return check.confidence > 0.5

    assert isinstance(Even(), ExitPolicy)
    assert not isinstance(object(), ExitPolicy)
    assert first_exit(Even(), (0.6, 0.0, 0.0)) == 2
