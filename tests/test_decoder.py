"""Which models are taken, and that the ones that cannot be run layer by layer are refused."""

import pytest
import torch
from transformers import BertConfig, BertModel

import adaptive_gen
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.loading import load
from adaptive_gen.settings import state


def test_readouts_are_the_logits_of_truncated_models(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(layers=4))
    ids = torch.randint(0, 200, (1, 11))
    readouts = dict(state(model).decoder.readouts(ids, (1, 3, 4)))
    for exit_layer, logits in readouts.items():
        truncated = tiny_llama(layers=4)
        truncated.model.layers = truncated.model.layers[:exit_layer]
        truncated.config.num_hidden_layers = exit_layer
        with torch.no_grad():
            expected = truncated(ids).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_generate_is_refused():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ModelError, match="causal"):
        adaptive_gen.wrap(BertModel(config))


def test_the_probe_finds_arithmetic_it_does_not_know(tiny_llama):
    model = tiny_llama()
    forward = model.forward
    model.forward = lambda **inputs: _scaled(forward(**inputs))
    with pytest.raises(ModelError, match="differs"):
        adaptive_gen.wrap(model)


def _scaled(output):
    output.logits = 1.05 * output.logits
    return output


def test_the_probe_leaves_training_mode_as_it_was(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama().train())
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_pass_the_probe(tiny_llama, dtype):
    model = adaptive_gen.wrap(tiny_llama(layers=8).to(dtype))
    out = model.generate(torch.tensor([[3, 4]]), adaptive=True, threshold=0.3, max_new_tokens=5)
    assert out.shape == (1, 7)


def test_a_single_layer_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="at least 2"):
        adaptive_gen.wrap(tiny_llama(layers=1))


def test_load_reads_a_saved_model_with_its_calibration(tiny_llama, byte_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, exit_layers=[3])
    assert state(model).exit_layers == (3, 6)
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert"}', '{"model_type": "?"}'])
def test_a_directory_without_a_causal_lm_is_one_clear_line(tmp_path, content):
    directory = tmp_path / "model"
    if content is not None:
        directory.mkdir()
        (directory / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        load(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_a_queue_without_room_is_refused(tiny_llama):
    with pytest.raises(OptionError, match="queue_cap"):
        adaptive_gen.wrap(tiny_llama(), queue_cap=0)
