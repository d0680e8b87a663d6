"""Confidence measures: how sure one readout is, from its logits.

Axes: `...` any leading axes, `vocab`. Every measure maps logits `[..., vocab]` to float32 `[...]`
in [0, 1], higher = surer, and is invariant to adding a constant to the logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import OptionError

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


class Summary(NamedTuple):
    """What one pass over the logits of a token finds: enough for every measure of them."""

    top: float  # the largest logit
    second: float  # the second largest; equal to it in a tie
    token: float  # the id of the largest, the first of equals
    total: float  # logsumexp
    entropy: float  # in nats


def of_summary(name: str, summary: Summary, vocab: int) -> float:
    """The measure `name` of `MEASURES` from a summary of logits over `vocab` tokens."""
    if name == "entropy":
        return min(1.0, max(0.0, 1 - summary.entropy / math.log(vocab)))
    largest = math.exp(summary.top - summary.total)
    return largest if name == "max_prob" else largest - math.exp(summary.second - summary.total)


GATE = "gate"


class Map(Protocol):
    """Raw confidence -> chance of agreement, not decreasing; see `calibration.ConfidenceMap`."""

    def __call__(self, confidence: float, /) -> float:
        """The chance."""
        ...

    def raw_of(self, chance: float, /) -> float:
        """The smallest raw confidence that means at least this chance."""
        ...


Maps = Mapping[str, Mapping[int, Map]]


class Confidences:
    """What policies are shown: a measure of readouts, calibrated where there is a map for it.

    The gate is the one measure that reads hidden states, so that no LM head has to run for a token
    that stays.
    """

    def __init__(self, measure: str = DEFAULT, maps: Maps | None = None, gate: Any = None):
        """Choose a measure.

        Args:
            measure: one of `MEASURES`, or "gate".
            maps: measure -> exit layer -> map from the raw measure to a chance of agreement.
            gate: (normed hidden states [rows, hidden], exit layer) -> raw confidence [rows].

        Raises:
            OptionError: an unknown measure, or "gate" without one.
        """
        if not isinstance(measure, str) or measure not in (*MEASURES, GATE):
            raise OptionError(
                f"confidence={measure!r} is unknown; use one of {', '.join([*MEASURES, GATE])}."
            )
        if measure == GATE and gate is None:
            raise OptionError(
                "confidence='gate' needs a trained gate and there is none beside this model's "
                "calibration; run `calibrate run --confidence gate`, give wrap() or --calibration "
                "the directory with calibration.json and gate.safetensors, or use another measure."
            )
        self.measure, self.maps, self.gate = measure, maps or {}, gate

    @property
    def reads_hidden(self) -> bool:
        """Whether the measure works without logits."""
        return self.measure == GATE

    def calibrated(self, raw: float, exit_layer: int) -> float:
        """What a raw value of the measure means at an exit layer."""
        return self._mapped(self.measure, [raw], exit_layer)[0]

    def raw_of(self, confidence: float, exit_layer: int) -> float:
        """The smallest raw value of the measure that gives at least this confidence."""
        found = self.maps.get(self.measure, {}).get(exit_layer)
        return confidence if found is None else found.raw_of(confidence)

    def of_hidden(self, hidden: Tensor, exit_layer: int) -> list[float]:
        """The gate's confidence in each row of normed hidden states [rows, hidden]."""
        return self._mapped(GATE, self.gate(hidden, exit_layer).tolist(), exit_layer)

    def __call__(self, logits: Tensor, exit_layer: int, measure: str | None = None) -> list[float]:
        """The confidence in each row of logits [rows, vocab], by another `measure` if named."""
        name = measure or self.measure
        return self._mapped(name, MEASURES[name](logits).tolist(), exit_layer)

    def of_summaries(
        self,
        summaries: Sequence[Summary],
        vocab: int,
        exit_layer: int,
        measure: str | None = None,
    ) -> list[float]:
        """The confidence in each summarised row of logits, as calling with the logits gives it."""
        name = measure or self.measure
        raw = [of_summary(name, summary, vocab) for summary in summaries]
        return self._mapped(name, raw, exit_layer)

    def _mapped(self, name: str, raw: list[float], exit_layer: int) -> list[float]:
        by_layer = self.maps.get(name, {})
        return [by_layer[exit_layer](r) for r in raw] if exit_layer in by_layer else raw
