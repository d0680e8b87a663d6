"""Options that commands of `calibrate` share, and their checks, made before a model is loaded."""

import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_gen.errors import ModelError, OptionError, OutputError

# What is asked for when no target is given: nearly full depth's text, as fast as it can be had.
MAX_DISAGREEMENT = 0.03
MEASURES = ("margin", "max_prob", "entropy", "gate", "best")
KV = ("recompute", "propagate")
LOSSES = ("prefix", "exact", "rouge", "em")
THRESHOLDS = ("single", "per-exit")
LEAST_LEVEL = 0.5
LEVEL = 0.95

TargetSpeedup = Annotated[
    float | None,
    typer.Option(metavar="X", help="The most faithful setting that is X times as fast."),
]
LatencyMs = Annotated[
    float | None,
    typer.Option(metavar="MS", help="The most faithful setting with at most MS per new token."),
]
MaxDisagreement = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="The fastest setting with at most this share of other tokens. Default: 0.03.",
    ),
]
MaxRisk = Annotated[
    float | None,
    typer.Option(
        metavar="RISK", help="The fastest setting certified to lose at most this much on average."
    ),
]
Level = Annotated[
    float | None,
    typer.Option(
        "--confidence-level",
        metavar="0..1",
        help="How sure --max-risk has to be. Default: 0.95.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        metavar="LOSS",
        help=f"What --max-risk limits: {', '.join(LOSSES)}. Default: {LOSSES[0]}.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="One prompt a line, text or JSON; default: 120 of ours."),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write calibration.json there; default: MODEL itself."),
]
ExitLayers = Annotated[
    str | None,
    typer.Option(metavar="4,8,12", help="Exits to consider; default: the model's own."),
]
Confidence = Annotated[str, typer.Option(metavar="MEASURE", help=f"One of {', '.join(MEASURES)}.")]
Kv = Annotated[str, typer.Option(metavar="KV", help=f"One of {', '.join(KV)}.")]
MaxNewTokens = Annotated[
    int, typer.Option(metavar="N", help="Longest text; best what you will generate.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Which prompts are measured on.")]
Thresholds = Annotated[
    str,
    typer.Option(metavar="KIND", help=f"One for all exits or its own: {', '.join(THRESHOLDS)}."),
]
Work = Annotated[Path, typer.Option(metavar="DIR", help="Where the stages keep what they find.")]


def target(
    target_speedup: float | None,
    latency_ms: float | None,
    max_disagreement: float | None,
    max_risk: float | None,
) -> tuple[str, float]:
    """The kind and value of what was asked for.

    Raises:
        OptionError: several targets, or one out of range.
    """
    asked = {
        "speedup": ("--target-speedup", target_speedup, 1, math.inf, "more than 1, such as 1.5"),
        "latency": ("--latency-ms", latency_ms, 0, math.inf, "more than 0, such as 20"),
        "disagreement": (
            "--max-disagreement",
            max_disagreement,
            0,
            1.0,
            "a share of the tokens above 0 and up to 1, such as 0.02",
        ),
        "risk": ("--max-risk", max_risk, 0, 1, "a mean loss between 0 and 1, such as 0.1"),
    }
    given = {kind: row for kind, row in asked.items() if row[1] is not None}
    if len(given) > 1:
        options = " and ".join(row[0] for row in given.values())
        raise OptionError(f"{options} are {len(given)} targets; give one of them.")
    for kind, (option, value, low, high, allowed) in given.items():
        assert value is not None
        # A disagreement of all tokens is a wish one may have; a risk of 1 is no promise.
        inside = low < value <= high if kind == "disagreement" else low < value < high
        if not inside:
            raise OptionError(f"{option} {value:g} is out of range; give {allowed}.")
        return kind, value
    return "disagreement", MAX_DISAGREEMENT


def check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `OptionError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise OptionError(f"{option} {value!r} is unknown; use one of {', '.join(allowed)}.")


def promised(kind: str, loss: str | None, level: float | None) -> dict[str, Any]:
    """How a certificate is to be made, as fields of `stages.Options`.

    Args:
        kind: of the target.
        loss: as on the command line; None is the default.
        level: likewise.

    Raises:
        OptionError: a loss that does not exist, a level no promise can be made at, or either of
            them where nothing is to be certified: whoever gives one expects a certificate.
    """
    given = {"--loss": loss, "--confidence-level": level}
    idle = [option for option, value in given.items() if value is not None]
    if idle and kind != "risk":
        say = "says" if len(idle) == 1 else "say"
        raise OptionError(
            f"{' and '.join(idle)} {say} how a risk is certified, and none is asked for; add "
            "--max-risk, such as --max-risk 0.3, or leave "
            f"{'it' if len(idle) == 1 else 'them'} out."
        )
    if loss is not None:
        check("--loss", loss, LOSSES)
    if level is not None and not LEAST_LEVEL <= level < 1:
        raise OptionError(
            f"--confidence-level {level:g} is out of range; give {LEAST_LEVEL:g} or more and less "
            "than 1, such as 0.95."
        )
    return {"loss": loss or LOSSES[0], "level": LEVEL if level is None else level}


def check_alone(command: str) -> None:
    """Raise `OptionError` where several processes were started for what one has to measure."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            f"`calibrate {command}` measures speed and runs in one process. Start several for "
            "`calibrate collect --work DIR` alone, then give the same --work here."
        )


def check_length(value: int) -> None:
    """Raise `OptionError` if texts are too short to leave early in."""
    if value < 2:
        raise OptionError(f"--max-new-tokens {value} is too few; give 2 or more.")


def home(out: Path | None, model: str | None) -> Path:
    """The directory to write to, checked before minutes of work.

    Raises:
        ModelError: MODEL is no directory and no other was named.
        OutputError: it cannot be written.
    """
    if out is None:
        directory = Path(model) if model is not None else builtin()
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


def builtin() -> Path:
    """The directory of the built-in model."""
    from adaptive_gen.wrapping import BUILTIN

    return BUILTIN
