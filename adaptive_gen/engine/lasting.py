"""Tensors that outlive the call which made them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made here may be written in any mode later, which inference mode's may not."""
    with torch.inference_mode(False), torch.no_grad():
        yield
