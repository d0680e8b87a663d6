"""Traces: what every exit would have said about every token of full-depth texts.

Axes: `texts`, `time` (new tokens, padded to the longest text), `exits` (below full depth).
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_gen.errors import CalibrationError
from adaptive_gen.files import whole


@dataclass(frozen=True)
class Trace:
    """Raw confidences and agreement per token and exit, recorded once at full depth."""

    exit_layers: tuple[int, ...]  # ascending; the last is full depth
    lengths: NDArray[np.int64]  # [texts], new tokens of each text
    confidence: Mapping[str, NDArray[np.float64]]  # measure -> [texts, time, exits] in [0, 1]
    agrees: NDArray[np.bool_]  # [texts, time, exits]: the exit's choice is full depth's
    texts: tuple[NDArray[np.int64], ...] = ()  # token ids of each, prompt and new

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
        return self.take(slice(None, texts)), self.take(slice(texts, None))

    def take(self, texts: slice) -> "Trace":
        """Some of the texts."""
        return Trace(
            self.exit_layers,
            self.lengths[texts],
            {name: values[texts] for name, values in self.confidence.items()},
            self.agrees[texts],
            self.texts[texts],
        )


def padded(texts: Sequence[NDArray], exits: int) -> NDArray:
    """Stack arrays [time_i, exits] of several texts into [texts, time, exits] with zeros."""
    out = np.zeros((len(texts), max(map(len, texts)), exits), dtype=texts[0].dtype)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = text
    return out


def join(traces: Sequence[Trace]) -> Trace:
    """The texts of several traces of the same exits, in order."""
    exit_layers = traces[0].exit_layers
    exits = len(exit_layers) - 1

    def rows(arrays: Sequence[NDArray]) -> NDArray:
        return padded([row for array in arrays for row in array], exits)

    return Trace(
        exit_layers,
        np.concatenate([t.lengths for t in traces]),
        {name: rows([t.confidence[name] for t in traces]) for name in traces[0].confidence},
        rows([t.agrees for t in traces]),
        tuple(text for t in traces for text in t.texts),
    )


def save(trace: Trace, path: Path) -> None:
    """Write one .npz, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    arrays: dict[str, Any] = {
        "exit_layers": np.array(trace.exit_layers),
        "lengths": trace.lengths,
        "agrees": trace.agrees,
        "text_lengths": np.array([len(text) for text in trace.texts]),
        "ids": np.concatenate([*trace.texts, np.zeros(0, dtype=np.int64)]),
        **{f"confidence.{name}": values for name, values in trace.confidence.items()},
    }
    with whole(path, "--work", "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(path: Path) -> Trace:
    """Read one .npz.

    Raises:
        CalibrationError: it is missing or broken.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        ends = np.cumsum(arrays["text_lengths"])[:-1]
        return Trace(
            exit_layers=tuple(map(int, arrays["exit_layers"])),
            lengths=arrays["lengths"],
            confidence={
                name.removeprefix("confidence."): values
                for name, values in arrays.items()
                if name.startswith("confidence.")
            },
            agrees=arrays["agrees"],
            texts=tuple(np.split(arrays["ids"], ends)) if len(arrays["text_lengths"]) else (),
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(
            f"{path} is no readable trace ({type(error).__name__}). Run `calibrate collect` again; "
            "it redoes what is missing."
        ) from None
