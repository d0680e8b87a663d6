"""Checkpoints in bfloat16 and float16 on CPUs: their weights as they are, hidden states in float32.

What they generate is what their float32 copies generate, the same numbers in twice the memory, but
after prompts that are long enough to run through their own layers, where torch is quick at that.
"""

import copy
import logging

import families
import pytest
import screening
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaptive_gen
from adaptive_gen.confidence import Confidences
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine import compiled, compiled_readout
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.cache import KVCache, Span
from adaptive_gen.engine.compiled import MOST_ROWS
from adaptive_gen.engine.folding import wide
from adaptive_gen.engine.fused_readout import narrow_readout
from adaptive_gen.engine.fusing import fuse, narrowed
from adaptive_gen.engine.int8 import MATRICES
from adaptive_gen.engine.rules import QUEUE_CAP
from adaptive_gen.errors import ModelError
from adaptive_gen.exit_readouts import add_readouts
from adaptive_gen.gate import Gate
from adaptive_gen.kernels import screen
from adaptive_gen.settings import state

PROMPT = torch.arange(3, 11)[None]
HALVES = [torch.bfloat16, torch.float16]
either = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


@pytest.fixture(params=[True, False], ids=["torch is slow", "torch is quick"])
def slow(request, monkeypatch):
    """Whether torch is taken to be slow in half precision, as it is on some processors."""
    monkeypatch.setattr(compiled, "is_slow", lambda dtype: request.param)
    return request.param


def gated(model):
    """With a gate whose answers hang on the final norm's gain, which is none of bfloat16's."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.model.norm.weight.copy_((1 + torch.rand(32, generator=generator)).bfloat16())
    weights = {layer: torch.randn(32, generator=generator) * 0.2 for layer in (2, 4)}
    state(model).gate = Gate(weights, {layer: torch.tensor(0.1) for layer in (2, 4)})
    return model


def two_of(make, dtype, **wrapping):
    """A checkpoint in half precision and its float32 copy, wrapped."""
    for model in (make().to(dtype), make().to(dtype).float()):
        yield gated(adaptive_gen.wrap(model, [2, 4], **wrapping))


def generated(model, prompt=PROMPT, **settings):
    """What can be compared of a generation, and its report."""
    out = model.generate(
        prompt,
        adaptive=True,
        do_sample=False,
        return_dict_in_generate=True,
        **{"max_new_tokens": 40, **settings},
    )
    sure = out.confidences.nan_to_num(2)
    return (out.sequences.tolist(), out.exit_layers.tolist()), sure, out


@either
@pytest.mark.parametrize(
    "wrapping",
    [{}, {"weights": "int8"}, {"weights": "int8", "engine": "fused"}],
    ids=["own", "int8", "int8-fused"],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.3},
        {"threshold": 0.3, "kv": "propagate"},
        {"threshold": 0.3, "lossless": True},
        {"threshold": 0.6, "confidence": "gate"},
        {"threshold": 0.6, "confidence": "gate", "repetition_penalty": 1.01},
        {"threshold": 0.3, "confidence": "entropy", "audit": True},
        {"threshold": 0.3, "prefill": "lazy"},
        {"threshold": 1.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_tokens_exits_and_confidences_are_the_float32_copys(tiny_llama, dtype, wrapping, settings):
    half, single = two_of(tiny_llama, dtype, **wrapping)
    (ours, sure, out), (theirs, sure_too, _) = (generated(m, **settings) for m in (half, single))
    assert ours == theirs
    torch.testing.assert_close(sure, sure_too, atol=1e-4, rtol=0)
    named = wrapping.get("engine", "compiled") + ("-int8" if "weights" in wrapping else "")
    assert out.report.engine == named
    assert next(half.parameters()).dtype == dtype, "the model itself is left as it was"


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("weights", ["own", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_is_asked_in_python_as_of_the_float32_copy(dtype, weights, family):
    """Where a logits processor keeps texts from compiled stretches; LayerNorm takes one dtype."""
    narrow, texts = families.make(family, dtype), []
    for model in (narrow, copy.deepcopy(narrow).float()):
        model = adaptive_gen.wrap(model, exit_layers=[3], engine="compiled", weights=weights)
        torch.manual_seed(0)
        state(model).gate = Gate({3: torch.randn(32)}, {3: torch.tensor(0.1)})
        settings = {"confidence": "gate", "threshold": 0.5, "no_repeat_ngram_size": 2}
        ids, how = torch.arange(5, 22)[None], {"max_new_tokens": 12, "do_sample": False}
        out = model.generate(ids, adaptive=True, return_dict_in_generate=True, **settings, **how)
        texts.append((out.sequences.tolist(), out.report.exit_histogram))
    assert texts[0] == texts[1]


@either
@pytest.mark.parametrize("family", families.PARTICULAR)
def test_whatever_a_familys_layers_do_is_kept_beside_the_weights(family, dtype):
    half, single = (families.make(family, dtype), families.make(family, dtype).float())
    outs = []
    for model in (half, single):
        model = adaptive_gen.wrap(model, exit_layers=[2, 4])
        found, _, out = generated(model, threshold=0.05)
        outs.append(found)
        assert out.report.engine == "compiled"
    assert outs[0] == outs[1]


@either
@pytest.mark.parametrize("weights", ["own", "int8"])
def test_a_batch_is_its_float32_copys(tiny_llama, dtype, weights):
    ids = torch.stack([PROMPT[0], PROMPT[0] + 20])
    outs = [generated(m, ids, threshold=0.3)[0] for m in two_of(tiny_llama, dtype, weights=weights)]
    assert outs[0] == outs[1]


@either
@pytest.mark.parametrize("asked", [{"audit": True}, {"prefill": "lazy"}, {"kv": "propagate"}])
@pytest.mark.parametrize("weights", ["own", "int8"])
def test_a_text_is_continued_as_its_float32_copys(tiny_llama, dtype, asked, weights):
    texts = []
    for model in two_of(tiny_llama, dtype, weights=weights):
        keywords = {"threshold": 0.3, "max_new_tokens": 30, "do_sample": False, **asked}
        out = model.generate(
            PROMPT, adaptive=True, repetition_penalty=1.1, return_dict_in_generate=True, **keywords
        )
        more = {"past_key_values": out.past_key_values, "max_new_tokens": 10}
        texts.append(model.generate(out.sequences, adaptive=True, **{**keywords, **more}))
    assert torch.equal(*texts)


@either
@pytest.mark.parametrize("kind", ["head", "block"])
@pytest.mark.parametrize("confidence", ["margin", "entropy", "gate"])
@pytest.mark.parametrize("weights", ["own", "int8"])
def test_readouts_of_their_own_are_read(tiny_llama, dtype, kind, confidence, weights):
    model = tiny_llama().to(dtype)
    add_readouts(model, [2, 4, model.config.num_hidden_layers], kind)
    model.exit_readouts.to(dtype)
    model = gated(adaptive_gen.wrap(model.eval(), exit_layers=[2, 4], weights=weights))
    _, _, out = generated(model, threshold=0.1, confidence=confidence, max_new_tokens=20)
    assert out.report.engine.startswith("compiled") and 2 in out.report.exit_histogram


@either
@torch.no_grad()
def test_long_blocks_and_short_ones_leave_one_cache(tiny_llama, dtype, slow):
    """Long ones run through the model's own layers, half precision meets float32, or in pieces."""
    model = tiny_llama().to(dtype).eval()
    decoder = Decoder(model)
    (segment,) = Backend(decoder).segments([decoder.n_layers])
    ids = torch.randint(3, 200, (1, 260))
    cache, reference = KVCache(decoder.n_layers), KVCache(decoder.n_layers)
    outs = [
        segment.run(decoder.embed(part).float(), cache).clone()
        for part in ids.split([120, 1, 3, 120, 1, 15], dim=1)
    ]
    single = Decoder(tiny_llama().to(dtype).float().eval())
    expected = single.run(single.embed(ids), 0, single.n_layers, reference)
    error = (torch.cat(outs, 1) - expected).norm() / expected.norm()
    allowed = 1e-5 if slow else 8 * torch.finfo(dtype).eps
    assert error < allowed
    for layer in range(decoder.n_layers):
        pairs = zip(cache.keys_values(layer), reference.keys_values(layer), strict=True)
        for ours, theirs in pairs:
            assert (ours - theirs).norm() / theirs.norm() < allowed


@either
@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_a_long_prompt_leaves_the_keys_and_values_of_the_models_own_layers(
    tiny_llama, dtype, kv, monkeypatch
):
    """To the bit: it ran there, and tokens decoded afterwards see what it left."""
    monkeypatch.setattr(compiled, "is_slow", lambda dtype: False)
    model = adaptive_gen.wrap(tiny_llama().to(dtype), exit_layers=[2, 4])
    prompt = torch.randint(3, 200, (1, 130))
    found, _, out = generated(model, prompt, threshold=0.3, kv=kv)
    assert out.report.engine == "compiled" and len(found[1][0]) == 40
    decoder, own = state(model).decoder, KVCache(6)
    with torch.no_grad():
        decoder.run(decoder.embed(prompt), 0, 6, own)
    for layer in range(6):
        ours = out.past_key_values._scheduler.cache.keys_values(layer)
        for one, other in zip(ours, own.keys_values(layer), strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one[:, :, :130], other.float())


@either
@pytest.mark.parametrize("settings", [{}, {"kv": "propagate"}, {"lossless": True}])
def test_where_torch_is_slow_a_long_prompt_is_followed_by_the_float32_copys_text(
    tiny_llama, dtype, settings, monkeypatch
):
    monkeypatch.setattr(compiled, "is_slow", lambda dtype: True)
    prompts = torch.randint(3, 200, (3, 230))
    prompts[0, :200], prompts[1, :3] = 0, 0
    mask = (prompts > 0).long()
    for these in (slice(2, 3), slice(0, 3)):
        outs = []
        for model in two_of(tiny_llama, dtype):
            options = {"threshold": 0.3, "attention_mask": mask[these], **settings}
            found, _, out = generated(model, prompts[these], pad_token_id=0, **options)
            outs.append(found)
            assert out.report.engine == "compiled"
        assert outs[0] == outs[1]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_pieces_are_all_tokens_of_a_block_each_rows_in_order(rows, most):
    starts, counts = zip(*rows, strict=True)
    places = tuple(range(1, 2 * len(rows), 2))  # of the cache
    for named in (None, places):
        left = [[*range(start, start + count)] for start, count in rows]
        for taken, times, piece in compiled.pieces(Span(starts, counts, named), most):
            assert sum(piece.counts) <= most and piece.time == times.stop - times.start
            assert piece.rows == tuple(named[row] if named else row for row in taken)
            for row, start, count in zip(taken, piece.starts, piece.counts, strict=True):
                assert [left[row].pop(0) for _ in range(count)] == [*range(start, start + count)]
                assert start == starts[row] + times.start
        assert not any(left)


@pytest.mark.parametrize("ratio, slow", [(0.5, False), (1.5, False), (3, True)])
def test_torch_is_slow_where_half_precision_takes_far_longer_than_float32(ratio, slow, monkeypatch):
    times = iter([1.0] * compiled._TRIALS + [ratio] * compiled._TRIALS)
    monkeypatch.setattr(compiled, "_timed", lambda run: (run(), next(times))[1])
    assert compiled.is_slow.__wrapped__(torch.bfloat16) == slow


def test_rotations_that_depend_on_a_texts_length_are_those_of_the_whole_prompt(monkeypatch):
    monkeypatch.setattr(compiled, "is_slow", lambda dtype: True)
    model = families.make("llama_dynamic_rope", max_position_embeddings=64).to(torch.bfloat16)
    decoder, ids = Decoder(model.eval()), torch.randint(3, 90, (1, 230))
    (segment,) = Backend(decoder, "compiled").segments([decoder.n_layers])
    cache, own = KVCache(decoder.n_layers), KVCache(decoder.n_layers)
    with torch.no_grad():
        segment.run(decoder.embed(ids).float(), cache)
        decoder.run(decoder.embed(ids), 0, decoder.n_layers, own)
    for ours, theirs in zip(cache.keys_values(0), own.keys_values(0), strict=True):
        assert torch.equal(ours, theirs.float())


def test_one_long_row_in_a_batch_is_not_cut_smaller_for_the_others():
    span = Span((0,) * 16, (2000, *[50] * 15))
    assert len([*compiled.pieces(span, 96)]) < 32


def test_what_waits_is_caught_up_by_kernels_and_not_in_bfloat16(tiny_llama):
    """A full queue and the newest token are more tokens than a prompt that kernels run best."""
    outs = []
    for model in two_of(tiny_llama, torch.bfloat16):
        settings = {"threshold": 0.0, "confidence": "margin", "repetition_penalty": 1.01}
        found, _, out = generated(model, max_new_tokens=60, **settings)
        outs.append(found)
        assert out.report.caught_up > QUEUE_CAP
    assert outs[0] == outs[1]


@either
@torch.no_grad()
def test_a_prepared_layer_stands_for_the_folded_one(tiny_llama, dtype):
    """Gains and factors that stay beside the weights make what is folded into float32 ones."""
    decoder = Decoder(tiny_llama().to(dtype).eval())
    for norm in (decoder.layers[0].input_layernorm, decoder.layers[0].post_attention_layernorm):
        norm.weight.copy_(1 + torch.rand(len(norm.weight)))
    beside, folded = (fuse(decoder, kept).layers for kept in (narrowed, lambda _, layer, __: layer))
    for one, other in zip(beside, folded, strict=True):
        for name in MATRICES:
            matrix = getattr(one, name)
            assert matrix.rows().dtype == dtype
            torch.testing.assert_close(matrix.float(), getattr(other, name))


@either
@torch.no_grad()
@pytest.mark.parametrize("measure", ["margin", "max_prob", "entropy"])
def test_a_screened_head_says_what_the_whole_head_says(tiny_llama, dtype, measure, monkeypatch):
    """The gain is folded into the screen and beside the weights: a bar is a bar for both."""
    monkeypatch.setattr(compiled_readout, "SCREENED_BYTES", 0)
    decoder = Decoder(tiny_llama(vocab_size=500).to(dtype).eval())
    norm, head, *_ = decoder.plain_readout
    norm.weight.copy_(0.2 + 3 * torch.rand(len(norm.weight)))
    made = narrow_readout(norm, head)
    of = compiled_readout.CompiledReadout(made, wide(norm))
    states = 2 * torch.randn(60, 3, norm.weight.numel())
    desk, index = of.with_room(3), screen.MEASURES.index(measure)
    torch.testing.assert_close(of(states[0]), made(states[0]))
    expected = torch.nn.functional.linear(norm.float()(states), head.weight.float())
    for some, logits in zip(states, expected, strict=True):
        tokens = logits.argmax(-1).tolist()
        screening.look(some.numpy(), desk)
        assert [screening.token_of(row, desk) for row in range(3)] == tokens
        for row, sure in enumerate(Confidences(measure)(logits, 2)):
            for least, token in ((sure - 1e-3, tokens[row]), (sure + 1e-3, -1)):
                screening.look(some.numpy(), desk)
                assert screening.leaves(row, least, index, desk)[1] == token


@either
@torch.no_grad()
def test_many_rows_are_read_out_as_few_are(tiny_llama, dtype):
    decoder = Decoder(tiny_llama().to(dtype).eval())
    backend = Backend(decoder)
    backend.segments([decoder.n_layers])
    readout, states = backend.readout(), torch.randn(2 * MOST_ROWS + 3, 32)
    apart = torch.cat([readout(row, decoder.n_layers) for row in states.split(1)])
    torch.testing.assert_close(readout(states, decoder.n_layers), apart)


def test_weights_changed_afterwards_are_used(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama().bfloat16(), exit_layers=[2, 4])
    before, _, _ = generated(model, threshold=1.0)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(-3)
    after, _, _ = generated(model, threshold=1.0)
    assert after != before
    other = tiny_llama().bfloat16()
    other.model.layers[3].mlp.down_proj.weight.data.mul_(-3)
    assert generated(adaptive_gen.wrap(other, [2, 4]), threshold=1.0)[0] == after


def test_layers_of_several_dtypes_are_left_to_the_model(tiny_llama):
    model = tiny_llama().bfloat16()
    model.model.layers[2].mlp.down_proj.float()
    assert "not all of one dtype" in fuse_reason(model)


def test_a_processor_that_cannot_convert_float16_is_left_to_the_model(tiny_llama, monkeypatch):
    monkeypatch.setattr("adaptive_gen.kernels.processor.CONVERTS_FLOAT16", False)
    assert "cannot convert float16" in fuse_reason(tiny_llama().half())


def fuse_reason(model):
    backend = Backend(Decoder(model.eval()))
    backend.segments([2, 6])
    assert backend.name == "module"
    return backend.reason


def test_a_calibration_made_on_the_models_own_layers_keeps_to_them(tiny_llama):
    backend = Backend(Decoder(tiny_llama().bfloat16().eval()), measured_on="module")
    backend.segments([2, 6])
    assert (backend.name, backend.reason) == ("module", "the calibration was made on it")


def test_fused_says_how_to_load_what_it_can_run(tiny_llama):
    with pytest.raises(ModelError, match=r"it is torch\.bfloat16; dtype=torch\.float32 loads it"):
        adaptive_gen.wrap(tiny_llama().bfloat16(), engine="fused")


def test_the_difference_to_half_precision_is_said_once_and_can_be_had_without(tiny_llama, caplog):
    with caplog.at_level(logging.WARNING, "adaptive_gen"):
        for _ in range(2):
            generated(adaptive_gen.wrap(tiny_llama().float(), [2, 4]), threshold=1.0)
        assert not caplog.records
        model = adaptive_gen.wrap(tiny_llama().bfloat16(), [2, 4])
        generated(model, threshold=1.0), generated(model, threshold=1.0)
    assert [r.getMessage() for r in caplog.records if "engine='module'" in r.getMessage()] == [
        "the weights are bfloat16 and are read as they are, with hidden states in float32: where "
        "two tokens are as likely but for bfloat16's rounding, the text may differ from "
        "transformers'. wrap(engine='module') rounds as transformers does."
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "adaptive_gen"):
        model = adaptive_gen.wrap(tiny_llama().bfloat16(), [2, 4], engine="module")
        assert generated(model, threshold=1.0)[2].report.engine == "module"
    assert not caplog.records
