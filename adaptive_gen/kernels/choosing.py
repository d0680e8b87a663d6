"""Which token a hidden state leads to, where more than the largest logit has a say.

It does what transformers' processors and `torch.multinomial` do with the logits of one text: a
penalty for what has been said, a temperature, the tokens of the largest scores, a draw. A token is
drawn as torch draws it: each one's chance is divided by a number of its own that is exponentially
distributed, and the largest is taken.

- `choosing`: settings, see `PENALTY` and the others, [5]; the exponential numbers, [tokens, vocab]
  float32, none where nothing is drawn; whether a token of the vocabulary has been said, [vocab],
  none without a penalty; scores, [vocab in whole panels] float32; and indices of tokens, [vocab in
  whole panels], none where the largest logit is all that matters.

Axes: `tokens`, `vocab`.
"""

import math
from typing import Any

import numpy as np

from .cpu import best_two, first_of, read_out
from .exponential import exp
from .freshness import borrowing
from .largest import drop_first, heaped, kth_largest
from .screen import keep_largest, look, token_of

PENALTY, TEMPERATURE, TOP_K, TOP_P, MIN_P = range(5)  # of the settings
NONE = -1  # no token: the logits are no numbers


@borrowing
def plain(choosing: Any) -> bool:
    """Whether the largest logit is all that matters."""
    return not len(choosing[4])


@borrowing
def choose(i: int, x: Any, looked: bool, head: Any, choosing: Any) -> int:
    """Token i of a text, by a hidden state.

    Args:
        i: index of its exponential numbers.
        x: the state, [1, hidden or more].
        looked: whether it was prepared by `look` just now.
        head: see `screen`.
        choosing: see above.

    Returns:
        The token, or `NONE`.
    """
    if plain(choosing):
        if not looked:
            look(x, head)
        return token_of(0, head)
    settings, draws, seen, scores, kept = choosing
    _score(x, looked, head, choosing)
    known = scores[: head[5]]
    top = best_two(known)[0]
    if not -math.inf < top < math.inf:
        return NONE
    if not len(draws):
        token = first_of(top, known)
    else:
        token = _drawn(top, known, settings, kept, draws[i])
    if token >= 0 and len(seen):
        seen[token] = True
    return token


@borrowing
def _score(x: Any, looked: bool, head: Any, choosing: Any) -> None:
    """The scores: logits after penalty and temperature; -inf for tokens that are not drawn."""
    settings, draws, seen, scores, kept = choosing
    panels, scale, floor, _, logits, vocab, screen, team, gain, gained = head
    screened, k = screen[0].shape[0] > 0, min(int(settings[TOP_K]), vocab)
    if k > 0 and len(draws) and screened and not len(seen):
        if not looked:
            look(x, head)
        keep_largest(0, k, scores, kept, head)
    elif screened or not looked:
        read_out(x, floor, gain, panels, scale, gained, logits[:1], team)
    heat, penalty = np.float32(settings[TEMPERATURE]), np.float32(settings[PENALTY])
    for n in range(vocab):
        scores[n] = np.float32(logits[0, n])
    if len(seen):
        for n in range(vocab):
            if seen[n]:
                scores[n] = scores[n] * penalty if scores[n] < 0 else scores[n] / penalty
    if heat != 1:
        for n in range(vocab):
            scores[n] /= heat


@borrowing
def _drawn(top: Any, scores: Any, settings: Any, kept: Any, noise: Any) -> int:
    """A token of those that settings keep, drawn by the chances of their scores."""
    vocab, k = len(scores), int(settings[TOP_K])
    least = np.float32(-math.inf)
    if 0 < k < vocab:
        least = kth_largest(k, scores, kept)
    if settings[TOP_P] < 1:
        least = max(least, _least_of_mass(top, least, settings[TOP_P], scores, kept))
    if settings[MIN_P] > 0:
        least = max(least, top + np.float32(math.log(settings[MIN_P])))
    best, token = np.float32(-1), NONE
    for n in range(vocab):
        if scores[n] >= least:
            chance = exp(scores[n] - top) / noise[n]
            if chance > best:
                best, token = chance, n
    return token


@borrowing
def _least_of_mass(top: Any, least: Any, share: float, scores: Any, kept: Any) -> Any:
    """The smallest of the largest scores that have a share of all chances together.

    Only scores from `least` on have a chance.
    """
    total, count = 0.0, 0
    for n in range(len(scores)):
        if scores[n] >= least:
            total += exp(scores[n] - top)
            count += 1
    # So small a chance that all such together are no more than what is left out.
    small, size = np.float32((1 - share) * total / count), 0
    for n in range(len(scores)):
        if scores[n] >= least and exp(scores[n] - top) > small:
            kept[size] = n
            size += 1
    if not size:
        return top
    heaped(kept, size, scores, True)
    found = 0.0
    while True:
        lowest = scores[kept[0]]
        found += exp(lowest - top)
        if found >= share * total or size == 1:
            return lowest
        drop_first(kept, size, scores)
        size -= 1
