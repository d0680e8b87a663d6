"""The commands that measure: `eval` and `compare`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_gen import ui

Data = Annotated[list[Path], typer.Option(help="As for training.", metavar="FILE...")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory for the JSON and a page with the figures.")
]
Tokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or hub id of a causal LM.")],
    data: Data,
    exit_layers: Annotated[
        str | None, typer.Option(help="Default: the model's own, else quarters.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.", min=8)] = 512,
    eos: Annotated[
        bool | None,
        typer.Option("--eos/--no-eos", help="End documents with EOS. Default: as in training."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens; 0: all.", min=0)] = 0,
    asked: Annotated[
        int, typer.Option(help="Questions and instructions to answer in writing.", min=0)
    ] = 100,
    max_new_tokens: Tokens = 50,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Per exit: loss, agreement with full depth, confidence and its error, written answers."""
    from .run import evaluate_model

    _prepare(out)
    result = evaluate_model(
        model,
        data,
        exit_layers,
        seq_len=seq_len,
        dtype=dtype,
        eos=eos,
        max_tokens=max_tokens,
        asked=asked,
        max_new_tokens=max_new_tokens,
    ).as_dict()
    if out is not None:
        from .page import evaluation

        _write(out, "eval", result, evaluation(model, result))
    if json_out:
        ui.document(result)
        return
    columns = ["exit layer", "loss", "agreement", "confidence"]
    columns += [f"ECE {name}" for name in result["exits"][0]["ece"]]
    rows = [
        (
            f"{s['exit_layer']}/{result['n_layers']}",
            *(s[name] for name in ("loss", "agreement", "confidence")),
            *s["ece"].values(),
        )
        for s in result["exits"]
    ]
    width = len(columns)
    ui.table(
        f"{model}, {result['tokens']:,} tokens",
        columns,
        [(*row, *["-"] * (width - len(row))) for row in rows],
    )
    if answers := result["answers"]:
        names = [name for name in answers[0] if name != "exit_layer"]
        cells = [(str(a["exit_layer"]), *(a[name]["mean"] for name in names)) for a in answers]
        count = answers[0]["likelihood"]["questions"]
        ui.table(f"{count} answers in writing", ["exit layer", *names], cells)


def compare(
    model: Annotated[str, typer.Argument(help="Directory or hub id of a causal LM.")],
    other: Annotated[str, typer.Argument(help="The model to compare it with.")],
    data: Data,
    exit_layers: Annotated[
        str | None, typer.Option(help="Of MODEL. Default: the model's own, else quarters.")
    ] = None,
    other_exit_layers: Annotated[str | None, typer.Option(help="Of OTHER, likewise.")] = None,
    asked: Annotated[int, typer.Option(help="Questions and instructions to ask.", min=1)] = 100,
    max_new_tokens: Tokens = 50,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible, such as http://localhost:8000/v1.")
    ] = None,
    judge: Annotated[str, typer.Option(help="Name of the judging model there.")] = "default",
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Every exit of MODEL against every exit of OTHER, judged in both orders."""
    from adaptive_gen import exits

    from .checks import check_data
    from .compare import compare as compared
    from .judge import Judge

    _prepare(out)
    check_data(data)
    chosen = [exits.parse(text) if text else None for text in (exit_layers, other_exit_layers)]
    result = compared(
        (model, other),
        data,
        (chosen[0], chosen[1]),
        most=asked,
        max_new_tokens=max_new_tokens,
        judge=Judge(endpoint, judge) if endpoint else None,
    )
    if out is not None:
        from .page import comparison

        _write(out, "compare", result, comparison(result))
    if json_out:
        ui.document(result)
        return
    columns = result["exit_layers"][1]
    for way, cells in result["by"].items():
        score = {(c["exit_layer"], c["other_exit_layer"]): c["score"] for c in cells}
        ui.table(
            f"(wins - losses) / {result['questions']} of {model} (rows) over {other}: {way}",
            ["exit layer", *map(str, columns)],
            [(str(r), *(score[r, c] for c in columns)) for r in result["exit_layers"][0]],
        )


def _prepare(out: Path | None) -> None:
    from transformers.utils import logging

    from .checks import check_writable

    logging.disable_progress_bar()  # it would run into the one line of an error
    if out is not None:
        check_writable(out)


def _write(out: Path, name: str, result: Mapping[str, Any], page: str) -> None:
    from .saving import write_json, write_text

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", json.loads(json.dumps(result)))
    write_text(out / f"{name}.html", page)
