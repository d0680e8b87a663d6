"""Charts as plain SVG: speed against agreement, and how the cost grows. No dependency is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 56, 60
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"),
    *("#e69f00", "#555555", "#882255", "#999933", "#332288"),
)


@dataclass(frozen=True)
class Series:
    """Points of one kind, joined by a line or not."""

    label: str
    points: Sequence[tuple[float, float]]
    joined: bool = False


@dataclass(frozen=True)
class Axis:
    """A name and a range."""

    label: str
    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def around(cls, label: str, values: Sequence[float], logarithmic: bool = False) -> "Axis":
        """An axis that holds `values` with a little room."""
        low, high = min(values), max(values)
        if logarithmic:
            return cls(label, low / 1.15, high * 1.15, True)
        room = 0.06 * (high - low) or 0.1
        return cls(label, low - room, high + room)

    def place(self, value: float) -> float:
        """Share of the way from low to high."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers, about five of them."""
        if self.logarithmic:
            exponents = range(math.floor(math.log2(self.low)), math.ceil(math.log2(self.high)) + 1)
            step = max(1, round(len(exponents) / 6))
            return [2.0**e for e in exponents[::step] if self.low <= 2.0**e <= self.high]
        raw = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(raw))
        step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """An SVG document."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *_frame(x, y),
    ]
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        at = [_point(x, y, *point) for point in one.points]
        if one.joined:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in at]
        column, row = number % 3, number // 3
        left, top = LEFT + 225 * column, 38 + 15 * row
        parts.append(f'<circle cx="{left + 4}" cy="{top - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 13}" y="{top}" font-size="11">{escape(one.label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _point(x: Axis, y: Axis, a: float, b: float) -> tuple[float, float]:
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - _top() - BOTTOM
    return LEFT + wide * x.place(a), _top() + high * (1 - y.place(b))


def _top() -> int:
    return TOP + 30  # under three rows of legend


def _frame(x: Axis, y: Axis) -> list[str]:
    bottom, top = HEIGHT - BOTTOM, _top()
    parts = [
        f'<path d="M{LEFT},{top}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#222"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 18}" text-anchor="middle">'
        f"{escape(x.label)}</text>",
        f'<text transform="translate(20 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>",
    ]
    for tick in x.ticks():
        left = _point(x, y, tick, y.low)[0]
        parts.append(f'<path d="M{left:.1f},{bottom}v5" stroke="#222"/>')
        parts.append(
            f'<text x="{left:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:.6g}</text>'
        )
    for tick in y.ticks():
        height = _point(x, y, x.low, tick)[1]
        parts.append(f'<path d="M{LEFT},{height:.1f}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
        )
    return parts


def speed_against_agreement(result: Mapping[str, Any]) -> str:
    """The end-to-end track's picture: right is more faithful, up is faster."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, arm in result["arms"].items():
        if name.startswith("threshold_"):
            label = "adaptive, by threshold"
        elif name.startswith("cut_"):
            label = "static truncation, by layer"
        else:
            label = arm["label"].replace("`", "")
        groups.setdefault(label, []).append((arm["agreement"], arm["wall_speedup"]))
    series = [Series(n, sorted(points), len(points) > 1) for n, points in groups.items()]
    x, y = (
        Axis.around(label, [point[i] for one in series for point in one.points])
        for i, label in enumerate(("agreement with full depth", "tokens/s over own full depth"))
    )
    return chart(f"{result['model']}: speed against agreement", x, y, series)


def growth(points: Sequence[Mapping[str, Any]]) -> str:
    """One axis of the sweep: tokens/s of every arm, prefill left out."""
    axis = points[0]["axis"]
    series = []
    for name, arm in points[0]["arms"].items():
        speeds = [(p["value"], p["arms"][name]["decode_tokens_per_s"]) for p in points]
        values = [(value, speed) for value, speed in speeds if speed is not None]
        series.append(Series(arm["label"].replace("`", ""), values, joined=True))
    x = Axis.around(axis, [p["value"] for p in points], logarithmic=True)
    y = Axis.around(
        "tokens decoded per second", [0.0, *(v for one in series for _, v in one.points)]
    )
    return chart(f"{points[0]['model']}: tokens/s against {axis}", x, y, series)
