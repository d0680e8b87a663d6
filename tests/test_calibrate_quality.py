"""Losses of whole texts, worked out on paper."""

import numpy as np
import pytest

from adaptive_gen.calibrate import quality


@pytest.mark.parametrize(
    ("text", "reference", "losses"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], {"prefix": 0, "exact": 0, "mismatch": 0, "rouge": 0}),
        # One token left out: everything behind it stands elsewhere, but in the same order.
        ([1, 3, 4, 5], [1, 2, 3, 4], {"prefix": 0.75, "exact": 1, "mismatch": 0.75, "rouge": 0.25}),
        # A text that ended early: three in common of three and five.
        ([1, 2, 9], [1, 2, 3, 4, 9], {"prefix": 0.6, "exact": 1, "mismatch": 0.6, "rouge": 0.25}),
        ([7, 8], [1, 2], {"prefix": 1, "exact": 1, "mismatch": 1, "rouge": 1}),
    ],
)
def test_losses_of_texts(text, reference, losses):
    found = {name: loss(text, reference) for name, loss in quality.OF_IDS.items()}
    assert found == pytest.approx(losses)


@pytest.mark.parametrize(
    ("text", "reference", "loss"),
    [
        (b"The Nile.", b"nile", 0),
        (b"a  big_river!", b"big river", 0),
        (b"river big", b"big river", 1),
        (b"Niles", b"Nile", 1),
        (b"theatre", b"atre", 1),  # an article is a word
        (b"", b"the", 0),
    ],
)
def test_em_compares_answers_and_not_tokens(byte_tokenizer, text, reference, loss):
    ids = [
        byte_tokenizer(one.decode(), add_special_tokens=False)["input_ids"]
        for one in (text, reference)
    ]
    losses = quality.losses(byte_tokenizer)
    assert losses["em"](*ids) == losses["em"](*ids[::-1]) == loss
    assert losses["exact"](*ids) == 1, "other tokens, in all of these"
    end = byte_tokenizer.eos_token_id
    assert losses["em"]([*ids[0], end], ids[1]) == loss, (
        "the end of a text is no part of its answer"
    )


def test_rouge_counts_the_longest_common_subsequence():
    draw = np.random.default_rng(0)
    for _ in range(20):
        a, b = (draw.integers(4, size=n).tolist() for n in (9, 12))
        table = np.zeros((10, 13), int)
        for i in range(9):
            for j in range(12):
                same = table[i, j] + 1
                best = max(table[i, j + 1], table[i + 1, j])
                table[i + 1, j + 1] = same if a[i] == b[j] else best
        assert quality.rouge(a, b) == pytest.approx(1 - 2 * table[9, 12] / 21)


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        mean, low, high = quality.mean_interval(draw.normal(1.0, 1.0, 60))
        assert low < mean < high
        hits += low < 1.0 < high
    assert 88 <= hits <= 99
