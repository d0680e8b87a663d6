"""The screen's kernels, for Python to call."""

from adaptive_gen.kernels import screen
from adaptive_gen.kernels.jit import entry


@entry
def look(x, head):
    screen.look(x, head)


@entry
def token_of(row, head):
    return screen.token_of(row, head)


@entry
def leaves(row, least, measure, head):
    return screen.leaves(row, least, measure, head)
