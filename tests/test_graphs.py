"""The back end of captured steps, on a CPU: called directly, or taped and played back.

What is tested here is all of it but CUDA: static buffers, plans, tiles, the flag the host waits
for. `module` is the reference, and a row of a batch is that row alone.
"""

import gc

import families
import pytest
import torch
from families import FAMILIES, GRAPHED
from tape import Taped
from test_batches import LENGTHS, Uneven, assert_rows_are_alone, padded

import adaptive_gen
from adaptive_gen.engine import graphs, prepared
from adaptive_gen.engine.backend import TRIED, Backend
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.graphs import SummedConfidences
from adaptive_gen.errors import ModelError
from adaptive_gen.settings import state

# The fused families but for those whose rotary embedding depends on the length of the text.
STATIC = [family for family in GRAPHED if not FAMILIES[family].keys_by_length]
GREEDY = {"adaptive": True, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def taped(monkeypatch):
    """Let the back end `static` play back tapes, as `graphs` replays graphs."""
    monkeypatch.setattr(prepared, "Direct", Taped)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a test's few tokens outgrow."""
    monkeypatch.setattr(graphs, "TILES", (4, 8, 16, 48))


def wrapped(family, engine="static", dtype=torch.float64, **config):
    model = adaptive_gen.wrap(families.make(family, dtype, **config), [2, 4], engine=engine)
    model.generation_config.pad_token_id = 0
    return model


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.exit_layers, theirs.exit_layers)
    torch.testing.assert_close(ours.confidences, theirs.confidences, equal_nan=True)


def both(family, batch, **settings):
    """The same call on `static` and on `module`, compared; returns the first."""
    outputs = []
    for engine in ("static", "module"):
        model = wrapped(family, engine)
        outputs.append(model.generate(**batch, **{**GREEDY, "max_new_tokens": 16, **settings}))
        assert outputs[-1].report.engine == engine
    assert_same(*outputs)
    return outputs[0]


THRESHOLDS = (0.0, 0.2, 0.5, {2: 0.4, 4: 0.1}, 1.0)
KV = ("recompute", "propagate")
# Every threshold for one family with and one without norms of its own, one each elsewhere.
CROSSED = [(f, t, kv) for f in ("llama", "qwen3") for t in THRESHOLDS for kv in KV]
CROSSED += [(f, 0.2, KV[i % 2]) for i, f in enumerate(STATIC) if f not in ("llama", "qwen3")]


@pytest.mark.parametrize(("family", "threshold", "kv"), CROSSED, ids=str)
def test_taped_steps_are_the_module_back_end(family, threshold, kv, taped, small_tiles):
    out = both(family, padded(LENGTHS[:3]), threshold=threshold, kv=kv)
    if threshold == 0.2:
        assert len(out.report.exit_histogram) > 1, "depths must mix"


@pytest.mark.parametrize("confidence", ["margin", "max_prob", "entropy"])
@pytest.mark.parametrize("exit_layers", [[1], [3], [1, 2, 3, 4, 5]], ids=str)
def test_any_exits_and_measures(exit_layers, confidence, taped):
    both("llama", padded([9]), threshold=0.3, exit_layers=exit_layers, confidence=confidence)


@pytest.mark.parametrize("schedule", ["stepwise", "lockstep"])
@pytest.mark.parametrize(
    "mode",
    [
        {"lossless": True},
        {"kv": "propagate"},
        {"audit": True},
        {"prefill": "lazy"},
        {"do_sample": True, "top_k": 1, "repetition_penalty": 1.3},
        {"output_scores": True, "output_logits": True},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_every_mode_of_ragged_batches(mode, schedule, taped, small_tiles):
    out = both("llama", padded(LENGTHS), policy=Uneven(), schedule=schedule, **mode)
    if "output_logits" in mode:  # kept, so they must not be a buffer that is written again
        assert all(not torch.equal(a, b) for a, b in zip(out.logits, out.logits[1:], strict=False))


@pytest.mark.parametrize("mode", [{}, {"lossless": True}], ids=["lossy", "lossless"])
def test_rows_end_apart_and_are_what_they_are_alone(mode, taped, small_tiles):
    model, batch = wrapped("mistral"), padded(LENGTHS)
    free = model.generate(**batch, max_new_tokens=30, adaptive=True, policy=Uneven())
    ends = free[:, batch["input_ids"].shape[1] :][[0, 3, 5], [4, 9, 0]].tolist()
    out = assert_rows_are_alone(model, batch, policy=Uneven(), eos_token_id=ends, **mode)
    assert len({len(row[row > 0]) for row in out.exit_layers}) > 2, "rows must end apart"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lossless_is_transformers_greedy(family, taped):
    model, batch = wrapped(family, dtype=torch.float32), padded([7])
    expected = model.generate(**batch, max_new_tokens=40, do_sample=False)
    out = model.generate(**batch, **GREEDY, max_new_tokens=40, lossless=True, threshold=0.2)
    assert torch.equal(out.sequences, expected)
    assert out.report.drafted > 0


def test_a_step_is_recorded_once_and_its_seconds_are_reported(taped):
    model = wrapped("llama")
    recorder = state(model).backend._prepared.graphs.recorder
    out = model.generate(**padded([5]), **GREEDY, threshold=0.3, max_new_tokens=12)
    first = recorder.tapes
    # Three segments and one readout; comparing had come before.
    assert out.report.warm_up_s == 4.0
    for seed in (4, 5):
        del out
        gc.collect()
        batch = padded([6], seed=seed)
        out = model.generate(**batch, **GREEDY, threshold=0.3, max_new_tokens=12)
        assert out.report.warm_up_s == 0.0
    assert recorder.tapes == first


def test_an_output_that_is_kept_keeps_its_cache():
    """A slab is lent again only when nothing can read it any more."""
    model = wrapped("llama")
    settings = {**GREEDY, "threshold": 0.3, "max_new_tokens": 10}
    first = model.generate(**padded([5]), **settings)
    model.generate(**padded([8], seed=9), **settings)
    longer = {"input_ids": torch.cat([first.sequences, torch.tensor([[7]])], dim=1)}
    resumed = model.generate(**longer, **settings, past_key_values=first.past_key_values)
    assert torch.equal(resumed.sequences, model.generate(**longer, **settings).sequences)


def test_texts_outgrow_their_slab(taped, small_tiles, monkeypatch):
    monkeypatch.setattr("adaptive_gen.decoding._MOST_ROOM", 4)
    both("llama", padded([3, 50]), policy=Uneven(), max_new_tokens=100)


def test_a_slab_made_in_inference_mode_serves_outside():
    model = wrapped("llama")
    settings = {**padded([5]), **GREEDY, "threshold": 0.3, "max_new_tokens": 8}
    with torch.inference_mode():
        inside = model.generate(**settings)
    assert torch.equal(inside.sequences, model.generate(**settings).sequences)


def test_weights_changed_in_place_are_used_at_once(taped):
    model = wrapped("llama", dtype=torch.float32)
    settings = {**padded([5]), "max_new_tokens": 20, "do_sample": False}
    model.generate(**settings, adaptive=True, threshold=1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(-2)
        model.lm_head.weight.mul_(-1)
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, adaptive=True, threshold=1.0), expected)


def test_weights_put_elsewhere_are_recorded_anew(taped):
    model = wrapped("llama", dtype=torch.float32, tie_word_embeddings=False)
    settings = {**padded([5]), "max_new_tokens": 20, "do_sample": False}
    model.generate(**settings, adaptive=True, threshold=1.0)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, adaptive=True, threshold=1.0), expected)


def test_confidences_come_from_the_summary_and_not_from_the_logits():
    """What a check costs on a GPU: no softmax over the vocabulary, no copy of logits."""
    model = wrapped("llama", dtype=torch.float32)
    backend_, hidden = state(model).backend, torch.randn(5, 32)
    backend_.segments([2, 4, 6])
    readout = backend_.readout()
    plain = adaptive_gen.confidence.Confidences()
    ours = backend_.confidences(plain)
    assert isinstance(ours, SummedConfidences)
    for measure in ("margin", "max_prob", "entropy"):
        logits = readout(hidden, 6)
        expected = plain(logits.clone(), 2, measure)
        logits.zero_()
        assert ours(logits, 2, measure) == pytest.approx(expected, abs=1e-6)
        # Logits that are not the latest are computed on.
        other = torch.randn(5, 96)
        assert ours(other, 2, measure) == plain(other, 2, measure)


def test_half_precision_and_graphs_on_request(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama().bfloat16(), engine="static")
    report = model.generate(**padded([5]), **GREEDY, threshold=0.5, max_new_tokens=8).report
    assert report.engine == "static" and report.new_tokens == 8


@pytest.mark.parametrize(
    ("family", "engine", "reason"),
    [
        ("llama", "graphs", "engine='graphs' cannot run LlamaForCausalLM: it is on cpu"),
        ("llama_dynamic_rope", "static", "depend on the layer or on the length"),
        ("gemma2", "static", "engine='static' cannot run Gemma2ForCausalLM"),
        ("olmo2", "static", "not built like"),
        ("gpt2", "static", "not built like|depend on"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_reason(family, engine, reason):
    with pytest.raises(ModelError, match=reason):
        adaptive_gen.wrap(families.make(family), engine=engine)


def test_a_model_that_computes_something_else_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="compute something else"):
        adaptive_gen.wrap(tiny_llama(hidden_act="gelu"), engine="static")


def test_where_graphs_cannot_be_had_the_next_back_end_runs_and_says_why(monkeypatch):
    monkeypatch.setitem(TRIED, "auto", ("graphs", "fused"))
    decoder = state(wrapped("llama", "module")).decoder
    tried = Backend(decoder)
    tried.segments([2, 6])
    assert tried.name == "fused" and "not graphs, because it is on cpu" in tried.reason
    tried = Backend(state(wrapped("dots1", "module")).decoder)
    tried.segments([2, 6])
    assert tried.name == "module"
    assert "not graphs" in tried.reason and "not fused" in tried.reason


def test_another_back_ends_cache_is_continued_through_the_modules():
    decoder = state(wrapped("llama")).decoder
    tried = Backend(decoder, "static")
    (segment,) = tried.segments([6])
    mixed, expected = KVCache(6), KVCache(6)
    hidden = decoder.embed(torch.tensor([[3, 4, 5]]))
    ours, theirs = segment.run(hidden, mixed), decoder.run(hidden, 0, 6, expected)
    torch.testing.assert_close(ours, theirs)
    assert mixed.lengths == expected.lengths
