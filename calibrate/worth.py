"""Whether adaptive depth pays at all here, as predicted and as measured, and if not, why not."""

from collections.abc import Sequence

from adaptive_gen.calibration import Calibration
from adaptive_gen.errors import Unreachable

from .cost import Cost
from .search import Candidate, pick
from .target import Target
from .trace import Trace

LEAST_GAIN = 1.03  # a predicted gain below this is not worth a setting
ADVICE = "do not use adaptive depth with this model on this device"


class Slower(Unreachable):
    """The chosen point was measured slower than full depth.

    Args:
        message: with the figures.
        calibration: what was measured, not to be used by default.
    """

    def __init__(self, message: str, calibration: Calibration):
        super().__init__(message)
        self.calibration = calibration


def check(
    front: Sequence[Candidate], target: Target, cost: Cost, trace: Trace, least: float | None = None
) -> None:
    """Stop where even the best setting is predicted to gain next to nothing.

    Args:
        front: predicted settings, slowest first.
        target: what a setting must keep to.
        cost: this device's cost model.
        trace: what the exits said.
        least: smallest predicted gain to go on with; None is `LEAST_GAIN`.

    Raises:
        Unreachable: the advice not to use adaptive depth, with its reasons.
    """
    best = front[-1] if target.by_speed or target.kind == "risk" else front[pick(front, target)]
    if best.speedup >= (LEAST_GAIN if least is None else least):
        return
    shares = []
    for k, exit_layer in enumerate(trace.exit_layers[:-1]):
        _, agrees = trace.at(next(iter(trace.confidence)), k)
        shares.append(f"{agrees.mean():.0%} at exit {exit_layer}")
    easier = f", or ask for {target.bolder}" if target.kind == "disagreement" else ""
    raise Unreachable(
        f"{ADVICE}: the best setting for {target} is predicted to run at {best.speedup:.2f}x, "
        f"give or take {cost.residual:.0%} by the error on timed runs. Full depth's token is found "
        f"for {', '.join(shares)}, and each look at an exit takes as long as "
        f"{in_words(cost, trace.n_layers)}. Train the exits further, check fewer of them "
        f"with --exit-layers{easier}."
    )


def check_measured(found: Calibration, target: Target, least: float | None = None) -> None:
    """Stop where the point to use by default was measured slower than full depth.

    The measured speed itself decides, wherever its interval ends: full depth costs nothing and
    changes no token, so that a setting which is likelier slower than faster has nothing to offer.

    Args:
        found: its default point is measured.
        target: what it was chosen for.
        least: as in `check`; less than 1 allows as much slowness here.

    Raises:
        Slower: it is.
    """
    point = found.point
    if point.speedup >= min(1.0, LEAST_GAIN if least is None else least):
        return
    low, high = point.wall_speedup_interval or (point.speedup, point.speedup)
    doubt = "all of it slower" if high < 1 else "not clearly slower, and not faster either"
    raise Slower(
        f"{ADVICE}: the best setting for {target} was measured at {point.speedup:.3f}x full "
        f"depth's speed (95 % interval {low:.3f} to {high:.3f}: {doubt}). Train the exits further, "
        f"check fewer of them with --exit-layers, or ask for {target.bolder}.",
        found,
    )


def in_words(cost: Cost, n_layers: int) -> str:
    """How long one look at an exit takes, in words.

    Layers that cost next to nothing beside the rest of a token cannot be told from it by the clock,
    and a quotient with them says nothing.
    """
    layers = check_in_layers(cost)
    return f"{layers:.1f} layers" if layers <= 3 * n_layers else f"all {n_layers} layers or more"


def check_in_layers(cost: Cost) -> float:
    """How many layer calls one look at an exit takes as long as."""
    layer = cost.seconds["layers"]
    check = cost.seconds["readouts"] + cost.seconds["checks"]
    return check / layer if layer else float("inf")
