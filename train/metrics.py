"""Scores of written answers: exact match, F1, ROUGE-L, and how sure a mean of them is."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adaptive_gen.answers import normalised


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of those accepted, normalised; else 0."""
    return float(normalised(answer) in {normalised(one) for one in accepted})


def f1(answer: str, accepted: Sequence[str]) -> float:
    """Largest harmonic mean of word precision and recall over the accepted answers, in [0, 1]."""
    return max((_overlap(normalised(answer), normalised(one)) for one in accepted), default=0.0)


def _overlap(answer: str, reference: str) -> float:
    ours, theirs = Counter(answer.split()), Counter(reference.split())
    return _harmonic(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values()))


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in [0, 1] (Lin 2004).

    Words are runs of letters and digits, lower-cased; no stemming.
    """
    ours, theirs = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    longest = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for i, other in enumerate(theirs, start=1):
            here = longest[i]
            longest[i] = before + 1 if word == other else max(here, longest[i - 1])
            before = here
    return _harmonic(longest[-1], len(ours), len(theirs))


def _harmonic(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def interval(
    values: Sequence[float],
    statistic: Callable[..., float] = np.mean,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values."""
    from scipy.stats import bootstrap

    if len(set(values)) < 2:  # nothing to resample
        only = float(statistic(values))
        return only, only
    found = bootstrap(
        (np.asarray(values),),
        statistic,
        n_resamples=2000,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def resampled_sums(rows: NDArray, draws: int = 1000, seed: int = 0) -> Iterator[NDArray]:
    """Column sums of bootstrap samples of rows [n, columns]: `draws` vectors [columns]."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        counts = np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows))
        yield counts @ rows
