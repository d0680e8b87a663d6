"""Prompt sets: read from a file, turned into token ids, named by a hash.

A prompt is a text to continue, or a list of chat messages to answer. A file holds one a line: plain
text, or in a .jsonl {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}]}.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import DataError

Prompt = str | list[dict[str, str]]
LINE = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


def read(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a file; empty lines are skipped.

    Raises:
        DataError: the file is missing, is no UTF-8 text, holds no prompt, or a line is broken.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}. Give a text file with one prompt a line."
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not UTF-8 text. Give a text file with one prompt a line."
        ) from None
    found = parse(text, name=str(path), as_json=path.suffix in (".jsonl", ".json"))
    if not found:
        raise DataError(f"{path} holds no prompt. Write one a line: plain text, or {LINE}.")
    return found


def parse(text: str, name: str, as_json: bool) -> list[Prompt]:
    """The prompts of a text.

    Args:
        text: one prompt a line.
        name: what errors call the text.
        as_json: whether the lines are JSON objects.

    Raises:
        DataError: a line is broken; the message has its number.
    """
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    lines = ((i, line.strip()) for i, line in enumerate(text.split("\n"), start=1))
    return [_row(line, f"{name}, line {i}") if as_json else line for i, line in lines if line]


def _row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{where} is not JSON. Write {LINE}.") from None
    row = row if isinstance(row, dict) else {}
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise DataError(f"{where} holds no prompt. Write {LINE}.")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def bench_prompts() -> list[Prompt]:
    """The 24 prompts of `adaptive-gen bench` where none are given; calibration never saw them."""
    name = "bench_prompts.jsonl"
    return parse(files("adaptive_gen").joinpath(name).read_text("utf-8"), name, as_json=True)


def encode(tokenizer: Any, prompt: Prompt) -> Tensor:
    """Token ids [1, time] of a prompt, with the chat template around messages where there is one.

    Raises:
        DataError: the tokenizer makes no token of it.
    """
    if isinstance(prompt, list) and tokenizer.chat_template is not None:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
    else:
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[-1] == 0:
        raise DataError(f"the prompt {prompt!r} has no token in this model's vocabulary.")
    return ids.long()


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of a prompt set, to name it in a result."""
    text = json.dumps(list(prompts), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def inputs(model: Any, tokenizer: Any, prompts: Sequence[Prompt], room: int) -> list[Tensor]:
    """Token ids [1, time] of every prompt, on the model's device.

    Args:
        model: decides the device and the longest text.
        tokenizer: makes the ids.
        prompts: at least one.
        room: new tokens that must fit behind every prompt.

    Raises:
        DataError: there is no prompt, or one is too long for the model.
    """
    if not prompts:
        raise DataError("there is no prompt to generate from; give at least one.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = [encode(tokenizer, prompt).to(model.device) for prompt in prompts]
    for number, ids in enumerate(encoded, start=1):
        if limit is not None and ids.shape[1] + room > limit:
            raise DataError(
                f"prompt {number} has {ids.shape[1]} tokens; with {room} new ones that is more "
                f"than the {limit} this model can hold. Shorten it or lower --max-new-tokens."
            )
    return encoded
