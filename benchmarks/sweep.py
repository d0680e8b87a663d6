"""How the cost grows: tokens/s against context length, batch, number of exits and vocabulary.

One thing changes at a time; the rest is the base shape, a short context and one exit.
"""

import dataclasses
from typing import Any

import torch

from adaptive_gen.calibrate.profile import Scripted

from . import arms as peers
from .arms import Arm, Stage
from .shapes import Shape, build, script

AXES = {
    "context": (128, 512, 2048, 8192),
    "batch": (1, 2, 4, 8, 16, 32),
    "exits": (1, 2, 4, 8),
    "vocab": (4096, 32768, 131072),
}
BASE = {"context": 32, "batch": 1, "exits": 1}
DEEP = 0.3  # share of tokens that run at full depth; the others leave at the first exit


def run(
    shape: Shape, device: str, axes: list[str], *, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Measure one point after the other.

    Args:
        shape: where every axis starts.
        device: "cpu" (float32) or "cuda" (bfloat16).
        axes: some of `AXES`.
        tokens: new tokens of a text.
        rounds: repetitions; medians count.
    """
    return [
        {"axis": axis, "value": value, **_point(shape, device, tokens, rounds, axis, value)}
        for axis in axes
        for value in AXES[axis]
        if axis != "exits" or value < shape.layers
    ]


def _point(
    shape: Shape, device: str, tokens: int, rounds: int, axis: str, value: int
) -> dict[str, Any]:
    at = {**BASE, "vocab": shape.vocab, axis: value}
    shape = dataclasses.replace(shape, vocab=at["vocab"])
    exit_layers = _spread(shape.layers, at["exits"])
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = build(shape, exit_layers, device, dtype)
    first = exit_layers[0]
    # Deep tokens are read out at every exit on their way, as a threshold would have it.
    on_schedule = Scripted(script(first, shape.layers, DEEP, tokens + 1), frozenset(exit_layers))
    scheduled = {"adaptive": True, "policy": on_schedule, "exit_layers": exit_layers}
    leaving = f"exit {first}, {DEEP:.0%} of tokens deep"
    arms = {
        "transformers": Arm("transformers `generate`", {"adaptive": False}),
        peers.REFERENCE: Arm("adaptive_gen, full depth", {"adaptive": True, "threshold": 1.0}),
        "adaptive": Arm(leaving, scheduled),
        "propagate": Arm(f"{leaving}, propagated", {**scheduled, "kv": "propagate"}),
        "lossless": Arm(f"{leaving}, lossless", {**scheduled, "lossless": True}),
    }
    rows = at["batch"]
    prompts = [torch.cat(peers.random_prompts(shape.vocab, at["context"], rows, device))]
    measured = peers.measure(Stage(model), prompts, arms, tokens=tokens, rounds=rounds)
    prefill = peers.measure(Stage(model), prompts, arms, tokens=1, rounds=rounds)
    found = peers.judge(model, measured, arms, agree=False)
    for name, arm in found.items():  # a long prompt's prefill would hide the decoding
        decode_s = float((measured.runs[name].seconds - prefill.runs[name].seconds).sum())
        arm["prefill_s"] = float(prefill.runs[name].seconds.sum())
        # Our own reports say what a call spent on decoding; a difference of two calls is noisier.
        other = (tokens - 1) / decode_s if decode_s > 0 else 0.0
        arm["decode_tokens_per_s"] = rows * (arm.get("decode_tokens_per_s") or other) or None
        # A measured text is one row; here all rows of a batch are as long.
        arm["new_tokens"] *= rows
        arm["tokens_per_s"] *= rows
        arm["tokens_per_s_p10_p90"] = [rows * speed for speed in arm["tokens_per_s_p10_p90"]]
    return {"model": shape.name, "exit_layers": exit_layers, "arms": found}


def _spread(layers: int, exits: int) -> list[int]:
    """`exits` exit layers, the first at a quarter of the depth, the others evenly behind it."""
    first = max(1, round(layers / 4))
    step = (layers - first) / exits
    return sorted({min(layers - 1, first + round(i * step)) for i in range(exits)})
