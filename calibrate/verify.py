"""Verification: what predicted settings really do, on prompts the search has not seen.

A setting that stands is measured on every prompt, several times. One that misses its target is
dropped as soon as that is certain: when the 95 % interval of what was measured so far excludes the
target. Stopping early is only ever a rejection; no figure that is reported comes from it alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_gen.bench import mean_depth
from adaptive_gen.paired import Runs, agreement, interval, measure, wall_speedup

from .quality import Loss, mean_interval
from .search import Candidate
from .target import Target

FEW = 12  # prompts for a first look


@dataclass(frozen=True)
class Measured:
    """One setting, predicted and measured."""

    candidate: Candidate
    speedup: float  # tokens per second over full depth, whole calls
    interval: tuple[float, float]  # 95 % bootstrap over prompts
    agreement: float
    mean_depth: float
    tokens: int
    latency_ms: float = 0.0  # per new token, whole calls
    decode_speedup: float | None = None  # the same with the prompts' passes left out
    # measure -> (mean, 95 % bootstrap over prompts), of whole texts against full depth's
    quality: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    exit_histogram: Mapping[int, int] = field(default_factory=dict)  # exit layer -> new tokens
    # (prompt, text, full depth's text) of every prompt, token ids
    texts: Sequence[tuple[list[int], list[int], list[int]]] = field(default=(), repr=False)


@dataclass(frozen=True)
class Arena:
    """Where settings and full depth take turns on the same prompts."""

    model: Any
    prompts: Sequence[Tensor]  # token ids [1, time] each
    confidence: str
    kv: str
    max_new_tokens: int
    rounds: int  # of a measurement that stands
    losses: Mapping[str, Loss]  # of whole texts against full depth's, by name

    def look(self, found: Sequence[Candidate]) -> list[Measured]:
        """Measure many settings cheaply: once, on the first few prompts."""
        runs = self._measure(found, self.prompts[:FEW], f"measuring {len(found)} settings")
        full = runs["full_depth"]
        return [self._judge(c, runs[str(i)], full) for i, c in enumerate(found)]

    def judge(self, candidate: Candidate, target: Target | None = None) -> Measured:
        """Measure one setting on all prompts, or until it has certainly missed the target."""
        label = f"measuring {candidate}"
        first = self.prompts[:FEW]
        runs = self._measure([candidate], first, label)
        measured = self._judge(candidate, runs["0"], runs["full_depth"])
        if missed(target, measured, final=False):
            return measured
        if len(self.prompts) > FEW:
            rest = self._measure([candidate], self.prompts[FEW:], label)
            runs = {name: _beside(runs[name], rest[name]) for name in runs}
        for _ in range(self.rounds - 1):
            measured = self._judge(candidate, runs["0"], runs["full_depth"])
            if missed(target, measured, final=True):
                return measured
            more = self._measure([candidate], self.prompts, label)
            runs = {name: _again(runs[name], more[name]) for name in runs}
        return self._judge(candidate, runs["0"], runs["full_depth"])

    def settings(self, candidate: Candidate) -> dict[str, Any]:
        """Our keywords of `generate` for a setting."""
        return {
            "adaptive": True,
            "confidence": self.confidence,
            "kv": self.kv,
            "threshold": candidate.dial,
            "exit_layers": list(candidate.exit_layers),
        }

    def _measure(
        self, found: Sequence[Candidate], prompts: Sequence[Tensor], label: str
    ) -> dict[str, Runs]:
        shared = {"adaptive": True, "confidence": self.confidence, "kv": self.kv}
        arms: dict[str, dict[str, Any]] = {"full_depth": {**shared, "threshold": 1.0}}
        arms |= {str(i): self.settings(c) for i, c in enumerate(found)}
        return measure(
            self.model,
            prompts,
            arms,
            max_new_tokens=self.max_new_tokens,
            rounds=1,
            description=label,
        )

    def _judge(self, candidate: Candidate, runs: Runs, full: Runs) -> Measured:
        ours, theirs = runs.decode_tokens_per_s, full.decode_tokens_per_s
        texts = _texts(runs, full)
        quality = {
            name: mean_interval(np.array([loss(a, b) for _, a, b in texts]))
            for name, loss in self.losses.items()
        }
        return Measured(
            candidate=candidate,
            speedup=wall_speedup(runs, full),
            interval=interval(runs, full),
            agreement=agreement(self.model, runs),
            mean_depth=mean_depth(runs),
            tokens=int(runs.new_tokens.sum()),
            latency_ms=1000 / runs.tokens_per_s,
            decode_speedup=ours / theirs if theirs else None,
            quality=quality,
            exit_histogram=Counter(runs.exit_layers),
            texts=texts,
        )


def missed(target: Target | None, measured: Measured, final: bool) -> bool:
    """Whether more rounds cannot bring the target back.

    Args:
        target: None is never missed.
        measured: so far.
        final: every prompt has been decoded once; decoding being greedy, the texts and with them
            the agreement will not change.
    """
    if target is None or target.kind == "risk":
        return False
    if target.by_speed:
        best = measured.interval[1]
        hopeful = replace(
            measured,
            speedup=best,
            latency_ms=measured.latency_ms * measured.speedup / best,
        )
        return not target.met(hopeful)
    if final:
        return not target.met(measured)
    # Mismatching positions hold every token that full depth would not have chosen; a target that
    # even three standard errors of a share spare is not given up on a few prompts.
    share = 1 - measured.agreement
    slack = 3 * (share * (1 - share) / max(measured.tokens, 1)) ** 0.5
    return not target.met(replace(measured, agreement=measured.agreement + slack))


def _texts(runs: Runs, full: Runs) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, text, full depth's text) of every prompt, token ids."""
    triples = zip(runs.sequences, full.sequences, full.prompt_lengths, strict=True)
    return [
        (ours[0, :n].tolist(), ours[0, n:].tolist(), theirs[0, n:].tolist())
        for ours, theirs, n in triples
    ]


def _beside(first: Runs, second: Runs) -> Runs:
    """The same arm on further prompts."""
    return Runs(
        [*first.prompt_lengths, *second.prompt_lengths],
        [*first.sequences, *second.sequences],
        [*first.exit_layers, *second.exit_layers],
        np.concatenate([first.call_s, second.call_s]),
        np.concatenate([first.prefill_s, second.prefill_s]),
    )


def _again(first: Runs, second: Runs) -> Runs:
    """The same arm on the same prompts in further rounds."""
    return replace(
        first,
        call_s=np.concatenate([first.call_s, second.call_s], axis=1),
        prefill_s=np.concatenate([first.prefill_s, second.prefill_s], axis=1),
    )
