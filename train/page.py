"""What `eval` and `compare` found, as a page: curves over exits, tables of exit against exit."""

from collections.abc import Mapping
from html import escape
from typing import Any

from adaptive_gen.charts import Chart, plain
from adaptive_gen.style import STYLE

TITLES = {
    "loss": "Loss per token, nats",
    "agreement": "Agreement with full depth",
    "exact_match": "Exact match",
    "f1": "F1",
    "rouge_l": "ROUGE-L",
    "likelihood": "Log-probability of the answers under full depth",
    "judge": "Judge, both orders",
}


def evaluation(name: str, found: Mapping[str, Any]) -> str:
    """The page of an evaluation."""
    exits = found["exits"]
    curves = {
        key: [(row["exit_layer"], row[key], row["intervals"].get(key)) for row in exits]
        for key in ("loss", "agreement")
    }
    for row in found["answers"]:
        for key, cell in row.items():
            if key != "exit_layer":
                curves.setdefault(key, []).append(
                    (row["exit_layer"], cell["mean"], cell["interval"])
                )
    parts = [
        f"<section><h2>{escape(TITLES[key])}</h2>{_curve(points, TITLES[key])}</section>"
        for key, points in curves.items()
    ]
    lead = f"{found['tokens']:,} tokens; dots are means, bars 95 % bootstrap intervals."
    return _page(f"Exits of {name}", lead, parts)


def _curve(points: list[tuple[int, float, Any]], title: str) -> str:
    values = [v for _, mean, ends in points for v in (mean, *(ends or ()))]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05
    across = (min(p[0] for p in points), max(p[0] for p in points))
    chart = Chart(across, (low - room, high + room), ("exit layer", title), (plain, plain))
    chart.line([(x, y) for x, y, _ in points], "a")
    for x, _, ends in points:
        if ends:
            chart.line([(x, ends[0]), (x, ends[1])], "thin a")
    chart.dots([(x, y) for x, y, _ in points], "a", titles=[f"{x}: {y:.4g}" for x, y, _ in points])
    return chart.svg(f"{title} by exit layer")


def comparison(found: Mapping[str, Any]) -> str:
    """The page of a comparison."""
    ours, theirs = found["models"]
    parts = []
    for way, cells in found["by"].items():
        scores = {(c["exit_layer"], c["other_exit_layer"]): c for c in cells}
        columns = found["exit_layers"][1]
        head = "".join(f"<th>{n}</th>" for n in columns)
        body = "".join(
            f"<tr><th>{row}</th>{''.join(_cell(scores[row, column]) for column in columns)}</tr>"
            for row in found["exit_layers"][0]
        )
        parts.append(
            f"<section><h2>{escape(TITLES[way])}</h2><table><tr><th></th>{head}</tr>{body}</table>"
            "</section>"
        )
    lead = (
        f"Rows: exits of {ours}. Columns: exits of {theirs}. Cells: (wins - losses) / "
        f"{found['questions']} questions; above zero the row wins."
    )
    return _page("Exit against exit", lead, parts)


def _cell(cell: Mapping[str, Any]) -> str:
    score, (low, high) = cell["score"], cell["interval"]
    colour = "var(--c)" if score > 0 else "var(--d)"
    shade = f"background:color-mix(in srgb,{colour} {abs(score) * 70:.0f}%,transparent)"
    return f'<td style="{shade}" title="{low:+.2f} to {high:+.2f}">{score:+.3f}</td>'


def _page(title: str, lead: str, parts: list[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{"".join(parts)}'
        "</main></body></html>\n"
    )
