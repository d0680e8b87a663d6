"""Choosing a back end: fused where it gives what the model gives, and a reason where it is not."""

import families
import pytest
import torch
from families import FAMILIES, FUSED

import adaptive_gen
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.settings import state

PROMPT = torch.tensor([[3, 4, 5]])


def report(model, **kwargs):
    return model.generate(
        PROMPT,
        adaptive=True,
        threshold=0.5,
        max_new_tokens=8,
        return_dict_in_generate=True,
        **kwargs,
    ).report


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_that_can_be_fused_are(family):
    model = adaptive_gen.wrap(families.make(family))
    assert report(model).engine == ("fused" if family in FUSED else "module")
    assert bool(state(model).backend.reason) == (family not in FUSED)


def test_the_module_back_end_can_be_asked_for(tiny_llama):
    assert report(adaptive_gen.wrap(tiny_llama(), engine="module")).engine == "module"


def test_insisting_on_fused_says_why_it_cannot_be_had():
    with pytest.raises(ModelError, match="engine='fused' cannot run Olmo2ForCausalLM"):
        adaptive_gen.wrap(families.make("olmo2"), engine="fused")
    with pytest.raises(OptionError, match="turbo"):
        adaptive_gen.wrap(families.make("llama"), engine="turbo")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_llama_that_computes_something_else_is_not_fused(tiny_llama, change):
    model = adaptive_gen.wrap(tiny_llama(**change))
    assert state(model).backend.name == "module"


def test_half_precision_is_not_fused(tiny_llama):
    assert report(adaptive_gen.wrap(tiny_llama().bfloat16())).engine == "module"


def test_hooks_and_training_mode_are_honoured_while_they_last(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama())
    calls = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    assert report(model).engine == "module" and calls
    handle.remove()
    assert report(model).engine == "fused"
    assert report(model.train()).engine == "module"


def test_changed_weights_are_used(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4])
    settings = {"max_new_tokens": 30, "do_sample": False}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(-2)
    expected = model.generate(PROMPT, **settings)
    ours = model.generate(PROMPT, adaptive=True, threshold=1.0, **settings)
    assert torch.equal(ours, expected)


def test_propagation_runs_no_layer_when_fused(tiny_llama):
    """The fused `store` reads the hidden states only: equal to the module's, whatever the depth."""
    outputs = []
    for engine in ("module", "fused"):
        model = adaptive_gen.wrap(tiny_llama().double(), exit_layers=[2, 4], engine=engine)
        out = model.generate(
            PROMPT, adaptive=True, threshold=0.3, kv="propagate", max_new_tokens=40
        )
        outputs.append(out.tolist())
    assert outputs[0] == outputs[1]
