"""The texts of a batch while they grow: their ids, and what processes them and ends them.

Rows are as wide as what is known of them, drafts included; only equally wide rows are one tensor.
Axes: `rows`, `time`, `vocab`.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .draws import Draws, drawn
from .engine.drafts import DraftLength
from .engine.lasting import makes_lasting
from .report import Step


class Draft(NamedTuple):
    """A token that left early and waits for full depth to confirm, or to audit it."""

    step: Step
    top: int  # the token with the largest processed score, which an audit compares


class Text:
    """One row's text while it grows."""

    def __init__(self, row: int, width: int):
        """Start with the prompt, `width` ids of row `row` of the batch."""
        self.row, self.width = row, width  # its row of the ids, and how much of that is text
        self.place = row  # its row in the scheduler, which forgets finished ones
        self.draft_length: DraftLength | None = None  # where exits only draft
        self.steps: list[Step] = []
        self.drafts: list[Draft] = []  # the text's last tokens, not yet confirmed or audited
        self.scores: list[Tensor] = []  # processed, [1, vocab] each, when asked for
        self.logits: list[Tensor] = []  # as read out, [1, vocab] each, when asked for
        self.finished = False


class Texts:
    """All rows of a batch."""

    def __init__(
        self, prompts: Tensor, room: int, config: Any, logits_processor: Any, criteria: Any
    ):
        """Start with the prompts.

        Args:
            prompts: [rows, time] as given, with any left padding.
            room: new tokens to make room for at first.
            config: transformers' prepared generation config.
            logits_processor: transformers' list, called with [rows, time] ids and [rows, vocab]
                float32.
            criteria: transformers' list of stopping criteria.
        """
        self.prompts, self.config = prompts, config
        self.criteria, self.ends = criteria, _plain_ends(criteria)
        self.logits_processor = self._with_prefixes_of_real_rows(logits_processor)
        self.ids = torch.nn.functional.pad(prompts, (0, room))
        self.rows = [Text(row, prompts.shape[1]) for row in range(len(prompts))]
        self.draws = Draws(len(prompts), prompts.device)
        self._processed: set[int] = set()

    def process(self, texts: list[Text], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores after the logits processors, and the logits as float32; [rows, vocab] each."""
        kept = self.config.output_logits or self.config.output_scores
        if not self.logits_processor and not kept:
            logits = logits.to(self.ids.device, torch.float32)
            return logits, logits
        # Processors may write in place, and transformers shows them float32 whatever the model's.
        logits = logits.to(self.ids.device, torch.float32, copy=True)
        ids, rows = self.seen(texts), [text.row for text in texts]
        self._processed = set(rows)
        if len(rows) == len(self.rows) or not self.logits_processor:
            return self.logits_processor(ids, logits), logits
        index = self._filled(rows)
        return self.logits_processor(ids[index], logits[index])[rows], logits

    def choose(self, texts: list[Text], scores: Tensor) -> Tensor:
        """The next token of each of equally long texts, by its scores [rows, vocab]; [rows]."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        self.draws.forget(self.settled)
        numbers = self.draws.at(texts[0].width - self.prompts.shape[1], scores.shape[1])
        if len(texts) < len(self.rows):
            numbers = numbers[[text.row for text in texts]]
        return drawn(scores, numbers)

    @property
    def settled(self) -> int:
        """New tokens that every text has for certain which goes on."""
        return min((len(text.steps) for text in self.rows if not text.finished), default=0)

    def _filled(self, rows: list[int]) -> list[int]:
        """For every row of the batch its place in `rows`; 0, a copy, for those that are not there.

        Processors and criteria may keep something for each row and tell rows by their place.
        """
        at = {row: place for place, row in enumerate(rows)}
        return [at.get(text.row, 0) for text in self.rows]

    def seen(self, texts: list[Text]) -> Tensor:
        """The ids [rows, time] of equally long texts."""
        ids = self.ids[:, : texts[0].width]
        return ids if len(texts) == len(ids) else ids[[text.row for text in texts]]

    def so_far(self) -> list[Tensor]:
        """The ids of each text, [time]."""
        return [self.ids[text.row, : text.width] for text in self.rows]

    @makes_lasting
    def append(self, texts: list[Text], tokens: Tensor) -> None:
        """Write the next token [rows] of each of equally long texts."""
        width = texts[0].width
        if width == self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, width))
        if len(texts) == len(self.ids):
            self.ids[:, width] = tokens
        else:
            self.ids[[text.row for text in texts], width] = tokens
        for text in texts:
            text.width += 1

    @makes_lasting
    def extend(self, text: Text, tokens: list[int]) -> None:
        """Write the next tokens of one text."""
        width = text.width + len(tokens)
        if width > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, width))
        self.ids[text.row, text.width : width] = torch.from_numpy(np.array(tokens))
        text.width = width

    def newest(self, texts: list[Text]) -> Tensor:
        """The last token of each text, [rows, 1]."""
        if len({text.width for text in texts}) == 1:
            return self.seen(texts)[:, -1:]
        return torch.stack([self.ids[text.row, text.width - 1] for text in texts])[:, None]

    def stop(self, texts: list[Text], tokens: list[int], scores: Tensor) -> list[bool]:
        """Whether each of equally long texts ends as it stands, with its last token in `tokens`."""
        if self.ends is not None:
            length, ids = self.ends
            return [texts[0].width >= length or token in ids for token in tokens]
        shown = None
        if self.config.output_scores and len(self.rows) == 1:
            shown = (*texts[0].scores, scores)
        ids, rows = self.seen(texts), [text.row for text in texts]
        if len(rows) == len(self.rows):
            return self.criteria(ids, shown).tolist()
        return self.criteria(ids[self._filled(rows)], shown)[rows].tolist()

    def sequences(self) -> Tensor:
        """Prompts and new tokens, [rows, time], padded behind the end of each row."""
        start = self.prompts.shape[1]
        longest = max(len(text.steps) for text in self.rows)  # 0 before anything is decoded
        ids = self.ids[:, : start + longest].clone()
        pad = self.config._pad_token_tensor  # the end token where the config names no other
        for text in self.rows:
            ids[text.row, start + len(text.steps) :] = 0 if pad is None else int(pad)
        return ids

    def by_step(self, name: str) -> tuple[Tensor, ...]:
        """Kept tensors as transformers orders them: a [rows, vocab] per step, 0 behind an end."""
        rows = [torch.cat(getattr(text, name)) for text in self.rows]
        return tuple(pad_sequence(rows, batch_first=True).unbind(1))

    def _with_prefixes_of_real_rows(self, processors: Any) -> Any:
        """The processors, the user asked for allowed prefixes of rows that are really there only.

        What stands in the place of another row is a copy.
        """
        own = copy.copy(processors)
        for i, processor in enumerate(own):
            if isinstance(processor, PrefixConstrainedLogitsProcessor):
                asked = processor._prefix_allowed_tokens_fn

                def allowed(row: int, ids: Tensor, asked: Any = asked) -> list[int]:
                    return asked(row, ids) if row in self._processed else [0]

                own[i] = PrefixConstrainedLogitsProcessor(allowed, processor._num_beams)
        return own


def _plain_ends(criteria: Any) -> tuple[float, frozenset[int]] | None:
    """The length and the tokens that end a text, where nothing else does; else None.

    Asking transformers' own two criteria takes several tensor operations for each token.
    """
    length, ids = math.inf, frozenset[int]()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ids |= set(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxLengthCriteria:
            length = min(length, criterion.max_length)
            model_length = criterion.max_position_embeddings
            if model_length is not None and length > model_length:
                return None  # it warns when a text grows beyond that
        else:
            return None
    return length, ids


def equally_wide(texts: Sequence[Text], places: list[int]) -> list[list[int]]:
    """`places` grouped by the width of the text there, so that a group's ids are one tensor."""
    groups: dict[int, list[int]] = {}
    for place in places:
        groups.setdefault(texts[place].width, []).append(place)
    return list(groups.values())
