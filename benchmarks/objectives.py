"""What SoFT's exits cost the last layer, by objective: the frontier of its loss and agreement.

    python benchmarks/objectives.py --base runs/base --out runs/paper --exits 3,6,9,12 \
        --instruct dolly.jsonl --seeds 0

Every objective starts from the same base and sees the same instructions for the same number of
epochs as SFT in `paper_tables.py`, whose rows and models in --out it shares. An objective that
starts with `sft>` trains readouts of the exits' own on the frozen SFT model, half as many epochs
more, as SFT+ICT does. What is done is kept. Writes objectives.json and objectives.md there.
"""

import argparse
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import paper_report
import torch
from paper_tables import PLANS, QUICK, prepare, read_scores, settings_of
from transformers.utils import logging

from adaptive_gen.exit_readouts import load_readouts
from adaptive_gen.train.config import TrainConfig
from adaptive_gen.train.data import load
from adaptive_gen.train.evaluate import evaluate
from adaptive_gen.train.models import load_model
from adaptive_gen.train.run import fitting, train
from adaptive_gen.train.saving import write_json, write_text

OBJECTIVES = (
    "uniform distil:1+full:3 distil:1 full:3 sft>exit-block+distil:1 distil:1+full:9 quadratic "
    "rotating+distil:1 sft>exit-norm+distil:1 full:2 distil:0.5 distil:0.5+full:2"
).split()


def main() -> None:
    """Train and score what is missing, write the table."""
    options = arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    exits = [int(e) for e in options.exits.split(",")]
    plan = replace(PLANS["instruct"], **(QUICK if options.quick else {}))
    data = prepare(options.out / "instruct", options.instruct, plan)
    results = []
    for seed in options.seeds:
        for objective in ["sft", *options.objectives]:
            folder = options.out / "instruct" / f"seed{seed}"
            config = settings_of(plan, options.base, data["train"], seed)
            found = score(objective, config, folder, exits, data["test"], options.kept)
            if found is None:
                continue
            results.append({"objective": objective, "seed": seed, **found})
            report(options.out, results, exits)
    sys.stdout.write((options.out / "objectives.md").read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What SoFT's exits cost the last layer.")
    parser.add_argument("--base", required=True, help="pretrained model to start from")
    parser.add_argument("--out", type=Path, required=True, help="that of paper_tables.py")
    parser.add_argument("--exits", required=True, help="for example 3,6,9,12; full depth last")
    parser.add_argument("--instruct", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--kept", action="store_true", help="only write the table of what is there")
    parser.add_argument("--quick", action="store_true", help="few rows, one epoch")
    return parser.parse_args()


def score(
    objective: str, config: TrainConfig, folder: Path, exits: list[int], test: Path, kept_only: bool
) -> dict[str, dict[str, float]] | None:
    """Loss and agreement per exit of one objective, measured unless it is there."""
    ours = {"sft": folder / "sft", "uniform": folder / "soft"}
    out = ours.get(objective, folder / "objectives" / objective.replace(">", "-"))
    kept = out / "held_out.json"
    if kept.is_file():
        return read_scores(kept)
    if kept_only:
        return None
    layers = ",".join(map(str, exits))
    if not (out / "training.json").is_file():
        sys.stderr.write(f"seed {config.seed}: {objective}\n")
        shutil.rmtree(out, ignore_errors=True)
        config = replace(config, out=out)
        if objective.startswith("sft>"):
            adapter, _, how = objective.removeprefix("sft>").partition("+")
            changes = {"model": str(folder / "sft"), "epochs": config.epochs / 2, "lr": 2e-3}
            changes |= {"adapter": adapter, "objective": how}
        else:
            changes = {} if objective == "sft" else {"objective": objective}
        if objective != "sft":
            changes["exit_layers"] = layers
        train(replace(config, **changes), "sft" if objective == "sft" else "soft")
    model, tokenizer = load_model(str(out))
    load_readouts(model, out)
    scores = evaluate(model, load([test], tokenizer, fitting(512, model)), exits).exits
    found = {
        "loss": {str(s.exit_layer): s.loss for s in scores},
        "agreement": {str(s.exit_layer): s.agreement for s in scores},
    }
    write_json(kept, found)
    if out not in ours.values():  # the scores are what is wanted
        shutil.rmtree(out / "checkpoints")
    return found


def report(out: Path, results: list[dict], exits: list[int]) -> None:
    """Write objectives.json and objectives.md."""
    document = {**paper_report.origin("objectives.py"), "exits": exits, "results": results}
    write_json(out / "objectives.json", document)
    full, half = str(exits[-1]), str(min(exits, key=lambda e: abs(e - exits[-1] / 2)))
    sft = {r["seed"]: r["loss"][full] for r in results if r["objective"] == "sft"}
    by_objective = defaultdict(list)
    for result in results:
        by_objective[result["objective"]].append(result)
    names = ["objective", "seeds", "last-layer loss", "against SFT, %"]
    names += [f"agreement at {half}", f"loss at {half}", "mean agreement of the exits"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for objective, runs in by_objective.items():
        price = [100 * (r["loss"][full] / sft[r["seed"]] - 1) for r in runs]
        inner = [fmean(r["agreement"][str(e)] for e in exits[:-1]) for r in runs]
        cells = [f"`{objective}`", str(len(runs)), spread([r["loss"][full] for r in runs])]
        cells += [spread(price, 2, "+"), spread([r["agreement"][half] for r in runs])]
        cells += [spread([r["loss"][half] for r in runs]), spread(inner)]
        lines.append("| " + " | ".join(cells) + " |")
    write_text(out / "objectives.md", "\n".join(lines) + "\n")


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    mean = f"{fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
