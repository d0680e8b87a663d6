"""Arms: what takes turns in one run, prepared, tuned and judged."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_gen import paired
from adaptive_gen.bench import mean_depth
from adaptive_gen.paired import Runs
from adaptive_gen.settings import state

REFERENCE = "full_depth"  # our own engine, never exiting: the headline's denominator
COUNTS = ("deep_passes", "caught_up", "drafted", "accepted")  # of a report, summed over texts


@dataclass(frozen=True)
class Arm:
    """One way to generate."""

    label: str  # as the table shows it
    keywords: Mapping[str, Any]  # of `generate`; "on" names the model if not the main one
    choices: Sequence[Mapping[str, Any]] = ()  # settings to choose from, the fastest being taken


@dataclass
class Stage:
    """Several models behind one `generate`, as `paired.measure` calls it."""

    model: Any
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generation_config(self) -> Any:
        """The main model's."""
        return self.model.generation_config

    def generate(
        self, *, on: str | None = None, drafting: Mapping[str, Any] | None = None, **keywords: Any
    ) -> Any:
        """`generate` of the model named.

        What transformers drafts with it reads from the drafter's own generation config, and early
        exit changes the drafter's depth meanwhile: both are put back, whatever happens.
        """
        model = self.model if on is None else self.others[on]
        if drafting is None:
            return model.generate(**keywords)
        config, depth = model.generation_config, model.config.num_hidden_layers
        before = {name: getattr(config, name) for name in drafting}
        try:
            for name, value in drafting.items():
                setattr(config, name, value)
            return model.generate(**keywords)
        finally:
            model.config.num_hidden_layers = depth
            for name, value in before.items():
                setattr(config, name, value)


@dataclass
class Measured:
    """What came of a set of arms."""

    runs: dict[str, Runs]
    settings: dict[str, dict[str, Any]]  # arm -> the choice that was fastest
    first_call_s: dict[str, float]  # arm -> seconds of its first call, any compilation included
    skipped: dict[str, str]  # arm -> why it could not run


def transformers_arms(device: str, compiled: bool) -> dict[str, Arm]:
    """Transformers' own `generate`: dynamic cache, static cache, static cache compiled."""
    from transformers import CompileConfig

    static = {"adaptive": False, "cache_implementation": "static"}
    arms = {
        "transformers": Arm("transformers `generate`", {"adaptive": False}),
        "transformers_static": Arm(
            "transformers, static cache", {**static, "disable_compile": True}
        ),
    }
    if compiled:
        config = CompileConfig()
        if device == "cpu":
            config = CompileConfig(mode="default")
            # Off a GPU transformers compiles only when told to, and this is how.
            config._compile_all_devices = True  # type: ignore[assignment]
        arms["transformers_compiled"] = Arm(
            "transformers, static cache, compiled", {**static, "compile_config": config}
        )
    return arms


def early_exit_arm(exit_layers: Sequence[int]) -> Arm:
    """LayerSkip's self-speculation as transformers has it, at its best exit and draft length."""
    choices = [
        {"assistant_early_exit": layer, "drafting": _drafting(tokens, threshold)}
        for layer in exit_layers
        for tokens, threshold in ((3, 0.0), (5, 0.0), (10, 0.0), (20, 0.4))
    ]
    return Arm("transformers `assistant_early_exit`", {"adaptive": False}, choices)


def _drafting(tokens: int, threshold: float) -> dict[str, Any]:
    return {"num_assistant_tokens": tokens, "assistant_confidence_threshold": threshold}


def prompt_lookup_arm() -> Arm:
    """Drafts copied from the text so far, as transformers has it."""
    choices = [{"prompt_lookup_num_tokens": tokens} for tokens in (3, 5, 10)]
    return Arm("transformers prompt lookup", {"adaptive": False}, choices)


def measure(
    stage: Stage, prompts: Sequence[Tensor], arms: Mapping[str, Arm], *, tokens: int, rounds: int
) -> Measured:
    """Try every arm once, tune those with choices, then measure all of them together.

    Args:
        stage: the models.
        prompts: [1, time] ids each.
        arms: by name.
        tokens: longest text.
        rounds: of the measurement.
    """
    found = Measured({}, {}, {}, {})
    longest = max(prompts, key=lambda ids: ids.shape[1])  # static caches are made for it, once
    ready: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        keywords = {**arm.keywords, **(arm.choices[0] if arm.choices else {})}
        clock = time.perf_counter()
        try:
            paired.generate(stage, longest, max_new_tokens=tokens, **keywords)
        except Exception as error:  # a peer that fails here must not cost the others' results
            if name == REFERENCE:
                raise
            found.skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        found.first_call_s[name] = time.perf_counter() - clock
        ready[name] = keywords
        if arm.choices:
            choice = _fastest(stage, longest, arm, tokens)
            found.settings[name] = dict(choice)
            ready[name] = {**arm.keywords, **choice}
    found.runs = paired.measure(stage, prompts, ready, max_new_tokens=tokens, rounds=rounds)
    return found


def _fastest(stage: Stage, prompt: Tensor, arm: Arm, tokens: int) -> Mapping[str, Any]:
    """The choice with most tokens/s on one prompt, best of two rounds."""
    names = {str(number): choice for number, choice in enumerate(arm.choices)}
    trial = {number: {**arm.keywords, **choice} for number, choice in names.items()}
    runs = paired.measure(
        stage, [prompt], trial, max_new_tokens=tokens, rounds=2, description=f"tuning {arm.label}"
    )
    return names[max(runs, key=lambda number: runs[number].tokens_per_s)]


def judge(
    model: Any, measured: Measured, arms: Mapping[str, Arm], *, agree: bool
) -> dict[str, dict[str, Any]]:
    """What every arm did, as JSON.

    Args:
        model: the main one, whose full depth is agreed with.
        measured: what `measure` found.
        arms: what it was given.
        agree: whether agreement is worth measuring, a pass over every text.
    """
    reference = measured.runs[REFERENCE]
    n_layers = state(model).n_layers
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in measured.runs.items():
        per_round = runs.new_tokens.sum() / runs.call_s.sum(axis=0)
        row = {
            "label": arms[name].label,
            "tokens_per_s": runs.tokens_per_s,
            "tokens_per_s_p10_p90": np.percentile(per_round, [10, 90]).tolist(),
            "new_tokens": int(runs.new_tokens.sum()),
            "wall_speedup": paired.wall_speedup(runs, reference),
            "wall_speedup_interval": _interval(runs, reference),
            "first_call_s": measured.first_call_s[name],
            "agreement": paired.agreement(model, runs) if agree else None,
        }
        if name in measured.settings:
            row["setting"] = {
                key: value if isinstance(value, int | float | dict | list) else str(value)
                for key, value in measured.settings[name].items()
            }
        keywords = arms[name].keywords
        if runs.exit_layers and "on" not in keywords:
            row |= {count: sum(getattr(r, count) for r in runs.reports) for count in COUNTS}
            row["decode_tokens_per_s"] = runs.decode_tokens_per_s
            row["decode_speedup"] = runs.decode_tokens_per_s / reference.decode_tokens_per_s
            if not keywords.get("lossless"):  # there every draft runs at full depth later
                row |= _depths(runs, n_layers, row["wall_speedup"], row["decode_speedup"])
        rows[name] = row
    return rows


def _depths(
    runs: Runs, n_layers: int, wall_speedup: float, decode_speedup: float
) -> dict[str, Any]:
    layer_speedup = n_layers / mean_depth(runs)
    return {
        "mean_depth": mean_depth(runs),
        "layer_speedup": layer_speedup,
        "realised_share": _share(wall_speedup, layer_speedup),
        "decode_realised_share": _share(decode_speedup, layer_speedup),
    }


def _share(wall_speedup: float, layer_speedup: float) -> float | None:
    """How much of what the saved layers could give became time; None if none were saved."""
    return (wall_speedup - 1) / (layer_speedup - 1) if layer_speedup > 1.01 else None


def _interval(runs: Runs, reference: Runs) -> list[float] | None:
    """95 % bootstrap over prompts; None where one prompt has nothing to be drawn from."""
    return list(paired.interval(runs, reference)) if len(runs.seconds) > 1 else None


def random_prompts(vocab: int, length: int, count: int, device: str) -> list[Tensor]:
    """`count` prompts [1, length] of random ids."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (count, 1, length), generator=generator)
    return list(ids.to(device))
