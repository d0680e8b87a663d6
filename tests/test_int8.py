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
from adaptive_gen.errors import OptionError

PROMPT = torch.arange(3, 11)[None]


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


@pytest.mark.parametrize("inner", [4, 8, 12, 24, 40, 200, 260])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_reads_nothing_behind_a_matrix_of_any_width(inner, rows):
    """torch's kernel does: it crashes there, or takes what it finds for numbers."""
    matrix, x = Int8Matrix.of(torch.randn(inner, 40)), torch.randn(rows, inner).bfloat16()
    torch.testing.assert_close(matrix(x).float(), x.float() @ matrix.float(), rtol=0.02, atol=0.1)


@torch.no_grad()
def test_it_computes_the_model_with_rounded_weights(tiny_llama):
    """Up to bfloat16, in which the activations enter each product."""
    decoder = Decoder(tiny_llama().eval())
    ours = fuse(decoder, lambda _, prepared, __: quantised(prepared))
    layers = [
        replace(layer, **{name: getattr(layer, name).float() for name in MATRICES})
        for layer in ours.layers
    ]
    hidden, n_layers = decoder.embed(torch.arange(3, 23)[None]), decoder.n_layers
    states = []
    for model in (ours, replace(ours, layers=layers)):
        workspace = Workspace(model.sizes, len(model.turns))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_long_prompts_are_what_they_are_alone(tiny_llama, dtype):
    """Alone or among others, a prompt of any length runs through the same products."""
    model = adaptive_gen.wrap(tiny_llama().to(dtype), weights="int8")
    lengths, width = (150, 40, 97, 12), 150
    ids = torch.randint(2, 96, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[int(t >= width - n) for t in range(width)] for n in lengths])
    settings = {"adaptive": True, "threshold": 0.01, "max_new_tokens": 20, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(ids, attention_mask=mask, **settings)
    assert whole.report.engine == "compiled-int8"
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, width - length :], **settings)
        assert alone.sequences[0, length:].tolist() == whole.sequences[row, width:].tolist()
        for ours, theirs in zip(alone.logits, whole.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[row], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_states_are_read_out_alike_however_many_they_are(tiny_llama):
    backend = Backend(Decoder(tiny_llama().eval()), "compiled", "int8")
    backend.segments([6])
    readout, hidden = backend.readout(), torch.randn(40, 32)
    apart = torch.cat([readout(states, 6) for states in hidden.split(8)])
    torch.testing.assert_close(readout(hidden, 6), apart, atol=1e-3, rtol=1e-3)
