"""The random numbers that tokens are drawn with.

`torch.multinomial` divides every token's chance by a number of its own, exponentially distributed,
and takes the token with the largest quotient. Here such numbers belong to a text's position: a
token's do not hang on how deep it went, in which order texts left, or how often somebody drew. So
full depth draws with the numbers of the draft that it judges, and what it would have drawn without
drafts comes out (the coupling of Daliri et al. 2024, arXiv 2408.07978).

Axes: `positions` among the new tokens, `rows` of the batch, `vocab`.
"""

from typing import Any

import torch
from torch import Tensor

from .errors import ModelError


class Draws:
    """The numbers of a batch's positions, as transformers' sampling loop draws them one by one."""

    def __init__(self, rows: int, device: torch.device):
        """Draw nothing yet; `rows` texts that end count as well, for transformers draws on."""
        self._rows, self._device = rows, device
        self._first = 0  # the position of the first numbers below
        self._numbers: list[Tensor] = []  # [rows, vocab] of each position
        self._states: list[Any] = []  # of the generator before each

    def at(self, position: int, vocab: int) -> Tensor:
        """The numbers of a position, [rows, vocab] float32."""
        return self.between(position, position + 1, vocab)[0]

    def between(self, start: int, stop: int, vocab: int) -> list[Tensor]:
        """The numbers of positions, [rows, vocab] float32 each."""
        while self._first + len(self._numbers) < stop:
            self._states.append(self._state())
            numbers = torch.empty(self._rows, vocab, dtype=torch.float32, device=self._device)
            self._numbers.append(numbers.exponential_())
        return self._numbers[start - self._first : stop - self._first]

    def forget(self, position: int) -> None:
        """Let go of all numbers before a position: nobody will ask for them again."""
        gone = max(0, min(position - self._first, len(self._numbers)))
        del self._numbers[:gone], self._states[:gone]
        self._first += gone

    def end(self, position: int) -> None:
        """Give back the numbers from a position on, as if they had not been drawn."""
        kept = max(0, position - self._first)
        if kept < len(self._states):
            self._state(self._states[kept])
        del self._numbers[kept:], self._states[kept:]

    def _state(self, new: Tensor | None = None) -> Tensor | None:
        """The state of the device's generator, or set it."""
        kind = self._device.type
        module: Any = torch if kind == "cpu" else torch.get_device_module(self._device)
        where = () if kind in ("cpu", "mps") else (self._device,)
        return module.get_rng_state(*where) if new is None else module.set_rng_state(new, *where)


def drawn(scores: Tensor, numbers: Tensor) -> Tensor:
    """The tokens that scores [rows, vocab] lead to with numbers [rows, vocab]; [rows].

    Raises:
        ModelError: nothing can be drawn from scores that are no numbers.
    """
    best, tokens = (scores.softmax(-1) / numbers).max(-1)
    if bool(best.isnan().any()):
        raise no_numbers()
    return tokens


def no_numbers() -> ModelError:
    """What to say of logits from which nothing can be drawn."""
    return ModelError(
        "the model's logits are no numbers, or none is left by the logits processors, so that "
        "nothing can be drawn; look for infinite or missing weights."
    )
