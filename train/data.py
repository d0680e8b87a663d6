"""Rows -> training sequences: plain text packed without waste, answers learnt without prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adaptive_gen.errors import DataError

from .rows import Dialogue, Pair, Row, Text, read_rows

IGNORE = -100  # as in torch's cross-entropy
PLAIN_PROMPT = "### Instruction:\n{}\n\n### Response:\n"

Example = dict[str, list[int]]  # input_ids and labels, of equal length


def load(paths: Sequence[Path], tokenizer: Any, seq_len: int, *, eos: bool = True) -> list[Example]:
    """All rows of all files as training sequences.

    Args:
        paths: data files.
        tokenizer: of the model.
        seq_len: longest sequence. Plain text fills sequences to the last token; an answer that does
            not fit is cut.
        eos: whether documents of plain text end with the EOS token.

    Raises:
        DataError: a broken file, or no sequence with anything to learn.
    """
    rows = [row for path in paths for row in read_rows(path)]
    texts = [row.text for row in rows if isinstance(row, Text)]
    examples = list(pack(documents(texts, tokenizer, eos=eos), seq_len))
    for row in rows:
        if not isinstance(row, Text):
            example = answer_only(row, tokenizer)
            cut = {key: ids[:seq_len] for key, ids in example.items()}
            if any(label != IGNORE for label in cut["labels"][1:]):
                examples.append(cut)
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
    for start in range(0, len(texts), 1000):
        batch = list(texts[start : start + 1000])
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            if ends and first == last and ids[:1] == [first]:
                ids = ids[1:]
            if ends and ids[-1:] != [last]:
                ids = [*ids, last]
            yield ids


def pack(stream: Iterable[list[int]], seq_len: int) -> Iterator[Example]:
    """Cut the joined documents into full sequences; only the last may be shorter.

    The first token of a sequence is never predicted, so each starts with the last token of the one
    before: every token of the stream is learnt once.
    """
    held: list[int] = []
    for ids in stream:
        held.extend(ids)
        while len(held) >= seq_len:
            yield {"input_ids": held[:seq_len], "labels": held[:seq_len]}
            held = held[seq_len - 1 :]
    if len(held) > 1:
        yield {"input_ids": held, "labels": list(held)}


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


def collator(pad_id: int) -> Callable[[list[Example]], dict[str, Any]]:
    """A function that pads a batch on the right; the mask is left out where nothing is padded."""
    import torch

    def collate(batch: list[Example]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": pad_id, "labels": IGNORE}
        tensors = {
            key: torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in batch])
            for key, value in fill.items()
        }
        # No token precedes a sequence's first, so it is no target; saying so keeps the Trainer's
        # count of targets right whichever of its counting rules applies.
        tensors["labels"][:, 0] = IGNORE
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        if int(lengths.min()) < longest:
            tensors["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return tensors

    return collate


__all__ = ["Example", "Row", "answer_only", "collator", "documents", "load", "pack", "texts_of"]
