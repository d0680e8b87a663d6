"""Weights in 8 bits for the back end `fused`: less to read for each token, at some agreement.

Each output channel has its own scale and no zero point; activations are rounded to bfloat16 for the
product (torch's weight-only kernel) and back. On a CPU a block of two to four tokens costs
little more than one, which float32 products do not give.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .fused import Layer
    from .fused_readout import FusedReadout

_STEPS = 127
# Numbers of a row that torch's kernel reads at a time, also where fewer are left, on any processor.
_TOGETHER = 16
COLUMNS = 4096  # that are rounded at a time, so that a large head is not copied several times
MATRICES = ("qkv", "out", "gate_up", "down")  # of a `fused.Layer`


@dataclass(frozen=True)
class Int8Matrix:
    """An [in, out] matrix as integers and a scale for each output channel."""

    steps: Tensor  # [out, in] int8
    scale: Tensor  # [out] bfloat16

    @classmethod
    def of(cls, matrix: Tensor) -> "Int8Matrix":
        """Round the [in, out] `matrix`; the error of an entry is at most half of its scale."""
        # The scale is rounded first, so that the steps are right for the scale that is used.
        scale = (matrix.abs().amax(0) / _STEPS).clamp_min(1e-12).bfloat16()
        steps = torch.empty(matrix.shape[::-1], dtype=torch.int8)
        parts = (whole.split(COLUMNS) for whole in (steps, matrix.t(), scale))
        for into, columns, by in zip(*parts, strict=True):
            into.copy_((columns / by[:, None]).round_().clamp_(-_STEPS, _STEPS))
        return cls(steps, scale)

    def __call__(self, x: Tensor) -> Tensor:
        """Rows [n, in] -> [n, out] bfloat16."""
        x, steps, missing = x.bfloat16(), self.steps, -self.steps.shape[1] % _TOGETHER
        if missing:  # what it would read is not ours
            x, steps = F.pad(x, (0, missing)), F.pad(steps, (0, missing))
        return torch.ops.aten._weight_int8pack_mm(x, steps, self.scale)

    def float(self) -> Tensor:
        """The [in, out] matrix that this stands for, float32."""
        return (self.steps * self.scale[:, None].float()).t()


def quantised(layer: "Layer") -> "Layer":
    """A layer with all its matrices in 8 bits; biases and gains stay as they are."""
    return replace(layer, **{name: Int8Matrix.of(getattr(layer, name)) for name in MATRICES})


def quantised_readout(readout: "FusedReadout") -> "FusedReadout":
    """The readout with its LM head in 8 bits."""
    assert isinstance(readout.head, Tensor)
    return replace(readout, head=Int8Matrix.of(readout.head))
