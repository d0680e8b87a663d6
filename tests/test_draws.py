"""Numbers to draw with: torch's own, given back if in vain, and sooner by compiled code."""

import numpy as np
import pytest
import torch

from adaptive_gen.draws import Draws
from adaptive_gen.engine import twister
from adaptive_gen.kernels.jit import entry
from adaptive_gen.kernels.twister import _logarithms


def test_numbers_that_others_have_drawn_since_are_not_given_back():
    torch.manual_seed(0)
    one, other = Draws(1, torch.device("cpu")), Draws(1, torch.device("cpu"))
    drawn = []
    for draws, start, stop in ((one, 0, 4), (other, 0, 4), (one, 4, 6)):
        drawn += draws.between(start, stop, 50).tolist()
    one.end(1), other.end(4)
    drawn += other.between(4, 12, 50).tolist()
    one.end(0)  # nor what was drawn before others did
    drawn += one.between(0, 3, 50).tolist()
    assert len({tuple(numbers) for [numbers] in drawn}) == len(drawn)


def test_numbers_stay_while_they_are_needed():
    torch.manual_seed(0)
    expected = torch.stack([torch.empty(2, 50).exponential_() for _ in range(40)])
    torch.manual_seed(0)
    draws = Draws(2, torch.device("cpu"))
    for start in range(0, 36, 3):
        draws.forget(start)
        assert torch.equal(draws.between(start, start + 4, 50), expected[start : start + 4])
        assert torch.equal(draws.at(start + 1, 50), expected[start + 1])


def test_numbers_from_a_position_on_are_drawn_again():
    torch.manual_seed(0)
    draws = Draws(2, torch.device("cpu"))
    numbers = draws.between(0, 6, 50)
    draws.forget(2)
    draws.end(4)
    assert torch.equal(draws.at(3, 50), numbers[3])
    assert torch.equal(draws.at(4, 50), numbers[4])
    draws.end(5)
    assert torch.equal(torch.empty(2, 50).exponential_(), numbers[5])


@pytest.fixture
def quick(monkeypatch):
    """Also few numbers come from the kernel; this processor's torch has to draw in its way."""
    monkeypatch.setattr(twister, "LEAST", 0)
    if not twister.as_torch_does():
        pytest.skip("torch draws otherwise on this processor")


@pytest.mark.parametrize("before", [0, 1, 2, 623, 624, 625])
@pytest.mark.parametrize("count", [1, 2, 311, 312, 313, 5000])
def test_compiled_draws_are_torchs(quick, count, before):
    """And the generator goes on from there, whichever words it had used up."""
    torch.manual_seed(count)
    torch.randint(2**31, (before,))
    state = torch.get_rng_state()
    theirs, then = torch.empty(count).exponential_(), torch.rand(3)
    torch.set_rng_state(state)
    ours, next_numbers = twister.exponential_(torch.empty(count)), torch.rand(3)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    assert torch.equal(next_numbers, then)


@entry
def logarithms(words, scratch, bits, out):
    _logarithms(words, scratch, bits, out)


def test_a_logarithm_is_right_from_end_to_end(quick):
    """For the smallest uniform numbers there are, for those next to 1, and around the seams."""
    uniform = [0, 1, 2, 2**20, 2**51, 2**52 - 1, 2**52, 2**53 - 2, 2**53 - 1]
    uniform += [int(2**53 * (1 - 2.0**-k * 0.5**0.5)) + d for k in (0, 1, 5) for d in (-1, 0, 1)]
    words = np.array([[n >> 32, n & 0xFFFFFFFF] for n in uniform], np.uint32).reshape(-1)
    scratch, out = np.empty(len(uniform)), np.empty(len(uniform), np.float32)
    logarithms(words, scratch, scratch.view(np.int64), out)
    expected = -np.log1p(-np.array(uniform, np.float64) * 2.0**-53)
    np.testing.assert_allclose(out, expected.astype(np.float32), rtol=2e-7)


def test_where_torch_draws_otherwise_it_draws_itself(monkeypatch):
    monkeypatch.setattr(twister, "as_torch_does", lambda: False)
    monkeypatch.setattr(twister, "_fill", None)
    torch.manual_seed(0)
    ours = twister.exponential_(torch.empty(5000))
    torch.manual_seed(0)
    assert torch.equal(ours, torch.empty(5000).exponential_())


def test_what_another_thread_draws_meanwhile_is_not_drawn_again(quick, monkeypatch):
    fill, others = twister._fill, []

    def interrupted(state, numbers):
        fill(state, numbers)
        if not others:
            others.append(torch.empty(2000).exponential_())

    monkeypatch.setattr(twister, "_fill", interrupted)
    torch.manual_seed(0)
    ours = twister.exponential_(torch.empty(2000))
    torch.manual_seed(0)
    assert torch.equal(others[0], torch.empty(2000).exponential_())
    torch.testing.assert_close(ours, torch.empty(2000).exponential_(), rtol=2e-7, atol=0)
