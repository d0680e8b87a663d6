"""The report's charts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaptive_gen.calibration import Calibration
from adaptive_gen.certificate import Certificate
from adaptive_gen.charts import Chart, percent, plain, times

from .tables import threshold

KINDS = ("a", "b", "c", "d", "e", "f")


def front(found: Calibration, evidence: Mapping[str, Any]) -> str:
    """Speed against agreement: predicted, measured, chosen, certified."""
    predicted = [(c["speedup"], c["agreement"]) for c in evidence["front"]]
    measured = [(p.speedup, p.agreement) for p in found.points]
    intervals = [
        (*p.wall_speedup_interval, p.agreement) for p in found.points if p.wall_speedup_interval
    ]
    xs, ys = zip(*predicted, *measured, strict=True)
    xs = (*xs, *(low for low, _, _ in intervals), *(high for _, high, _ in intervals))
    bottom = min(ys) - 0.02
    labels = "times as fast as the full model", "tokens that agree"
    chart = Chart((min(1.0, *xs) - 0.02, max(xs) + 0.05), (bottom, 1.0), labels, (times, percent))
    chart.line(predicted, "a", "predicted from traces")
    chart.spans(intervals, "b")
    titles = [f"threshold {threshold(p)}: {p.speedup:.2f}x" for p in found.points]
    chart.dots(measured, "b", "measured", titles)
    name = "chosen" if found.point.certificate is None else "chosen and certified"
    chart.dots([(found.point.speedup, found.point.agreement)], "c", name)
    return chart.svg("speed against agreement")


def depths(found: Calibration, evidence: Mapping[str, Any]) -> str:
    """Tokens by the layers they ran."""
    histogram = {int(layer): n for layer, n in evidence["exit_histogram"].items()}
    total = sum(histogram.values())
    layers = sorted({*histogram, found.n_layers})
    shares = [histogram.get(layer, 0) / total for layer in layers]
    ends = (-0.5, len(layers) - 0.5)
    chart = Chart(
        ends, (0, min(1.0, max(shares) * 1.15)), ("layers run", "tokens"), (None, percent)
    )
    names = [f"{n:.0%} after {layer}" for n, layer in zip(shares, layers, strict=True)]
    chart.bars(list(enumerate(shares)), "a", names)
    return chart.svg("tokens by the layers they ran")


def reliability(evidence: Mapping[str, Any]) -> str:
    """Promised against kept chance of agreement, one line per exit."""
    rows = evidence["reliability"]
    low = min([0.9, *(v for row in rows for v in (*row["promised"], *row["kept"]))])
    labels = "promised chance of agreement", "what came of it"
    chart = Chart((low, 1.0), (low, 1.0), labels, (percent, percent))
    chart.line([(low, low), (1, 1)], "ideal")
    for kind, row in zip(KINDS * len(rows), rows, strict=False):
        points = list(zip(row["promised"], row["kept"], strict=True))
        chart.line(points, kind, f"exit {row['exit_layer']}").dots(points, kind)
    return chart.svg("promised against kept agreement")


def survival(evidence: Mapping[str, Any]) -> str:
    """Share of texts that are still the same after so many tokens."""
    rows = evidence["survival"]
    lengths = np.array(rows["lengths"])
    longest = int(lengths.max())
    chart = Chart((0, longest), (0, 1), ("new tokens", "texts still the same"), (plain, percent))
    for kind, name in (("a", "replayed"), ("b over", "decoded")):
        first = np.array(rows[name])
        same = [float(((first >= t) | (first == lengths)).mean()) for t in range(longest + 1)]
        chart.line(list(enumerate(same)), kind, name)
    return chart.svg("share of texts still the same, by length")


def predicted(found: Calibration) -> str:
    """The cost model's speed against the measured one."""
    pairs = [(p.predicted_speedup, p.speedup) for p in found.points if p.predicted_speedup]
    values = [v for pair in pairs for v in pair]
    ends = (min(values) - 0.05, max(values) + 0.05)
    chart = Chart(ends, ends, ("predicted", "measured"), (times, times))
    chart.line([(ends[0], ends[0]), (ends[1], ends[1])], "ideal")
    return chart.dots(pairs, "b").svg("predicted against measured speed")


def path(certificate: Certificate) -> str:
    """Mean loss of every setting tested, in order, against what is promised."""
    steps = certificate.steps
    most = max([certificate.max_risk, *(s["risk"] for s in steps)]) * 1.15
    labels = "predicted speed of the setting tested", "mean loss"
    speeds = [s["predicted_speedup"] for s in steps]
    ends = (min(speeds) - 0.02, max(speeds) + 0.02)
    chart = Chart(ends, (0, most), labels, (times, plain))
    limit = certificate.max_risk
    chart.line([(ends[0], limit), (ends[1], limit)], "ideal", f"promised: at most {limit:g}")
    for kind, name, good in (("c", "certified", True), ("d", "not certified: stop", False)):
        rows = [s for s in steps if s["certified"] is good]
        titles = [f"threshold {s['threshold']}: p = {s['p_value']:.3g}" for s in rows]
        points = [(s["predicted_speedup"], s["risk"]) for s in rows]
        if points:
            chart.dots(points, kind, name, titles)
    return chart.svg("mean loss of the settings tested")
