"""A prepared model's matrices once more, laid out as the compiled kernels read them.

Axes: `layers`, `panels`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import FusedModel
from .int8 import MATRICES, Int8Matrix
from .machine_code import kernel
from .matrices import Matrix
from .narrow import NarrowMatrix, bits
from .positions import SLIDING

PANEL, DEPTH = 16, 4  # of `kernels.panels`, which needs numba
_LINE = 64  # bytes that a cache holds together


def missing(dtype: torch.dtype) -> str:
    """What this machine lacks for compiled code that runs a model of a dtype; empty if nothing."""
    if find_spec("numba") is None:
        return "numba is not installed"
    if dtype == torch.float16 and not kernel("processor").CONVERTS_FLOAT16:
        return "this processor cannot convert float16"
    return ""


def unfit(model: FusedModel) -> str:
    """Why a prepared model cannot be run by compiled code; empty if it can."""
    sizes = model.sizes
    widths = sizes.hidden, sizes.heads * sizes.head_dim, sizes.intermediate
    if any(width % DEPTH for width in widths):
        return f"its widths {widths} are no multiples of {DEPTH}"
    if sizes.experts and (padding(sizes.wide) or padding(sizes.hidden)):
        return f"its experts' {sizes.wide} and {sizes.hidden} outputs are no multiples of {PANEL}"
    return ""


@dataclass(frozen=True)
class CompiledModel:
    """A `FusedModel`, and its matrices once more in panels; see `kernels.layers`."""

    fused: FusedModel
    weights: tuple[Any, ...]  # qkv, out, gate_up and down
    scales: tuple[Any, ...]  # of their columns
    biases: tuple[Any, ...]
    gains: tuple[Any, ...]
    floors: Any
    windows: Any
    softcap: Any
    rotations: Any
    router: tuple[Any, Any]
    traits: Any

    @property
    def layers(self) -> tuple[Any, ...]:
        """All of it, as `kernels.layers` takes it."""
        return (
            self.weights,
            self.scales,
            self.biases,
            self.gains,
            self.floors,
            self.windows,
            self.softcap,
            self.rotations,
            self.router,
            self.traits,
        )

    @classmethod
    def of(cls, model: FusedModel) -> "CompiledModel":
        """Copy the layers' weights."""
        positions, layers = model.decoder.positions, model.layers
        like, window, traits = model.qk_floors, positions.window or 0, model.traits
        matrices = [[getattr(layer, name) for name in MATRICES] for layer in layers]
        weights, scales = _in_order(matrices, like)
        router = _router(model, like, weights[0].dtype)
        experts = model.sizes.experts or 1
        weights = *weights[:2], *(_by_expert(of, experts) for of in weights[2:])
        scales = *scales[:2], *(_by_expert(of, experts) for of in scales[2:])

        def of_layers(name: str, axes: int = 1) -> Any:
            return _stacked([getattr(layer, name) for layer in layers], axes, like)

        def not_folded(name: str) -> Any:
            return _stacked([gain_of(getattr(layer, name)) for layer in layers], 1, like)

        before = not_folded("qkv"), not_folded("gate_up")
        after = of_layers("mixed_gain"), of_layers("output_gain")
        return cls(
            model,
            weights,
            scales,
            tuple(of_layers(f"{name}_bias") for name in MATRICES),
            (of_layers("qk_gain", axes=2), *before, *after),
            torch.cat([like.new_tensor([model.sizes.floor]), model.qk_floors]).numpy(),
            np.array([window if kind == SLIDING else 0 for kind in positions.layer_types]),
            like.new_tensor([] if traits.softcap is None else [traits.softcap]).numpy(),
            np.array(model.turns.of_layer),
            router,
            np.array(
                [
                    traits.normed_first,
                    model.sizes.centred,
                    traits.whole_heads,
                    traits.parallel,
                    model.sizes.gated,
                    kernel("activations").ACTIVATIONS.index(traits.activation),
                    traits.top_k,
                    traits.normalised,
                ]
            ),
        )


def _in_order(
    layers: Sequence[Sequence[Matrix]], like: Tensor
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Each layer's matrices in panels, one behind the other, and their scales.

    They lie in memory as they are read: what is asked for ahead of one is the next one's beginning.
    """
    weights: list[Any] = []
    scales = []
    for layer, matrices in enumerate(layers):
        panels, factors = zip(*(in_panels(matrix, like) for matrix in matrices), strict=True)
        weights = weights or _room_for(len(layers), panels)
        for array, of_layer in zip(weights, panels, strict=True):
            array[layer] = of_layer
        scales.append(factors)
    return tuple(weights), tuple(np.stack(of_kind) for of_kind in zip(*scales, strict=True))


def _router(model: FusedModel, like: Tensor, dtype: Any) -> tuple[Any, Any]:
    """What chooses experts, in panels, and its scale; without panels where there are none."""
    routers = [(layer.router,) for layer in model.layers if layer.router is not None]
    if routers:
        (weights,), (scale,) = _in_order(routers, like)
        return weights, scale
    # In the dtype of one that there is, so that the same compiled code takes both.
    layers, kept = len(model.layers), like.numpy().dtype if model.rounded else dtype
    return np.empty((layers, 0, 1, PANEL), kept), np.empty((layers, 0), like.numpy().dtype)


def _by_expert(stacked: Any, experts: int) -> Any:
    """What all experts' columns have in an array [layers, ...], as [layers, experts, ...]."""
    return stacked.reshape(len(stacked), experts, -1, *stacked.shape[2:])


def _room_for(layers: int, panels: Sequence[Any]) -> list[Any]:
    """An empty array for each kind of matrix, [layers, ...]; a layer's lie side by side."""
    ends = np.cumsum([array.size for array in panels])
    room = aligned((layers, int(ends[-1])), panels[0].dtype)
    arrays = np.split(room, ends[:-1], axis=1)
    return [array.reshape(layers, *of.shape) for array, of in zip(arrays, panels, strict=True)]


def aligned(shape: Sequence[int], dtype: Any) -> Any:
    """An empty array that begins with a cache line; numpy puts large ones on large pages."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size].view(dtype).reshape(shape)


def gain_of(matrix: Matrix) -> Tensor | None:
    """What has to be multiplied with all that a matrix is given, if that is not folded in."""
    return matrix.gain if isinstance(matrix, NarrowMatrix) else None


def in_panels(matrix: Matrix, like: Tensor) -> tuple[Any, Any]:
    """An [in, out] matrix as [panels, in, PANEL] with zeros at the end, and its columns' scale.

    What has no scale of its own has one of 1, in the dtype of `like`. Half precision comes as
    `narrow.bits`, and 8 bits as `kernels.dots` or `kernels.pairs` has them, where there is an
    instruction for it.
    """
    if isinstance(matrix, Int8Matrix):
        steps, scale = matrix.steps.t(), matrix.scale.to(like.dtype)
    elif isinstance(matrix, NarrowMatrix):
        steps, scale = bits(matrix.rows()).t(), matrix.scale
    else:
        steps, scale = matrix, like.new_ones(matrix.shape[1])
    inner, outer = steps.shape
    padded = F.pad(steps, (0, padding(outer))).view(inner, -1, PANEL)
    panels = aligned((padded.shape[1], inner, PANEL), padded.numpy().dtype)
    torch.from_numpy(panels).copy_(padded.transpose(0, 1))
    if isinstance(matrix, Int8Matrix):
        panels = _as_bytes(panels)
    return panels, F.pad(scale, (0, padding(outer))).numpy()


def _as_bytes(panels: Any) -> Any:
    """Panels of int8 as this processor multiplies them: as integers, in uint8, where it can."""
    processor = kernel("processor")
    if processor.DOTS:
        # Adding half of what a byte may hold turns its first bit over.
        stored = _interleaved(panels, kernel("dots").QUAD)
        stored ^= kernel("dots").OFFSET
        return stored
    return _interleaved(panels, kernel("pairs").PAIR) if processor.PAIRS else panels


def _interleaved(panels: Any, rows: int) -> Any:
    """Panels in which bytes of as many rows of a column lie together."""
    count, inner, columns = panels.shape
    stored = aligned(panels.shape, np.uint8)
    together = panels.view(np.uint8).reshape(count, inner // rows, rows, columns)
    stored.reshape(count, inner // rows, columns, rows)[:] = together.swapaxes(2, 3)
    return stored


def padding(columns: int) -> int:
    """Columns that are missing to whole panels."""
    return -columns % PANEL


def _stacked(parts: list[Tensor | None], axes: int, like: Tensor) -> Any:
    """The parts in one array; without entries where the model has none."""
    found = [part for part in parts if part is not None]
    stack = torch.stack(found) if found else like.new_empty(len(parts), *[0] * axes)
    return stack.contiguous().numpy()
