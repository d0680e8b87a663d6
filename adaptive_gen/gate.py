"""The gate: a confidence read off the hidden state, without the LM head.

One logistic probe per exit layer, fitted by `calibrate run` and stored beside calibration.json as
`gate.safetensors`: `weight.{exit_layer}` [hidden] and `bias.{exit_layer}` [], float32.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import CalibrationError, OptionError
from .files import whole

FILE_NAME = "gate.safetensors"


class Gate:
    """Chance that full depth would choose the exit's token, by exit layer."""

    def __init__(self, weights: Mapping[int, Tensor], biases: Mapping[int, Tensor]):
        """Hold the probes.

        Args:
            weights: exit layer -> [hidden].
            biases: exit layer -> [].

        Raises:
            CalibrationError: they do not belong together.
        """
        widths = {tuple(w.shape) for w in weights.values()}
        scalar = all(b.dim() == 0 for b in biases.values())
        if not weights or set(weights) != set(biases) or not scalar:
            raise CalibrationError(
                "a gate needs a weight and a bias for each of its exit layers. "
                "Run `calibrate run --confidence gate` to make it anew."
            )
        if len(widths) > 1 or any(len(width) != 1 for width in widths):
            raise CalibrationError(
                f"the weights of a gate have the shapes {sorted(widths)}; all must be [hidden]. "
                "Run `calibrate run --confidence gate` to make it anew."
            )
        self.weights = {layer: w.float() for layer, w in weights.items()}
        self.biases = {layer: b.float() for layer, b in biases.items()}

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Those that have a probe, ascending."""
        return tuple(sorted(self.weights))

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states it was fitted to."""
        return next(iter(self.weights.values())).shape[0]

    def __call__(self, hidden: Tensor, exit_layer: int) -> Tensor:
        """Confidence of each row.

        Args:
            hidden: [n, hidden] after `exit_layer` layers and the final norm.
            exit_layer: one of `exit_layers`.

        Returns:
            [n] float32 in [0, 1], higher = surer.

        Raises:
            OptionError: there is no probe for that exit layer.
        """
        if exit_layer not in self.weights:
            raise OptionError(
                f"the gate has no probe for exit layer {exit_layer}; it has "
                f"{', '.join(map(str, self.exit_layers))}. Run `calibrate run --confidence gate` "
                "with that exit."
            )
        weight = self.weights[exit_layer]
        if weight.device != hidden.device:
            weight = self.weights[exit_layer] = weight.to(hidden.device)
            self.biases[exit_layer] = self.biases[exit_layer].to(hidden.device)
        return torch.sigmoid(hidden.float() @ weight + self.biases[exit_layer])

    @property
    def digest(self) -> str:
        """Names the gate by its weights."""
        return hashlib.sha256(self._bytes()).hexdigest()[:16]

    def _bytes(self) -> bytes:
        named = {f"weight.{layer}": w.cpu().contiguous() for layer, w in self.weights.items()}
        named |= {f"bias.{layer}": b.cpu() for layer, b in self.biases.items()}
        return to_bytes(named)

    def save(self, directory: str | os.PathLike[str], option: str = "--out") -> Path:
        """Write `gate.safetensors` into `directory`, whole or not at all.

        Args:
            directory: of the model.
            option: what names it on the command line.

        Raises:
            OutputError: the directory cannot be written.
        """
        path = Path(directory) / FILE_NAME
        with whole(path, option, "wb") as file:
            file.write(self._bytes())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gate":
        """Read a gate from a file or from the model directory that holds it.

        Raises:
            CalibrationError: it is missing or broken.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            tensors = load_file(path)
            parts: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
            for name, tensor in tensors.items():
                part, layer = name.split(".")
                parts[part][int(layer)] = tensor
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CalibrationError(
                f"{path} is no readable gate ({type(error).__name__}). "
                "Run `calibrate run --confidence gate` to make it."
            ) from None
        return cls(parts["weight"], parts["bias"])
