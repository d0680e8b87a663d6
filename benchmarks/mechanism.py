"""The mechanism track: what the engine makes of exits, whatever the model's quality.

Random weights of true or small shapes and exits forced by a script, so that nothing is downloaded
and the saved layers are known in advance.
"""

import copy
from typing import Any

import torch

import adaptive_gen
from adaptive_gen.calibrate.profile import Scripted
from adaptive_gen.gate import Gate
from adaptive_gen.policy import FixedExit
from adaptive_gen.settings import state

from . import arms as peers
from .arms import Arm, Stage
from .shapes import Shape, build, decode_bytes, mean_depth, script, truncated

# Share of the layers an early token runs, share of the tokens that run at full depth.
SCHEDULES = ((0.25, 0.3), (0.5, 0.2))


def run(
    shape: Shape,
    device: str,
    *,
    tokens: int,
    prompts: int,
    prompt_length: int,
    rounds: int,
    compiled: bool,
) -> dict[str, Any]:
    """Measure one shape.

    Args:
        shape: of the random model.
        device: "cpu" or "cuda", where all shapes are in bfloat16.
        tokens: new tokens of every text.
        prompts: how many.
        prompt_length: ids of each.
        rounds: repetitions; medians count.
        compiled: whether compiled transformers takes part.
    """
    dtype = shape.dtype if device == "cpu" else torch.bfloat16
    exit_layers = sorted({shape.exit_at(share) for share, _ in SCHEDULES})
    model = build(shape, exit_layers, device, dtype)
    # What a gate answers does not matter, the exits being forced: only what asking it costs.
    probes = {layer: torch.zeros(shape.hidden, device=device) for layer in exit_layers}
    biases = {layer: torch.zeros((), device=device) for layer in exit_layers}
    state(model).gate = Gate(probes, biases)
    others: dict[str, Any] = {}
    arms = {
        **peers.transformers_arms(device, compiled),
        "transformers_early_exit": peers.early_exit_arm(exit_layers),
        **_own_arms(shape, model, others, tokens),
    }
    measured = peers.measure(
        Stage(model, others),
        peers.random_prompts(shape.vocab, prompt_length, prompts, device),
        arms,
        tokens=tokens,
        rounds=rounds,
    )
    speed = measured.runs[peers.REFERENCE].tokens_per_s
    return {
        "model": shape.name,
        "dtype": str(dtype).removeprefix("torch."),
        "n_layers": shape.layers,
        "exit_layers": exit_layers,
        "decode_bytes": decode_bytes(model),
        "full_depth_gb_per_s": decode_bytes(model) * speed / 1e9,
        "arms": peers.judge(model, measured, arms, agree=False),
        "skipped": measured.skipped,
    }


def _own_arms(shape: Shape, model: Any, others: dict[str, Any], tokens: int) -> dict[str, Arm]:
    """Our engine: never exiting, armed, on schedule, and cut off at the schedule's mean depth."""
    full, first = shape.layers, shape.exit_at(SCHEDULES[0][0])
    armed = Scripted([full] * (tokens + 1), frozenset([first]))
    found = {
        peers.REFERENCE: Arm("adaptive_gen, full depth", {"adaptive": True, "threshold": 1.0}),
        "armed": Arm(
            f"exit {first} checked, never taken",
            {"adaptive": True, "policy": armed, "exit_layers": [first]},
        ),
    }
    found["gate_armed"] = _by_gate(found["armed"])
    # A bare threshold leaves it to the engine to find out that nothing ever leaves.
    found["armed_bare"] = Arm(
        f"threshold 0.999 at exits {first} and {shape.exit_at(SCHEDULES[1][0])}, never reached",
        {"adaptive": True, "threshold": 0.999},
    )
    for share, deep in SCHEDULES:
        early = shape.exit_at(share)
        policy = Scripted(script(early, full, deep, tokens + 1), frozenset([early]))
        for kv in ("recompute", "propagate"):
            found[f"exit_{share}_{kv}"] = Arm(
                f"exit {early}, {deep:.0%} of tokens deep, {kv}",
                {"adaptive": True, "policy": policy, "exit_layers": [early], "kv": kv},
            )
            if early == first:
                found[f"gate_{share}_{kv}"] = _by_gate(found[f"exit_{share}_{kv}"])
        depth = round(mean_depth(shape, early, deep))
        others[f"cut_{depth}"] = truncated(model, depth)
        found[f"cut_{depth}"] = Arm(
            f"cut off at layer {depth} (static truncation)",
            {"on": f"cut_{depth}", "adaptive": True, "threshold": 1.0},
        )
    if model.device.type == "cpu":
        others["int8"] = adaptive_gen.wrap(copy.copy(model), [first], weights="int8")
        found["int8_full_depth"] = Arm(
            "int8 weights, full depth", {"on": "int8", "adaptive": True, "threshold": 1.0}
        )
        policy = Scripted(script(first, full, SCHEDULES[0][1], tokens + 1), frozenset([first]))
        found["int8_exit"] = Arm(
            f"int8 weights, exit {first}, {SCHEDULES[0][1]:.0%} of tokens deep, recompute",
            {"on": "int8", "adaptive": True, "policy": policy, "exit_layers": [first]},
        )
    found["lossless"] = Arm(
        f"lossless, drafts of exit {first} always right",
        {"adaptive": True, "lossless": True, "policy": FixedExit(first), "exit_layers": [first]},
    )
    return found


def _by_gate(arm: Arm) -> Arm:
    """The same, asked of a gate: only a token that leaves is read out at an exit."""
    return Arm(f"{arm.label}, gate", {**arm.keywords, "confidence": "gate"})
