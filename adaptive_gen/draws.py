"""The random numbers that tokens are drawn with.

`torch.multinomial` divides every token's chance by a number of its own, exponentially distributed,
and takes the token with the largest quotient. Here such numbers belong to a text's position: a
token's do not hang on how deep it went, in which order texts left, or how often somebody drew. So
full depth draws with the numbers of the draft that it judges, and what it would have drawn without
drafts comes out (the coupling of Daliri et al. 2024, arXiv 2408.07978).

Axes: `positions` among the new tokens, `rows` of the batch, `vocab`.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .engine.lasting import makes_lasting
from .errors import ModelError

_DRAWING = threading.Lock()  # one generator serves all threads


class Draws:
    """The numbers of a batch's positions, as transformers' sampling loop draws them one by one."""

    def __init__(self, rows: int, device: torch.device):
        """Draw nothing yet; `rows` texts that end count as well, for transformers draws on."""
        self._rows, self._device = rows, device
        self.exponential: Callable[[Tensor], Tensor] = Tensor.exponential_  # fills numbers
        # Of positions `_first`..`_next`, with room for some more; those before `_needed` may go.
        self._numbers = torch.empty(0, rows, 0)
        self._first = self._needed = self._next = 0
        self._states: dict[int, Any] = {}  # the generator's before each position that is needed
        self._alone = 0  # the position from which on nobody else has drawn in between
        self._then: Tensor | None = None  # the generator's state after the last

    def at(self, position: int, vocab: int) -> Tensor:
        """The numbers of a position, [rows, vocab] float32."""
        return self.between(position, position + 1, vocab)[0]

    def between(self, start: int, stop: int, vocab: int) -> Tensor:
        """The numbers of positions `start`..`stop`, [positions, rows, vocab] float32."""
        if stop - self._first > len(self._numbers):
            self._make_room(stop, vocab)
        while self._next < stop:
            with _DRAWING:
                if not self._untouched():
                    self._alone = self._next
                self._states[self._next] = self._state()
                self.exponential(self._numbers[self._next - self._first])
                self._then = self._state()
            self._next += 1
        return self._numbers[start - self._first : stop - self._first]

    @makes_lasting
    def _make_room(self, stop: int, vocab: int) -> None:
        """Have room for positions up to `stop`: half of it, so that this is rare."""
        kept = self._numbers[self._needed - self._first : self._next - self._first].clone()
        room = 2 * (stop - self._needed)
        if room > len(self._numbers):
            self._numbers = torch.empty(
                room, self._rows, vocab, dtype=torch.float32, device=self._device
            )
        if len(kept):
            self._numbers[: len(kept)] = kept
        self._first = self._needed

    def forget(self, position: int) -> None:
        """Let go of all numbers before a position: nobody will ask for them again."""
        for gone in range(self._needed, min(position, self._next)):
            del self._states[gone]
        self._needed = max(self._needed, min(position, self._next))

    def end(self, position: int) -> None:
        """Give back the numbers from a position on, as if they had not been drawn.

        Where others have drawn since, as another thread's text may have, nothing is given back:
        they would get their own numbers again.
        """
        position = max(position, self._needed)
        with _DRAWING:
            if self._alone <= position < self._next and self._untouched():
                self._state(self._states[position])
        for gone in range(position, self._next):
            del self._states[gone]
        self._next = min(self._next, position)

    def _untouched(self) -> bool:
        """Whether the generator is as the last draw has left it."""
        return self._then is not None and torch.equal(self._then, self._state())

    def _state(self, new: Tensor | None = None) -> Any:
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
        "nothing can be drawn; look for weights that are infinite or nan, or for processors that "
        "forbid every token."
    )
