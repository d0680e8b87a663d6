"""How many tokens a text should draft before a deep pass judges them.

The functions are plain enough to be compiled, and `kernels.lossless` and `kernels.batch_lossless`
do: in both worlds they are the same.
"""

from typing import Any

import numpy as np

# What has been seen of drafts: how many stood and were judged of late, and in all.
RECENTLY_STOOD, RECENTLY_JUDGED, STOOD, JUDGED = range(4)


def observe(record: Any, stood: int, judged: int) -> None:
    """Take note, in `record` [4], of a deep pass that judged drafts."""
    if not judged:
        return
    # Older evidence fades: the text moves on to easier or harder passages.
    record[RECENTLY_STOOD] = 0.9 * record[RECENTLY_STOOD] + stood
    record[RECENTLY_JUDGED] = 0.9 * record[RECENTLY_JUDGED] + judged
    record[STOOD] += stood
    record[JUDGED] += judged


def best_length(record: Any, shallow: float, most: int) -> int:
    """How many drafts to make before a deep pass.

    With a chance `a` that a draft stands, k of them and a deep pass yield (1 - a^(k+1)) / (1 - a)
    tokens and cost k * `shallow` + 1 deep passes' time.

    Args:
        record: see `observe`.
        shallow: cost of a draft as a share of a deep pass.
        most: largest number of drafts.
    """
    chance = min(record[RECENTLY_STOOD] / record[RECENTLY_JUDGED], 0.999)
    best, most_tokens, power = 1, 0.0, chance
    for k in range(1, most + 1):
        power *= chance
        tokens = (1 - power) / (1 - chance) / (k * shallow + 1)
        if tokens > most_tokens:
            best, most_tokens = k, tokens
    return best


class DraftLength:
    """How many drafts a text makes before a deep pass, from how many have stood lately."""

    def __init__(self, shallow: float, most: int):
        """Start hopeful.

        Args:
            shallow: cost of a draft as a share of a deep pass, in (0, 1).
            most: largest number of drafts.
        """
        self.shallow, self.most = shallow, most
        self.record = np.array([4.0, 5.0, 0.0, 0.0])

    @property
    def length(self) -> int:
        """The number of drafts to make next."""
        return best_length(self.record, self.shallow, self.most)

    @property
    def accepted(self) -> int:
        """Drafts that stood."""
        return int(self.record[STOOD])

    @property
    def drafted(self) -> int:
        """Drafts that were judged."""
        return int(self.record[JUDGED])

    def observe(self, stood: int, judged: int) -> None:
        """Take note of a deep pass that judged drafts."""
        observe(self.record, stood, judged)
