"""The stages one by one: what they leave, that they resume, and that they are `run`."""

import json

import numpy as np
import pytest
import torch

# Fixtures of the module that tests `run`.
from test_calibrate_run import calibrate, model, model_dir  # noqa: F401

import adaptive_gen
from adaptive_gen import calibration as artefact
from adaptive_gen.calibrate import collect as collecting
from adaptive_gen.calibrate import trace as traces
from adaptive_gen.errors import CalibrationError
from adaptive_gen.gate import Gate
from adaptive_gen.settings import state

TEXTS = [f"prompt number {i}" for i in range(80)]


@pytest.fixture
def many(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(TEXTS))
    return path


def test_the_stages_in_turn_make_a_certified_calibration(calibrate, model_dir, many, tmp_path):  # noqa: F811
    work, out = tmp_path / "work", tmp_path / "out"
    at = [model_dir, "--work", work]
    collect = ["collect", *at, "--prompts", many, "--max-new-tokens", 4, "--exit-layers", "1,3"]
    out.mkdir()
    for args in (
        collect,
        ["profile", *at],
        ["search", *at, "--max-risk", 0.9, "--loss", "exact", "--confidence-level", 0.6],
        ["replay", *at],
        ["certify", *at],
        ["verify", *at, "--out", out],
    ):
        code, text, err = calibrate(*args)
        assert code == 0, (args, err)
    found = artefact.load(out)
    certificate = found.point.certificate
    assert certificate is not None and certificate.loss == "exact"
    assert certificate.prompts == 48 and certificate.level == 0.6
    assert certificate.decoded_risk == certificate.risk, "replay is decoding"
    assert certificate.p_value <= 0.4
    code, text, err = calibrate("show", out)
    assert "Certified: on new prompts" in text
    wrapped, _ = adaptive_gen.load(model_dir, calibration=out)
    assert state(wrapped).calibration.certified

    code, _, err = calibrate("collect", *at, "--prompts", many, "--max-new-tokens", 5)
    assert code == 2 and "another model, other prompts or other settings" in err
    cost = json.loads((work / "cost.json").read_text())
    cost["seconds"]["blocks"] = cost["seconds"].pop("doublings")
    (work / "cost.json").write_text(json.dumps(cost))
    code, _, err = calibrate("search", *at, "--max-risk", 0.9)
    assert code == 2 and "run `calibrate profile` again" in err
    (work / "search.json").write_text("{")
    code, _, err = calibrate("certify", *at)
    assert code == 2 and "run `calibrate search` again" in err


def test_a_calibration_by_gate_brings_its_gate(calibrate, model_dir, many, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    asked = ["--prompts", many, "--max-new-tokens", 4, "--exit-layers", "1,3"]
    by_gate = [*asked, "--max-disagreement", 0.9, "--confidence", "gate", "--out", out]
    code, _, err = calibrate("run", model_dir, *by_gate)
    assert code == 0, err
    assert artefact.load(out).confidence == "gate"
    loaded, tokenizer = adaptive_gen.load(model_dir, calibration=out)
    assert not state(loaded).told
    settings = {"adaptive": True, "max_new_tokens": 4, "return_dict_in_generate": True}
    ids = tokenizer("a prompt", return_tensors="pt").input_ids
    assert 0 <= loaded.generate(ids, **settings).confidences.nan_to_num(0).min()

    other = Gate.load(out)
    Gate(other.weights, {layer: bias + 1 for layer, bias in other.biases.items()}).save(out)
    changed, _ = adaptive_gen.load(model_dir, calibration=out)
    assert any("made on another gate" in text for text in state(changed).told)

    code, _, err = calibrate("run", model_dir, *by_gate, "--kv", "propagate")
    assert code == 2 and "--confidence gate cannot be calibrated with --kv propagate" in err


def test_finished_shards_are_not_collected_again(model, monkeypatch, tmp_path):  # noqa: F811
    prompts = [torch.tensor([[i, 3, 5]]) for i in range(20)]
    whole = collecting.collect(model, prompts, (1, 2, 3, 4), 4)
    decoded = []

    def interrupted(*args, **keywords):
        if len(decoded) == 18:
            raise KeyboardInterrupt
        decoded.append(args)
        return real(*args, **keywords)

    real = collecting.generate
    monkeypatch.setattr(collecting, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collecting.collect(model, prompts, (1, 2, 3, 4), 4, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "two shards of eight, and nothing half written"
    # One of them is damaged afterwards: only that and the missing one are done again.
    (tmp_path / "traces-00001.npz").write_bytes(b"PK")
    decoded.clear()
    again = collecting.collect(model, prompts, (1, 2, 3, 4), 4, tmp_path)
    assert len(decoded) == 12
    assert np.array_equal(again.agrees, whole.agrees)
    assert all(np.array_equal(a, b) for a, b in zip(again.texts, whole.texts, strict=True))


def test_a_trace_survives_the_file(model, tmp_path):  # noqa: F811
    prompts = [torch.tensor([[1, 3, 5]]), torch.tensor([[9, 2]])]
    found = collecting.collect(model, prompts, (1, 2, 3, 4), 4)
    traces.save(found, tmp_path / "t.npz")
    read = traces.load(tmp_path / "t.npz")
    assert read.exit_layers == found.exit_layers
    assert read.lengths.tolist() == found.lengths.tolist()
    assert np.array_equal(read.confidence["margin"], found.confidence["margin"])
    assert [t.tolist() for t in read.texts] == [t.tolist() for t in found.texts]
    with pytest.raises(CalibrationError, match="calibrate collect"):
        traces.load(tmp_path / "none.npz")


def test_the_page_shows_the_figures_and_runs_no_text_as_code():
    from test_calibration_file import make

    from adaptive_gen.calibrate.report import render

    evidence = {
        "exit_histogram": {"2": 30, "6": 70},
        "reliability": [
            {"exit_layer": 2, "promised": [0.5, 0.9], "kept": [0.4, 0.95], "tokens": [5, 5]}
        ],
        "survival": {"lengths": [4, 4], "replayed": [2, 4], "decoded": [2, 4]},
        "front": [{"speedup": 1.1, "agreement": 0.99}, {"speedup": 1.9, "agreement": 0.9}],
        "worst": [
            {
                "prompt": "<script>alert(1)</script>",
                "shared": "a",
                "adaptive": "b & c",
                "full_depth": "d",
                "rouge_loss": 0.5,
            }
        ],
    }
    page = render(make(), json.loads(json.dumps(evidence)))
    assert "<script" not in page and "&lt;script&gt;" in page and "b &amp; c" in page
    assert "1.10x" in page and "99.0%" in page and page.count("<svg") == 5
    assert "http" not in page, "it loads nothing"


@pytest.mark.parametrize(
    ("loss", "test", "words"), [("rouge", "betting", "ROUGE-L"), ("em", "binomial", "exact match")]
)
def test_a_risk_of_whole_texts_is_certified_by_decoding(
    calibrate,  # noqa: F811
    model_dir,  # noqa: F811
    many,
    tmp_path,
    loss,
    test,
    words,
):
    out = tmp_path / "out"
    risk = ["--max-risk", 0.95, "--loss", loss, "--confidence-level", 0.6]
    settings = ["--prompts", many, "--max-new-tokens", 4, "--exit-layers", "1,3", "--out", out]
    code, _, err = calibrate("run", model_dir, *risk, *settings)
    assert code == 0, err
    point = artefact.load(out).point
    certificate = point.certificate
    assert certificate is not None and certificate.loss == loss
    assert certificate.prompts == 48 and certificate.test == test
    assert certificate.decoded_risk == pytest.approx(certificate.risk), "the same texts twice"
    assert words in certificate.statement("recompute", {})
    assert point.quality["em"][0] <= point.quality["exact"][0], "equal tokens are an equal answer"


def test_a_latency_is_a_target(calibrate, model_dir, many, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    settings = ["--prompts", many, "--max-new-tokens", 4, "--exit-layers", "1,3", "--out", out]
    code, _, err = calibrate("run", model_dir, "--latency-ms", 1e6, *settings)
    assert code == 0, err
    point = artefact.load(out).point
    assert point.latency_ms is not None and 0 < point.latency_ms <= 1e6
    code, _, err = calibrate("run", model_dir, "--latency-ms", 1e-6, *settings)
    *_, last = err.splitlines()
    assert code == 1 and "--latency-ms 1e-06 cannot be reached" in last and "ms a token" in last
