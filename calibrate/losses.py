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
    model: Any, trace: Trace, candidate: Candidate, rule: Rule, kv: str, max_new_tokens: int
) -> list[tuple[Ids, Ids]]:
    """What a setting writes after every prompt, and what full depth wrote: token ids.

    A text that the replay leaves as it is stays that; only the others are decoded.

    Args:
        model: wrapped, with the calibration whose maps the thresholds refer to.
        trace: full depth's texts.
        candidate: the setting.
        rule: the same as the replay takes it.
        kv: "recompute" or "propagate".
        max_new_tokens: texts end there, or earlier by themselves.
    """
    changed = replayed(model, trace, rule, "exact", kv).astype(bool)
    references = [
        text[-new:].tolist() for text, new in zip(trace.texts, trace.lengths, strict=True)
    ]
    found = list(zip(references, references, strict=True))
    others = np.flatnonzero(changed).tolist()
    for i in progress(others, f"decoding with {candidate}", total=len(others)):
        prompt = torch.from_numpy(trace.texts[i][: -len(references[i])])[None].to(model.device)
        out, _ = generate(
            model,
            prompt,
            adaptive=True,
            threshold=candidate.dial,
            exit_layers=list(candidate.exit_layers),
            confidence=rule.measure,
            kv=kv,
            max_new_tokens=max_new_tokens,
        )
        found[i] = (out.sequences[0, prompt.shape[1] :].tolist(), references[i])
    return found
