"""Where the tokens of a flat block belong: what a step reads in place of Python's lengths."""

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """Static int64 tensors on the device, filled anew before every step.

    A row's tokens stand one behind the other. What fills the block up is placed at slot 0, at the
    last position of its buffer, which no token ever takes and no mask lets anybody see.
    """

    slots: Tensor  # [tokens] the row of the K/V buffers a token belongs to
    positions: Tensor  # [tokens] its position in that row's text
    firsts: Tensor  # [slots] index of each row's first token in the block
    counts: Tensor  # [slots] its tokens in the block; 0 where a row sits this step out
    starts: Tensor  # [slots] position of its first token


class Heads(NamedTuple):
    """How a projection's columns are divided."""

    query: int
    kv: int
    dim: int
