"""Modes side by side: lossy and lossless, both KV policies and schedules, batches of 1, 4 and 16.

What draws its tokens does so from the same seed in every arm, and is compared with full depth's
draws.

Real prompts cut to one length, texts that end when they end: a batch is as slow as its longest row,
which is part of what is measured. Every arm takes turns with the others on the same batch.
"""

import itertools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_gen.paired import generate
from adaptive_gen.prompts import Prompt, inputs
from adaptive_gen.settings import state
from adaptive_gen.ui import progress

BATCHES = (1, 4, 16)
PROMPT = 12  # tokens
FULL_DEPTH = "full depth"
SAMPLED = ", sampled"
DRAWS = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
_SCHEDULES = ("stepwise", "lockstep")


def arms(rows: int, checked: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Name -> keywords of `generate`; with one row there is one schedule.

    Args:
        rows: of a batch.
        checked: keywords that have exits checked where a calibration found that they do not pay.
    """
    modes = {
        "lossy, recompute": {"kv": "recompute"},
        "lossy, propagate": {"kv": "propagate"},
        "lossless": {"lossless": True},
    }
    found = {"transformers": {"adaptive": False}, FULL_DEPTH: {"threshold": 1.0}}
    for (name, mode), schedule in itertools.product(modes.items(), _SCHEDULES):
        if rows > 1:
            found[f"{name}, {schedule}"] = {**mode, "schedule": schedule}
        elif schedule == _SCHEDULES[0]:
            found[name] = mode
        if checked and rows > 1 and schedule == _SCHEDULES[0]:
            found[f"{name}, exits checked"] = {**mode, **checked}
    # With a floor that the built-in model keeps, nothing is ever acted on but everything is tested.
    audits = {"audited": {"audit": True}, "audited, acting": {"audit_floor": 0.8}}
    having = checked if checked and rows > 1 else {}
    watched = "lossy, recompute, exits checked" if having else "lossy, recompute"
    for name, audit in audits.items():
        found[f"{watched}, {name}"] = {**having, **audit}
    for name in ("transformers", FULL_DEPTH, *modes):
        found[name + SAMPLED] = {**found.get(name, modes.get(name, {})), **DRAWS}
    return {name: {"adaptive": True, **keywords} for name, keywords in found.items()}


def run(
    model: Any, tokenizer: Any, prompts: list[Prompt], *, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One entry a batch size: tokens per second and ratio to full depth by arm."""
    ids = [x[:, :PROMPT] for x in inputs(model, tokenizer, prompts, tokens)]
    ids = [x for x in ids if x.shape[1] == PROMPT]
    return [_batch(model, ids, rows, tokens, rounds) for rows in BATCHES]


def _batch(model: Any, ids: list[Tensor], rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    wanted = max(rows, 16) // rows  # as many texts at every size
    batches = [torch.cat(ids[i * rows : (i + 1) * rows]) for i in range(wanted)]
    checked = None
    if calibration := state(model).calibration:
        point = calibration.point
        checked = {"threshold": point.threshold, "exit_layers": [*point.exit_layers]}
    ways, settings = arms(rows, checked), {"max_new_tokens": tokens}
    seconds = {name: np.zeros((len(batches), rounds)) for name in ways}
    written = dict.fromkeys(ways, 0)
    texts: dict[str, list[Tensor]] = {name: [] for name in ways}
    for way in ways.values():
        generate(model, batches[0], max_new_tokens=4, **way)
    order = list(itertools.product(range(rounds), range(len(batches))))
    turns = random.Random(0)  # as in `paired.measure`
    for r, b in progress(order, f"batches of {rows}", total=len(order)):
        for name in turns.sample(list(ways), len(ways)):
            torch.manual_seed(b)
            out, seconds[name][b, r] = generate(model, batches[b], **settings, **ways[name])
            if r == 0:
                written[name] += _new_tokens(model, out.sequences[:, PROMPT:])
                texts[name].append(out.sequences)
    speed = {n: written[n] / float(np.median(seconds[n], axis=1).sum()) for n in ways}
    drawn = FULL_DEPTH + SAMPLED
    same = {n: _same(texts[n], texts[drawn if SAMPLED in n else FULL_DEPTH]) for n in ways}
    return {
        "rows": rows,
        "texts": rows * len(batches),
        "arms": {
            n: {
                "tokens_per_s": speed[n],
                "wall_speedup": speed[n] / speed[FULL_DEPTH],
                "same_text_as_full_depth": same[n],
            }
            for n in ways
        },
    }


def _new_tokens(model: Any, new: Tensor) -> int:
    """Tokens up to each row's end; what is behind it is padding."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
    ended = torch.isin(new, ends).cumsum(1)
    return int((ended - torch.isin(new, ends).long() == 0).sum())


def _same(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Share of texts that are the same, whatever padding stands behind them."""
    pairs = [pair for x, y in zip(ours, theirs, strict=True) for pair in zip(x, y, strict=True)]
    return sum(torch.equal(*_trimmed(a, b)) for a, b in pairs) / len(pairs)


def _trimmed(*texts: Tensor) -> list[Tensor]:
    """Texts without the run of equal tokens they end with."""
    return [text[: int((text != text[-1]).nonzero()[-1]) + 2] for text in texts]
