"""What compiled code asks of all logits is what numpy finds, whatever code it becomes part of."""

import numpy as np
import pytest
from numba import njit

from adaptive_gen.kernels import logits
from adaptive_gen.kernels.panels import PANEL
from adaptive_gen.kernels.readout import best_two, first_of

DTYPES = [np.float32, np.float64]


@njit
def two(row):
    return best_two(row)


@njit
def token(rows, row, vocab):
    known = rows[row, :vocab]
    return first_of(best_two(known)[0], known)


@njit
def certain(numbers, off):
    return logits.two_certain(numbers, off)


@njit
def second_only(numbers, off):
    return logits.two_certain(numbers, off)[1]


@njit
def reaching(numbers, off, bar):
    return [logits.reaches(numbers, panel, off[panel], bar) for panel in range(len(off))]


@njit
def mass(numbers, top, grow, shrink, exact):
    return logits.mass(numbers, top, grow, shrink, exact)


def some(length, dtype, seed):
    """Numbers, of which now and then two are the largest."""
    generator = np.random.default_rng(seed)
    numbers = generator.standard_normal(length).astype(dtype)
    if seed % 3 == 0:
        numbers[generator.integers(length)] = numbers.max()
    return numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 15, PANEL, PANEL + 1, 97, 8 * PANEL])
def test_the_two_largest_and_the_first_of_them(length, dtype):
    for seed in range(100):
        numbers = some(length, dtype, seed)
        assert two(numbers) == tuple(np.sort(numbers)[:-3:-1])
        rows = np.stack([some(length, dtype, -seed % 7), numbers])
        assert token(rows, 1, length) == numbers.argmax()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_panels_may_be_off_by_is_taken_from_them_or_given(dtype):
    for seed in range(100):
        panels = 1 + seed % 5
        numbers, off = some(panels * PANEL, dtype, seed), abs(some(panels, dtype, seed + 1))
        least = np.sort(numbers - np.repeat(off, PANEL))
        assert certain(numbers, off) == (least[-1], least[-2])
        assert second_only(numbers, off) == least[-2]
        most = (numbers + np.repeat(off, PANEL)).reshape(panels, PANEL).max(-1)
        for bar in most:
            assert reaching(numbers, off, bar) == (most >= bar).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mass_is_known_between_what_panels_allow(dtype):
    numbers, top = some(3 * PANEL, dtype, 1), dtype(3)
    grow, shrink = np.array([1.5, 1.25, 2], dtype), np.array([0.5, 0.75, 0.25], dtype)
    exact = np.array([False, True, False])
    parts = np.exp(numbers - top).reshape(3, PANEL).sum(-1)
    expected = parts @ np.where(exact, 1, grow), parts @ np.where(exact, 1, shrink)
    assert mass(numbers, top, grow, shrink, exact) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_lower_than_anything(dtype):
    numbers = np.full(2 * PANEL, np.nan, dtype)
    assert two(numbers) == (-np.inf, -np.inf)
    assert not any(reaching(numbers, np.zeros(2, dtype), dtype(-np.inf)))
    numbers[[3, 20]] = 1, 2
    assert two(numbers) == (2, 1)
