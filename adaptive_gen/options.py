"""Options that several commands share, and their checks, made before a model is loaded."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import OptionError
from .export_place import EXPORTED

# Rows this narrow are multiplied sooner than threads meet: with a core busy elsewhere, two threads
# took three to seven times as long as one.
SMALL = 512

BUILT_IN = "the built-in model"

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"Directory or hub id; default: {BUILT_IN}."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="MODEL", help=f"Directory or hub id; default: {BUILT_IN}."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(metavar="0..1", help="Smallest confidence that exits; 1 is full depth."),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(metavar="X", help="Take the threshold from the calibration: X times as fast."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Use this calibration.json, not the model's own."),
]
Lossless = Annotated[
    bool,
    typer.Option("--lossless", help="Exits only draft; full depth confirms or corrects."),
]
Audit = Annotated[
    bool, typer.Option("--audit", help="Count how often full depth would have said the same.")
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="own|int8", help="int8: read weights in 8 bits, faster, not quite the same model."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest reply, in tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="0 is greedy, above 0 samples; default: as the model says."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, the last line of stdout.")]

ModelAndOut = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] OUT",
        help=f"Directory or hub id, default: {BUILT_IN}; then the directory to write.",
    ),
]
ExitLayer = Annotated[
    int | None, typer.Option(metavar="N", help="Keep this many layers; default: all.")
]
WithGenerate = Annotated[
    bool, typer.Option("--with-generate", help="Let plain transformers decode it adaptively.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace whatever checkpoint OUT holds.")]


def dial(threshold: float | None, target_speedup: float | None) -> dict[str, float]:
    """The one choice of depth, as a keyword of `generate`; empty if nothing was said.

    Raises:
        OptionError: both were given, or one is out of range.
    """
    if threshold is not None and target_speedup is not None:
        raise OptionError(
            "--threshold and --target-speedup both decide when to exit; give one of them."
        )
    if threshold is not None:
        if not 0 <= threshold <= 1:
            raise OptionError(
                f"--threshold {threshold:g} is out of range; give 0 (always the first exit) "
                "to 1 (full depth)."
            )
        return {"threshold": threshold}
    if target_speedup is not None:
        if not 1 <= target_speedup < math.inf:
            raise OptionError(
                f"--target-speedup {target_speedup:g} is out of range; give 1 or more, such as 1.5."
            )
        return {"target_speedup": target_speedup}
    return {}


def mode(lossless: bool, audit: bool) -> dict[str, Any]:
    """How exits are used, as keywords of `generate`.

    Raises:
        OptionError: both were asked for.
    """
    if lossless and audit:
        raise OptionError(
            "--lossless already lets full depth check every token; leave --audit out."
        )
    return {name: True for name, asked in (("lossless", lossless), ("audit", audit)) if asked}


def decoding(max_new_tokens: int, temperature: float | None) -> dict[str, Any]:
    """Length and sampling as keywords of `generate`.

    Raises:
        OptionError: out of range.
    """
    at_least_one("--max-new-tokens", max_new_tokens)
    if temperature is None:
        return {"max_new_tokens": max_new_tokens}
    if not 0 <= temperature < math.inf:
        raise OptionError(
            f"--temperature {temperature:g} is out of range; give 0 for greedy, or more to sample."
        )
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature}


def something_to_export(exit_layer: int | None, with_generate: bool) -> None:
    """Raise `OptionError` if neither a part nor an addition was asked for: that would be a copy."""
    if exit_layer is None and not with_generate:
        raise OptionError(
            "nothing says what to export; give --exit-layer N for a sub-model, or --with-generate "
            "for the whole model."
        )


def prompt_is_no_model(prompt: str) -> None:
    """Raise `OptionError` for a prompt that is a model directory.

    Other commands take the model first; here it would be continued, by the built-in model.
    """
    try:
        named = (Path(prompt) / "config.json").is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a zero in it
        return
    if named:
        raise OptionError(
            f"{prompt} is a model directory and stands where the prompt belongs; write "
            f'`adaptive-gen generate "..." --model {prompt}`.'
        )


def out_is_no_model(out: str) -> None:
    """Raise `OptionError` if the only name given to export, OUT, is a model that nobody exported.

    Who means it as MODEL would have it replaced, with --force, by a part of the built-in one.
    """
    found = Path(out)
    if (found / "config.json").exists() and not (found / EXPORTED).exists():
        raise OptionError(
            f"{out} is a model, and the one name given is OUT. To export it give two: "
            f"`adaptive-gen export {out} OUT`; to export {BUILT_IN}, name another directory."
        )


def weights_of(weights: str) -> dict[str, Any]:
    """What a model's weights are read as, as a keyword of `load`.

    Raises:
        OptionError: nothing that is known.
    """
    if weights not in ("own", "int8"):
        raise OptionError(f"--weights {weights} is unknown; give own, or int8.")
    return {"weights": weights}


def at_least_one(option: str, value: int | None) -> None:
    """Raise `OptionError` unless the count is positive or was not given."""
    if value is not None and value < 1:
        raise OptionError(f"{option} {value} is out of range; give 1 or more.")


def load_model(model: str | None, to_generate: bool = True, **keywords: Any) -> tuple[Any, Any]:
    """The wrapped model and its tokenizer; see `loading.load`, or `look` unless it will generate.

    It goes on a GPU where there is one. For a small model on a CPU torch gets one thread, with
    which it is quickest, unless OMP_NUM_THREADS says otherwise; compiled products keep theirs.
    """
    import torch
    from transformers.utils import logging

    from .engine import team
    from .loading import load, look

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    placed: dict[str, Any] = {}
    if torch.cuda.is_available():
        # Of several processes each has a GPU of its own.
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        placed["device_map"] = "auto" if alone else {"": int(os.environ.get("LOCAL_RANK", "0"))}
    loaded, tokenizer = (load if to_generate else look)(model, **placed, **keywords)
    small = loaded.config.get_text_config().hidden_size <= SMALL
    if loaded.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        team.allow(team.threads())
        torch.set_num_threads(1)
    return loaded, tokenizer
