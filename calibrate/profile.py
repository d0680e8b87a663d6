"""Profiling: seconds of scripted decoding, to learn what layers, rows and readouts cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaptive_gen.confidence import GATE
from adaptive_gen.paired import generate
from adaptive_gen.policy import Check
from adaptive_gen.settings import state
from adaptive_gen.ui import progress

from .cost import Cost, fit
from .schedule import Work, simulate

RUNS = (2, 4, 8)  # one token of so many at full depth: the rows of a block that catches up
ROUNDS = 10  # enough that slow spells spoil the fewer part


@dataclass(frozen=True)
class Scripted:
    """An exit policy that ignores confidence: every token leaves where the script says.

    What a token costs does not depend on what it says, so a script can visit every kind of work.
    """

    depths: Sequence[int]  # by position: the exit layer to leave at
    asks: frozenset[int]  # exit layers that are read out on the way

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """Whether a readout is computed."""
        return exit_layer in self.asks

    def least(self, exit_layer: int, position: int) -> float:
        """Any confidence or none."""
        return -math.inf if self.depths[position] == exit_layer else math.inf

    def should_exit(self, check: Check) -> bool:
        """Whether the script names this exit."""
        return self.depths[check.position] == check.exit_layer


def scripts(exit_layers: Sequence[int], tokens: int, seed: int = 0) -> list[Scripted]:
    """Scripts that tell the terms of the cost model apart.

    Full depth with no readout on the way, once cut short (for what a text costs whatever its
    length), and with all of them; every exit alone, left at by all tokens (many rows catch up at
    once) and by every second one (one row does); the first exit also by all but every fourth and
    every eighth, as what a row costs depends on how many there are; and mixtures.
    """
    below, full = exit_layers[:-1], exit_layers[-1]
    draw = np.random.default_rng(seed)
    found = [Scripted([full] * tokens, frozenset(asks)) for asks in ((), below)]
    found.append(Scripted([full] * max(2, tokens // 3), frozenset()))
    for exit_layer in below:
        found.append(Scripted([exit_layer] * tokens, frozenset([exit_layer])))
        for every in RUNS if exit_layer == below[0] else RUNS[:1]:
            runs = [full if position % every == 0 else exit_layer for position in range(tokens)]
            found.append(Scripted(runs, frozenset([exit_layer])))
    for share in (0.3, 0.7):
        depths = np.where(draw.random(tokens) < share, draw.choice(below, tokens), full)
        found.append(Scripted(depths.tolist(), frozenset(below)))
    return found


def work(script: Scripted, exit_layers: tuple[int, ...], kv: str, queue_cap: int) -> Work:
    """What the engine does when it follows a script over one text."""
    below = np.array(exit_layers[:-1])
    leaves = np.array(script.depths)[None, :, None, None] == below[:, None]
    return simulate(
        exit_layers,
        lengths=np.array([len(script.depths)]),
        agrees=np.ones(leaves.shape[:3], dtype=bool),
        leaves=leaves,
        checked=np.isin(below, list(script.asks))[:, None],
        kv=kv,
        queue_cap=queue_cap,
    ).work


def profile(
    model: Any,
    prompts: Sequence[Tensor],
    exit_layers: tuple[int, ...],
    *,
    kv: str,
    measure: str,
    tokens: int,
) -> Cost:
    """Time the scripts, taking turns, and fit the cost model to their medians.

    Args:
        model: wrapped.
        prompts: token ids; each round uses the next one.
        exit_layers: ascending; the last is full depth.
        kv: "recompute" or "propagate".
        measure: the confidence that every readout computes.
        tokens: new tokens of every run.
    """
    found = scripts(exit_layers, tokens)
    seconds = np.zeros((2, len(found), ROUNDS))
    # Round -1 warms up; the last round overwrites its column.
    rounds = range(-1, ROUNDS)
    settings = {"kv": kv, "confidence": measure}
    for turn in progress(rounds, "timing layers", total=len(rounds)):
        ids = prompts[turn % len(prompts)]
        for i, script in enumerate(found):
            seconds[:, i, turn] = timed(model, ids, script, exit_layers[-1], **settings)
    works = [work(script, exit_layers, kv, state(model).queue_cap) for script in found]
    if measure == GATE:
        works = [done.gated() for done in works]
    return fit(works, typical(seconds[0]), float(np.median(seconds[1])))


def timed(
    model: Any, ids: Tensor, script: Scripted, n_layers: int, **settings: Any
) -> tuple[float, float]:
    """Seconds of decoding one text as scripted, and of the rest of the call."""
    out, seconds = generate(
        model,
        ids,
        adaptive=True,
        policy=script,
        # As in use: layers between which nothing is asked run as one segment.
        exit_layers=[*sorted(script.asks), n_layers],
        max_new_tokens=len(script.depths),
        # No token is this one, so none ends the text; `min_new_tokens` would cost at every token.
        eos_token_id=model.config.get_text_config().vocab_size,
        **settings,
    )
    return out.report.decode_s, seconds - out.report.decode_s


def typical(seconds: NDArray) -> NDArray[np.float64]:
    """Seconds [runs] of runs that took turns, from [runs, rounds].

    A machine has slow and fast spells that last longer than a round and slow all its runs alike: so
    each run's share of its round is what counts, and the median round gives the scale.
    """
    whole = seconds.sum(0)
    return np.median(seconds / whole, axis=1) * np.median(whole)
