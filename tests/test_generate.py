"""`generate(adaptive=True)`: every keyword of transformers means what it always means."""

import copy
import json
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import adaptive_gen
from adaptive_gen import FixedExit, NeverExit
from adaptive_gen.errors import CalibrationError, ModelError, OptionError
from adaptive_gen.settings import state

PROMPT = torch.tensor([[5, 9, 17, 33]])


@pytest.fixture
def model(tiny_llama):
    wrapped = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4])
    wrapped.generation_config.eos_token_id = None
    return wrapped


def both(model, **kwargs):
    """Transformers' result and ours at full depth, from the same seed."""
    kwargs = {"input_ids": PROMPT, "max_new_tokens": 24, **kwargs}
    torch.manual_seed(5)
    expected = model.generate(**kwargs)
    torch.manual_seed(5)
    return expected, model.generate(**kwargs, adaptive=True, threshold=1.0)


class Favour(LogitsProcessor):
    """Adds to one token's score, in place."""

    def __call__(self, input_ids, scores):
        scores[:, 7 + input_ids.shape[1] % 3] += 100
        return scores


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "typical_p": 0.8},
        {"do_sample": True, "min_p": 0.05},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [12, 4]]},
        {"min_new_tokens": 6, "eos_token_id": list(range(0, 250, 2)), "pad_token_id": 0},
        {"eos_token_id": list(range(0, 250, 2)), "pad_token_id": 0},
        {"suppress_tokens": list(range(40))},
        {"logits_processor": LogitsProcessorList([Favour()])},
        {"max_length": 9, "max_new_tokens": None},
        {"prefix_allowed_tokens_fn": lambda row, ids: [4, 5, 6 + len(ids) % 5]},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_keywords_mean_the_same_at_full_depth(model, kwargs):
    expected, ours = both(model, **kwargs)
    assert torch.equal(ours, expected)


def test_scores_and_logits_are_those_of_transformers_at_full_depth(model):
    wanted = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected, ours = both(model, temperature=0.5, do_sample=True, **wanted)
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for mine, theirs in zip(ours[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_generation_config_object_is_honoured(model):
    config = GenerationConfig(max_new_tokens=6, adaptive=True, threshold=0.0)
    out = model.generate(PROMPT, generation_config=config, return_dict_in_generate=True)
    assert out.exit_layers.tolist() == [[6, 2, 2, 2, 2, 2]]


def test_the_models_own_generation_config_is_honoured_and_saved(model, tmp_path):
    model.generation_config.adaptive = True
    model.generation_config.threshold = {"2": 0.0}
    model.save_pretrained(tmp_path)
    reloaded = adaptive_gen.wrap(AutoModelForCausalLM.from_pretrained(tmp_path), [2, 4])
    out = reloaded.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    assert out.exit_layers.tolist() == [[6, 2, 2, 2]]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_without_adaptive_transformers_runs_untouched(tiny_llama, monkeypatch):
    plain = tiny_llama()
    expected = plain.generate(PROMPT, max_new_tokens=8, do_sample=False)
    wrapped = adaptive_gen.wrap(tiny_llama())
    monkeypatch.setattr("adaptive_gen.generate.TokenLoop", None)
    assert torch.equal(wrapped.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)
    assert isinstance(wrapped, type(plain))


def test_the_report_adds_up(model):
    out = model.generate(
        PROMPT,
        adaptive=True,
        threshold=0.3,
        exit_layers=[2, 4, 6],
        min_new_tokens=30,
        max_new_tokens=30,
        return_dict_in_generate=True,
    )
    report = out.report
    depths = out.exit_layers[0].tolist()
    assert report.new_tokens == len(depths) == 30
    assert report.mean_depth == sum(depths) / 30
    assert report.layer_speedup == 6 / report.mean_depth
    assert report.exit_histogram == {d: depths.count(d) for d in sorted(set(depths))}
    assert len(report.exit_histogram) > 1, "the threshold must separate tokens"
    confidences = out.confidences[0]
    early = out.exit_layers[0] < 6
    assert confidences[~early].isnan().all()
    assert (confidences[early] >= 0.3).all()


def test_left_padding_of_one_row_is_stripped(model):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    out = model.generate(
        padded, attention_mask=mask, adaptive=True, threshold=0.4, max_new_tokens=9
    )
    plain = model.generate(PROMPT, adaptive=True, threshold=0.4, max_new_tokens=9)
    assert torch.equal(out[:, 3:], plain)


def test_streamers_see_every_token(model, byte_tokenizer):
    for adaptive in ({}, {"adaptive": True, "threshold": 1.0}):
        streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True)
        out = model.generate(
            PROMPT, streamer=streamer, max_new_tokens=12, do_sample=False, **adaptive
        )
        assert "".join(streamer) == byte_tokenizer.decode(out[0, 4:])


def test_stop_strings_end_the_text(bigram_llama, byte_tokenizer):
    model = adaptive_gen.wrap(bigram_llama(b":stop here!"))
    inputs = byte_tokenizer("Say:", return_tensors="pt")
    out = model.generate(
        **inputs,
        adaptive=True,
        threshold=0.9,
        stop_strings=["p h"],
        tokenizer=byte_tokenizer,
        max_new_tokens=50,
    )
    assert byte_tokenizer.decode(out[0]) == "Say:stop h"


def test_max_time_ends_the_text(model):
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    out = model.generate(
        PROMPT, adaptive=True, threshold=0.5, stopping_criteria=criteria, max_new_tokens=50
    )
    assert out.shape[1] == 5


def test_sampling_from_an_exit_repeats_under_a_seed(model):
    def draw():
        torch.manual_seed(3)
        return model.generate(
            PROMPT, adaptive=True, threshold=0.2, do_sample=True, max_new_tokens=20
        )

    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"lossless": True, "audit": True}, "lossless"),
        ({"lossless": True, "kv": "propagate"}, "lossless"),
        ({"audit": True, "kv": "propagate"}, "audit"),
        ({"prefill": "lazy", "kv": "propagate"}, "prefill"),
        ({"audit_floor": 1.0}, "audit_floor"),
        ({"prefill": "half"}, "half"),
        ({"schedule": "random"}, "random"),
        ({"threshold": 1.5}, "1.5"),
        ({"threshold": "high"}, "high"),
        ({"threshold": {3: 0.5}}, "exit layer 3"),
        ({"threshold": {2: -1}}, "-1"),
        ({"exit_layers": [7]}, "exit layer 7"),
        ({"exit_layers": [0]}, "exit layer 0"),
        ({"confidence": "vibes"}, "vibes"),
        ({"kv": "guess"}, "guess"),
        ({"policy": NeverExit(), "threshold": 0.5}, "policy"),
        ({"policy": FixedExit(3)}, "exit layer 3"),
        ({"policy": "eager"}, "eager"),
        ({"target_speedup": 0.5}, "0.5"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(model, kwargs, named):
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    with pytest.raises(OptionError) as error:
        model.generate(PROMPT, adaptive=True, max_new_tokens=4, **kwargs)
    handle.remove()
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not calls, "refused after something ran"


def test_a_target_speedup_needs_a_calibration(model):
    with pytest.raises(CalibrationError, match="calibrate run"):
        model.generate(PROMPT, adaptive=True, target_speedup=1.5, max_new_tokens=4)


def test_holes_in_the_attention_mask_are_refused(model):
    mask = torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(OptionError, match="holes"):
        model.generate(PROMPT, attention_mask=mask, adaptive=True, threshold=0.5, max_new_tokens=4)


def test_without_threshold_or_calibration_the_default_is_told_once(model, caplog):
    with caplog.at_level(logging.WARNING, logger="adaptive_gen"):
        for _ in range(3):
            model.generate(PROMPT, adaptive=True, max_new_tokens=3)
    assert caplog.text.count("threshold=0.9") == 1


class Interrupt(LogitsProcessor):
    """Raises in the middle of a text, as Ctrl-C does."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 9:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_an_interrupted_text_leaves_the_model_as_it_was(model, byte_tokenizer, kv):
    settings = {"adaptive": True, "threshold": 0.3, "kv": kv, "max_new_tokens": 12}
    before = model.generate(PROMPT, **settings)
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    weights = copy.deepcopy(model.state_dict())

    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, logits_processor=LogitsProcessorList([Interrupt()]), **settings)
    abandoned = adaptive_gen.stream(model, byte_tokenizer, "Hello", **settings)
    next(abandoned)
    next(abandoned)
    abandoned.close()

    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model.generate(PROMPT, **settings), before)


def test_wrapping_is_in_place_and_survives_a_copy(tiny_llama):
    plain = tiny_llama()
    original = type(plain)
    wrapped = adaptive_gen.wrap(plain)
    assert wrapped is plain and isinstance(wrapped, original)
    assert type(wrapped).__name__ == original.__name__
    clone = copy.deepcopy(wrapped)
    assert state(clone).decoder.layers is clone.model.layers
    settings = {"adaptive": True, "threshold": 0.5, "max_new_tokens": 8}
    assert torch.equal(clone.generate(PROMPT, **settings), wrapped.generate(PROMPT, **settings))
    again = adaptive_gen.wrap(wrapped, exit_layers=[3])
    assert state(again).exit_layers == (3, 6)
    assert type(again).__mro__.count(type(again)) == 1 and len(type(again).__mro__) == len(
        type(clone).__mro__
    )


def test_exit_layers_come_from_the_checkpoint_else_the_quarter_points(tiny_llama):
    assert state(adaptive_gen.wrap(tiny_llama(layers=8))).exit_layers == (2, 4, 6, 8)
    trained = tiny_llama(layers=8)
    trained.config.exit_layers = [3, 8]
    assert state(adaptive_gen.wrap(trained)).exit_layers == (3, 8)
    assert state(adaptive_gen.wrap(trained, exit_layers=[5])).exit_layers == (5, 8)


def test_an_unwrapped_model_is_named(tiny_llama):
    with pytest.raises(ModelError, match="wrap"):
        state(tiny_llama())


@pytest.mark.parametrize("adaptive", [True, False])
def test_no_cache_is_made_that_adaptive_texts_do_not_use(tiny_llama, adaptive, monkeypatch):
    model, seen = adaptive_gen.wrap(tiny_llama()), []
    sample = type(model)._sample

    def watched(self, *args, **kwargs):
        seen.append(kwargs.get("past_key_values"))
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "_sample", watched)
    model.generate(torch.tensor([[3, 4, 5]]), adaptive=adaptive, max_new_tokens=2)
    assert [cache is None for cache in seen] == [adaptive]
