"""A certificate is of one way to decode: which calls it covers, and what batches do."""

import dataclasses

import pytest
import torch
from test_calibration_file import PROMPT, certified, make

import adaptive_gen
from adaptive_gen.calibration import load, save
from adaptive_gen.description import describe
from adaptive_gen.policy import NeverExit
from adaptive_gen.settings import state

SETTINGS = {"adaptive": True, "max_new_tokens": 4, "return_dict_in_generate": True}


@pytest.fixture
def model(tiny_llama):
    return adaptive_gen.wrap(tiny_llama(eos_token_id=None), calibration=certified())


def test_the_certified_call_carries_its_certificate(model, caplog):
    promise = state(model).calibration.point.certificate
    for same in (
        {},
        {"kv": "recompute", "confidence": "margin", "prefill": "full"},
        {"threshold": 0.95, "exit_layers": [2, 4]},
        {"target_speedup": 1.05},
        {"lossless": True},
        {"lossless": True, "threshold": 0.3},
        {"audit": True},
    ):
        assert model.generate(PROMPT, **SETTINGS, **same).report.certificate is promise, same
    assert not caplog.text


@pytest.mark.parametrize(
    "other, named",
    [
        ({"kv": "propagate"}, "kv"),
        ({"threshold": 0.5}, "threshold"),
        ({"policy": NeverExit()}, "policy"),
        ({"exit_layers": [2]}, "exit_layers"),
        ({"confidence": "entropy"}, "confidence"),
        ({"prefill": "lazy"}, "prefill"),
        ({"audit_floor": 0.9}, "audit_floor"),
        ({"do_sample": True}, "sampling"),
        ({"do_sample": True, "temperature": 0.5}, "sampling"),
        ({"max_new_tokens": 65}, "more than 64 new tokens"),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    ],
)
def test_any_other_call_works_without_it_and_is_told_once(model, caplog, other, named):
    for _ in range(2):
        out = model.generate(PROMPT, **{**SETTINGS, **other})
        assert out.report.new_tokens >= 4
        assert out.report.certificate is None
    told = [r.message for r in caplog.records if "not covered" in r.message]
    assert len(told) == 1 and named in told[0] and "\n" not in told[0]


def test_a_batch_is_not_what_was_certified(model, caplog):
    out = model.generate(PROMPT.repeat(2, 1), **SETTINGS)
    assert out.report.certificate is None
    assert "2 texts at once" in caplog.text


def test_a_point_that_was_never_certified_promises_nothing_and_warns_of_nothing(model, caplog):
    out = model.generate(PROMPT, **SETTINGS, target_speedup=1.5)
    assert out.report.certificate is None
    assert not caplog.text


def test_a_description_names_the_certificates_that_hold(model):
    first, second = describe(model)["points"]
    assert first["certificate"]["max_risk"] == 0.1
    assert "at most 0.1" in first["certificate"]["statement"]
    assert second["certificate"] is None


BATCHES = {1: 1.1, 2: 1.02, 4: 0.84, 16: 0.66}


@pytest.mark.parametrize(
    "rows, says",
    [
        (1, ""),
        (2, ""),
        (3, "exits are not checked at 3 rows: measured 0.84x at 4"),
        (16, "exits are not checked at 16 rows: measured 0.66x"),
        (40, "exits are not checked at 40 rows: measured 0.66x at 16"),
    ],
)
def test_the_calibration_says_in_which_batches_exits_do_not_pay(rows, says):
    assert make(batches=BATCHES).unpaid(rows) == says
    assert make().unpaid(rows) == ""


def test_a_batch_that_does_not_pay_runs_at_full_depth_unless_the_caller_decides(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(eos_token_id=None), calibration=make(batches=BATCHES))
    three = torch.cat([PROMPT, PROMPT + 1, PROMPT + 2])
    settings = {**SETTINGS, "max_new_tokens": 12}
    for calibrated in ({}, {"target_speedup": 1.5}):
        out = model.generate(three, **settings, **calibrated)
        assert set(out.report.exit_histogram) == {6}
        assert out.report.unchecked.startswith("exits are not checked at 3 rows")
        assert bool(out.confidences.isnan().all())
    for decided in ({"threshold": 0.2}, {"policy": adaptive_gen.FixedExit(2)}):
        out = model.generate(three, **settings, **decided)
        assert 2 in out.report.exit_histogram and out.report.unchecked == ""
    assert model.generate(three[:1], **settings, target_speedup=1.5).report.unchecked == ""
    full = model.generate(three, **{**settings, "adaptive": False, "do_sample": False})
    assert torch.equal(model.generate(three, **settings).sequences, full.sequences)


@pytest.mark.parametrize("mode", [{"lossless": True}, {"kv": "propagate"}, {"prefill": "lazy"}])
def test_a_batch_at_full_depth_is_decoded_in_stretches_in_every_mode(tiny_llama, mode, monkeypatch):
    """Nothing leaves in it, so there are no drafts, and no keys and values to be filled in."""
    model = adaptive_gen.wrap(tiny_llama(eos_token_id=None), calibration=make(batches=BATCHES))
    three = torch.cat([PROMPT, PROMPT + 1, PROMPT + 2])
    backend, made = state(model).backend, []
    make_one = backend.stretch
    monkeypatch.setattr(backend, "stretch", lambda *args: made.append(make_one(*args)) or made[-1])
    out = model.generate(three, **SETTINGS, **mode)
    assert out.report.unchecked and made and None not in made
    assert torch.equal(out.sequences, model.generate(three, **SETTINGS, threshold=1.0).sequences)


def test_batch_gains_survive_the_file(tmp_path):
    found = make(batches=BATCHES)
    save(found, tmp_path)
    assert load(tmp_path) == found
    assert dataclasses.replace(found, batches={}).unpaid(16) == ""


def test_a_bare_threshold_checks_the_exits_that_are_worth_it_there(tiny_llama):
    placement = ((0.3, (2, 4)), (0.6, (4,)), (0.9, ()))
    calibration = make(placement=placement, batches=BATCHES)
    model = adaptive_gen.wrap(tiny_llama(eos_token_id=None), calibration=calibration)
    asked = []

    def checked(**call):
        asked.clear()
        report = model.generate(PROMPT, **SETTINGS, **call).report
        return sorted(set(asked)), report.unchecked

    original = state(model).backend.confidences
    state(model).backend.confidences = lambda c: _Watched(original(c), asked)
    assert checked(threshold=0.33)[0][0] == 2, "the nearest threshold of the grid counts"
    assert checked(threshold=0.7) == ([4], "")
    nothing, reason = checked(threshold=0.95)
    assert nothing == [] and "at threshold 0.95 none is predicted to pay" in reason
    assert checked(threshold=0.95, exit_layers=[2, 4]) == ([2, 4], "")
    assert checked(threshold=0.95, lossless=True)[0][0] == 2, "drafts are priced otherwise"
    assert checked(threshold=0.2)[0][0] == 2, "below the grid nobody looked"


class _Watched:
    """Confidences that note at which exits they are asked."""

    def __init__(self, inner, asked):
        self._inner, self._asked = inner, asked
        self.reads_hidden = inner.reads_hidden

    def __call__(self, logits, exit_layer, *measure):
        self._asked.append(exit_layer)
        return self._inner(logits, exit_layer, *measure)
