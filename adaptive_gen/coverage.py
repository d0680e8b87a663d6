"""Whether one call of `generate` does what an operating point was certified for.

A certificate is of one way to decode. A call that asks for another works all the same; it is only
not promised anything, and the user is told why.
"""

from collections.abc import Mapping
from typing import Any

from .calibration import Calibration, OperatingPoint
from .certificate import Certificate


def coverage(
    calibration: Calibration | None,
    point: OperatingPoint | None,
    given: Mapping[str, Any],
    layers: tuple[int, ...],
) -> tuple[Certificate | None, tuple[str, ...]]:
    """The certificate that our own keywords leave standing, or what they change.

    Args:
        calibration: the model's.
        point: the operating point in force; None where the caller decides when to exit.
        given: our keywords of the call; None where one was not said.
        layers: exits that are checked, full depth last.

    Returns:
        The certificate or None, and the keywords that withdraw it; both are empty where nothing
        was certified, or another point was asked for.
    """
    if calibration is None or not calibration.points:  # one that is still being made has none
        return None, ()
    own = point or _same(calibration, given["threshold"], layers) or calibration.point
    if own.certificate is None:
        return None, ()
    if given["lossless"]:  # the text is full depth's: nothing is lost, however it is drafted
        return own.certificate, ()
    usual = {
        "threshold": own.threshold,
        "policy": None,
        "exit_layers": list(own.exit_layers),
        "confidence": calibration.confidence,
        "kv": calibration.kv,
        "prefill": "full",
        "audit_floor": None,
    }
    seen = {**given, "exit_layers": None if given["exit_layers"] is None else list(layers)}
    if own.threshold == given["threshold"]:
        # Exits left out are then the model's, which need not be the point's.
        seen["exit_layers"] = list(layers)
    changed = [name for name, value in usual.items() if seen[name] not in (None, value)]
    return (None, tuple(changed)) if changed else (own.certificate, ())


def otherwise(
    certificate: Certificate, config: Any, rows: int, new_tokens: int, processors: Any
) -> tuple[str, ...]:
    """What of transformers' side of a call a certificate does not cover.

    Args:
        certificate: of the operating point in force.
        config: the prepared generation config.
        rows: texts generated together.
        new_tokens: the most that may come.
        processors: transformers' list of logits processors, as prepared.
    """
    found = []
    if config.do_sample:
        found.append("sampling")
    if rows > 1:
        found.append(f"{rows} texts at once")
    if new_tokens > certificate.max_new_tokens:
        found.append(f"more than {certificate.max_new_tokens} new tokens")
    if not config.do_sample:  # of sampling's own there is enough said
        found += [type(processor).__name__ for processor in processors]
    return tuple(found)


def withdrawn(changes: tuple[str, ...]) -> str:
    """What the user is told, once."""
    return (
        f"this call is not covered by the calibration's certificate, which is for other settings "
        f"than its {', '.join(changes)}: nothing is promised of its text. Leave that out, or have "
        "it certified with `calibrate run --max-risk`."
    )


def _same(
    calibration: Calibration, threshold: Any, layers: tuple[int, ...]
) -> OperatingPoint | None:
    """The certified point that the caller spelt out, if it is one."""
    for point in calibration.points:
        if point.certificate and point.threshold == threshold and point.exit_layers == layers:
            return point
    return None
