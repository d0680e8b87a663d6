"""Certification: the settings whose mean loss is, with stated confidence, small enough.

Settings and the order to test them in, careful ones first, are fixed on one part of the prompts;
then each is tested on the other part until one fails. All before it hold together at the level of a
single test: fixed-sequence testing (Learn then Test, Angelopoulos et al., arXiv 2110.01052).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive_gen.certificate import Certificate
from adaptive_gen.errors import Unreachable

from . import bounds
from .search import Candidate

# Exact where a loss is 0 or 1, betting elsewhere.
TESTS: Mapping[str, tuple[str, bounds.Test]] = {
    "prefix": ("betting", bounds.betting),
    "exact": ("binomial", bounds.binomial),
    "rouge": ("betting", bounds.betting),
    "em": ("binomial", bounds.binomial),
}
MOST_STEPS = 16  # settings tested at most
BEYOND = 3.0  # settings whose estimated loss is more than this many times the risk are not tried


@dataclass(frozen=True)
class Promise:
    """What is to be certified."""

    max_risk: float
    level: float = 0.95
    loss: str = "prefix"

    @property
    def delta(self) -> float:
        """Chance of a false certificate that is put up with."""
        return 1 - self.level

    @property
    def test(self) -> bounds.Test:
        """The bound that fits the loss."""
        return TESTS[self.loss][1]

    def check_enough(self, prompts: int) -> None:
        """Raise `DataError` if so few prompts cannot carry the promise, however they come out."""
        bounds.check_enough(self.test, prompts, self.max_risk, self.delta)


@dataclass(frozen=True)
class Step:
    """One setting that was tested."""

    candidate: Candidate
    estimate: float  # its mean loss on the prompts that fixed the order
    risk: float  # its mean loss on the prompts it was tested on
    p_value: float
    certified: bool


def sequence(
    front: Sequence[Candidate], estimates: Sequence[float], max_risk: float
) -> list[tuple[Candidate, float]]:
    """What to test, in order: ever more loss, and each faster than all before it.

    Args:
        front: settings.
        estimates: mean loss of each, from prompts that are not tested on.
        max_risk: what is to be promised.
    """
    ordered = sorted(
        zip(estimates, front, strict=True), key=lambda pair: (pair[0], -pair[1].speedup)
    )
    kept: list[tuple[Candidate, float]] = []
    for estimate, candidate in ordered:
        faster = not kept or candidate.speedup > kept[-1][0].speedup
        if faster and (not kept or estimate <= BEYOND * max_risk):
            kept.append((candidate, estimate))
    if len(kept) <= MOST_STEPS:
        return kept
    # Evenly by loss: where losses crowd, a step more gains nothing.
    wanted = np.linspace(kept[0][1], kept[-1][1], MOST_STEPS)
    losses = np.array([estimate for _, estimate in kept])
    return [kept[i] for i in sorted({int(np.abs(losses - w).argmin()) for w in wanted})]


def certify(
    ordered: Sequence[tuple[Candidate, float]],
    losses_of: Callable[[Candidate], NDArray],
    promise: Promise,
) -> list[Step]:
    """Test in order until one fails.

    Args:
        ordered: settings and their estimated losses, fixed before `losses_of` is looked at.
        losses_of: losses [prompts] of a setting, on prompts used for nothing before.
        promise: what to certify.
    """
    steps: list[Step] = []
    for candidate, estimate in ordered:
        losses = losses_of(candidate)
        p = float(promise.test(losses, promise.max_risk, promise.delta))
        good = p <= promise.delta  # not a number is not good
        steps.append(Step(candidate, estimate, float(losses.mean()), p, good))
        if not good:
            break
    return steps


def certified(steps: Sequence[Step], promise: Promise, prompts: int) -> list[Step]:
    """The certified steps, slowest predicted first; their promises hold together.

    Raises:
        Unreachable: not even the most careful setting could be certified.
    """
    good = [step for step in steps if step.certified]
    if good:
        return sorted(good, key=lambda step: step.candidate.speedup)
    first = steps[0]
    raise Unreachable(
        f"--max-risk {promise.max_risk:g} cannot be certified with this model: on {prompts} "
        f"prompts the most careful setting ({first.candidate}) has a mean {promise.loss} loss of "
        f"{first.risk:.3f}, which leaves a chance of {first.p_value:.2g} that it is too high "
        f"({promise.delta:.2g} is allowed). Allow more risk or give more prompts."
    )


def certificate(
    steps: Sequence[Step],
    chosen: Step,
    promise: Promise,
    prompts: int,
    max_new_tokens: int,
    decoded_risk: float | None = None,
) -> Certificate:
    """The chosen step's promise with all its evidence."""
    return Certificate(
        loss=promise.loss,
        max_risk=promise.max_risk,
        level=promise.level,
        risk=chosen.risk,
        p_value=chosen.p_value,
        prompts=prompts,
        test=TESTS[promise.loss][0],
        max_new_tokens=max_new_tokens,
        steps=tuple(_row(step) for step in steps),
        decoded_risk=decoded_risk,
    )


def _row(step: Step) -> dict:
    return {
        "threshold": step.candidate.dial,
        "exit_layers": list(step.candidate.exit_layers),
        "predicted_speedup": step.candidate.speedup,
        "estimate": step.estimate,
        "risk": step.risk,
        "p_value": step.p_value,
        "certified": step.certified,
    }
