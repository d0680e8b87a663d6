"""Ten thousand tokens in one text: nothing grows but the cache, and the cache stays exact."""

import os

import families
import pytest
import torch
from driving import Sure, decode, prefill

import adaptive_gen
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.rules import Rules
from adaptive_gen.engine.scheduler import Scheduler
from adaptive_gen.settings import state

TOKENS = 10_000


class Ragged:
    """Runs of shallow tokens of every length up to beyond the queue's capacity."""

    def may_exit(self, exit_layer, position):
        return position % 29 != 28 and exit_layer == (1 if position % 7 else 2)

    def should_exit(self, check):
        return True


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's own counts")
def test_memory_is_flat_and_keys_stay_exact():
    model = adaptive_gen.wrap(
        families.make(
            "llama",
            torch.float64,
            num_hidden_layers=3,
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=TOKENS + 64,
        ),
        exit_layers=[1, 2],
    )
    decoder, segments = state(model).decoder, state(model).backend.segments((1, 2, 3))
    cache = KVCache(3, capacity=TOKENS + 64)
    scheduler = Scheduler(decoder, segments, cache, Ragged(), Sure(), Rules(queue_cap=8))
    ids = torch.randint(2, 96, (1, TOKENS))
    with torch.no_grad():
        prefill(scheduler, ids[:, :16])
        for i in range(16, TOKENS):
            decode(scheduler, ids[:, i : i + 1])
            if i == 1_000:
                warm = resident_bytes()
        grown = resident_bytes() - warm
        # The cache's own pages are touched as it fills: 3 layers of keys and values of 8 doubles.
        own = 3 * 2 * TOKENS * 8 * 8
        # Attention scores and rotary tables grow with the text, by a few rows of it.
        assert grown < own + 24 * 2**20, f"{grown / 2**20:.1f} MiB"
        scheduler.flush()
        expected = KVCache(3, capacity=TOKENS)
        (whole,) = state(model).backend.segments((3,))
        for part in ids.split(500, dim=1):
            whole.run(decoder.embed(part), expected)
    assert cache.lengths == expected.lengths == [(TOKENS,)] * 3
    for layer in range(3):
        for ours, theirs in zip(cache.keys_values(layer), expected.keys_values(layer), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
