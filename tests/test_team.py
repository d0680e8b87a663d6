"""Products that threads share are, to the bit, what one thread computes."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import adaptive_gen
from adaptive_gen.engine import team
from adaptive_gen.engine.int8 import Int8Matrix
from adaptive_gen.engine.panelled import in_panels
from adaptive_gen.kernels import products
from adaptive_gen.kernels import team as words
from adaptive_gen.kernels.attending import PLAN, TOGETHER, attend
from adaptive_gen.settings import state

PROMPT = torch.arange(5, 12)[None]
UNCAPPED = np.zeros(0, np.float32)
SOON_S = 30.0  # for what another thread does when the system lets it


@pytest.fixture
def helped():
    """Three threads for a product, and none that spins when the test is over."""
    team.allow(3)
    yield
    team.allow(0)
    if team._team is not None:
        team._team.dismiss()


def until(reached):
    clock = time.monotonic()
    while not reached():
        assert time.monotonic() - clock < SOON_S, "nothing happened"
        time.sleep(0.001)


def product(x, matrix, tokens, shared, first=0):
    w, scale = in_panels(matrix, x)
    y = np.ones((len(x), w.shape[0] * w.shape[2]), np.float32)
    products.add_product(x.numpy(), w, scale, y, tokens, shared, first)
    return y


def a_plan():
    return np.zeros(PLAN, np.int64)


def awake():
    return team._team._words[words.AWAKE :: words.LINE]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
def test_a_shared_product_is_the_same_to_the_bit(helped, tokens, rounded):
    x, matrix = torch.randn(9, 256), torch.randn(256, 1500)
    matrix = Int8Matrix.of(matrix) if rounded else matrix
    alone = np.zeros(words.AWAKE + words.LINE, np.int64)
    for first in (0, 7):
        expected = product(x, matrix, tokens, alone, first)
        for _ in range(50):
            np.testing.assert_array_equal(product(x, matrix, tokens, team.ready(), first), expected)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("context", [894, 900])  # that a block crosses a multiple of 16, or not
@pytest.mark.parametrize(("tokens", "kv_heads"), [(1, 4), (3, 4), (5, 4), (5, 8), (5, 1), (8, 1)])
def test_shared_attention_is_the_same_to_the_bit(helped, tokens, kv_heads, context, window):
    """For a block by helpers, a block alone, and each of its tokens alone."""
    heads, size = 8, 32
    kv = np.random.randn(2, 2, 3, kv_heads, 1000, size).astype(np.float32)[:, :, :2]
    projected = np.random.randn(10, (heads + 2 * kv_heads) * size).astype(np.float32)
    place = np.array([[1, context + i] for i in range(tokens)])
    alone = np.zeros(words.AWAKE + words.LINE, np.int64)
    scores = np.zeros((3, TOGETHER, 1024), np.float32)
    expected = np.zeros((10, heads * size), np.float32)
    attend(projected, expected, kv, 1, place, window, UNCAPPED, scores, a_plan(), alone)
    assert expected[:tokens].any() and not expected[tokens:].any()
    mixed = np.zeros_like(expected)
    for i in range(tokens):
        each = slice(i, i + 1)
        attend(
            projected[each],
            mixed[each],
            kv,
            1,
            place[each],
            window,
            UNCAPPED,
            scores,
            a_plan(),
            alone,
        )
    np.testing.assert_array_equal(mixed, expected)
    for _ in range(50):
        mixed = np.zeros_like(expected)
        attend(projected, mixed, kv, 1, place, window, UNCAPPED, scores, a_plan(), team.ready())
        np.testing.assert_array_equal(mixed, expected)


def test_helpers_attend_too(helped):
    kv, shared = np.ones((1, 2, 1, 8, 4096, 64), np.float32), team.ready()
    projected, mixed = np.ones((1, 24 * 64), np.float32), np.zeros((1, 512), np.float32)
    scores = np.zeros((3, TOGETHER, 4096), np.float32)

    def helped_out():
        attend(
            projected,
            mixed,
            kv,
            0,
            np.array([[0, 4000]]),
            0,
            UNCAPPED,
            scores,
            a_plan(),
            team.ready(),
        )
        return shared[words.DONE] > 0

    until(helped_out)
    np.testing.assert_allclose(mixed, 1, rtol=1e-4)


def test_helpers_do_take_their_part(helped):
    x, matrix = torch.randn(1, 512), torch.randn(512, 8192)
    shared = team.ready()

    def helped_out():
        product(x, matrix, 1, team.ready())
        return shared[words.DONE] > 0

    until(helped_out)


def test_a_small_product_is_not_shared(helped):
    shared = team.ready()
    shared[words.DONE] = -1
    product(torch.randn(1, 64), torch.randn(64, 256), 1, shared)
    assert shared[words.DONE] == -1 and not shared[words.BUSY]


def test_two_texts_at_a_time_do_not_mix_their_products(helped):
    wrong, shared = [], team.ready()

    def decode(seed):
        torch.manual_seed(seed)
        x, matrix = torch.randn(2, 256), torch.randn(256, 1024)
        w, scale = in_panels(matrix, x)
        expected = 1 + (x @ matrix).numpy()
        for _ in range(300):
            y = np.ones((2, 1024), np.float32)
            products.add_product(x.numpy(), w, scale, y, 2, shared)
            if not np.allclose(y, expected, atol=1e-3):
                wrong.append(seed)

    texts = [threading.Thread(target=decode, args=(seed,)) for seed in range(3)]
    for text in texts:
        text.start()
    for text in texts:
        text.join()
    assert not wrong


def test_helpers_sleep_when_nothing_is_shared_and_wake_again(helped):

    def both_awake():
        team.ready()  # one may sleep again before the other comes
        return awake()[:2].all()

    for _ in range(2):
        until(both_awake)
        assert not awake()[2:].any()
        until(lambda: not awake().any())


def test_as_many_threads_as_torch_has_unless_another_number_is_allowed(helped):
    assert team.threads() == 3
    team.allow(0)
    assert team.threads() == torch.get_num_threads() == 1
    assert team.ready()[words.HELPERS] == 0


def test_no_more_helpers_are_called_than_products_are_worth(helped):
    assert team.ready(1)[words.HELPERS] == 1
    assert team.ready(0)[words.HELPERS] == 0
    assert team.ready()[words.HELPERS] == 2


def test_a_system_without_another_thread_is_no_reason_to_fail(helped, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    alone = team.Team()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert alone.ready(5)[words.HELPERS] == 0
    assert alone.ready(5)[words.HELPERS] == 0


@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_text_is_the_same_with_any_number_of_threads(tiny_llama, weights, lossless):
    model = adaptive_gen.wrap(
        tiny_llama(hidden_size=128, intermediate_size=512, eos_token_id=None),
        exit_layers=[2, 4, 6],
        engine="compiled",
        weights=weights,
    )
    settings = {
        "adaptive": True,
        "threshold": {2: 0.03, 4: 0.02},
        "lossless": lossless,
        "max_new_tokens": 40,
        "return_dict_in_generate": True,
    }
    one = model.generate(PROMPT, **settings)
    assert len(one.report.exit_histogram) > 1
    team.allow(3)
    try:
        three = model.generate(PROMPT, **settings)
        assert team.ready()[words.CLAIM] != 0, "nothing was shared"
    finally:
        team.allow(0)
        team._team.dismiss()
    assert one.sequences.tolist() == three.sequences.tolist()
    assert one.exit_layers.tolist() == three.exit_layers.tolist()
    assert one.confidences.nan_to_num(2).tolist() == three.confidences.nan_to_num(2).tolist()
    assert state(model).backend.name.startswith("compiled")


END = """
import os, numpy as np
from adaptive_gen.engine import team
from adaptive_gen.kernels import products, team as words
team.allow(3)
w, x = np.ones((64, 256, 16), np.float32), np.ones((1, 256), np.float32)

def works():
    y = np.zeros((1, 1024), np.float32)
    products.add_product(x, w, np.ones(1024, np.float32), y, 1, team.ready())
    return bool((y == 256).all())

assert works()
{rest}
"""
FORK = """
child = os.fork()
if not child:
    os._exit(0 if works() and works() else 1)
assert os.waitpid(child, 0)[1] == 0 and works()
"""


@pytest.mark.parametrize("rest", ["", FORK], ids=["a program ends", "a program forks"])
def test_helpers_do_not_stand_in_the_way_when(rest):
    if rest and not hasattr(__import__("os"), "fork"):
        pytest.skip("no fork here")
    command = [sys.executable, "-W", "ignore", "-c", END.format(rest=rest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
