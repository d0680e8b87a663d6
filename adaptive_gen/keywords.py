"""Values of our keywords, each checked by itself; `settings` puts them together."""

import math
from typing import Any

from .errors import OptionError
from .policy import ExitPolicy, FixedExit


def check_switch(name: str, value: Any) -> None:
    """Raise `OptionError` unless a keyword that is either on or off is just that, or not said.

    A word such as "no" would count as on.
    """
    if value is not None and value not in (True, False):
        raise OptionError(f"{name}={value!r} is neither True nor False; give one of them.")


def check_threshold(value: Any) -> float:
    """Return `value` if it is a threshold, a number in [0, 1]; raise `OptionError` if not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(
            f"threshold={value!r} is not a number from 0 (always the first exit) to 1 (full depth)."
        )
    return float(value)


def check_speedup(value: Any) -> None:
    """Raise `OptionError` unless it is a speed-up to aim at."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 <= value < math.inf:
        raise OptionError(f"target_speedup={value!r} is not a number of 1 or more, such as 1.5.")


def check_audit_floor(value: Any) -> float | None:
    """Return `value` if it is an agreement to keep, or None; raise `OptionError` if not."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise OptionError(
            f"audit_floor={value!r} is not an agreement to keep, a number between 0 and 1 such as "
            "0.97."
        )
    return float(value)


def check_policy(policy: Any, layers: tuple[int, ...]) -> None:
    """Raise `OptionError` unless it is a policy, of exits that are among `layers`."""
    if isinstance(policy, type) or not isinstance(policy, ExitPolicy):
        raise OptionError(
            f"policy={policy!r} is no exit policy: give an object, such as Patience(2), with the "
            "methods may_exit(exit_layer, position) and should_exit(check)."
        )
    if isinstance(policy, FixedExit) and policy.exit_layer not in layers:
        raise OptionError(
            f"{policy} names exit layer {policy.exit_layer}, which is not among the exit layers "
            f"{', '.join(map(str, layers))}. Give exit_layers=[{policy.exit_layer}] with it."
        )
