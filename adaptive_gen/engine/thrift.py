"""Which exits are still worth asking: those whose checks do not pay are asked rarely.

An exit has credit for some checks. Every check costs one, every token that leaves there (a draft
too) pays for some more; without credit the exit is asked for every `EVERY`-th token only, until
enough leave. The credit it starts with, which is also the most it may have, is what `PATIENCE`
such tokens pay for: where so many checks let none leave, the exit loses more than it gains, most
likely, and the text has lost about the time of `PATIENCE` tokens there. All of it follows from the
text and the model's shape, not from a clock.

The functions are plain enough to be compiled, and `kernels.decode` and `kernels.batch` do: in both
worlds they are the same.

Axes: `rows`, `exits`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..confidence import Confidences
from ..decoder import Decoder

# What is known of one exit and text: checks it has credit for, tokens passed by since its last
# check, tokens checked and passed by in all.
CREDIT, WAITED, CHECKED, PASSED = range(4)
PATIENCE = 2.0
EVERY = 16  # a check per so many tokens costs nothing that could be measured
# Layers that pay for one answer of a gate: a norm and a dot product, against seven products.
GATE_LAYERS = 0.05


def due(record: Any, worth: float) -> bool:
    """Whether to check an exit for the token that has come there.

    Args:
        record: what is known of the exit, [4]; changed.
        worth: checks that are paid for by one token which leaves; inf asks always.
    """
    if record[CREDIT] > 0 or record[WAITED] + 1 >= EVERY or worth == math.inf:
        record[WAITED] = 0
        record[CHECKED] += 1
        return True
    record[WAITED] += 1
    record[PASSED] += 1
    return False


def observe(record: Any, worth: float, left: bool) -> None:
    """Take note, in `record`, of what became of a check; see `due`."""
    if worth == math.inf:
        return
    credit = record[CREDIT] - 1 + (worth if left else 0.0)
    record[CREDIT] = min(PATIENCE * worth, max(0.0, credit))


def worth_of(decoder: Decoder, exit_layers: Sequence[int], confidences: Confidences) -> list[float]:
    """Checks that are paid for by one token which leaves at each exit.

    A token that leaves saves about half the weights it skips, for they are read again when it is
    caught up; a check reads about half its head's, for a screened one or one that several rows
    share costs less than all. In their ratio the halves go.

    Args:
        decoder: the model.
        exit_layers: full depth last.
        confidences: what is asked.
    """
    config, *early = decoder.config, *exit_layers[:-1]
    layer = sum(p.numel() for p in decoder.layers[0].parameters())
    check = config.vocab_size * config.hidden_size / max(layer, 1)
    if confidences.reads_hidden:
        check = 2 * GATE_LAYERS
    return [(exit_layers[-1] - exit_layer) / check for exit_layer in early]


class Thrift:
    """What each row's exits have credit for."""

    def __init__(self, exit_layers: Sequence[int], worth: Sequence[float] | None, rows: int):
        """Start with credit.

        Args:
            exit_layers: full depth last.
            worth: of each exit, see `due`; None asks always.
            rows: texts.
        """
        self._exit_layers = exit_layers[:-1]
        self.worth = np.array(worth or [math.inf] * len(self._exit_layers))
        self.records = np.zeros((rows, len(self._exit_layers), 4))
        self.records[..., CREDIT] = PATIENCE * self.worth
        self._gone = 0 * self.counts()

    def due(self, row: int, exit_index: int) -> bool:
        """Whether to check an exit for the row's newest token."""
        return due(self.records[row, exit_index], self.worth[exit_index])

    def observe(self, row: int, exit_index: int, left: bool) -> None:
        """Take note of what became of the check."""
        observe(self.records[row, exit_index], self.worth[exit_index], left)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, which are numbered anew in the order given."""
        everything = self.counts()
        self.records = self.records[list(rows)]
        self._gone += everything - self.counts()

    def counts(self) -> Any:
        """Tokens checked and passed by at each exit, of all rows, [exits, 2]."""
        return self.records[..., [CHECKED, PASSED]].sum(0).astype(int)

    def account(self) -> str:
        """Which exits were passed by, and by how many of the tokens that came there; or nothing."""
        parts = [
            f"exit {exit_layer} was checked for {checked} of {checked + passed} tokens"
            for exit_layer, (checked, passed) in zip(
                self._exit_layers, (self._gone + self.counts()).tolist(), strict=True
            )
            if passed
        ]
        if not parts:
            return ""
        return f"{', '.join(parts)}: too few left to pay for more; exit_layers=[...] checks all"
