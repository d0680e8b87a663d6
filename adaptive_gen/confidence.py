"""Confidence measures: how sure one readout is, from its logits.

Axes: `...` any leading axes, `vocab`. Every measure maps logits `[..., vocab]` to float32 `[...]`
in [0, 1], higher = surer, and is invariant to adding a constant to the logits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

DEFAULT = "margin"


def margin(logits: Tensor) -> Tensor:
    """Gap between the two likeliest tokens' probabilities; 0 for a tie, 1 for certainty.

    The default: of the three it separates best the tokens that full depth would choose too.
    """
    top2 = logits.float().softmax(-1).topk(2, dim=-1).values  # [..., 2]
    return top2[..., 0] - top2[..., 1]


def max_prob(logits: Tensor) -> Tensor:
    """Probability of the likeliest token (CALM's softmax response); at least 1 / vocab."""
    return logits.float().softmax(-1).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """One minus the entropy as a share of log(vocab), its largest value; 0 when uniform."""
    nats = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    return (1 - nats / math.log(logits.shape[-1])).clamp(0, 1)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": margin,
    "max_prob": max_prob,
    "entropy": entropy,
}
