"""What `calibrate` prints of a calibration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptive_gen import calibration as artefact
from adaptive_gen import ui

EVIDENCE = "calibration-evidence.json"


def show(found: artefact.Calibration, as_json: bool) -> None:
    """Measures, operating points and certificates; or all of it as one JSON document."""
    if as_json:
        ui.document({"version": artefact.VERSION, **dataclasses.asdict(found)})
        return
    _quality(found.recipe.get("quality", []))
    columns = (
        "threshold",
        "exits",
        "mean_depth",
        "layer_speedup",
        "predicted",
        "wall_speedup",
        "ms/token",
        "agreement",
        "same text",
    )
    rows = [_row(point, chosen=point == found.point) for point in found.points]
    title = f"operating points ({found.confidence}, kv {found.kv}, {found.n_layers} layers)"
    ui.table(title, columns, rows)
    used = "used by default" if found.point.speedup >= 1 else "chosen, but slower than full depth"
    ui.note(f"* {used}; wall_speedup with its 95 % interval over prompts")
    if found.batches:
        rows = [(n, f"{gain:.2f}", not found.unpaid(n)) for n, gain in found.batches.items()]
        ui.table("batches with the default", ("texts at once", "wall_speedup", "exits"), rows)
    for point in found.points:
        if point.certificate is not None:
            words = point.certificate.statement(found.kv, found.fingerprint)
            ui.text(f"\nthreshold {threshold(point)}\n{words}\n")


def threshold(point: artefact.OperatingPoint) -> str:
    """One number, or one per exit."""
    if isinstance(point.threshold, Mapping):
        return " ".join(f"{layer}:{value:.3f}" for layer, value in point.threshold.items())
    return f"{point.threshold:.3f}"


def _row(point: artefact.OperatingPoint, chosen: bool) -> tuple[str, ...]:
    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    interval = point.wall_speedup_interval
    spread = "" if interval is None else " ({:.2f}-{:.2f})".format(*interval)
    exact = point.quality.get("exact")
    return (
        f"{'*' if chosen else ' '} {threshold(point)}",
        ",".join(map(str, point.exit_layers[:-1])),
        f"{point.mean_depth:.2f}",
        times(point.layer_speedup),
        times(point.predicted_speedup),
        times(point.wall_speedup) + spread,
        times(point.latency_ms),
        f"{point.agreement:.1%}",
        "-" if exact is None else f"{1 - exact[0]:.0%}",
    )


def _quality(quality: list[dict[str, Any]]) -> None:
    columns = (
        "confidence",
        "exit",
        "agreement",
        "AUROC",
        "ECE raw",
        "ECE mapped",
        "tokens",
        'promised "0.9"',
        "kept",
    )
    rows = [
        (
            row["confidence"],
            row["exit_layer"],
            f"{row['agreement']:.1%}",
            "-" if row["auroc"] is None else f"{row['auroc']:.3f}",
            f"{row['error_before']:.3f}",
            f"{row['error_after']:.3f}",
            row.get("tokens"),  # files of before have no count
            row.get("near"),
            "-" if row.get("near_agreement") is None else f"{row['near_agreement']:.3f}",
        )
        for row in quality
    ]
    ui.table("confidence measures on prompts not fitted to", columns, rows)
