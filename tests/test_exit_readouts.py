"""Exits with readouts of their own on a frozen model: trained, loaded, decoded, exported."""

import json

import pytest
import torch
from training import options, run, weights
from transformers import AutoModelForCausalLM

import adaptive_gen
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.exit_readouts import FILE, add_readouts, readouts
from adaptive_gen.settings import state
from adaptive_gen.train.run import evaluate_model, train

SETTINGS = {"adaptive": True, "max_new_tokens": 20, "return_dict_in_generate": True}


def with_readouts(tiny_llama, kind, **config):
    """A random model whose exits 1 and 3 of 4 say something else than its own head would."""
    model = tiny_llama(layers=4, eos_token_id=None, **config)
    add_readouts(model, [1, 3, 4], kind)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.exit_readouts.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["norm", "block", "head"])
def test_they_learn_while_the_model_stays_as_it_is(tmp_path, model_dir, data, kind):
    steps = {"max_steps": 30, "lr": 1e-2, "adapter": f"exit-{kind}", "objective": "distil:1"}
    before = evaluate_model(str(model_dir), [data], "1,3", seq_len=32)
    out = train(options(model_dir, data, tmp_path / "out", **steps), "soft")
    expected = weights(model_dir)
    found = weights(out)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((out / "config.json").read_text())["exit_layers"] == [1, 3, 4]
    after = evaluate_model(str(out), [data], None, seq_len=32)
    assert after.exits[-1] == before.exits[-1]
    for old, new in zip(before.exits[:-1], after.exits[:-1], strict=True):
        assert new.agreement > old.agreement


@pytest.mark.parametrize("kind", ["norm", "block", "head"])
@pytest.mark.parametrize("engine", ["compiled", "fused", "module"])
def test_generation_reads_exits_through_them(tiny_llama, kind, engine):
    model = with_readouts(tiny_llama, kind)
    ids = torch.randint(0, 200, (1, 9))
    adaptive_gen.wrap(model, engine=engine)
    assert state(model).exit_layers == (1, 3, 4)
    ways = readouts(model, [1, 3, 4])
    rules = {1: {1: 0.0, 3: 1.0}, 3: {1: 1.0, 3: 0.0}}
    outs = {e: model.generate(ids, **SETTINGS, threshold=rule) for e, rule in rules.items()}
    for exit_layer, out in outs.items():  # hidden states put hooks on the layers: they come after
        text, left = out.sequences, out.exit_layers[0]
        assert set(left.tolist()) == {exit_layer, 4}  # the prompt's last token runs to the end
        with torch.no_grad():
            hidden = model.model(text[:, :-1], output_hidden_states=True).hidden_states
        # The last of the hidden states has passed the final norm.
        deep, early = model.lm_head(hidden[4]), ways[exit_layer](hidden[exit_layer])
        chosen = torch.where(left == 4, deep[0, 8:].argmax(-1), early[0, 8:].argmax(-1))
        assert torch.equal(chosen, text[0, 9:])
        assert not torch.equal(early, model.lm_head(model.model.norm(hidden[exit_layer])))


@pytest.mark.parametrize("kind", ["norm", "block", "head"])
def test_lossless_is_the_frozen_model_s_own_text(tiny_llama, kind):
    model = with_readouts(tiny_llama, kind)
    ids = torch.randint(0, 200, (1, 9))
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    adaptive_gen.wrap(model)
    out = model.generate(ids, **SETTINGS, lossless=True, threshold=0.0)
    assert torch.equal(out.sequences, plain) and out.report.drafted > 0


def test_a_trained_directory_loads_with_them(tmp_path, model_dir, data):
    steps = {"max_steps": 8, "lr": 1e-2, "adapter": "exit-block"}
    out = train(options(model_dir, data, tmp_path / "out", **steps), "soft")
    model, _ = adaptive_gen.load(out)
    assert sorted(state(model).decoder.own) == [1, 3]
    ids = torch.randint(0, 200, (1, 9))
    hidden = model.model(ids, output_hidden_states=True).hidden_states[1]
    own, shared = state(model).decoder.readout(hidden, 1), state(model).decoder.readout(hidden)
    assert not torch.allclose(own, shared)


@pytest.mark.parametrize("kind", ["norm", "head"])
def test_an_exported_exit_says_what_its_readout_says(tiny_llama, tmp_path, kind):
    model = with_readouts(tiny_llama, kind, tie_word_embeddings=True)
    adaptive_gen.export(model, tmp_path / "sub", exit_layer=3)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "sub")
    ids = torch.randint(0, 200, (1, 9))
    hidden = model.model(ids, output_hidden_states=True).hidden_states[3]
    assert torch.equal(stock(ids).logits, readouts(model, [3])[3](hidden))
    assert not any("exit_readouts" in name for name in stock.state_dict())


def test_a_block_has_no_place_in_a_plain_checkpoint_but_goes_with_the_whole(tiny_llama, tmp_path):
    model = with_readouts(tiny_llama, "block")
    with pytest.raises(ModelError, match="block of its own"):
        adaptive_gen.export(model, tmp_path / "sub", exit_layer=3)
    adaptive_gen.export(model, tmp_path / "all", with_generate=True)
    assert (tmp_path / "all" / FILE).is_file()


def test_a_command_without_exits_is_refused(tmp_path, model_dir, data, monkeypatch, capsys):
    with pytest.raises(OptionError, match="use soft"):
        train(options(model_dir, data, tmp_path / "o", adapter="exit-norm"), "sft")
    arguments = ["soft", model_dir, "--data", data, "--out", tmp_path / "o", "--adapter", "exits"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code and "exit-norm" in err
