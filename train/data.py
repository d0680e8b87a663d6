"""Rows -> training sequences: plain text packed without waste, answers learnt without prompts."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adaptive_gen.errors import DataError, OptionError
from adaptive_gen.ui import progress

from .packing import IGNORE, PACKINGS, Example, fill, stream
from .reading import BadRows, read_rows
from .rows import Dialogue, Pair, Row, Text

AT_ONCE = 1000  # texts that are tokenized together
PLAIN_PROMPT = "### Instruction:\n{}\n\n### Response:\n"


def load(
    paths: Sequence[Path],
    tokenizer: Any,
    seq_len: int,
    *,
    eos: bool = True,
    packing: str = "stream",
    max_bad_rows: int = 0,
) -> list[Example]:
    """All rows of all files as training sequences.

    Args:
        paths: data files.
        tokenizer: of the model.
        seq_len: longest sequence; an answer that does not fit is cut.
        eos: whether documents of plain text end with the EOS token.
        packing: see `packing.PACKINGS`.
        max_bad_rows: broken rows to report and skip.

    Raises:
        DataError: a broken file, or no sequence with anything to learn.
        OptionError: a packing that does not exist.
    """
    rows = rows_of(paths, max_bad_rows)
    return sequences(rows, tokenizer, seq_len, eos=eos, packing=packing)


def rows_of(paths: Sequence[Path], max_bad_rows: int = 0) -> list[Row]:
    """The rows of all files, with so many broken ones reported and skipped."""
    bad = BadRows(max_bad_rows)
    return [row for path in paths for row in read_rows(path, bad)]


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and a random `share` of them, one at least, that is kept from training.

    Raises:
        OptionError: nothing would be left to train on.
    """
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise OptionError(
            f"--eval-share {share:g} of {len(rows)} rows leaves none to train on; give a smaller "
            "share, or other rows with --eval-data."
        )
    held = set(random.Random(seed).sample(range(len(rows)), count))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for index, row in enumerate(rows):
        parts[index in held].append(row)
    return parts


def sequences(
    rows: Sequence[Row], tokenizer: Any, seq_len: int, *, eos: bool = True, packing: str = "stream"
) -> list[Example]:
    """Rows as training sequences; see `load`."""
    if packing not in PACKINGS:
        raise OptionError(f"packing {packing!r} is unknown; give {' or '.join(PACKINGS)}.")
    texts = documents([row.text for row in rows if isinstance(row, Text)], tokenizer, eos=eos)
    answers = []
    for row in rows:
        if not isinstance(row, Text):
            example = answer_only(row, tokenizer)
            cut = {key: ids[:seq_len] for key, ids in example.items()}
            if any(label != IGNORE for label in cut["labels"][1:]):
                answers.append(cut)
    if packing == "stream":
        examples = [*stream(texts, seq_len), *answers]
    else:
        examples = list(fill(texts, answers, seq_len))
    if not examples:
        raise DataError(
            f"the data holds nothing to learn within {seq_len} tokens; "
            "give longer texts or a larger --seq-len."
        )
    return examples


def texts_of(paths: Sequence[Path]) -> Iterator[str]:
    """Everything the files say, for training a tokenizer."""
    for path in paths:
        for row in read_rows(path):
            if isinstance(row, Text):
                yield row.text
            elif isinstance(row, Pair):
                yield row.prompt + row.completion
            else:
                yield from (message["content"] for message in row.messages)


def documents(texts: Sequence[str], tokenizer: Any, *, eos: bool = True) -> Iterator[list[int]]:
    """Each text's ids between the tokens that open and end one.

    The tokenizer opens a text as it always does. The EOS that ends it teaches the model to stop;
    only a model whose pretraining never saw one is better off without (`eos=False`). Where both are
    one token, it goes in once.
    """
    first: Any = tokenizer.bos_token_id
    last: Any = tokenizer.eos_token_id
    ends = eos and last is not None
    starts = range(0, len(texts), AT_ONCE)
    for start in progress(starts, f"tokenizing {len(texts)} texts", total=len(starts)):
        batch = list(texts[start : start + AT_ONCE])
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            if ends and first == last and ids[:1] == [first]:
                ids = ids[1:]
            if ends and ids[-1:] != [last]:
                ids = [*ids, last]
            yield ids


def answer_only(row: Pair | Dialogue, tokenizer: Any) -> Example:
    """A prompt and answer whose labels are the answer (and what ends it)."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learnt in _pieces(row, tokenizer):
        part = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ids.extend(part)
        labels.extend(part if learnt else [IGNORE] * len(part))
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids.insert(0, bos)
        labels.insert(0, IGNORE)
    if not tokenizer.chat_template or isinstance(row, Pair):
        end: list[Any] = [] if eos is None else [eos]
        ids, labels = ids + end, labels + end
    return {"input_ids": ids, "labels": labels}


def _pieces(row: Pair | Dialogue, tokenizer: Any) -> list[tuple[str, bool]]:
    """Text pieces in order, and whether each is learnt.

    Prompt and answer become tokens apart, as they do when the model generates.
    """
    if isinstance(row, Pair):
        return [(row.prompt, False), (row.completion, True)]
    last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
    messages = row.messages[: last + 1]  # what follows the last answer teaches nothing
    if tokenizer.chat_template:
        return _templated(messages, tokenizer)
    pieces = [
        (f"{m['content']}\n\n", True)
        if m["role"] == "assistant"
        else (PLAIN_PROMPT.format(m["content"]), False)
        for m in messages
    ]
    return [*pieces[:-1], (messages[-1]["content"], True)]


def _templated(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """Pieces of the chat template's own rendering, split around each answer."""

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )

    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole = render(len(messages), False)
    for chosen in (answers, answers[-1:]):
        pieces, done = [], 0
        for i in chosen:
            before, after = render(i, True), render(i + 1, False)
            if not (after.startswith(before) and whole.startswith(after)):
                break  # a template that rewrites earlier turns: learn the last answer only
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        else:
            return pieces
    raise DataError(
        "the tokenizer's chat template rewrites the prompt once the answer is there, so the answer "
        'cannot be told apart; give {"prompt", "completion"} rows.'
    )
