"""Traces: what every exit would have said about every token of full-depth texts.

Axes: `texts`, `time` (new tokens, padded to the longest text), `exits` (below full depth).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trace:
    """Raw confidences and agreement per token and exit, recorded once at full depth."""

    exit_layers: tuple[int, ...]  # ascending; the last is full depth
    lengths: NDArray[np.int64]  # [texts], new tokens of each text
    confidence: Mapping[str, NDArray[np.float64]]  # measure -> [texts, time, exits] in [0, 1]
    agrees: NDArray[np.bool_]  # [texts, time, exits]: the exit's choice is full depth's

    @property
    def n_layers(self) -> int:
        """Layers of full depth."""
        return self.exit_layers[-1]

    @property
    def tokens(self) -> int:
        """New tokens of all texts."""
        return int(self.lengths.sum())

    @property
    def real(self) -> NDArray[np.bool_]:
        """[texts, time]: a token, not padding."""
        return np.arange(self.agrees.shape[1]) < self.lengths[:, None]

    def at(self, measure: str, exit_index: int) -> tuple[NDArray, NDArray]:
        """Raw confidence and agreement [tokens] of one exit, padding removed."""
        real = self.real
        return self.confidence[measure][real, exit_index], self.agrees[real, exit_index]

    def split(self, texts: int) -> tuple["Trace", "Trace"]:
        """The first `texts` texts, and the others."""
        parts = (slice(None, texts), slice(texts, None))
        first, second = (
            Trace(
                self.exit_layers,
                self.lengths[part],
                {name: values[part] for name, values in self.confidence.items()},
                self.agrees[part],
            )
            for part in parts
        )
        return first, second


def padded(texts: list[NDArray], exits: int) -> NDArray:
    """Stack arrays [time_i, exits] of several texts into [texts, time, exits] with zeros."""
    out = np.zeros((len(texts), max(map(len, texts)), exits), dtype=texts[0].dtype)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = text
    return out
