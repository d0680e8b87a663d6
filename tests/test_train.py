"""`adaptive-train` end to end on tiny models: what it writes, resumes, measures and refuses."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from training import losses, options, run, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive_gen.train import cli
from adaptive_gen.train import trainer as trainer_module
from adaptive_gen.train.run import evaluate_model, train


def test_soft_moves_every_parameter_and_names_its_exits(tmp_path, model_dir, data):
    before = weights(model_dir)
    out = train(options(model_dir, data, tmp_path / "out"), "soft")
    after = weights(out)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "config.json").read_text())
    assert config["exit_layers"] == [1, 3, 4] and config["use_cache"] is True
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [97, 98]
    assert not list(out.glob(".saving-*"))
    logged = losses(out)
    assert {"loss_exit_1", "loss_exit_3", "loss_exit_4"} <= logged[0].keys()
    mean = sum(logged[0][f"loss_exit_{e}"] for e in (1, 3, 4)) / 3
    assert logged[0]["loss"] == pytest.approx(mean, abs=1e-3)


def test_sft_trains_full_depth_alone(tmp_path, model_dir, data):
    out = train(options(model_dir, data, tmp_path / "out", exit_layers=None), "sft")
    assert "exit_layers" not in json.loads((out / "config.json").read_text())
    assert [key for key in losses(out)[0] if key.startswith("loss_exit")] == ["loss_exit_4"]


def test_training_lowers_the_loss_of_every_exit(tmp_path, model_dir, data):
    before = evaluate_model(str(model_dir), [data], "1,3", seq_len=32)
    steps = {"max_steps": 25, "lr": 3e-3, "objective": "distil:0.5+full:2"}
    out = train(options(model_dir, data, tmp_path / "out", **steps), "soft")
    after = evaluate_model(str(out), [data], None, seq_len=32)
    assert [s.exit_layer for s in after.exits] == [1, 3, 4]
    for old, new in zip(before.exits, after.exits, strict=True):
        assert new.loss < old.loss - 0.5


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, model_dir, data):
    whole = train(options(model_dir, data, tmp_path / "whole", max_steps=6, save_steps=3), "soft")
    broken = tmp_path / "broken"
    shutil.copytree(whole / "checkpoints/checkpoint-3", broken / "checkpoints/checkpoint-3")
    resumed = train(
        options(model_dir, data, broken, max_steps=6, save_steps=3, resume=True), "soft"
    )
    assert [row["loss"] for row in losses(resumed)] == [row["loss"] for row in losses(whole)]
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_ctrl_c_leaves_a_checkpoint_to_resume(tmp_path, model_dir, data, monkeypatch):
    forward, calls = trainer_module.exit_states, []

    def interrupted(*args, **inputs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **inputs)

    monkeypatch.setattr(trainer_module, "exit_states", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(options(model_dir, data, tmp_path / "out"), "soft")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "out/model.safetensors").exists()
    out = train(options(model_dir, data, tmp_path / "out", resume=True), "soft")
    whole = train(options(model_dir, data, tmp_path / "whole"), "soft")
    assert [r["loss"] for r in losses(out)] == [r["loss"] for r in losses(whole)]


def test_gradient_accumulation_trains_the_same_model(tmp_path, model_dir, data):
    """Ragged answers, so that a mean per micro-batch would weigh tokens differently."""
    rows = [{"prompt": "p" * (1 + i % 7), "completion": "c" * (1 + i % 13)} for i in range(16)]
    ragged = data.with_name("ragged.jsonl")
    ragged.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = [
        losses(
            train(
                options(model_dir, ragged, tmp_path / f"m{m}", micro_batch=m, batch_size=8),
                "soft",
            )
        )
        for m in (8, 4, 2)
    ]
    for other in found[1:]:
        assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in found[0]], abs=1e-4)
        assert [r["grad_norm"] for r in other] == pytest.approx(
            [r["grad_norm"] for r in found[0]], rel=1e-3
        )


def test_a_new_model_brings_its_own_bpe(tmp_path, data, monkeypatch, capsys):
    shape = tmp_path / "shape.json"
    settings = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    shape.write_text(json.dumps(settings), encoding="utf-8")
    out = tmp_path / "new"
    common = ["--from-config", shape, "--data", data, "--out", out, "--vocab-size", 280]
    code, printed, err = run(
        monkeypatch, capsys, "sft", *common, "--max-steps", 2, "--batch-size", 2, "--log-steps", 1
    )
    assert code == 0 and printed.split() == [str(out)] and "step 2/2" in err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) <= 280
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template


def test_eval_measures_what_the_model_itself_gives(model_dir, data, monkeypatch, capsys):
    command = ["eval", model_dir, "--data", data, "--exit-layers", "2", "--seq-len", 64]
    code, printed, _ = run(monkeypatch, capsys, *command, "--json")
    assert code == 0
    result = json.loads(printed)
    shallow, full = result["exits"]
    assert (shallow["exit_layer"], full["exit_layer"]) == (2, 4)
    assert full["agreement"] == 1.0 and 0 <= shallow["agreement"] < 1
    assert 0 < shallow["confidence"] < 1
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    stream = []
    for text in data.read_text().split("<|endoftext|>"):
        stream += [*tokenizer(text.strip())["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 63):
            ids = torch.tensor([stream[start : start + 64]])
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert result["tokens"] == len(stream) - 1
    assert full["loss"] == pytest.approx(total / result["tokens"], abs=1e-4)

    code, printed, _ = run(monkeypatch, capsys, *command)
    assert code == 0 and "2/4" in printed and f"{full['loss']:.3f}" in printed


def broken_inputs(tmp_path, model_dir, data):
    """Arguments that must fail, by name."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "code.py").write_text("print('hello')\n" * 99)
    lone = tmp_path / "lone"
    lone.mkdir()
    encoder = tmp_path / "encoder"
    shutil.copytree(model_dir, encoder)
    (encoder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    bad_shape = tmp_path / "bad_shape.json"
    bad_shape.write_text('{"model_type": "no-such-model"}')
    out = tmp_path / "out"
    rest = ["--data", data, "--out", out, "--max-steps", 1]
    return {
        "no model directory": ["soft", tmp_path / "nowhere", *rest],
        "no config": ["soft", lone, *rest],
        "not a causal LM": ["soft", encoder, *rest],
        "exit layer beyond": ["soft", model_dir, *rest, "--exit-layers", "9"],
        "exit layers not numbers": ["soft", model_dir, *rest, "--exit-layers", "a,b"],
        "missing data": ["soft", model_dir, "--data", tmp_path / "no.txt", "--out", out],
        "no data": ["soft", model_dir, "--out", out, "--data"],
        "empty data": ["soft", model_dir, "--data", tmp_path / "empty.txt", "--out", out],
        "no steps": ["soft", model_dir, "--data", data, "--out", out, "--max-steps", 0],
        "no epochs": ["soft", model_dir, "--data", data, "--out", out, "--epochs", 0],
        "plan of no steps": ["plan", model_dir, "--max-steps", -2],
        "plan of no model": ["plan", tmp_path.name],
        "source code": ["soft", model_dir, "--data", tmp_path / "code.py", "--out", out],
        "eval source code": ["eval", model_dir, "--data", tmp_path / "code.py"],
        "plan source code": ["plan", model_dir, "--data", tmp_path / "code.py"],
        "broken data": ["sft", model_dir, "--data", tmp_path / "bad.jsonl", "--out", out],
        "unwritable": ["soft", model_dir, "--data", data, "--out", tmp_path / "file" / "out"],
        "model and config": ["sft", model_dir, *rest, "--from-config", bad_shape],
        "bad shape": ["sft", *rest, "--from-config", bad_shape],
        "resume nothing": ["sft", model_dir, *rest, "--resume"],
        "odd batch": ["sft", model_dir, *rest, "--batch-size", 6, "--micro-batch", 4],
        "odd dtype": ["sft", model_dir, *rest, "--dtype", "int3"],
        "eval missing model": ["eval", tmp_path / "nowhere", "--data", data],
        "eval beyond": ["eval", model_dir, "--data", data, "--exit-layers", "5"],
        "eval broken": ["eval", model_dir, "--data", tmp_path / "bad.jsonl"],
    }


def test_wrong_inputs_are_one_line_and_write_nothing(
    tmp_path, model_dir, data, monkeypatch, capsys
):
    cases = broken_inputs(tmp_path, model_dir, data)
    before = sorted(tmp_path.rglob("*"))
    for name, arguments in cases.items():
        code, printed, err = run(monkeypatch, capsys, *arguments)
        assert code == 2, (name, code, err)
        assert err.startswith("adaptive-train: ") and len(err.splitlines()) == 1, (name, err)
        assert printed == "", name
        assert sorted(tmp_path.rglob("*")) == before, name


def test_a_second_run_does_not_mix_with_the_first(tmp_path, model_dir, data, monkeypatch, capsys):
    out = train(options(model_dir, data, tmp_path / "out", max_steps=1), "soft")
    before = weights(out)
    code, _, err = run(monkeypatch, capsys, "soft", model_dir, "--data", data, "--out", out)
    assert code == 2 and "--resume" in err
    assert all(torch.equal(v, before[k]) for k, v in weights(out).items())


def test_data_takes_many_files_after_one_option():
    spread = cli.spread(["soft", "m", "--data", "a", "b", "--out", "o", "--data", "c"])
    assert spread == ["soft", "m", "--data", "a", "--data", "b", "--out", "o", "--data", "c"]


def test_help_does_not_import_torch():
    check = (
        "import sys; from adaptive_gen.train import cli; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(cli.app, ['soft', '--help']); "
        "assert r.exit_code == 0 and '--exit-layers' in r.output, r.output; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
