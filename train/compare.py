"""Two models' exits against each other, in writing: the shape of the paper's Figure 1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_gen.exit_readouts import exits_of, load_readouts
from adaptive_gen.losses import resolve_exits

from .asking import Answered, Asked, ask, questions_in
from .judge import Judge, grid, verdict_of
from .models import load_model


def compare(
    names: tuple[str, str],
    paths: Sequence[Path],
    exit_layers: tuple[Sequence[int] | None, Sequence[int] | None],
    *,
    most: int,
    max_new_tokens: int,
    judge: Judge | None,
) -> dict[str, Any]:
    """Every exit of one model against every exit of another.

    Args:
        names: directories or hub ids of our model and theirs.
        paths: files with questions or instructions.
        exit_layers: of each; None for the model's own, else quarters.
        most: questions to ask.
        max_new_tokens: longest answer.
        judge: None judges by ROUGE-L or F1 with the accepted answer, and by the likelihood under
            full depth of their model, which favours theirs.

    Returns:
        Plain values: the exits of both, and per way of judging the cells of the table.
    """
    rows = questions_in(paths, most)
    models = [_loaded(name) for name in names]
    other = models[1][0]
    sides = []
    for (model, tokenizer), chosen in zip(models, exit_layers, strict=True):
        exits = resolve_exits(model, chosen or exits_of(model) or None)
        sides.append(ask(model, tokenizer, rows, exits, max_new_tokens=max_new_tokens, judge=other))
    ours, theirs = sides
    found = {
        "models": list(names),
        "questions": len(rows),
        "exit_layers": [[one.exit_layer for one in side] for side in sides],
        "by": {},
    }
    ways = ("judge",) if judge else tuple(ours[0].scores)
    for way in ways:
        verdicts = {
            (a.exit_layer, b.exit_layer): _verdicts(way, rows, a, b, judge)
            for a in ours
            for b in theirs
        }
        found["by"][way] = grid(verdicts)
    if judge:
        found["judge"] = {"model": judge.model, "unclear_replies": judge.unclear}
    return found


def _loaded(name: str) -> tuple[Any, Any]:
    model, tokenizer = load_model(name)
    load_readouts(model, Path(name))
    return model.eval(), tokenizer


def _verdicts(
    way: str, rows: Sequence[Asked], ours: Answered, theirs: Answered, judge: Judge | None
) -> list[float]:
    if judge is None:
        return list(map(verdict_of, ours.scores[way], theirs.scores[way]))
    return [
        judge.compare(row.question, a, b)
        for row, a, b in zip(rows, ours.said, theirs.said, strict=True)
    ]
