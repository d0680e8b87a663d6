"""Stretches: compiled code that decodes many tokens at once does what the scheduler does."""

import dataclasses
import math

import pytest
import torch
from families import PARTICULAR, make
from hypothesis import given
from hypothesis import strategies as st

import adaptive_gen
from adaptive_gen.calibration import ConfidenceMap
from adaptive_gen.engine import compiled_readout
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.batch import BatchStretch, LosslessBatchStretch
from adaptive_gen.engine.compiled import MOST_ROWS
from adaptive_gen.engine.stretch import Pace, Stretch
from adaptive_gen.gate import Gate
from adaptive_gen.kernels.screen import WIDTH
from adaptive_gen.policy import DecayingThreshold, FixedExit, NeverExit, ThresholdPolicy
from adaptive_gen.settings import state

PROMPT = torch.arange(5, 12)[None]
EXITS = (2, 4, 6)


@pytest.fixture(autouse=True)
def screened(monkeypatch):
    """The small heads of these models have a screen too, as large ones have."""
    monkeypatch.setattr(compiled_readout, "SCREENED_BYTES", 0)


@pytest.fixture
def stretches(monkeypatch):
    """The tokens of every stretch, or texts; `off` lets the scheduler decode instead."""

    class Seen(list):
        def off(self):
            monkeypatch.setattr(Backend, "stretch", lambda *_: None)

    seen, run, run_batch = Seen(), Stretch.run, BatchStretch.run

    def spy(self, *args):
        found = run(self, *args)
        seen.append(len(found[0]))
        return found

    def spy_on_batch(self, *args):
        found = run_batch(self, *args)
        seen.append(len(found))
        return found

    monkeypatch.setattr(Stretch, "run", spy)
    monkeypatch.setattr(BatchStretch, "run", spy_on_batch)
    return seen


def wrapped(model, **changes):
    return adaptive_gen.wrap(model, exit_layers=EXITS, engine="compiled", **changes)


def decoded(model, **kwargs):
    settings = {"max_new_tokens": 40, "return_dict_in_generate": True, "adaptive": True}
    return model.generate(PROMPT, **{**settings, **kwargs})


def assert_as_sure(ours, theirs):
    """What a screen says of a confidence is known to half of WIDTH, and most of it far better."""
    torch.testing.assert_close(ours, theirs, equal_nan=True, atol=WIDTH / 2, rtol=0)
    off = (ours - theirs).abs()
    known = off[~off.isnan()]  # at full depth nobody asks
    assert not len(known) or known.quantile(0.9) <= WIDTH / 20


def assert_same(ours, theirs):
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.exit_layers.tolist() == theirs.exit_layers.tolist()
    assert_as_sure(ours.confidences, theirs.confidences)
    for name in ("deep_passes", "caught_up", "layers_run", "exit_histogram"):
        assert getattr(ours.report, name) == getattr(theirs.report, name), name
    one, other = (out.past_key_values._scheduler for out in (ours, theirs))
    assert one.cache.lengths == other.cache.lengths
    assert [q.counts for q in one.queues] == [q.counts for q in other.queues]
    one.flush(), other.flush()
    for layer in range(one.decoder.n_layers):
        for mine, its in zip(
            one.cache.keys_values(layer), other.cache.keys_values(layer), strict=True
        ):
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)


POLICIES = {
    "thresholds": ThresholdPolicy({2: 0.02, 4: 0.01}),
    "decaying": DecayingThreshold({2: 0.01, 4: 0.01}, horizon=20),
    "fixed": FixedExit(4),
    "never": NeverExit(),
}


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stretch_is_what_the_scheduler_does(tiny_llama, stretches, kv, policy):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"kv": kv, "policy": POLICIES[policy]}
    ours = decoded(model, **kwargs)
    assert sum(stretches) == 39  # all but the prompt's own
    if policy == "thresholds":
        assert len(ours.report.exit_histogram) == 3
    stretches.off()
    assert_same(ours, decoded(model, **kwargs))


@pytest.mark.parametrize("measure", ["margin", "max_prob", "entropy"])
def test_every_measure_is_the_schedulers(tiny_llama, stretches, measure):
    model = wrapped(tiny_llama(eos_token_id=None))
    confidences = decoded(model, confidence=measure, policy=FixedExit(2)).confidences
    middle = float(confidences.nanmedian())
    kwargs = {"confidence": measure, "threshold": {2: middle, 4: middle}}
    ours = decoded(model, **kwargs)
    assert len(ours.report.exit_histogram) > 1
    stretches.off()
    assert_same(ours, decoded(model, **kwargs))


@pytest.mark.parametrize("family", PARTICULAR)
def test_whatever_a_familys_layers_do_comes_along(stretches, family):
    model = adaptive_gen.wrap(make(family, torch.float64), engine="compiled")
    layers = state(model).exit_layers
    policy = ThresholdPolicy({layer: 0.01 for layer in layers[:-1]})
    ours = decoded(model, policy=policy, eos_token_id=None)
    assert sum(stretches) == 39
    stretches.off()
    assert_same(ours, decoded(model, policy=policy, eos_token_id=None))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_gate_reads_hidden_states(stretches, family):
    """As the final norm gives them, with what LayerNorm adds."""
    model = wrapped(make(family, torch.float64))
    torch.manual_seed(0)
    weights = {layer: torch.randn(32) * 0.3 for layer in (2, 4)}
    state(model).gate = Gate(weights, {layer: torch.tensor(0.1) for layer in (2, 4)})
    ours = decoded(model, confidence="gate", threshold=0.6)
    assert len(ours.report.exit_histogram) > 1 and sum(stretches) == 39
    stretches.off()
    assert_same(ours, decoded(model, confidence="gate", threshold=0.6))


def test_a_text_ends_where_it_would(tiny_llama, stretches):
    model = wrapped(tiny_llama(eos_token_id=None))
    text = decoded(model, threshold=0.01).sequences[0, 7:].tolist()
    end = next(token for token in text[5:] if token not in text[:5])
    ours = decoded(model, threshold=0.01, eos_token_id=end)
    assert ours.sequences[0, 7:].tolist() == text[: text.index(end) + 1]
    stretches.off()
    assert_same(ours, decoded(model, threshold=0.01, eos_token_id=end))


def test_a_stream_may_be_dropped_and_its_cache_continued(tiny_llama, byte_tokenizer, stretches):
    model = wrapped(tiny_llama(eos_token_id=None))
    settings = {"threshold": 0.01, "max_new_tokens": 40, "do_sample": False}
    whole = [c.token for c in adaptive_gen.stream(model, byte_tokenizer, "once", **settings)]
    stream = adaptive_gen.stream(model, byte_tokenizer, "once", **settings)
    for _ in range(9):
        next(stream)
    stream.close()
    ids = byte_tokenizer("once", return_tensors="pt").input_ids
    longer = torch.cat([ids, torch.tensor([whole[:9]])], 1)
    cache = stream.cache
    assert cache is not None and cache.get_seq_length() >= ids.shape[1]
    out = model.generate(
        longer, adaptive=True, threshold=0.01, max_new_tokens=31, past_key_values=cache
    )
    assert out[0, ids.shape[1] :].tolist() == whole
    assert max(stretches) > 1


def test_texts_grow_beyond_what_there_was_room_for(tiny_llama, stretches, monkeypatch):
    monkeypatch.setattr("adaptive_gen.decoding._MOST_ROOM", 4)
    model = wrapped(tiny_llama(eos_token_id=None, max_position_embeddings=512))
    ours = decoded(model, threshold=0.01, max_new_tokens=300)
    stretches.off()
    assert_same(ours, decoded(model, threshold=0.01, max_new_tokens=300))


def lossless(model, **kwargs):
    return decoded(model, lossless=True, **kwargs)


def assert_same_drafts(ours, theirs):
    assert_same(ours, theirs)
    reports = ours.report, theirs.report
    assert len({(report.drafted, report.accepted) for report in reports}) == 1
    assert ours.report.drafted > 0


@pytest.mark.parametrize("queue_cap", [1, 3, 16])
@pytest.mark.parametrize("threshold", [0.0, 0.005, 0.02])
def test_drafts_are_made_and_judged_as_the_scheduler_does(
    tiny_llama, stretches, threshold, queue_cap
):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=queue_cap)
    ours = lossless(model, threshold=threshold)
    assert sum(stretches) == 39
    assert ours.report.accepted < ours.report.drafted
    stretches.off()
    assert_same_drafts(ours, lossless(model, threshold=threshold))
    assert ours.sequences.tolist() == decoded(model, threshold=1.0).sequences.tolist()


def test_drafts_that_all_stand_are_kept(tiny_llama, stretches):
    """Layers behind the first exit that add nothing let every draft stand."""
    model = tiny_llama(eos_token_id=None)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
    ours = lossless(wrapped(model, queue_cap=12), policy=FixedExit(2), max_new_tokens=90)
    assert ours.report.accepted == ours.report.drafted and ours.report.deep_passes < 20
    stretches.off()
    assert_same_drafts(ours, lossless(model, policy=FixedExit(2), max_new_tokens=90))


@pytest.mark.parametrize("length", range(2, 12))
def test_a_lossless_text_may_end_with_a_draft_or_full_depths_own(tiny_llama, stretches, length):
    model = wrapped(tiny_llama(eos_token_id=None))
    text = decoded(model, threshold=1.0).sequences[0, 7:].tolist()
    for kwargs in ({"max_new_tokens": length}, {"eos_token_id": text[length]}):
        with pytest.MonkeyPatch.context() as patch:
            ours = lossless(model, threshold=0.005, **kwargs)
            patch.setattr(Backend, "stretch", lambda *_: None)
            assert_same(ours, lossless(model, threshold=0.005, **kwargs))


@pytest.mark.parametrize("queue_cap", [1, 3, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_audit_counts_what_the_schedulers_does(tiny_llama, stretches, policy, queue_cap):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=queue_cap)
    kwargs = {"audit": True, "policy": POLICIES[policy]}
    text = decoded(model, **kwargs)
    end = text.sequences[0, 30].item()
    ours = [text, decoded(model, eos_token_id=end, **kwargs)]
    assert len(ours[1].exit_layers[0]) < 40 and sum(stretches) > 39
    stretches.off()
    theirs = [decoded(model, **kwargs), decoded(model, eos_token_id=end, **kwargs)]
    assert ours[0].report.audit.tokens > 1
    for mine, its in zip(ours, theirs, strict=True):
        assert_same(mine, its)
        assert mine.report.audit == its.report.audit


@pytest.mark.parametrize("floor", [0.3, 0.7, 0.97])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_audit_that_acts_does_so_after_the_same_token(tiny_llama, stretches, policy, floor):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"audit_floor": floor, "policy": POLICIES[policy], "max_new_tokens": 300}
    ours = decoded(model, **kwargs)
    assert sum(stretches) == 299
    stretches.off()
    theirs = decoded(model, **kwargs)
    assert_same(ours, theirs)
    assert ours.report.audit == theirs.report.audit
    if policy == "fixed" and floor > 0.9:
        assert len(ours.report.audit.alarms) == 4 and ours.exit_layers[0, -1] == 6


BATCH = torch.tensor(
    [[0, 0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 11, 12], [0, 21, 3, 9, 4, 7, 7]]
)


def batch(model, rows=4, **kwargs):
    settings = {"attention_mask": (BATCH[:rows] != 0).long(), "max_new_tokens": 40, **kwargs}
    settings |= {"return_dict_in_generate": True, "adaptive": True}
    return model.generate(BATCH[:rows], **settings)


def assert_same_rows(ours, theirs):
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.exit_layers.tolist() == theirs.exit_layers.tolist()
    assert_as_sure(ours.confidences, theirs.confidences)
    for name in ("deep_passes", "caught_up", "layers_run", "exit_histogram"):
        assert getattr(ours.report, name) == getattr(theirs.report, name), name


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("schedule", ["stepwise", "lockstep"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_go_as_deep_as_the_scheduler_lets_them(
    tiny_llama, stretches, schedule, policy, kv
):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"schedule": schedule, "policy": POLICIES[policy], "kv": kv}
    ours = batch(model, **kwargs)
    assert max(stretches) == 4  # texts at once
    if policy == "thresholds":
        assert len(ours.report.exit_histogram) == 3
    stretches.off()
    assert_same_rows(ours, batch(model, **kwargs))


@pytest.mark.parametrize("floor", [None, 0.4, 0.97])
@pytest.mark.parametrize("schedule", ["stepwise", "lockstep"])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_audit_of_a_batch_is_the_schedulers(tiny_llama, stretches, schedule, policy, floor):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=3)
    kwargs = {"schedule": schedule, "policy": POLICIES[policy], "max_new_tokens": 120}
    end = batch(model, **kwargs).sequences[1, 40].item()  # some texts end before others
    kwargs |= {"audit": True, "audit_floor": floor, "eos_token_id": end, "pad_token_id": 0}
    stretches.clear()
    ours = batch(model, **kwargs)
    assert max(stretches) == 4
    stretches.off()
    theirs = batch(model, **kwargs)
    assert_same_rows(ours, theirs)
    assert ours.report.audit == theirs.report.audit
    if policy == "fixed" and floor == 0.97:
        assert len(ours.report.audit.alarms) == 4


def test_a_batch_may_have_more_rows_than_are_read_out_at_once_elsewhere(tiny_llama, stretches):
    model = wrapped(tiny_llama(eos_token_id=None))
    ids = torch.randint(1, 90, (MOST_ROWS + 5, 7))
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "threshold": 0.01}
    kwargs |= {"return_dict_in_generate": True, "adaptive": True}
    ours = model.generate(ids, **kwargs)
    assert max(stretches) == len(ids) and len(ours.report.exit_histogram) > 1
    stretches.off()
    assert_same_rows(ours, model.generate(ids, **kwargs))


@pytest.mark.parametrize("measure", ["margin", "max_prob", "entropy"])
def test_every_measure_of_a_batch_is_the_schedulers(tiny_llama, stretches, measure):
    model = wrapped(tiny_llama(eos_token_id=None))
    middle = float(batch(model, confidence=measure, policy=FixedExit(2)).confidences.nanmedian())
    kwargs = {"confidence": measure, "threshold": {2: middle, 4: middle}}
    ours = batch(model, **kwargs)
    assert len(ours.report.exit_histogram) > 1
    stretches.off()
    assert_same_rows(ours, batch(model, **kwargs))


def test_a_gate_reads_hidden_states_of_a_batch(tiny_llama, stretches):
    model = wrapped(tiny_llama(eos_token_id=None))
    weights = {layer: torch.randn(32) * 0.3 for layer in (2, 4)}
    state(model).gate = Gate(weights, {layer: torch.tensor(0.1) for layer in (2, 4)})
    ours = batch(model, confidence="gate", threshold=0.6)
    assert len(ours.report.exit_histogram) == 3
    stretches.off()
    assert_same_rows(ours, batch(model, confidence="gate", threshold=0.6))


def assert_same_drafts_of_rows(ours, theirs):
    assert_same_rows(ours, theirs)
    reports = ours.report, theirs.report
    assert len({(report.drafted, report.accepted) for report in reports}) == 1
    assert ours.report.drafted > 0


@pytest.mark.parametrize("schedule", ["stepwise", "lockstep"])
@pytest.mark.parametrize("queue_cap", [1, 3, 16])
@pytest.mark.parametrize("threshold", [0.0, 0.005, 0.02])
def test_rows_draft_and_are_judged_each_by_itself(
    tiny_llama, stretches, threshold, queue_cap, schedule
):
    model = wrapped(tiny_llama(eos_token_id=None), queue_cap=queue_cap)
    kwargs = {"threshold": threshold, "lossless": True, "schedule": schedule}
    ours = batch(model, **kwargs)
    assert max(stretches) == 4 and ours.report.accepted < ours.report.drafted
    stretches.off()
    assert_same_drafts_of_rows(ours, batch(model, **kwargs))
    assert ours.sequences.tolist() == batch(model, threshold=1.0).sequences.tolist()


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_more_drafts_are_judged_than_are_read_out_at_once(tiny_llama, stretches, share):
    """Layers behind the first exit that add little let most drafts stand; nothing, every one."""
    model = tiny_llama(eos_token_id=None)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(share), layer.mlp.down_proj.weight.mul_(share)
    kwargs = {"lossless": True, "policy": FixedExit(2), "max_new_tokens": 90}
    ours = batch(wrapped(model, queue_cap=12), **kwargs)
    assert (ours.report.accepted == ours.report.drafted) == (share == 0)
    assert ours.report.drafted > LosslessBatchStretch._rows_read * ours.report.deep_passes
    stretches.off()
    assert_same_drafts_of_rows(ours, batch(model, **kwargs))


@pytest.mark.parametrize("length", range(2, 12))
def test_rows_may_end_with_a_draft_or_full_depths_own(tiny_llama, stretches, length):
    model = wrapped(tiny_llama(eos_token_id=None))
    texts = batch(model, threshold=1.0).sequences[:, 7:].tolist()
    ends = [text[length + row] for row, text in enumerate(texts)]
    for kwargs in ({"max_new_tokens": length}, {"eos_token_id": ends, "pad_token_id": 0}):
        kwargs |= {"lossless": True, "threshold": 0.005}
        with pytest.MonkeyPatch.context() as patch:
            ours = batch(model, **kwargs)
            patch.setattr(Backend, "stretch", lambda *_: None)
            assert_same_drafts_of_rows(ours, batch(model, **kwargs))


WAYS = {"recompute": {}, "propagate": {"kv": "propagate"}, "lossless": {"lossless": True}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_stretches_of_a_batch_may_be_short(tiny_llama, stretches, monkeypatch, way, tokens):
    """What waits when one ends, drafts too, is there when the next begins."""
    monkeypatch.setattr(Pace, "keep", lambda *_: None)
    monkeypatch.setattr(Pace, "tokens", tokens)
    model = wrapped(tiny_llama(eos_token_id=None))
    ours = batch(model, threshold=0.01, **WAYS[way])
    assert len(stretches) > 39 / 8
    stretches.off()
    assert_same_rows(ours, batch(model, threshold=0.01, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", range(4))
def test_a_batch_goes_on_without_the_texts_that_end(tiny_llama, stretches, row, way):
    """Each of the others is, to the end, what it would be alone."""
    model = wrapped(tiny_llama(eos_token_id=None))
    kwargs = {"threshold": 0.01, **WAYS[way]}
    texts = batch(model, **kwargs).sequences[:, 7:].tolist()
    end = texts[row][row + 1]
    kwargs |= {"eos_token_id": end, "pad_token_id": 0}
    ours = batch(model, **kwargs)
    stretches.off()
    assert_same_rows(ours, batch(model, **kwargs))
    for found, text in zip(ours.sequences[:, 7:].tolist(), texts, strict=True):
        length = text.index(end) + 1 if end in text else len(text)
        assert found[:length] == text[:length]


OTHERWISE = {
    "a policy of one's own": {"policy": dataclasses.make_dataclass("Own", [], namespace={
        "may_exit": lambda *_: True, "should_exit": lambda *_: True})()},
    "another measure": {"policy": ThresholdPolicy({2: 0.01}, confidence="entropy")},
    "scores": {"output_scores": True, "threshold": 0.01},
    "processors": {"no_repeat_ngram_size": 2, "threshold": 0.01},
    "lazy prefill": {"prefill": "lazy", "threshold": 0.01},
    "audit and a penalty": {"audit": True, "threshold": 0.01, "repetition_penalty": 1.1},
    "a time limit": {"max_time": 1000.0, "threshold": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("why", OTHERWISE)
def test_whatever_needs_the_scheduler_gets_it(tiny_llama, stretches, why):
    decoded(wrapped(tiny_llama(eos_token_id=None)), max_new_tokens=6, **OTHERWISE[why])
    assert not sum(stretches)


knots = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(sorted)


@given(knots, knots, st.floats(0, 1))
def test_the_raw_threshold_decides_as_the_calibrated_one(raw, chance, threshold):
    size = min(len(raw), len(chance))
    found = ConfidenceMap(tuple(raw[:size]), tuple(chance[:size]))
    least = found.raw_of(threshold)
    if least > -math.inf:
        assert found(math.nextafter(least, -1)) < threshold
    if least < math.inf:
        assert found(max(least, 0.0)) >= threshold
    else:
        assert found(1.0) < threshold
