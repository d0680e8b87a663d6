"""What the user asks for, and whether a point gives it."""

from dataclasses import dataclass
from typing import Protocol

OPTIONS = {
    "speedup": "--target-speedup",
    "latency": "--latency-ms",
    "disagreement": "--max-disagreement",
    "risk": "--max-risk",
}


class Figures(Protocol):
    """What a target looks at, predicted or measured."""

    @property
    def speedup(self) -> float:
        """Tokens per second over full depth, whole calls."""
        ...

    @property
    def agreement(self) -> float:
        """Share of tokens that full depth would choose too."""
        ...

    @property
    def latency_ms(self) -> float:
        """Milliseconds per new token, whole calls."""
        ...


@dataclass(frozen=True)
class Target:
    """A wish for the default operating point."""

    kind: str  # a key of OPTIONS
    value: float

    @property
    def by_speed(self) -> bool:
        """Whether speed is asked for, as faithful as it goes; else the other way round."""
        return self.kind in ("speedup", "latency")

    def met(self, point: Figures) -> bool:
        """Whether a point is good enough. A risk is not judged here but certified."""
        if self.kind == "speedup":
            return point.speedup >= self.value
        if self.kind == "latency":
            return point.latency_ms <= self.value
        return self.kind == "risk" or 1 - point.agreement <= self.value

    @property
    def bolder(self) -> str:
        """What to ask for instead where only a faster setting will do."""
        return f"a {'smaller' if self.kind == 'latency' else 'larger'} {OPTIONS[self.kind]}"

    @property
    def easier(self) -> str:
        """What to ask for instead where nothing does."""
        return f"a {'smaller' if self.kind == 'speedup' else 'larger'} {OPTIONS[self.kind]}"

    def __str__(self) -> str:
        """The option that asks for it."""
        return f"{OPTIONS[self.kind]} {self.value:g}"
