"""Rows of training data: plain text, or a dialogue of which only some parts are learnt."""

from typing import Any, NamedTuple

from adaptive_gen.errors import DataError

SHAPES = (
    '{"text"}, {"prompt", "completion"}, {"instruction", "input", "output"}, {"messages"}, '
    '{"question", "answers"}, {"conversations"} or {"turns"}'
)


class Text(NamedTuple):
    """A document, learnt whole."""

    text: str


class Pair(NamedTuple):
    """A prompt as it stands, and the completion to learn."""

    prompt: str
    completion: str


class Dialogue(NamedTuple):
    """Messages with `role` and `content`; what the assistant says is learnt."""

    messages: list[dict[str, str]]


Row = Text | Pair | Dialogue


def to_row(value: Any, where: str) -> Row:
    """One JSON object as a row.

    Args:
        value: the parsed object.
        where: file and line, for the message.

    Raises:
        DataError: none of the known shapes, or a field that is not what the shape says.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object; rows are {SHAPES}.")
    if "messages" in value:
        return _dialogue(value["messages"], where)
    if "conversations" in value:
        return _dialogue(_from_conversations(value["conversations"], where), where)
    if "turns" in value:
        return _dialogue(_from_turns(value["turns"], where), where)
    if "instruction" in value and "output" in value:
        ask, extra = _string(value, "instruction", where), value.get("input") or ""
        user = f"{ask}\n\n{extra}" if extra else ask
        answer = _string(value, "output", where)
        return _dialogue(
            [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], where
        )
    if "question" in value and ("answers" in value or "answer" in value):
        return _question(value, where)
    if "prompt" in value and "completion" in value:
        return Pair(_string(value, "prompt", where), _string(value, "completion", where))
    if "text" in value:
        return Text(_string(value, "text", where))
    keys = ", ".join(map(str, value)) or "nothing"
    raise DataError(f"{where} has the keys {keys}; rows are {SHAPES}.")


def _question(value: dict[str, Any], where: str) -> Dialogue:
    """A question with one answer, or a list of which the first is learnt."""
    answers = value["answers"] if "answers" in value else [value["answer"]]
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
        raise DataError(f"{where}: answers is not a list of strings with one in it.")
    ask = {"role": "user", "content": _string(value, "question", where)}
    return _dialogue([ask, {"role": "assistant", "content": answers[0]}], where)


def _string(value: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(value[key], str):
        raise DataError(f"{where}: {key} is a {type(value[key]).__name__}, not a string.")
    return value[key]


def _from_turns(turns: Any, where: str) -> list[dict[str, str]]:
    """Turns of two or more speakers: the first is the user, all others are the assistant."""
    messages: list[dict[str, str]] = []
    if not isinstance(turns, list) or not all(
        isinstance(t, list) and len(t) == 2 and isinstance(t[1], str) for t in turns
    ):
        raise DataError(f"{where}: turns is not a list of [speaker, text].")
    for speaker, text in turns:
        role = "user" if speaker == turns[0][0] else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def _from_conversations(turns: Any, where: str) -> list[dict[str, str]]:
    """ShareGPT's `from` and `value`."""
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("from"), str) and isinstance(t.get("value"), str)
        for t in turns
    ):
        raise DataError(
            f'{where}: conversations is not a list of {{"from", "value"}} with strings.'
        )
    return [{"role": str(roles.get(t["from"], t["from"])), "content": t["value"]} for t in turns]


def _dialogue(messages: Any, where: str) -> Dialogue:
    sound = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not sound:
        raise DataError(f'{where}: messages is not a list of {{"role", "content"}} with strings.')
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"{where} has no assistant's turn; there is nothing to learn from it.")
    return Dialogue(messages)
