"""What MLPs put between their matrices."""

import math
from typing import Any

from .exponential import exp, normal_tail
from .jit import inner

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")
SILU, GELU_TANH, GELU, RELU, RELU2 = range(5)
# GELU's approximation is x / (1 + exp(-_STEEP * (x + _CUBIC * x^3))).
_STEEP, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


@inner
def activate(wide: Any, width: int, activation: int, gated: int, tokens: int) -> None:
    """Put `width` numbers of each token through an activation, times those behind if `gated`."""
    kind = wide.dtype.type
    zero, one, steep, cubic = kind(0), kind(1), kind(_STEEP), kind(_CUBIC)
    for m in range(tokens):
        first = wide[m, :width]
        if activation == SILU and gated:  # as a rule, so without a second pass
            up = wide[m, width : 2 * width]
            for n in range(width):
                first[n] = first[n] / (one + exp(-first[n])) * up[n]
            continue
        if activation == SILU:
            for n in range(width):
                first[n] = first[n] / (one + exp(-first[n]))
        elif activation == GELU_TANH:
            for n in range(width):
                g = first[n]
                first[n] = g / (one + exp(-steep * (g + cubic * g * g * g)))
        elif activation == GELU:
            for n in range(width):
                g = first[n]
                first[n] = max(g, zero) - abs(g) * normal_tail(abs(g))
        elif activation == RELU:
            for n in range(width):
                first[n] = max(first[n], zero)
        elif activation == RELU2:
            for n in range(width):
                g = max(first[n], zero)
                first[n] = g * g
        if gated:
            up = wide[m, width : 2 * width]
            for n in range(width):
                first[n] *= up[n]
