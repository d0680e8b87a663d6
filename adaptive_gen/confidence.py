"""Confidence measures: how sure one readout is, from its logits.

Axes: `...` any leading axes, `vocab`. Every measure maps logits `[..., vocab]` to float32 `[...]`
in [0, 1], higher = surer, and is invariant to adding a constant to the logits.
"""

import math
from collections.abc import Callable

from torch import Tensor

DEFAULT = "margin"


def margin(logits: Tensor) -> Tensor:
    """Gap between the two likeliest tokens' probabilities; 0 for a tie, 1 for certainty.

    The default: of the three it separates best the tokens that full depth would choose too.
    """
    logits = logits.float()
    top2 = logits.topk(2, dim=-1).values  # [..., 2]
    probability = (top2 - logits.logsumexp(-1, keepdim=True)).exp()
    return (probability[..., 0] - probability[..., 1]).clamp(0, 1)


def max_prob(logits: Tensor) -> Tensor:
    """Probability of the likeliest token (CALM's softmax response); at least 1 / vocab."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp().clamp(0, 1)


def entropy(logits: Tensor) -> Tensor:
    """One minus the entropy as a share of log(vocab), its largest value; 0 when uniform."""
    log_p = logits.float().log_softmax(-1)
    # A token ruled out with -inf has probability 0 and adds nothing; 0 * -inf would be nan.
    nats = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    return (1 - nats / math.log(logits.shape[-1])).clamp(0, 1)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": margin,
    "max_prob": max_prob,
    "entropy": entropy,
}
