"""Tokens that compiled code draws are those that transformers' processors and torch would draw."""

import math

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

import adaptive_gen
from adaptive_gen.engine import compiled_readout
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.batch import BatchStretch
from adaptive_gen.engine.stretch import Stretch
from adaptive_gen.gate import Gate
from adaptive_gen.kernels import choosing as kernels
from adaptive_gen.kernels import largest
from adaptive_gen.kernels.jit import entry
from adaptive_gen.settings import state

PROMPT = torch.arange(5, 12)[None]
SAMPLED = {
    "plain": {"top_k": 0},
    "hot": {"top_k": 0, "temperature": 1.7},
    "cold": {"temperature": 0.4},
    "few": {"top_k": 3},
    "more than there are": {"top_k": 1000},
    "much": {"top_p": 0.9, "top_k": 0},
    "little": {"top_p": 0.05},
    "likely": {"min_p": 0.1, "top_k": 0},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    "new": {"repetition_penalty": 1.3},
    "said": {"repetition_penalty": 0.7, "top_k": 0, "top_p": 0.7},
}


@pytest.fixture(params=[True, False], ids=["screened", "whole"])
def screen(request, monkeypatch):
    """With a screen and without one; the small heads of these models have none by themselves."""
    monkeypatch.setattr(compiled_readout, "SCREENED_BYTES", 0 if request.param else 1 << 60)


@pytest.fixture
def stretches(monkeypatch):
    """The tokens of every stretch; `off` lets the scheduler decode instead."""

    class Seen(list):
        def off(self):
            monkeypatch.setattr(Backend, "stretch", lambda *_: None)

    seen = Seen()
    for kind in (Stretch, BatchStretch):

        def spy(self, *args, run=kind.run):
            found = run(self, *args)
            seen.append(len(found[0]))
            return found

        monkeypatch.setattr(kind, "run", spy)
    return seen


def wrapped(model, **changes):
    return adaptive_gen.wrap(model, exit_layers=(2, 4, 6), engine="compiled", **changes)


def drawn(model, adaptive=True, seed=0, ids=PROMPT, **kwargs):
    """Texts, and what the generator would give next."""
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 40, "do_sample": True, "return_dict_in_generate": True}
    settings |= {"attention_mask": (ids > 0).long(), "pad_token_id": 0, "adaptive": adaptive}
    out = model.generate(ids, **{**settings, **kwargs})
    return out, float(torch.rand(()))


def assert_same(ours, theirs):
    """Texts, depths if there are any, and what the generator would give next."""
    (mine, next_number), (its, then) = ours, theirs
    assert mine.sequences.tolist() == its.sequences.tolist()
    if "exit_layers" in its:
        assert mine.exit_layers.tolist() == its.exit_layers.tolist()
        for name in ("deep_passes", "caught_up", "layers_run", "drafted", "accepted"):
            assert getattr(mine.report, name) == getattr(its.report, name), name
    assert next_number == then


@pytest.mark.parametrize("name", SAMPLED)
def test_full_depth_is_what_transformers_draws(tiny_llama, stretches, screen, name):
    model = wrapped(tiny_llama(eos_token_id=None))
    ours = drawn(model, threshold=1.0, **SAMPLED[name])
    assert sum(stretches) == 39  # all but the prompt's own
    assert_same(ours, drawn(model, adaptive=False, **SAMPLED[name]))


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_that_leave_early_are_drawn_as_without_stretches(
    tiny_llama, stretches, screen, name, kv
):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"kv": kv, "threshold": {2: 0.02, 4: 0.01}, **SAMPLED[name]}
    ours = drawn(model, **kwargs)
    assert sum(stretches) == 39 and len(ours[0].report.exit_histogram) > 1
    stretches.off()
    assert_same(ours, drawn(model, **kwargs))


@pytest.mark.parametrize("queue_cap", [2, 16])
@pytest.mark.parametrize("name", [name for name in SAMPLED if name not in ("new", "said")])
def test_an_audit_compares_the_likeliest_tokens(tiny_llama, stretches, screen, name, queue_cap):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=queue_cap)
    kwargs = {"audit": True, "threshold": {2: 0.02, 4: 0.01}, **SAMPLED[name]}
    ours = drawn(model, **kwargs)
    audit = ours[0].report.audit
    assert sum(stretches) == 39 and audit.tokens > 20 and audit.agreement < 1
    assert_same(ours, drawn(model, **(kwargs | {"audit": False})))
    stretches.off()
    theirs = drawn(model, **kwargs)
    assert_same(ours, theirs)
    assert audit == theirs[0].report.audit


@pytest.mark.parametrize("floor", [None, 0.9])
@pytest.mark.parametrize("name", ["plain", "few", "all"])
def test_an_audit_of_drawn_texts_of_a_batch(tiny_llama, stretches, screen, name, floor):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"audit": True, "audit_floor": floor, "threshold": {2: 0.02, 4: 0.01}}
    kwargs |= {"ids": BATCH, **SAMPLED[name]}
    ours = drawn(model, **kwargs)
    assert ours[0].report.audit.tokens > 60 and sum(stretches) > 20
    stretches.off()
    theirs = drawn(model, **kwargs)
    assert_same(ours, theirs)
    assert ours[0].report.audit == theirs[0].report.audit


@pytest.mark.parametrize("threshold", [0.0, 0.01])
@pytest.mark.parametrize("name", SAMPLED)
def test_lossless_texts_are_full_depths_draws(tiny_llama, stretches, screen, name, threshold):
    """From the same seed, and with the random generator left as full depth leaves it."""
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"lossless": True, "threshold": threshold, **SAMPLED[name]}
    ours = drawn(model, **kwargs)
    assert sum(stretches) == 39
    assert 0 < ours[0].report.accepted < ours[0].report.drafted
    assert_same(ours, drawn(model, adaptive=False, **SAMPLED[name]))
    stretches.off()
    assert_same(ours, drawn(model, **kwargs))


BATCH = torch.tensor(
    [[0, 0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 11, 12], [0, 21, 3, 9, 4, 7, 7]]
)
WAYS = {
    "full depth": {"threshold": 1.0},
    "lossless": {"threshold": 0.01, "lossless": True},
    "lossless, lockstep": {"threshold": 0.01, "lossless": True, "schedule": "lockstep"},
    "lossy": {"threshold": 0.01},
    "lossy, lockstep": {"threshold": 0.01, "schedule": "lockstep"},
    "lossy, propagate": {"threshold": 0.01, "kv": "propagate"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["hot", "all", "said"])
def test_rows_of_a_batch_are_drawn_as_without_stretches(tiny_llama, stretches, name, way, screen):
    """Also behind the ends of some, for which transformers draws on."""
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"ids": BATCH, **SAMPLED[name]}
    plain = drawn(model, adaptive=False, **kwargs)
    ends = plain[0].sequences[[0, 2], [20, 30]].tolist()
    for more in ({}, {"eos_token_id": ends}):
        with pytest.MonkeyPatch.context() as patch:
            ours = drawn(model, **kwargs, **more, **WAYS[way])
            assert len(stretches) > 1
            if "lossy" not in way:
                assert_same(ours, drawn(model, adaptive=False, **kwargs, **more))
            patch.setattr(Backend, "stretch", lambda *_: None)
            assert_same(ours, drawn(model, **kwargs, **more, **WAYS[way]))


def test_a_gate_lets_drawn_tokens_leave(tiny_llama, stretches):
    model = wrapped(tiny_llama(eos_token_id=None))
    torch.manual_seed(0)
    weights = {layer: torch.randn(32) * 0.3 for layer in (2, 4)}
    state(model).gate = Gate(weights, {layer: torch.tensor(0.1) for layer in (2, 4)})
    one = drawn(model, confidence="gate", threshold=0.6)
    assert sum(stretches) == 39 and len(one[0].report.exit_histogram) > 1
    several = drawn(model, confidence="gate", threshold=0.6, ids=BATCH)
    stretches.off()
    assert_same(one, drawn(model, confidence="gate", threshold=0.6))
    assert_same(several, drawn(model, confidence="gate", threshold=0.6, ids=BATCH))


@pytest.mark.parametrize("changes", [{"weights": "int8"}, {"dtype": torch.bfloat16}, {"wide": 1}])
def test_whatever_the_weights_are(tiny_llama, stretches, screen, changes):
    model = tiny_llama(eos_token_id=None)
    model = model.to(changes.pop("dtype", torch.float32))
    model = wrapped(model.double() if changes.pop("wide", 0) else model, **changes)
    kwargs = {"threshold": 0.01, "top_k": 20, "top_p": 0.9}
    ours = drawn(model, **kwargs)
    assert sum(stretches) == 39
    stretches.off()
    assert_same(ours, drawn(model, **kwargs))


def test_a_penalty_without_draws(tiny_llama, stretches, screen):
    model = wrapped(tiny_llama(eos_token_id=None))
    kwargs = {"do_sample": False, "repetition_penalty": 1.5}
    theirs, _ = drawn(model, adaptive=False, **kwargs)
    ours, _ = drawn(model, threshold=1.0, **kwargs)
    assert sum(stretches) == 39
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert (
        ours.sequences.tolist()
        != drawn(model, threshold=1.0, do_sample=False)[0].sequences.tolist()
    )


def test_a_penalty_is_for_what_has_been_said(tiny_llama, stretches):
    """And not for token 0, which compiling the kernels speaks about."""
    model = wrapped(tiny_llama(eos_token_id=None))
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # a chance that hangs on the penalty
    settings = {"top_k": 0, "temperature": 3.0, "repetition_penalty": 2.0}
    theirs, _ = drawn(model, adaptive=False, **settings)
    ours, _ = drawn(model, threshold=1.0, **settings)
    assert ours.sequences.tolist() == theirs.sequences.tolist() and sum(stretches) == 39


def test_an_end_gives_back_the_draws_behind_it(tiny_llama, stretches):
    model = wrapped(tiny_llama(eos_token_id=None))
    text = drawn(model, threshold=1.0)[0].sequences[0, 7:].tolist()
    end = next(token for token in text[20:] if token not in text[:20])
    ours = drawn(model, threshold=1.0, eos_token_id=end)
    assert 1 < max(stretches) and ours[0].sequences.shape[1] < 40
    assert_same(ours, drawn(model, adaptive=False, eos_token_id=end))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"typical_p": 0.9},
        {"no_repeat_ngram_size": 2},
        {"renormalize_logits": True},
        {"logits_processor": hf.LogitsProcessorList([hf.TopKLogitsWarper(5, filter_value=-9.0)])},
        {"logits_processor": hf.LogitsProcessorList([hf.MinPLogitsWarper(0.1)]), "top_p": 0.9},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_other_processors_are_asked_themselves(tiny_llama, stretches, kwargs):
    model = wrapped(tiny_llama(eos_token_id=None))
    ours = drawn(model, threshold=1.0, **kwargs)
    assert not stretches
    assert_same(ours, drawn(model, adaptive=False, **kwargs))


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("name", SAMPLED)
def test_nothing_is_drawn_from_what_is_no_number(tiny_llama, stretches, screen, name, capped):
    capping = families.make("gemma2", num_hidden_layers=6)
    model = wrapped(capping if capped else tiny_llama(eos_token_id=None))
    with torch.no_grad():
        model.model.embed_tokens.weight[12:] = math.nan
    with pytest.raises(adaptive_gen.AdaptiveGenError, match="no numbers"):
        for seed in range(5):  # the prompt's tokens are fine
            drawn(model, threshold=1.0, seed=seed, **SAMPLED[name])


@entry
def kth_largest(k, numbers, heap):
    return largest.kth_largest(k, numbers, heap)


@entry
def drawn_of(top, scores, settings, heap, noise):
    return kernels._drawn(top, scores, settings, heap, noise)


numbers = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60, unique=True)


@given(numbers, st.data())
def test_the_kth_largest_number(found, data):
    k = data.draw(st.integers(1, len(found)))
    heap = np.zeros(len(found), np.int64)
    assert kth_largest(k, np.array(found, np.float32), heap) == sorted(found)[-k]


@given(numbers, st.integers(0, 70), st.floats(0.01, 1), st.floats(0, 1))
def test_what_may_be_drawn_is_what_transformers_keeps(found, top_k, top_p, min_p):
    scores = np.array(found, np.float32)
    warpers = [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p), hf.MinPLogitsWarper(min_p)]
    kept = hf.LogitsProcessorList(warpers)(None, torch.from_numpy(scores.copy())[None])[0]
    settings = np.array([1.0, 1.0, top_k, top_p, min_p])
    heap = np.zeros(len(found), np.int64)
    for n in range(len(found)):
        noise = np.full(len(found), 1e10, np.float32)
        noise[n] = 1e-25
        drawn = drawn_of(scores.max(), scores, settings, heap, noise)
        if (drawn == n) != bool(kept[n].isfinite()):
            assert _on_the_edge(scores, kept, n, top_p, min_p)


def _on_the_edge(scores, kept, n, top_p, min_p):
    """Whether rounding decides if a token is kept."""
    chances = torch.from_numpy(scores).double().softmax(-1)
    above = float(chances[torch.from_numpy(scores > scores[n])].sum())
    return math.isclose(above, top_p, abs_tol=1e-5) or math.isclose(
        float(chances[n] / chances.max()), min_p, rel_tol=1e-5
    )


def test_whoever_has_seen_enough_leaves_the_generator_there(tiny_llama, byte_tokenizer, stretches):
    """However many tokens were decoded ahead of those that were shown."""
    model, ahead = wrapped(tiny_llama(eos_token_id=None)), []
    settings = {"threshold": 0.01, "max_new_tokens": 40, "do_sample": True}
    for _ in range(2):
        torch.manual_seed(0)
        stream = adaptive_gen.stream(model, byte_tokenizer, "once", **settings)
        for _ in range(10):
            next(stream)
        stream.close()
        ahead.append(float(torch.rand(())))
        assert sum(stretches) > 10
        stretches.off()
    assert ahead[0] == ahead[1]


def test_a_streamer_that_fails_leaves_the_generator_there(tiny_llama, stretches):
    class Failing:
        def __init__(self):
            self.seen = 0

        def put(self, ids):
            self.seen += ids.numel()
            if self.seen == 7 + 10:
                raise OSError("gone")

    model, ahead = wrapped(tiny_llama(eos_token_id=None)), []
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            drawn(model, threshold=0.01, streamer=Failing())
        ahead.append(float(torch.rand(())))
        stretches.off()
    assert ahead[0] == ahead[1]


@pytest.mark.parametrize("kwargs", [{"temperature": 1e40}, {"repetition_penalty": 1e-45}])
def test_factors_that_float32_does_not_hold_are_transformers(tiny_llama, stretches, screen, kwargs):
    model = wrapped(tiny_llama(eos_token_id=None))
    kwargs |= {"do_sample": "temperature" in kwargs, "top_k": 5}
    ours = drawn(model, threshold=1.0, **kwargs)
    assert not stretches
    assert_same(ours, drawn(model, adaptive=False, **kwargs))
