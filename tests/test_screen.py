"""The screen in front of the LM head: what it says is what the whole head says."""

import itertools

import numba
import numpy as np
import pytest
import screening
import torch

from adaptive_gen.confidence import Confidences
from adaptive_gen.engine import compiled_readout
from adaptive_gen.engine.compiled_readout import CompiledConfidences, CompiledReadout
from adaptive_gen.engine.fused_readout import FusedReadout
from adaptive_gen.engine.int8 import Int8Matrix
from adaptive_gen.kernels import screen

HIDDEN, ROWS = 64, 3


@pytest.fixture
def screened(monkeypatch):
    """Make readouts of heads of any size with a screen."""
    monkeypatch.setattr(compiled_readout, "SCREENED_BYTES", 0)


def compiled(head, *args, **kwargs):
    """The readout of a head [hidden, vocab]."""
    norm = torch.nn.RMSNorm(
        HIDDEN, dtype=torch.float32 if isinstance(head, Int8Matrix) else head.dtype
    )
    fused = FusedReadout(head, norm.weight.new_tensor(0.01).detach(), *args, **kwargs)
    return CompiledReadout(fused, norm)


def readout(vocab, dtype=torch.float32, scale=2.0, plain=True):
    """A head whose columns differ in length, as those of trained models do.

    If it is not plain, it stands behind LayerNorm, has a bias, and caps its logits softly.
    """
    head = torch.randn(HIDDEN, vocab, dtype=dtype) * scale
    head[:, :20] *= 3
    if plain:
        return compiled(head)
    return compiled(head, torch.randn(vocab, dtype=dtype) * scale, centred=True, softcap=6.0)


def hidden_states(of, count):
    """States that say some token, surely or hardly, [count, HIDDEN]."""
    head = of._long.head
    token = torch.randint(head.shape[1], (count,))
    sure = torch.rand(count, 1, dtype=head.dtype)
    return head[:, token].T * sure + torch.randn(count, HIDDEN, dtype=head.dtype) * 2


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [16, 250, 512])
def test_the_token_is_that_of_the_whole_head(vocab, dtype, plain, screened):
    torch.manual_seed(0)
    of = readout(vocab, dtype, plain=plain)
    desk = of.with_room(ROWS)
    for states in hidden_states(of, 60 * ROWS).split(ROWS):
        screening.look(states.numpy(), desk)
        found = [screening.token_of(row, desk) for row in range(ROWS)]
        assert found == of(states).argmax(-1).tolist()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", ["margin", "max_prob", "entropy"])
def test_the_same_tokens_leave_as_with_the_whole_head(measure, dtype, plain, screened):
    """At thresholds far from a confidence and a little above and below it."""
    torch.manual_seed(1)
    of, off = readout(500, dtype, scale=1.0, plain=plain), []
    little = 1e-3 if dtype == torch.float32 else 1e-9
    desk, index = of.with_room(ROWS), screen.MEASURES.index(measure)
    for states in hidden_states(of, 40 * ROWS).split(ROWS):
        logits = of(states)
        exact = CompiledConfidences(Confidences(measure))(logits, 2)
        near = [raw + step for raw in exact for step in (-little, little)]
        for least, row in itertools.product([-np.inf, 0.2, 0.5, 0.8, *near, np.inf], range(ROWS)):
            screening.look(states.numpy(), desk)
            raw, token = screening.leaves(row, least, index, desk)
            leaves = exact[row] >= least
            assert token == (int(logits[row].argmax()) if leaves else -1)
            if leaves:
                off.append(abs(raw - exact[row]))
    assert len(off) > 100
    assert max(off) <= screen.WIDTH / 2 + 1e-6
    assert np.quantile(off, 0.9) <= screen.WIDTH / 20


def test_no_logit_is_off_by_more_than_it_is_doubted(screened):
    torch.manual_seed(2)
    of = readout(256)
    desk = of.with_room(ROWS)
    doubt = desk[6][2]
    for states in hidden_states(of, 20 * ROWS).split(ROWS):
        screening.look(states.numpy(), desk)
        off = np.abs(desk[4] - of(states).numpy())
        assert (off.reshape(ROWS, len(doubt), -1).max(-1) <= doubt).all()
        assert off.max() > 0, "the screen is not the head itself"


def test_of_equal_logits_the_first_counts(screened):
    head = torch.zeros(HIDDEN, 48)
    head[:, [7, 20, 40]] = torch.randn(HIDDEN, 1)
    of = compiled(head)
    desk = of.with_room(1)
    screening.look(head[:, 7][None].numpy(), desk)
    assert screening.token_of(0, desk) == 7
    raw, token = screening.leaves(0, 0.0, screen.MARGIN, desk)
    assert (token, raw) == (7, pytest.approx(0.0, abs=screen.WIDTH / 2))


def test_a_token_is_found_without_most_of_the_head(screened):
    """Panels that cannot hold the largest logit are not read: what stands there does not matter."""
    torch.manual_seed(3)
    of = readout(512)
    states = of._long.head[:, 100][None].contiguous()
    desk = of.with_room(1)
    screening.look(states.numpy(), desk)
    token, read = screening.token_of(0, desk), desk[6][5].copy()
    assert read.sum() < len(read) / 4
    of.panels[~read] = np.nan
    screening.look(states.numpy(), desk)
    assert screening.token_of(0, desk) == token


def test_small_heads_and_those_in_8_bits_have_no_screen(monkeypatch):
    assert not readout(64).with_room(1)[6][0].size
    monkeypatch.setattr(compiled_readout, "SCREENED_BYTES", 0)
    assert readout(64).with_room(1)[6][0].size
    head = torch.randn(HIDDEN, 64)
    rounded = compiled(Int8Matrix.of(head))
    assert not rounded.with_room(1)[6][0].size


def test_what_is_compiled_for_heads_with_a_screen_is_what_runs_those_without(monkeypatch):
    without = numba.typeof(readout(64).with_room(1))
    monkeypatch.setattr(compiled_readout, "SCREENED_BYTES", 0)
    assert numba.typeof(readout(64).with_room(1)) == without


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_states_without_a_number_still_give_a_token(count, plain, screened):
    of = readout(16 * count, plain=plain)
    desk = of.with_room(1)
    nothing = np.full((1, HIDDEN), np.nan, np.float32)
    screening.look(nothing, desk)
    assert 0 <= screening.token_of(0, desk) < 16 * count
    for measure in (screen.MARGIN, screen.MAX_PROB, screen.ENTROPY):
        screening.look(nothing, desk)
        assert screening.leaves(0, 0.5, measure, desk)[1] == -1, "and none leaves"
