"""Lazy prefill: deeper segments see the prompt when a token first needs them, and nothing else."""

import families
import pytest
import torch
from families import FAMILIES
from test_batches import LENGTHS, Uneven, padded, wrapped

import adaptive_gen
from adaptive_gen import FixedExit, NeverExit

SETTINGS = {"adaptive": True, "max_new_tokens": 30, "return_dict_in_generate": True}


class DeepFirst(Uneven):
    """`Uneven` behind a first token at full depth, as full prefill gives it."""

    def may_exit(self, exit_layer, position):
        return position > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_and_full_prefill_say_the_same(family):
    model = wrapped(family)
    batch = padded(LENGTHS[:3])
    full = model.generate(**batch, **SETTINGS, policy=DeepFirst())
    lazy = model.generate(**batch, **SETTINGS, policy=DeepFirst(), prefill="lazy")
    assert torch.equal(lazy.sequences, full.sequences)
    assert torch.equal(lazy.exit_layers, full.exit_layers)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_first_token_may_leave_early_too(family):
    """Every token, the first included, is the truncated model's until a deep pass is forced."""
    model = adaptive_gen.wrap(families.make(family, torch.float64), [4], queue_cap=64)
    ids = padded([12])["input_ids"]
    out = model.generate(ids, **SETTINGS, policy=FixedExit(4), prefill="lazy")
    assert out.exit_layers.tolist() == [[4] * 30]
    decoder = adaptive_gen.settings.state(model).decoder
    (_, logits) = next(decoder.readouts(out.sequences[:, :-1], (4,)))
    assert torch.equal(logits[0, 11:].argmax(-1), out.sequences[0, 12:])


def test_the_deep_layers_do_not_see_the_prompt_before_they_must():
    model = wrapped("llama", engine="module")
    seen = []
    handle = model.model.layers[-1].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    model.generate(
        **padded([12]), **SETTINGS | {"max_new_tokens": 8}, policy=FixedExit(2), prefill="lazy"
    )
    assert seen == []
    model.generate(
        **padded([12]), **SETTINGS | {"max_new_tokens": 8}, policy=DeepFifth(), prefill="lazy"
    )
    handle.remove()
    assert seen == [12 + 4, 1, 1, 1], "prompt and waiting tokens go together, once"


class DeepFifth:
    """Leaves at layer 2 for the first four tokens."""

    def may_exit(self, exit_layer, position):
        return exit_layer == 2 and position < 4

    def should_exit(self, check):
        return True


def test_never_exiting_is_the_same_with_a_lazy_prompt():
    model = wrapped("llama")
    batch = padded(LENGTHS[:3])
    full = model.generate(**batch, **SETTINGS, policy=NeverExit())
    lazy = model.generate(**batch, **SETTINGS, policy=NeverExit(), prefill="lazy")
    assert torch.equal(lazy.sequences, full.sequences)
