"""Whether adaptive depth pays at all here, and if not, why not."""

from collections.abc import Sequence

from adaptive_gen.errors import Unreachable

from .cost import Cost
from .search import Candidate, pick
from .target import Target
from .trace import Trace

LEAST_GAIN = 1.03  # a predicted gain below this is not worth a setting


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
    raise Unreachable(
        "do not use adaptive depth with this model on this device: the best setting for "
        f"{target} is predicted to run at {best.speedup:.2f}x. Full depth's token is found for "
        f"{', '.join(shares)}, and each look at an exit takes as long as "
        f"{check_in_layers(cost):.1f} layers. Train the exits further, check fewer of them with "
        "--exit-layers, or ask for less."
    )


def check_in_layers(cost: Cost) -> float:
    """How many layer calls one look at an exit takes as long as."""
    layer = cost.seconds["layers"]
    check = cost.seconds["readouts"] + cost.seconds["checks"]
    return check / layer if layer else float("inf")
