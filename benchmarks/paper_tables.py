"""The comparison of Sorted LLaMA at a small scale: SFT, SFT+ICT, Extracted and SoFT at every exit.

    python benchmarks/paper_tables.py --base runs/base --out runs/paper --exits 3,6,9,12 \
        --instruct dolly.jsonl --questions webquestions.jsonl --seeds 0 1 2

For each seed and task, from one base: SFT; SFT+ICT (heads of the frozen SFT model, half as many
epochs more, as in the paper); the first n layers fine-tuned alone, for each exit; SoFT. SFT, each
Extracted model and SoFT see the same rows for the same number of epochs. One process, one thread.
What is done is kept in --out: the same command goes on where it stopped. Writes tables.json and
tables.md there.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paper_report
import torch
from transformers.utils import logging

from adaptive_gen.exit_readouts import load_readouts
from adaptive_gen.train.asking import ask, asked, questions_in
from adaptive_gen.train.checks import checkpoint_to_resume
from adaptive_gen.train.config import TrainConfig
from adaptive_gen.train.data import load
from adaptive_gen.train.evaluate import evaluate
from adaptive_gen.train.models import load_model
from adaptive_gen.train.reading import read_json_rows
from adaptive_gen.train.run import fitting, train
from adaptive_gen.train.saving import RECORD, write_json, write_text


@dataclass(frozen=True)
class Plan:
    """How one task is trained and asked."""

    rows: int  # of training data
    epochs: float
    lr: float
    batch_size: int  # sequences of 256 tokens, several rows in each
    max_new_tokens: int
    longest: tuple[int, int]  # characters of a question and of its answer
    ict_lr: float = 2e-3
    held_out: int = 200  # rows for the loss
    asked: int = 100  # questions that are answered in writing


# Questions are learnt by heart, as the paper scores recall; instructions are seen twice, as there.
PLANS = {
    "questions": Plan(600, 10, 1.5e-3, 4, max_new_tokens=16, longest=(50, 25)),
    "instruct": Plan(800, 2, 1e-3, 4, max_new_tokens=40, longest=(120, 200), asked=60),
}
SCORES = "scores.json"
QUICK = {"rows": 200, "epochs": 1, "held_out": 40, "asked": 8}


def main() -> None:
    """Train what is missing, score what is missing, write the tables."""
    options = arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    exits = [int(e) for e in options.exits.split(",")]
    tasks = {"questions": options.questions, "instruct": options.instruct}
    plans = {task: PLANS[task] for task, files in tasks.items() if files}
    if options.quick:
        plans = {task: replace(plan, **QUICK) for task, plan in plans.items()}
    data = {task: prepare(options.out / task, tasks[task], plan) for task, plan in plans.items()}
    results = []
    for seed in options.seeds:
        for task, plan in plans.items():
            for row, model_dir in trained(task, seed, exits, data[task], options, plan):
                results += scores(task, seed, row, model_dir, exits, data[task], plan)
                paper_report.write(options.out, results, {"exits": exits, "plans": plans})
    sys.stdout.write((options.out / "tables.md").read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="pretrained model to start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--exits", required=True, help="for example 3,6,9,12; full depth last")
    parser.add_argument("--instruct", type=Path, nargs="*", default=[], help="instruction files")
    parser.add_argument("--questions", type=Path, nargs="*", default=[], help="question files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--objective", default="uniform", help="of SoFT; the paper's is uniform")
    parser.add_argument("--extract", help="exits to train alone, or none; default: all but full")
    parser.add_argument("--kept", action="store_true", help="only write tables of what is there")
    parser.add_argument("--quick", action="store_true", help="few rows, one epoch")
    return parser.parse_args()


def prepare(folder: Path, files: list[Path], plan: Plan) -> dict[str, Path]:
    """Split a task's rows once. -> the files of training rows and of held-out ones."""
    found = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    if not all(path.is_file() for path in found.values()):
        rows = [row for path in files for row in read_json_rows(path)]
        rows = [row for row in rows if fits(row, plan)]
        random.Random(0).shuffle(rows)
        folder.mkdir(parents=True, exist_ok=True)
        test, rest = rows[: plan.held_out], rows[plan.held_out :]
        known = {asked(row).question for row in test}  # no question stands on both sides
        parts = {"train": [r for r in rest if asked(r).question not in known][: plan.rows]}
        for name, part in {**parts, "test": test}.items():
            write_text(found[name], "".join(json.dumps(row) + "\n" for row in part))
    return found


def fits(row: dict, plan: Plan) -> bool:
    """Whether question and answer are there, and short enough."""
    one = asked(row)
    texts = ("", "") if one is None else (one.question, one.accepted[0])
    return all(0 < len(text) <= most for text, most in zip(texts, plan.longest, strict=True))


def settings_of(plan: Plan, base: str, data: Path, seed: int) -> TrainConfig:
    """What SFT, the Extracted models and SoFT have in common."""
    return TrainConfig(
        model=base,
        data=[data],
        seq_len=256,
        packing="documents",
        batch_size=plan.batch_size,
        micro_batch=plan.batch_size,
        epochs=plan.epochs,
        lr=plan.lr,
        save_steps=100,
        seed=seed,
    )


def read_scores(path: Path) -> Any:
    """What an earlier run measured."""
    return json.loads(path.read_text(encoding="utf-8"))


def trained(
    task: str, seed: int, exits: list[int], data: dict, options: argparse.Namespace, plan: Plan
) -> Iterator[tuple[str, Path]]:
    """(row of the table, directory of its model), trained unless it is there."""
    folder = options.out / task / f"seed{seed}"
    base = settings_of(plan, options.base, data["train"], seed)
    inner = ",".join(map(str, exits))
    alone = exits[:-1]
    if options.extract:
        alone = [int(e) for e in options.extract.split(",") if e != "none"]
    more = {"exit_layers": inner}
    runs = {"sft": ("sft", {})}
    heads = {"model": str(folder / "sft"), "epochs": plan.epochs / 2, "lr": plan.ict_lr}
    runs["ict"] = ("ict", {**more, **heads})
    runs["soft"] = ("soft", {**more, "objective": options.objective})
    runs.update({f"extract{n}": ("extract", {"layers": n}) for n in alone})
    for row, (method, changes) in runs.items():
        out = folder / row
        if options.kept and not (out / SCORES).is_file():
            continue
        if not (out / RECORD).is_file():
            begun = any(out.glob("checkpoints/checkpoint-*/trainer_state.json"))
            config = replace(base, out=out, **changes)
            if begun:
                checkpoint_to_resume(out, True)
            print(f"{task} seed {seed}: {row}", file=sys.stderr, flush=True)
            train(replace(config, resume=begun), method)
        yield row, out


def scores(
    task: str, seed: int, row: str, model_dir: Path, exits: list[int], data: dict, plan: Plan
) -> list[dict]:
    """One result per exit of one model, measured unless it is there."""
    kept = model_dir / SCORES
    if kept.is_file():
        return read_scores(kept)
    model, tokenizer = load_model(str(model_dir))
    load_readouts(model, model_dir)
    depth = model.config.num_hidden_layers
    layers = [depth] if row.startswith("extract") else exits
    examples = load([data["test"]], tokenizer, fitting(512, model))
    measured = evaluate(model, examples, layers)
    # Held-out rows; of the questions also such that were trained on, as the paper scores recall.
    files = ("test",) if task == "instruct" else ("test", "train")
    sets = {name: questions_in([data[name]], plan.asked) for name in files}
    found = []
    for score in measured.exits:
        result = {
            "task": task,
            "seed": seed,
            "row": "extract" if row.startswith("extract") else row,
            "exit_layer": score.exit_layer,
            "loss": score.loss,
            "agreement": score.agreement,
            "tokens": measured.tokens,
        }
        for name, rows in sets.items():
            (one,) = ask(
                model, tokenizer, rows, [score.exit_layer], max_new_tokens=plan.max_new_tokens
            )
            if task == "instruct":
                result["rouge_l"] = one.scores["rouge_l"]
            else:
                result[f"exact_{name}"] = one.scores["exact_match"]
                result[f"f1_{name}"] = one.scores["f1"]
        found.append(result)
    write_json(kept, found)
    return found


if __name__ == "__main__":
    main()
