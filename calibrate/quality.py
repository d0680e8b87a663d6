"""How far one text is from another: the losses of whole texts, each in [0, 1], 0 when equal.

Texts are lists of token ids: what a setting wrote, and what full depth wrote after the same prompt.
One loss looks at what the ids spell and so needs the tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_gen.answers import normalised

Ids = Sequence[int]
Loss = Callable[[Ids, Ids], float]
RESAMPLES = 2000


def first_divergence(text: Ids, reference: Ids) -> int:
    """Index of the first token of the reference that the text has not; its length if there is none.

    A text that goes on where the reference has ended cannot be: the end is a token too.
    """
    pairs = zip(text, reference, strict=False)
    shared = min(len(text), len(reference))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shared)


def prefix(text: Ids, reference: Ids) -> float:
    """Share of the reference that lies behind the first other token."""
    return 1 - first_divergence(text, reference) / len(reference)


def exact(text: Ids, reference: Ids) -> float:
    """1 unless the texts are equal."""
    return float(list(text) != list(reference))


def mismatch(text: Ids, reference: Ids) -> float:
    """Share of the positions of the longer text where the two differ."""
    other = sum(a != b for a, b in zip_longest(text, reference))
    return other / max(len(text), len(reference))


def rouge(text: Ids, reference: Ids) -> float:
    """1 - ROUGE-L on token ids: the F1 of the longest common subsequence (Lin 2004)."""
    row = np.zeros(len(reference) + 1, dtype=np.int64)
    wanted = np.asarray(reference)
    for token in text:
        # The longest so far: extend the match before this place, or carry on what was there.
        extended = np.where(wanted == token, row[:-1] + 1, row[1:])
        row[1:] = np.maximum.accumulate(np.maximum(extended, row[1:]))
    return 1 - 2 * float(row[-1]) / (len(text) + len(reference))


OF_IDS: Mapping[str, Loss] = {
    "prefix": prefix,
    "exact": exact,
    "mismatch": mismatch,
    "rouge": rouge,
}


def losses(tokenizer: Any) -> Mapping[str, Loss]:
    """All losses by name; the tokenizer spells the texts out for `em`."""

    def answer(ids: Ids) -> str:
        return normalised(tokenizer.decode(ids, skip_special_tokens=True))

    def em(text: Ids, reference: Ids) -> float:
        """1 unless both are the same answer: normalised as TriviaQA does, the words are equal."""
        return float(answer(text) != answer(reference))

    return {**OF_IDS, "em": em}


def mean_interval(values: NDArray) -> tuple[float, float, float]:
    """Mean over prompts with its 95 % bootstrap interval: (mean, low, high)."""
    draw = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draw].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
