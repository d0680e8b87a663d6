"""Which implementation of every operation runs: torch's, so far."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import plain


@dataclass(frozen=True)
class Operations:
    """One function per operation, as `plain` documents them."""

    name: str
    project: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    write: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    read_out: Callable[..., None]


PLAIN = Operations("torch", plain.project, plain.gated, plain.write, plain.attend, plain.read_out)


def best_for(like: Tensor) -> Operations:
    """The operations for tensors `like` this one."""
    return PLAIN
