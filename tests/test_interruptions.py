"""Streamers, Ctrl-C and abandoned texts: the model is afterwards what it was before."""

import copy
import threading

import pytest
import torch
from test_batches import Uneven, padded, wrapped
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import adaptive_gen

MODES = [{}, {"lossless": True}, {"audit": True}, {"kv": "propagate"}, {"prefill": "lazy"}]
WIDTH = 11  # of the longest prompt


class Stop(KeyboardInterrupt):
    """Ctrl-C at a moment of the test's choosing."""


class Processor(LogitsProcessor):
    """Interrupts in the middle of a text."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == WIDTH + 6:
            raise Stop
        return scores


class Criterion(StoppingCriteria):
    """Likewise."""

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == WIDTH + 6:
            raise Stop
        return False


class Streamer(BaseStreamer):
    """Likewise, after the prompt and four tokens; counts what it is given."""

    def __init__(self, most=5):
        self.most, self.seen = most, []

    def put(self, value):
        self.seen.append(value.flatten().tolist())
        if len(self.seen) == self.most:
            raise Stop

    def end(self):
        self.seen.append("end")


def interrupting():
    return {
        "processor": {"logits_processor": LogitsProcessorList([Processor()])},
        "criterion": {"stopping_criteria": StoppingCriteriaList([Criterion()])},
        "streamer": {"streamer": Streamer()},
    }


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("engine", ["compiled", "fused", "module"])
def test_an_interruption_leaves_model_and_configuration_as_they_were(engine, mode):
    model = wrapped("llama", engine=engine)
    settings = {"adaptive": True, "policy": Uneven(), "max_new_tokens": 20, **mode}
    before = {rows: model.generate(**padded((11, 4, 7)[:rows]), **settings) for rows in (1, 3)}
    config, own = model.config.to_dict(), model.generation_config.to_dict()
    weights = copy.deepcopy(model.state_dict())
    attributes = set(vars(model))
    for by, how in interrupting().items():
        for rows in (1,) if by == "streamer" else (1, 3):
            with pytest.raises(Stop):
                model.generate(**padded((11, 4, 7)[:rows]), **settings, **how)
            assert torch.is_grad_enabled()
            after = model.generate(**padded((11, 4, 7)[:rows]), **settings)
            assert torch.equal(after, before[rows])
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == own
    assert set(vars(model)) == attributes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_stream_may_be_dropped_at_any_token(tiny_llama, byte_tokenizer, mode):
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4])
    model.generation_config.eos_token_id = None
    settings = {"policy": Uneven(), "max_new_tokens": 12, **mode}
    whole = [c.token for c in adaptive_gen.stream(model, byte_tokenizer, "Once", **settings)]
    assert len(whole) == 12
    for tokens in range(13):
        stream = adaptive_gen.stream(model, byte_tokenizer, "Once", **settings)
        said = []
        for _ in range(tokens):
            said.append(next(stream).token)
            assert torch.is_grad_enabled(), "between tokens the caller's own settings hold"
        if tokens % 2:
            stream.close()
            assert list(stream) == []
        assert stream.report.new_tokens >= tokens
        assert said == whole[:tokens]
        del stream
    again = [c.token for c in adaptive_gen.stream(model, byte_tokenizer, "Once", **settings)]
    assert again == whole


def test_two_streams_of_one_model_do_not_meet(tiny_llama, byte_tokenizer):
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4])
    model.generation_config.eos_token_id = None
    settings = {"policy": Uneven(), "max_new_tokens": 15}
    prompts = ("One", "Another")
    alone = [
        [c.token for c in adaptive_gen.stream(model, byte_tokenizer, prompt, **settings)]
        for prompt in prompts
    ]
    streams = [adaptive_gen.stream(model, byte_tokenizer, prompt, **settings) for prompt in prompts]
    together = list(zip(*streams, strict=True))
    assert [[chunks[i].token for chunks in together] for i in range(2)] == alone


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_text_streamer_prints_the_text(model_of_bytes, byte_tokenizer, capsys, mode):
    inputs = byte_tokenizer("Once", return_tensors="pt")
    out = model_of_bytes.generate(
        **inputs,
        streamer=TextStreamer(byte_tokenizer, skip_prompt=True),
        adaptive=True,
        policy=Uneven(),
        max_new_tokens=20,
        **mode,
    )
    new = out[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out == byte_tokenizer.decode(new) + "\n"


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_iterating_streamer_is_fed_from_a_thread(model_of_bytes, byte_tokenizer, mode):
    settings = {"adaptive": True, "policy": Uneven(), "max_new_tokens": 20, **mode}
    inputs = byte_tokenizer("Once", return_tensors="pt")
    expected = model_of_bytes.generate(**inputs, **settings)
    streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model_of_bytes.generate, kwargs={**inputs, **settings, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join(60)
    assert not thread.is_alive()
    assert text == byte_tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_streamer_gets_the_prompt_then_every_token_then_the_end(model_of_bytes, mode):
    streamer = Streamer(most=None)
    ids = padded((9,))["input_ids"]
    out = model_of_bytes.generate(
        ids, streamer=streamer, adaptive=True, policy=Uneven(), max_new_tokens=7, **mode
    )
    assert streamer.seen == [ids[0].tolist(), *([token] for token in out[0, 9:].tolist()), "end"]


@pytest.fixture
def model_of_bytes(tiny_llama):
    """Says bytes that are characters by themselves, so that every text is one."""
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4])
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [*range(33), *range(127, 259)]
    return model
