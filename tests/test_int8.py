"""`weights="int8"`: the fused back end over weights rounded to 8 bits."""

from dataclasses import replace

import pytest
import torch

import adaptive_gen
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.fused import FusedSegment
from adaptive_gen.engine.fusing import fuse, stacked
from adaptive_gen.engine.int8 import MATRICES, Int8Matrix, quantised
from adaptive_gen.engine.workspace import Workspace
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.exit_readouts import add_readouts
from adaptive_gen.gate import Gate
from adaptive_gen.settings import state

PROMPT = torch.arange(3, 11)[None]


def gated(model):
    """With a gate whose answers hang on the final norm's gain, which is none of bfloat16's."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.model.norm.weight.copy_((1 + torch.rand(32, generator=generator)).bfloat16())
    weights = {layer: torch.randn(32, generator=generator) * 0.2 for layer in (2, 4)}
    state(model).gate = Gate(weights, {layer: torch.tensor(0.1) for layer in (2, 4)})
    return model


def test_no_entry_is_off_by_more_than_half_a_step():
    matrix = torch.randn(48, 32) * torch.logspace(-3, 1, 32)
    rounded = Int8Matrix.of(matrix)
    assert rounded.steps.dtype == torch.int8
    error = (rounded.float() - matrix).abs()
    # The scale is kept in bfloat16, so the largest entry may be cut off by its rounding.
    assert (error <= rounded.scale.float() * (0.5 + 127 * 2**-8)).all()
    assert ((error <= rounded.scale.float() * 0.501).float().mean()) > 0.95


def test_a_column_of_zeros_stays_zero():
    assert (Int8Matrix.of(torch.zeros(16, 16)).float() == 0).all()


@torch.no_grad()
def test_it_computes_the_model_with_rounded_weights(tiny_llama):
    """Up to bfloat16, in which the activations enter each product."""
    decoder = Decoder(tiny_llama().eval())
    ours = fuse(decoder, quantised)
    layers = [
        replace(layer, **{name: getattr(layer, name).float() for name in MATRICES})
        for layer in ours.layers
    ]
    hidden, n_layers = decoder.embed(torch.arange(3, 23)[None]), decoder.n_layers
    states = []
    for model in (ours, replace(ours, layers=layers)):
        workspace = Workspace(model.sizes)
        segment = FusedSegment(model, 0, n_layers, stacked(model, 0, n_layers), workspace)
        states.append(segment.run(hidden, KVCache(n_layers)).clone())
    assert 0 < (states[0] - states[1]).norm() / states[1].norm() < 0.05


@torch.no_grad()
def test_keys_and_values_are_those_of_a_run_token_by_token(tiny_llama):
    decoder = Decoder(tiny_llama().eval())
    (segment,) = Backend(decoder, "fused", "int8").segments([decoder.n_layers])
    ids = torch.arange(3, 15)[None]
    together, apart = KVCache(decoder.n_layers), KVCache(decoder.n_layers)
    segment.run(decoder.embed(ids), together)
    for token in ids.split(1, dim=1):
        segment.run(decoder.embed(token), apart)
    for layer in range(decoder.n_layers):
        for a, b in zip(together.keys_values(layer), apart.keys_values(layer), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_generation_says_what_it_ran_on(tiny_llama, kv):
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4], weights="int8")
    out = model.generate(
        PROMPT, adaptive=True, threshold=0.3, kv=kv, max_new_tokens=20, return_dict_in_generate=True
    )
    assert out.report.engine == "compiled-int8"
    assert len(out.exit_layers[0]) == out.report.new_tokens


def test_a_model_that_fused_cannot_run_has_no_int8_weights(tiny_llama):
    with pytest.raises(OptionError, match="weights='int8' is for the back ends compiled and fused"):
        adaptive_gen.wrap(tiny_llama(), engine="module", weights="int8")
    with pytest.raises(OptionError, match="weights='int4' is unknown; use one of own, int8"):
        adaptive_gen.wrap(tiny_llama(), weights="int4")


@pytest.mark.parametrize("engine", ["compiled", "fused"])
@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.3},
        {"threshold": 0.3, "lossless": True},
        {"threshold": 0.6, "confidence": "gate"},
        {"threshold": 0.6, "confidence": "gate", "repetition_penalty": 1.01},
        {"threshold": 1.0},
    ],
)
def test_a_bfloat16_checkpoint_is_rounded_as_its_float32_copy_is(tiny_llama, engine, settings):
    """Tokens, exits and confidences: nothing is computed in bfloat16."""
    outs = []
    for model in (tiny_llama().bfloat16(), tiny_llama().bfloat16().float()):
        model = gated(adaptive_gen.wrap(model, [2, 4], engine=engine, weights="int8"))
        out = model.generate(
            PROMPT,
            adaptive=True,
            **settings,
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
        )
        sure = out.confidences.nan_to_num(2)
        outs.append((out.sequences.tolist(), out.exit_layers.tolist(), sure.tolist()))
        assert out.report.engine == f"{engine}-int8"
        assert next(model.parameters()).dtype == (
            torch.float32 if len(outs) > 1 else torch.bfloat16
        )
    assert outs[0] == outs[1]


def test_a_batch_of_a_bfloat16_checkpoint_is_its_float32_copys(tiny_llama):
    texts = []
    for model in (tiny_llama().bfloat16(), tiny_llama().bfloat16().float()):
        model = adaptive_gen.wrap(model, exit_layers=[2, 4], weights="int8")
        ids = torch.stack([PROMPT[0], PROMPT[0] + 20])
        texts.append(
            model.generate(ids, adaptive=True, threshold=0.3, max_new_tokens=30, do_sample=False)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["head", "block"])
@pytest.mark.parametrize("confidence", ["margin", "entropy", "gate"])
def test_a_bfloat16_checkpoints_own_readouts_are_read(tiny_llama, kind, confidence):
    model = tiny_llama().bfloat16()
    add_readouts(model, [2, 4, model.config.num_hidden_layers], kind)
    model.exit_readouts.bfloat16()
    model = gated(adaptive_gen.wrap(model.eval(), exit_layers=[2, 4], weights="int8"))
    out = model.generate(
        PROMPT,
        adaptive=True,
        threshold=0.1,
        confidence=confidence,
        max_new_tokens=20,
        return_dict_in_generate=True,
    )
    assert out.report.engine == "compiled-int8" and 2 in out.report.exit_histogram


@pytest.mark.parametrize("asked", [{"audit": True}, {"prefill": "lazy"}, {"kv": "propagate"}])
def test_a_bfloat16_checkpoint_goes_all_ways_its_float32_copy_goes(tiny_llama, asked):
    texts = []
    for model in (tiny_llama().bfloat16(), tiny_llama().bfloat16().float()):
        model = adaptive_gen.wrap(model, exit_layers=[2, 4], weights="int8")
        keywords = {"threshold": 0.3, "max_new_tokens": 30, "do_sample": False, **asked}
        out = model.generate(
            PROMPT, adaptive=True, repetition_penalty=1.1, return_dict_in_generate=True, **keywords
        )
        texts.append(out.sequences)
        more = {"past_key_values": out.past_key_values, "max_new_tokens": 10}
        texts[-1] = model.generate(out.sequences, adaptive=True, **{**keywords, **more})
    assert torch.equal(*texts)


def test_float16_on_a_cpu_is_told_what_can_be_rounded(tiny_llama):
    with pytest.raises(ModelError, match="for bfloat16 with weights='int8'"):
        adaptive_gen.wrap(tiny_llama().half(), weights="int8")
