"""The back end `compiled`: its kernels against numpy and torch, and when it is taken.

That its segments are the model's is shown with the other back ends in test_equivalence.py.
"""

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, PARTICULAR, make

import adaptive_gen
from adaptive_gen.confidence import MEASURES, Confidences
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine import compiled, panelled, team
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.compiled_readout import CompiledConfidences
from adaptive_gen.engine.int8 import Int8Matrix
from adaptive_gen.engine.layer_parts import ACTIVATIONS
from adaptive_gen.engine.panelled import in_panels, padding
from adaptive_gen.kernels import activations, integers, pairs, panels, processor, products, readout
from adaptive_gen.kernels.jit import entry
from adaptive_gen.settings import state

PROMPT = torch.arange(3, 11)[None]


def product(x, matrix, columns, tokens, first=0):
    w, scale = in_panels(matrix, x)
    y = np.ones((len(x), columns + padding(columns)), x.numpy().dtype)
    products.add_product(x.numpy(), w, scale, y, tokens, team.ready(), first)
    return torch.from_numpy(y)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", range(1, 10))
def test_a_product_of_panels_is_the_matrix_product_for_any_number_of_tokens(tokens, dtype):
    x, matrix = torch.randn(9, 20, dtype=dtype), torch.randn(20, 37, dtype=dtype)
    got = product(x, matrix, 37, tokens)
    torch.testing.assert_close(got[:tokens], 1 + x[:tokens] @ matrix)
    assert (got[tokens:] == 1).all(), "rows behind the tokens are left alone"
    later = product(x, matrix, 37, tokens, first=1)
    assert (later[:, : panels.PANEL] == 1).all()
    torch.testing.assert_close(later[:tokens, panels.PANEL :], got[:tokens, panels.PANEL :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("inner", [32, 44, pairs.ROWS, 2 * pairs.ROWS + 44])
def test_a_product_of_rounded_weights_is_that_of_what_they_stand_for(inner, tokens, dtype):
    """And of states rounded to 16 bits, where the processor multiplies integers."""
    x = torch.randn(9, inner, dtype=dtype) * torch.logspace(-2, 3, 9, dtype=dtype)[:, None]
    matrix = Int8Matrix.of(torch.randn(inner, 40))
    got = product(x, matrix, 40, tokens)
    off = (got[:tokens] - 1 - x[:tokens] @ matrix.float().to(dtype)).abs().double()
    lost = integers.ROUNDING * x[:tokens].abs().amax(1, keepdim=True) if processor.INTEGERS else 0.0
    rounding = (
        4 * torch.finfo(torch.float32).eps * (1 + x[:tokens].abs() @ matrix.float().abs().to(dtype))
    )
    assert (off <= lost * matrix.float().abs().sum(0) + rounding).all()
    assert (got[tokens:] == 1).all()
    if processor.INTEGERS:
        step = x[:tokens].abs().amax(1, keepdim=True) / integers.LARGEST
        expected = 1 + step * (x[:tokens] / step).round() @ matrix.float().to(dtype)
        # A state between two steps may have been rounded to the other one.
        other = 3 * step * float(matrix.float().abs().max())
        assert ((got[:tokens] - expected).abs() <= other + rounding).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("inner", [pairs.ROWS, 9 * pairs.ROWS])
def test_a_product_of_rounded_weights_of_the_largest_numbers_does_not_overflow(inner, sign):
    x, matrix = torch.full((3, inner), float(sign)), Int8Matrix.of(torch.ones(inner, 40))
    assert (matrix.steps == 127).all()
    expected = 1 + x @ matrix.float()
    torch.testing.assert_close(product(x, matrix, 40, 3), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-28, 1e30, 1e38])
def test_a_product_of_rounded_weights_knows_states_of_any_size(size):
    """Whose sum is none in float32, or of which there are no steps: those count as zeros."""
    if size > 1e37 and not processor.INTEGERS:
        pytest.skip("127 times as much, which floats are multiplied with, is none in float32")
    x, matrix = torch.full((2, 32), size), Int8Matrix.of(1e-3 * (1 + torch.rand(32, 40)))
    exact = 1 + x.double() @ matrix.float().double()
    got = product(x, matrix, 40, 2).double()
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_product_of_rounded_weights_hides_nothing_that_is_not_a_number(wrong):
    x, matrix = torch.randn(2, 32), Int8Matrix.of(torch.randn(32, 40))
    x[0, 5] = wrong
    got = product(x, matrix, 40, 2)
    assert not got[0].isfinite().any() and got[1].isfinite().all()


def test_a_panel_is_what_the_engine_takes_it_for():
    assert (panelled.PANEL, panelled.DEPTH) == (panels.PANEL, panels.DEPTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_exponential_is_the_librarys(dtype):
    """Seen through a summary of two logits, the smaller one by `gap`."""
    gaps = torch.linspace(0, 80, 4001, dtype=dtype)
    logits, out = torch.stack([torch.zeros_like(gaps), -gaps], dim=1), np.empty((len(gaps), 5))
    readout.summarise(logits.numpy(), out)
    torch.testing.assert_close(
        torch.from_numpy(out[:, 3]).to(dtype), torch.logsumexp(logits, -1), rtol=2e-6, atol=1e-7
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 16, 24, 32])
@pytest.mark.parametrize("family", PARTICULAR)
def test_heads_of_any_size_are_rotated_normed_and_stored_as_the_models_are(family, size):
    """Heads of whole registers go through them, others number by number; float32 has both."""
    derived = "head_dim" in FAMILIES[family].config  # from the width, and not said
    sizes = {"hidden_size": 4 * size} if derived else {"head_dim": size}
    decoder = Decoder(make(family, **sizes).eval())
    half, n_layers = decoder.n_layers // 2, decoder.n_layers
    ids, found = torch.randint(1, 96, (2, 31)), []
    for engine in ("module", "compiled"):
        first, second = Backend(decoder, engine).segments([half, n_layers])
        cache, states = KVCache(n_layers, batch=2), []
        for part in ids.split([20, 1, 3, 1, 6], dim=1):
            middle = first.run(decoder.embed(part, cache.lengths[0]), cache).clone()
            if part.shape[1] == 3:  # whose skipped layers get keys and values only
                second.store(middle, cache)
            else:
                states += [middle, second.run(middle, cache).clone()]
        pairs = [pair for layer in range(n_layers) for pair in cache.keys_values(layer)]
        found.append([*states, *pairs])
    assert len(found[0]) == 8 + 2 * n_layers
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", PARTICULAR)
def test_where_only_the_newest_state_counts_it_is_the_same_and_so_is_the_cache(family, dtype):
    decoder = Decoder(make(family, dtype).eval())
    n_layers, ids, found, firsts = decoder.n_layers, torch.randint(1, 96, (1, 24)), [], []
    for newest_only in (True, False):
        (segment,) = Backend(decoder, "compiled").segments([n_layers])
        cache, states = KVCache(n_layers), []
        for part in ids.split([12, 1, 3, 8], dim=1):
            out = segment.run(decoder.embed(part), cache, newest_only=newest_only)
            states.append(out[:, -1].clone())
        firsts.append(out[:, 0].clone())
        found.append([*states, *(p for layer in range(n_layers) for p in cache.keys_values(layer))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert (firsts[0] != firsts[1]).any(), "the states of other tokens are not computed"


@entry
def activate(wide, width, activation, gated):
    activations.activate(wide, width, activation, gated, wide.shape[0])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activations_are_torchs_however_large_a_number_is(name, dtype, gated):
    near, far = torch.linspace(-9, 9, 997, dtype=dtype), torch.tensor([-1e3, -40, 40, 1e3, 0.0])
    x = torch.cat([near, far.to(dtype)])[None]
    up = torch.randn_like(x)
    expected = ACTIVATIONS[name](x.double()) * (up if gated else 1)
    wide = torch.cat([x, up], dim=1)
    activate(wide.numpy(), x.shape[1], activations.ACTIVATIONS.index(name), int(gated))
    precision = 1e-6 if dtype == torch.float32 else 1e-12
    got = wide[:, : x.shape[1]].double()
    torch.testing.assert_close(got, expected.double(), rtol=precision, atol=precision)
    assert torch.equal(wide[:, x.shape[1] :], up)


@pytest.mark.parametrize("measure", MEASURES)
def test_confidences_are_those_of_the_measures(measure):
    logits = torch.cat([torch.randn(40, 300) * 4, torch.zeros(1, 300), torch.eye(3, 300) * 60])
    logits[7, :2] = logits[7].max() + 1  # a tie
    plain = Confidences(measure)
    assert CompiledConfidences(plain)(logits, 2) == pytest.approx(plain(logits, 2), abs=2e-6)


def test_a_summary_names_the_first_of_equals():
    logits, out = np.array([[1, 5, 2, 5]], np.float32), np.empty((1, 5))
    readout.summarise(logits, out)
    assert out[0, :3].tolist() == [5, 5, 1]
    assert out[0, 3] == pytest.approx(math.log(math.exp(1) + 2 * math.exp(5) + math.exp(2)))


def backend_of(model, engine="auto", **kwargs):
    backend = Backend(Decoder(model.eval()), engine, **kwargs)
    backend.segments([2, 4])
    return backend


def test_without_numba_fused_runs_and_the_reason_is_given(tiny_llama, monkeypatch):
    monkeypatch.setattr(panelled, "find_spec", lambda name: None)
    backend = backend_of(tiny_llama())
    assert backend.name == "fused" and "numba is not installed" in backend.reason


def test_widths_that_kernels_cannot_take_are_left_to_fused(tiny_llama):
    backend = backend_of(tiny_llama(intermediate_size=46))
    assert backend.name == "fused" and "no multiples of 4" in backend.reason


def test_where_fused_is_quicker_it_is_taken(tiny_llama, monkeypatch):
    seconds = iter([2.0, 1.0] * 5)  # of compiled and fused, in turns
    monkeypatch.setattr(compiled, "_timed", lambda run: next(seconds))
    backend = backend_of(tiny_llama())
    assert backend.name == "fused" and "takes 2.0 times as long as fused" in backend.reason
    assert backend_of(tiny_llama(), "compiled").name == "compiled"


@torch.no_grad()
@pytest.mark.parametrize("engine", ["compiled", "fused"])
def test_int8_weights_are_the_same_on_both_back_ends(tiny_llama, engine):
    """Up to bfloat16, in which `fused` rounds activations; a prompt runs there in either case."""
    model = tiny_llama()
    exact = backend_of(model, "module")
    rounded = backend_of(model, engine, weights="int8")
    hidden = exact.decoder.embed(PROMPT)
    outs = []
    for backend in (exact, rounded):
        (segment,) = backend.segments([backend.decoder.n_layers])
        cache = KVCache(backend.decoder.n_layers)
        outs.append(torch.cat([segment.run(h, cache).clone() for h in hidden.split(1, 1)], 1))
    assert 0 < (outs[0] - outs[1]).norm() / outs[0].norm() < 0.05


def test_the_time_to_compile_is_reported(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama())
    assert state(model).backend.warm_up_s > 0
