"""Paired timing: several ways to generate, taking turns on the same prompts in one process.

Whatever slows the machine for a while slows all arms alike, so ratios of arms are steadier than any
arm's own speed. One speed is used everywhere: new tokens over the seconds of the whole `generate()`
call, prefill included, because that is what a user waits for and all arms have it.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decoder import Decoder
from .errors import OptionError
from .ui import progress

RESAMPLES = 2000


@dataclass(frozen=True)
class Runs:
    """Everything one arm did; the texts are the same in every round, decoding being greedy."""

    prompt_lengths: list[int]
    sequences: list[Tensor]  # [1, prompt + new] per prompt
    exit_layers: list[int]  # of all new tokens of all prompts; empty for transformers' own generate
    call_s: NDArray[np.float64]  # [prompts, rounds]
    prefill_s: NDArray[np.float64]  # [prompts, rounds]; nan for transformers' own generate
    reports: Sequence[Any] = ()  # per prompt, of the first round; none for transformers' generate

    @property
    def new_tokens(self) -> NDArray[np.int64]:
        """Of each prompt, [prompts]."""
        lengths = zip(self.sequences, self.prompt_lengths, strict=True)
        return np.array([s.shape[1] - prompt for s, prompt in lengths])

    @property
    def seconds(self) -> NDArray[np.float64]:
        """[prompts]: median over the rounds of the whole call."""
        return np.median(self.call_s, axis=1)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all prompts over the seconds of the whole calls."""
        return float(self.new_tokens.sum() / self.seconds.sum())

    @property
    def decode_tokens_per_s(self) -> float:
        """The same without the prefill and the token it ends with; 0 if there is no other token."""
        decode_s = float(np.median(self.call_s - self.prefill_s, axis=1).sum())
        return float((self.new_tokens - 1).sum()) / decode_s if decode_s else 0.0


def measure(
    model: Any,
    prompts: Sequence[Tensor],
    arms: Mapping[str, Mapping[str, Any]],
    *,
    max_new_tokens: int,
    rounds: int,
    description: str = "measuring",
) -> dict[str, Runs]:
    """Generate greedily from every prompt with every arm, `rounds` times, arms taking turns.

    Their order is drawn anew each time: a call pays for what the one before it left in the caches,
    and no arm must always follow the same other one.

    Args:
        model: wrapped.
        prompts: token ids [1, time] each.
        arms: name -> keywords of `generate`.
        max_new_tokens: texts end there, or earlier by themselves.
        rounds: repetitions; each arm's seconds per prompt are their median.
        description: label of the progress bar.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("rounds", rounds)):
        if value < 1:
            raise OptionError(f"{name}={value} measures nothing; give 1 or more.")
    names = list(arms)
    calls: dict[str, list[_Call]] = {name: [] for name in names}
    for name in names:  # warm-up
        generate(model, prompts[0], max_new_tokens=min(8, max_new_tokens), **arms[name])
    order = random.Random(0)
    turns = [ids for _ in range(rounds) for ids in prompts]
    for ids in progress(turns, description, total=len(turns)):
        for name in order.sample(names, len(names)):
            out, seconds = generate(model, ids, max_new_tokens=max_new_tokens, **arms[name])
            calls[name].append(_Call.of(out, seconds))
    return {name: _runs(prompts, calls[name]) for name in names}


class _Call(NamedTuple):
    """What is kept of one call; the output itself may hold a whole cache."""

    sequence: Tensor
    exit_layers: list[int]
    call_s: float
    prefill_s: float
    report: Any = None

    @classmethod
    def of(cls, out: Any, seconds: float) -> "_Call":
        report = getattr(out, "report", None)
        if report is None:
            return cls(out.sequences, [], seconds, math.nan)
        depths = out.exit_layers[0].tolist()
        return cls(out.sequences, depths, seconds, seconds - report.decode_s, report)


def _runs(prompts: Sequence[Tensor], calls: list[_Call]) -> Runs:
    """One arm's calls, round by round, as arrays [prompts, rounds]."""
    first = calls[: len(prompts)]
    return Runs(
        prompt_lengths=[ids.shape[1] for ids in prompts],
        sequences=[call.sequence for call in first],
        exit_layers=[layer for call in first for layer in call.exit_layers],
        call_s=np.array([call.call_s for call in calls]).reshape(-1, len(prompts)).T,
        prefill_s=np.array([call.prefill_s for call in calls]).reshape(-1, len(prompts)).T,
        reports=[call.report for call in first if call.report is not None],
    )


def generate(model: Any, ids: Tensor, **keywords: Any) -> tuple[Any, float]:
    """One `generate` call and its seconds; a padded batch comes with its attention mask.

    Whatever a checkpoint's own generation config says, the text is the plain argmax of the logits,
    unless `keywords` ask for something else: with a repetition penalty the choices of an exit and
    of full depth would not be comparable.
    """
    config = model.generation_config
    if config.pad_token_id is None:
        # One text needs no padding; this only keeps transformers from warning at every call.
        keywords.setdefault("pad_token_id", int(ids[0, 0]))
    keywords.setdefault("attention_mask", torch.ones_like(ids))
    clock = time.perf_counter()
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    out = model.generate(input_ids=ids, return_dict_in_generate=True, **{**greedy, **keywords})
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return out, time.perf_counter() - clock


def wall_speedup(runs: Runs, reference: Runs) -> float:
    """Tokens per second of one arm over another's."""
    return runs.tokens_per_s / reference.tokens_per_s


def interval(runs: Runs, reference: Runs, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of `wall_speedup` over prompts."""
    n = len(runs.seconds)
    draw = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    speeds = [r.new_tokens[draw].sum(1) / r.seconds[draw].sum(1) for r in (runs, reference)]
    low, high = np.percentile(speeds[0] / speeds[1], [2.5, 97.5])
    return float(low), float(high)


@torch.no_grad()
def agreement(model: Any, runs: Runs, exit_layer: int | None = None) -> float:
    """Share of new tokens that full depth would choose too, each on the text before it.

    Args:
        model: wrapped or not.
        runs: texts to judge; one teacher-forced pass over each.
        exit_layer: judge what this exit would choose at every place of these texts, in place of the
            tokens that stand there: static truncation.
    """
    decoder = Decoder(model)
    full = decoder.n_layers
    agreeing = 0
    for ids, length in zip(runs.sequences, runs.prompt_lengths, strict=True):
        exits = [full] if exit_layer in (None, full) else [exit_layer, full]
        choices = {e: x[:, length - 1 : -1].argmax(-1) for e, x in decoder.readouts(ids, exits)}
        judged = ids[:, length:] if exit_layer is None else choices[exit_layer]
        agreeing += int((judged == choices[full]).sum())
    return agreeing / int(runs.new_tokens.sum())
