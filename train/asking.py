"""Questions answered in writing by every exit, and what the answers are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_gen.errors import DataError

from .answering import answers, likelihood, sub_model
from .metrics import exact_match, f1, interval, rouge_l
from .reading import read_json_rows


class Asked(NamedTuple):
    """A question, its accepted answers, and whether they are closed: a name, not a text."""

    question: str
    accepted: list[str]
    closed: bool


@dataclass(frozen=True)
class Answered:
    """What one exit wrote.

    Args:
        exit_layer: count of layers.
        said: its answers.
        scores: per measure, one number for each question it applies to. Questions with accepted
            answers: `exact_match` and `f1`, normalised as TriviaQA does; instructions: `rouge_l`
            against the reference; all: `likelihood`, the mean log-probability of a token of the
            answer under full depth, in nats.
    """

    exit_layer: int
    said: list[str]
    scores: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Means with 95 % bootstrap intervals over questions, for JSON."""
        found = {}
        for name, values in self.scores.items():
            mean = sum(values) / len(values)
            found[name] = {"mean": mean, "interval": interval(values), "questions": len(values)}
        return {"exit_layer": self.exit_layer, **found}


def asked(row: dict[str, Any]) -> Asked | None:
    """A data row as something to ask; None for text and dialogues."""
    if "question" in row:
        return Asked(row["question"], row.get("answers") or [row["answer"]], True)
    if "instruction" in row and row.get("output"):
        extra = row.get("input") or ""
        question = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return Asked(question, [row["output"]], False)
    return None


def questions_in(paths: Sequence[Path], most: int) -> list[Asked]:
    """The first `most` questions and instructions of the files; plain text has none."""
    found: list[Asked] = []
    for path in paths:
        if path.name.lower().removesuffix(".gz").endswith(".txt"):
            continue
        for row in read_json_rows(path):
            if len(found) == most:
                return found
            one = asked(row)
            if one is not None:
                found.append(one)
    return found


def ask(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Asked],
    exit_layers: Sequence[int],
    *,
    max_new_tokens: int = 50,
    judge: Any = None,
) -> list[Answered]:
    """Let every exit answer greedily as a model of its own.

    Args:
        model: a causal LM of the Llama shape.
        tokenizer: of the model.
        rows: what is asked.
        exit_layers: ascending.
        max_new_tokens: longest answer.
        judge: a model whose full depth weighs the answers; None is `model` itself.
    """
    if not rows:
        raise DataError('nothing to ask: give rows with {"question", "answers"} or {"instruction"}')
    questions = [row.question for row in rows]
    found = []
    for exit_layer in exit_layers:
        alone = sub_model(model, exit_layer)
        said = answers(alone, tokenizer, questions, max_new_tokens=max_new_tokens)
        pairs = list(zip(said, rows, strict=True))
        scores = {
            "exact_match": [exact_match(a, row.accepted) for a, row in pairs if row.closed],
            "f1": [f1(a, row.accepted) for a, row in pairs if row.closed],
            "rouge_l": [rouge_l(a, row.accepted[0]) for a, row in pairs if not row.closed],
            "likelihood": likelihood(judge or model, tokenizer, questions, said),
        }
        found.append(Answered(exit_layer, said, {k: v for k, v in scores.items() if v}))
    return found


def as_rows(rows: Sequence[Asked], found: Sequence[Answered]) -> list[dict[str, Any]]:
    """Questions with every exit's answer, to be read by people."""
    return [
        {**row._asdict(), "answers": {str(one.exit_layer): one.said[i] for one in found}}
        for i, row in enumerate(rows)
    ]
