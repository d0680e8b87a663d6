"""Every tuple of per-exit thresholds at once, from one joint histogram of the traces.

With G thresholds per exit and K exits there are G^K settings, too many to follow one by one. But a
token matters only through how many of each exit's thresholds it reaches: count tokens by these K
numbers once, and cumulative sums along the axes give, for every tuple, who leaves where. Exits that
did not fire are prefix sums, the one that fired is the rest.

What needs the order of the tokens is left out: full queues that force a deep pass, and waiting rows
that are never caught up because the text ends; and for how many deep passes find rows waiting,
tokens are taken to follow each other at random. The few settings worth it are simulated afterwards.

Axes: `tokens`; `exits` K below full depth; `thresholds` G, ascending, the last above every chance.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tables:
    """Sums over the tokens for every tuple of thresholds, each [G] * K."""

    layers: NDArray[np.float64]
    blocks: NDArray[np.float64]  # layer calls that find rows waiting, and so do segment calls:
    fills: NDArray[np.float64]
    readouts: NDArray[np.float64]
    checks: NDArray[np.float64]  # those of them at exits
    agreed: NDArray[np.float64]
    skipped: NDArray[np.float64]  # layers that leaving tokens did not run when they left


def tables(
    exit_layers: tuple[int, ...], chance: NDArray, agrees: NDArray, thresholds: NDArray
) -> Tables:
    """Evaluate all tuples.

    Args:
        exit_layers: ascending; the last is full depth.
        chance: [tokens, exits] what is compared with the thresholds.
        agrees: [tokens, exits], the exit's choice is full depth's.
        thresholds: [G] ascending; one that no chance reaches means the exit is not asked.
    """
    tokens, exits = chance.shape
    grid = len(thresholds)
    shape = (grid,) * exits
    # How many thresholds each token reaches: it leaves at index g where that is more than g.
    reached = np.searchsorted(thresholds, chance, side="right")
    asked = thresholds <= 1
    here = np.full(shape, float(tokens))  # tokens that arrive at the exit
    layers, blocks, fills, checks, agreed, skipped = (np.zeros(shape) for _ in range(6))
    for k in range(exits):
        axes = tuple(reached[:, : k + 1].T)
        cells = np.asarray(np.ravel_multi_index(axes, (grid + 1,) * (k + 1)))
        left, right = (
            _spread(_leaving(cells, weights, grid, k + 1), exits)
            for weights in (None, agrees[:, k])
        )
        asks = asked.reshape([-1 if axis == k else 1 for axis in range(exits)])
        checks += here * asks
        here = here - left
        met = here * (1 - here / tokens)  # go on while the token before has left
        blocks += met * (exit_layers[k + 1] - exit_layers[k])
        fills += met * asks
        layers += left * exit_layers[k]
        skipped += left * (exit_layers[-1] - exit_layers[k])
        agreed += right
    layers += here * exit_layers[-1]
    return Tables(layers, blocks, fills, checks + here, checks, agreed + here, skipped)


def _leaving(cells: NDArray, weights: NDArray | None, grid: int, axes: int) -> NDArray:
    """Tokens that leave at the last of `axes` exits, for every tuple up to it, [G] * axes."""
    counts = np.bincount(cells, weights, minlength=(grid + 1) ** axes)
    counts = counts.reshape((grid + 1,) * axes)
    for axis in range(axes):
        total = counts.sum(axis=axis, keepdims=True)
        below = counts.cumsum(axis=axis).take(range(grid), axis=axis)
        counts = below if axis < axes - 1 else total - below
    return counts


def _spread(table: NDArray, exits: int) -> NDArray:
    """The same for every threshold of the later exits, as a view."""
    return table.reshape(table.shape + (1,) * (exits - table.ndim))
