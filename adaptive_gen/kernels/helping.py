"""What a helper does; see `team`."""

from typing import Any

from . import team as words
from .attending import help_attend
from .jit import compiled
from .products import help_product
from .team import ATTENTION, HALF, MASK, peek, put, spin


@compiled
def serve(team: Any, helper: int) -> None:
    """Help with all that is shared, until nothing has been for a while or one is not wanted.

    Args:
        team: see there.
        helper: which one this is.
    """
    idle = 0
    while idle < words.PATIENCE and helper < peek(team, words.HELPERS):
        word = peek(team, words.CLAIM)
        if word & MASK >= word >> HALF or helper >= peek(team, words.SEATS):
            spin(idle)
            idle += 1
            continue
        idle = 0
        word = words.add(team, words.CLAIM, 1)
        if word & MASK < word >> HALF:
            if team[words.JOB + words.KIND] == ATTENTION:
                help_attend(team, word & MASK, helper)
            else:
                help_product(team, word & MASK)
            words.add(team, words.DONE, 1)
    put(team, words.AWAKE + words.LINE * helper, 0)
