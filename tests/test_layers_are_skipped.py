"""Layers are really skipped: the calls of layers, attention and MLP are counted."""

from collections import Counter

import pytest
import torch

import adaptive_gen

PROMPT = torch.arange(1, 9)[None]


@pytest.fixture
def counted(tiny_llama):
    """A six-layer model wrapped with exits 2 and 4, and the rows every module has run on."""
    model = adaptive_gen.wrap(tiny_llama(layers=6), exit_layers=[2, 4], queue_cap=100)
    rows = Counter()

    def count(kind, index):
        def hook(module, args, output):
            shape = (output[0] if isinstance(output, tuple) else output).shape
            rows[kind, index] += shape[1]

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(count("layer", index))
        layer.self_attn.k_proj.register_forward_hook(count("key", index))
        layer.self_attn.o_proj.register_forward_hook(count("attention", index))
        layer.mlp.register_forward_hook(count("mlp", index))
    model.lm_head.register_forward_hook(lambda m, a, out: rows.update(readouts=1))
    return model, rows


def generate(model, **kwargs):
    return model.generate(
        PROMPT, adaptive=True, min_new_tokens=20, max_new_tokens=20, do_sample=False, **kwargs
    )


def test_deep_layers_never_run_for_tokens_that_left_early(counted):
    model, rows = counted
    generate(model, threshold=0.0)
    for index in range(6):
        decoded = 19 if index < 2 else 0  # the prompt, with the first token, runs at full depth
        assert rows["layer", index] == rows["mlp", index] == 8 + decoded
    assert rows["readouts"] == 20


def test_full_depth_runs_every_layer_once_and_reads_out_once(counted):
    model, rows = counted
    generate(model, threshold=1.0)
    assert {rows["layer", index] for index in range(6)} == {8 + 19}
    assert rows["readouts"] == 20, "an exit that cannot be taken must not be read out"


def test_an_exit_that_is_not_checked_costs_no_readout(counted):
    model, rows = counted
    generate(model, threshold={2: 1.0, 4: 0.0})
    assert rows["layer", 4] == 8 and rows["layer", 3] == 8 + 19
    assert rows["readouts"] == 20


class FullDepthEvery:
    """Exits at layer 2 but for every n-th token."""

    def __init__(self, n):
        self.n = n

    def may_exit(self, exit_layer, position):
        return position % self.n != 0

    def should_exit(self, check):
        return True


def test_catching_up_runs_pending_tokens_once_and_together(counted):
    model, rows = counted
    out = generate(model, policy=FullDepthEvery(5), return_dict_in_generate=True)
    assert out.report.exit_histogram == {2: 16, 6: 4}
    # Tokens 5, 10 and 15 go deep; 16 to 19 still wait when the text ends.
    assert out.report.deep_passes == 3
    assert out.report.caught_up == 12
    assert {rows["layer", index] for index in (2, 3, 4, 5)} == {8 + 15}


def test_propagated_tokens_call_no_attention_and_no_mlp(counted):
    model, rows = counted
    out = generate(model, policy=FullDepthEvery(5), kv="propagate", return_dict_in_generate=True)
    assert out.report.caught_up == 12
    for index in (2, 3, 4, 5):
        assert rows["key", index] == 8 + 15, "keys of all but the last tokens"
        assert rows["attention", index] == rows["mlp", index] == 8 + 3


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_a_full_queue_is_emptied(tiny_llama, kv):
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4], queue_cap=3)
    out = generate(model, threshold=0.0, kv=kv, return_dict_in_generate=True)
    if kv == "recompute":  # every fourth token takes the three that wait along to the end
        assert out.report.exit_histogram == {2: 15, 6: 5}
        assert out.report.caught_up > 0
    else:  # projections are cheap enough to do at once
        assert out.report.exit_histogram == {2: 19, 6: 1}
        assert out.report.caught_up > 0
