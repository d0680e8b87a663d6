"""Is replay decoding? Counts the runs whose first divergence and depths the replay gets right.

    python benchmarks/replay.py --prompts 200 --max-new-tokens 64

Built-in model, its calibration's maps, five thresholds at all exits, both KV policies. Prompts: the
120 of `calibrate` and the 24 of `bench`, then halves of the former's texts until there are enough.
Ends with one JSON document: runs, equal runs, and where the others stand.
"""

import argparse
import json
import sys

import torch

import adaptive_gen
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.calibrate.prompts import prompt_set
from adaptive_gen.calibrate.replay import Rule, replay
from adaptive_gen.paired import generate
from adaptive_gen.prompts import bench_prompts, inputs
from adaptive_gen.settings import state

THRESHOLDS = (0.4, 0.6, 0.75, 0.85, 0.95)


def prompts_of(model, tokenizer, count, room):
    """Token ids [1, time] of `count` different prompts."""
    ids = inputs(model, tokenizer, [*prompt_set(None), *bench_prompts()], room)
    ids += [row[:, : row.shape[1] // 2] for row in ids if row.shape[1] > 3]
    return ids[:count]


def equal(out, prompt, text, replayed, i):
    """Whether one real run does what the replay says, up to its first divergence."""
    pairs = zip(out.sequences[0, prompt:].tolist(), text[prompt:].tolist(), strict=False)
    length = int(replayed.lengths[i])
    first = next((t for t, (a, b) in enumerate(pairs) if a != b), length)
    seen = slice(None, min(first + 1, length))
    depths = out.exit_layers[0, seen].tolist()
    same_depths = replayed.depths[i, seen].tolist() == depths
    return replayed.first_divergence[i] == first and same_depths, first < length


def main():
    """Run the comparison and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--kv", choices=("recompute", "propagate"), action="append")
    options = parser.parse_args()
    model, tokenizer = adaptive_gen.load()
    exits = state(model).exit_layers
    prompts = prompts_of(model, tokenizer, options.prompts, options.max_new_tokens)
    trace = collect(model, prompts, exits, options.max_new_tokens)
    rows = []
    for kv in options.kv or ("recompute", "propagate"):
        for threshold in THRESHOLDS:
            thresholds = dict.fromkeys(exits[:-1], threshold)
            rule = Rule("margin", state(model).calibration.maps["margin"], thresholds)
            cap = state(model).queue_cap
            replayed = replay(trace, rule, kv=kv, queue_cap=cap, model=model)
            row = {"kv": kv, "threshold": threshold, "runs": 0, "equal": 0, "diverged": 0}
            row["unequal"] = []
            for i, ids in enumerate(prompts):
                settings = {"threshold": thresholds, "confidence": "margin", "kv": kv}
                out, _ = generate(
                    model,
                    ids,
                    adaptive=True,
                    max_new_tokens=options.max_new_tokens,
                    **settings,
                )
                same, diverged = equal(out, ids.shape[1], trace.texts[i], replayed, i)
                row["runs"] += 1
                row["equal"] += int(same)
                row["diverged"] += int(diverged)
                row["unequal"] += [] if same else [i]
            print(row, file=sys.stderr)
            rows.append(row)
    result = {
        "prompts": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "runs": sum(r["runs"] for r in rows),
        "equal": sum(r["equal"] for r in rows),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
