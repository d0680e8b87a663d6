"""Mixtures of experts for the back end `fused`: an MLP of a token's own choosing.

A router gives each expert a probability; a token goes through the `top_k` most likely ones, and
what they make of it is summed by their shares.

Axes: `tokens`, `hidden`, `experts`.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from .layer_parts import ACTIVATIONS
from .matrices import columns, product
from .workspace import Sizes, activated

if TYPE_CHECKING:
    from .fused import Layer, Traits


def add_mixture(
    total: Tensor, given: Tensor, layer: "Layer", sizes: Sizes, traits: "Traits"
) -> None:
    """Add what a layer's experts make of what its MLP is given, [tokens, hidden], to `total`."""
    assert layer.router is not None
    likely, chosen = product(given, layer.router).softmax(-1).topk(traits.top_k)
    shares = likely / likely.sum(-1, keepdim=True) if traits.normalised else likely
    wide, hidden, activate = sizes.wide, sizes.hidden, ACTIVATIONS[traits.activation]
    for expert in chosen.unique().tolist():
        token, place = (chosen == expert).nonzero(as_tuple=True)
        first = product(given[token], columns(layer.gate_up, expert * wide, (expert + 1) * wide))
        inner = activated(first.chunk(2, dim=-1), activate)
        inner *= shares[token, place, None]
        last = columns(layer.down, expert * hidden, (expert + 1) * hidden)
        total.index_add_(0, token, product(inner, last))
