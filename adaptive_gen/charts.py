"""Small charts as inline SVG: axes, lines, dots, bars. Colours come from the page's style."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 30, 14, 48


def plain(value: float) -> str:
    """A number on an axis, as short as it goes."""
    return f"{value:g}"


def percent(value: float) -> str:
    """A share on an axis."""
    return f"{100 * value:.3g} %"


def times(value: float) -> str:
    """A speed-up on an axis."""
    return f"{value:.3g}x"


class Chart:
    """One pair of axes that marks are added to."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        labels: tuple[str, str],
        formats: tuple[Callable[[float], str] | None, Callable[[float], str]] = (plain, plain),
    ):
        """Draw the axes.

        Args:
            x: smallest and largest value.
            y: the same, upwards.
            labels: of both axes.
            formats: how their numbers are written; None leaves those of x out.
        """
        self.x, self.y = _wide(x), _wide(y)
        self.marks: list[str] = []
        self.legend: list[tuple[str, str]] = []
        for value in _ticks(*self.x) if formats[0] is not None else []:
            left = self._across(value)
            self._add(f'<line class="grid" x1="{left}" y1="{TOP}" x2="{left}" y2="{_base()}"/>')
            self._text(left, _base() + 18, formats[0](value) if formats[0] else "", "middle")
        for value in _ticks(*self.y):
            up = self._up(value)
            self._add(f'<line class="grid" x1="{LEFT}" y1="{up}" x2="{WIDTH - RIGHT}" y2="{up}"/>')
            self._text(LEFT - 8, up + 4, formats[1](value), "end")
        self._text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, labels[0], "middle", "label")
        middle = (TOP + _base()) / 2
        self._add(
            f'<text class="label" text-anchor="middle" transform="translate(14 {middle}) '
            f'rotate(-90)">{escape(labels[1])}</text>'
        )

    def line(self, points: Points, kind: str, name: str = "") -> "Chart":
        """A line through points; `kind` is a class of the page's style."""
        path = " ".join(f"{self._across(x)},{self._up(y)}" for x, y in points)
        self._add(f'<polyline class="line {kind}" points="{path}"/>')
        return self._named(kind, name)

    def dots(self, points: Points, kind: str, name: str = "", titles: Sequence[str] = ()):
        """A dot for each point; `titles` show when the pointer rests on one."""
        for i, (x, y) in enumerate(points):
            title = f"<title>{escape(titles[i])}</title>" if titles else ""
            place = f'cx="{self._across(x)}" cy="{self._up(y)}"'
            self._add(f'<circle class="dot {kind}" {place} r="5">{title}</circle>')
        return self._named(kind, name)

    def spans(self, spans: Sequence[tuple[float, float, float]], kind: str) -> "Chart":
        """Horizontal intervals (low, high, y)."""
        for low, high, y in spans:
            up = self._up(y)
            ends = f'x1="{self._across(low)}" y1="{up}" x2="{self._across(high)}" y2="{up}"'
            self._add(f'<line class="line thin {kind}" {ends}/>')
        return self

    def bars(self, bars: Points, kind: str, labels: Sequence[str]) -> "Chart":
        """A bar from zero at each x, with its label on top."""
        for (x, y), label in zip(bars, labels, strict=True):
            left, up = self._across(x - 0.35), self._up(y)
            size = f'width="{self._across(x + 0.35) - left:.1f}" height="{_base() - up:.1f}"'
            self._add(f'<rect class="bar {kind}" x="{left}" y="{up}" {size} rx="3"/>')
            self._text(self._across(x), up - 5, label, "middle")
        return self

    def svg(self, description: str) -> str:
        """The chart with its legend, as HTML."""
        keys = "".join(
            f'<span><i class="key {kind}"></i>{escape(name)}</span>' for kind, name in self.legend
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
            f'{"".join(self.marks)}</svg><div class="legend">{keys}</div>'
        )

    def _named(self, kind: str, name: str) -> "Chart":
        if name:
            self.legend.append((kind, name))
        return self

    def _add(self, mark: str) -> None:
        self.marks.append(mark)

    def _text(self, x: float, y: float, content: str, anchor: str, kind: str = "tick") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._add(f'<text class="{kind}" {place}>{escape(content)}</text>')

    def _across(self, value: float) -> float:
        low, high = self.x
        share = (value - low) / (high - low)
        return round(LEFT + share * (WIDTH - RIGHT - LEFT), 1)

    def _up(self, value: float) -> float:
        low, high = self.y
        share = (value - low) / (high - low)
        return round(_base() - share * (_base() - TOP), 1)


def _base() -> float:
    return HEIGHT - BOTTOM


def _wide(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within the range, about `wanted` of them."""
    step = 10 ** np.floor(np.log10((high - low) / wanted))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (step * m) - wanted))
    first = np.ceil(low / step - 1e-9)
    count = int(np.floor(high / step + 1e-9) - first) + 1
    return [round(float((first + i) * step), 10) for i in range(count)]
