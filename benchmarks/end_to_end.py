"""The end-to-end track: a trained, calibrated model against every peer, on prompts it never saw."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import adaptive_gen
from adaptive_gen import bench
from adaptive_gen.policy import Check
from adaptive_gen.prompts import Prompt, digest, inputs
from adaptive_gen.settings import state

from . import arms as peers
from .arms import Arm, Stage
from .shapes import truncated

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)  # points of the speed-against-agreement curve


@dataclass(frozen=True)
class FixedDrafts:
    """Self-speculation as it is usual: so many tokens leave at one exit, the next goes deep."""

    exit_layer: int
    tokens: int

    def may_exit(self, exit_layer: int, position: int) -> bool:
        """At the exit, unless it is the turn of a deep token."""
        return exit_layer == self.exit_layer and position % (self.tokens + 1) < self.tokens

    def least(self, exit_layer: int, position: int) -> float:
        """Any confidence or none."""
        return -math.inf

    def should_exit(self, check: Check) -> bool:
        """Always where it may."""
        return True


def run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    rounds: int,
    compiled: bool,
) -> dict[str, Any]:
    """Measure one model.

    Args:
        model: wrapped, a Llama, with its calibration.
        tokenizer: encodes the prompts.
        prompts: texts or chats.
        tokens: longest text; texts may end by themselves.
        rounds: repetitions; medians count.
        compiled: whether compiled transformers takes part.
    """
    wrapped = state(model)
    below = wrapped.exit_layers[:-1]
    cut = {f"cut_{layer}": truncated(model, layer) for layer in below}
    rounded = adaptive_gen.wrap(
        copy.copy(model), wrapped.exit_layers, wrapped.calibration, weights="int8"
    )
    others = {**cut, "int8": rounded}
    arms = {
        **peers.transformers_arms(model.device.type, compiled),
        "transformers_early_exit": peers.early_exit_arm(below),
        "transformers_prompt_lookup": peers.prompt_lookup_arm(),
        peers.REFERENCE: Arm("adaptive_gen, full depth", {"adaptive": True, "threshold": 1.0}),
        "adaptive": Arm("adaptive_gen, adaptive (calibrated default)", {"adaptive": True}),
        "fixed_drafts": Arm(
            "adaptive_gen, lossless with drafts of one length",
            {"adaptive": True, "lossless": True},
            [
                {"policy": FixedDrafts(layer, number), "exit_layers": [layer]}
                for layer in below
                for number in (1, 2, 4)
            ],
        ),
        "int8_full_depth": Arm(
            "adaptive_gen, int8 weights, full depth",
            {"on": "int8", "adaptive": True, "threshold": 1.0},
        ),
        "int8_adaptive": Arm(
            "adaptive_gen, int8 weights, adaptive", {"on": "int8", "adaptive": True}
        ),
        "lossless": Arm("adaptive_gen, lossless", {"adaptive": True, "lossless": True}),
        **{
            f"threshold_{t}": Arm(f"threshold {t}", {"adaptive": True, "threshold": t})
            for t in THRESHOLDS
        },
        **{
            name: Arm(
                f"cut off at layer {name.removeprefix('cut_')} (static truncation)",
                {"on": name, "adaptive": True, "threshold": 1.0},
            )
            for name in cut
        },
    }
    measured = peers.measure(
        Stage(model, others),
        inputs(model, tokenizer, prompts, tokens),
        arms,
        tokens=tokens,
        rounds=rounds,
    )
    rows = peers.judge(model, measured, arms, agree=True)
    # At equal depth, not at equal speed: the trained exit nearest to what adaptive depth spent.
    depth = bench.mean_depth(measured.runs["adaptive"])
    return {
        "model": model.name_or_path.rsplit("/", 1)[-1] or type(model).__name__,
        "parameters": model.num_parameters(),
        "n_layers": wrapped.n_layers,
        "exit_layers": list(wrapped.exit_layers),
        "engine": wrapped.backend.name,
        "calibrated": wrapped.calibration is not None,
        "prompts": len(prompts),
        "prompts_sha256": digest(prompts),
        "static_truncation": f"cut_{min(below, key=lambda layer: abs(layer - depth))}",
        "arms": rows,
        "skipped": measured.skipped,
    }
