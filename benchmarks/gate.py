r"""Does the gate earn its place? Every measure at equal agreement, on one model.

    python -m benchmarks.gate --model DIR --out NAME.json       # without --model: the built-in one

The gate and every measure's maps are fitted to one half of the prompts. On the other half each
measure gets the exits and the threshold that are predicted to be fastest there among those whose
agreement is at least `--agreement`, from its own timing of this device: what is compared is what a
measure can do, not how well a threshold carries over. Then all of them and full depth take turns on
these prompts. Per measure: AUROC at each exit, threshold, checks per token (of full depth's texts),
wall_speedup with its 95 % bootstrap interval over prompts, and the agreement of what was written.

A gate should pay where the LM head is dear: with a large vocabulary and a small model. These make
one of 32,000 tokens (the merges need more text than the training; sized for about 10 minutes of two
CPU cores, not timed):

    adaptive-train sft --from-config train/recipes/builtin_config.json --vocab-size 32000 \
      --data DATA/lcats-gutenberg-stories/stories.jsonl.gz --max-steps 1 --batch-size 8 --out BASE
    adaptive-train soft BASE --exit-layers 3,6,9,12 --objective distil:0.6+full:2 --lr 2.5e-3 \
      --data DATA/tinystories-slices/train_head_2.1MB.txt.gz --seq-len 256 --batch-size 8 \
      --max-steps 150 --out DIR
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_gen import ui
from adaptive_gen.bench import environment
from adaptive_gen.calibrate import maps, search
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.calibrate.cost import Cost
from adaptive_gen.calibrate.gate import with_gate
from adaptive_gen.calibrate.profile import profile
from adaptive_gen.calibrate.prompts import ordered, prompt_set
from adaptive_gen.calibrate.search import Candidate, Traced
from adaptive_gen.calibrate.stages import PROFILE_TOKENS, curves_of, prompt_ids
from adaptive_gen.calibrate.target import Target
from adaptive_gen.calibrate.trace import Trace
from adaptive_gen.calibration import Calibration
from adaptive_gen.confidence import GATE
from adaptive_gen.files import whole
from adaptive_gen.options import load_model
from adaptive_gen.paired import agreement, interval, measure, wall_speedup
from adaptive_gen.prompts import inputs
from adaptive_gen.settings import state

KV = "recompute"
FULL = "full_depth"


def chosen(traced: Traced, wanted: float) -> tuple[Candidate, float]:
    """The setting predicted to be fastest at this agreement, and its checks per token."""
    front = search.front(search.candidates(traced))
    found = front[search.pick(front, Target("disagreement", 1 - wanted))]
    thresholds = [found.thresholds.get(e, search.NEVER) for e in traced.exits]
    outcome = traced.simulate(np.array(thresholds)[:, None])
    return found, float(outcome.work.checks[0] / outcome.tokens)


def prepared(model: Any, prompts: list[Tensor], tokens: int) -> tuple[Trace, dict, list]:
    """Traces of the half to compare on, every measure's cost there, and how well each ranks.

    The model gets the gate, and a calibration of maps alone.
    """
    exits = state(model).exit_layers
    every = collect(model, prompts, exits, tokens)
    half = (len(prompts) + 1) // 2
    state(model).gate, every = with_gate(model, every, half)
    seen, unseen = every.split(half)
    curves = {name: curves_of(seen, name) for name in seen.confidence}
    state(model).calibration = Calibration(exits[-1], GATE, KV, curves, (), 0, {}, {})
    some = prompt_ids(seen.take(slice(0, 16)), model)
    settings = {"kv": KV, "tokens": min(PROFILE_TOKENS, tokens)}
    costs = {name: profile(model, some, exits, measure=name, **settings) for name in curves}
    return unseen, costs, [asdict(row) for row in maps.qualities(unseen, curves)]


def compare(
    model: Any, unseen: Trace, costs: dict[str, Cost], wanted: float, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per measure, all measured together."""
    calibration, cap = state(model).calibration, state(model).queue_cap
    assert calibration is not None
    found: dict[str, tuple[Candidate, float]] = {}
    for name, cost in costs.items():
        traced = Traced.of(unseen, calibration.maps[name], name, cost, KV, cap)
        found[name] = chosen(traced, wanted)
    arms: dict[str, dict[str, Any]] = {FULL: {"adaptive": True, "threshold": 1.0, "kv": KV}}
    for name, (setting, _) in found.items():
        arms[name] = {
            "adaptive": True,
            "confidence": name,
            "threshold": setting.dial,
            "exit_layers": list(setting.exit_layers),
            "kv": KV,
        }
    runs = measure(model, prompt_ids(unseen, model), arms, max_new_tokens=tokens, rounds=rounds)
    return [
        {
            "confidence": name,
            "exits": setting.exit_layers[:-1],
            "threshold": setting.dial,
            "checks_per_token": checks,
            "mean_depth": setting.mean_depth,
            "predicted_agreement": setting.agreement,
            "predicted_speedup": setting.speedup,
            "agreement": agreement(model, runs[name]),
            "wall_speedup": wall_speedup(runs[name], runs[FULL]),
            "wall_speedup_interval": interval(runs[name], runs[FULL]),
            "tokens_per_s": runs[name].tokens_per_s,
        }
        for name, (setting, checks) in found.items()
    ]


def show(ranks: list[dict], rows: list[dict], exits: tuple[int, ...], wanted: float) -> None:
    """The table: a row per measure."""
    by_place = {(row["confidence"], row["exit_layer"]): row["auroc"] for row in ranks}
    columns = ("confidence", *(f"AUROC {e}" for e in exits), "exits", "threshold", "checks/token")
    columns += ("agreement", "wall_speedup", "low", "high")
    cells = [
        (
            row["confidence"],
            *(by_place[row["confidence"], e] for e in exits),
            row["exits"],
            row["threshold"],
            row["checks_per_token"],
            row["agreement"],
            row["wall_speedup"],
            *row["wall_speedup_interval"],
        )
        for row in rows
    ]
    ui.table(f"at {wanted:.0%} agreement", columns, cells)


def main() -> None:
    """Compare, print the table and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--most", type=int, default=120, help="prompts, both halves")
    parser.add_argument("--agreement", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started, tokens = time.strftime("%Y-%m-%d %H:%M"), options.max_new_tokens
    model, tokenizer = load_model(options.model, exit_layers=None, calibration=False)
    texts = ordered(prompt_set(options.prompts), 0)[: options.most]
    prompts = inputs(model, tokenizer, texts, tokens)
    unseen, costs, ranks = prepared(model, prompts, tokens)
    rows = compare(model, unseen, costs, options.agreement, tokens, options.rounds)
    show(ranks, rows, unseen.exit_layers[:-1], options.agreement)
    result = {
        "started": started,
        **environment(model),
        "model": options.model or "built-in",
        "vocab": model.config.get_text_config().vocab_size,
        "prompts": len(prompts),
        "max_new_tokens": tokens,
        "rounds": options.rounds,
        "wanted_agreement": options.agreement,
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "auroc": ranks,
        "measures": rows,
    }
    with whole(options.out, "--out") as file:
        file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
