"""Mixtures of experts by prepared layers are what the modules make of them."""

import copy

import families
import numba
import numpy as np
import pytest
import torch

import adaptive_gen
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine.experts import add_mixture
from adaptive_gen.engine.fusing import fuse, narrowed
from adaptive_gen.engine.int8 import quantised
from adaptive_gen.engine.panelled import CompiledModel
from adaptive_gen.kernels import experts as kernels
from adaptive_gen.kernels.jit import entry
from adaptive_gen.kernels.layers import ACTIVATION, NORMALISED, TOP_K

HIDDEN, EXPERTS = 32, 6


def model_of(top_k=2, normalised=True, **config):
    """A model of six experts, of which each token goes through `top_k`."""
    settings = {"num_experts": EXPERTS, "num_experts_per_tok": top_k, "num_hidden_layers": 2}
    return families.make("olmoe", **{**settings, "norm_topk_prob": normalised, **config})


@entry
def mixed(normed, router, matrices, kinds, wide, routing, y, tokens, team):
    kernels.add_mixture(normed, router, matrices, kinds, wide, routing, y, tokens, team)


def by_kernel(prepared, given):
    """What compiled code adds, of the second layer."""
    model = CompiledModel.of(prepared)
    (_, _, gate_up, down), (_, _, gate_up_scale, down_scale) = model.weights, model.scales
    (router, router_scale), traits = model.router, model.traits
    tokens, number = len(given), given.numpy().dtype
    widths = router.shape[1] * 16, EXPERTS, HIDDEN, HIDDEN
    routing = [np.full((tokens, width), 7, number) for width in widths]
    total = torch.ones(tokens, HIDDEN, dtype=given.dtype)
    mixed(
        given.numpy(),
        (router[1], router_scale[1]),
        (gate_up[1], gate_up_scale[1], down[1], down_scale[1]),
        (traits[ACTIVATION], traits[TOP_K], traits[NORMALISED]),
        np.full((tokens, prepared.sizes.wide), 7, number),
        (*routing, np.zeros(tokens, np.int64)),
        total.numpy(),
        tokens,
        np.zeros(64, np.int64),  # nobody helps
    )
    return total - 1


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 8, 21])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("weights", ["float32", "float64", "int8", "bfloat16"])
def test_each_token_goes_through_its_own_experts(weights, normalised, top_k, tokens):
    dtype = torch.float64 if weights == "float64" else torch.float32
    narrow = weights == "bfloat16"
    model = model_of(top_k, normalised, dtype=torch.bfloat16 if narrow else dtype)
    prepared = fuse(Decoder(model), narrowed if narrow else None)
    if weights == "int8":
        prepared.layers[:] = [quantised(layer) for layer in prepared.layers]
    near = 0.03 if weights == "int8" else 1e-5
    own = copy.deepcopy(model.model.layers[1]).to(dtype)
    given = torch.randn(tokens, HIDDEN, dtype=dtype)
    # What folding the norm's gain in leaves to be given.
    gained = given * own.post_attention_layernorm.weight * HIDDEN**0.5
    theirs = own.mlp(gained[None])[0]
    ours = torch.zeros_like(given)
    add_mixture(ours, given, prepared.layers[1], prepared.sizes, prepared.traits)
    by_kernels = by_kernel(prepared, gained if narrow else given)
    for found in (ours, by_kernels):
        torch.testing.assert_close(found, theirs, rtol=0, atol=near * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 1}, {}],
    ids=["one", "one of six", "two of six"],
)
def test_texts_are_the_modules(changes):
    ids, texts = torch.arange(5, 17)[None], []
    for engine in ("module", "fused", "compiled"):
        model = adaptive_gen.wrap(model_of(**changes), exit_layers=(1, 2), engine=engine)
        settings = {
            "adaptive": True,
            "threshold": 0.1,
            "max_new_tokens": 24,
            "schedule": "stepwise",
        }
        out = model.generate(ids, return_dict_in_generate=True, **settings)
        texts.append((out.sequences.tolist(), out.exit_layers.tolist()))
        assert set(out.exit_layers.flatten().tolist()) == {1, 2}
    assert texts[0] == texts[1] == texts[2]


@torch.no_grad()
@pytest.mark.parametrize("weights", ["float32", "int8", "bfloat16"])
def test_what_is_compiled_for_one_mlp_is_what_runs_a_mixture(weights):
    kinds = []
    for family in ("llama", "qwen3_moe"):
        model = families.make(family, torch.bfloat16 if weights == "bfloat16" else torch.float32)
        prepared = fuse(Decoder(model), narrowed if weights == "bfloat16" else None)
        if weights == "int8":
            prepared.layers[:] = [quantised(layer) for layer in prepared.layers]
        kinds.append(numba.typeof(CompiledModel.of(prepared).layers))
    assert kinds[0] == kinds[1]


def test_weights_of_experts_that_change_are_read_anew():
    model = adaptive_gen.wrap(model_of(), exit_layers=(1, 2), engine="compiled")
    ids = torch.arange(5, 17)[None]

    def text():
        return model.generate(ids, adaptive=True, threshold=1.0, max_new_tokens=12).tolist()

    before = text()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(-1)
    after = text()
    assert after != before
    assert after == model.generate(ids, do_sample=False, max_new_tokens=12).tolist()


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("dots1", {}, "have shared_experts.gate_proj.weight besides"),
        ("gpt_oss", {}, "its swiglu_limit is not computed here|have router.bias besides"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "differ in kind"),
        ("qwen3_moe", {"moe_intermediate_size": 28}, "56 and 32 outputs are no multiples of 16"),
    ],
)
def test_of_other_mixtures_it_is_said_why(family, config, reason):
    model = families.make(family, **config)
    with pytest.raises(adaptive_gen.AdaptiveGenError, match=reason):
        adaptive_gen.wrap(model, exit_layers=(2, 4), engine="compiled")
    out = adaptive_gen.wrap(model, exit_layers=(2, 4)).generate(
        torch.arange(5, 9)[None],
        adaptive=True,
        max_new_tokens=2,
        return_dict_in_generate=True,
    )
    assert out.report.engine == ("fused" if "outputs" in reason else "module")
