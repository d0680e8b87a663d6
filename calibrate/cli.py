"""The `calibrate` command: run and show.

torch and transformers are imported inside the commands, so that `--help` and wrong options answer
at once.
"""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_gen import calibration as artefact
from adaptive_gen import exits, ui
from adaptive_gen.errors import ModelError, OptionError, OutputError
from adaptive_gen.options import Json, Model, load_model
from adaptive_gen.terminal import run_app

app = typer.Typer(
    help="Turn a wished speed-up or faithfulness into exit thresholds, and measure both.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

# What run does when no target is given: nearly full depth's text, as fast as that can be had.
MAX_DISAGREEMENT = 0.03
MEASURES = ("margin", "max_prob", "entropy", "best")
KV = ("recompute", "propagate")


@app.command()
def run(
    model: Model = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(metavar="X", help="The most faithful setting that is X times as fast."),
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The fastest setting with at most this share of other tokens. Default: 0.03.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt a line, text or JSON; default: 120 of ours."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write calibration.json there; default: MODEL itself."),
    ] = None,
    exit_layers: Annotated[
        str | None,
        typer.Option(metavar="4,8,12", help="Exits to consider; default: the model's own."),
    ] = None,
    confidence: Annotated[
        str, typer.Option(metavar="MEASURE", help=f"One of {', '.join(MEASURES)}.")
    ] = "best",
    kv: Annotated[str, typer.Option(metavar="KV", help=f"One of {', '.join(KV)}.")] = "recompute",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Longest text; best what you will generate.")
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Which prompts are measured on.")] = 0,
    as_json: Json = False,
) -> None:
    """Calibrate a model on this device and write its calibration.json."""
    aim = _target(target_speedup, max_disagreement)
    _check_choice("--confidence", confidence, MEASURES)
    _check_choice("--kv", kv, KV)
    if max_new_tokens < 2:
        raise OptionError(f"--max-new-tokens {max_new_tokens} is too few; give 2 or more.")
    layers = exits.parse(exit_layers) if exit_layers is not None else None
    directory = _writable(out, model)
    from .prompts import prompt_set

    asked = prompt_set(prompts)
    # A calibration.json that lies there is about to be replaced, and may be broken or stale.
    loaded, tokenizer = load_model(model, exit_layers=layers, calibration=False)
    from .run import Options
    from .run import run as calibrate
    from .search import Target

    options = Options(confidence=confidence, kv=kv, max_new_tokens=max_new_tokens, seed=seed)
    found = calibrate(loaded, tokenizer, asked, Target(*aim), options)
    path = _write(found, directory)
    if found.point.speedup < 1:
        ui.note(
            f"this setting is slower than full depth on this device ({found.point.speedup:.2f}x): "
            "do not use adaptive depth with it here."
        )
    ui.note(f"written to {path}")
    _show(found, as_json)


@app.command()
def show(model: Model = None, as_json: Json = False) -> None:
    """Show the operating points of a calibration.json, or of the model directory it lies in."""
    _show(artefact.load(model if model is not None else _builtin()), as_json)


def _target(target_speedup: float | None, max_disagreement: float | None) -> tuple[str, float]:
    """The kind and value of what was asked for."""
    if target_speedup is not None and max_disagreement is not None:
        raise OptionError(
            "--target-speedup and --max-disagreement are two targets; give one of them."
        )
    if target_speedup is not None:
        if not 1 < target_speedup < math.inf:
            raise OptionError(
                f"--target-speedup {target_speedup:g} is out of range; give more than 1, "
                "such as 1.5."
            )
        return "speedup", target_speedup
    share = MAX_DISAGREEMENT if max_disagreement is None else max_disagreement
    if not 0 < share <= 1:
        raise OptionError(
            f"--max-disagreement {share:g} is out of range; give a share of the tokens above 0 and "
            "up to 1, such as 0.02."
        )
    return "disagreement", share


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{option} {value!r} is unknown; use one of {', '.join(allowed)}.")


def _writable(out: Path | None, model: str | None) -> Path:
    """The directory to write to, checked before minutes of work.

    Raises:
        OutputError: it cannot be written.
    """
    if out is None:
        directory = Path(model) if model is not None else _builtin()
        if not directory.is_dir():
            raise ModelError(
                f"there is no model directory {directory}. Give one that holds config.json, "
                "weights and a tokenizer, or a hub id together with --out DIR."
            )
    else:
        directory = out
    nearest = next(d for d in (directory, *directory.absolute().parents) if d.exists())
    try:
        # Asked by doing: permissions alone say yes to root on a file system that says no.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write into {directory}: {error.strerror}. "
            "Name a directory you may write to with --out."
        ) from None
    return directory


def _write(found: artefact.Calibration, directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the directory {directory}: {error.strerror}. Name another with --out."
        ) from None
    return artefact.save(found, directory)


def _builtin() -> Path:
    from adaptive_gen.wrapping import BUILTIN

    return BUILTIN


def _show(found: artefact.Calibration, as_json: bool) -> None:
    if as_json:
        ui.document({"version": artefact.VERSION, **dataclasses.asdict(found)})
        return
    _show_quality(found.recipe.get("quality", []))
    columns = (
        "threshold",
        "exits",
        "mean_depth",
        "layer_speedup",
        "predicted",
        "wall_speedup",
        "agreement",
    )
    rows = [_row(point, chosen=point == found.point) for point in found.points]
    title = f"operating points ({found.confidence}, kv {found.kv}, {found.n_layers} layers)"
    ui.table(title, columns, rows)
    ui.note("* used by default; wall_speedup with its 95 % interval over prompts")


def _row(point: artefact.OperatingPoint, chosen: bool) -> tuple[str, ...]:
    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    interval = point.wall_speedup_interval
    spread = "" if interval is None else " ({:.2f}-{:.2f})".format(*interval)
    return (
        f"{'*' if chosen else ' '} {point.threshold:.3f}",
        ",".join(map(str, point.exit_layers[:-1])),
        f"{point.mean_depth:.2f}",
        times(point.layer_speedup),
        times(point.predicted_speedup),
        times(point.wall_speedup) + spread,
        f"{point.agreement:.1%}",
    )


def _show_quality(quality: list[dict[str, Any]]) -> None:
    columns = ("confidence", "exit", "agreement", "AUROC", "ECE raw", "ECE mapped")
    rows = [
        (
            row["confidence"],
            row["exit_layer"],
            f"{row['agreement']:.1%}",
            "-" if row["auroc"] is None else f"{row['auroc']:.3f}",
            f"{row['error_before']:.3f}",
            f"{row['error_after']:.3f}",
        )
        for row in quality
    ]
    ui.table("confidence measures on prompts not fitted to", columns, rows)


def main() -> None:
    """Run the command line."""
    run_app(app, "calibrate")
