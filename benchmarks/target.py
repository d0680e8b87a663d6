"""Is a calibrated speed still there on prompts that calibration never saw?

    calibrate run --target-speedup 1.3 --out CAL
    python -m benchmarks.target --calibration CAL --prompts others.txt --out NAME.json

The default operating point and full depth take turns on prompts of another file. The result holds
the wall_speedup, its 95 % bootstrap interval over prompts, and whether the lower end is at least
0.97 of the target. `--clock thread` counts the thread's CPU seconds, as in benchmarks/cost.py.
"""

import argparse
import json
import time
from pathlib import Path

import adaptive_gen
from adaptive_gen.bench import environment
from adaptive_gen.paired import agreement, interval, measure, wall_speedup
from adaptive_gen.prompts import digest, inputs, read
from adaptive_gen.settings import state

KEPT = 0.97  # of the target, at the lower end of the interval


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--most", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.clock == "thread":
        time.perf_counter = time.thread_time
    model, tokenizer = adaptive_gen.load(calibration=options.calibration)
    calibration = state(model).calibration
    assert calibration is not None
    texts = read(options.prompts)[: options.most]
    prompts = inputs(model, tokenizer, texts, options.max_new_tokens)
    arms = {"full_depth": {"adaptive": True, "threshold": 1.0}, "calibrated": {"adaptive": True}}
    settings = {"max_new_tokens": options.max_new_tokens, "rounds": options.rounds}
    runs = measure(model, prompts, arms, **settings)
    low, high = interval(runs["calibrated"], runs["full_depth"])
    target = calibration.recipe["target"]["speedup"]
    result = {
        "started": time.strftime("%Y-%m-%d %H:%M"),
        **environment(model),
        **settings,
        "clock": options.clock,
        "target": target,
        "calibrated": calibration.point.wall_speedup,
        "threshold": calibration.point.threshold,
        "exit_layers": calibration.point.exit_layers,
        "prompts": len(prompts),
        "prompts_sha256": digest(texts),
        "wall_speedup": wall_speedup(runs["calibrated"], runs["full_depth"]),
        "wall_speedup_interval": (low, high),
        "agreement": agreement(model, runs["calibrated"]),
        "kept": low >= KEPT * target,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
