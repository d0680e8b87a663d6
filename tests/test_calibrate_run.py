"""`calibrate` from end to end on a tiny model, and what it says when it cannot."""

import json
import re
import sys

import pytest
import torch

import adaptive_gen
from adaptive_gen import calibration as artefact
from adaptive_gen.calibrate import cli, collect, prompts
from adaptive_gen.calibrate.run import Options, run
from adaptive_gen.calibrate.target import Target
from adaptive_gen.calibrate.worth import Slower
from adaptive_gen.confidence import MEASURES
from adaptive_gen.errors import DataError, ModelError, Unreachable
from adaptive_gen.prompts import read
from adaptive_gen.settings import state

TEXTS = [f"prompt number {i}" for i in range(8)]
QUICK = Options(max_new_tokens=4, rounds=1, least_gain=0.0)
UNREACHABLE = ["--max-new-tokens", "4", "--target-speedup", "1e6"]
LOOSE = Target("disagreement", 1.0)


@pytest.fixture
def model(tiny_llama):
    # No end of text: every text has the same, known length.
    return adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), exit_layers=[1, 2, 3])


@pytest.fixture
def model_dir(tiny_llama, byte_tokenizer, tmp_path):
    path = tmp_path / "model"
    tiny_llama(layers=4).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def calibrate(monkeypatch, capsys, tmp_path_factory):
    """Run the command line with a cache of its own; return exit code, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    # A tiny model gains nothing; these tests are not about that.
    monkeypatch.setattr("adaptive_gen.calibrate.worth.LEAST_GAIN", 0.0)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_a_trace_is_what_each_exit_says_along_the_full_depth_text(model):
    ids = torch.tensor([[10, 20, 30]])
    trace = collect.collect(model, [ids, ids[:, :2]], (1, 2, 3, 4), max_new_tokens=5)
    assert trace.lengths.tolist() == [5, 5]
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 8)
    hidden = model(text, output_hidden_states=True).hidden_states
    for k in range(3):
        logits = model.lm_head(model.model.norm(hidden[k + 1]))[0, 2:-1]
        assert trace.agrees[0, :, k].tolist() == (logits.argmax(-1) == text[0, 3:]).tolist()
        for name, measure in MEASURES.items():
            expected = measure(logits).detach().numpy()
            assert trace.confidence[name][0, :, k] == pytest.approx(expected, abs=1e-5)


def test_a_calibration_survives_the_file_and_decides_generation(
    model, tiny_llama, byte_tokenizer, tmp_path
):
    found = run(model, byte_tokenizer, TEXTS, LOOSE, QUICK)
    artefact.save(found, tmp_path)
    loaded = artefact.load(tmp_path)
    assert loaded == found
    assert set(loaded.maps) == set(MEASURES)
    assert [p.speedup for p in loaded.points] == sorted(p.speedup for p in loaded.points)
    assert all(p.wall_speedup and p.wall_speedup_interval for p in loaded.points)
    assert loaded.point.tokens == 4 * 4, "four held-out prompts of four tokens"
    assert state(model).calibration is found
    assert set(found.batches) == {1, 2, 4, 8, 16} and min(found.batches.values()) > 0
    other = adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), calibration=tmp_path)
    ids = torch.tensor([[10, 20, 30]])
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    by_default = other.generate(ids, adaptive=True, **settings)
    by_hand = other.generate(
        ids,
        adaptive=True,
        threshold=loaded.point.threshold,
        exit_layers=list(loaded.point.exit_layers),
        **settings,
    )
    assert by_default.exit_layers.tolist() == by_hand.exit_layers.tolist()


def test_the_seed_and_the_hash_decide_the_order_not_the_file():
    one = prompts.ordered(TEXTS, seed=0)
    assert prompts.ordered(TEXTS[::-1], seed=0) == one
    assert sorted(one) == sorted(TEXTS)
    assert prompts.ordered(TEXTS, seed=1) != one


def test_an_unreachable_speed_leaves_the_model_as_it_was(model, byte_tokenizer):
    with pytest.raises(Unreachable, match="cannot be reached"):
        run(model, byte_tokenizer, TEXTS, Target("speedup", 1e6), QUICK)
    assert state(model).calibration is None


def test_a_model_without_exits_is_told_so(tiny_llama, byte_tokenizer):
    model = adaptive_gen.wrap(tiny_llama(layers=2), exit_layers=[2])
    with pytest.raises(ModelError, match="no exit below its 2 layers"):
        run(model, byte_tokenizer, TEXTS, LOOSE, QUICK)


def test_the_prompts_that_ship_are_many_and_different():
    shipped = prompts.prompt_set(None)
    assert len({json.dumps(p) for p in shipped}) == len(shipped) >= 100
    assert {type(p) for p in shipped} == {str, list}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "line 3 holds no prompt"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1 holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.txt", None, "No such file"),
    ],
)
def test_a_broken_prompt_file_is_named_with_its_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_run_then_show_on_the_command_line(calibrate, model_dir, prompt_file, tmp_path):
    out = tmp_path / "new" / "dir"
    # Whatever lies in the model directory must not keep it from being calibrated anew.
    (model_dir / "calibration.json").write_text("{}")
    options = ["--prompts", prompt_file, "--max-new-tokens", 4, "--exit-layers", "1,3"]
    code, text, err = calibrate(
        "run", model_dir, "--max-disagreement", 1, "--out", out, "--json", *options
    )
    assert code == 0, err
    document = json.loads(text.splitlines()[-1])
    assert document["points"] and document["recipe"]["quality"]
    assert set(document["maps"]["margin"]) == {"1", "3"}
    assert (
        artefact.load(out).point.agreement == document["points"][document["default"]]["agreement"]
    )
    code, text, err = calibrate("show", out)
    assert code == 0, err
    assert "wall_speedup" in text and "*" in text
    assert (model_dir / "calibration.json").read_text() == "{}", "only --out is written to"
    code, text, err = calibrate("report", out)
    assert code == 0, err
    assert (out / "calibration.html").stat().st_size > 5000


@pytest.fixture
def slower(monkeypatch):
    """Calibration on a machine where prediction lets everything pass and exits lose time."""

    def measured(speedup, interval):
        monkeypatch.setattr("adaptive_gen.calibrate.worth.LEAST_GAIN", 1.03)
        monkeypatch.setattr("adaptive_gen.calibrate.worth.check", lambda *_: None)
        monkeypatch.setattr("adaptive_gen.calibrate.verify.wall_speedup", lambda *_: speedup)
        monkeypatch.setattr("adaptive_gen.calibrate.verify.interval", lambda *_: interval)

    return measured


@pytest.mark.parametrize(
    ("speedup", "interval", "says"),
    [
        (0.96, (0.94, 0.98), r"0\.960x .* 0\.940 to 0\.980: all of it slower"),
        (0.99, (0.95, 1.03), r"0\.990x .* 0\.950 to 1\.030: not clearly slower, and not faster"),
    ],
)
def test_a_point_measured_slower_than_full_depth_replaces_no_calibration(
    calibrate, slower, model_dir, prompt_file, speedup, interval, says
):
    asked = ["run", model_dir, "--prompts", prompt_file, "--max-new-tokens", 4]
    asked += ["--max-disagreement", 1, "--exit-layers", "1,3", "--confidence", "gate"]
    slower(1.2, (1.1, 1.3))
    code, _, err = calibrate(*asked)
    assert code == 0, err
    usable = {p: p.read_bytes() for p in model_dir.iterdir() if p.is_file()}
    slower(speedup, interval)
    code, text, err = calibrate(*asked)
    *_, last = err.splitlines()
    assert code == 1 and "do not use adaptive depth" in last and re.search(says, last), err
    assert "a larger --max-disagreement" in last and "It is not installed" in last
    assert {p: p.read_bytes() for p in model_dir.iterdir() if p.is_file()} == usable
    assert "chosen, but slower than full depth" in text + err
    kept = model_dir / "calibration-slower"
    assert f"--calibration {kept / 'calibration.json'}" in last
    wrapped, _ = adaptive_gen.load(model_dir, calibration=kept)
    assert state(wrapped).calibration.point.wall_speedup == speedup and state(wrapped).gate
    code, _, err = calibrate("report", kept)
    assert code == 0, err


def test_a_model_measured_slower_loads_without_a_calibration(
    calibrate, slower, model_dir, prompt_file, tmp_path
):
    slower(0.9, (0.8, 0.95))
    work, asked = tmp_path / "work", ["--prompts", prompt_file, "--max-new-tokens", 4]
    code, *_ = calibrate("run", model_dir, "--latency-ms", 1e6, "--work", work, *asked)
    assert code == 1
    code, _, err = calibrate("verify", model_dir, "--work", work)
    assert code == 1 and "a smaller --latency-ms" in err.splitlines()[-1]
    wrapped, _ = adaptive_gen.load(model_dir)
    assert state(wrapped).calibration is None
    assert not (work / "calibration.json").exists()


def test_a_measured_loss_of_speed_leaves_the_model_as_it_was(model, byte_tokenizer, slower):
    slower(0.9, (0.8, 0.95))
    with pytest.raises(Slower) as stopped:
        run(model, byte_tokenizer, TEXTS, LOOSE, Options(max_new_tokens=4, rounds=1))
    assert state(model).calibration is None
    assert stopped.value.calibration.point.wall_speedup == 0.9


@pytest.mark.parametrize(
    "args, says, code",
    [
        (["run", "{dir}/missing"], "no model directory", 2),
        (["run", "{dir}/not_a_model"], "cannot be loaded as a causal LM", 2),
        (["run", "{model}", "--target-speedup", "0.5"], "--target-speedup 0.5 is out of range", 2),
        (["run", "{model}", "--target-speedup", "nan"], "--target-speedup nan is out of range", 2),
        (["run", "{model}", "--max-disagreement", "1.5"], "--max-disagreement 1.5 is out of", 2),
        (
            ["run", "{model}", "--max-disagreement", "0.1", "--target-speedup", "2"],
            "--target-speedup and --max-disagreement are 2 targets; give one of them",
            2,
        ),
        (["run", "{model}", "--latency-ms", "0"], "--latency-ms 0 is out of range", 2),
        (["run", "{model}", "--max-risk", "1"], "--max-risk 1 is out of range", 2),
        (["run", "{model}", "--max-risk", "0.1", "--loss", "hope"], "--loss 'hope' is unknown", 2),
        (
            ["run", "{model}", "--max-risk", "0.1", "--confidence-level", "1"],
            "--confidence-level 1 is out of range",
            2,
        ),
        (
            [
                "run",
                "{model}",
                "--prompts",
                "{prompts}",
                "--max-risk",
                "0.1",
                "--max-new-tokens",
                4,
            ],
            "5 prompts are too few to promise a risk of 0.1 .* it takes 32",
            2,
        ),
        (
            ["run", "{model}", "--loss", "exact"],
            "--loss says how a risk is certified, and none is asked for; add --max-risk",
            2,
        ),
        (
            ["run", "{model}", "--loss", "em", "--confidence-level", "0.9", "--latency-ms", "9"],
            "--loss and --confidence-level say how .* add --max-risk",
            2,
        ),
        (
            ["search", "{model}", "--work", "{dir}/missing", "--confidence-level", "0.9"],
            "--confidence-level says how a risk is certified",
            2,
        ),
        (["run", "{model}", "--thresholds", "many"], "--thresholds 'many' is unknown", 2),
        (["profile", "{model}", "--work", "{dir}/missing"], "run `calibrate collect` first", 2),
        (["report", "{model}"], "there is no", 2),
        (["run", "{model}", "--confidence", "hope"], "--confidence 'hope' is unknown", 2),
        (["run", "{model}", "--kv", "none"], "--kv 'none' is unknown", 2),
        (["run", "{model}", "--max-new-tokens", "1"], "--max-new-tokens 1 is too few", 2),
        (["run", "{model}", "--max-new-tokens", "600"], "the 512 this model can hold", 2),
        (["run", "{model}", "--exit-layers", "2,9"], "exit layer 9 does not exist", 2),
        (["run", "{model}", "--prompts", "{dir}/missing"], "No such file", 2),
        (["run", "{model}", "--prompts", "{dir}/three"], "3 different prompts", 2),
        (["run", "{model}", "--out", "{dir}/three"], "cannot write into", 2),
        (["run", "{model}", "--out", "{dir}/three/below"], "cannot write into", 2),
        (
            ["run", "{model}", "--prompts", "{prompts}", *UNREACHABLE],
            "--target-speedup 1e\\+06 cannot be reached",
            1,
        ),
        (["show", "{dir}/missing"], "or the model directory", 2),
        (["show", "{model}"], "there is no", 2),
    ],
)
def test_a_wrong_input_is_one_line_and_writes_nothing(
    calibrate, model_dir, prompt_file, tmp_path, args, says, code
):
    (tmp_path / "not_a_model").mkdir()
    (tmp_path / "three").write_text("a\na\nb\nc")
    before = sorted(tmp_path.rglob("*"))
    places = {"dir": tmp_path, "model": model_dir, "prompts": prompt_file}
    found, out, err = calibrate(*(str(arg).format(**places) for arg in args))
    assert found == code
    assert out == ""
    *_, last = err.splitlines()
    assert last.startswith("calibrate: ")
    assert re.search(says, last)
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before
