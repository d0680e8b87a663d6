"""transformers' own generation tests that adaptive decoding refuses; the page that lists all."""

import re
from pathlib import Path

import families
import pytest
import test_generation_cases
import torch
from test_batches import padded
from test_generation_cases import DICT, SAMPLED
from transformers import GenerationConfig

import adaptive_gen
from adaptive_gen.errors import OptionError
from adaptive_gen.settings import FIELDS

BEAMS = {"num_beams": 2}
GROUPS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}
FORCED = {"num_beams": 4, "force_words_ids": [[7]]}
CONTRASTIVE = {"penalty_alpha": 0.6, "top_k": 4}
ASSISTED = {"assistant_model": "itself"}
LOOKUP = {"prompt_lookup_num_tokens": 2}
EMBEDS = {"inputs_embeds": torch.zeros(1, 4, 32)}
REFUSED_CASES = {
    "test_beam_search_generate": BEAMS,
    "test_beam_search_generate_dict_output": BEAMS | DICT,
    "test_beam_search_generate_dict_outputs_use_cache": BEAMS | {"use_cache": True},
    "test_beam_sample_generate": BEAMS | SAMPLED,
    "test_beam_sample_generate_dict_output": BEAMS | SAMPLED | DICT,
    "test_beam_search_advanced_stopping_criteria": BEAMS,
    "test_model_parallel_beam_search": BEAMS,
    "test_eos_token_id_int_and_list_beam_search": BEAMS | {"eos_token_id": [3, 4]},
    "test_group_beam_search_generate": GROUPS,
    "test_group_beam_search_generate_dict_output": GROUPS | DICT,
    "test_constrained_beam_search_generate": FORCED,
    "test_constrained_beam_search_generate_dict_output": FORCED | DICT,
    "test_constrained_beam_search": FORCED,
    "test_constrained_beam_search_mixed": {"num_beams": 4, "constraints": [object()]},
    "test_contrastive_generate": CONTRASTIVE,
    "test_contrastive_generate_dict_outputs_use_cache": CONTRASTIVE | DICT,
    "test_contrastive_generate_low_memory": CONTRASTIVE | {"low_memory": True},
    "test_eos_token_id_int_and_list_contrastive_search": CONTRASTIVE | {"eos_token_id": [3, 4]},
    "test_assisted_decoding_matches_greedy_search": ASSISTED,
    "test_assisted_decoding_sample": ASSISTED | SAMPLED,
    "test_assisted_decoding_with_logits_to_keep": ASSISTED | {"logits_to_keep": 0},
    "test_generated_length_assisted_generation": ASSISTED | {"min_new_tokens": 3},
    "test_speculative_decoding_equals_regular_decoding": ASSISTED,
    "test_assisted_generation_early_exit": {"assistant_early_exit": 2},
    "test_prompt_lookup_decoding_matches_greedy_search": LOOKUP,
    "test_prompt_lookup_decoding_stops_at_eos": LOOKUP | {"eos_token_id": 5},
    "test_dola_decoding_sample": {"dola_layers": "low"},
    "test_generate_from_inputs_embeds": EMBEDS,
    "test_generate_from_inputs_embeds_with_static_cache": EMBEDS,
    "test_generate_continue_from_inputs_embeds": EMBEDS,
    "test_max_length_if_input_embeds": EMBEDS | {"max_length": 9},
    "test_min_length_if_input_embeds": EMBEDS | {"min_length": 9},
    "test_generate_with_static_cache": {"cache_implementation": "static"},
    "test_generate_with_quant_cache": {"cache_implementation": "quantized"},
    "test_generate_compile_model_forward": {"cache_implementation": "static"},
    "test_cfg_mixin": {"guidance_scale": 1.5},
}
ELSEWHERE = {
    "test_max_new_tokens_encoder_decoder",
    "test_encoder_decoder_generate_with_inputs_embeds",
    "test_encoder_decoder_generate_attention_mask",
    "test_generate_input_values_as_encoder_kwarg",
    "test_model_kwarg_encoder_signature_filtering",
    "test_batched_decoder_start_id",
    "test_decoder_start_id_from_config",
    "test_generate_vision2text_conditioning",
}
# Tested for what is done instead.
DIFFERENT = {"test_past_key_values_format", "test_new_cache_format"}


@pytest.mark.parametrize("case", REFUSED_CASES)
def test_refused_cases_are_refused_by_name(case):
    model = adaptive_gen.wrap(families.make("llama"), exit_layers=[2, 4])
    arguments = dict(REFUSED_CASES[case])
    if arguments.get("assistant_model"):
        arguments["assistant_model"] = model
    ids = {} if "inputs_embeds" in arguments else padded((4,))
    with pytest.raises(OptionError) as error:
        model.generate(**ids, **arguments, adaptive=True)
    assert any(name in str(error.value) for name in arguments)


def test_the_page_lists_every_case():
    page = (Path(__file__).parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(test_\w+)` \| (\w+)", page, flags=re.MULTILINE)
    here = {name for name in vars(test_generation_cases) if name.startswith("test_")}
    expected = {name: "passes" for name in here}
    expected |= dict.fromkeys(REFUSED_CASES, "refused") | dict.fromkeys(ELSEWHERE, "elsewhere")
    for name in DIFFERENT:
        expected[name] = "differs"
    assert dict(rows) == expected and len(rows) == len(expected)


OURS = {
    "threshold": 0.0,  # which equals False, and is an answer
    "target_speedup": 1.5,
    "confidence": "margin",
    "kv": "foo",
    "lossless": True,
    "audit": True,
    "audit_floor": 0.9,
    "prefill": "lazy",
    "schedule": "lockstep",
    "exit_layers": [2],
    "policy": object(),
}


def test_keywords_of_ours_are_refused_by_name_without_adaptive():
    assert set(OURS) == set(FIELDS) - {"adaptive"}
    assert not set(FIELDS) & {*vars(GenerationConfig()), *vars(GenerationConfig)}
    model = adaptive_gen.wrap(families.make("llama"), exit_layers=[2, 4])
    for name, value in OURS.items():
        with pytest.raises(OptionError, match=rf"^{name} would do nothing without adaptive=True"):
            model.generate(**padded([5]), max_new_tokens=2, **{name: value})
    with pytest.raises(OptionError, match=r"^threshold, kv would do nothing.*leave them out\.$"):
        model.generate(**padded([5]), threshold=0.3, kv="foo")


def test_what_is_not_given_or_switched_off_is_transformers_own():
    model = families.make("llama")
    expected = model.generate(**padded([5]), max_new_tokens=4)
    adaptive_gen.wrap(model, exit_layers=[2, 4])
    empty = dict.fromkeys(OURS) | {"lossless": False, "audit": False}
    model.generation_config.threshold = 0.0  # a standing wish, for when adaptive is asked for
    for keywords in (empty, {"adaptive": False, **OURS}):
        found = model.generate(**padded([5]), max_new_tokens=4, **keywords)
        assert torch.equal(found, expected)
