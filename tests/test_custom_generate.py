"""A checkpoint that brings its own generate: plain transformers decodes it adaptively."""

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import adaptive_gen
from adaptive_gen.calibration import Calibration, ConfidenceMap, OperatingPoint, save
from adaptive_gen.errors import ModelError
from adaptive_gen.exit_readouts import add_readouts
from adaptive_gen.exporting import SHIM
from adaptive_gen.gate import Gate

CONNECT = socket.socket.connect  # before the fixture that forbids connections replaces it
IDS = torch.arange(40, 52)[None]
SETTINGS = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def module_cache(tmp_path, monkeypatch):
    """transformers copies a checkpoint's code to a folder that it puts on sys.path."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def exported(tmp_path, bigram_llama, byte_tokenizer):
    """A model whose exit after layer 2 answers "ok!" to a colon; at full depth it ends after "o".

    So a text tells the depth it was decoded at, wherever it comes from.
    """
    model = bigram_llama(b":ok!", layers=4)
    last, width = model.model.layers[3].mlp, model.config.hidden_size
    with torch.no_grad():
        for projection in (last.gate_proj, last.up_proj):
            projection.weight.zero_()[:width, :width].fill_diagonal_(1.0)
        last.down_proj.weight[ord("!"), ord("o")] = 10.0  # an "o" passes for a "!"
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    curve = ConfidenceMap(raw=(0.0, 1.0), chance=(0.0, 1.0))
    points = (OperatingPoint(0.5, (2, 4), 2.0, 2.0, agreement=0.9, tokens=100),)
    maps = {"margin": {2: curve}}
    calibration = Calibration(4, "margin", "recompute", maps, points, 0, {}, {})
    return adaptive_gen.export(
        adaptive_gen.wrap(model, [2], calibration),
        tmp_path / "whole",
        tokenizer=byte_tokenizer,
        with_generate=True,
    )


@pytest.fixture
def trusted(exported):
    return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)


PROMPT = {"input_ids": torch.tensor([list(b"say:")]), "attention_mask": torch.ones(1, 4).long()}


def test_plain_transformers_decodes_it_as_load_does(exported, trusted):
    model, _ = adaptive_gen.load(exported)
    expected = model.generate(**PROMPT, **SETTINGS, adaptive=True)
    assert expected.exit_layers.tolist() == [[4, 2, 2, 2]]  # the first comes from the prompt
    for _ in range(2):
        out = trusted.generate(**PROMPT, **SETTINGS)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.exit_layers, expected.exit_layers)
    out = trusted.generate(PROMPT["input_ids"], **SETTINGS)  # by position too
    assert torch.equal(out.exit_layers, expected.exit_layers)


@pytest.fixture
def gated(tiny_llama, byte_tokenizer, tmp_path):
    """A model whose calibration chose a gate, as loaded from the directory `calibrate` wrote."""
    place = tmp_path / "gated"
    tiny_llama(layers=4, eos_token_id=None).save_pretrained(place)
    byte_tokenizer.save_pretrained(place)
    curve = ConfidenceMap(raw=(0.0, 1.0), chance=(0.0, 1.0))
    points = (OperatingPoint(0.5, (2, 4), 2.0, 2.0, agreement=0.9, tokens=100),)
    save(Calibration(4, "gate", "recompute", {"gate": {2: curve}}, points, 0, {}, {}), place)
    Gate({2: torch.randn(32)}, {2: torch.tensor(0.0)}).save(place)
    return adaptive_gen.load(place)[0]


def test_a_gate_goes_along_and_decides(gated, tmp_path):
    out = adaptive_gen.export(gated, tmp_path / "whole", with_generate=True)
    trusted = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    expected = gated.generate(**PROMPT, **SETTINGS, adaptive=True)
    assert len(expected.report.exit_histogram) > 1
    found = trusted.generate(**PROMPT, **SETTINGS)
    assert torch.equal(found.exit_layers, expected.exit_layers)
    assert torch.equal(found.confidences.nan_to_num(), expected.confidences.nan_to_num())


@pytest.mark.parametrize(
    "missing, says",
    [("gate.Gate.save", "needs a trained gate"), ("calibration.save", "another calibration")],
)
def test_a_checkpoint_that_does_not_decode_as_the_model_does_is_not_left(
    gated, tmp_path, monkeypatch, missing, says
):
    monkeypatch.setattr(f"adaptive_gen.{missing}", lambda *_: None)
    with pytest.raises(ModelError, match=says):
        adaptive_gen.export(gated, tmp_path / "whole", with_generate=True)
    assert not (tmp_path / "whole").exists()


def test_exporting_draws_no_random_numbers_and_says_nothing(gated, tmp_path, caplog):
    gated.generation_config.do_sample = True
    gated.generation_config.pad_token_id = 5  # which the tokens decoded from hold
    before = torch.get_rng_state()
    adaptive_gen.export(gated, tmp_path / "whole", with_generate=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.messages


@pytest.mark.parametrize("layers", [4, 3])
def test_exits_are_read_out_through_what_they_have_of_their_own(tiny_llama, tmp_path, layers):
    model = tiny_llama(layers=4, eos_token_id=None)
    add_readouts(model, [1, 3, 4], "norm")
    for parameter in model.exit_readouts.parameters():
        parameter.data += torch.randn(parameter.shape)
    out = adaptive_gen.export(model, tmp_path / "whole", layers, with_generate=True)
    trusted = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = trusted.generate(**PROMPT, **SETTINGS, threshold={1: 0.0})
    assert found.exit_layers[0, 1:].unique().tolist() == [1]
    assert torch.equal(trusted.exit_readouts["1"]["norm"].weight, norm_of(model, 1))
    assert trusted.model.norm.weight.requires_grad  # generating freezes nothing


def norm_of(model, exit_layer):
    return model.exit_readouts[str(exit_layer)]["norm"].weight


def test_load_and_untrusting_transformers_decode_at_full_depth_unasked(exported):
    for model in (
        adaptive_gen.load(exported)[0],
        AutoModelForCausalLM.from_pretrained(exported),
    ):
        assert not hasattr(model.generate(**PROMPT, **SETTINGS), "exit_layers")


@pytest.mark.parametrize("said", ["keyword", "config", "checkpoint"])
def test_what_the_caller_or_the_checkpoint_says_counts(said, trusted):
    keywords = dict(SETTINGS)
    if said == "keyword":
        keywords["adaptive"] = False
    elif said == "config":
        keywords = {"generation_config": GenerationConfig(**SETTINGS, adaptive=False)}
    else:
        trusted.generation_config.adaptive = False
    assert not hasattr(trusted.generate(**PROMPT, **keywords), "exit_layers")


def test_fields_missing_in_a_config_are_the_checkpoint_s(exported, trusted):
    trusted.generation_config.threshold = 1.0
    config = GenerationConfig(**SETTINGS)
    out = trusted.generate(**PROMPT, generation_config=config)
    assert out.exit_layers.tolist() == [[4, 4]]
    assert not hasattr(config, "adaptive")
    out = trusted.generate(**PROMPT, generation_config=GenerationConfig(**SETTINGS, threshold=0.2))
    assert out.exit_layers.tolist() == [[4, 2, 2, 2]]


def test_any_model_can_borrow_it_for_one_call(exported, tiny_llama):
    model = tiny_llama(layers=4, eos_token_id=None)
    borrowed = {"custom_generate": str(exported), "trust_remote_code": True}
    out = model.generate(IDS, **SETTINGS, **borrowed, threshold=0.0)
    assert out.exit_layers.tolist() == [[4] + [1] * 15]  # quarter points: no exits are named
    assert not hasattr(model.generate(IDS, **SETTINGS), "exit_layers")


def test_a_wrapped_model_lends_its_keywords_to_what_it_borrows(exported, tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), [2])
    borrowed = {"custom_generate": str(exported), "trust_remote_code": True}
    out = model.generate(IDS, **SETTINGS, **borrowed, threshold=0.0)
    assert out.exit_layers.tolist() == [[4] + [2] * 15]


def test_it_streams_before_it_has_generated(exported, trusted):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    chunks = [*adaptive_gen.stream(trusted, tokenizer, "say:", max_new_tokens=4)]
    assert [chunk.exit_layer for chunk in chunks] == [4, 2, 2, 2]


def test_streamers_stop_strings_and_pipelines_work_through_it(exported, trusted):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.flatten().tolist())

        def end(self):
            self.seen.append("end")

    streamer = Streamer()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    out = trusted.generate(
        **PROMPT, **SETTINGS, streamer=streamer, tokenizer=tokenizer, stop_strings=["k"]
    )
    assert streamer.seen == [list(b"say:"), [ord("o")], [ord("k")], "end"]
    assert out.exit_layers.tolist() == [[4, 2]]
    texts = pipeline("text-generation", str(exported), trust_remote_code=True)
    assert texts("say:", do_sample=False)[0]["generated_text"] == "say:ok!"


def test_without_the_package_it_decodes_at_full_depth_and_says_so(tiny_llama, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "adaptive_gen.custom_generate", None)
    spec = importlib.util.spec_from_file_location("shim", SHIM)
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    model = tiny_llama(layers=4)
    expected = model.generate(IDS, **SETTINGS).sequences
    with caplog.at_level(logging.WARNING):
        for keywords in ({}, {}, {"adaptive": False}):
            out = shim.generate(IDS, model=model, **SETTINGS, **keywords)
            assert torch.equal(out.sequences, expected)
    assert caplog.messages == ["the package adaptive_gen is not installed: decoding at full depth."]
    with pytest.raises(ImportError, match="install it first"):
        shim.generate(IDS, model=model, **SETTINGS, adaptive=True)


@pytest.fixture
def client(exported, tmp_path, monkeypatch):
    """An `openai` client of `transformers serve` on the exported checkpoint."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")

    def connect(self, address):
        assert address[0] == "127.0.0.1", address
        return CONNECT(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import app; app()"
    words = ["serve", str(exported), "--trust-remote-code", "--device", "cpu"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "served-hf")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    with server:
        try:
            _wait_for(server, address, tmp_path / "log")
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
                yield client
        finally:
            server.kill()


def _wait_for(server, address, log):
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/health"):
                return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_transformers_serve_decodes_adaptively(client, exported):
    asked = {"model": str(exported), "messages": [{"role": "user", "content": "say"}]}

    def answer(**config):
        extra = {"extra_body": {"generation_config": json.dumps(config)}} if config else {}
        reply = client.chat.completions.create(**asked, **extra)
        return reply.choices[0].message.content

    assert answer() == "ok!"
    assert answer(max_new_tokens=8, adaptive=False) == "o"
    assert answer(max_new_tokens=8, threshold=1.0) == "o"
    assert answer(max_new_tokens=2) == "ok"
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == "ok!"
    assert len(parts) > 3
