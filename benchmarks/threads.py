"""What helper threads give the back end `compiled`: thread counts taking turns on the same texts.

python -m benchmarks.threads --threads 1 --threads 2
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

import adaptive_gen
from adaptive_gen import bench, paired
from adaptive_gen.calibrate.profile import Scripted
from adaptive_gen.engine import team

from .arms import random_prompts
from .shapes import SMALL, Shape, build, script

EARLY, DEEP = 0.25, 0.3  # as in the mechanism track


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--threads", type=int, action="append", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write")
    args = parser.parse_args()
    counts = args.threads or [1, 2]
    torch.set_num_threads(1)  # all but compiled products stays as it is
    found: dict[str, Any] = {}
    for shape in SMALL:
        model, exits = _model(shape, args.tokens)
        found[shape.name] = _measured(model, shape.vocab, exits, counts, args)
    model, _ = adaptive_gen.load()
    exits = {"adaptive": True}
    found["builtin"] = _measured(model, model.config.vocab_size, exits, counts, args)
    for name, row in found.items():
        print(name, {key: f"{value:.2f}" for key, value in row.items()})
    recipe = {
        "command": " ".join(["python -m benchmarks.threads", *sys.argv[1:]]),
        "commit": bench.commit(),
        **bench.environment(model),
    }
    args.out.write_text(json.dumps({"recipe": recipe, "threads": found}, indent=1) + "\n")


def _model(shape: Shape, tokens: int) -> tuple[Any, dict[str, Any]]:
    early, full = shape.exit_at(EARLY), shape.layers
    model = build(shape, [early], "cpu", torch.float32, engine="compiled")
    policy = Scripted(script(early, full, DEEP, tokens + 1), frozenset([early]))
    return model, {"adaptive": True, "policy": policy, "exit_layers": [early]}


def _measured(
    model: Any, vocab: int, exits: dict[str, Any], counts: list[int], args: Any
) -> dict[str, float]:
    """Tokens decoded per second, prompts aside, and each count's over the first's in its round."""
    arms = {"full depth": {"adaptive": True, "threshold": 1.0}, "exits": exits}
    (prompt,) = random_prompts(vocab, 16, 1, "cpu")
    speeds: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds + 1):
        for threads in counts:
            team.allow(threads)
            for name, arm in arms.items():
                out, _ = paired.generate(model, prompt, max_new_tokens=args.tokens, **arm)
                speed = (out.report.new_tokens - 1) / out.report.decode_s
                speeds.setdefault((name, threads), []).append(speed)
    team.allow(0)
    row = {}
    for (name, threads), values in speeds.items():
        own, first = values[1:], speeds[name, counts[0]][1:]  # the first round warms up
        row[f"{name}, {threads}: tokens/s"] = median(own)
        row[f"{name}, {threads} over {counts[0]}"] = median(
            a / b for a, b in zip(own, first, strict=True)
        )
    return row


if __name__ == "__main__":
    main()
