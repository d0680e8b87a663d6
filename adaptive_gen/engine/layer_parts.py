"""The parts of a gated decoder layer, whatever a family calls them and wherever it puts its norms.

What a family does besides shows when a prepared layer is compared with the module, on a few tokens:
only what those cannot show is looked for here.

Axes: `out`, `in`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What the gate goes through, by the name that a model's traits have it under.
SILU, GELU = "silu", "gelu_tanh"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    SILU: F.silu,
    GELU: partial(F.gelu, approximate="tanh"),
}
# Settings that change numbers larger, or positions later, than those that are compared.
_HIDDEN = ("attn_logit_softcapping", "clip_qkv", "llama_4_scaling_beta")


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
    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor | None, ...]  # of queries, keys, values, and of what attention gives
    attention_norm: Any  # of what attention is given
    mlp_norm: Any
    mixed_norm: Any  # of what attention gives, before it is added
    output_norm: Any  # of what the MLP gives
    query_norm: Any
    key_norm: Any
    head_dim: int
    scaling: float  # of scores
    multiplier: float  # of what attention and the MLP give, before it is added
    activation: str

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
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        query, key, value, *biases = _projections(attention, head_dim, config)
        (out, out_bias), (down, down_bias) = _linear(attention.o_proj), _linear(mlp.down_proj)
        if hasattr(mlp, "gate_up_proj"):
            weight, bias = _linear(mlp.gate_up_proj)
            gate, up = weight.chunk(2)
            mlp_biases = bias, down_bias
        else:
            (gate, gate_bias), (up, up_bias) = _linear(mlp.gate_proj), _linear(mlp.up_proj)
            mlp_biases = gate_bias, up_bias, down_bias
        if any(bias is not None for bias in mlp_biases):
            raise Unfit("its MLP has biases")
        return cls(
            query,
            key,
            value,
            out,
            gate,
            up,
            down,
            (*biases, out_bias),
            *_norms(layer),
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
            head_dim,
            attention.scaling,
            float(getattr(layer, "residual_multiplier", 1.0)),
            _activation(mlp),
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


def _projections(attention: Any, head_dim: int, config: Any) -> tuple[Any, ...]:
    """Weights of queries, keys and values, and their biases."""
    if not hasattr(attention, "qkv_proj"):
        found = [_linear(getattr(attention, f"{name}_proj")) for name in "qkv"]
        weights, biases = zip(*found, strict=True)
        return *weights, *biases
    weight, bias = _linear(attention.qkv_proj)
    heads = config.num_attention_heads, *[config.num_key_value_heads] * 2
    sizes = [count * head_dim for count in heads]
    return *weight.split(sizes), *((None,) * 3 if bias is None else bias.split(sizes))


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
        raise Unfit(f"it has {kind} in place of a linear layer")
    return module.weight, module.bias


def _norms(layer: Any) -> tuple[Any, Any, Any, Any]:
    """The norms before attention and the MLP, and those of what they give."""
    first, after = getattr(layer, "input_layernorm", None), layer.post_attention_layernorm
    last = getattr(layer, "post_feedforward_layernorm", None)
    if last is not None:  # Gemma 2 and 3, which have all four; OLMo 2 and 3 and EXAONE 4
        return first, getattr(layer, "pre_feedforward_layernorm", None), after, last
    mixed = getattr(layer, "post_self_attn_layernorm", None)  # GLM 4
    return first, after, mixed, getattr(layer, "post_mlp_layernorm", None)


def _activation(mlp: Any) -> str:
    own = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    points = torch.linspace(-6, 6, 97)
    try:
        own(points)
    except TypeError:  # it may take what is let through as well; what it makes of it is compared
        return SILU
    for name, function in ACTIVATIONS.items():
        if torch.allclose(own(points), function(points), rtol=0, atol=1e-6):
            return name
    raise Unfit(f"its gate goes through {type(own).__name__}, not SiLU or GELU's approximation")


def eps_of(norm: Any) -> float:
    """What a root-mean-square norm adds to the mean of the squares."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def floor_of(norm: Any) -> float:
    """The least that a norm of this size divides by; see `FusedModel`."""
    return 0.0 if norm is None else math.sqrt(norm.weight.numel() * eps_of(norm))


def gain(norm: Any) -> Tensor:
    """A norm's gain with the factor that dividing by the length leaves out; see `FusedModel`.

    Gemma's norms have weights that 1 is added to, which is seen from what they do to ones.
    """
    weight = norm.weight.detach()
    given = norm(torch.ones_like(weight)).detach()
    gains = min(weight, 1 + weight, key=lambda g: float((given - g).abs().sum()))
    return gains * math.sqrt(weight.numel())
