"""Paired measurement: what is counted, what is compared, and what agreement means."""

import json

import numpy as np
import pytest
import torch

import adaptive_gen
from adaptive_gen import paired
from adaptive_gen.bench import compare
from adaptive_gen.errors import DataError, OptionError
from adaptive_gen.prompts import bench_prompts, encode

PROMPTS = ["one prompt", "another prompt", "and a third"]


@pytest.fixture
def model(tiny_llama):
    return adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), exit_layers=[1, 2, 3])


def runs(lengths, call_s, prompt=2):
    """Runs of made-up texts: `lengths` new tokens and [prompts, rounds] seconds."""
    return paired.Runs(
        prompt_lengths=[prompt] * len(lengths),
        sequences=[torch.zeros(1, prompt + n, dtype=torch.long) for n in lengths],
        exit_layers=[],
        call_s=np.array(call_s),
        prefill_s=np.full(np.shape(call_s), 0.5),
    )


def test_speed_is_tokens_over_the_median_seconds_of_whole_calls():
    found = runs([10, 20], [[1.0, 9.0, 2.0], [4.0, 3.0, 5.0]])
    assert found.tokens_per_s == pytest.approx(30 / (2 + 4))
    # Without the prefill and the token it ends with.
    assert found.decode_tokens_per_s == pytest.approx(28 / (1.5 + 3.5))


def test_a_speedup_lies_in_its_interval_and_equal_arms_have_none():
    slow = runs([10, 20, 30], [[1.0], [2.0], [3.0]])
    fast = runs([10, 20, 30], [[0.5], [1.5], [2.0]])
    low, high = paired.interval(fast, slow)
    assert paired.wall_speedup(fast, slow) == pytest.approx(6 / 4)
    assert low < 6 / 4 < high
    assert paired.interval(slow, slow) == (1.0, 1.0)


def test_arms_take_turns_on_every_prompt(model, monkeypatch):
    calls = []

    def generate(model, ids, **keywords):
        calls.append((keywords["arm"], int(ids[0, 0])))
        return type("Out", (), {"sequences": ids})(), 1.0

    monkeypatch.setattr(paired, "generate", generate)
    prompts = [torch.tensor([[i]]) for i in range(2)]
    arms = {name: {"arm": name} for name in "abc"}
    paired.measure(model, prompts, arms, max_new_tokens=4, rounds=20)
    warm_up, timed = calls[:3], calls[3:]
    assert [arm for arm, _ in warm_up] == ["a", "b", "c"]
    assert [prompt for _, prompt in timed] == ([0] * 3 + [1] * 3) * 20
    turns = ["".join(arm for arm, _ in timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) == 6, "each arm follows each other one"


def test_agreement_is_full_depth_s_choice_on_the_emitted_prefix(model):
    ids = torch.tensor([[10, 20, 30]])
    out, _ = paired.generate(model, ids, adaptive=True, threshold=0.0, max_new_tokens=12)
    found = paired.Runs([3], [out.sequences], [], np.ones((1, 1)), np.ones((1, 1)))
    text = out.sequences
    full = model(text).logits[0, 2:-1].argmax(-1)
    assert paired.agreement(model, found) == pytest.approx(
        float((full == text[0, 3:]).float().mean())
    )
    hidden = model(text, output_hidden_states=True).hidden_states[2]
    second = model.lm_head(model.model.norm(hidden))[0, 2:-1].argmax(-1)
    expected = float((full == second).float().mean())
    assert paired.agreement(model, found, exit_layer=2) == pytest.approx(expected)
    assert paired.agreement(model, found, exit_layer=4) == 1.0


def test_a_comparison_holds_the_promised_numbers_and_is_json(model, byte_tokenizer):
    found = compare(
        model, byte_tokenizer, PROMPTS, settings={"threshold": 0.1}, max_new_tokens=8, rounds=1
    ).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False))
    assert set(found["tokens_per_s"]) == {"transformers", "full_depth", "adaptive"}
    assert found["agreement_full_depth"] == 1.0
    assert found["same_text_as_transformers"] == 1.0
    assert found["n_layers"] == 4
    assert found["mean_depth"] * found["layer_speedup"] == pytest.approx(4)
    assert sum(found["exit_histogram"].values()) == 3 * 8
    depths = sum(layer * n for layer, n in found["exit_histogram"].items())
    assert found["mean_depth"] == pytest.approx(depths / 24)
    speeds = found["tokens_per_s"]
    assert found["wall_speedup"] == pytest.approx(speeds["adaptive"] / speeds["full_depth"])
    assert found["recipe"]["threshold"] == {1: 0.1, 2: 0.1, 3: 0.1}


def test_a_threshold_of_one_agrees_everywhere_and_saves_no_layer(model, byte_tokenizer):
    found = compare(
        model, byte_tokenizer, PROMPTS, settings={"threshold": 1.0}, max_new_tokens=8, rounds=1
    )
    assert (found.agreement, found.layer_speedup, found.exit_histogram) == (1.0, 1.0, {4: 24})


def test_a_repetition_penalty_of_the_checkpoint_does_not_change_the_text(model, byte_tokenizer):
    settings = {"settings": {"threshold": 0.2}, "max_new_tokens": 8, "rounds": 1}
    plain = compare(model, byte_tokenizer, PROMPTS, **settings)
    model.generation_config.repetition_penalty = 3.0
    assert compare(model, byte_tokenizer, PROMPTS, **settings).agreement == plain.agreement


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"rounds": 0}, OptionError, "rounds=0"),
        ({"max_new_tokens": 0}, OptionError, "max_new_tokens=0"),
        ({"settings": {"threshold": 1.5}}, OptionError, "threshold=1.5"),
        ({"prompts": []}, DataError, "no prompt"),
        ({"prompts": ["x" * 600]}, DataError, "prompt 1 has 600 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, byte_tokenizer, change, error, says):
    arguments = {"prompts": PROMPTS, "settings": {}, "max_new_tokens": 4, "rounds": 1, **change}
    with pytest.raises(error, match=says):
        compare(model, byte_tokenizer, **arguments)


def test_messages_go_through_the_chat_template_where_there_is_one(byte_tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    assert bytes(encode(byte_tokenizer, messages)[0].tolist()) == b"hi"
    byte_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[reply]{% endif %}"
    )
    assert bytes(encode(byte_tokenizer, messages)[0].tolist()) == b"[user]hi[reply]"


def test_the_benchmark_s_prompts_are_not_the_calibration_s():
    from adaptive_gen.calibrate.prompts import prompt_set

    calibration = {json.dumps(p) for p in prompt_set(None)}
    assert len(bench_prompts()) == 24
    assert not calibration & {json.dumps(p) for p in bench_prompts()}
