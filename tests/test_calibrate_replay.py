"""Replay is what decoding really does, up to the first token that full depth would not write."""

import numpy as np
import pytest
import torch

import adaptive_gen
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.calibrate.replay import LOSSES, Replayed, Rule, replay
from adaptive_gen.paired import generate
from adaptive_gen.prompts import bench_prompts, inputs
from adaptive_gen.settings import state

KV = ("recompute", "propagate")


def compare(model, prompts, rule, kv, tokens, exit_layers):
    """Hold the replay against decoding; return it and how many texts diverged."""
    trace = collect(model, prompts, exit_layers, tokens)
    cap = state(model).queue_cap
    replayed = replay(trace, rule, kv=kv, queue_cap=cap, model=model)
    for i, ids in enumerate(prompts):
        out, _ = generate(
            model,
            ids,
            adaptive=True,
            threshold=rule.thresholds,
            exit_layers=sorted(rule.thresholds),
            confidence=rule.measure,
            kv=kv,
            max_new_tokens=tokens,
        )
        real, text = out.sequences[0].tolist(), trace.texts[i].tolist()
        pairs = zip(real[ids.shape[1] :], text[ids.shape[1] :], strict=False)
        first = next((t for t, (a, b) in enumerate(pairs) if a != b), trace.lengths[i])
        assert replayed.first_divergence[i] == first
        seen = slice(None, min(first + 1, trace.lengths[i]))
        assert replayed.depths[i, seen].tolist() == out.exit_layers[0, seen].tolist()
    return replayed


def between(values, share):
    """A number that this share of the values stays below, halfway between two of them.

    Decoding and replay round differently: at one of the values itself they may part.
    """
    ordered = np.unique(values)
    index = int(share * (len(ordered) - 1))
    return float(ordered[index : index + 2].mean())


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("cap", [1, 3, 16])
@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_replay_is_decoding_up_to_the_first_divergence(tiny_llama, kv, cap, measure):
    # Residual streams that grow slowly: exits agree often, but not always.
    model = tiny_llama(layers=6, initializer_range=0.12, eos_token_id=None)
    adaptive_gen.wrap(model, exit_layers=[1, 2, 4], queue_cap=cap)
    draw = torch.Generator().manual_seed(cap)
    prompts = [torch.randint(200, (1, n), generator=draw) for n in (1, 5, 9, 14)]
    diverged, kept = 0, 0
    trace = collect(model, prompts, (1, 2, 4, 6), 24)
    for share in (0.05, 0.2, 0.5, 0.8, 0.95):
        # Thresholds that this share of the tokens stays below, another one at each exit.
        thresholds = {e: between(trace.at(measure, k)[0], share) for k, e in enumerate((1, 2, 4))}
        rule = Rule(measure, {}, thresholds)
        replayed = compare(model, prompts, rule, kv, 24, (1, 2, 4, 6))
        diverged += (replayed.first_divergence < 24).sum()
        kept += (replayed.first_divergence > 1).sum()
        assert len(np.unique(replayed.depths)) > 1
    assert diverged and kept, "a comparison of nothing but first tokens shows nothing"


@pytest.mark.parametrize("kv", KV)
def test_replay_is_decoding_with_the_built_in_model(kv):
    model, tokenizer = adaptive_gen.load()
    prompts = inputs(model, tokenizer, bench_prompts()[:6], 24)
    calibration = state(model).calibration
    curves = calibration.maps["margin"]
    for threshold in (0.5, 0.8, 0.9):
        rule = Rule("margin", curves, dict.fromkeys((3, 6, 9), threshold))
        compare(model, prompts, rule, kv, 24, state(model).exit_layers)


def test_a_threshold_of_one_never_leaves_and_zero_always(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(eos_token_id=None), exit_layers=[2, 4])
    prompts = [torch.tensor([[3, 4, 5]])]
    for kv in KV:
        never = compare(model, prompts, Rule("margin", {}, {2: 1.0, 4: 1.0}), kv, 6, (2, 4, 6))
        assert set(never.depths[0].tolist()) == {6}
        assert never.prefix_loss.tolist() == never.exact_loss.tolist() == [0.0]
        always = compare(model, prompts, Rule("margin", {}, {2: 0.0}), kv, 6, (2, 4, 6))
        seen = int(always.first_divergence[0])
        assert set(always.depths[0, 1 : seen + 1].tolist()) == {2}


def test_losses_worked_out_on_paper():
    same = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]], dtype=bool)
    replayed = Replayed(np.array([4, 3, 2]), np.zeros((3, 4), np.int16), same)
    assert replayed.first_divergence.tolist() == [2, 3, 1]
    assert LOSSES["prefix"](replayed).tolist() == [0.5, 0.0, 0.5]
    assert LOSSES["exact"](replayed).tolist() == [1.0, 0.0, 1.0]
