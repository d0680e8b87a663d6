"""`adaptive-train`: train exits into a model, and measure them."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_gen import ui
from adaptive_gen.terminal import run_app

from . import measuring
from .config import TrainConfig
from .settings_file import NAMES, read_settings

app = typer.Typer(
    help="Sorted fine-tuning: teach a model's middle layers to speak.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# method -> what it does, and the settings that mean nothing to it
METHODS = {
    "soft": ("Sorted fine-tuning: every exit layer and full depth learn together.", ("layers",)),
    "sft": ("Plain fine-tuning: full depth alone.", ("exit_layers", "objective", "layers")),
    "ict": (
        "Baseline: one new LM head per exit of a frozen, fine-tuned model.",
        ("objective", "layers", "adapter", "from_config", "vocab_size"),
    ),
    "extract": (
        "Baseline: the first layers of a model as a model of its own, fine-tuned alone.",
        ("exit_layers", "objective", "from_config", "vocab_size"),
    ),
}


def _apply_file(context: typer.Context, path: Path | None) -> Path | None:
    """Let a settings file give the defaults of this command."""
    if path is not None:
        settings = read_settings(path)
        known = {parameter.name for parameter in context.command.params}
        foreign = sorted((set(settings) & NAMES) - known)
        if foreign:
            from adaptive_gen.errors import OptionError

            raise OptionError(
                f"--config {path} names {', '.join(foreign)}, which mean nothing to "
                f"{context.info_name}; take them out."
            )
        context.default_map = settings
    return path


FILE = typer.Option(
    help="YAML file with these settings; the command line wins.",
    metavar="FILE",
    callback=_apply_file,
    is_eager=True,
)


def _command(name: str, text: str, without: Sequence[str], run: Any, **more: Any) -> None:
    """Register a command whose parameters are the fields of `TrainConfig`, and `more`."""
    chosen = {f.name: (f.default, f.type) for f in fields(TrainConfig) if f.name not in without}
    if name == "extract":
        chosen["layers"] = (..., chosen["layers"][1])
    chosen.update(more, config=(None, Annotated[Path | None, FILE]))
    run.__signature__ = Signature(
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (default, kind) in chosen.items()
        ]
    )
    run.__annotations__ = {name: kind for name, (_, kind) in chosen.items()}
    app.command(name, help=text)(run)


def _trains(method: str) -> Any:
    def run(config: Path | None = None, **values: Any) -> None:
        from torch import distributed

        from .run import main_process, train

        _quiet()
        try:
            out = train(TrainConfig(**values), method)
        finally:
            # Threads of gloo that still run when the interpreter goes abort the process.
            if distributed.is_initialized():
                distributed.destroy_process_group()
        if main_process():
            ui.text(str(out))

    return run


for _method, (_text, _without) in METHODS.items():
    _command(_method, _text, _without, _trains(_method))


def _plan(
    config: Path | None = None,
    devices: int = 1,
    sharded: bool = False,
    tokens: int = 0,
    tokens_per_s: float = 0.0,
    like: Path | None = None,
    json_out: bool = False,
    **values: Any,
) -> None:
    from .plan import Means, plan

    _quiet()
    found = plan(TrainConfig(**values), Means(devices, sharded, tokens, tokens_per_s, like))
    if json_out:
        ui.document(found.as_dict())
        return
    memory = {f"{name}, GiB per device": size / 2**30 for name, size in found.memory.rows()}
    hours = None if found.seconds is None else found.seconds / 3600
    rows = {
        "parameters": f"{found.parameters:,}",
        "exit layers": f"{', '.join(map(str, found.exit_layers))} of {found.n_layers}",
        **{name: f"{size:.2f}" for name, size in memory.items()},
        "optimiser steps": "give --tokens or --data" if found.steps is None else f"{found.steps:,}",
        "tokens": "-" if found.tokens is None else f"{found.tokens:,}",
        "hours": "give --tokens-per-s or --like" if hours is None else f"{hours:.2f}",
    }
    ui.table("what the run will take", ("", ""), list(rows.items()))


_command(
    "plan",
    "Parameters, memory, steps and time of a run, without loading weights.",
    ("layers", "adapter", "resume"),
    _plan,
    devices=(1, Annotated[int, typer.Option(help="Devices that take part.", min=1)]),
    sharded=(False, Annotated[bool, typer.Option("--sharded", help="FSDP or ZeRO-3.")]),
    tokens=(0, Annotated[int, typer.Option(help="Of one pass over the data.", min=0)]),
    tokens_per_s=(0.0, Annotated[float, typer.Option(help="Of all devices together.", min=0.0)]),
    like=(None, Annotated[Path | None, typer.Option(help="Finished run to take the speed from.")]),
    json_out=(False, Annotated[bool, typer.Option("--json", help="One JSON document.")]),
)


app.command("eval")(measuring.evaluate)
app.command("compare")(measuring.compare)


def _quiet() -> None:
    """No bars for loading and saving, which would run into the one line of an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def spread(arguments: Sequence[str]) -> list[str]:
    """Write `--data a b c` as `--data a --data b --data c`, so that shell patterns work."""
    out: list[str] = []
    inside = ""
    for word in arguments:
        if word in ("--data", "--eval-data"):
            inside = word
            continue
        if word.startswith("-"):
            inside = ""
        out.extend((inside, word) if inside else (word,))
    return out


def main() -> None:
    """Console entry."""
    sys.argv[1:] = spread(sys.argv[1:])
    run_app(app, "adaptive-train")


if __name__ == "__main__":
    main()
