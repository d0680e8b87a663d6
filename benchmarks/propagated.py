"""Does training with propagated keys and values close the gap of `kv="propagate"`?

    python benchmarks/propagated.py MODEL... --out benchmarks/results/DATE-propagated.json

Every model writes greedy texts at full depth; exact replay then says, for a threshold on the raw
margin at all exits, how deep its tokens run and how much of each text comes before the first token
that differs, under `recompute` and under `propagate`. Models are directories; they should have been
trained alike but for the objective.
"""

import argparse
import sys
from pathlib import Path

import paper_report
import torch
from replay import prompts_of

import adaptive_gen
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.calibrate.replay import Rule, replay
from adaptive_gen.settings import state
from adaptive_gen.train.metrics import interval
from adaptive_gen.train.saving import write_json

THRESHOLDS = (0.3, 0.5, 0.7, 0.85, 0.95)


def main() -> None:
    """Measure every model, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="Training for kv=propagate, measured.")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        model, tokenizer = adaptive_gen.load(name, calibration=False)
        exits = state(model).exit_layers
        prompts = prompts_of(model, tokenizer, options.prompts, options.max_new_tokens)
        trace = collect(model, prompts, exits, options.max_new_tokens)
        for threshold in THRESHOLDS:
            rule = Rule("margin", {}, dict.fromkeys(exits[:-1], threshold))
            row = {"model": Path(name).name, "threshold": threshold}
            for kv in ("recompute", "propagate"):
                cap = state(model).queue_cap
                found = replay(trace, rule, kv=kv, queue_cap=cap, model=model)
                kept = (1 - found.prefix_loss).tolist()
                row[kv] = {
                    "prefix": sum(kept) / len(kept),
                    "interval": interval(kept),
                    "exact": float(1 - found.exact_loss.mean()),
                    "mean_depth": float(found.depths[found.depths > 0].mean()),
                }
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print(
        "| model | threshold | depth | prefix, recompute | prefix, propagate | gap |\n"
        + "|---" * 6
        + "|"
    )
    for row in rows:
        exact, carried = row["recompute"], row["propagate"]
        cells = [row["model"], row["threshold"], f"{carried['mean_depth']:.2f}"]
        cells += [f"{exact['prefix']:.3f}", f"{carried['prefix']:.3f}"]
        cells += [f"{exact['prefix'] - carried['prefix']:+.3f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    if options.out:
        write_json(options.out, {**paper_report.origin("propagated.py"), "rows": rows})


if __name__ == "__main__":
    main()
