"""Particulars of the arguments of `generate` that a table of arguments cannot show."""

import pytest
import torch
from test_batches import Uneven, padded, wrapped
from test_generation_config import ENDS, LENGTHS, SAMPLED, assert_same, generate
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import adaptive_gen
from adaptive_gen.errors import OptionError


@pytest.fixture(scope="module")
def model():
    wrapped_model = wrapped("llama")
    wrapped_model.generation_config.eos_token_id = None
    return wrapped_model


def test_scores_are_normalised(model):
    wanted = {**padded(LENGTHS), "output_scores": True, "return_dict_in_generate": True}
    ours = generate(model, **wanted, renormalize_logits=True, adaptive=True, policy=Uneven())
    for scores in ours.scores:
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(3))


def test_a_text_from_nothing_starts_with_the_bos_token(model):
    for arguments in ({"bos_token_id": 5}, {"bos_token_id": 5, "forced_bos_token_id": 9}):
        expected = generate(model, **arguments)
        assert expected[0, 0] == 5
        ours = generate(model, **arguments, adaptive=True, threshold=1.0)
        assert torch.equal(ours, expected)
        exits = {**arguments, "adaptive": True, "policy": Uneven(), "lossless": True}
        assert torch.equal(generate(model, **exits), expected)
    assert expected[0, 1] == 9, "forced"


def test_invalid_values_are_removed():
    model = wrapped("llama", engine="module")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    batch = {**padded(LENGTHS), "remove_invalid_values": True}
    expected = generate(model, **batch)
    assert not torch.equal(expected, generate(model, **padded(LENGTHS)))
    assert torch.equal(generate(model, **batch, adaptive=True, threshold=1.0), expected)


def test_positions_that_say_nothing_new_are_taken_and_others_refused(model):
    batch = padded(LENGTHS)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = generate(model, **batch)
    ours = generate(model, **batch, position_ids=positions, adaptive=True, threshold=1.0)
    assert torch.equal(ours, expected)
    with pytest.raises(OptionError, match="position_ids"):
        generate(model, **batch, position_ids=positions + 1, adaptive=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
def test_any_kind_of_mask_is_taken(model, kind):
    batch = padded(LENGTHS)
    expected = generate(model, **batch)
    batch["attention_mask"] = batch["attention_mask"].to(kind)
    assert torch.equal(generate(model, **batch, adaptive=True, threshold=1.0), expected)


def test_without_a_mask_pad_tokens_are_padding_where_transformers_says_so(model):
    ids = padded(LENGTHS)["input_ids"]
    expected = generate(model, input_ids=ids)
    assert torch.equal(expected, generate(model, **padded(LENGTHS)))
    ours = generate(model, input_ids=ids, adaptive=True, threshold=1.0)
    assert torch.equal(ours, expected)
    ids[1, 5] = model.generation_config.pad_token_id
    with pytest.raises(OptionError, match="holes"):
        generate(model, input_ids=ids, adaptive=True, threshold=1.0)


def test_ended_rows_are_padded_with_the_end_token_where_there_is_no_other():
    model = wrapped("llama")
    model.generation_config.pad_token_id = None
    batch = {**padded(LENGTHS), "eos_token_id": ENDS}
    expected = generate(model, **batch)
    assert (expected == ENDS[0]).sum() > 3
    assert torch.equal(generate(model, **batch, adaptive=True, threshold=1.0), expected)


def test_a_foreign_cache_with_tokens_in_it_is_refused(model):
    ids = padded((4,))["input_ids"]
    cache = model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    longer = torch.cat([ids, ids], dim=1)
    with pytest.raises(OptionError, match="past_key_values"):
        generate(model, input_ids=longer, past_key_values=cache, adaptive=True)


def test_criteria_that_read_scores_see_full_depths_in_lossless(model):
    class Sure(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert len(scores) == input_ids.shape[1] - 9 or self.drafting
            return scores[-1].softmax(-1).amax(-1) > 0.6

    criterion = Sure()
    wanted = {**padded((9,)), "output_scores": True, "return_dict_in_generate": True}
    wanted["stopping_criteria"] = StoppingCriteriaList([criterion])
    wanted["max_new_tokens"] = 40
    criterion.drafting = False
    expected = generate(model, **wanted)
    assert 2 < len(expected.scores) < 40, "the criterion must end the text"
    assert_same(generate(model, **wanted, adaptive=True, threshold=1.0), expected)
    criterion.drafting = True
    for seed in range(4):
        wanted.update(padded((9,), seed=seed))
        expected = generate(model, **wanted)
        ours = generate(model, **wanted, adaptive=True, policy=Uneven(), lossless=True)
        assert_same(ours, expected)


def test_watermarks_that_count_calls_are_refused_where_calls_do_not_count(model):
    mark = {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 4, 5], ngram_len=3)}
    mark.update(SAMPLED)
    expected = generate(model, **padded((9,)), **mark)
    assert not torch.equal(expected, generate(model, **padded((9,)), **SAMPLED))
    ours = generate(model, **padded((9,)), **mark, adaptive=True, threshold=1.0)
    assert torch.equal(ours, expected)
    for more in ({"lossless": True}, {"audit": True}, padded(LENGTHS)):
        with pytest.raises(OptionError, match="SynthID"):
            generate(model, **{**padded((9,)), **mark, "adaptive": True, **more})


def test_guidance_by_an_object_is_refused(model):
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
    with pytest.raises(OptionError, match="UnbatchedClassifierFreeGuidance"):
        generate(
            model,
            **padded((9,)),
            logits_processor=LogitsProcessorList([guidance]),
            adaptive=True,
            threshold=1.0,
        )


def test_healed_prompts_are_continued(tiny_llama, byte_tokenizer):
    byte_tokenizer.add_tokens([":x"])
    model = adaptive_gen.wrap(tiny_llama(vocab=len(byte_tokenizer), seed=1), exit_layers=[2, 4])
    inputs = {**byte_tokenizer("abc:", return_tensors="pt"), "token_healing": True}
    expected = generate(model, byte_tokenizer, **inputs)
    assert expected[0, :4].tolist() == [*b"abc", 259], "the prompt's end must have been healed"
    ours = generate(model, byte_tokenizer, **inputs, adaptive=True, threshold=1.0)
    assert torch.equal(ours, expected)
    exits = {"adaptive": True, "lossless": True, "policy": Uneven()}
    assert torch.equal(generate(model, byte_tokenizer, **inputs, **exits), expected)
