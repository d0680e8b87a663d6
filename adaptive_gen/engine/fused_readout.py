"""The final norm and the LM head of a model, prepared as its layers are; see `fused`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import soften
from .folding import as_it_is, bias_of, faster_order, scaled, wide
from .fused import normed
from .fusing import difference
from .matrices import Matrix, product
from .narrow import NarrowMatrix
from .norms import floor_of, gain, is_centred, is_norm, shift


@dataclass(frozen=True)
class FusedReadout:
    """The final norm and the LM head of a `Decoder`."""

    head: Matrix  # [hidden, vocab]
    floor: Tensor  # what the norm divides by at least, a scalar
    bias: Tensor | None = None  # of the logits, [vocab]
    centred: bool = False  # whether the norm takes off the mean
    softcap: float | None = None  # what logits are bent below

    def __call__(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """Hidden states [rows, hidden] after any layer -> logits [rows, vocab]."""
        logits = product(normed(hidden, self.floor, self.centred), self.head, self.bias)
        return soften(logits, self.softcap)


def fuse_readout(
    norm: Any,
    head: nn.Linear,
    factor: float = 1.0,
    softcap: float | None = None,
    to_round: bool = False,
) -> FusedReadout | None:
    """Prepare a norm and the head behind it; None if the norm is of another kind.

    Args:
        norm: before the head.
        head: the LM head.
        factor: of the logits.
        softcap: what they are bent below.
        to_round: whether it does not matter how the head lies in memory, as it will be rounded.
    """
    if not is_norm(norm):
        return None
    norm, weight = wide(norm), wide(head.weight)
    order = as_it_is if to_round else faster_order
    matrix = order((weight * (gain(norm) * factor)).t())
    bias = scaled(bias_of(head.weight, head.bias, norm), factor)
    readout = FusedReadout(matrix, weight.new_tensor(floor_of(norm)), bias, is_centred(norm))
    hidden = _hidden(norm)
    own = None if head.bias is None else wide(head.bias)
    expected = F.linear(norm(hidden), weight, own) * factor
    if difference(readout(hidden), expected) is not None:
        return None
    return replace(readout, softcap=softcap)


def narrow_readout(
    norm: Any, head: nn.Linear, factor: float = 1.0, softcap: float | None = None
) -> FusedReadout | None:
    """The same for a head in half precision that is read as it is."""
    if not is_norm(norm):
        return None
    norm, own = wide(norm), head.weight.detach()
    floor, centred = norm.weight.new_tensor(floor_of(norm)), is_centred(norm)
    gains, hidden = gain(norm), _hidden(norm)
    if difference(normed(hidden, floor, centred) * gains + shift(norm), norm(hidden)) is not None:
        return None
    bias = scaled(bias_of(own, head.bias, norm), factor)
    gains = gains * factor
    matrix = NarrowMatrix(lambda: own, gains, gains.new_ones(len(own)))
    return FusedReadout(matrix, floor, bias, centred, softcap)


def _hidden(norm: Any) -> Tensor:
    """Random hidden states [3, hidden]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, norm.weight.numel(), generator=generator, dtype=norm.weight.dtype)
