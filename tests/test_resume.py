"""The second turn runs only what is new, and says what a run of everything would say."""

import pytest
import torch
from test_batches import Uneven, padded, wrapped

import adaptive_gen
from adaptive_gen.errors import OptionError

MODES = [{}, {"lossless": True}, {"kv": "propagate"}, {"prefill": "lazy"}, {"exit_layers": [3]}]


def settings(**mode):
    return {
        "adaptive": True,
        "policy": Uneven() if "exit_layers" not in mode else None,
        "max_new_tokens": 15,
        "return_dict_in_generate": True,
        **mode,
    }


def turn(model, text, seed=9, **keywords):
    """Generate after `text` with four more tokens of the user's."""
    more = torch.cat([text, padded([4], seed=seed)["input_ids"]], dim=1)
    return model.generate(more, **keywords)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("engine", ["compiled", "fused", "module"])
def test_continuing_is_running_everything(engine, mode):
    model = wrapped("llama", engine=engine)
    first = model.generate(padded([9])["input_ids"], **settings())
    text, past = first.sequences, first.past_key_values
    # What `propagate` approximated stays so, while running everything anew makes it exact.
    for seed in (9,) if mode.get("kv") == "propagate" else (9, 10):
        again = turn(model, text, seed, **settings(**mode))
        continued = turn(model, text, seed, past_key_values=past, **settings(**mode))
        assert torch.equal(continued.sequences, again.sequences)
        text, past = continued.sequences, continued.past_key_values


def test_only_new_tokens_are_run():
    model = wrapped("llama", engine="module")
    first = model.generate(padded([9])["input_ids"], **settings())
    rows = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[1])
    )
    turn(model, first.sequences, past_key_values=first.past_key_values, **settings())
    handle.remove()
    # The first turn's last token has not been run yet; it comes with the four new ones.
    assert rows == [1 + 4] + [1] * 14


def test_a_text_that_parts_early_reuses_what_is_common():
    model = wrapped("llama")
    first = model.generate(padded([9])["input_ids"], **settings())
    other = first.sequences.clone()
    other[0, 12:] = padded([12], seed=5)["input_ids"]
    again = model.generate(other, **settings())
    ours = model.generate(other, **settings(), past_key_values=first.past_key_values)
    assert torch.equal(ours.sequences, again.sequences)
    nothing_common = padded([20], seed=77)["input_ids"]
    again = model.generate(nothing_common, **settings())
    continued = model.generate(nothing_common, **settings(), past_key_values=ours.past_key_values)
    assert torch.equal(continued.sequences, again.sequences)


def test_an_abandoned_stream_can_be_continued(byte_tokenizer, tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(vocab=300), exit_layers=[2, 4])
    for mode in ({}, {"lossless": True}):
        stream = adaptive_gen.stream(
            model, byte_tokenizer, "abc", policy=Uneven(), max_new_tokens=40, **mode
        )
        said = [next(stream).token for _ in range(7)]
        stream.close()
        prompt = byte_tokenizer("abc", return_tensors="pt")["input_ids"]
        text = torch.cat([prompt, torch.tensor([said])], dim=1)
        again = model.generate(text, **settings(**mode))
        ours = model.generate(text, **settings(**mode), past_key_values=stream.cache)
        assert torch.equal(ours.sequences, again.sequences)


def test_what_cannot_be_continued_is_refused():
    model, other = wrapped("llama"), wrapped("mistral")
    first = model.generate(padded([9])["input_ids"], **settings())
    with pytest.raises(OptionError, match="another model's"):
        turn(other, first.sequences, past_key_values=first.past_key_values, **settings())
    turn(model, first.sequences, past_key_values=first.past_key_values, **settings())
    with pytest.raises(OptionError, match="continued already"):
        turn(model, first.sequences, past_key_values=first.past_key_values, **settings())
    newest = model.generate(padded([9])["input_ids"], **settings())
    with pytest.raises(OptionError, match="continued by 2"):
        model.generate(**padded([30, 9]), **settings(), past_key_values=newest.past_key_values)
