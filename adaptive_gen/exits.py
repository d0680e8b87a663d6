"""Exit layers: how a list of them is checked, completed and defaulted.

An exit layer is a *count* of decoder layers, 1..n_layers. Full depth is always an exit, so every
normalised list ends with `n_layers` whether or not the caller wrote it.
"""

from collections.abc import Iterable

from .errors import OptionError


def normalise(exit_layers: Iterable[int], n_layers: int) -> tuple[int, ...]:
    """Sort `exit_layers`, drop repeats and append full depth.

    Args:
        exit_layers: counts in 1..n_layers.
        n_layers: decoder layers of the model.

    Returns:
        Ascending exit layers; the last is `n_layers`.

    Raises:
        OptionError: it is no list, or a value is not a whole number in 1..n_layers.
    """
    if isinstance(exit_layers, str) or not isinstance(exit_layers, Iterable):
        raise OptionError(
            f"exit_layers={exit_layers!r} is no list of layers. Give whole numbers from 1 to "
            f"{n_layers} in one, such as [{max(1, n_layers // 2)}]."
        )
    chosen = list(exit_layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= n_layers:
            raise OptionError(
                f"exit layer {layer!r} does not exist: this model has {n_layers} layers. "
                f"Give whole numbers from 1 to {n_layers}."
            )
    return tuple(sorted({*chosen, n_layers}))


def quarter_points(n_layers: int) -> tuple[int, ...]:
    """Default exits of a model that names none: one after each quarter of its layers."""
    return normalise({max(1, round(n_layers * q / 4)) for q in (1, 2, 3)}, n_layers)


def parse(text: str, n_layers: int | None = None) -> tuple[int, ...]:
    """Read a command line's `4,8,12`.

    Args:
        text: whole numbers separated by commas.
        n_layers: decoder layers, when the model is already known.

    Returns:
        The numbers as given, or normalised when `n_layers` is known.

    Raises:
        OptionError: not a list of whole numbers, or a layer that does not exist.
    """
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"exit layers {text!r} are not whole numbers with commas between; write them as 4,8,12."
        ) from None
    return normalise(layers, n_layers) if n_layers is not None else tuple(layers)
