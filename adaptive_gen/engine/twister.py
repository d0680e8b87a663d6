"""Draws from torch's generator on the CPU by compiled code."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .machine_code import kernel

LEAST = 1024  # numbers; fewer are torch's own sooner
_TOGETHER = 4096  # numbers, so that what they are made of stays in a processor's caches
_TRIED = (1, 700)  # draws whose numbers and states are compared with torch's
_EXACT = 1e-6


def exponential_(numbers: Tensor) -> Tensor:
    """Do what `Tensor.exponential_` does, from the same state of the default generator, sooner.

    Args:
        numbers: float32 without gaps, on the CPU; get exponentially distributed numbers.
    """
    if numbers.numel() < LEAST or not as_torch_does():
        return numbers.exponential_()
    while True:
        before = torch.get_rng_state()
        after = before.clone()
        _fill(after, numbers)
        # torch would keep others from drawing meanwhile, who would get the same words.
        if torch.equal(torch.get_rng_state(), before):
            torch.set_rng_state(after)
            return numbers


@lru_cache
def as_torch_does() -> bool:
    """Whether torch draws as the kernel does, in this version and on this processor.

    On Intel's it takes another generator.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    torch.rand(3, generator=generator, device="cpu")
    for count in _TRIED:
        state = generator.get_state()
        theirs, ours = torch.empty(2, count, dtype=torch.float32, device="cpu")
        theirs.exponential_(generator=generator)
        if len(state) % 8 or len(state) // 8 < kernel("twister").FIRST + kernel("twister").WORDS:
            return False
        _fill(state, ours)
        same = torch.allclose(ours, theirs, rtol=_EXACT, atol=0)
        if not same or not torch.equal(state, generator.get_state()):
            return False
    return True


def _fill(state: Tensor, numbers: Tensor) -> None:
    """Write the numbers that come next, and the state behind them."""
    twister, some = kernel("twister"), min(_TOGETHER, numbers.numel())
    scratch = np.empty(some)
    twister.exponential(
        state.numpy().view(np.uint64),
        np.empty(twister.WORDS, np.uint32),
        np.empty(2 * some, np.uint32),
        scratch,
        scratch.view(np.int64),
        numbers.numpy().reshape(-1),
    )
