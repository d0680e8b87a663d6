"""The audit counts what a recheck would count, and the guard acts when a promise is broken."""

import math

import numpy as np
import pytest
import torch
from test_batches import LENGTHS, Uneven, padded, wrapped

from adaptive_gen import Check, FixedExit, ThresholdPolicy
from adaptive_gen.audit import RAISES, guarded
from adaptive_gen.engine.promise import ALARM, begin, observe
from adaptive_gen.settings import state


def recheck(model, out, width, processors=None):
    """By exit layer: [tokens that full depth would choose on the text before them, tokens]."""
    counts = {}
    for row, exits in enumerate(out.exit_layers.tolist()):
        length = sum(e > 0 for e in exits)
        ids = out.sequences[row : row + 1, : width + length]
        prompt = int((ids[0, :width] != 0).sum())
        text = ids[:, width - prompt :]
        with torch.no_grad():
            logits = model(text).logits[0].float()
        for i, exit_layer in enumerate(exits[:length]):
            scores = logits[prompt + i - 1][None]
            if processors is not None:
                scores = processors(ids[:, : width + i], scores.clone())
            counts.setdefault(exit_layer, [0, 0])
            counts[exit_layer][0] += int(scores.argmax()) == int(text[0, prompt + i])
            counts[exit_layer][1] += 1
    return counts


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_audit_is_a_recheck_of_the_text(family, rows):
    model = wrapped(family)
    batch = padded(LENGTHS[:rows])
    # A deep token at the end catches every other one up, so that the recheck sees the same tokens.
    out = model.generate(
        **batch,
        max_new_tokens=40,
        adaptive=True,
        audit=True,
        policy=DeepAtTheEnd(40),
        return_dict_in_generate=True,
    )
    audit, expected = out.report.audit, recheck(model, out, batch["input_ids"].shape[1])
    assert {e: list(counts) for e, counts in audit.by_exit.items()} == expected
    assert audit.unaudited == 0 and audit.tokens == out.report.new_tokens
    assert audit.agreement == sum(a for a, _ in expected.values()) / audit.tokens
    assert 0 < audit.agreement < 1


class DeepAtTheEnd(Uneven):
    """`Uneven`, with the last of so many tokens at full depth."""

    def __init__(self, tokens):
        self.tokens = tokens

    def may_exit(self, exit_layer, position):
        return position < self.tokens - 1


def test_tokens_pending_at_the_end_are_not_audited():
    model = wrapped("llama")
    out = model.generate(
        **padded([5]),
        max_new_tokens=12,
        adaptive=True,
        audit=True,
        policy=FixedExit(2),
        return_dict_in_generate=True,
    )
    audit = out.report.audit
    assert (audit.tokens, audit.unaudited) == (1, 11) and audit.agreement == 1


def test_the_audit_hears_the_logits_processors():
    model = wrapped("llama")
    settings = {"max_new_tokens": 40, "repetition_penalty": 1.5, "return_dict_in_generate": True}
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    out = model.generate(
        **padded([5]), **settings, adaptive=True, audit=True, policy=DeepAtTheEnd(40)
    )
    expected = recheck(model, out, 5, RepetitionPenaltyLogitsProcessor(1.5))
    assert {e: list(counts) for e, counts in out.report.audit.by_exit.items()} == expected


def test_an_audit_changes_no_token():
    model = wrapped("llama")
    settings = {"max_new_tokens": 40, "adaptive": True, "policy": Uneven()}
    plain = model.generate(**padded([5, 9]), **settings)
    assert torch.equal(model.generate(**padded([5, 9]), **settings, audit=True), plain)


def test_a_kept_promise_seldom_raises_the_alarm():
    """Ville's inequality: at most one run in twenty, at the boundary, over 500 tokens."""
    draw = np.random.default_rng(0)
    alarms = sum(broken(draw.random(500) >= 0.1, floor=0.9) is not None for _ in range(400))
    assert alarms <= 400 / ALARM + 2 * math.sqrt(400 / ALARM)


def broken(agrees, floor):
    """Number of tokens after which the promise counts as broken, or None."""
    test = begin(floor, alarms=1)
    return next((i for i, a in enumerate(agrees, 1) if observe(bool(a), test)), None)


def test_a_broken_promise_is_found_soon():
    draw = np.random.default_rng(0)
    found = [broken(draw.random(500) >= 0.15, floor=0.97) for _ in range(50)]
    assert all(found) and np.median(found) < 100


class Own:
    """Thresholds, but as nobody's who could be told them."""

    def __init__(self, policy):
        self.may_exit, self.should_exit = policy.may_exit, policy.should_exit


@pytest.mark.parametrize("policy", [ThresholdPolicy({2: 0.8}), Own(ThresholdPolicy({2: 0.8}))])
def test_each_alarm_halves_the_doubt_until_nothing_exits(policy):
    guard = guarded(policy, floor=0.9)
    assert guard.should_exit(Check(2, 0, 0.81))
    while not guard.alarms:
        guard.observe(False)
    assert not guard.should_exit(Check(2, 0, 0.89)) and guard.should_exit(Check(2, 0, 0.91))
    while len(guard.alarms) <= RAISES:
        guard.observe(False)
    assert not guard.may_exit(2, 0)


class Thirds(ThresholdPolicy):
    """Has more to say than its thresholds do."""

    def should_exit(self, check):
        return check.position % 3 == 0 and super().should_exit(check)


def test_a_guard_asks_the_policy_itself_before_an_alarm_and_after():
    guard = guarded(Thirds({2: 0.5}), floor=0.9)
    assert [guard.should_exit(Check(2, i, 0.6)) for i in range(4)] == [True, False, False, True]
    while not guard.alarms:
        guard.observe(False)
    assert [guard.should_exit(Check(2, 3, sure)) for sure in (0.74, 0.76)] == [False, True]
    assert not guard.should_exit(Check(2, 4, 0.99))


def test_the_guard_leads_a_bad_policy_back_to_full_depth():
    model = wrapped("llama")
    settings = {"max_new_tokens": 300, "adaptive": True, "return_dict_in_generate": True}
    out = model.generate(**padded([5]), **settings, exit_layers=[2], threshold=0.0, audit_floor=0.9)
    audit = out.report.audit
    assert audit.floor == 0.9 and len(audit.alarms) == RAISES + 1
    assert set(out.exit_layers[0, -50:].tolist()) == {6}
    loose = model.generate(
        **padded([5]), **settings, exit_layers=[2], threshold=0.0, audit_floor=0.001
    )
    assert not loose.report.audit.alarms
    assert state(model).calibration is None
