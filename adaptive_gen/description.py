"""What `adaptive-gen info` tells of a wrapped model."""

from typing import Any

from .calibration import Calibration, OperatingPoint
from .settings import state


def describe(model: Any) -> dict[str, Any]:
    """Layers, parameters, exits, calibration and operating points of a wrapped model, as JSON."""
    wrapped = state(model)
    calibration = wrapped.calibration
    head = model.get_output_embeddings().weight.numel()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in wrapped.decoder.layers]
    points = calibration.points if calibration is not None else ()
    return {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "n_layers": wrapped.n_layers,
        "exit_layers": list(wrapped.exit_layers),
        # In weights read, which is what decoding one token at a time is bound by.
        "readout_cost_in_layers": round(head * len(layers) / sum(layers), 2),
        "confidence": calibration.confidence if calibration is not None else None,
        "kv": calibration.kv if calibration is not None else None,
        "points": [
            {
                **_point(point),
                "default": point is points[calibration.default],
                "certificate": _certificate(point, calibration),
            }
            for point in points
            if calibration is not None
        ],
    }


def _certificate(point: OperatingPoint, calibration: Calibration) -> dict[str, Any] | None:
    """What is promised of a point on this model, in figures and in words."""
    found = point.certificate
    if found is None:
        return None
    return {
        "loss": found.loss,
        "max_risk": found.max_risk,
        "level": found.level,
        "statement": found.statement(calibration.kv, calibration.fingerprint),
    }


def _point(point: OperatingPoint) -> dict[str, Any]:
    return {
        "threshold": point.threshold,
        "exit_layers": list(point.exit_layers),
        "mean_depth": point.mean_depth,
        "layer_speedup": point.layer_speedup,
        "wall_speedup": point.wall_speedup,
        "agreement": point.agreement,
    }
