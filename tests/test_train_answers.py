"""Answers of sub-models, and the scores they get."""

import numpy as np
import pytest
import torch
from training import options

from adaptive_gen.answers import normalised
from adaptive_gen.exit_readouts import add_readouts, readouts
from adaptive_gen.train.answering import answers, sub_model
from adaptive_gen.train.metrics import exact_match, f1, interval, rouge_l
from adaptive_gen.train.run import train


@pytest.mark.parametrize("kind", ["head", "norm", "block"])
def test_a_sub_model_is_the_first_layers_and_leaves_the_model_alone(tiny_llama, kind):
    model = tiny_llama().double()
    ids = torch.randint(0, 200, (2, 12))
    whole = model(ids).logits
    add_readouts(model, [2, 4, 6], kind)
    for parameter in model.exit_readouts["2"].parameters():
        torch.nn.init.normal_(parameter)
    hidden = model(ids, output_hidden_states=True).hidden_states
    for exit_layer, readout in readouts(model, [2, 3, 6]).items():
        cut = sub_model(model, exit_layer)
        assert len(cut.model.layers) == exit_layer
        expected = whole if exit_layer == 6 else readout(hidden[exit_layer])
        torch.testing.assert_close(cut(ids).logits, expected)
    assert len(model.model.layers) == model.config.num_hidden_layers == 6
    assert torch.equal(model(ids).logits, whole)


def test_answers_in_a_batch_are_the_answers_alone(bigram_llama, byte_tokenizer):
    model = bigram_llama(b"\nok!")  # the plain prompt ends with a line break
    asked = ["a", "a longer question", "b"]
    assert answers(model, byte_tokenizer, asked, max_new_tokens=8) == ["ok!"] * 3
    assert answers(sub_model(model, 1), byte_tokenizer, asked, max_new_tokens=2) == ["ok"] * 3


def test_what_was_learnt_is_answered(tmp_path, model_dir, data, tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = data.with_name("qa.jsonl")
    rows.write_text('{"question": "Who?", "answers": ["Me."]}\n' * 8)
    steps = {"max_steps": 40, "lr": 1e-2, "seq_len": 64}
    out = train(options(model_dir, rows, tmp_path / "out", **steps), "soft")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out),
        AutoTokenizer.from_pretrained(out),
    )
    for exit_layer in (1, 3, 4):
        assert answers(sub_model(model, exit_layer), tokenizer, ["Who?"]) == ["Me."]


def test_answers_are_compared_as_triviaqa_compares_them():
    assert normalised("  The_Beatles, (1962)! ") == "beatles 1962"
    assert exact_match("the Nile.", ["Amazon", "Nile"]) == 1.0
    assert exact_match("Nile river", ["Nile"]) == 0.0
    assert f1("Nile river", ["Amazon", "the Nile"]) == pytest.approx(2 / 3)
    assert f1("", ["Nile"]) == f1("Rhine", ["Nile"]) == 0.0


def test_rouge_l_is_the_longest_common_subsequence():
    assert rouge_l("the cat sat", "the cat sat") == 1.0
    assert rouge_l("the dog sat down", "the cat sat") == pytest.approx(2 * 2 / 7)
    assert rouge_l("sat the", "the sat") == 0.5
    assert rouge_l("", "the cat") == 0.0


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        low, high = interval(rng.random(80).tolist())
        inside += low <= 0.5 <= high
    assert 51 <= inside <= 60
    assert interval([0.3, 0.3]) == (0.3, 0.3)
