"""Segments: the runs of layers between neighbouring exits, the unit the scheduler works with.

A back end is another class with these two methods over the same weights and the same cache; it must
give what `ModuleSegment` gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..decoder import Decoder
from .cache import KVCache, Span


class Segment(Protocol):
    """Layers `start`..`stop` (half open) of a model."""

    @property
    def start(self) -> int:
        """Layers that have run before it."""
        ...

    @property
    def stop(self) -> int:
        """Layers that have run after it: the exit layer at its end."""
        ...

    def run(
        self, hidden: Tensor, cache: KVCache, span: Span | None = None, newest_only: bool = False
    ) -> Tensor:
        """Run the layers on a block [rows, time, hidden].

        Without a `span` the block is the next tokens of every row of `cache`. With `newest_only`
        what comes out for other tokens than each row's last may be anything.
        """
        ...

    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """Give the layers the block's keys and values only (KV propagation)."""
        ...


@dataclass(frozen=True)
class ModuleSegment:
    """The back end `module`: calls the model's own decoder layers."""

    decoder: Decoder
    start: int
    stop: int

    def run(
        self, hidden: Tensor, cache: KVCache, span: Span | None = None, newest_only: bool = False
    ) -> Tensor:
        """Run the layers on a block."""
        return self.decoder.run(hidden, self.start, self.stop, cache, span)

    def store(self, hidden: Tensor, cache: KVCache, span: Span | None = None) -> None:
        """Store the block's keys and values."""
        self.decoder.store(hidden, self.start, self.stop, cache, span)


def module_segments(decoder: Decoder, exit_layers: Sequence[int]) -> list[Segment]:
    """One `ModuleSegment` before each of the ascending `exit_layers`."""
    starts = [0, *exit_layers[:-1]]
    return [
        ModuleSegment(decoder, start, stop) for start, stop in zip(starts, exit_layers, strict=True)
    ]
