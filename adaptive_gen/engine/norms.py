"""What a norm is made of, whatever its class: by what it does to a few numbers.

A root-mean-square norm divides by the square root of the mean of the squares, and LayerNorm does
once it has taken off the mean; see `FusedModel` for the form they have here.
"""

import math
from typing import Any

import torch
from torch import Tensor


def is_norm(norm: Any) -> bool:
    """Whether a module may be one of the two; what is made of it is compared besides."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return isinstance(eps, float) and isinstance(getattr(norm, "weight", None), Tensor)


def eps_of(norm: Any) -> float:
    """What a norm adds to the mean of the squares."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def floor_of(norm: Any) -> float:
    """The least that a norm of this size divides by; see `FusedModel`."""
    return 0.0 if norm is None else math.sqrt(norm.weight.numel() * eps_of(norm))


@torch.no_grad()
def is_centred(norm: Any) -> bool:
    """Whether a norm takes off the mean: then what is added to all numbers makes no difference."""
    weight = norm.weight
    if weight.dim() != 1 or weight.numel() < 2:
        return False
    ramp = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)
    there, moved = norm(ramp), norm(ramp + 2)
    return bool((there - moved).abs().max() <= 0.01 * (there - shift(norm)).abs().max())


def shifts(norm: Any) -> bool:
    """Whether a norm adds something in the end."""
    return getattr(norm, "bias", None) is not None


@torch.no_grad()
def shift(norm: Any) -> Tensor:
    """What a norm adds in the end, [size]; zeros if nothing."""
    return norm(torch.zeros_like(norm.weight)).detach()


@torch.no_grad()
def gain(norm: Any) -> Tensor:
    """A norm's gain with the factor that dividing by the length leaves out; see `FusedModel`.

    Some families have weights that 1 is added to, which is seen from what they do to signs.
    """
    weight = norm.weight.detach()
    signs = torch.ones_like(weight)
    signs[..., 1::2] = -1
    given = (norm(signs) - shift(norm)) * signs
    gains = min(weight, 1 + weight, key=lambda g: float((given - g).abs().sum()))
    return gains * math.sqrt(weight.numel())
