"""Losses of one setting on traced texts: replayed where that is exact, else by really decoding."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptive_gen.paired import generate
from adaptive_gen.settings import state
from adaptive_gen.ui import progress

from .quality import Ids
from .replay import LOSSES as REPLAYED
from .replay import Replayed, Rule, replay
from .search import Candidate
from .trace import Trace


def replay_of(model: Any, trace: Trace, rule: Rule, kv: str) -> Replayed:
    """What a setting does with traced texts, with the model's own queues."""
    return replay(trace, rule, kv=kv, queue_cap=state(model).queue_cap, model=model)


def replayed(model: Any, trace: Trace, rule: Rule, loss: str, kv: str) -> NDArray[np.float64]:
    """Losses [texts] without generating; see replay.py."""
    return REPLAYED[loss](replay_of(model, trace, rule, kv))


def decoded(
    model: Any,
    trace: Trace,
    candidate: Candidate,
    measure: str,
    kv: str,
    max_new_tokens: int,
) -> list[tuple[Ids, Ids]]:
    """What the setting really writes after every prompt, and what full depth wrote: token ids.

    Args:
        model: wrapped, with the calibration whose maps the thresholds refer to.
        trace: full depth's texts.
        candidate: the setting.
        measure: the confidence that decides.
        kv: "recompute" or "propagate".
        max_new_tokens: texts end there, or earlier by themselves.
    """
    found = []
    pairs = list(zip(trace.texts, trace.lengths.tolist(), strict=True))
    for text, new in progress(pairs, f"decoding with {candidate}", total=len(pairs)):
        prompt = torch.from_numpy(text[:-new])[None].to(model.device)
        out, _ = generate(
            model,
            prompt,
            adaptive=True,
            threshold=candidate.dial,
            exit_layers=list(candidate.exit_layers),
            confidence=measure,
            kv=kv,
            max_new_tokens=max_new_tokens,
        )
        written = out.sequences[0, prompt.shape[1] :].tolist()
        found.append((written, text[-new:].tolist()))
    return found
