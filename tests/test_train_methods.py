"""Every method, objective and way of running trains what it says and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training import losses, options, run, weights
from transformers import AutoModelForCausalLM

from adaptive_gen.errors import AdaptiveGenError
from adaptive_gen.train.run import evaluate_model, train


def test_the_objective_is_recorded_and_decides_what_is_trained(tmp_path, model_dir, data):
    out = train(options(model_dir, data, tmp_path / "out", objective="rotating+distil"), "soft")
    config = json.loads((out / "config.json").read_text())
    assert (config["exit_layers"], config["exit_objective"]) == ([1, 3, 4], "rotating+distil:0.5")
    notes = json.loads((out / "training.json").read_text())
    assert notes["objective"] == "rotating+distil:0.5" and notes["method"] == "soft"
    assert notes["tokens"] > 0 and notes["tokens_per_s"] > 0
    assert notes["settings"]["seq_len"] == 32 and notes["steps"] == 4
    read = [{k for k in row if k.startswith("loss_exit")} for row in losses(out)]
    assert read[0] == {"loss_exit_1", "loss_exit_4"} and read[1] == {"loss_exit_3", "loss_exit_4"}


@pytest.mark.parametrize(
    "objective", ["sampled", "dropout:0.5", "propagated:0.5+distil", "gradual"]
)
def test_every_objective_resumes_where_it_stopped(tmp_path, model_dir, data, objective):
    import shutil

    more = {"objective": objective, "max_steps": 4, "save_steps": 2}
    whole = train(options(model_dir, data, tmp_path / "whole", **more), "soft")
    broken = tmp_path / "broken/checkpoints/checkpoint-2"
    shutil.copytree(whole / "checkpoints/checkpoint-2", broken)
    # A checkpoint that a kill cut short is passed over.
    shutil.copytree(broken, broken.with_name("checkpoint-3"))
    (broken.with_name("checkpoint-3") / "trainer_state.json").write_text('{"global_st')
    resumed = train(options(model_dir, data, tmp_path / "broken", resume=True, **more), "soft")
    assert [r["loss"] for r in losses(resumed)] == [r["loss"] for r in losses(whole)]
    expected = weights(whole)
    assert all(torch.equal(v, expected[k]) for k, v in weights(resumed).items())


@pytest.mark.parametrize(
    ("own", "expected", "origin"),
    [([2], [2, 4], "the model's own"), (None, [1, 2, 3, 4], "quarters, as the model names none")],
)
def test_exits_that_are_not_named_are_the_model_s_own_else_quarters(
    tmp_path, model_dir, data, monkeypatch, capsys, own, expected, origin
):
    if own:
        shape = model_dir / "config.json"
        shape.write_text(json.dumps({**json.loads(shape.read_text()), "exit_layers": own}))
    say = f"exit layers {', '.join(map(str, expected))}: {origin}; --exit-layers names others"
    options = ["--data", data, "--seq-len", 32, "--batch-size", 4]
    code, printed, err = run(monkeypatch, capsys, "plan", model_dir, *options, "--json")
    assert code == 0 and say in err and json.loads(printed)["exit_layers"] == expected
    steps = ["--max-steps", 1, "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, "soft", model_dir, *options, *steps)
    assert code == 0 and say in err
    notes = json.loads((tmp_path / "out/training.json").read_text())
    assert notes["exit_layers"] == expected


def test_ict_trains_its_heads_and_nothing_else(tmp_path, model_dir, data):
    before = evaluate_model(str(model_dir), [data], "1,3", seq_len=32)
    steps = {"max_steps": 30, "lr": 1e-2}
    out = train(options(model_dir, data, tmp_path / "out", **steps), "ict")
    expected = weights(model_dir)
    found = weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    heads = load_file(out / "exit_readouts.safetensors")
    assert sorted(heads) == ["1.head.weight", "3.head.weight"]
    assert not any(torch.equal(head, expected["lm_head.weight"]) for head in heads.values())
    assert "exit_layers" not in json.loads((out / "config.json").read_text())
    after = evaluate_model(str(out), [data], None, seq_len=32)
    assert [s.exit_layer for s in after.exits] == [1, 3, 4]
    assert after.exits[-1].loss == before.exits[-1].loss
    for old, new in zip(before.exits[:-1], after.exits[:-1], strict=True):
        assert new.loss < old.loss - 0.5


def test_heads_of_another_model_are_refused(tmp_path, model_dir, data, tiny_llama):
    from safetensors.torch import save_file

    save_file({"2.head.weight": torch.zeros(3, 3)}, model_dir / "exit_readouts.safetensors")
    with pytest.raises(AdaptiveGenError, match=r"exit_readouts.safetensors"):
        evaluate_model(str(model_dir), [data], None)


def test_extract_starts_from_the_first_layers_and_trains_them_alone(tmp_path, model_dir, data):
    base = evaluate_model(str(model_dir), [data], "2", seq_len=32)
    out = train(options(model_dir, data, tmp_path / "o", layers=2, lr=0.0, max_steps=1), "extract")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    cut = evaluate_model(str(out), [data], None, seq_len=32)
    assert cut.exits[-1].loss == pytest.approx(base.exits[0].loss, abs=1e-6)
    assert [k for k in losses(out)[0] if k.startswith("loss_exit")] == ["loss_exit_2"]
    moved = train(options(model_dir, data, tmp_path / "p", layers=2), "extract")
    first = weights(out)
    assert all(not torch.equal(v, first[k]) for k, v in weights(moved).items())


def test_recomputing_layers_changes_no_loss(tmp_path, model_dir, data):
    found = [
        losses(train(options(model_dir, data, tmp_path / name, **more), "soft"))
        for name, more in (("a", {}), ("b", {"gradient_checkpointing": True}))
    ]
    assert [r["loss"] for r in found[1]] == pytest.approx([r["loss"] for r in found[0]], abs=1e-5)


@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_half_precision_trains(tmp_path, model_dir, data, dtype):
    steps = {"max_steps": 20, "lr": 1e-2, "dtype": dtype}
    out = train(options(model_dir, data, tmp_path / "out", **steps), "soft")
    logged = losses(out)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5
    stored = {value.dtype for value in load_file(out / "model.safetensors").values()}
    assert stored == {torch.float32 if dtype == "mixed" else torch.bfloat16}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("adapter", ["lora:4", "dora:4"])
def test_adapters_train_their_matrices_and_leave_a_plain_model(tmp_path, model_dir, data, adapter):
    pytest.importorskip("peft")
    steps = {"max_steps": 20, "lr": 1e-2, "adapter": adapter, "gradient_checkpointing": True}
    out = train(options(model_dir, data, tmp_path / "out", **steps), "soft")
    before, after = weights(model_dir), weights(out)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}
    logged = losses(out)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.2
    notes = json.loads((out / "training.json").read_text())
    assert 0 < notes["trained_parameters"] < notes["parameters"] / 2
    assert json.loads((out / "config.json").read_text())["exit_layers"] == [1, 3, 4]


def test_a_settings_file_says_what_the_command_line_says(
    tmp_path, model_dir, data, monkeypatch, capsys
):
    from adaptive_gen.train import cli
    from adaptive_gen.train import run as run_module

    seen = []
    monkeypatch.setattr(run_module, "train", lambda *a: seen.append(a) or tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_dir}\ndata: [{data}, other.txt]\nexit-layers: [1, 3]\nlr: 1.0e-3\n"
        "objective: linear\neos: false\nresume: true\nmax_bad_rows: 3\n"
    )
    spelled = ["soft", model_dir, "--data", data, "other.txt", "--exit-layers", "1,3"]
    spelled += ["--lr", "1e-3", "--objective", "linear", "--no-eos", "--resume"]
    for arguments in (
        [*spelled, "--max-bad-rows", 3],
        ["soft", "--config", file],
        ["soft", "--config", file, "--max-bad-rows", 4],
        ["soft", "--max-bad-rows", 3, "--config", file, "--data", "only.txt"],
    ):
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 0, err
    assert seen[0] == seen[1]
    assert seen[2][0].max_bad_rows == 4
    assert [str(path) for path in seen[3][0].data] == ["only.txt"]
    assert cli.METHODS.keys() == {"soft", "sft", "ict", "extract"}


@pytest.mark.parametrize(
    ("content", "says"),
    [("lr 3", "name: value"), ("a: [", "line"), ("rate: 3", "rate"), ("layers: 3", "layers")],
)
def test_a_settings_file_that_is_wrong_is_refused_in_one_line(
    tmp_path, content, says, monkeypatch, capsys
):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    for path in (file, tmp_path / "nowhere.yaml"):
        code, printed, err = run(monkeypatch, capsys, "soft", "--config", path)
        assert code == 2 and printed == "" and len(err.splitlines()) == 1, err
        assert says in err or path != file


def test_wrong_choices_are_refused_in_one_line(tmp_path, model_dir, data, monkeypatch, capsys):
    rest = [model_dir, "--data", data, "--out", tmp_path / "out"]
    for arguments in (
        ["soft", *rest, "--objective", "cubic"],
        ["soft", *rest, "--packing", "tight"],
        ["soft", *rest, "--adapter", "lora"],
        ["extract", *rest, "--layers", 9],
    ):
        code, printed, err = run(monkeypatch, capsys, *arguments)
        assert code == 2 and printed == "" and len(err.splitlines()) == 1, (arguments, err)
    assert not (tmp_path / "out").exists()
