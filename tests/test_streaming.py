"""`stream()`: the loop of `generate`, one chunk at a time."""

import pytest
import torch

import adaptive_gen
from adaptive_gen.errors import OptionError


@pytest.fixture
def model(tiny_llama):
    wrapped = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4])
    wrapped.generation_config.eos_token_id = None
    return wrapped


@pytest.mark.parametrize("settings", [{"threshold": 0.3}, {"threshold": 1.0, "do_sample": True}])
def test_streamed_text_is_returned_text(model, byte_tokenizer, settings):
    settings = {"max_new_tokens": 60, **settings}
    torch.manual_seed(1)
    stream = adaptive_gen.stream(model, byte_tokenizer, "Once", **settings)
    chunks = list(stream)
    torch.manual_seed(1)
    inputs = byte_tokenizer("Once", return_tensors="pt")
    out = model.generate(**inputs, adaptive=True, return_dict_in_generate=True, **settings)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    # Random bytes are mostly no text; every broken character must come out the same way.
    assert "".join(chunk.text for chunk in chunks) == byte_tokenizer.decode(
        new, skip_special_tokens=True
    )
    assert [chunk.token for chunk in chunks] == new.tolist()
    assert [chunk.exit_layer for chunk in chunks] == out.exit_layers[0].tolist()
    assert stream.report.exit_histogram == out.report.exit_histogram


def test_a_character_of_several_tokens_comes_whole(bigram_llama, byte_tokenizer):
    script = ":naïve—漢字!".encode()
    model = adaptive_gen.wrap(bigram_llama(script))
    chunks = list(adaptive_gen.stream(model, byte_tokenizer, ":", threshold=0.9, max_new_tokens=40))
    assert "".join(c.text for c in chunks) == "naïve—漢字!"
    assert not any("\ufffd" in c.text for c in chunks)
    assert any(c.text == "" for c in chunks) and any(c.text == "漢" for c in chunks)


def test_an_unfinished_character_at_the_end_is_not_lost(bigram_llama, byte_tokenizer):
    model = adaptive_gen.wrap(bigram_llama(":a漢".encode()))
    chunks = adaptive_gen.stream(model, byte_tokenizer, ":", threshold=0.9, max_new_tokens=2)
    assert "".join(c.text for c in chunks) == "a\ufffd"


def test_special_tokens_are_not_shown(bigram_llama, byte_tokenizer):
    model = adaptive_gen.wrap(bigram_llama(b":ok"))
    chunks = list(adaptive_gen.stream(model, byte_tokenizer, ":", threshold=0.9, max_new_tokens=9))
    assert "".join(c.text for c in chunks) == "ok"
    assert chunks[-1].token == byte_tokenizer.eos_token_id


def test_chunks_come_as_they_are_decoded(model, byte_tokenizer):
    calls = []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    stream = adaptive_gen.stream(model, byte_tokenizer, "Hi", threshold=0.5, max_new_tokens=30)
    assert not calls
    next(stream)
    assert len(calls) == 1
    next(stream)
    assert len(calls) == 2
    assert stream.report.new_tokens == 2
    stream.close()
    assert list(stream) == []


def test_a_tokenizer_without_a_template_refuses_messages(model, byte_tokenizer):
    with pytest.raises(OptionError, match="chat template"):
        adaptive_gen.stream(model, byte_tokenizer, [{"role": "user", "content": "Hi"}])


def test_messages_go_through_the_chat_template(model, byte_tokenizer):
    byte_tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}:"
    stream = adaptive_gen.stream(
        model, byte_tokenizer, [{"role": "user", "content": "Hi"}], threshold=0.5, max_new_tokens=3
    )
    assert byte_tokenizer.decode(stream._loop.texts.sequences()[0]) == "<Hi>:"


def test_an_empty_prompt_is_refused(model, byte_tokenizer):
    with pytest.raises(OptionError, match="empty"):
        adaptive_gen.stream(model, byte_tokenizer, "")
