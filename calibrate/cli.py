"""The `calibrate` command: run, the stages it is made of, show and report.

torch and transformers are imported inside the commands, so that `--help` and wrong options answer
at once.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from adaptive_gen import calibration as artefact
from adaptive_gen import exits, ui
from adaptive_gen.options import Json, Model, load_model
from adaptive_gen.terminal import run_app

from . import choices, stage_commands, tables

app = typer.Typer(
    help="Turn a wished speed-up or faithfulness into exit thresholds, and measure both.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


@app.command()
def run(
    model: Model = None,
    target_speedup: choices.TargetSpeedup = None,
    latency_ms: choices.LatencyMs = None,
    max_disagreement: choices.MaxDisagreement = None,
    max_risk: choices.MaxRisk = None,
    confidence_level: choices.Level = None,
    loss: choices.Loss = None,
    prompts: choices.Prompts = None,
    out: choices.Out = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the stages' files there; default: a cache."),
    ] = None,
    exit_layers: choices.ExitLayers = None,
    thresholds: choices.Thresholds = "single",
    confidence: choices.Confidence = "best",
    kv: choices.Kv = "recompute",
    max_new_tokens: choices.MaxNewTokens = 64,
    seed: choices.Seed = 0,
    as_json: Json = False,
) -> None:
    """Calibrate a model on this device and write its calibration.json: all stages in turn."""
    aim = choices.target(target_speedup, latency_ms, max_disagreement, max_risk)
    choices.check_alone("run")
    promised = choices.promised(aim[0], loss, confidence_level)
    choices.check("--confidence", confidence, choices.MEASURES)
    choices.check("--kv", kv, choices.KV)
    choices.check("--thresholds", thresholds, choices.THRESHOLDS)
    choices.check_length(max_new_tokens)
    layers = exits.parse(exit_layers) if exit_layers is not None else None
    directory = choices.home(out, model)
    from .prompts import prompt_set

    asked = prompt_set(prompts)
    # A calibration.json that lies there is about to be replaced, and may be broken or stale.
    loaded, tokenizer = load_model(model, exit_layers=layers, calibration=False)
    from . import store
    from .run import Options, Target
    from .run import run as calibrate
    from .stages import job

    options = Options(
        confidence=confidence,
        kv=kv,
        max_new_tokens=max_new_tokens,
        seed=seed,
        thresholds=thresholds,
        **promised,
    )
    from . import install
    from .worth import Slower

    place = work or store.default_home() / store.key(job(loaded, tokenizer, asked, options))
    try:
        found = calibrate(loaded, tokenizer, asked, Target(*aim), options, place)
    except KeyboardInterrupt:
        ui.note(f"\nstopped; what is finished stays in {place}. The same command goes on there.")
        raise
    except Slower as error:
        install.refuse(error, directory, place, as_json)
    install.write(found, directory, place)
    if work is None:
        shutil.rmtree(place, ignore_errors=True)
    tables.show(found, as_json)


@app.command()
def show(model: Model = None, as_json: Json = False) -> None:
    """Show the operating points of a calibration.json, or of the model directory it lies in."""
    tables.show(artefact.load(model if model is not None else choices.builtin()), as_json)


@app.command()
def report(
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; default: calibration.html in MODEL."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a calibration."""
    from .report import write_page

    directory = Path(model) if model is not None else choices.builtin()
    ui.note(f"written to {write_page(directory, out)}")


for stage in stage_commands.COMMANDS:
    app.command()(stage)


def main() -> None:
    """Run the command line."""
    run_app(app, "calibrate")


if __name__ == "__main__":
    main()
