"""The token loop: readout -> logits processors -> token -> stopping criteria -> next readout.

It does what transformers' own sampling loop does, in the same order and with the same draws from
the random generator, on readouts that come from whatever depth the scheduler left at.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .engine.backend import Backend
from .engine.cache import KVCache
from .engine.scheduler import Readout, Scheduler
from .settings import Settings


@dataclass(frozen=True)
class Report:
    """What one generation did and how long it took."""

    new_tokens: int
    n_layers: int
    mean_depth: float  # exit layers averaged over the new tokens
    layer_speedup: float  # n_layers / mean_depth: layers saved, not time
    exit_histogram: dict[int, int]  # exit layer -> new tokens
    deep_passes: int  # runs of the deepest segment while decoding
    caught_up: int  # tokens that had left early and got their deepest K/V afterwards
    prefill_s: float  # up to and including the first new token
    decode_s: float  # all the others; a streaming caller's own time is not counted
    drafted: int = 0
    accepted: int = 0
    audit: dict[str, Any] | None = None
    engine: str = "module"  # the back end that ran the layers

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, the first left out: it belongs to the prefill."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class AdaptiveOutput(GenerateDecoderOnlyOutput):
    """What `generate(adaptive=True, return_dict_in_generate=True)` returns.

    Besides transformers' fields: `exit_layers` [batch, new] int64, `confidences` [batch, new]
    float32 (nan where full depth decided unasked) and `report`.
    """

    exit_layers: Tensor | None = None
    confidences: Tensor | None = None
    report: Report | None = None


class Step(NamedTuple):
    """One new token."""

    token: int
    exit_layer: int
    confidence: float


class TokenLoop:
    """One text being generated: iterate over it for its `Step`s."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        config: Any,
        input_ids: Tensor,
        prompt: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        streamer: BaseStreamer | None = None,
    ):
        """Set up queues and cache; nothing runs until the first `next`.

        Args:
            backend: the model and what runs its layers.
            settings: exits, policy, confidence, KV policy.
            config: transformers' prepared generation config.
            input_ids: [1, time] prompt as given, with any padding.
            prompt: [1, time] the same without padding: what the layers see.
            logits_processor: transformers' list, called with [1, time] ids and [1, vocab] float32.
            stopping_criteria: transformers' list.
            streamer: gets every new token.
        """
        self.input_ids, self.prompt, self.config = input_ids, prompt, config
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.streamer = streamer
        capacity = prompt.shape[1] + min((config.max_length or 0) - input_ids.shape[1], 4096)
        self.scheduler = Scheduler(
            backend.decoder,
            backend.segments(settings.exit_layers),
            KVCache(backend.decoder.n_layers, capacity),
            settings.policy,
            settings.confidence,
            settings.kv,
            settings.queue_cap,
        )
        self.steps: list[Step] = []
        self.scores: list[Tensor] = []  # processed, [1, vocab] each, when asked for
        self.logits: list[Tensor] = []  # as read out, [1, vocab] each, when asked for
        self.engine = backend.name
        self.prefill_s = self.decode_s = 0.0
        self.finished = False

    @torch.no_grad()
    def __iter__(self) -> Iterator[Step]:
        """Decode until a stopping criterion holds."""
        clock = time.perf_counter()
        readout = self.scheduler.prefill(self.prompt)
        while True:
            token = self._choose(readout)
            self.finished = self._stops(token)
            self._count(time.perf_counter() - clock)
            yield self.steps[-1]
            if self.finished:
                break
            clock = time.perf_counter()
            readout = self.scheduler.decode(token[:, None], position=len(self.steps))
        if self.streamer is not None:
            self.streamer.end()

    def _choose(self, readout: Readout) -> Tensor:
        """Pick the next token, [1], from the processed scores."""
        # Processors may write in place, and transformers shows them float32 whatever the model's.
        logits = readout.logits.to(self.input_ids.device, torch.float32, copy=True)
        scores = self.logits_processor(self.input_ids, logits)
        if self.config.output_scores:
            self.scores.append(scores)
        if self.config.output_logits:
            self.logits.append(logits)
        if self.config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(-1)
        self.steps.append(Step(int(token), readout.exit_layer, readout.confidence))
        return token

    def _stops(self, token: Tensor) -> bool:
        """Append the token [1] to the text and hand it on; whether the text ends with it."""
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        scores = tuple(self.scores) if self.config.output_scores else None
        stop = bool(self.stopping_criteria(self.input_ids, scores).all())
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return stop

    def _count(self, seconds: float) -> None:
        if len(self.steps) == 1:
            self.prefill_s += seconds
        else:
            self.decode_s += seconds

    def report(self) -> Report:
        """The account of what has been decoded so far."""
        depths = [step.exit_layer for step in self.steps]
        n_layers = self.scheduler.decoder.n_layers
        mean_depth = sum(depths) / len(depths) if depths else float(n_layers)
        return Report(
            new_tokens=len(depths),
            n_layers=n_layers,
            mean_depth=mean_depth,
            layer_speedup=n_layers / mean_depth,
            exit_histogram=dict(sorted(Counter(depths).items())),
            deep_passes=self.scheduler.deep_passes,
            caught_up=self.scheduler.caught_up,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            engine=self.engine,
        )

    def output(self) -> AdaptiveOutput:
        """The result in transformers' form."""
        return AdaptiveOutput(
            sequences=self.input_ids,  # type: ignore[arg-type]
            scores=tuple(self.scores) if self.config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(self.logits) if self.config.output_logits else None,  # type: ignore[arg-type]
            exit_layers=torch.tensor([[step.exit_layer for step in self.steps]]),
            confidences=torch.tensor([[step.confidence for step in self.steps]]),
            report=self.report(),
        )
