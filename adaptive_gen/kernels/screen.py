"""What hidden states say, without reading most of the LM head: a screen, and a closer look.

A check wants to know which token is likeliest and whether it is likely enough; full depth, only the
first. Most of the head has no say in either. So all logits are first worked out from the head in 8
bits, the *screen*, a quarter of the memory of float32. How far each can be off is known, for a
product with a vector of length at most 1 errs by no more than the length of the column's own error;
a panel counts as off by as much as any of its columns. Then just the panels that may hold the
largest logits are multiplied as they are, and more of them, those with the most probability first,
while a threshold lies between what the confidence is at least and at most. The token and whether it
leaves are those of the whole head.

- `head`: panels, scale and norming of `read_out`, normed [rows, hidden], logits [rows, vocab in
  whole panels], how many of these are tokens; and the screen: steps [panels, hidden, PANEL] in 8
  bits, no panels at all where there is no screen; each column's scale, [vocab in whole panels]; by
  how much any logit of a panel may be off, e to the power of plus and of minus that, and whether a
  panel is known exactly, [panels] each. Who helps, see `team`. At last the gain that is folded into
  the screen and not into the panels, see `apply_gain`, the normed states times it: the very same as
  normed where there is none; and the bias and softcap of `read_out`, which may bring two logits
  nearer and never farther apart.
- `row`: of the normed states and of the logits.
"""

import math
from typing import Any

from .jit import inner
from .largest import kth_largest
from .logits import mass, reaches, two_certain
from .panels import PANEL
from .products import add_one, add_product
from .readout import best_two, first_of, read_out, summary
from .rows import apply_gain, begin, norm, soften

MEASURES = ("margin", "max_prob", "entropy", "gate")
MARGIN, MAX_PROB, ENTROPY, GATE = range(4)
# How far apart what a confidence is at least and at most may be for a token that leaves, which gets
# the middle. To know more takes more of the head than to choose the token; and the errors of
# thousands of tokens hardly ever add up: most confidences are off by a tenth of what they may be.
WIDTH = 0.1
# How far below the largest logit panels are looked at closely, step by step; in the end, all are.
_DEPTHS = (0.0, 3.0, 6.0)
_ROUNDING = 1e-5  # of a mass, as a share of it


@inner
def look(x: Any, head: Any) -> None:
    """Prepare what `token_of` and `leaves` say of hidden states [rows, hidden or more]."""
    panels, scale, norming, normed, logits, vocab, screen, team, gain, gained, bias, softcap = head
    rows, steps = x.shape[0], screen[0]
    if not steps.shape[0]:
        read_out(x, norming, gain, panels, scale, bias, softcap, gained, logits[:rows], team)
        return
    norm(x, norming, normed, rows)
    apply_gain(gain, normed, gained, rows)
    begin(logits, bias, rows)
    add_product(normed, steps, screen[1], logits, rows, team)
    soften(logits, softcap, rows)
    logits[:rows, vocab:] = -math.inf


@inner
def _bar(row: int, head: Any) -> Any:
    """What the largest logit and the second are at least."""
    doubt, exact = head[6][2], head[6][5]
    exact[:] = False
    return two_certain(head[4][row], doubt)


@inner
def _multiply(row: int, panel: int, head: Any) -> None:
    """Make the logits of a panel exact."""
    panels, scale, _, _, logits, _, _, _, _, gained, bias, softcap = head
    for n in range(PANEL * panel, PANEL * (panel + 1)):
        logits[row, n] = bias[n] if bias.shape[0] else logits.dtype.type(0)
    add_one(gained, panels, scale, logits, row, panel, 0, 1)
    soften(logits[row : row + 1, PANEL * panel : PANEL * (panel + 1)], softcap, 1)


@inner
def _sharpen(row: int, bar: float, head: Any) -> None:
    """Make the logits exact in all panels where one may reach the bar."""
    logits, vocab, (_, _, doubt, _, _, exact) = head[4], head[5], head[6]
    for panel in range(len(exact)):
        if not exact[panel] and reaches(logits[row], panel, doubt[panel], bar):
            _multiply(row, panel, head)
            exact[panel] = True
    if exact[len(exact) - 1]:
        logits[row, vocab:] = -math.inf


@inner
def _largest(row: int, head: Any) -> Any:
    """The largest exact logit, the second, and the token of the first."""
    logits, exact = head[4], head[6][5]
    top = second = logits.dtype.type(-math.inf)
    token = 0
    for panel in range(len(exact)):
        if not exact[panel]:
            continue
        for n in range(PANEL * panel, PANEL * (panel + 1)):
            if logits[row, n] > top:
                top, second, token = logits[row, n], top, n
            elif logits[row, n] > second:
                second = logits[row, n]
    return top, second, token


@inner
def token_of(row: int, head: Any) -> int:
    """The token of the largest logit, the first of equals."""
    logits, vocab = head[4], head[5]
    if not head[6][0].shape[0]:
        known = logits[row, :vocab]
        return first_of(best_two(known)[0], known)
    _sharpen(row, _bar(row, head)[0], head)
    return _largest(row, head)[2]


@inner
def keep_largest(row: int, k: int, least: Any, heap: Any, head: Any) -> None:
    """Make the k largest logits exact, at least, and all that are not exact -inf.

    Args:
        row: see above.
        k: how many, at most as many as there are tokens.
        least: gets what each logit is at least, [vocab in whole panels] float32.
        heap: for indices, [k or more].
        head: see above; with a screen.
    """
    logits, vocab, (_, _, doubt, _, _, exact) = head[4], head[5], head[6]
    exact[:] = False
    for n in range(vocab):
        least[n] = logits[row, n] - doubt[n // PANEL]
    bar = kth_largest(k, least[:vocab], heap)
    _sharpen(row, bar - _ROUNDING * abs(bar), head)
    for n in range(vocab):
        if not exact[n // PANEL]:
            logits[row, n] = -math.inf


@inner
def measured(found: Any, vocab: int, measure: int) -> float:
    """A measure of a summary, as `confidence.of_summary` has it."""
    top, second, _, total, entropy = found
    if measure == ENTROPY:
        return min(1.0, max(0.0, 1.0 - entropy / math.log(vocab)))
    largest = math.exp(top - total)
    return largest if measure == MAX_PROB else largest - math.exp(second - total)


@inner
def _share(top: float, second: float, measure: int) -> float:
    """A confidence, margin or max_prob, over the likeliest token's chance: it is never less."""
    return 1.0 if measure == MAX_PROB else 1.0 - math.exp(second - top)


@inner
def _read_whole(row: int, head: Any) -> Any:
    """The summary of exact logits."""
    if head[6][0].shape[0]:
        for panel in range(head[0].shape[0]):
            _multiply(row, panel, head)
    return summary(head[4][row, : head[5]])


@inner
def _by_whole_head(row: int, least: float, measure: int, head: Any) -> Any:
    found = _read_whole(row, head)
    raw = measured(found, head[5], measure)
    return raw, int(found[2]) if raw >= least else -1


@inner
def leaves(row: int, least: float, measure: int, head: Any) -> Any:
    """Whether a token may leave: by margin, max_prob or entropy.

    Args:
        row: see above.
        least: raw confidence it needs.
        measure: index of `MEASURES`.
        head: see above.

    Returns:
        The raw confidence, to half of `WIDTH` if the token leaves and else on the right side of
        `least`; and the token, -1 if it goes on.
    """
    screened = head[6][0].shape[0] > 0
    if measure == MARGIN and not screened:
        share = _share(*best_two(head[4][row, : head[5]]), measure)
        if share < least:
            return share, -1
    if measure == ENTROPY or not screened:  # all tokens have a say in an entropy
        return _by_whole_head(row, least, measure, head)
    _, _, _, grow, shrink, exact = head[6]
    top, bar = _bar(row, head)
    for depth in _DEPTHS:
        _sharpen(row, min(bar, top - depth), head)
        top, second, token = _largest(row, head)
        if top == -math.inf:  # the states are no numbers
            return math.nan, -1
        bar = second
        share = _share(top, second, measure)
        if share < least:
            return share, -1
        most, fewest = mass(head[4][row], top, grow, shrink, exact)
        low, high = share / (most * (1 + _ROUNDING)), share / (fewest * (1 - _ROUNDING))
        if high < least:
            return high, -1
        if low >= least and high - low <= WIDTH:
            return (low + high) / 2, token
    return _by_whole_head(row, least, measure, head)
