"""`calibrate report`: a calibration as one page that needs no network and no knowledge of it."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from adaptive_gen import calibration as artefact
from adaptive_gen.calibration import Calibration, OperatingPoint
from adaptive_gen.errors import CalibrationError
from adaptive_gen.files import whole
from adaptive_gen.style import STYLE

from . import figures
from .tables import EVIDENCE, threshold

PAGE = "calibration.html"


def write_page(directory: Path, out: Path | None) -> Path:
    """Write the page of the calibration in `directory`; return where.

    Raises:
        CalibrationError: there is no calibration, or not the evidence that goes with it.
        OutputError: the page cannot be written.
    """
    found = artefact.load(directory)
    path = directory / EVIDENCE
    try:
        evidence = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"cannot read {path} ({type(error).__name__}), which the report is made from. "
            "Run `calibrate run` again; it writes it beside calibration.json."
        ) from None
    page = directory / PAGE if out is None else out
    with whole(page, "--out", "wb") as file:
        file.write(render(found, evidence).encode())
    return page


def render(found: Calibration, evidence: Mapping[str, Any]) -> str:
    """The page."""
    sections = [
        _head(found),
        _certificate(found),
        _section(
            "Speed against faithfulness",
            "Every dot is a setting of the dial. Further right is faster; higher up, more tokens "
            "are the ones the full model would have chosen. Lines through dots are 95 % intervals.",
            figures.front(found, evidence),
        ),
        _pair(
            "How deep the tokens ran",
            "With the chosen setting, on prompts that the calibration had not seen.",
            figures.depths(found, evidence),
            "Is the confidence to be believed?",
            "Tokens grouped by the promised chance that the full model would agree. On the "
            "diagonal, promises are kept exactly.",
            figures.reliability(evidence),
        ),
        _pair(
            "How long texts stay the same",
            "Share of the texts that have not yet differed from the full model's. Replay predicts "
            "this without writing a text; decoding is what really happened.",
            figures.survival(evidence),
            "Predicted and measured speed",
            "The cost model's prediction of each setting against the clock.",
            figures.predicted(found),
        ),
        _path(found),
        _points(found),
        _worst(evidence),
        _recipe(found),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Calibration report</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _head(found: Calibration) -> str:
    point, n = found.point, found.n_layers
    interval = point.wall_speedup_interval
    spread = "" if interval is None else f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
    exact = point.quality.get("exact")
    same = ("-", "") if exact is None else (f"{1 - exact[0]:.0%}", "of the texts, word for word")
    numbers = [
        (f"{point.speedup:.2f}x", "as fast as the full model", spread),
        (f"{point.agreement:.1%}", "of tokens agree", "with the full model's own choice"),
        (f"{point.mean_depth:.1f} of {n}", "layers per token", "on average"),
        (same[0], "stay the same", same[1]),
    ]
    cards = "".join(
        f"<div class=card><b>{escape(big)}</b><span>{escape(what)}</span>"
        f"<small>{escape(more)}</small></div>"
        for big, what, more in numbers
    )
    return (
        "<h1>How much faster, and how faithful?</h1>"
        f"<p class=lead>This language model has {n} layers. Many tokens are clear long before the "
        "last of them, and can be written without the rest. Calibration has found when that is "
        "safe enough, and measured what it gains and what it changes.</p>"
        f"<div class=cards>{cards}</div>"
    )


def _certificate(found: Calibration) -> str:
    certificate = found.point.certificate
    if certificate is None:
        return (
            "<p class=note>These are measurements, not promises. "
            "<code>calibrate run --max-risk 0.1</code> certifies a limit.</p>"
        )
    words = certificate.statement(found.kv, found.fingerprint)
    really = (
        f" Really decoding those prompts lost {certificate.decoded_risk:.4f}."
        if certificate.decoded_risk is not None
        else ""
    )
    return f"<p class='note good'>{escape(words)}{really}</p>"


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _pair(*parts: str) -> str:
    return f"<div class=pair>{_section(*parts[:3])}{_section(*parts[3:])}</div>"


def _path(found: Calibration) -> str:
    certificate = found.point.certificate
    if certificate is None:
        return ""
    return _section(
        "How the certificate was reached",
        "Settings were put in order on other prompts, careful ones first, and then tested one by "
        "one. The first that could not be certified ended the test; all before it hold.",
        figures.path(certificate),
    )


def _points(found: Calibration) -> str:
    rows = "".join(_point(p, p == found.point) for p in found.points)
    head = "".join(
        f"<th>{name}</th>"
        for name in ("threshold", "exits", "layers", "predicted", "measured", "agreement", "same")
    )
    return _section(
        "All measured settings",
        f"Confidence measure {found.confidence}, kv {found.kv}. The marked row is the default.",
        f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>",
    )


def _point(point: OperatingPoint, chosen: bool) -> str:
    exact = point.quality.get("exact")
    predicted = point.predicted_speedup
    cells = (
        threshold(point),
        ", ".join(map(str, point.exit_layers[:-1])),
        f"{point.mean_depth:.2f}",
        "-" if predicted is None else f"{predicted:.2f}x",
        f"{point.speedup:.2f}x",
        f"{point.agreement:.1%}",
        "-" if exact is None else f"{1 - exact[0]:.0%}",
    )
    kind = " class=chosen" if chosen else ""
    return f"<tr{kind}>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"


def _worst(evidence: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['prompt'])}</td>"
        f"<td>{escape(row['shared'])}<mark>{escape(row['adaptive'])}</mark></td>"
        f"<td>{escape(row['shared'])}<mark>{escape(row['full_depth'])}</mark></td></tr>"
        for row in evidence["worst"]
    )
    return _section(
        "The texts that changed most",
        "Ten prompts, worst first. Marked is what follows after the first token that differs.",
        "<div class=wide><table class=texts><tr><th>prompt</th><th>adaptive depth</th>"
        f"<th>full model</th></tr>{rows}</table></div>",
    )


def _recipe(found: Calibration) -> str:
    recipe = {k: v for k, v in found.recipe.items() if k not in ("quality", "cost")}
    content = json.dumps({**recipe, "fingerprint": dict(found.fingerprint)}, indent=1)
    return f"<details><summary>How this was made</summary><pre>{escape(content)}</pre></details>"
