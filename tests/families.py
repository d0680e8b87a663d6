"""Tiny random models of every family that is claimed to work, and of some that are refused.

One table: the equivalence tests run over it, and the README's support table is made from it
(support_table.py). The sizes are small enough for float64 and the windows short enough that the
tests' texts slide past them; what a family multiplies, caps or norms is set so that it matters.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N_LAYERS = 6
WINDOW = 16
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied, some random models only repeat the last token
}
ALTERNATING = ["sliding_attention", "full_attention"] * 3
MIXED = {"layer_types": ALTERNATING, "sliding_window": WINDOW}
SLIDING = {"sliding_window": WINDOW}
OWN_NAMES = {"num_key_value_heads": None, "head_dim": None}  # None: leave it out


@dataclass(frozen=True)
class Family:
    """One model of the table; the key there is its `model_type` unless that is given."""

    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""  # for the README; families with equal notes share a row
    model_type: str = ""  # of a variant, which has no row in the README
    attention: str | None = None  # implementation, where not transformers' choice
    tolerance: float = 1e-10  # of K/V in float64; above that, the table says why
    keys_by_length: bool = False  # keys depend on the length of the text when they were made


FAMILIES = {
    "llama": Family({"tie_word_embeddings": True}),
    "llama_eager": Family(model_type="llama", attention="eager"),
    "llama_dynamic_rope": Family(
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        model_type="llama",
        keys_by_length=True,
    ),
    "mistral": Family(SLIDING),
    "ministral": Family(MIXED),
    "qwen2": Family({**MIXED, "use_sliding_window": True}),
    "qwen3": Family({**MIXED, "use_sliding_window": True}, "norms on queries and keys"),
    "gemma": Family(note="scaled embeddings"),
    "gemma2": Family(
        {
            **MIXED,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
        },
        "scaled embeddings, soft-capped logits",
    ),
    "gemma3_text": Family(
        {**MIXED, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "scaled embeddings, soft-capped logits",
    ),
    "gemma3_uncapped": Family({**MIXED, "query_pre_attn_scalar": 8}, model_type="gemma3_text"),
    "vaultgemma": Family(
        {
            **MIXED,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
        },
        "scaled embeddings, soft-capped logits",
    ),
    "phi3": Family(SLIDING),
    "phi3_partial": Family(
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        model_type="phi3",
    ),
    "smollm3": Family({"no_rope_layers": [1, 0, 1, 1, 0, 1]}, "some layers without positions"),
    "olmo": Family({"clip_qkv": 2.0}),
    "olmo2": Family(),
    "olmo3": Family(MIXED),
    "granite": Family(
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
        "multipliers",
    ),
    "granitemoe": Family(
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "num_local_experts": 4,
        },
        "multipliers, mixture of experts",
    ),
    "glm": Family({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "glm4": Family({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "cohere": Family({"logit_scale": 0.3}, "multipliers"),
    "cohere_normed": Family({"logit_scale": 0.3, "use_qk_norm": True}, model_type="cohere"),
    "cohere2": Family({**MIXED, "logit_scale": 0.3}, "multipliers"),
    "starcoder2": Family(SLIDING),
    "stablelm": Family({"use_qkv_bias": True}),
    "stablelm_parallel": Family({"use_parallel_residual": True}, model_type="stablelm"),
    "stablelm_normed": Family({"qk_layernorm": True}, model_type="stablelm"),
    "olmoe": Family({"num_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    "mixtral": Family({**SLIDING, "num_local_experts": 4}, "mixture of experts"),
    "qwen3_moe": Family(
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "mixture of experts",
    ),
    "dots1": Family(
        {
            **MIXED,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 24,
        },
        "mixture of experts",
        # Its router multiplies in float32, where a sum depends on how many tokens are multiplied
        # at once. (All routers share a limit: two experts that tie to rounding may swap.)
        tolerance=1e-5,
    ),
    "gpt_oss": Family(
        {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "mixture of experts",
    ),
    "nemotron": Family(),
    "exaone4": Family(MIXED),
    "ernie4_5": Family(),
    "helium": Family(),
    "seed_oss": Family(),
    "apertus": Family(),
    "arcee": Family(),
    "hunyuan_v1_dense": Family(),
    "bitnet": Family(),
    "diffllama": Family(),
    "jais2": Family(),
    "gpt2": Family({**OWN_NAMES, "scale_attn_by_inverse_layer_idx": True}, "learned positions"),
    "opt": Family({**OWN_NAMES, "ffn_dim": 48, "init_std": 0.3}, "learned positions"),
    "opt_350m": Family(
        {
            **OWN_NAMES,
            "ffn_dim": 48,
            "init_std": 0.3,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 24,
        },
        model_type="opt",
    ),
    "gpt_neox": Family(OWN_NAMES),
    "gpt_neox_serial": Family({**OWN_NAMES, "use_parallel_residual": False}, model_type="gpt_neox"),
    "falcon": Family(OWN_NAMES),
    "falcon_grouped": Family(
        {**OWN_NAMES, "new_decoder_architecture": True, "num_kv_heads": 2}, model_type="falcon"
    ),
    "falcon_eager": Family(
        {**OWN_NAMES, "multi_query": False, "parallel_attn": False},
        model_type="falcon",
        attention="eager",
    ),
    "phi": Family(),
    "phi_normed": Family({"qk_layernorm": True}, model_type="phi"),
}

# Families that are refused: a tiny configuration, words of the reason given, and why (README).
REFUSED = {
    "nanochat": ({}, "differs from the model itself", "norms its embeddings"),
    "gemma3n_text": (
        {
            "num_kv_shared_layers": 2,
            "layer_types": ALTERNATING,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
        },
        "per_layer_input",
        "inputs of its own for every layer",
    ),
    "qwen3_next": ({}, "linear_attention", "linear attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 3}, "type conv", "convolutions"),
    "mamba": ({}, "linear_attention", "state space"),
    "llama4_text": ({}, "chunked_attention", "chunked attention"),
    "bloom": (OWN_NAMES, "has no rotary_emb", "ALiBi positions"),
    "falcon": ({**OWN_NAMES, "alibi": True}, "ALiBi", "with `alibi=True`"),
}


def make(family, dtype=torch.float32, seed=0, **config):
    """A random model of `family`, in eval mode; equal arguments, equal weights."""
    entry = FAMILIES[family]
    return build(
        entry.model_type or family, {**entry.config, **config}, entry.attention, dtype, seed
    )


def build(model_type, config, attention=None, dtype=torch.float32, seed=0):
    """A random model of any type; the test is skipped if this transformers lacks it."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    settings = {**SIZES, **config}
    settings = {k: v for k, v in settings.items() if v is not None or k not in OWN_NAMES}
    attention = settings.pop("attn_implementation", attention)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**settings),
        **({"attn_implementation": attention} if attention else {}),
    )
    if dtype == torch.float64:  # which the grouped matrix product of the experts does not know
        model.config._experts_implementation = "eager"
    # Configurations may name an end of text of their own; these tests want every token.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            # Gains of 1 and biases of 0 would hide a norm or bias that is left out.
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


# Families whose layers the back end `graphs` computes too.
GRAPHED = (
    "llama",
    "llama_eager",
    "llama_dynamic_rope",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "seed_oss",
)
# Families whose layers the back ends `fused` and `compiled` compute too.
FUSED = (
    *GRAPHED,
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3_uncapped",
    "vaultgemma",
    "phi3",
    "phi3_partial",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "granitemoe",
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "glm",
    "glm4",
    "exaone4",
    "ernie4_5",
    "helium",
    "gpt2",
    "opt",
    "gpt_neox",
    "gpt_neox_serial",
    "falcon",
    "falcon_eager",
    "phi",
    "stablelm",
    "stablelm_parallel",
    "starcoder2",
    "cohere",
    "cohere2",
    "nemotron",
    "arcee",
    "jais2",
)
# Of these, one or more for everything that differs: biases, windows, norms of heads one by one or
# together, norms before, behind or both, GELU, factors, layers without positions, rotations by
# layer, of half of the coordinates, of halves and of neighbours, matrices that come as one, an MLP
# without a gate or beside attention, LayerNorm, a bias of the head, learned positions, soft caps,
# experts.
PARTICULAR = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_uncapped",
    "olmo2",
    "granite",
    "smollm3",
    "phi3_partial",
    "glm4",
    "gpt2",
    "gpt_neox",
    "phi",
    "nemotron",
    "cohere",
    "qwen3_moe",
)
