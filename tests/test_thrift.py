"""Exits whose checks do not pay are asked less and less, the same on every back end."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptive_gen
from adaptive_gen.confidence import Confidences
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.thrift import EVERY, PATIENCE, Thrift, worth_of
from adaptive_gen.policy import ThresholdPolicy
from adaptive_gen.settings import state

PROMPT = torch.arange(5, 12)[None]


def wrapped(model, **changes):
    return adaptive_gen.wrap(model, exit_layers=[2, 4, 6], **changes)


def decoded(model, prompt=PROMPT, **kwargs):
    settings = {"max_new_tokens": 60, "return_dict_in_generate": True, "adaptive": True}
    return model.generate(prompt, **{**settings, **kwargs})


@given(worth=st.floats(0.01, 20), tokens=st.integers(1, 300))
def test_an_exit_that_lets_nothing_leave_costs_two_tokens_and_every_sixteenth_check(worth, tokens):
    thrift, checks = Thrift([2, 4], [worth], rows=1), 0
    for _ in range(tokens):
        if thrift.due(0, 0):
            thrift.observe(0, 0, False)
            checks += 1
    assert checks <= math.ceil(PATIENCE * worth) + math.ceil(tokens / EVERY)
    passed = tokens - checks
    assert (f"checked for {checks} of {tokens}" in thrift.account()) == (passed > 0)


@given(left=st.lists(st.booleans(), min_size=1, max_size=200), worth=st.floats(0.5, 20))
def test_an_exit_that_pays_for_its_checks_is_always_asked(left, worth):
    thrift, gained = Thrift([2, 4], [worth], rows=1), 0.0
    for leaves in left:
        if gained <= -PATIENCE * worth + 1:
            break
        assert thrift.due(0, 0)
        thrift.observe(0, 0, leaves)
        # Credit that is full takes no more, so what was earned early does not count for ever.
        gained = min(0.0, gained - 1 + (worth if leaves else 0.0))


def test_an_exit_is_taken_up_again_when_its_time_comes():
    thrift = Thrift([2, 4], [4.0], rows=1)
    for _ in range(30):
        if thrift.due(0, 0):
            thrift.observe(0, 0, False)
    waited = 0
    while not thrift.due(0, 0):
        waited += 1
    assert waited < EVERY
    thrift.observe(0, 0, True)
    assert thrift.due(0, 0)


def test_without_a_worth_everything_is_asked():
    thrift = Thrift([2, 4, 6], None, rows=2)
    for _ in range(100):
        assert thrift.due(1, 1)
        thrift.observe(1, 1, False)
    assert thrift.account() == ""


def test_rows_that_have_ended_count_in_the_account():
    thrift = Thrift([2, 4], [0.4], rows=2)
    for row in (0, 0, 1):
        if thrift.due(row, 0):
            thrift.observe(row, 0, False)
    thrift.keep([1])
    assert thrift.due(0, 0) is False
    assert "checked for 2 of 4 tokens" in thrift.account()


def test_worth_is_what_is_skipped_over_what_a_check_reads(tiny_llama):
    decoder = state(wrapped(tiny_llama())).decoder
    layer = sum(p.numel() for p in decoder.layers[0].parameters())
    head = decoder.config.vocab_size * decoder.config.hidden_size
    found = worth_of(decoder, [2, 4, 6], Confidences("margin"))
    np.testing.assert_allclose(found, [4 * layer / head, 2 * layer / head])


@pytest.mark.parametrize("engine", ["module", "fused", "compiled"])
def test_a_threshold_that_nothing_reaches_is_soon_asked_rarely(tiny_llama, engine):
    model = wrapped(tiny_llama(eos_token_id=None), engine=engine)
    out = decoded(model, threshold=0.9999)
    assert set(out.report.exit_histogram) == {6}
    thrift = out.past_key_values._scheduler.thrift
    checked, passed = thrift.counts().T
    assert (checked + passed == 59).all()
    assert (checked <= np.ceil(PATIENCE * thrift.worth) + 4).all() and (passed > 0).all()
    assert f"exit 2 was checked for {checked[0]} of 59 tokens" in out.report.unchecked


@pytest.mark.parametrize(
    "given",
    [
        {"threshold": 0.9999, "exit_layers": [2, 4, 6]},
        {"threshold": {2: 0.9999, 4: 0.9999}},
        {"policy": ThresholdPolicy({2: 0.9999, 4: 0.9999})},
    ],
    ids=["exits", "thresholds", "policy"],
)
def test_what_the_caller_names_is_asked_always(tiny_llama, given):
    model = wrapped(tiny_llama(eos_token_id=None))
    out = decoded(model, **given)
    assert out.report.unchecked == ""
    checked, passed = out.past_key_values._scheduler.thrift.counts().T
    assert checked.tolist() == [59, 59] and passed.tolist() == [0, 0]


def test_a_threshold_of_zero_means_always_however_dear_the_head_is(tiny_llama):
    model = wrapped(tiny_llama(eos_token_id=None, vocab_size=8192), queue_cap=100)
    out = decoded(model, threshold=0.0)
    assert (worth_of(state(model).decoder, [2, 4, 6], Confidences("margin")) < np.ones(2)).all()
    assert set(out.exit_layers[0, 1:].tolist()) == {2} and out.report.unchecked == ""


def middle_threshold(model):
    """Which some tokens reach, too few to pay for their checks."""
    confidences = decoded(model, threshold=0.0, exit_layers=[2, 6]).confidences[0]
    return float(confidences[~confidences.isnan()].quantile(0.7))


@pytest.mark.parametrize("lossless", [False, True])
def test_compiled_and_scheduler_pass_by_the_same_exits(tiny_llama, monkeypatch, lossless):
    model = wrapped(tiny_llama(eos_token_id=None), engine="compiled")
    kwargs = {"threshold": middle_threshold(model), "lossless": lossless}
    ours = decoded(model, **kwargs)
    monkeypatch.setattr(Backend, "stretch", lambda *_: None)
    theirs = decoded(model, **kwargs)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.exit_layers.tolist() == theirs.exit_layers.tolist()
    assert ours.report.unchecked == theirs.report.unchecked != ""


@pytest.mark.parametrize("engine", ["module", "compiled"])
def test_a_row_of_a_batch_passes_by_what_it_does_alone(tiny_llama, engine):
    model = wrapped(tiny_llama(eos_token_id=None), engine=engine)
    threshold = middle_threshold(model)
    prompts = torch.stack([PROMPT[0], PROMPT[0] + 40, PROMPT[0] + 90])
    together = decoded(model, prompts, threshold=threshold)
    assert together.report.unchecked
    for row, prompt in enumerate(prompts):
        alone = decoded(model, prompt[None], threshold=threshold)
        assert alone.sequences[0].tolist() == together.sequences[row].tolist()
        assert alone.exit_layers[0].tolist() == together.exit_layers[row].tolist()
