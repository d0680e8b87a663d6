"""Confidence measures on hand-written logits."""

import math

import pytest
import torch

from adaptive_gen.confidence import MEASURES, entropy, margin, max_prob

every_measure = pytest.mark.parametrize("name", MEASURES)


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


def test_values_by_hand():
    logits = logits_of(0.5, 0.25, 0.125, 0.125)
    assert margin(logits).item() == pytest.approx(0.25)
    assert max_prob(logits).item() == pytest.approx(0.5)
    assert entropy(logits).item() == pytest.approx(1 - 1.75 * math.log(2) / math.log(4))


@every_measure
def test_range_shape_and_dtype(name):
    logits = 20 * torch.randn(3, 5, 40, dtype=torch.bfloat16)
    confidence = MEASURES[name](logits)
    assert confidence.shape == (3, 5) and confidence.dtype == torch.float32
    assert ((confidence >= 0) & (confidence <= 1)).all()


@every_measure
def test_a_constant_added_to_the_logits_changes_nothing(name):
    logits = torch.randn(4, 30)
    torch.testing.assert_close(MEASURES[name](logits + 7), MEASURES[name](logits))


@every_measure
def test_sharper_logits_are_surer_up_to_certainty(name):
    logits = torch.randn(1, 30)
    sharpened = [MEASURES[name](scale * logits).item() for scale in (0.5, 1, 2, 4, 200)]
    assert sharpened == sorted(sharpened) and sharpened[0] < sharpened[-1]
    assert sharpened[-1] == pytest.approx(1.0, abs=1e-3)


def test_ties_and_uniform_readouts_are_unsure():
    assert margin(torch.tensor([[3.0, 3.0, 1.0]])).item() == 0
    assert entropy(torch.zeros(1, 50)).item() == pytest.approx(0, abs=1e-6)
    assert max_prob(torch.zeros(1, 50)).item() == pytest.approx(1 / 50)


@every_measure
def test_tokens_ruled_out_do_not_spoil_the_measure(name):
    logits = torch.tensor([[2.0, 1.0, -math.inf, -math.inf]])
    assert math.isfinite(MEASURES[name](logits).item())
