"""Sequences: how texts and answers share them, and how a batch of them becomes tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

IGNORE = -100  # as in torch's cross-entropy

# stream: plain texts are joined and cut wherever a sequence is full, each text sees what stands
# before it, and an answer is a sequence of its own. documents: texts and answers fill sequences
# together; positions start anew with each, so none attends to another.
PACKINGS = ("stream", "documents")

Example = dict[str, list[int]]  # input_ids, labels and, in `documents`, position_ids


def stream(texts: Iterable[list[int]], seq_len: int) -> Iterator[Example]:
    """Cut the joined documents into full sequences; only the last may be shorter.

    The first token of a sequence is never predicted, so each starts with the last token of the one
    before: every token is learnt once.
    """
    held: list[int] = []
    for ids in texts:
        held.extend(ids)
        while len(held) >= seq_len:
            yield {"input_ids": held[:seq_len], "labels": held[:seq_len]}
            held = held[seq_len - 1 :]
    if len(held) > 1:
        yield {"input_ids": held, "labels": list(held)}


def fill(texts: Iterable[list[int]], answers: Iterable[Example], seq_len: int) -> Iterator[Example]:
    """Put whole documents into sequences, in order, as long as they fit.

    A text longer than a sequence is cut into pieces; each starts with the last token of the one
    before, so that every token but the text's first is learnt once.

    Args:
        texts: ids of plain documents.
        answers: sequences with labels, none longer than `seq_len`.
        seq_len: longest sequence.
    """
    pieces = (
        {"input_ids": ids[i : i + seq_len], "labels": ids[i : i + seq_len]}
        for ids in texts
        for i in range(0, max(len(ids) - 1, 1), seq_len - 1)
    )
    held: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for piece in chain(pieces, answers):
        length = len(piece["input_ids"])
        if length < 2:
            continue
        if len(held["input_ids"]) + length > seq_len:
            yield held
            held = {"input_ids": [], "labels": [], "position_ids": []}
        held["input_ids"] += piece["input_ids"]
        held["labels"] += [IGNORE, *piece["labels"][1:]]  # its first follows another document
        held["position_ids"] += range(length)
    if held["input_ids"]:
        yield held


def collator(pad_id: int) -> Callable[[Sequence[Example]], dict[str, Any]]:
    """A function that pads a batch on the right; the mask is left out where nothing is padded.

    Where documents share sequences, transformers reads their borders off positions that start
    anew, as long as there is no mask; padding is then one more document.
    """
    import torch

    def collate(batch: Sequence[Example]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": pad_id, "labels": IGNORE}
        tensors = {
            key: torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in batch])
            for key, value in fill.items()
        }
        # No token precedes a sequence's first, so it is no target; saying so keeps the Trainer's
        # count of targets right whichever of its counting rules applies.
        tensors["labels"][:, 0] = IGNORE
        if "position_ids" in batch[0]:
            positions = [r["position_ids"] + [*range(longest - len(r["labels"]))] for r in batch]
            return {**tensors, "position_ids": torch.tensor(positions)}
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        if int(lengths.min()) < longest:
            tensors["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return tensors

    return collate
