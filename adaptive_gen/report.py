"""What one generation did, and the form in which `generate` returns it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .certificate import Certificate


class Step(NamedTuple):
    """One new token."""

    token: int
    exit_layer: int
    confidence: float  # nan where full depth decided unasked
    last: bool = False  # whether the text ends with it


@dataclass(frozen=True)
class Audit:
    """How often full depth would have chosen what was emitted, on the text as emitted.

    Counted in the deep passes that catch tokens up anyway, so tokens still pending when the text
    ended are `unaudited`. Tokens that full depth chose itself count as agreeing.
    """

    agreement: float  # agreeing / tokens; nan without any
    tokens: int
    unaudited: int
    by_exit: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # (agreeing, tokens)
    floor: float | None = None  # the agreement that was to be kept, if one was asked for
    alarms: tuple[int, ...] = ()  # new tokens at which the floor was found broken


@dataclass(frozen=True)
class Report:
    """What one generation did and how long it took, all rows of its batch together."""

    new_tokens: int
    n_layers: int
    mean_depth: float  # exit layers averaged over the new tokens
    layer_speedup: float  # n_layers / mean_depth: layers saved, not time
    exit_histogram: dict[int, int]  # exit layer -> new tokens
    deep_passes: int  # runs of the deepest segment while decoding
    caught_up: int  # tokens that had left early and got their deepest K/V afterwards
    prefill_s: float  # up to and including the first new token of each row
    decode_s: float  # all the others; a streaming caller's own time is not counted
    drafted: int = 0  # lossless: tokens proposed by exits
    accepted: int = 0  # and confirmed by full depth
    audit: Audit | None = None
    engine: str = "module"  # the back end that ran the layers
    rows: int = 1
    layers_run: int = 0  # while decoding: layers whose weights were read, over all passes
    # What was promised of calls like this one, and why exits went unchecked, all or many times.
    certificate: Certificate | None = None
    unchecked: str = ""
    warm_up_s: float = 0.0  # of the two times above: compiling or capturing what later calls reuse

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, each row's first left out: it belongs to the prefill."""
        return (self.new_tokens - self.rows) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class AdaptiveOutput(GenerateDecoderOnlyOutput):
    """What `generate(adaptive=True, return_dict_in_generate=True)` returns.

    Besides transformers' fields: `exit_layers` [batch, new] int64 (0 behind a row's end),
    `confidences` [batch, new] float32 (nan where full depth decided unasked; where the back end
    `compiled` screened the LM head, the raw measure is known to 0.05, as a rule to 0.005, and what
    a calibration makes of it as well as that allows) and `report`.
    """

    exit_layers: Tensor | None = None
    confidences: Tensor | None = None
    report: Report | None = None
