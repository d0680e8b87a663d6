"""Adaptive-depth generation: few layers for easy tokens, many for hard ones.

model, tokenizer = adaptive_gen.load()                       # the built-in model
model = adaptive_gen.wrap(hf_model, exit_layers=[4, 8, 12])  # or any loaded causal LM
model.generate(**inputs, adaptive=True, threshold=0.9)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Calibration, OperatingPoint
    from .decoding import AdaptiveOutput, Report
    from .errors import AdaptiveGenError
    from .exporting import export
    from .losses import sorted_loss
    from .policy import (
        DecayingThreshold,
        ExitPolicy,
        FixedExit,
        MinimumExit,
        NeverExit,
        ThresholdPolicy,
    )
    from .streaming import Chunk, stream
    from .wrapping import load, wrap

__version__ = "0.1.0"

# Resolved on first use: importing the package, as every command does, must not import torch.
_HOME = {
    "AdaptiveGenError": "errors",
    "AdaptiveOutput": "decoding",
    "Calibration": "calibration",
    "Chunk": "streaming",
    "DecayingThreshold": "policy",
    "ExitPolicy": "policy",
    "FixedExit": "policy",
    "MinimumExit": "policy",
    "NeverExit": "policy",
    "OperatingPoint": "calibration",
    "Report": "decoding",
    "ThresholdPolicy": "policy",
    "export": "exporting",
    "load": "wrapping",
    "sorted_loss": "losses",
    "stream": "streaming",
    "wrap": "wrapping",
}

__all__ = [
    "AdaptiveGenError",
    "AdaptiveOutput",
    "Calibration",
    "Chunk",
    "DecayingThreshold",
    "ExitPolicy",
    "FixedExit",
    "MinimumExit",
    "NeverExit",
    "OperatingPoint",
    "Report",
    "ThresholdPolicy",
    "export",
    "load",
    "sorted_loss",
    "stream",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
