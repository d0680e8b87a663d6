"""Tiny random models of every family the equivalence tests speak about.

Each differs from plain Llama in what the note says; the sizes are small enough for float64 and the
windows short enough that the tests' texts slide past them.
"""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 16
ALTERNATING = ["sliding_attention", "full_attention"] * 3

FAMILIES = {
    "llama": {"tie_word_embeddings": True},  # GQA, tied head
    "llama_eager": {"attn_implementation": "eager"},
    "llama_dynamic_rope": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    },
    "mistral": {"sliding_window": WINDOW},  # one window for all layers
    "qwen2": {"layer_types": ALTERNATING, "sliding_window": WINDOW, "use_sliding_window": True},
    "qwen3": {},  # norms on queries and keys
    "gemma2": {  # scaled embeddings, post-norms, soft-capped logits and attention, mixed windows
        "sliding_window": WINDOW,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,  # tied and scaled, a random model only repeats itself
    },
    "olmo2": {},  # norms after attention and MLP only
    "phi3": {"sliding_window": WINDOW},  # fused qkv and gate/up
    "granite": {  # multipliers everywhere
        "embedding_multiplier": 6.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
}


# Families whose layers the back end `fused` computes too.
FUSED = ("llama", "llama_eager", "llama_dynamic_rope", "mistral", "qwen2", "qwen3")


def make(family: str, dtype=torch.float32, seed=0, **config):
    """A random model of `family`, in eval mode; equal arguments, equal weights."""
    settings = {**SIZES, **FAMILIES[family], **config}
    attention = settings.pop("attn_implementation", None)
    name = family.split("_")[0]
    torch.manual_seed(seed)
    model_config = CONFIG_MAPPING[name](**settings)
    model = AutoModelForCausalLM.from_config(
        model_config, **({"attn_implementation": attention} if attention else {})
    )
    # Configurations may name an end of text of their own; these tests want every token.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            # Gains of 1 and biases of 0 would hide a norm or bias that is left out.
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()
