"""Adaptive-depth generation: few layers for easy tokens, many for hard ones.

model, tokenizer = adaptive_gen.load()                       # the built-in model
model = adaptive_gen.wrap(hf_model, exit_layers=[4, 8, 12])  # or any loaded causal LM
model.generate(**inputs, adaptive=True, threshold=0.9)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Calibration, OperatingPoint
    from .errors import AdaptiveGenError
    from .exporting import export
    from .loading import load
    from .losses import sorted_loss
    from .policy import (
        AllOf,
        AnyOf,
        Check,
        DecayingThreshold,
        ExitPolicy,
        FirstAtFullDepth,
        FixedExit,
        MinimumExit,
        NeverExit,
        Patience,
        ThresholdPolicy,
    )
    from .report import AdaptiveOutput, Audit, Report
    from .streaming import Chunk, stream
    from .wrapping import wrap

__version__ = "0.1.0"

# Resolved on first use: importing the package, as every command does, must not import torch.
_HOME = {
    "AdaptiveGenError": "errors",
    "AdaptiveOutput": "report",
    "AllOf": "policy",
    "AnyOf": "policy",
    "Audit": "report",
    "Calibration": "calibration",
    "Check": "policy",
    "Chunk": "streaming",
    "DecayingThreshold": "policy",
    "ExitPolicy": "policy",
    "FirstAtFullDepth": "policy",
    "FixedExit": "policy",
    "MinimumExit": "policy",
    "NeverExit": "policy",
    "OperatingPoint": "calibration",
    "Patience": "policy",
    "Report": "report",
    "ThresholdPolicy": "policy",
    "export": "exporting",
    "load": "loading",
    "sorted_loss": "losses",
    "stream": "streaming",
    "wrap": "wrapping",
}

__all__ = [
    "AdaptiveGenError",
    "AdaptiveOutput",
    "AllOf",
    "AnyOf",
    "Audit",
    "Calibration",
    "Check",
    "Chunk",
    "DecayingThreshold",
    "ExitPolicy",
    "FirstAtFullDepth",
    "FixedExit",
    "MinimumExit",
    "NeverExit",
    "OperatingPoint",
    "Patience",
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
