"""`calibrate report`: a calibration as one page that needs no network and no knowledge of it."""

import json
from collections.abc import Mapping, Sequence
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
# What a certificate is sure of, before all that it depends on.
PLAINLY = {
    "prefix": "that on average at most {:.0%} of a text come after a first other token",
    "exact": "that at most {:.0%} of texts change",
    "rouge": "that 1 - ROUGE-L is at most {:g} on average",
    "em": "that at most {:.0%} of texts change in more than case, articles and punctuation",
}


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
            figures.reliability(evidence) + _kept(found),
        ),
        _pair(
            "How long texts stay the same",
            "Share of the texts that have not yet differed from the full model's. Replay predicts "
            "this without writing a text; decoding is what really happened.",
            figures.survival(evidence),
            "Predicted and measured speed",
            "Each setting's speed as predicted from seconds of timing, against the clock. On the "
            "dashed line both are equal.",
            figures.predicted(found),
        ),
        _path(found),
        _points(found),
        _batches(found),
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
    same = ("-", "") if exact is None else (f"{1 - exact[0]:.0%}", "word for word, to the end")
    certificate = point.certificate
    sure = (
        ("measured", "not promised", f"on {point.tokens:,} tokens of prompts it had not seen")
        if certificate is None
        else (
            f"{certificate.level:.0%} sure",
            PLAINLY[certificate.loss].format(certificate.max_risk),
            f"certified on {certificate.prompts} prompts; see below",
        )
    )
    numbers = [
        ("How fast?", f"{point.speedup:.2f}x", "as fast as the full model", spread),
        ("How faithful?", f"{point.agreement:.1%}", "of tokens", "are the full model's own choice"),
        ("And whole texts?", same[0], "of texts stay the same", same[1]),
        ("How sure?", *sure),
    ]
    cards = "".join(
        f"<div class=card><i>{escape(question)}&nbsp;</i><b>{escape(big)}</b>"
        f"<span>{escape(what)}</span><small>{escape(more)}</small></div>"
        for question, big, what, more in numbers
    )
    return (
        "<h1>How much faster, and how faithful?</h1>"
        "<p class=lead>A language model writes a text piece by piece (<i>tokens</i>, words or "
        f"parts of words), and computes each in {n} steps (<i>layers</i>). Often it is sure of the "
        "next token long before the last layer. With adaptive depth it then stops early: with the "
        f"setting chosen here after {point.mean_depth:.1f} of {n} layers on average. That saves "
        "time, and now and then a token becomes another one. This page says what was measured of "
        "both.</p>"
        f"<div class=cards>{cards}</div>"
    )


def _certificate(found: Calibration) -> str:
    certificate = found.point.certificate
    if certificate is None:
        return (
            "<p class=note>These are measurements on this device, not promises. "
            "<code>calibrate run --max-risk 0.3</code> certifies a limit instead.</p>"
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
        "one. Being below the limit is not enough: it has to be by more than chance explains. The "
        "first setting for which it was not ended the test; all before it hold.",
        figures.path(certificate),
    )


def _points(found: Calibration) -> str:
    rows = "".join(_point(p, p == found.point) for p in found.points)
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "threshold",
            "may stop after layer",
            "layers on average",
            "speed predicted",
            "speed measured",
            "tokens that agree",
            "texts unchanged",
        )
    )
    return _section(
        "All measured settings",
        "The threshold is the dial: how sure a token has to be of its fate, as a chance that the "
        "full model would choose it too, before it may stop early. The marked row is used unless "
        f"another is asked for. (Confidence measure {found.confidence}, kv {found.kv}.)",
        f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>",
    )


def _kept(found: Calibration) -> str:
    """What became of the tokens promised nine chances in ten, exit by exit."""
    rows = [
        (
            f"layer {row['exit_layer']}",
            f"{row['near']:,}",
            "-" if row["near_agreement"] is None else f"{row['near_agreement']:.1%}",
            f"{row['error_before']:.3f}",
            f"{row['error_after']:.3f}",
        )
        for row in found.recipe.get("quality", [])
        if row["confidence"] == found.confidence and "near" in row
    ]
    if not rows:
        return ""
    head = ("exit after", 'tokens promised "90 %"', "of these agree", "error before", "error after")
    return (
        f"{_table(head, rows)}<p>Error: mean gap between promise and outcome, before and after "
        "calibration. Tokens of prompts that nothing was fitted to.</p>"
    )


def _batches(found: Calibration) -> str:
    if not found.batches:
        return ""
    rows = [
        (str(n), f"{gain:.2f}x", "run at full depth" if found.unpaid(n) else "stop early")
        for n, gain in sorted(found.batches.items())
    ]
    return _section(
        "Several texts at once",
        "The more texts are generated together, the likelier one of them needs all layers. Where "
        "stopping early was measured to be slower than the full model, it is not tried.",
        _table(("texts at once", "times as fast", "tokens"), rows),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{cells}</tr>{body}</table></div>"


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
        f"<tr><td data-of=prompt>{escape(row['prompt'])}</td>"
        f"<td data-of='adaptive depth'>{escape(row['shared'])}"
        f"<mark>{escape(row['adaptive'])}</mark></td>"
        f"<td data-of='full model'>{escape(row['shared'])}"
        f"<mark>{escape(row['full_depth'])}</mark></td></tr>"
        for row in evidence["worst"]
    )
    return _section(
        "The texts that changed most",
        f"The {len(evidence['worst'])} worst of all, most changed first. Marked is what follows "
        "from the first token that differs: another story, not necessarily a worse one.",
        "<div class=wide><table class=texts><tr><th>prompt</th><th>adaptive depth</th>"
        f"<th>full model</th></tr>{rows}</table></div>",
    )


def _recipe(found: Calibration) -> str:
    recipe = {k: v for k, v in found.recipe.items() if k not in ("quality", "cost")}
    content = json.dumps({**recipe, "fingerprint": dict(found.fingerprint)}, indent=1)
    return f"<details><summary>How this was made</summary><pre>{escape(content)}</pre></details>"
