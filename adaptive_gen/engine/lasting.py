"""Tensors that outlive the call which made them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made here may be written in any mode later, which inference mode's may not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def makes_lasting(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a function make `lasting` tensors in inference mode, too, as it does in any other."""

    @functools.wraps(function)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with lasting():
            return function(*args, **kwargs)

    return made
