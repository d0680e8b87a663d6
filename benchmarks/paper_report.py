"""Tables of the paper's comparison from its scores: JSON with everything, Markdown to read."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import torch
import transformers

from adaptive_gen.train.metrics import interval
from adaptive_gen.train.saving import write_json, write_text

ROWS = {"sft": "SFT", "ict": "SFT+ICT", "extract": "Extracted", "soft": "SoFT"}
# measure -> its title, and whether more is better
MEASURES = {
    "loss": "Held-out loss per token",
    "agreement": "Agreement with its own full depth",
    "rouge_l": "ROUGE-L of greedy answers to held-out instructions",
    "exact_test": "Exact match, held-out questions",
    "exact_train": "Exact match, questions trained on",
    "f1_test": "F1, held-out questions",
}

# Read once: a run takes long, and the tree may move on under it.
COMMIT = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"],
    capture_output=True,
    text=True,
    cwd=Path(__file__).parent,
).stdout.strip()


def origin(script: str) -> dict:
    """Where results come from: command, commit, versions."""
    return {
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "commit": COMMIT,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def write(out: Path, results: list[dict], settings: dict) -> None:
    """Write tables.json and tables.md; a run that goes on writes them anew after each model."""
    plans = {task: asdict(plan) for task, plan in settings["plans"].items()}
    document = {
        **origin("paper_tables.py"),
        "settings": {**settings, "plans": plans},
        "results": results,
    }
    write_json(out / "tables.json", document)
    parts = ["# SFT, SFT+ICT, Extracted and SoFT at every exit", f"`{document['command']}`"]
    for task in dict.fromkeys(r["task"] for r in results):
        mine = [r for r in results if r["task"] == task]
        parts.append(f"## {task}")
        for measure, title in MEASURES.items():
            if measure in mine[0]:
                parts.append(_table(title, measure, mine))
        if "rouge_l" in mine[0]:
            parts += [_pairwise(mine, other) for other in ("sft", "ict", "extract")]
    parts.append(
        "Cells: mean over seeds, and with several seeds their standard deviation; with one seed of "
        "written answers the 95 % bootstrap interval over questions."
    )
    write_text(out / "tables.md", "\n\n".join(parts) + "\n")


def _table(title: str, measure: str, results: list[dict]) -> str:
    layers = sorted({r["exit_layer"] for r in results})
    lines = [f"**{title}**", "", "| exit | " + " | ".join(map(str, layers)) + " |"]
    lines.append("|---" * (len(layers) + 1) + "|")
    for row, name in ROWS.items():
        cells = [
            _cell([r[measure] for r in results if (r["row"], r["exit_layer"]) == (row, layer)])
            for layer in layers
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list) -> str:
    """Values of one cell, one per seed: numbers, or a list with one number per question."""
    if not values:
        return ""
    means = [fmean(v) if isinstance(v, list) else v for v in values]
    text = f"{fmean(means):.3f}"
    if len(means) > 1:
        return f"{text} ± {stdev(means):.3f}"
    if isinstance(values[0], list):
        low, high = interval(values[0])
        return f"{text} ({low:.2f} to {high:.2f})"
    return text


def _pairwise(results: list[dict], other: str) -> str:
    """The paper's score, wins minus losses over all comparisons, with ROUGE-L as the judge."""
    ours = {(r["seed"], r["exit_layer"]): r["rouge_l"] for r in results if r["row"] == "soft"}
    theirs = {(r["seed"], r["exit_layer"]): r["rouge_l"] for r in results if r["row"] == other}
    rows, columns = (sorted({e for _, e in side}) for side in (ours, theirs))
    if not rows or not columns:
        return ""
    lines = [f"**SoFT (rows) against {ROWS[other]} (columns): (wins - losses) / all, by ROUGE-L**"]
    lines += ["", "| SoFT | " + " | ".join(map(str, columns)) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        cells = []
        for column in columns:
            pairs = [
                pair
                for seed in sorted({s for s, _ in ours})
                if (seed, row) in ours and (seed, column) in theirs
                for pair in zip(ours[seed, row], theirs[seed, column], strict=True)
            ]
            cells.append(f"{fmean((a > b) - (a < b) for a, b in pairs):+.3f}" if pairs else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
