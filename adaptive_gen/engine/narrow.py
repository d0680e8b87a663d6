"""Weights in half precision, as the checkpoint has them, for the back end `compiled`.

Half of what float32 takes is read for each token, and nothing is lost, for every bfloat16 and every
float16 is a float32 too. To keep it so, nothing is folded into the weights: what a norm multiplies
its result by, and a factor of the output, stay beside them.

Axes: `in`, `out`, `n` (rows).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What kernels take the bits of each for; see `kernels.half`.
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def bits(weights: Tensor) -> Tensor:
    """Weights as kernels take them: half precision as its bits, and all else as it is."""
    return weights.view(BITS[weights.dtype]) if weights.dtype in BITS else weights


@dataclass(frozen=True)
class NarrowMatrix:
    """An [in, out] matrix between a gain and a scale; the weights are those of modules."""

    rows: Callable[[], Tensor]  # lays the weights out, [out, in]; not kept twice
    gain: Tensor | None  # what is multiplied by the matrix is first multiplied by this, [in]
    scale: Tensor  # of each output channel, [out] float32

    def float(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The columns `start`..`stop` of the [in, out] matrix that this stands for, float32."""
        columns = (self.rows()[start:stop].float() * self.scale[start:stop, None]).t()
        return columns if self.gain is None else columns * self.gain[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows [n, in] -> [n, out], in float32 and slowly: what kernels are compared with."""
        return x @ self.float().to(x.dtype)
