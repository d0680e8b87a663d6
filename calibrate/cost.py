"""The cost model: seconds as a sum over what the engine does.

    seconds = texts * a + tokens * b + layer calls * c + extra rows * d + readouts * e + ...

Layers of one model cost alike, but for what a cache still holds of them: a layer that runs again
after three others is quicker than one that runs again after all of them, so there is a price for
what ran in between besides one for the call. Rows that ride along in a block cost a fraction of a
call: the first of them more than the eighth, while products of few rows leave the machine idle, and
all alike once they do not; so there is a price for each doubling of the rows besides one for each
row. A readout on the way costs more than the one at full depth: its confidence is computed, the
policy is asked, and the layers run in two pieces. The constants are fitted to a few seconds of real
decoding on this device (profile.py).
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from .schedule import Work

TERMS = tuple(field.name for field in fields(Work))


@dataclass(frozen=True)
class Cost:
    """Seconds per unit of each term of `Work`."""

    seconds: dict[str, float]
    residual: float  # largest relative error on the runs it was fitted to

    def time(self, work: Work) -> NDArray[np.float64]:
        """Predicted seconds, [settings]."""
        return work.table @ np.array([self.seconds[term] for term in TERMS])


def fit(works: list[Work], decode_s: NDArray, prefill_s: float) -> Cost:
    """Fit the constants, none below zero, to relative errors.

    Args:
        works: what each profiled run did, one setting each.
        decode_s: [runs] seconds of each, prefill left out.
        prefill_s: seconds of a `generate` call besides decoding.
    """
    # What a text costs on the way, besides its prompt's pass, is found from runs of two lengths.
    table = np.concatenate([work.table for work in works]).astype(float)  # [runs, terms]
    solution, _ = nnls(table / decode_s[:, None], np.ones(len(works)))
    residual = float(np.abs(table @ solution / decode_s - 1).max())
    solution[TERMS.index("texts")] += prefill_s
    return Cost(dict(zip(TERMS, map(float, solution), strict=True)), residual)
