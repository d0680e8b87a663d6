"""What is wrong with an argument of the library is one line: what came, what is allowed."""

import pytest
import torch
from test_batches import padded, wrapped

import adaptive_gen
from adaptive_gen.errors import AdaptiveGenError


def assert_one_line(call, *words):
    with pytest.raises(AdaptiveGenError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.fixture(scope="module")
def model():
    return wrapped("llama", engine="module")


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"exit_layers": 4}, ["exit_layers=4", "no list", "1 to 6", "[3]"]),
        ({"exit_layers": "2,4"}, ["exit_layers='2,4'", "no list"]),
        ({"confidence": ["margin"]}, ["confidence=['margin']", "margin, max_prob, entropy, gate"]),
        ({"lossless": "no"}, ["lossless='no'", "neither True nor False"]),
        ({"audit": "False"}, ["audit='False'", "neither True nor False"]),
        ({"adaptive": "no"}, ["adaptive='no'", "neither True nor False"]),
        ({"target_speedup": float("inf")}, ["target_speedup=inf", "1 or more"]),
        ({"policy": adaptive_gen.NeverExit}, ["NeverExit", "give an object"]),
        ({"attention_mask": torch.ones(1, 3)}, ["attention_mask is [1, 3]", "[1, 5]"]),
        ({"position_ids": torch.arange(5)}, ["position_ids", "leave them out"]),
    ],
)
def test_keywords_of_generate(model, keywords, words):
    settings = {**padded([5]), "adaptive": True, "max_new_tokens": 2}
    assert_one_line(lambda: model.generate(**{**settings, **keywords}), *words)


@pytest.mark.parametrize(
    "prompt, came",
    [
        ("Once upon", "str"),
        ([5, 6], "list"),
        ({"input_ids": torch.ones(1, 2).long()}, "dict"),
        (torch.tensor([5, 6]), "[2] tensor of int64"),
        (torch.ones(1, 2), "[1, 2] tensor of float32"),
        (torch.ones(1, 2).bool(), "[1, 2] tensor of bool"),
        (torch.ones(0, 3).long(), "[0, 3] tensor of int64"),
    ],
)
def test_a_prompt_that_is_no_token_ids(model, prompt, came):
    assert_one_line(lambda: model.generate(prompt, adaptive=True), came, "[batch, time]")


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"exit_layers": 4}, ["exit_layers=4", "no list"]),
        ({"calibration": True}, ["calibration=True", "calibration.json"]),
        ({"calibration": "/none"}, ["/none", "model directory", "calibrate run MODEL"]),
        ({"queue_cap": "many"}, ["queue_cap='many'", "1 or more"]),
    ],
)
def test_arguments_of_wrap(tiny_llama, keywords, words):
    assert_one_line(lambda: adaptive_gen.wrap(tiny_llama(), **keywords), *words)


def test_names_where_models_go_and_models_where_names_go(model, tmp_path):
    assert_one_line(lambda: adaptive_gen.wrap("gpt2"), "'gpt2'", "load()")
    assert_one_line(lambda: adaptive_gen.load(model), "LlamaForCausalLM", "wrap()")
    assert_one_line(lambda: adaptive_gen.export("m", tmp_path / "o", 2), "str", "load()")


def test_prompts_of_stream(model, byte_tokenizer, tiny_llama):
    def stream(prompt, of=model):
        return lambda: adaptive_gen.stream(of, byte_tokenizer, prompt, max_new_tokens=2)

    assert_one_line(stream(b"hi"), "bytes", "one text")
    assert_one_line(stream(["a", "b"]), "list", "generate()")
    assert_one_line(stream(3), "int", "one text")
    assert_one_line(stream("\udcff"), "UTF-8")
    assert_one_line(stream("hi", of=tiny_llama()), "not wrapped", "wrap(model)")
