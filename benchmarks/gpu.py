"""The GPU engine against its bars: true shapes, random weights, exits forced by a script.

Every part is measured by itself, and one that fails leaves its reason in place of its figures. On
a CPU the same code runs uncaptured on a small shape: a rehearsal, whose figures mean nothing.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from adaptive_gen.calibrate.profile import Scripted
from adaptive_gen.policy import FixedExit
from adaptive_gen.settings import state

from .arms import random_prompts
from .micro import seconds
from .shapes import Shape, build, decode_bytes, mean_depth, script

SCHEDULES = ((0.5, 0.2), (0.3, 0.3))  # share of layers at the exit, share of tokens at full depth
BATCHES = (8, 32)
# What the engine should reach on an H200 in bfloat16, by shape; see README.md.
FULL_DEPTH = {"Llama-2-13B": 135, "Llama-2-7B": 250, "Llama-3-8B": 225, "Llama-3.2-1B": 1080}
REALISED = {"Llama-2-13B": 0.9, "Llama-2-7B": 0.9, "Llama-3-8B": 0.8, "Llama-3.2-1B": 0.65}


def run(shape: Shape, device: str, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure one shape; figures by part, and `bars` with what was measured beside each."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    exit_layers = sorted({shape.exit_at(share) for share, _ in SCHEDULES})
    engine = "graphs" if device == "cuda" else "static"
    model = build(shape, exit_layers, device, dtype, engine=engine)
    bench = _Bench(shape, model, device, tokens, rounds)
    found: dict[str, Any] = {
        "model": shape.name,
        "engine": state(model).backend.name,
        "operations": state(model).backend._prepared.graphs.model.operations.name,
        "gb_per_token": decode_bytes(model) / 1e9,
    }
    parts = {
        "single": bench.single,
        "lock_step": bench.lock_step,
        "steps_us": bench.steps_us,
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
    found["warm_up_s"] = state(model).backend.warm_up_s
    found["bars"] = _bars(shape, found)
    return found


class _Bench:
    """A model and how long it is measured."""

    def __init__(self, shape: Shape, model: Any, device: str, tokens: int, rounds: int):
        self.shape, self.model, self.device = shape, model, device
        self.tokens, self.rounds = tokens, rounds

    def speed(self, rows: int, **keywords: Any) -> tuple[float, Any]:
        """Median decoded tokens/s over the rounds, the first call left out, and the last output."""
        prompts = torch.cat(random_prompts(self.shape.vocab, 16, rows, self.device))
        speeds, out = [], None
        for _ in range(self.rounds + 1):
            out = self.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=self.tokens,
                do_sample=False,
                adaptive=True,
                return_dict_in_generate=True,
                **keywords,
            )
            speeds.append(out.report.tokens_per_s)
        return statistics.median(speeds[1:]), out

    def single(self) -> dict[str, Any]:
        """Batch 1: full depth, exits armed but never taken, forced schedules, lossless."""
        full, reference = self.speed(1, threshold=1.0)
        layers, tokens = self.shape.layers, self.tokens
        first = self.shape.exit_at(SCHEDULES[0][0])
        never = Scripted([layers] * (tokens + 1), frozenset([first]))
        armed, _ = self.speed(1, policy=never, exit_layers=[first])
        lossless, out = self.speed(1, policy=FixedExit(first), exit_layers=[first], lossless=True)
        found: dict[str, Any] = {
            "full_depth": full,
            "armed": armed,
            "lossless": lossless,
            "lossless_is_greedy": torch.equal(out.sequences, reference.sequences),
            "schedules": [],
        }
        for share, deep in SCHEDULES:
            early = self.shape.exit_at(share)
            policy = Scripted(script(early, layers, deep, tokens + 1), frozenset([early]))
            for kv in ("recompute", "propagate"):
                speed, _ = self.speed(1, policy=policy, exit_layers=[early], kv=kv)
                bound = layers / mean_depth(self.shape, early, deep)
                realised = (speed / full - 1) / (bound - 1)
                found["schedules"].append(
                    {"exit": early, "deep": deep, "kv": kv, "tokens_per_s": speed,
                     "speed_up": speed / full, "bound": bound, "realised": realised}
                )  # fmt: skip
        return found

    def lock_step(self) -> list[dict[str, Any]]:
        """Batches: lossless in lock-step over full depth, four drafts in five being allowed."""
        early = self.shape.exit_at(0.25)
        layers, tokens = self.shape.layers, self.tokens
        policy = Scripted(script(early, layers, 0.2, tokens + 1), frozenset([early]))
        found = []
        for rows in BATCHES:
            full, _ = self.speed(rows, threshold=1.0)
            ours, _ = self.speed(
                rows, policy=policy, exit_layers=[early], lossless=True, schedule="lockstep"
            )
            found.append({"rows": rows, "full_depth": full, "lossless": ours, "ratio": ours / full})
        return found

    @torch.no_grad()
    def steps_us(self) -> dict[str, float]:
        """Single steps: the deeper half with 1 and 17 tokens, its K/V alone, a checked readout."""
        backend, layers = state(self.model).backend, self.shape.layers
        _, deep = backend.segments([layers // 2, layers])
        readout, cache = backend.readout(), backend.cache(256, 1)
        hidden = torch.randn(1, 17, self.shape.hidden, device=self.device, dtype=self.model.dtype)
        start = tuple(cache.lengths)

        def again(work: Callable[[], Any]) -> Callable[[], None]:
            def call() -> None:
                cache.lengths = list(start)
                work()

            return call

        def check() -> None:
            logits = readout(hidden[:, 0])
            assert readout.summaries(logits)  # type: ignore[attr-defined]

        clock = "cuda" if self.device == "cuda" else "cpu"
        return {
            "deep_1_token": seconds(again(lambda: deep.run(hidden[:, :1], cache)), clock) * 1e6,
            "deep_17_tokens": seconds(again(lambda: deep.run(hidden, cache)), clock) * 1e6,
            "store_16_tokens": seconds(again(lambda: deep.store(hidden[:, 1:], cache)), clock)
            * 1e6,
            "check": _wall(check) * 1e6,
        }


def _wall(work: Callable[[], Any]) -> float:
    """Median seconds on the host's clock: a check ends when the host knows."""
    times = []
    for _ in range(30):
        clock = time.perf_counter()
        work()
        times.append(time.perf_counter() - clock)
    return statistics.median(times[5:])


def _bars(shape: Shape, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with the figure measured for it; None where its part failed."""

    def value(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except (KeyError, IndexError, TypeError):
            return None

    single, steps = found["single"], found["steps_us"]
    rows = [
        ("G1 full depth, tok/s", FULL_DEPTH.get(shape.name), lambda: single["full_depth"]),
        ("G2 armed over full depth", 0.98 if shape.layers > 16 else 0.95,
         lambda: single["armed"] / single["full_depth"]),
        ("G3 realised share", REALISED.get(shape.name),
         lambda: single["schedules"][0]["realised"]),
        ("G4 deep pass, 17 tokens over 1 (at most)", 1.1,
         lambda: steps["deep_17_tokens"] / steps["deep_1_token"]),
        ("G5 K/V of half the layers, us", None, lambda: steps["store_16_tokens"]),
        ("G6 a checked readout, us", None, lambda: steps["check"]),
        *((f"G7 lossless lock-step, {rows} rows", 1.15 if shape.layers == 16 else 1.4,
           lambda i=i: found["lock_step"][i]["ratio"]) for i, rows in enumerate(BATCHES)),
        ("G9 lossless is greedy", True, lambda: single["lossless_is_greedy"]),
    ]  # fmt: skip
    return [{"bar": bar, "wanted": wanted, "measured": value(get)} for bar, wanted, get in rows]
