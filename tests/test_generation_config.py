"""Every field of `GenerationConfig` and every keyword of `generate` is accounted for, one by one.

Honoured: the same result as transformers' where adaptive decoding never exits, and lossless.
Refused: by name, in one line, before anything runs. Without effect: said so in docs/generate.md.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from test_batches import Uneven, padded, wrapped
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from adaptive_gen.errors import OptionError
from adaptive_gen.refusals import REFUSED

PAGE = (Path(__file__).parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
LENGTHS = (3, 11, 7)
ENDS = list(range(2, 96, 5))
SAMPLED = {"do_sample": True}


class Raise(LogitsProcessor):
    """Raises one token's score, another at every length of the text."""

    def __call__(self, input_ids, scores):
        scores[:, 7 + input_ids.shape[1] % 5] += 100
        return scores


class Limits(StoppingCriteria):
    """Ends each row of a batch at a length of its own, so it must know which row is which."""

    def __call__(self, input_ids, scores, **kwargs):
        limits = torch.tensor([16, 20, 13])[: len(input_ids)]
        return input_ids.shape[1] >= limits


def allowed(row, ids):
    """Two tokens, by row and length."""
    return [3 + row, 40 + len(ids) % 7]


# Field or keyword -> arguments under which it changes what is generated.
HONOURED = {
    "max_length": {"max_length": 17, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 20, "eos_token_id": ENDS},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": ENDS},
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": list("ABCDEFGHIJKL012345"), "eos_token_id": 1},
    "do_sample": SAMPLED,
    "temperature": {"temperature": 0.5, **SAMPLED},
    "top_k": {"top_k": 3, **SAMPLED},
    "top_p": {"top_p": 0.4, **SAMPLED},
    "min_p": {"min_p": 0.4, **SAMPLED},
    "top_h": {"top_h": 0.2, **SAMPLED},
    "typical_p": {"typical_p": 0.3, **SAMPLED},
    "epsilon_cutoff": {"epsilon_cutoff": 0.2, **SAMPLED},
    "eta_cutoff": {"eta_cutoff": 0.5, **SAMPLED},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(40)] + [[50, 51]]},
    "renormalize_logits": {"renormalize_logits": True},  # the scores; checked below
    "forced_bos_token_id": {"forced_bos_token_id": 7},  # a text of one token; checked below
    "forced_eos_token_id": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "remove_invalid_values": {"remove_invalid_values": True},  # not-a-numbers; checked below
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (3, 1.6),
        "eos_token_id": 4,
    },
    "suppress_tokens": {"suppress_tokens": list(range(40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(90))},
    "sequence_bias": {"sequence_bias": {(5,): 4.0, (5, 9): 9.0}},
    "token_healing": {},  # the prompt; checked below
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "num_return_sequences": {"num_return_sequences": 3, **SAMPLED},
    "output_scores": {
        "output_scores": True,
        "return_dict_in_generate": True,
        "top_k": 9,
        **SAMPLED,
    },
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"eos_token_id": ENDS, "pad_token_id": 77},
    "bos_token_id": {"bos_token_id": 5},  # a text from nothing; checked below
    "eos_token_id": {"eos_token_id": ENDS},
    "inputs": {},
    "generation_config": {},  # checked in test_generate.py
    "logits_processor": {"logits_processor": LogitsProcessorList([Raise()])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([Limits()]), "eos_token_id": 1},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "streamer": {},  # checked in test_interruptions.py
    "tokenizer": {},  # checked with stop_strings
    "attention_mask": {},  # every batch here is padded
    "position_ids": {},  # checked below
    "past_key_values": {},  # checked in test_resume.py
}
SAYS_THE_SAME = {  # arguments that do not change the tokens of these texts
    "renormalize_logits",
    "forced_bos_token_id",
    "remove_invalid_values",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "bos_token_id",
}
# Refused field or keyword -> a value that asks for it.
ASKED = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "constraints": [],
    "force_words_ids": [[3]],
    "penalty_alpha": 0.5,
    "dola_layers": "low",
    "assistant_model": object(),
    "assistant_early_exit": 2,
    "prompt_lookup_num_tokens": 0,
    "use_mtp": True,
    "is_assistant": True,
    "use_cache": False,
    "cache_implementation": "paged",
    "output_attentions": True,
    "output_hidden_states": [2],
    "guidance_scale": 1.5,
    "inputs_embeds": torch.zeros(1, 4, 8),
    "custom_generate": lambda model, input_ids, **_: input_ids,
    "synced_gpus": True,
}
NO_EFFECT = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "low_memory": True,
    "cache_config": {"nbits": 4},
    "max_cache_len": 100,
    "prefill_chunk_size": 3,
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "continuous_batching_config": {},
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.5,
    "max_matching_ngram_size": 2,
    "assistant_lookbehind": 4,
    "target_lookbehind": 4,
    "assistant_ensemble_weight": 0.5,
    "assistant_tokenizer": None,
    "speculation_type": "dflash",
    "decoder_start_token_id": 3,
    "negative_prompt_ids": torch.tensor([[4, 5]]),
    "negative_prompt_attention_mask": torch.tensor([[1, 1]]),
    "logits_to_keep": 0,
    "trust_remote_code": True,
}
RECORDS = {
    "_from_model_config",
    "_commit_hash",
    "transformers_version",
}  # about the configuration itself
CONFIG = GenerationConfig()
KEYWORDS = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
# Later releases of transformers have some of the fields.
NAMES = set(vars(CONFIG)) | KEYWORDS | {"tokenizer", "inputs_embeds", "logits_to_keep"}
NAMES |= {"attention_mask", "position_ids", "past_key_values", "assistant_tokenizer"}
NAMES |= {"trust_remote_code"}


def known(names):
    return [name for name in names if name in NAMES]


@pytest.fixture(scope="module")
def model():
    wrapped_model = wrapped("llama")
    wrapped_model.generation_config.eos_token_id = None
    return wrapped_model


def generate(model, tokenizer=None, **kwargs):
    """From the same seed every time; greedily, unless said otherwise."""
    torch.manual_seed(5)
    if "stop_strings" in kwargs or kwargs.get("token_healing"):
        kwargs["tokenizer"] = tokenizer
    return model.generate(**{"max_new_tokens": 14, "do_sample": False, **kwargs})


def assert_same(ours, expected):
    if torch.is_tensor(expected):
        assert torch.equal(ours, expected)
        return
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("scores", "logits"):
        pairs = zip(getattr(ours, name) or (), getattr(expected, name) or (), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_every_field_and_keyword_is_accounted_for():
    tables = [set(HONOURED), set(REFUSED), set(NO_EFFECT), RECORDS]
    assert set(vars(CONFIG)) | KEYWORDS <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables)), "no name in two tables"
    assert set(ASKED) == set(REFUSED)


@pytest.mark.parametrize("lengths", [(9,), LENGTHS], ids=["one", "three"])
@pytest.mark.parametrize("name", known(HONOURED))
def test_honoured_means_what_transformers_means(model, byte_tokenizer, name, lengths):
    arguments = {**padded(lengths), **HONOURED[name]}
    expected = generate(model, byte_tokenizer, **arguments)
    ours = generate(model, byte_tokenizer, **arguments, adaptive=True, threshold=1.0)
    assert_same(ours, expected)
    if HONOURED[name] and name not in SAYS_THE_SAME and len(lengths) > 1:
        assert_changes(model, ours, padded(lengths), name)
    if arguments.get("do_sample") or name == "max_time":
        return
    schedule = "stepwise" if len(lengths) == 1 else "lockstep"
    how = {"adaptive": True, "lossless": True, "policy": Uneven(), "schedule": schedule}
    assert_same(generate(model, byte_tokenizer, **arguments, **how), expected)


def assert_changes(model, ours, batch, name):
    """A field that changes nothing would be honoured by ignoring it."""
    less = {key: value for key, value in HONOURED[name].items() if key != name}
    if name in ("max_length", "max_new_tokens"):
        less = {}
    plain = generate(model, **batch, **less)
    assert ours.shape != plain.shape or not torch.equal(ours, plain)


@pytest.mark.parametrize("name", known(ASKED))
def test_refused_by_name_before_anything_runs(model, name):
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    ways = [{name: ASKED[name]}]
    if name in vars(CONFIG):
        config = GenerationConfig(max_new_tokens=4)
        setattr(config, name, ASKED[name])
        ways.append({"generation_config": config})
    for arguments in ways:
        with pytest.raises(OptionError) as error:
            generate(model, **padded((4,)), **arguments, adaptive=True, threshold=1.0)
        assert str(error.value).startswith(f"adaptive=True cannot honour {name}")
        assert REFUSED[name][1] in str(error.value) and "\n" not in str(error.value)
    handle.remove()
    assert not calls


def test_the_models_own_configuration_is_refused_too_and_can_be_overridden(model):
    model.generation_config.num_beams = 3
    try:
        with pytest.raises(OptionError, match="num_beams=3"):
            generate(model, **padded((4,)), adaptive=True, threshold=1.0)
        ours = generate(model, **padded((4,)), num_beams=1, adaptive=True, threshold=1.0)
    finally:
        model.generation_config.num_beams = None
    assert torch.equal(ours, generate(model, **padded((4,))))


@pytest.mark.parametrize("name", known(NO_EFFECT))
def test_what_has_no_effect_has_none(model, name):
    settings = {**padded(LENGTHS), "adaptive": True, "policy": Uneven()}
    plain = generate(model, **settings)
    assert torch.equal(generate(model, **settings, **{name: NO_EFFECT[name]}), plain)


def listed(heading):
    """{name: rest of its row} of the table under a heading of the page."""
    section = re.split(r"^#+ ", PAGE, flags=re.MULTILINE)
    (section,) = [part for part in section if part.startswith(heading)]
    rows = re.findall(r"^\| (`[^|]*) \| (.*) \|$", section, flags=re.MULTILINE)
    return {name: row for cell, row in rows for name in re.findall(r"`(\w+)`", cell)}


def test_the_page_lists_what_the_tests_check():
    assert set(listed("Honoured")) == set(HONOURED)
    refused = listed("Refused")
    assert set(refused) == set(REFUSED)
    assert all(REFUSED[name][1] in refused[name] for name in refused)
    assert set(listed("Without effect")) == set(NO_EFFECT) | RECORDS
