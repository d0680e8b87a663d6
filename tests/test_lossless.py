"""Lossless decoding: what full depth would say, whatever the exits propose."""

import families
import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from test_batches import Uneven, padded, wrapped

import adaptive_gen
from adaptive_gen import FixedExit
from adaptive_gen.engine.drafts import DraftLength

GREEDY = {"max_new_tokens": 48, "do_sample": False}
LOSSLESS = {"adaptive": True, "lossless": True, "return_dict_in_generate": True}


POLICIES = {"uneven": Uneven(), "fixed2": FixedExit(2), "fixed4": FixedExit(4)}
# Every policy and cap for one family of each back end, one of them for the others.
CROSSED = [(f, p, cap) for f in ("llama", "gemma2") for p in POLICIES for cap in (1, 4, 16)]
CROSSED += [(f, "uneven", 4) for f in FAMILIES if f not in ("llama", "gemma2")]


@pytest.mark.parametrize(("family", "policy", "queue_cap"), CROSSED)
def test_lossless_is_greedy_full_depth(family, policy, queue_cap):
    model = adaptive_gen.wrap(
        families.make(family, torch.float64), exit_layers=[2, 4], queue_cap=queue_cap
    )
    ids = padded([9])["input_ids"]
    out = model.generate(ids, **GREEDY, **LOSSLESS, policy=POLICIES[policy])
    full_depth = model.generate(ids, **GREEDY, adaptive=True, threshold=1.0)
    assert torch.equal(out.sequences, full_depth)
    assert out.report.drafted > out.report.accepted, "some draft must have been wrong"


# Small enough that exits and full depth agree now and then, so that drafts stand and fall.
MODELS = {
    (family, engine): wrapped(family, vocab_size=24, engine=engine)
    for family, engine in (
        ("llama", "compiled"),
        ("llama", "fused"),
        ("llama", "module"),
        ("mistral", "compiled"),
    )
}


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    model=st.sampled_from(list(MODELS)),
    exit_layers=st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True),
    threshold=st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.9]),
    measure=st.sampled_from(["margin", "max_prob", "entropy"]),
    queue_cap=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    new_tokens=st.integers(1, 24),
    ends=st.lists(st.integers(1, 23), max_size=3, unique=True),
    penalty=st.sampled_from([None, 1.4]),
    schedule=st.sampled_from(["stepwise", "lockstep"]),
    prefill=st.sampled_from(["full", "lazy"]),
    seed=st.integers(0, 5),
)
def test_any_lossless_setting_is_transformers_greedy(
    model,
    exit_layers,
    threshold,
    measure,
    queue_cap,
    lengths,
    new_tokens,
    ends,
    penalty,
    schedule,
    prefill,
    seed,
):
    wrapped_model = MODELS[model]
    state = adaptive_gen.settings.state(wrapped_model)
    state.queue_cap = queue_cap
    batch = padded(lengths, vocab=24, seed=seed)
    plain = {
        **batch,
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": ends or None,
        "repetition_penalty": penalty,
    }
    ours = wrapped_model.generate(
        **plain,
        adaptive=True,
        lossless=True,
        exit_layers=sorted(exit_layers),
        threshold=threshold,
        confidence=measure,
        schedule=schedule,
        prefill=prefill,
    )
    assert torch.equal(ours, wrapped_model.generate(**plain))


@pytest.mark.parametrize(
    ("draws", "processed"),
    [(20_000, {"temperature": 1.0, "top_k": 0}), (3_000, {"temperature": 3.0, "top_k": 4})],
    ids=["plain", "processed"],
)
def test_lossless_sampling_has_full_depth_s_distribution(draws, processed):
    """A chi-square test on three new tokens, whose last two are drafted by an exit.

    It knows nothing of numbers that belong to positions.
    """
    model = adaptive_gen.wrap(
        families.make("llama", vocab_size=5, num_hidden_layers=4, initializer_range=0.2),
        exit_layers=[2],
    )
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[3, 4, 2]])
    settings = {"do_sample": True, "max_new_tokens": 3, "policy": FixedExit(2), **processed}
    torch.manual_seed(0)
    outs = [
        model.generate(ids.expand(200, -1), **settings, **LOSSLESS) for _ in range(draws // 200)
    ]
    stood = [out.report.accepted / out.report.drafted for out in outs]
    assert 0.2 < min(stood) and max(stood) < 0.98
    expected = joint_distribution(model, ids, **processed) * draws
    assert distance([out.sequences for out in outs], expected) < chi2.ppf(
        0.999, (expected > 0).sum()
    )
    # The test can fail: the exit alone has another distribution.
    lossy = model.generate(ids.expand(draws, -1), **settings, adaptive=True)
    assert distance([lossy], expected) > chi2.ppf(0.999, (expected > 0).sum())


def distance(sequences, expected):
    """Chi-square statistic of texts [rows, 3 + 3] against expected counts; inf if impossible."""
    texts = torch.cat(sequences)[:, 3:].numpy()
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(texts.T), 1)
    possible = expected > 0
    if counts[~possible].any():
        return np.inf
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum()


def joint_distribution(model, ids, temperature, top_k):
    """Chances [vocab, vocab, vocab] of three new tokens at full depth."""

    def following(prefix):
        logits = model(torch.tensor([prefix])).logits[0, -1].double() / temperature
        kept = logits.topk(top_k or len(logits)).indices
        scores = torch.full_like(logits, -torch.inf)
        scores[kept] = logits[kept]
        return scores.softmax(-1)

    prompt, vocab = ids[0].tolist(), model.config.vocab_size
    joint = np.zeros((vocab, vocab, vocab))
    with torch.no_grad():
        first = following(prompt)
        for a in range(vocab):
            second = following([*prompt, a])
            for b in range(vocab):
                third = following([*prompt, a, b])
                joint[a, b] = (first[a] * second[b] * third).numpy()
    return joint


def test_no_token_runs_twice_through_a_layer_but_behind_a_fallen_draft():
    model = wrapped("llama", engine="module")
    rows = []
    handle = model.model.layers[-1].register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[1])
    )
    ids = padded([9])["input_ids"]
    out = model.generate(ids, **GREEDY, **LOSSLESS, policy=Uneven())
    handle.remove()
    report = out.report
    fallen = report.drafted - report.accepted
    # The last layer runs the prompt, every token but the last once, and nothing else but drafts
    # that fell and those that stood behind them.
    assert sum(rows) >= 9 + 47
    assert sum(rows) <= 9 + 47 + fallen * 17
    assert rows[0] == 9 and len(rows) < 48, "several tokens share a pass"


def test_streamed_text_is_returned_text(byte_tokenizer, tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(vocab=300), exit_layers=[2, 4])
    settings = {"max_new_tokens": 40, "policy": Uneven(), "lossless": True, "eos_token_id": None}
    chunks = list(adaptive_gen.stream(model, byte_tokenizer, "abc", **settings))
    prompt = byte_tokenizer("abc", return_tensors="pt")["input_ids"]
    returned = model.generate(prompt, adaptive=True, **settings)
    assert [chunk.token for chunk in chunks] == returned[0, prompt.shape[1] :].tolist()
    text = byte_tokenizer.decode(returned[0, prompt.shape[1] :], skip_special_tokens=True)
    assert "".join(chunk.text for chunk in chunks) == text


def test_scores_are_those_of_full_depth():
    model = wrapped("llama")
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    batch = padded([9, 4])
    ours = model.generate(**batch, **GREEDY, **asked, adaptive=True, lossless=True, policy=Uneven())
    expected = model.generate(**batch, **GREEDY, **asked)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(ours, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_the_draft_length_follows_what_stood():
    hopeful = DraftLength(shallow=0.25, most=12)
    for _ in range(40):
        hopeful.observe(stood=hopeful.length, judged=hopeful.length)
    hopeless = DraftLength(shallow=0.25, most=12)
    for _ in range(40):
        hopeless.observe(stood=0, judged=1)
    assert hopeful.length > 6 and hopeless.length == 1


@pytest.mark.slow
def test_lossless_is_transformers_greedy_on_the_built_in_model():
    """50 prompts of 128 tokens in float32: not one token differs."""
    from adaptive_gen.calibrate.prompts import prompt_set
    from adaptive_gen.prompts import inputs

    model, tokenizer = adaptive_gen.load()
    plain = {"max_new_tokens": 128, "do_sample": False, "repetition_penalty": 1.0}
    drafted = 0
    for ids in inputs(model, tokenizer, prompt_set(None)[:50], 128):
        settings = {**plain, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = model.generate(**settings, **LOSSLESS)
        assert torch.equal(out.sequences, model.generate(**settings))
        drafted += out.report.drafted
    assert drafted > 50 * 10
