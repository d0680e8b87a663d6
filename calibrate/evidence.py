"""What the report shows besides the operating points: curves, histograms, and the worst texts."""

from typing import Any

import numpy as np

from . import losses, maps
from .found import Found
from .quality import first_divergence, rouge
from .trace import Trace
from .verify import Arena, Measured

WORST = 10
BINS = 10


def gather(
    tokenizer: Any, unseen: Trace, found: Found, chosen: Measured, arena: Arena
) -> dict[str, Any]:
    """As JSON.

    Args:
        tokenizer: decodes the texts.
        unseen: traces of the prompts that were measured on.
        found: by the search.
        chosen: the default operating point, measured on those prompts.
        arena: where it was measured.
    """
    rule = found.rule(chosen.candidate)
    replayed = losses.replay_of(arena.model, unseen, rule, arena.kv)
    return {
        "exit_histogram": {str(e): n for e, n in sorted(chosen.exit_histogram.items())},
        "reliability": _reliability(unseen, found),
        "survival": {
            "lengths": unseen.lengths.tolist(),
            "replayed": replayed.first_divergence.tolist(),
            "decoded": [first_divergence(ours, theirs) for _, ours, theirs in chosen.texts],
        },
        "front": [{"speedup": c.speedup, "agreement": c.agreement} for c in found.front],
        "worst": _worst(tokenizer, chosen),
    }


def _reliability(trace: Trace, found: Found) -> list[dict[str, Any]]:
    """Promised and kept chance of agreement per exit, in bins of equally many tokens."""
    rows = []
    for k, exit_layer in enumerate(trace.exit_layers[:-1]):
        raw, agrees = trace.at(found.measure, k)
        chance = maps.apply(found.curves[found.measure][exit_layer], raw)
        order = np.argsort(chance, kind="stable")
        parts = [part for part in np.array_split(order, BINS) if len(part)]
        rows.append(
            {
                "exit_layer": exit_layer,
                "promised": [float(chance[part].mean()) for part in parts],
                "kept": [float(agrees[part].mean()) for part in parts],
                "tokens": [len(part) for part in parts],
            }
        )
    return rows


def _worst(tokenizer: Any, chosen: Measured) -> list[dict[str, Any]]:
    """The texts that differ most from full depth's."""
    rows = sorted(chosen.texts, key=lambda row: -rouge(row[1], row[2]))[:WORST]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [
        {
            "prompt": text(prompt),
            # What both share first, so that the page can show where they part.
            "shared": text(ours[: first_divergence(ours, theirs)]),
            "adaptive": text(ours[first_divergence(ours, theirs) :]),
            "full_depth": text(theirs[first_divergence(ours, theirs) :]),
            "rouge_loss": rouge(ours, theirs),
        }
        for prompt, ours, theirs in rows
    ]
