"""transformers' own generation tests, by name, as claims about decoding that never exits.

Each function below has the name of a case of transformers' `tests/generation` and states what that
case is about: adaptive decoding at full depth gives what transformers gives. What is refused is in
`test_generation_refusals.py`; the table in docs/generate.md lists all of them.
"""

import families
import pytest
import torch
from test_batches import Uneven, padded, row_alone
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
    WatermarkDetector,
    WatermarkingConfig,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

import adaptive_gen
from adaptive_gen.errors import OptionError
from adaptive_gen.resume import AdaptiveCache

FULL = {"adaptive": True, "threshold": 1.0}
PROCESSED = {
    "bad_words_ids": [[1, 0], [44]],
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.2,
    "remove_invalid_values": True,
}
SAMPLED = {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
DICT = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
MODELS = {}


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def model(request):
    """A wrapped tiny model of each back end and kind of attention."""
    if request.param not in MODELS:
        # In float64 and eagerly, transformers' own mask overflows where padding meets a soft cap.
        dtype = torch.float32 if request.param == "gemma2" else torch.float64
        made = adaptive_gen.wrap(families.make(request.param, dtype), exit_layers=[2, 4])
        made.generation_config.update(eos_token_id=None, pad_token_id=0)
        MODELS[request.param] = made
    return MODELS[request.param]


def both(model, *args, lossless=True, **kwargs):
    """Transformers' result; ours at full depth and lossless are checked against it."""
    arguments = {"max_new_tokens": 8, **kwargs}
    sampled = arguments.setdefault("do_sample", False)
    torch.manual_seed(3)
    expected = model.generate(*args, **arguments)
    for how in (FULL, {"adaptive": True, "lossless": True, "policy": Uneven()}):
        if "lossless" in how and (sampled or not lossless):
            continue
        torch.manual_seed(3)
        ours = model.generate(*args, **arguments, **how)
        if torch.is_tensor(expected):
            assert torch.equal(ours, expected)
            continue
        assert isinstance(ours, GenerateDecoderOnlyOutput)
        assert torch.equal(ours.sequences, expected.sequences)
        for name in ("scores", "logits"):
            mine, theirs = getattr(ours, name) or (), getattr(expected, name) or ()
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    return expected


def test_greedy_generate(model):
    assert both(model, **padded((5, 9)), **PROCESSED).shape == (2, 9 + 8)


def test_greedy_generate_dict_outputs(model):
    out = both(model, **padded((5, 9)), **PROCESSED, **DICT)
    assert len(out.scores) == len(out.logits) == 8


def test_greedy_generate_dict_outputs_use_cache(model):
    out = both(model, **padded((5, 9)), **PROCESSED, **DICT, use_cache=True)
    assert len(out.scores) == 8


def test_sample_generate(model):
    assert both(model, **padded((5, 9)), **PROCESSED, **SAMPLED).shape == (2, 9 + 8)


def test_sample_generate_dict_output(model):
    out = both(model, **padded((5, 9)), **PROCESSED, **SAMPLED, **DICT, num_return_sequences=2)
    assert out.sequences.shape[0] == out.scores[0].shape[0] == 4


def test_generate_without_input_ids(model):
    assert both(model, bos_token_id=6)[0, 0] == 6


def test_left_padding_compatibility(model):
    batch = padded((9, 41))
    short = row_alone(batch, 0)
    together = model.generate(**batch, **FULL, **DICT, max_new_tokens=8)
    alone = model.generate(**short, **FULL, **DICT, max_new_tokens=8)
    assert torch.equal(together.sequences[0, 41:], alone.sequences[0, 9:])
    torch.testing.assert_close(together.logits[0][:1], alone.logits[0], atol=1e-5, rtol=1e-5)
    both(model, **batch)


def test_past_key_values_format(model):
    out = model.generate(**padded((9,)), **FULL, return_dict_in_generate=True, max_new_tokens=5)
    cache = out.past_key_values
    assert isinstance(cache, AdaptiveCache)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    with pytest.raises(OptionError, match="past_key_values"):
        model.generate(out.sequences, past_key_values=cache, max_new_tokens=5)


def test_generate_continue_from_past_key_values(model):
    ids = padded((9,))["input_ids"]
    at_once = both(model, ids, max_new_tokens=9)
    for how in (FULL, {"adaptive": True, "lossless": True, "policy": Uneven()}):
        first = model.generate(ids, **how, return_dict_in_generate=True, max_new_tokens=4)
        text = {"inputs": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
        second = model.generate(
            **text, past_key_values=first.past_key_values, **how, max_new_tokens=5
        )
        assert torch.equal(second, at_once)


def test_new_cache_format(model):
    # A user's empty cache, which transformers would fill, cannot be filled by us.
    with pytest.raises(OptionError, match="past_key_values"):
        model.generate(**padded((9,)), **FULL, past_key_values=DynamicCache(), max_new_tokens=5)


def test_generate_methods_with_logits_to_keep(model):
    batch = padded((5, 9))
    assert torch.equal(both(model, **batch, logits_to_keep=0), both(model, **batch))


def test_inherits_generation_mixin(model):
    assert isinstance(model, GenerationMixin) and model.can_generate()


def test_eager_matches_sdpa_generate(model):
    before = model.config._attn_implementation
    capped = getattr(model.config, "attn_logit_softcapping", None)  # which sdpa cannot do
    kinds = ("eager",) if capped else ("eager", "sdpa")
    try:
        outs = []
        for kind in kinds:
            model.set_attn_implementation(kind)
            outs.append(both(model, **padded((9,)), **DICT))
    finally:
        model.set_attn_implementation(before)
    torch.testing.assert_close(outs[0].logits[0], outs[-1].logits[0], atol=1e-3, rtol=1e-3)


def test_generate_with_head_masking(model):
    # transformers 5 has no head masks any more: its own refusal names the argument.
    with pytest.raises(ValueError, match="head_mask"):
        model.generate(**padded((5,)), **FULL, head_mask=torch.ones(6, 4))


def test_custom_stopping_criteria(model):
    class AtTwenty(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= 20

    for longest, length in ((22, 20), (18, 18)):
        criteria = StoppingCriteriaList([AtTwenty()])
        lengths = {"max_length": longest, "max_new_tokens": None}
        out = both(model, **padded((5, 9)), stopping_criteria=criteria, **lengths)
        assert out.shape[1] == length


def test_custom_stopping_criteria_overload_error(model):
    # It no longer is an error: transformers says which of the two lengths counts, the given one.
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=15)])
    lengths = {"max_length": 32, "max_new_tokens": None}
    assert both(model, **padded((9,)), stopping_criteria=criteria, **lengths).shape == (1, 15)


def test_custom_logits_processor(model):
    def shift(input_ids, scores):
        return scores.roll(input_ids.shape[1] % 5, dims=-1)

    both(model, **padded((5, 9)), logits_processor=LogitsProcessorList([shift]))


def test_stop_sequence_stopping_criteria(bigram_llama, byte_tokenizer):
    model = adaptive_gen.wrap(bigram_llama(b":we do!"))
    said = TextGenerationPipeline(model, byte_tokenizer)(
        "Hello:", **FULL, stop_strings=["do"], max_new_tokens=30, tokenizer=byte_tokenizer
    )
    assert said[0]["generated_text"] == "Hello:we do"


def test_per_row_stopping_criteria(model, byte_tokenizer):
    free = both(model, **padded((5, 9, 3)), max_new_tokens=20)
    stops = {"stop_strings": [chr(free[0, 9 + 6]), chr(free[1, 9 + 3])]}
    stops |= {"tokenizer": byte_tokenizer, "eos_token_id": 1}
    out = both(model, **padded((5, 9, 3)), **stops, max_new_tokens=20)
    ends = (out[:, 9:] == 0).sum(-1)
    assert len(set(ends.tolist())) > 1, "rows must end apart"


def test_eos_token_id_int_and_list_greedy_search(model):
    free = both(model, **padded((9,)), max_new_tokens=20)[0, 9:]
    end = int(free[6])
    for ends in (end, [end, 1]):
        out = both(model, **padded((9,)), eos_token_id=ends, max_new_tokens=20)
        assert out.shape[1] <= 9 + 7 and out[0, -1] == end


def test_eos_token_id_int_and_list_top_k_top_sampling(model):
    free = both(model, **padded((9,)), **SAMPLED, max_new_tokens=20)[0, 9:]
    end = int(free[6])
    for ends in (end, [end, 1]):
        out = both(model, **padded((9,)), **SAMPLED, eos_token_id=ends, max_new_tokens=20)
        assert out.shape[1] <= 9 + 7


def test_max_new_tokens_decoder_only(model):
    ids = padded((9,))["input_ids"]
    assert both(model, ids, max_new_tokens=3).shape[1] == 12
    assert both(model, ids, max_new_tokens=None, max_length=20).shape[1] == 20
    assert both(model, ids, max_new_tokens=3, max_length=20).shape[1] == 12


def test_default_max_length_warning(model):
    ids = padded((9,))["input_ids"]
    with pytest.warns(UserWarning, match="max_length"):
        assert both(model, ids, max_new_tokens=None).shape == (1, 9 + 20)


def test_generate_input_ids_as_kwarg(model):
    ids = padded((9,))["input_ids"]
    assert torch.equal(both(model, ids), both(model, input_ids=ids))
    assert torch.equal(both(model, ids), both(model, inputs=ids))


def test_validate_generation_inputs(model):
    with pytest.raises(ValueError, match="foo"):
        model.generate(**padded((5,)), **FULL, foo="bar")


def test_transition_scores_greedy_search(model):
    expected = both(model, **padded((5, 9)), **DICT)
    ours = model.generate(**padded((5, 9)), **DICT, **FULL, max_new_tokens=8)
    for normalised in (False, True):
        found = [
            model.compute_transition_scores(o.sequences, o.scores, normalize_logits=normalised)
            for o in (ours, expected)
        ]
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_transition_scores_greedy_search_normalized(model):
    ours = model.generate(**padded((5, 9)), **DICT, **FULL, max_new_tokens=8)
    found = model.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    greedy = [scores.log_softmax(-1).amax(-1) for scores in ours.scores]
    torch.testing.assert_close(found, torch.stack(greedy, dim=1))


def test_logits_processor_not_inplace(model):
    plain = both(model, **padded((9,)), **DICT)
    assert torch.equal(plain.logits[-1], plain.scores[-1])
    for how in ({}, FULL):
        warm = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 4, **how}
        warm = model.generate(**padded((9,)), **DICT, **warm)
        assert not torch.equal(warm.logits[-1], warm.scores[-1])


def test_compare_unprocessed_logit_scores(model):
    ids = padded((9,))["input_ids"]
    ours = model.generate(ids, **DICT, **FULL, do_sample=True, top_k=3, max_new_tokens=1)
    with torch.no_grad():
        expected = model(ids).logits[:, -1].float()
    torch.testing.assert_close(ours.logits[0], expected, atol=1e-4, rtol=1e-4)


def test_return_unprocessed_logit_scores(model):
    ours = model.generate(
        **padded((9,)), output_logits=True, return_dict_in_generate=True, **FULL, max_new_tokens=3
    )
    assert ours.scores is None
    assert [logits.isfinite().all().item() for logits in ours.logits] == [True] * 3


def test_special_tokens_fall_back_to_model_default(model):
    before = model.generation_config.bos_token_id
    try:
        model.generation_config.bos_token_id = 11
        given = GenerationConfig(bos_token_id=50, max_new_tokens=3, **FULL)
        assert model.generate(generation_config=given)[0, 0] == 50
        given.bos_token_id = None
        assert model.generate(generation_config=given)[0, 0] == 11
        assert given.bos_token_id is None
    finally:
        model.generation_config.bos_token_id = before


def test_green_red_watermark_generation(model):
    mark = WatermarkingConfig(bias=8.0, seeding_scheme="selfhash")
    marked = both(model, **padded((9,)), watermarking_config=mark, max_new_tokens=40)
    exits = {"adaptive": True, "policy": Uneven(), "max_new_tokens": 40}
    early = model.generate(**padded((9,)), watermarking_config=mark, **exits)
    plain = model.generate(**padded((9,)), **exits)
    detector = WatermarkDetector(model.config, "cpu", mark)
    found = [bool(detector(ids[:, 9:])[0]) for ids in (marked, early, plain)]
    assert found == [True, True, False], "exits leave the mark in"
