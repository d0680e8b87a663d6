"""Models of chosen shapes with random weights, on which every exit agrees with full depth.

What a token costs does not depend on the weights' values. Layers behind the shallowest exit add
nothing here, so all depths give one text and a drafted token is always right: the best case of
every method that drafts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import adaptive_gen
from adaptive_gen.engine.layer_parts import LayerParts
from adaptive_gen.naming import Parts


@dataclass(frozen=True)
class Shape:
    """What a configuration needs."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    family: str = "llama"  # its `model_type`
    dtype: torch.dtype = torch.bfloat16  # on a CPU
    experts: int = 0  # MLPs of a layer, where it has a mixture of them
    top_k: int = 0  # of which a token goes through so many

    def exit_at(self, share: float) -> int:
        """The exit layer at a share of the depth, rounded, at least 1."""
        return max(1, round(share * self.layers))


SMALL = (
    Shape("5x64", 5, 64, 176, 4, 4, 16, 512, tied=True, dtype=torch.float32),
    Shape("8x128", 8, 128, 352, 4, 4, 32, 4096, tied=True, dtype=torch.float32),
    Shape("16x256", 16, 256, 704, 8, 8, 32, 8192, tied=True, dtype=torch.float32),
    Shape("24x512", 24, 512, 1408, 16, 16, 32, 8192, tied=True, dtype=torch.float32),
)
TRUE = (
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32000),
    Shape("Llama-2-13B", 40, 5120, 13824, 40, 40, 128, 32000),
)
# Families that norm otherwise, pair otherwise, or have other gates, none, or experts; measured when
# named.
OTHERS = (
    Shape("GPT-2", 12, 768, 3072, 12, 12, 64, 50257, tied=True, family="gpt2", dtype=torch.float32),
    Shape("Pythia-410M", 24, 1024, 4096, 16, 16, 64, 50304, family="gpt_neox", dtype=torch.float32),
    Shape("Gemma-3-270M", 18, 640, 2048, 4, 1, 256, 262144, tied=True, family="gemma3_text"),
    Shape("Gemma-3-1B", 26, 1152, 6912, 4, 1, 256, 262144, tied=True, family="gemma3_text"),
    Shape("OLMo-2-1B", 16, 2048, 8192, 16, 16, 128, 100352, family="olmo2"),
    Shape(
        "Granite-MoE-1B",
        24,
        1024,
        512,
        16,
        8,
        64,
        49155,
        tied=True,
        family="granitemoe",
        experts=32,
        top_k=8,
    ),
)
BY_NAME = {shape.name: shape for shape in (*SMALL, *TRUE, *OTHERS)}


def build(
    shape: Shape,
    exit_layers: Iterable[int],
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    engine: str = "auto",
) -> Any:
    """A wrapped random model whose layers behind the first of `exit_layers` add nothing.

    Args:
        shape: of the model.
        exit_layers: ascending.
        device: "cpu" or "cuda".
        dtype: of the weights.
        seed: of the weights.
        engine: see `adaptive_gen.wrap`.
    """
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[shape.family](
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=16384,
        eos_token_id=None,
        pad_token_id=0,
        **({"num_local_experts": shape.experts} if shape.experts else {}),
        **({"num_experts_per_tok": shape.top_k} if shape.top_k else {}),
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers = list(exit_layers)
    with torch.no_grad():
        for layer in Parts(model).layers[layers[0] :]:
            parts = LayerParts.of(layer, model.config)
            for added in (parts.out, parts.biases[-1], parts.down, parts.mlp_biases[-1]):
                if added is not None:
                    added.zero_()
    return adaptive_gen.wrap(model, layers, engine=engine)


def truncated(model: Any, layers: int) -> Any:
    """The first `layers` layers as a wrapped model that shares all weights."""
    settings = {**model.config.to_dict(), "num_hidden_layers": layers}
    for name in ("layer_types", "no_rope_layers"):
        if settings.get(name):
            settings[name] = settings[name][:layers]
    config = type(model.config).from_dict(settings)
    config.exit_layers = [layers]
    with torch.device("meta"):
        short = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    base, every = model.get_decoder(), Parts(model).layers
    for name, part in base.named_children():
        setattr(short.get_decoder(), name, every[:layers] if part is every else part)
    short.set_output_embeddings(model.get_output_embeddings())
    short.generation_config = type(model.generation_config).from_dict(
        model.generation_config.to_dict()
    )
    return adaptive_gen.wrap(short, [layers])


def decode_bytes(model: Any) -> int:
    """Bytes of weights read for one token at full depth.

    These are all but the embedding's other rows, and other experts.
    """
    read = [*Parts(model).layers.parameters(), model.get_output_embeddings().weight]
    every = sum(weight.numel() * weight.element_size() for weight in read)
    for layer in Parts(model).layers:
        parts = LayerParts.of(layer, model.config)
        if parts.experts is not None:
            others = 1 - parts.experts.top_k / len(parts.experts.router)
            size = sum(weight.numel() for weight in (parts.up, parts.down))
            every -= round(others * size) * parts.up.element_size()
    return every


def mean_depth(shape: Shape, exit_layer: int, deep: float) -> float:
    """Layers per token where a share `deep` runs at full depth and the rest leaves early."""
    return deep * shape.layers + (1 - deep) * exit_layer


def script(exit_layer: int, full: int, deep: float, tokens: int) -> list[int]:
    """Exit layers by position: a share `deep` of them full depth, spread evenly."""
    return [
        full if math.floor((i + 1) * deep) > math.floor(i * deep) else exit_layer
        for i in range(tokens)
    ]
