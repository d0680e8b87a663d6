"""The benchmark of `adaptive-gen bench`: transformers, full depth and adaptive depth, paired."""

import dataclasses
import importlib.metadata
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .engine import team
from .engine.machine_code import kernel
from .paired import Runs, agreement, interval, measure, wall_speedup
from .policy import ThresholdPolicy
from .prompts import Prompt, digest, inputs
from .settings import Settings, resolve, state

MAX_NEW_TOKENS = 64
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a benchmark found; speeds are whole calls, prefill included, unless named otherwise."""

    wall_speedup: float  # tokens/s, adaptive over our own engine at full depth
    layer_speedup: float
    mean_depth: float
    n_layers: int
    agreement: float  # of the adaptive text with full depth, on the same prefix
    tokens_per_s: dict[str, float]  # arm -> new tokens per second
    wall_speedup_interval: tuple[float, float]  # 95 % bootstrap over prompts
    wall_speedup_decode: float | None  # prefill left out; None if texts have one token
    speedup_over_transformers: float
    decode_tokens_per_s: dict[str, float]  # our two arms
    exit_histogram: dict[int, int]  # exit layer -> new tokens
    agreement_full_depth: float  # of our full-depth text; below 1 only by rounding
    same_text_as_transformers: float  # share of prompts whose full-depth text is identical
    static_truncation: dict[str, Any]  # the exit nearest the mean depth, used for every token
    recipe: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The result as one JSON document."""
        return dataclasses.asdict(self)


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    settings: Mapping[str, Any],
    max_new_tokens: int = MAX_NEW_TOKENS,
    rounds: int = ROUNDS,
) -> Comparison:
    """Measure adaptive decoding against full depth and against transformers' own `generate`.

    Args:
        model: wrapped.
        tokenizer: encodes the prompts.
        prompts: texts or chats.
        settings: adaptive keywords of `generate`: threshold, target_speedup, kv, ...
        max_new_tokens: texts end there, or earlier by themselves.
        rounds: repetitions of everything.

    Raises:
        AdaptiveGenError: a setting or prompt that cannot be used.
    """
    resolved = resolve(SimpleNamespace(**settings), state(model))
    arms: dict[str, Mapping[str, Any]] = {
        "transformers": {"adaptive": False},
        "full_depth": {"adaptive": True, "threshold": 1.0, "kv": resolved.kv},
        "adaptive": {"adaptive": True, **settings},
    }
    encoded = inputs(model, tokenizer, prompts, max_new_tokens)
    runs = measure(model, encoded, arms, max_new_tokens=max_new_tokens, rounds=rounds)
    recipe = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        **environment(model),
        "weights": state(model).backend.weights,
        **_setting(resolved),
        "prompts": len(prompts),
        "prompts_sha256": digest(prompts),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "new_tokens": {name: int(runs[name].new_tokens.sum()) for name in arms},
    }
    return _judge(model, runs, resolved, recipe)


def _judge(
    model: Any, runs: Mapping[str, Runs], resolved: Settings, recipe: dict[str, Any]
) -> Comparison:
    theirs, full, adaptive = runs["transformers"], runs["full_depth"], runs["adaptive"]
    depth = mean_depth(adaptive)
    n_layers = state(model).n_layers
    pairs = zip(theirs.sequences, full.sequences, strict=True)
    return Comparison(
        wall_speedup=wall_speedup(adaptive, full),
        layer_speedup=n_layers / depth,
        mean_depth=depth,
        n_layers=n_layers,
        agreement=agreement(model, adaptive),
        tokens_per_s={name: arm.tokens_per_s for name, arm in runs.items()},
        wall_speedup_interval=interval(adaptive, full),
        wall_speedup_decode=_ratio(adaptive.decode_tokens_per_s, full.decode_tokens_per_s),
        speedup_over_transformers=wall_speedup(adaptive, theirs),
        decode_tokens_per_s={n: runs[n].decode_tokens_per_s for n in ("full_depth", "adaptive")},
        exit_histogram=dict(sorted(Counter(adaptive.exit_layers).items())),
        agreement_full_depth=agreement(model, full),
        same_text_as_transformers=sum(torch.equal(a, b) for a, b in pairs) / len(full.sequences),
        static_truncation=_static(model, adaptive, depth),
        recipe=recipe,
    )


def mean_depth(runs: Runs) -> float:
    """Layers per new token."""
    return sum(runs.exit_layers) / len(runs.exit_layers)


def environment(model: Any) -> dict[str, Any]:
    """What a measurement depends on besides the model: versions, hardware, dtype, threads."""
    packages = ("adaptive-gen", "torch", "transformers")
    on_gpu = model.device.type == "cuda"
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "hardware": torch.cuda.get_device_name(model.device) if on_gpu else _cpu(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kernel_threads": team.threads(),  # in the back end `compiled`
    }


def threads(recipe: Mapping[str, Any]) -> str:
    """How many, and how many the compiled kernels had if that is another number."""
    count = recipe["threads"]
    own = recipe.get("kernel_threads", count)
    text = f"{count} thread{'s' * (count > 1)}"
    return text if own == count else f"{text} ({own} for compiled kernels)"


def commit() -> str | None:
    """The commit of the clone this runs from; None for an installed copy."""
    git = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "."]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found or None


def _cpu() -> str:
    """Its name, and its kind as compilers call it: many names say nothing about that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return name if find_spec("numba") is None else f"{name} ({kernel('processor').NAME})"


def _setting(resolved: Settings) -> dict[str, Any]:
    """The adaptive arm's setting as it was used, completed from the calibration."""
    policy = resolved.policy
    thresholds = dict(policy.thresholds) if isinstance(policy, ThresholdPolicy) else None
    return {
        "threshold": thresholds if thresholds is not None else repr(policy),
        "exit_layers": list(resolved.exit_layers),
        "kv": resolved.kv,
    }


def _static(model: Any, runs: Runs, depth: float) -> dict[str, Any]:
    """What cutting the model off would give: its exit nearest the mean depth, for every token."""
    trained = state(model).exit_layers[:-1] or state(model).exit_layers
    nearest = min(trained, key=lambda exit_layer: abs(exit_layer - depth))
    return {"exit_layer": nearest, "agreement": agreement(model, runs, nearest)}


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
