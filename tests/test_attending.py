"""Attention by the compiled kernels, against softmax in float64 over the same keys and values."""

import numpy as np
import pytest

from adaptive_gen.kernels import team as words
from adaptive_gen.kernels.attending import NEAR, PLAN, TOGETHER, attend

CAPACITY = 256
ALONE = np.zeros(words.AWAKE, np.int64)


def expected(projected, kv, layer, place, window, softcap, heads):
    kv_heads, size = kv.shape[3], kv.shape[5]
    out = np.zeros((len(place), heads, size))
    for m, (row, position) in enumerate(place):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        for head in range(heads):
            keys, values = kv[layer, :, row, head * kv_heads // heads, seen].astype(np.float64)
            scores = keys @ projected[m, head * size : (head + 1) * size]
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            shares = np.exp(scores - scores.max())
            out[m, head] = shares @ values / shares.sum()
    return out.reshape(len(place), -1)


def attended(
    place, heads=4, kv_heads=2, size=32, window=0, softcap=0, dtype=np.float32, filling=0.0
):
    """What the kernel gives, and what it should, for tokens at `place` [tokens, 2]."""
    place, random = np.array(place), np.random.default_rng(0)
    kv = random.standard_normal((2, 2, 3, kv_heads, CAPACITY, size)).astype(dtype)
    projected = random.standard_normal((len(place) + 2, (heads + 2 * kv_heads) * size))
    projected = (projected / size**0.25).astype(dtype)
    mixed = np.full((len(place) + 2, heads * size), filling, dtype)
    scores = np.full((1, TOGETHER, 2 * CAPACITY), filling, dtype)
    limits = window, np.array([softcap] if softcap else [], dtype)
    attend(projected, mixed, kv, 1, place, *limits, scores, np.zeros(PLAN, np.int64), ALONE)
    return mixed[: len(place)], expected(projected, kv, 1, place, window, softcap, heads)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [8, 16, 20])
@pytest.mark.parametrize("position", [0, 15, 40, 200])
def test_scores_are_bent_below_a_soft_cap(size, position, dtype):
    found, wanted = attended([[1, position]], size=size, softcap=0.7, dtype=dtype)
    close(found, wanted)
    if position:
        assert np.abs(attended([[1, position]], size=size, dtype=dtype)[1] - wanted).max() > 0.01


@pytest.mark.parametrize("size", [8, 16, 20, 32, 64, 80])
@pytest.mark.parametrize("position", [0, 3, 14, 15, 16, 31, 62, 63, 64, 200])
def test_a_token_attends_to_all_before_it(size, position):
    close(*attended([[1, position]], size=size))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 3), (TOGETHER + 4, 1)])
def test_heads_that_share_keys_are_kept_apart(heads, kv_heads):
    close(*attended([[2, 100]], heads, kv_heads))


@pytest.mark.parametrize("tokens", [2, 5, TOGETHER + 3])
@pytest.mark.parametrize("start", [0, 10, NEAR - 2, 200])
def test_each_token_of_a_block_sees_those_before_it_only(tokens, start):
    close(*attended([[1, start + i] for i in range(tokens)]))


def test_tokens_of_several_rows_see_their_own_row():
    close(*attended([[0, 7], [0, 8], [1, 90], [2, 30], [2, 31], [2, 32]]))


@pytest.mark.parametrize("window", [1, 5, 20, 100])
@pytest.mark.parametrize("start", [0, 18, 99, 200])
def test_a_window_hides_what_is_older(window, start):
    close(*attended([[1, start + i] for i in range(4)], window=window))


def test_what_stood_in_the_buffers_does_not_matter():
    close(*attended([[0, 40], [0, 41]], filling=np.nan))
    close(*attended([[0, 5]], filling=np.nan, size=20))


def test_other_dtypes_are_attended_too():
    found, wanted = attended([[1, 70], [1, 71]], dtype=np.float64)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_large_score_takes_it_all_without_overflow():
    kv = np.zeros((1, 2, 1, 1, CAPACITY, 16), np.float32)
    kv[0, 0, 0, 0, 33] = 100
    kv[0, 1, 0, 0, 33] = 7
    projected, mixed = np.ones((1, 48), np.float32), np.zeros((1, 16), np.float32)
    scores = np.zeros((1, TOGETHER, 2 * CAPACITY), np.float32)
    limits = 0, np.zeros(0, np.float32)
    place = np.array([[0, 50]])
    attend(projected, mixed, kv, 0, place, *limits, scores, np.zeros(PLAN, np.int64), ALONE)
    np.testing.assert_array_equal(mixed, 7)
