"""Which implementation of every operation runs: Triton's where it can, torch's elsewhere."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    """The operations for tensors `like` this one.

    The kernels' tiles are sized for 16 bits; float32's would not fit every GPU's shared memory.
    """
    known = like.dtype in (torch.bfloat16, torch.float16)
    if like.device.type != "cuda" or not known or importlib.util.find_spec("triton") is None:
        return PLAIN
    return triton()


def triton() -> Operations:
    """The Triton kernels."""
    from . import attention, head, projection, rotary

    return Operations(
        "triton",
        projection.project,
        projection.gated,
        rotary.write,
        attention.attend,
        head.read_out,
    )
