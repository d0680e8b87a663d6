"""Which token a hidden state leads to, where more than the largest logit has a say.

It does what transformers' processors do with logits, and `draws` with scores: a penalty for what
has been said, a temperature, the tokens of the largest scores, a draw.

- `choosing`: settings, see `PENALTY` and the others, [5]; the texts' rows in the next two, [texts];
  the numbers to draw with, [positions, rows, vocab] float32, none where nothing is drawn; how often
  each token has been said, [rows, vocab], none without a penalty; scores, [vocab in whole panels]
  float32; and indices of tokens, [vocab in whole panels], none where the largest logit is all that
  matters.

Axes: `texts` that go on, `rows` of the batch, `positions`, `vocab`.
"""

import math
from typing import Any

import numpy as np

from .exponential import exp
from .jit import inner
from .largest import drop_first, heaped, kth_largest
from .readout import best_two, first_of, read_out
from .screen import keep_largest, look, token_of

PENALTY, TEMPERATURE, TOP_K, TOP_P, MIN_P = range(5)  # of the settings
NONE = -2  # no token can be drawn: the logits are no numbers


@inner
def plain(choosing: Any) -> bool:
    """Whether the largest logit is all that matters."""
    return not len(choosing[5])


@inner
def _few_matter(head: Any, choosing: Any) -> bool:
    """Whether the screen tells which few logits have a say."""
    settings, _, draws, said, _, _ = choosing
    return settings[TOP_K] > 0 and len(draws) > 0 and not len(said) and head[6][0].shape[0] > 0


@inner
def prepare(x: Any, looked: bool, head: Any, choosing: Any) -> None:
    """Prepare what `choose` says of hidden states.

    Args:
        x: the states, [states, hidden or more].
        looked: whether they were prepared by `look` just now.
        head: see `screen`.
        choosing: see above.
    """
    panels, scale, norming, _, logits, _, screen, team, gain, gained, bias, softcap = head
    if plain(choosing) or _few_matter(head, choosing):
        if not looked:
            look(x, head)
    elif not looked or screen[0].shape[0]:
        out = logits[: x.shape[0]]
        read_out(x, norming, gain, panels, scale, bias, softcap, gained, out, team)


@inner
def choose(at: int, text: int, row: int, head: Any, choosing: Any) -> int:
    """The token that a hidden state leads to, by what was prepared; and take note of it.

    Args:
        at: index of its position.
        text: index of the text.
        row: of the state among those that were prepared.
        head: see `screen`.
        choosing: see above.

    Returns:
        The token, or `NONE`.
    """
    if plain(choosing):
        return token_of(row, head)
    settings, rows, draws, said, scores, kept = choosing
    _score(text, row, head, choosing)
    known = scores[: head[5]]
    top = best_two(known)[0]
    if not len(draws):
        token = first_of(top, known)
    elif not -math.inf < top < math.inf:
        return NONE
    else:
        token = _drawn(top, known, settings, kept, draws[at, rows[text]])
    if token >= 0 and len(said):
        said[rows[text], token] += 1
    return token


@inner
def unsay(text: int, token: int, choosing: Any) -> None:
    """Forget a token that was chosen for a text: it may not stand."""
    _, rows, _, said, _, _ = choosing
    if len(said):
        said[rows[text], token] -= 1


@inner
def _score(text: int, row: int, head: Any, choosing: Any) -> None:
    """The scores: logits after penalty and temperature; -inf for tokens that are not drawn."""
    settings, rows, _, said, scores, kept = choosing
    logits, vocab = head[4], head[5]
    if _few_matter(head, choosing):
        keep_largest(row, min(int(settings[TOP_K]), vocab), scores, kept, head)
    heat, penalty = np.float32(settings[TEMPERATURE]), np.float32(settings[PENALTY])
    for n in range(vocab):
        scores[n] = np.float32(logits[row, n])
    if len(said):
        for n in range(vocab):
            if said[rows[text], n]:
                scores[n] = scores[n] * penalty if scores[n] < 0 else scores[n] / penalty
    if heat != 1:
        for n in range(vocab):
            scores[n] /= heat


@inner
def _drawn(top: Any, scores: Any, settings: Any, kept: Any, noise: Any) -> int:
    """A token of those that settings keep, drawn by the chances of their scores."""
    vocab, k = len(scores), int(settings[TOP_K])
    least = np.float32(-math.inf)
    if 0 < k < vocab:
        least = kth_largest(k, scores, kept)
    if settings[TOP_P] < 1:
        least = max(least, _least_of_mass(top, least, settings[TOP_P], scores, kept))
    best, token, smallest = np.float32(-1), NONE, np.float32(settings[MIN_P])
    for n in range(vocab):
        if scores[n] >= least:
            chance = exp(scores[n] - top)  # over that of the likeliest
            if chance >= smallest and chance / noise[n] > best:
                best, token = chance / noise[n], n
    return token


@inner
def _least_of_mass(top: Any, least: Any, share: float, scores: Any, kept: Any) -> Any:
    """The smallest of the largest scores that have a share of all chances together.

    Only scores from `least` on have a chance. Scores that equal the smallest all count, where
    transformers leaves it to an unstable sort which of them do.
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
