"""What is read off a family's layers: where its norms are, what they multiply by, what is turned.

That layers prepared from it are the model's is shown for every family in test_equivalence.py.
"""

from concurrent.futures import ThreadPoolExecutor

import families
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import adaptive_gen
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine.cache import KVCache, side_by_side
from adaptive_gen.engine.fusing import fuse
from adaptive_gen.engine.layer_parts import GELU, GELU_TANH, RELU, RELU2, SILU, Unfit
from adaptive_gen.engine.norms import gain, is_centred, shift, shifts
from adaptive_gen.engine.turns import HALVES, NEIGHBOURS, rotation_of
from adaptive_gen.settings import state


@torch.no_grad()
def fused(family):
    return fuse(Decoder(families.make(family)))


@pytest.mark.parametrize(
    ("family", "normed_first", "normed_after", "whole_heads", "activation"),
    [
        ("llama", True, False, False, SILU),
        ("qwen3", True, False, False, SILU),
        ("gemma", True, False, False, GELU_TANH),
        ("gemma3_text", True, True, False, GELU_TANH),
        ("glm4", True, True, False, SILU),
        ("olmo2", False, True, True, SILU),
        ("exaone4", False, True, False, SILU),
        ("gpt2", True, False, False, GELU_TANH),
        ("gpt_neox", True, False, False, GELU),
        ("opt", True, False, False, RELU),
        ("nemotron", True, False, False, RELU2),
    ],
)
def test_norms_and_gates_are_found_where_a_family_has_them(
    family, normed_first, normed_after, whole_heads, activation
):
    model = fused(family)
    assert (model.traits.normed_first, model.traits.whole_heads) == (normed_first, whole_heads)
    assert model.traits.activation == activation
    for layer in model.layers:
        assert (layer.mixed_gain is not None) == (layer.output_gain is not None) == normed_after


@pytest.mark.parametrize(
    ("family", "gated", "centred", "parallel"),
    [
        ("llama", True, False, False),
        ("arcee", False, False, False),
        ("stablelm", True, True, False),
        ("stablelm_parallel", True, True, True),
        ("gpt_neox", False, True, True),
        ("gpt_neox_serial", False, True, False),
        ("falcon", False, True, True),
        ("falcon_eager", False, True, False),
        ("phi", False, True, True),
        ("gpt2", False, True, False),
    ],
)
def test_it_is_seen_what_an_mlp_is_given_and_whether_it_has_a_gate(
    family, gated, centred, parallel
):
    model = fused(family)
    assert (model.sizes.gated, model.sizes.centred) == (gated, centred)
    assert model.traits.parallel == parallel


@pytest.mark.parametrize(
    ("family", "offset"), [("llama", 0.0), ("gemma3_text", 1.0), ("nemotron", 1.0), ("cohere", 0.0)]
)
def test_a_gain_is_what_a_norm_multiplies_by(family, offset):
    norm = families.make(family).model.norm
    torch.testing.assert_close(gain(norm), (offset + norm.weight) * 32**0.5)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 5, 32])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_is_known_by_what_it_does(size, bias):
    norm = torch.nn.LayerNorm(size, bias=bias)
    for parameter in norm.parameters():
        parameter.normal_()
    torch.testing.assert_close(gain(norm), norm.weight * size**0.5)
    assert shifts(norm) == bias
    torch.testing.assert_close(shift(norm), norm.bias if bias else torch.zeros(size))
    root_mean_square = torch.nn.RMSNorm(size, eps=1e-5)
    assert (is_centred(norm), is_centred(root_mean_square)) == (size > 1, False)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
def test_a_llama_with_biases_everywhere_and_another_activation_is_computed(tiny_llama, activation):
    model = tiny_llama(hidden_act=activation, mlp_bias=True, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    model = adaptive_gen.wrap(model, engine="compiled")
    ids, settings = torch.arange(3, 11)[None], {"max_new_tokens": 12, "do_sample": False}
    ours = model.generate(ids, adaptive=True, threshold=1.0, **settings)
    assert torch.equal(ours, model.generate(ids, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "pairing"),
    [("llama", HALVES), ("phi3_partial", HALVES), ("glm4", NEIGHBOURS), ("helium", NEIGHBOURS)],
)
def test_what_a_layer_turns_together_is_seen_in_its_keys(family, pairing, dtype):
    decoder = Decoder(families.make(family, dtype))
    assert {rotation_of(decoder, index) for index in range(decoder.n_layers)} == {pairing}


def test_layers_are_turned_by_their_own_embedding_or_not_at_all():
    assert fused("smollm3").turns.of_layer == [0, 1, 0, 0, 1, 0]
    assert fused("gemma3_text").turns.of_layer == [0, 1, 0, 1, 0, 1]
    assert fused("exaone4").turns.of_layer == [0, 1, 0, 1, 0, 1]
    assert len(fused("llama").turns) == 1


def test_layers_that_cache_a_key_for_each_query_are_refused():
    """Falcon's later ones project one for several, and repeat it in the cache."""
    with pytest.raises(Unfit, match="other heads"):
        fused("falcon_grouped")


def test_keys_turned_otherwise_are_refused():
    """Hunyuan norms queries and keys behind the rotation."""
    with pytest.raises(Unfit, match="keys are turned in another way"):
        fused("hunyuan_v1_dense")


def test_what_bends_numbers_too_little_to_be_seen_is_refused_all_the_same():
    model = adaptive_gen.wrap(families.make("olmo", clip_qkv=1e6))
    assert state(model).backend.name == "module"
    assert "clip_qkv" in state(model).backend.reason


def test_scores_are_capped_where_the_models_attention_caps_them():
    """Gemma 3 has the setting and takes no heed of it; few tokens do not show a high cap."""
    with torch.no_grad():
        eager = fuse(Decoder(families.make("gemma2", attn_implementation="eager")))
    assert eager.traits.softcap == 5.0
    model = adaptive_gen.wrap(families.make("gemma3_text", attn_logit_softcapping=1e6))
    assert state(model).backend.name == "module"
    assert "attn_logit_softcapping is not known" in state(model).backend.reason


@pytest.mark.parametrize("width", [0, 4, 8])
def test_a_caches_keys_are_put_in_another_order_and_back(width):
    cache, keys = KVCache(1), torch.randn(1, 2, 5, 8)
    cache.update(keys, keys, 0)
    for order in (width, 8, width, 0):
        cache.pair(order)
        stored = cache.update(keys[:, :, :0], keys[:, :, :0], 0)[0]
        assert torch.equal(stored[..., :order], side_by_side(keys[..., :order]))
        assert torch.equal(stored[..., order:], keys[..., order:])
        assert torch.equal(cache.keys_values(0)[0], keys)


@pytest.mark.parametrize("bias", [30.0, 300.0])
def test_a_rotation_is_seen_beside_a_large_key_that_hardly_turns(bias):
    """As a slow pair's does for a thousand positions."""
    model = families.make("qwen2", head_dim=16, max_position_embeddings=4096)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[7] = bias
    decoder = Decoder(model)
    assert {rotation_of(decoder, index) for index in range(decoder.n_layers)} == {HALVES}


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_a_layer_that_gives_something_else_is_seen_beside_a_large_coordinate(family):
    """Where it adds a thousandth of what it is given, and tokens come with that already."""
    model = families.make(family)
    model.model.embed_tokens.weight[:, 5] = 1e5
    assert len(fuse(Decoder(model)).layers) == families.N_LAYERS
    model.model.layers[2].self_attn.o_proj.register_forward_hook(lambda *a: 1.5 * a[-1].roll(1, -1))
    with pytest.raises(Unfit, match="compute something else"):
        fuse(Decoder(model))


@torch.no_grad()
def test_layers_of_which_one_has_a_bias_are_left_to_the_modules(tiny_llama):
    model = tiny_llama()
    model.model.layers[2].self_attn.o_proj.bias = torch.nn.Parameter(torch.randn(32))
    model = adaptive_gen.wrap(model)
    assert state(model).backend.name == "module"
    assert "differ in kind" in state(model).backend.reason


class SiluTimes(torch.nn.Module):
    """An activation that takes what it lets through as well."""

    def forward(self, gate, up):
        return torch.nn.functional.silu(gate) * up


class OtherMLP(LlamaMLP):
    """An MLP with such an activation."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


@pytest.mark.parametrize("what", ["norms", "order", "activation"])
def test_layers_built_otherwise_are_left_to_the_modules_or_done_right(tiny_llama, what):
    model = tiny_llama()
    for layer in model.model.layers:
        if what == "norms":  # whose eps is that of the dtype, and not said
            layer.input_layernorm = torch.nn.RMSNorm(32)
        if what == "activation":
            layer.mlp.act_fn, layer.mlp.__class__ = SiluTimes(), OtherMLP
    if what == "order":  # their indices stay what they were
        first, second, *others = model.model.layers
        model.model.layers = torch.nn.ModuleList([second, first, *others])
    model = adaptive_gen.wrap(model)
    expected = "compiled" if what == "activation" else "module"
    assert state(model).backend.name == expected
    ids = torch.arange(3, 11)[None]
    settings = {"max_new_tokens": 12, "do_sample": False}
    ours = model.generate(ids, adaptive=True, threshold=1.0, **settings)
    assert torch.equal(ours, model.generate(ids, **settings))


def test_more_layer_types_than_layers_do_no_harm():
    model = families.make("gemma3_uncapped")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:4], 4
    assert state(adaptive_gen.wrap(model)).backend.name == "compiled"


def test_a_table_of_rotations_serves_threads_that_ask_for_other_lengths():
    turns, like = fused("llama").turns, torch.zeros(1)
    with ThreadPoolExecutor(4) as pool:
        asked = [10, 3000, 300, 2000] * 50
        found = pool.map(lambda stop: (stop, len(turns.table(like, stop))), asked)
        assert all(length >= stop for stop, length in found)


def test_queries_that_grow_with_their_position_are_left_to_the_modules(tiny_llama):
    """As Ministral 3's do beyond the length it was trained on, which few tokens do not show."""
    model = tiny_llama()
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.1
    model = adaptive_gen.wrap(model)
    assert state(model).backend.name == "module"
    assert "llama_4_scaling_beta" in state(model).backend.reason


def test_a_final_norm_that_does_not_say_its_eps_is_called_itself(tiny_llama):
    model = tiny_llama()
    model.model.norm = torch.nn.RMSNorm(32)
    model = adaptive_gen.wrap(model)
    ids, settings = torch.arange(3, 11)[None], {"max_new_tokens": 12, "do_sample": False}
    ours = model.generate(ids, adaptive=True, threshold=1.0, **settings)
    assert torch.equal(ours, model.generate(ids, **settings))
