"""How the tokens of a text are chosen, for compiled code: what `kernels.choosing` works with."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from .panelled import padding

# Numbers to draw at once, of 4 bytes: more than a stretch takes, but where vocabularies are large.
MOST_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class Choice:
    """What has a say besides the logits, where transformers' commonest processors are all."""

    said: Tensor  # the prompt, [time]
    sampled: bool = False
    penalty: float = 1.0  # for what has been said
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the largest logit is all that matters."""
        return not self.sampled and self.penalty == 1


# In the order in which transformers lists them, with the setting of each.
_READ = {
    hf.RepetitionPenaltyLogitsProcessor: "penalty",
    hf.TemperatureLogitsWarper: "temperature",
    hf.TopKLogitsWarper: "top_k",
    hf.TopPLogitsWarper: "top_p",
    hf.MinPLogitsWarper: "min_p",
}
_USUAL = {"filter_value": -math.inf, "min_tokens_to_keep": 1, "prompt_ignore_length": None}


def choice(sampled: bool, processors: Any, said: Tensor) -> Choice | None:
    """What transformers' processors come to; None if compiled code cannot do the same.

    Args:
        sampled: whether tokens are drawn.
        processors: transformers' list.
        said: the prompt, [time].
    """
    kinds, found = list(_READ), dict[str, Any]()
    for processor in processors:
        if type(processor) not in kinds:
            return None
        kinds = kinds[kinds.index(type(processor)) + 1 :]
        if any(getattr(processor, name, usual) != usual for name, usual in _USUAL.items()):
            return None
        name = _READ[type(processor)]
        found[name] = getattr(processor, name)
    return Choice(said, sampled, **found)


class Choosing:
    """A text's choice as arrays, and its draws from torch's generator."""

    def __init__(self, choice: Choice, vocab: int):
        """Make room.

        Args:
            choice: the text's.
            vocab: tokens there are.
        """
        self._sampled, self._vocab = choice.sampled, vocab
        settings = np.array(
            [choice.penalty, choice.temperature, choice.top_k, choice.top_p, choice.min_p]
        )
        width = 0 if choice.plain else vocab + padding(vocab)
        seen = np.zeros(vocab if choice.penalty != 1 else 0, np.bool_)
        self._settings, self._seen = settings, seen
        self._scratch = np.zeros(width, np.float32), np.zeros(width, np.int64)
        self.said(choice.said)
        self._states: list[Tensor] = []  # of the generator, before each draw

    @property
    def most(self) -> int:
        """Tokens to choose at once, at most."""
        return max(1, MOST_NUMBERS // self._vocab) if self._sampled else MOST_NUMBERS

    def said(self, ids: Tensor) -> None:
        """Take note of tokens of the text that are not chosen here."""
        if len(self._seen):
            self._seen[ids[ids < self._vocab].numpy()] = True

    def arrays(self, tokens: int) -> tuple[Any, ...]:
        """What the kernel needs to choose so many tokens."""
        numbers = torch.empty(tokens if self._sampled else 0, self._vocab, dtype=torch.float32)
        self._states = []
        for row in numbers:
            self._states.append(torch.get_rng_state())
            row.exponential_()  # what `torch.multinomial` does for one text
        return self._settings, numbers.numpy(), self._seen, *self._scratch

    def chosen(self, tokens: int) -> None:
        """Give back the draws behind the first so many, as if they had not been made."""
        if tokens < len(self._states):
            torch.set_rng_state(self._states[tokens])
        self._states = []
