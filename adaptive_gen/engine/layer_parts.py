"""The parts of a decoder layer, whatever a family calls them and wherever it puts its norms.

What a family does besides shows when a prepared layer is compared with the module, on a few tokens:
only what those cannot show is looked for here.

Axes: `out`, `in`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# What the gate, or all of the MLP, goes through, by the names of `kernels.layers`.
SILU, GELU_TANH, GELU, RELU, RELU2 = "silu", "gelu_tanh", "gelu", "relu", "relu2"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    SILU: F.silu,
    GELU_TANH: partial(F.gelu, approximate="tanh"),
    GELU: F.gelu,
    RELU: F.relu,
    RELU2: lambda x: F.relu(x).square(),
}
# What parts are called: by Llama and others of its time first, then by GPT-2, GPT-NeoX, OPT, Phi,
# StarCoder 2 and Falcon.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_QKV = ("qkv_proj", "c_attn", "query_key_value")
_OUT = ("o_proj", "c_proj", "dense", "out_proj")
_UP = ("up_proj", "c_fc", "dense_h_to_4h", "fc1")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2")
_ACTIVATION = ("act_fn", "activation_fn", "act")
_FIRST_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm", "ln_attn")
_MLP = ("mlp", "block_sparse_moe")
_ROUTER = ("gate", "router")
_SECOND_NORM = (
    "post_attention_layernorm",
    "ln_2",
    "final_layer_norm",
    "ln_mlp",
    "pre_feedforward_layernorm",
)
_BY_GROUP = "query_key_value"  # has a key head's queries, its key and its value together
_CAPPED = ("Gemma2Attention", "VaultGemmaAttention")
# Settings that change numbers larger, or positions later, than those that are compared.
_HIDDEN = (
    "clip_qkv",
    "llama_4_scaling_beta",
    "swiglu_limit",
    "swiglu_limits",
    "moe_router_logit_softcapping",
)


class Unfit(Exception):
    """Why a model cannot be run by a back end; the message is for the user."""


def other_layers(layer: Any, error: Exception) -> Unfit:
    """What a user is told of a layer that a back end does not know, as `error` has shown."""
    # A part that is missing is what being of another kind means; all else is worth naming.
    shown = "" if isinstance(error, AttributeError) else f" ({type(error).__name__}: {error})"
    return Unfit(
        f"its layers ({type(layer).__name__}) are not built like those computed there, such as "
        f"Llama's or Qwen's{shown}"
    )


@dataclass(frozen=True)
class LayerParts:
    """One layer's weights, [out, in] each and as the module has them, and what is done between.

    Norms are modules, or None where there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    gate: Tensor | None
    up: Tensor  # of a mixture of experts gates as well, as `Experts` has them
    down: Tensor
    biases: tuple[Tensor | None, ...]  # of queries, keys, values, and of what attention gives
    mlp_biases: tuple[Tensor | None, ...]  # of gate, up and down
    attention_norm: Any  # of what attention is given
    mlp_norm: Any
    mixed_norm: Any  # of what attention gives, before it is added
    output_norm: Any  # of what the MLP gives
    parallel: bool  # whether the MLP is given what attention is, and not what that made of it
    query_norm: Any
    key_norm: Any
    head_dim: int
    scaling: float  # of scores
    multiplier: float  # of what attention and the MLP give, before it is added
    activation: str
    softcap: float | None  # what scores are bent below
    experts: "Experts | None"

    @classmethod
    def of(cls, layer: Any, config: Any) -> "LayerParts":
        """Find the parts of a model's layer.

        Raises:
            Unfit: one is of another kind.
            Exception: of any kind, where the layer is not built like this.
        """
        rope = getattr(config, "rope_parameters", None) or {}
        for name in _HIDDEN:
            if getattr(config, name, None) is not None or rope.get(name) is not None:
                raise Unfit(f"its {name} is not computed here")
        attention, mlp = _part(layer, _ATTENTION), _part_or_none(layer, _MLP) or layer
        head_dim = attention.head_size if hasattr(attention, "head_size") else attention.head_dim
        query, key, value, *biases = _projections(attention, head_dim, config)
        out, out_bias = _linear(_part(attention, _OUT))
        experts = Experts.of(mlp) if hasattr(mlp, "experts") else None
        if experts is None:
            down, down_bias = _linear(_part(mlp, _DOWN))
            gate, up, *mlp_biases = _gate_and_up(mlp)
        else:
            mlp, gate, mlp_biases, down_bias = mlp.experts, None, [None, None], None
            up, down = mlp.gate_up_proj.flatten(0, 1), mlp.down_proj.flatten(0, 1)
        return cls(
            query,
            key,
            value,
            out,
            gate,
            up,
            down,
            (*biases, out_bias),
            (*mlp_biases, down_bias),
            *_norms(layer),
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
            head_dim,
            getattr(attention, "scaling", head_dim**-0.5),
            float(getattr(layer, "residual_multiplier", 1.0)),
            _activation(_part(mlp, _ACTIVATION)),
            _softcap(attention, config),
            experts,
        )

    @property
    def norms(self) -> list[Any]:
        """Those of hidden states that there are."""
        every = self.attention_norm, self.mlp_norm, self.mixed_norm, self.output_norm
        return [norm for norm in every if norm is not None]

    @property
    def whole_heads(self) -> bool:
        """Whether queries, and keys, are normed all heads together."""
        return self.query_norm is not None and self.query_norm.weight.numel() > self.head_dim


@dataclass(frozen=True)
class Experts:
    """What chooses a token's experts, of a layer that has a mixture of them for its MLP.

    Their matrices lie one below the other in `LayerParts`, an expert's gate above what it lets
    through.
    """

    router: Tensor  # [experts, in]
    top_k: int  # experts of a token
    normalised: bool  # whether a token's shares add up to 1

    @classmethod
    def of(cls, mlp: Any) -> "Experts":
        """Find them."""
        router = _part(mlp, _ROUTER)
        known = router.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj
        for name, own in (*mlp.named_parameters(), *mlp.named_buffers()):
            if not any(own is part for part in known):
                raise Unfit(f"its mixtures of experts have {name} besides")
        # Not every router says whether it normalises: what comes of it is compared.
        return cls(router.weight, router.top_k, getattr(router, "norm_topk_prob", True))


def _part(module: Any, names: Sequence[str]) -> Any:
    """The part that a module has under the first of these names; `AttributeError` if under none."""
    found = _part_or_none(module, names)
    if found is None:
        raise AttributeError(f"no {names[0]}")
    return found


def _part_or_none(module: Any, names: Sequence[str]) -> Any:
    return next((part for name in names if (part := getattr(module, name, None)) is not None), None)


def _projections(attention: Any, head_dim: int, config: Any) -> tuple[Any, ...]:
    """Weights of queries, keys and values, and their biases."""
    together = _part_or_none(attention, _QKV)
    if together is None:
        found = [_linear(getattr(attention, f"{name}_proj")) for name in "qkv"]
        weights, biases = zip(*found, strict=True)
        return *weights, *biases
    weight, bias = _linear(together)
    heads = config.num_attention_heads
    kv_heads = (len(weight) // head_dim - heads) // 2
    by_group = hasattr(attention, _BY_GROUP)

    def parts(rows: Tensor) -> list[Tensor]:
        if not by_group:
            return [*rows.split([count * head_dim for count in (heads, kv_heads, kv_heads)])]
        groups = rows.unflatten(0, (kv_heads, -1, head_dim))
        return [
            groups[:, chosen].flatten(0, 2)
            for chosen in (slice(-2), slice(-2, -1), slice(-1, None))
        ]

    return *parts(weight), *((None,) * 3 if bias is None else parts(bias))


def _gate_and_up(mlp: Any) -> tuple[Any, ...]:
    """Weights of the gate, if there is one, and of what it lets through, and their biases."""
    if hasattr(mlp, "gate_up_proj"):
        weight, bias = _linear(mlp.gate_up_proj)
        return *weight.chunk(2), *((None, None) if bias is None else bias.chunk(2))
    up, up_bias = _linear(_part(mlp, _UP))
    gate, gate_bias = _linear(mlp.gate_proj) if hasattr(mlp, "gate_proj") else (None, None)
    return gate, up, gate_bias, up_bias


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weights [out, in] and bias."""
    if type(module) is Conv1D:
        return module.weight.t(), module.bias
    name = type(module).__name__
    if type(module) is not nn.Linear and name != "FalconLinear":
        kind = f"{type(module).__module__.split('.')[0]}'s {name}"
        raise Unfit(f"it has {kind} in place of a linear layer")
    return module.weight, module.bias


def _norms(layer: Any) -> tuple[Any, Any, Any, Any, bool]:
    """The norms before attention and the MLP, those of what they give, and if they are parallel."""
    first, after = _part_or_none(layer, _FIRST_NORM), _part_or_none(layer, _SECOND_NORM)
    last = getattr(layer, "post_feedforward_layernorm", None)
    if last is not None:  # Gemma 2 and 3, which have all four; OLMo 2 and 3 and EXAONE 4
        return first, getattr(layer, "pre_feedforward_layernorm", None), after, last, False
    if after is None:  # Phi, Cohere, some of Falcon
        return first, first, None, None, True
    parallel = getattr(layer, "use_parallel_residual", hasattr(layer, "ln_mlp"))
    mixed = getattr(layer, "post_self_attn_layernorm", None)  # GLM 4
    return first, after, mixed, getattr(layer, "post_mlp_layernorm", None), bool(parallel)


def _softcap(attention: Any, config: Any) -> float | None:
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and type(attention).__name__ not in _CAPPED:
        raise Unfit("its attn_logit_softcapping is not known to cap anything")
    return softcap if config._attn_implementation == "eager" else None  # sdpa knows no cap


def _activation(own: Any) -> str:
    points = torch.linspace(-6, 6, 97)
    try:
        own(points)
    except TypeError:  # it may take what is let through as well; what it makes of it is compared
        return SILU
    for name, function in ACTIVATIONS.items():
        if torch.allclose(own(points), function(points), rtol=0, atol=1e-6):
            return name
    raise Unfit(
        f"its MLP goes through {type(own).__name__}, which is none of {', '.join(ACTIVATIONS)}"
    )
