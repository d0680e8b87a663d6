"""The `adaptive-gen` command: chat, generate, info, bench and export.

Options are checked by `options`, text is shown by `ui`, and the work is done by the library. Torch
and transformers are imported inside the commands: `--help` and wrong options answer at once.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from . import __version__, options, ui
from .errors import OptionError
from .terminal import run_app

MAX_NEW_TOKENS = 256

app = typer.Typer(
    help="Generate text with few layers for easy tokens and many for hard ones.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        ui.text(f"adaptive-gen {__version__}")
        raise typer.Exit()


@app.callback()
def _before_the_command(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None: ...


@app.command()
def chat(
    model: options.Model = None,
    threshold: options.Threshold = None,
    target_speedup: options.TargetSpeedup = None,
    calibration: options.CalibrationFile = None,
    max_new_tokens: options.MaxNewTokens = MAX_NEW_TOKENS,
    temperature: options.Temperature = None,
    lossless: options.Lossless = False,
    audit: options.Audit = False,
    weights: options.Weights = "own",
) -> None:
    """Talk to a model. Ctrl-C ends a reply, Ctrl-D the chat; a pipe is read line by line."""
    depth = {**options.dial(threshold, target_speedup), **options.mode(lossless, audit)}
    decoding = options.decoding(max_new_tokens, temperature)
    read = options.weights_of(weights)
    loaded, tokenizer = options.load_model(model, calibration=calibration, **read)
    from .conversation import Conversation
    from .settings import state

    context = getattr(state(loaded).decoder.config, "max_position_embeddings", None)
    limit = None if context is None else context - max_new_tokens
    conversation, past = Conversation(tokenizer, limit), None
    for line in ui.lines():
        if line.strip():
            # What the chat has in common with its last turn is not run again.
            kept = {} if past is None else {"past_key_values": past}
            reply = _reply(loaded, tokenizer, conversation.ask(line), depth, {**decoding, **kept})
            conversation.reply(reply.tokens)
            past = reply.cache


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; default: a pipe.")
    ] = None,
    model: options.ModelOption = None,
    threshold: options.Threshold = None,
    target_speedup: options.TargetSpeedup = None,
    calibration: options.CalibrationFile = None,
    max_new_tokens: options.MaxNewTokens = MAX_NEW_TOKENS,
    temperature: options.Temperature = None,
    lossless: options.Lossless = False,
    audit: options.Audit = False,
    weights: options.Weights = "own",
    as_json: options.Json = False,
) -> None:
    """Continue one text: the answer on stdout, what it cost on stderr."""
    depth = {**options.dial(threshold, target_speedup), **options.mode(lossless, audit)}
    decoding = options.decoding(max_new_tokens, temperature)
    read = options.weights_of(weights)
    prompt = _read_pipe() if prompt is None else prompt
    if not prompt:
        raise OptionError("the prompt is empty; give it at least one word.")
    options.prompt_is_no_model(prompt)
    loaded, tokenizer = options.load_model(model, calibration=calibration, **read)
    if not as_json:
        reply = _reply(loaded, tokenizer, prompt, depth, decoding)
        raise typer.Exit(0 if reply.whole else 130)
    from .streaming import stream

    chunks = stream(loaded, tokenizer, prompt, **depth, **decoding)
    tokens = [
        {
            "token": chunk.token,
            "text": chunk.text,
            "exit_layer": chunk.exit_layer,
            # Full depth decides unasked: its confidence is nan, which JSON does not have.
            "confidence": None if math.isnan(chunk.confidence) else chunk.confidence,
        }
        for chunk in chunks
    ]
    ui.document(
        {
            "prompt": prompt,
            "text": "".join(token["text"] for token in tokens),
            "tokens_per_s": chunks.report.tokens_per_s,
            **dataclasses.asdict(chunks.report),
            "tokens": tokens,
        }
    )


@app.command()
def info(
    model: options.Model = None,
    calibration: options.CalibrationFile = None,
    as_json: options.Json = False,
) -> None:
    """Show a model's layers, exits and calibration."""
    loaded, _ = options.load_model(model, to_generate=False, calibration=calibration)
    from .description import describe

    facts = describe(loaded)
    if as_json:
        ui.document({"model": model, **facts})
        return
    points = facts.pop("points")
    ui.table(model or options.BUILT_IN, ("", ""), facts.items())
    if not points:
        return
    promises = [point.pop("certificate") for point in points]
    ui.table("operating points", list(points[0]), (point.values() for point in points))
    for point, promise in zip(points, promises, strict=True):
        if promise is not None:
            ui.text(f"\nthreshold {point['threshold']}\n{promise['statement']}\n")


@app.command()
def bench(
    model: options.Model = None,
    threshold: options.Threshold = None,
    target_speedup: options.TargetSpeedup = None,
    calibration: options.CalibrationFile = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt a line, text or JSON; default: 24 of ours."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest text, in tokens.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Runs over all prompts; medians count.")
    ] = None,
    weights: options.Weights = "own",
    as_json: options.Json = False,
) -> None:
    """Measure the gain over full depth and over transformers."""
    depth = options.dial(threshold, target_speedup)
    options.at_least_one("--max-new-tokens", max_new_tokens)
    options.at_least_one("--rounds", rounds)
    weights_read = options.weights_of(weights)
    from .prompts import bench_prompts, read

    texts = bench_prompts() if prompts is None else read(prompts)
    loaded, tokenizer = options.load_model(model, calibration=calibration, **weights_read)
    from .bench import MAX_NEW_TOKENS, ROUNDS, compare

    found = compare(
        loaded,
        tokenizer,
        texts,
        settings=depth,
        max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
        rounds=rounds or ROUNDS,
    ).as_dict()
    _show_comparison(model or options.BUILT_IN, found)
    if as_json:
        ui.document({"model": model, **found})


@app.command()
def export(
    paths: options.ModelAndOut,
    exit_layer: options.ExitLayer = None,
    with_generate: options.WithGenerate = False,
    force: options.Force = False,
) -> None:
    """Write a sub-model, or a model that brings its own generate, as a plain checkpoint."""
    if len(paths) > 2:
        raise OptionError(f"{paths[2]!r} is one name too many; give [MODEL] OUT.")
    options.something_to_export(exit_layer, with_generate)
    if len(paths) == 1:
        options.out_is_no_model(paths[0])
    loaded, tokenizer = options.load_model(paths[0] if len(paths) == 2 else None)
    from .exporting import export as write
    from .settings import state

    said = {"tokenizer": tokenizer, "with_generate": with_generate, "force": force}
    out = write(loaded, paths[-1], exit_layer, **said)
    ui.text(str(out))
    decodes = ", and it decodes by its own generate" if with_generate else ""
    ui.note(f"read back and compared: its logits equal the model's, bit for bit{decodes}.")
    wrapped = state(loaded)
    if with_generate and exit_layer not in (None, wrapped.n_layers):
        below = ", ".join(str(e) for e in wrapped.exit_layers if e < exit_layer) or "none"
        ui.note(
            f"--exit-layer {exit_layer} and --with-generate: a sub-model with the exits below "
            f"({below}) and no calibration, which is the whole model's. Run `calibrate run {out}`."
        )


def _show_comparison(name: str, found: dict[str, Any]) -> None:
    """The three arms as a table, the gains beneath it."""
    from .bench import threads

    recipe, n_layers = found["recipe"], found["n_layers"]
    depth = {"adaptive": found["mean_depth"]}
    agreement = {"full_depth": found["agreement_full_depth"], "adaptive": found["agreement"]}
    ui.table(
        f"{name}: {recipe['prompts']} prompts, up to {recipe['max_new_tokens']} new tokens, "
        f"{recipe['rounds']} rounds, {recipe['hardware']}, {threads(recipe)}, "
        f"{recipe['dtype']}" + ", int8 weights" * (recipe["weights"] == "int8"),
        ("", "tok/s", "decode tok/s", "mean_depth", "agreement"),
        (
            (
                arm,
                speed,
                found["decode_tokens_per_s"].get(arm),
                depth.get(arm, float(n_layers)),
                agreement.get(arm),
            )
            for arm, speed in found["tokens_per_s"].items()
        ),
    )
    low, high = found["wall_speedup_interval"]
    static = found["static_truncation"]
    ui.text(
        f"wall_speedup {found['wall_speedup']:.2f}x over full depth (95 % interval {low:.2f} to "
        f"{high:.2f}), {found['speedup_over_transformers']:.2f}x over transformers; "
        f"layer_speedup {found['layer_speedup']:.2f}x\n"
        f"all tokens at exit layer {static['exit_layer']} would have agreement "
        f"{static['agreement']:.3f}"
    )


def _read_pipe() -> str:
    if sys.stdin.isatty():
        raise OptionError(
            'there is no prompt. Give one, `adaptive-gen generate "Once upon a time"`, '
            "or pipe a text in."
        )
    return sys.stdin.read().rstrip("\n")


class _Reply(NamedTuple):
    tokens: list[int]
    whole: bool  # Ctrl-C ends a reply
    cache: Any  # what the next turn can start from


def _reply(
    model: Any, tokenizer: Any, prompt: Any, depth: dict[str, Any], decoding: dict[str, Any]
) -> _Reply:
    """Show a reply while it is decoded, then what it cost."""
    from .streaming import stream

    chunks = stream(model, tokenizer, prompt, **depth, **decoding)
    tokens, whole = [], True
    n_layers = chunks.report.n_layers
    try:
        for chunk in chunks:
            tokens.append(chunk.token)
            ui.token(chunk.text, chunk.exit_layer / n_layers)
    except KeyboardInterrupt:
        chunks.close()
        whole = False
    ui.text("")
    sampled = decoding.get("do_sample", model.generation_config.do_sample)
    # What `calibrate` measured are greedy texts.
    ui.footer(chunks.report, None if sampled else _calibrated_speedup(model, **depth))
    return _Reply(tokens, whole, chunks.cache)


def _calibrated_speedup(
    model: Any,
    threshold: float | None = None,
    target_speedup: float | None = None,
    lossless: bool = False,
    audit: bool = False,
) -> float | None:
    """What `calibrate` measured of the operating point in use, if one is, and of what runs here."""
    from .settings import state

    calibration = state(model).calibration if state(model).measured_here else None
    if calibration is None or threshold is not None or lossless or audit:
        return None
    if target_speedup is None:
        return calibration.point.wall_speedup
    return calibration.for_speedup(target_speedup).wall_speedup


def main() -> None:
    """Run the command line."""
    run_app(app, "adaptive-gen")
