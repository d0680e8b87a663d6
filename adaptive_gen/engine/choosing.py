"""How the tokens of a text are chosen, for compiled code: what `kernels.choosing` works with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from ..draws import Draws
from .panelled import padding
from .twister import exponential_

# Of 4 bytes, to draw ahead for a stretch, since those behind a text's end are in vain; and for its
# drafts besides. What has no numbers counts as a text's end: full depth judges the drafts there.
MOST_NUMBERS, MOST_WITH_DRAFTS = 1 << 20, 1 << 23


@dataclass(frozen=True, eq=False)
class Choice:
    """What has a say besides the logits, where transformers' commonest processors are all."""

    said: Callable[[], list[Tensor]]  # gives each row's ids so far
    draws: Draws | None = None  # None: the largest score is chosen
    penalty: float = 1.0  # for what has been said
    prompt_ignore_length: Tensor | int | None = None  # ids before what counts as said, or [rows]
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the largest logit is all that matters."""
        return self.draws is None and self.penalty == 1


# In the order in which transformers lists them, with the settings of each.
_READ = {
    hf.RepetitionPenaltyLogitsProcessor: ("penalty", "prompt_ignore_length"),
    hf.TemperatureLogitsWarper: ("temperature",),
    hf.TopKLogitsWarper: ("top_k",),
    hf.TopPLogitsWarper: ("top_p",),
    hf.MinPLogitsWarper: ("min_p",),
}
_LEAST, _MOST = 1e-37, 1e38  # what float32 holds, about
_USUAL = {"filter_value": -math.inf, "min_tokens_to_keep": 1}


def choice_of(
    draws: Draws | None, processors: Any, said: Callable[[], list[Tensor]]
) -> Choice | None:
    """What transformers' processors come to; None if compiled code cannot do the same.

    Args:
        draws: what tokens are drawn with, if they are.
        processors: transformers' list.
        said: see `Choice`.
    """
    kinds, found = list(_READ), dict[str, Any]()
    for processor in processors:
        if type(processor) not in kinds:
            return None
        kinds = kinds[kinds.index(type(processor)) + 1 :]
        if any(getattr(processor, name, usual) != usual for name, usual in _USUAL.items()):
            return None
        for name in _READ[type(processor)]:
            found[name] = getattr(processor, name, None)
    factors = (found.get(name, 1.0) for name in ("penalty", "temperature"))
    if not all(_LEAST <= factor <= _MOST for factor in factors):
        return None
    return Choice(said, draws, **found)


class Choosing:
    """A choice as arrays."""

    def __init__(self, choice: Choice, vocab: int, rows: int):
        """Make room; `vocab` tokens there are, `rows` texts to begin with."""
        self._choice, self._vocab, self._rows = choice, vocab, rows
        if choice.draws is not None:
            choice.draws.exponential = exponential_
        self._settings = np.array(
            [choice.penalty, choice.temperature, choice.top_k, choice.top_p, choice.min_p]
        )
        width = 0 if choice.plain else vocab + padding(vocab)
        self._scratch = np.zeros(width, np.float32), np.zeros(width, np.int64)
        self._said = np.zeros((0, vocab), np.int32)  # times, [rows, vocab]
        self._begun = False

    def most(self, tokens: int, drafts: int = 0) -> int:
        """How many of so many tokens of each text to choose at once, and of drafts beyond."""
        if self._choice.draws is None:
            return tokens + drafts
        numbers = MOST_WITH_DRAFTS if drafts else MOST_NUMBERS
        return min(tokens + drafts, max(1, numbers // (self._vocab * self._rows)))

    def arrays(self, start: int, stop: int, rows: list[int]) -> tuple[Any, ...]:
        """What the kernel needs to choose tokens; see `kernels.choosing`.

        Args:
            start: the first position among the new tokens; those before it are done with.
            stop: the one behind the last.
            rows: of the texts that go on.
        """
        choice = self._choice
        if stop > start and not self._begun:
            self._begun = True
            if choice.penalty != 1:
                self._said = self._counted()
        numbers = np.zeros((0, self._rows, self._vocab), np.float32)
        if choice.draws is not None and stop > start:
            choice.draws.forget(start)
            numbers = choice.draws.between(start, stop, self._vocab).numpy()
        return self._settings, np.array(rows), numbers, self._said, *self._scratch

    def _counted(self) -> Any:
        """How often each row has said each token, [rows, vocab]."""
        texts, first = self._choice.said(), self._choice.prompt_ignore_length
        first = torch.as_tensor(0 if first is None else first)
        counts = [
            torch.bincount(ids[start:][ids[start:] < self._vocab], minlength=self._vocab)
            for ids, start in zip(texts, first.expand(len(texts)).tolist(), strict=True)
        ]
        return torch.stack(counts).to(torch.int32).numpy()
