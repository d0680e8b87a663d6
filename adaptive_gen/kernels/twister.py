"""Exponentially distributed numbers, as torch's generator on CPUs gives them, but sooner.

torch takes 53 bits of two words of a Mersenne Twister (Matsumoto & Nishimura 1998, MT19937) for a
uniform number u, and -log(1 - u) in float64 for the exponential one, one after the other. Here all
words come first, then all logarithms, as loops over arrays. Words and the generator's state are
the same; a logarithm may differ in its last bit.

Axes: `numbers`.
"""

from typing import Any

import numpy as np

from .jit import entry, exact, inner

WORDS, MIDDLE = 624, 397
# Where torch keeps what, in a state of 8-byte words: how many calls until the words are made anew
# (in the lower half), the next word, and the words, one in each.
LEFT, NEXT, FIRST = 1, 2, 3
_HALF = np.uint64(0xFFFFFFFF)
_TOP, _LOWER = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_TWIST = np.uint32(0x9908B0DF)
_MASK_7, _MASK_15 = np.uint32(0x9D2C5680), np.uint32(0xEFC60000)
_SQRT_HALF = np.int64(0x3FE6A09E667F3BCD)  # the bits of sqrt(1/2)
_LN2 = 0.6931471805599453


@exact
def _twisted(upper: Any, lower: Any, other: Any) -> Any:
    """A new word, of two neighbours and one further on."""
    joint = (upper & _TOP) | (lower & _LOWER)
    odd = np.uint32(0) - (lower & np.uint32(1))
    return other ^ (joint >> np.uint32(1)) ^ (odd & _TWIST)


@exact
def _renew(words: Any) -> None:
    """Make all words anew."""
    for n in range(WORDS - MIDDLE):
        words[n] = _twisted(words[n], words[n + 1], words[n + MIDDLE])
    for n in range(WORDS - MIDDLE, WORDS - 1):
        words[n] = _twisted(words[n], words[n + 1], words[n + MIDDLE - WORDS])
    words[WORDS - 1] = _twisted(words[WORDS - 1], words[0], words[MIDDLE - 1])


@exact
def _next_words(at: int, words: Any, out: Any) -> int:
    """Some of the generator's next words.

    Args:
        at: how many of `words` are used up.
        words: the generator's, [WORDS] uint32; made anew when all are.
        out: gets the next ones, uint32.

    Returns:
        How many are used up now.
    """
    start = 0
    while start < len(out):
        if at == WORDS:
            _renew(words)
            at = 0
        count = min(WORDS - at, len(out) - start)
        for n in range(count):
            y = words[at + n]
            y ^= y >> np.uint32(11)
            y ^= (y << np.uint32(7)) & _MASK_7
            y ^= (y << np.uint32(15)) & _MASK_15
            out[start + n] = y ^ (y >> np.uint32(18))
        start, at = start + count, at + count
    return at


@inner
def _logarithms(drawn: Any, scratch: Any, bits: Any, out: Any) -> None:
    """Exponential numbers of pairs of words; see `exponential`."""
    for n in range(len(out)):
        upper = np.int32(drawn[2 * n] & np.uint32(0x1FFFFF))
        lower = np.int32(drawn[2 * n + 1] ^ np.uint32(0x80000000))
        u = upper * 2.0**-21 + (lower + 2147483648.0) * 2.0**-53
        scratch[n] = 1.0 - u
    for n in range(len(out)):
        # 1 - u = 2 ** power * rest, and the rest is between sqrt(1/2) and sqrt(2).
        power = (bits[n] - _SQRT_HALF) >> 52
        bits[n] -= power << 52
        out[n] = power
    for n in range(len(out)):
        s = (scratch[n] - 1.0) / (scratch[n] + 1.0)
        z = s * s
        series = 1 / 13
        series = series * z + 1 / 11
        series = series * z + 1 / 9
        series = series * z + 1 / 7
        series = series * z + 1 / 5
        series = series * z + 1 / 3
        series = series * z + 1.0
        out[n] = -(np.float64(out[n]) * _LN2 + 2.0 * s * series)


@entry
def exponential(state: Any, words: Any, drawn: Any, scratch: Any, bits: Any, out: Any) -> None:
    """The exponential numbers that a generator gives next.

    Args:
        state: of torch's generator, uint64; it goes on.
        words: room for the state's, [WORDS] uint32.
        drawn: room for those of some numbers, [2 * some] uint32.
        scratch: room for as many numbers, [some] float64.
        bits: the same memory as int64.
        out: gets the numbers, [numbers] float32.
    """
    for n in range(WORDS):
        words[n] = np.uint32(state[FIRST + n])
    left, some = np.int64(state[LEFT] & _HALF), len(scratch)
    at = WORDS if left == 1 else np.int64(state[NEXT])
    for start in range(0, len(out), some):
        part = out[start : start + some]
        at = _next_words(at, words, drawn[: 2 * len(part)])
        _logarithms(drawn, scratch, bits, part)
    for n in range(WORDS):
        state[FIRST + n] = np.uint64(words[n])
    state[NEXT] = np.uint64(at)
    state[LEFT] = (state[LEFT] & ~_HALF) | np.uint64(WORDS + 1 - at)
