"""What an optimiser step minimises: which exits count, how much, and what teaches them.

An objective is written as parts joined by `+`, for example `uniform`, `quadratic:0.2+rotating` or
`distil:0.6+full:2`. A part that is not written keeps its default; the paper's is `uniform`.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from adaptive_gen.errors import OptionError

SYNTAX = (
    "one of uniform, linear, quadratic[:scale]; one of every, sampled[:exits], "
    "rotating[:period], gradual[:share]; distil[:share], full:weight, dropout:probability, "
    "propagated[:share]"
)


@dataclass(frozen=True)
class Weighting:
    """How much an exit counts against the others.

    uniform: all alike (Sorted LLaMA). linear: as many as it has layers (CALM). quadratic: the sum
    of all counts up to its own, times `scale`; full depth gains its own count in full (LayerSkip's
    scale, its layers counted from one so that exit 1 weighs something).
    """

    name: str = "uniform"
    scale: float = 1.0

    def __call__(self, exit_layer: int, n_layers: int) -> float:
        """Weight of one exit; only ratios matter."""
        if self.name == "uniform":
            return 1.0
        if self.name == "linear":
            return float(exit_layer)
        if exit_layer == n_layers:
            return n_layers + self.scale * n_layers * (n_layers - 1) / 2
        return self.scale * exit_layer * (exit_layer + 1) / 2


@dataclass(frozen=True)
class Curriculum:
    """Which exits a step trains.

    every: all. sampled: `number` of them, drawn anew each step, full depth as likely as any
    (SortedNet). rotating: full depth and every `number`-th exit, one on at each step, by default
    one at a time (LayerSkip). gradual: full depth, and from deep to shallow one exit more at equal
    distances, all of them after the share `number` of the steps (LayerSkip: half).
    """

    name: str = "every"
    number: float | None = None

    def __call__(self, exits: Sequence[int], step: int, steps: int, seed: int) -> list[int]:
        """The exits of one step.

        Args:
            exits: ascending, full depth last.
            step: optimiser steps already made.
            steps: of the whole run.
            seed: of the run; a resumed run draws what the unbroken one would have drawn.
        """
        *inner, full = exits
        if self.name == "sampled":
            count = min(int(self.number or 1), len(exits))
            return sorted(random.Random(f"{seed} {step}").sample(list(exits), count))
        if self.name == "rotating":
            period = int(self.number or len(inner) or 1)
            return [e for i, e in enumerate(inner) if i % period == step % period] + [full]
        if self.name == "gradual":
            share = 0.5 if self.number is None else self.number
            done = step / max(steps * share, 1e-9)
            on = min(len(inner), math.floor(done * len(inner)))
            return [*inner[len(inner) - on :], full]
        return list(exits)


@dataclass(frozen=True)
class Objective:
    """One training objective.

    Args:
        weighting: of the exits a step trains.
        curriculum: which they are.
        distil: share of KL(full depth || exit) in an intermediate exit's loss; the rest is
            cross-entropy. 1 is self-distillation alone.
        full: factor on full depth's weight.
        dropout: probability that a row skips the last layer; less below, none at the first
            (LayerSkip).
        propagated: share of the tokens that leave at an exit drawn for each of them, so that the
            layers above see the keys and values which `kv="propagate"` will give them.
    """

    weighting: Weighting = Weighting()
    curriculum: Curriculum = Curriculum()
    distil: float = 0.0
    full: float = 1.0
    dropout: float = 0.0
    propagated: float = 0.0

    def weights(
        self, exits: Sequence[int], step: int = 0, steps: int = 1, seed: int = 0
    ) -> dict[int, float]:
        """Weight of every exit at one step, 0 for those it leaves out."""
        chosen = set(self.curriculum(exits, step, steps, seed))
        found = {e: self.weighting(e, exits[-1]) if e in chosen else 0.0 for e in exits}
        found[exits[-1]] *= self.full
        # Full depth alone, weighing nothing (`sampled+full:0`), would leave a step without a loss.
        return found if sum(found.values()) > 0 else dict.fromkeys(exits, 1.0)

    @property
    def partial(self) -> bool:
        """Whether some steps leave layers without a gradient."""
        return self.curriculum.name == "sampled" or self.full == 0.0

    def __str__(self) -> str:
        """The shortest text that `parse` reads back."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, Weighting):
                parts.append(_written(value.name, value.scale, 1.0))
            elif isinstance(value, Curriculum):
                parts.append(_written(value.name, value.number, None))
            else:
                parts.append(f"{field.name}:{value:g}")
        return "+".join(parts) or "uniform"


def _written(name: str, number: float | None, default: float | None) -> str:
    return name if number == default else f"{name}:{number:g}"


def _at_least(least: float) -> Callable[[float], bool]:
    return lambda value: least <= value < math.inf


def _share(value: float) -> bool:
    return 0.0 <= value <= 1.0


# name -> field, value of the bare name (None: a number must follow), which numbers are allowed
PARTS: dict[str, tuple[str, float | None, Callable[[float], bool] | None]] = {
    "uniform": ("weighting", 1.0, None),
    "linear": ("weighting", 1.0, None),
    "quadratic": ("weighting", 1.0, _at_least(0.0)),
    "every": ("curriculum", math.nan, None),
    "sampled": ("curriculum", math.nan, _at_least(1.0)),
    "rotating": ("curriculum", math.nan, _at_least(1.0)),
    "gradual": ("curriculum", math.nan, _share),
    "distil": ("distil", 0.5, _share),
    "full": ("full", None, _at_least(0.0)),
    "dropout": ("dropout", None, lambda value: 0.0 <= value < 1.0),
    "propagated": ("propagated", 0.5, _share),
}


def parse(text: str) -> Objective:
    """Read an objective.

    Raises:
        OptionError: an unknown part, a number out of its range, or two parts of one kind.
    """
    objective, seen = Objective(), set()
    for part in text.split("+"):
        name, given, written = part.strip().partition(":")
        field, bare, allowed = PARTS.get(name, ("", None, None))
        if field in seen or not field:
            raise OptionError(
                f"objective {text!r}: {part!r} is {'a second' if field else 'no'} "
                f"{field or 'part of an objective'}; give {SYNTAX}, joined by +."
            )
        seen.add(field)
        number = _number(text, part, written, allowed) if given else None
        if number is None and bare is None:
            raise OptionError(f"objective {text!r}: {name} needs a number, as in {name}:0.1.")
        value: object = bare if number is None else number
        if field == "weighting":
            value = Weighting(name, 1.0 if number is None else number)
        elif field == "curriculum":
            value = Curriculum(name, number)
        objective = replace(objective, **{field: value})
    return objective


def _number(text: str, part: str, written: str, allowed: Callable[[float], bool] | None) -> float:
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if allowed is None or not allowed(value):
        raise OptionError(
            f"objective {text!r}: {part!r} has a number that is out of range; give {SYNTAX}."
        )
    return value
