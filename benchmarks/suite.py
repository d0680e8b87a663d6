"""Every track in one command; see README.md in this folder.

python -m benchmarks.suite                        the mechanism and end-to-end tracks
python -m benchmarks.suite --track sweep --axis context
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import adaptive_gen
from adaptive_gen import bench, ui
from adaptive_gen.prompts import bench_prompts

from . import anatomy, end_to_end, figure, gpu, mechanism, micro, modes, sweep
from .shapes import BY_NAME, SMALL, TRUE, Shape, build

TRACKS = ("mechanism", "end_to_end", "modes", "sweep", "anatomy", "micro", "gpu")
Save = Callable[[Any], None]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the tracks asked for, print their tables, write one results file and its pictures."""
    args = _arguments()
    document: dict[str, Any] = {"recipe": _recipe(args)}
    stem = _free_name(document["recipe"], args.out)
    run = {
        "mechanism": _mechanism,
        "end_to_end": _end_to_end,
        "modes": _modes,
        "sweep": _sweep,
        "anatomy": _anatomy,
        "gpu": _gpu,
        "micro": lambda args, save: save(micro.run(args.device)),
    }
    for track in args.track or TRACKS[:2]:

        def save(found: Any, track: str = track) -> None:
            document[track] = found
            _write(document, args.out, stem)

        run[track](args, save)
    ui.text(str(args.out / f"{stem}.json"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    add = parser.add_argument
    add("--track", action="append", choices=TRACKS, help="may be repeated; default: the first two")
    add("--shape", action="append", choices=tuple(BY_NAME), help="may be repeated")
    add("--model", help="end to end: directory or hub id; default: the built-in model")
    add("--axis", action="append", choices=tuple(sweep.AXES), help="sweep: may be repeated")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=5, help="repetitions; medians count (default 5)")
    add("--tokens", type=int, default=64, help="new tokens of a text (default 64)")
    add("--prompts", type=int, default=24, help="how many (default 24; mechanism: at most 3)")
    add("--no-compile", action="store_true", help="leave compiled transformers out")
    add("--out", type=Path, default=RESULTS, help="where results go")
    args = parser.parse_args()
    if min(args.rounds, args.tokens - 1, args.prompts) < 1:
        parser.error("--rounds and --prompts take 1 or more, --tokens 2 or more")
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small models are quickest so
    return args


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    where = SimpleNamespace(
        device=torch.device(args.device), dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    return {
        "command": " ".join(["python -m benchmarks.suite", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": bench.commit() or os.environ.get("BENCH_COMMIT"),
        **bench.environment(where),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "tokens": args.tokens,
        "rounds": args.rounds,
        "copy_gb_per_s": micro.copy_bandwidth(args.device),
    }


def _mechanism(args: argparse.Namespace, save: Save) -> None:
    found = []
    for shape in _shapes(args, TRUE if args.device == "cuda" else SMALL):
        found.append(
            mechanism.run(
                shape,
                args.device,
                tokens=args.tokens,
                prompts=min(3, args.prompts),
                prompt_length=16,
                rounds=args.rounds,
                compiled=not args.no_compile,
            )
        )
        save(found)  # after each: a run cut short keeps what it finished
        _show(found[-1], args)
        _free()


def _end_to_end(args: argparse.Namespace, save: Save) -> None:
    model, tokenizer = adaptive_gen.load(args.model, device_map=args.device)
    found = end_to_end.run(
        model,
        tokenizer,
        bench_prompts()[: args.prompts],
        tokens=args.tokens,
        rounds=args.rounds,
        compiled=not args.no_compile,
    )
    save(found)
    _show(found, args)
    _free()


def _anatomy(args: argparse.Namespace, save: Save) -> None:
    found = []
    rounds = max(5, args.rounds)
    for shape in _shapes(args, SMALL):
        model = build(shape, [shape.exit_at(0.25)], "cpu", torch.float32)
        found.append(anatomy.run(model, shape.name, rounds))
        found.append(anatomy.run(adaptive_gen.wrap(model, weights="int8"), shape.name, rounds))
    model, _ = adaptive_gen.load(args.model)
    found.append(anatomy.run(model, "built-in" if args.model is None else args.model, rounds))
    save(found)
    ui.table(
        "Where a token's time goes, in us, and blocks of pending tokens over one token",
        ["", "engine", "token", "layers", "products", "readout", "loop", "floor"]
        + [f"{n} pending" for n in anatomy.PENDING[1:]],
        [
            [row["model"], row["engine"]]
            + [
                f"{row[f'{part}_us'] or 0:.0f}"
                for part in ("token", "layers", "products", "readout", "loop", "floor")
            ]
            + [f"{row['pending_over_one'][n]:.2f}x" for n in anatomy.PENDING[1:]]
            for row in found
        ],
    )


def _modes(args: argparse.Namespace, save: Save) -> None:
    model, tokenizer = adaptive_gen.load(args.model, device_map=args.device)
    found = modes.run(model, tokenizer, bench_prompts(), tokens=args.tokens, rounds=args.rounds)
    save(found)
    for batch in found:
        ui.table(
            f"batches of {batch['rows']}, {batch['texts']} texts",
            ("", "tok/s", "wall_speedup", "same text"),
            ((name, *arm.values()) for name, arm in batch["arms"].items()),
        )


def _sweep(args: argparse.Namespace, save: Save) -> None:
    [shape] = _shapes(args, [BY_NAME["Llama-3.2-1B" if args.device == "cuda" else "16x256"]])
    axes = args.axis or list(sweep.AXES)
    found = sweep.run(shape, args.device, axes, tokens=args.tokens, rounds=args.rounds)
    save(found)
    ui.table(
        f"{shape.name}: tokens decoded per second, prefill left out",
        ("", *(arm["label"] for arm in found[0]["arms"].values())),
        (
            (
                f"{point['axis']} {point['value']}",
                *(arm["decode_tokens_per_s"] for arm in point["arms"].values()),
            )
            for point in found
        ),
    )


def _gpu(args: argparse.Namespace, save: Save) -> None:
    found = []
    for shape in _shapes(args, TRUE if args.device == "cuda" else SMALL[:1]):
        found.append(gpu.run(shape, args.device, tokens=args.tokens, rounds=args.rounds))
        save(found)
        rows = ((row["bar"], row["wanted"], row["measured"]) for row in found[-1]["bars"])
        label = shape.name if args.device == "cuda" else f"{shape.name}, a rehearsal on a CPU"
        ui.table(label, ("bar", "wanted", "measured"), rows)
        _free()


def _shapes(args: argparse.Namespace, default: Sequence[Shape]) -> list[Shape]:
    return [BY_NAME[name] for name in args.shape] if args.shape else list(default)


def _show(found: dict[str, Any], args: argparse.Namespace) -> None:
    ui.table(
        f"{found['model']}: {found['n_layers']} layers, up to {args.tokens} new tokens, "
        f"{args.rounds} rounds, {args.device}",
        (
            "",
            "tok/s",
            "wall_speedup",
            "decode_speedup",
            "layer_speedup",
            "realised",
            "decoding",
            "agreement",
        ),
        (
            (
                arm["label"],
                arm["tokens_per_s"],
                arm["wall_speedup"],
                arm.get("decode_speedup"),
                arm.get("layer_speedup"),
                arm.get("realised_share"),
                arm.get("decode_realised_share"),
                arm["agreement"],
            )
            for arm in found["arms"].values()
        ),
    )
    for name, why in found["skipped"].items():
        ui.note(f"{name} did not run: {why}")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(document: dict[str, Any], folder: Path, stem: str) -> None:
    """The results file and a picture of each track that has one; each whole or not at all."""
    files = {f"{stem}.json": json.dumps(document, indent=1, allow_nan=False) + "\n"}
    if found := document.get("end_to_end"):
        files[f"{stem}-agreement.svg"] = figure.speed_against_agreement(found)
    for axis in sweep.AXES:
        points = [p for p in document.get("sweep", []) if p["axis"] == axis]
        if points:
            files[f"{stem}-{axis}.svg"] = figure.growth(points)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = folder / f".{name}"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, folder / name)


def _free_name(recipe: dict[str, Any], folder: Path) -> str:
    """`<date>-<hardware>`, with a number behind it if that is taken."""
    hardware = re.sub(r"[^a-z0-9]+", "-", recipe["hardware"].lower()).strip("-")
    if recipe["device"] == "cpu":
        hardware += f"-{recipe['cores']}core"
    stem = f"{recipe['date']}-{hardware}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (folder / f"{name}.json").exists())


if __name__ == "__main__":
    main()
