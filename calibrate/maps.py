"""Confidence maps: raw confidence -> chance of agreement, by isotonic regression.

A map changes no ranking within one exit. It puts all exits and measures on one scale, so that one
threshold means the same everywhere; how well a measure ranks is a separate number, the AUROC.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import rankdata

from adaptive_gen.calibration import ConfidenceMap

from .trace import Trace

MOST_KNOTS = 40
NEAR = (0.875, 0.925)  # mapped chances that stand for "0.9" where a promise is held to what came


@dataclass(frozen=True)
class Quality:
    """How well one measure tells at one exit which tokens will agree, on unseen prompts."""

    confidence: str
    exit_layer: int
    agreement: float
    auroc: float | None  # None where all agree, or none
    error_before: float  # expected calibration error of the raw confidence
    error_after: float  # and of the mapped one
    tokens: int  # judged
    near: int  # of those, how many have a mapped chance in `NEAR`
    near_agreement: float | None  # and how many of these agree; None without any


def fit(raw: NDArray, agrees: NDArray) -> ConfidenceMap:
    """The non-decreasing map that explains best which tokens agreed.

    Each level of the isotonic fit becomes a knot at the mean confidence of its tokens. Its chance
    is smoothed as if one more token had agreed and one more had not: 40 agreements of 40 promise
    0.976, not certainty.

    Args:
        raw: [tokens] confidences in [0, 1].
        agrees: [tokens], whether full depth chose the same token.
    """
    # One level per distinct confidence first: tokens that tie must share a chance.
    knots, inverse, count = np.unique(raw, return_inverse=True, return_counts=True)
    agreed = np.bincount(inverse, weights=agrees.astype(float))
    knots, count, agreed = _pool(knots, count.astype(float), agreed, agreed / count)
    # Smoothing lifts small levels less than large ones and may break the order once more.
    while np.any(np.diff(_smoothed(agreed, count)) <= 0):
        knots, count, agreed = _pool(knots, count, agreed, _smoothed(agreed, count))
    while len(knots) > MOST_KNOTS:
        i = int(np.argmin(np.diff(_smoothed(agreed, count))))
        level = np.arange(len(knots)) - (np.arange(len(knots)) > i)
        knots, count, agreed = _merge(knots, count, agreed, level)
    chance = _smoothed(agreed, count)
    return ConfidenceMap(tuple(map(float, knots)), tuple(map(float, chance)))


def _smoothed(agreed: NDArray, count: NDArray) -> NDArray:
    return (agreed + 1) / (count + 2)


def _pool(
    knots: NDArray, count: NDArray, agreed: NDArray, chance: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """Merge neighbours until `chance`, weighted by `count`, ascends strictly."""
    fitted = isotonic_regression(chance, weights=count).x
    # The same level comes back as the same float up to rounding of the weighted means.
    level = np.concatenate([[0], np.cumsum(np.diff(fitted) > 1e-12)])
    return _merge(knots, count, agreed, level)


def _merge(
    knots: NDArray, count: NDArray, agreed: NDArray, level: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    total = np.bincount(level, weights=count)
    centre = np.bincount(level, weights=count * knots) / total
    return centre, total, np.bincount(level, weights=agreed)


def apply(curve: ConfidenceMap, raw: NDArray) -> NDArray:
    """Chance of agreement of an array of raw confidences; `curve(x)` for every x."""
    return np.interp(raw, curve.raw, curve.chance)


def auroc(score: NDArray, agrees: NDArray) -> float | None:
    """Chance that an agreeing token scores above a disagreeing one; None without either kind."""
    positives = int(agrees.sum())
    negatives = len(agrees) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(score)
    above = ranks[agrees.astype(bool)].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def calibration_error(chance: NDArray, agrees: NDArray, bins: int = 15) -> float:
    """Expected calibration error over bins of equally many tokens."""
    order = np.argsort(chance, kind="stable")
    parts = [p for p in np.array_split(order, bins) if len(p)]
    gaps = [len(p) * abs(chance[p].mean() - agrees[p].mean()) for p in parts]
    return float(sum(gaps) / len(chance))


def qualities(trace: Trace, curves: Mapping[str, Mapping[int, ConfidenceMap]]) -> list[Quality]:
    """Judge every measure and exit on traces that its map was not fitted to."""
    rows = []
    for measure in curves:
        for k, exit_layer in enumerate(trace.exit_layers[:-1]):
            raw, agrees = trace.at(measure, k)
            mapped = apply(curves[measure][exit_layer], raw)
            near = agrees[(NEAR[0] <= mapped) & (mapped < NEAR[1])]
            rows.append(
                Quality(
                    confidence=measure,
                    exit_layer=exit_layer,
                    agreement=float(agrees.mean()),
                    auroc=auroc(raw, agrees),
                    error_before=calibration_error(raw, agrees),
                    error_after=calibration_error(mapped, agrees),
                    tokens=len(raw),
                    near=len(near),
                    near_agreement=float(near.mean()) if len(near) else None,
                )
            )
    return rows
