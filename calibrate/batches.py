"""Whether exits pay where several texts are generated together.

A pass through small layers takes nearly as long for one row as for many, and with many rows one of
them nearly always goes to the end: the more rows, the less an exit saves. So it is measured, and
`generate` leaves exits unchecked in batches where they were found to lose.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from adaptive_gen.paired import generate
from adaptive_gen.ui import progress

ROWS = (2, 4, 8, 16)
ROUNDS = 3
TOKENS = 32  # new ones of each row, at most


def gains(
    model: Any, prompts: Sequence[Tensor], settings: Mapping[str, Any], max_new_tokens: int
) -> dict[int, float]:
    """Rows -> tokens per second of a setting over full depth, both with so many rows.

    Args:
        model: wrapped.
        prompts: token ids [1, time]; repeated where there are fewer than rows.
        settings: our keywords of `generate` for the setting.
        max_new_tokens: of the calibration.
    """
    found = {}
    arms = {"exits": settings, "full_depth": {**settings, "threshold": 1.0}}
    tokens = min(max_new_tokens, TOKENS)
    # No token is this one, so none ends a text; `min_new_tokens` would cost at every token.
    never = model.config.get_text_config().vocab_size
    for rows in progress(ROWS, "timing batches", total=len(ROWS)):
        seconds = {name: np.zeros(ROUNDS) for name in arms}
        for turn in range(-1, ROUNDS):  # the first only warms up
            first = (turn + 1) * rows
            batch = padded([prompts[(first + i) % len(prompts)] for i in range(rows)])
            for name in list(arms)[:: -1 if turn % 2 else 1]:
                _, s = generate(
                    model,
                    batch[0],
                    attention_mask=batch[1],
                    max_new_tokens=tokens,
                    eos_token_id=never,
                    **arms[name],
                )
                seconds[name][turn] = s
        found[rows] = float(np.median(seconds["full_depth"] / seconds["exits"]))
    return found


def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [1, time_i] as one batch with left padding, and its attention mask."""
    width = max(ids.shape[1] for ids in prompts)
    batch, mask = prompts[0].new_zeros(2, len(prompts), width)
    for row, ids in enumerate(prompts):
        batch[row, width - ids.shape[1] :] = ids[0]
        mask[row, width - ids.shape[1] :] = 1
    return batch, mask
