"""What a run writes down: its log as JSON lines and curves, and how held-out text fares."""

import json

import pytest
from training import options, run

from adaptive_gen.errors import OptionError
from adaptive_gen.train.run import evaluate_model, train


def read(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["uniform", "rotating+propagated:0.5+distil:0.5"])
def test_held_out_text_is_scored_at_every_checkpoint(tmp_path, model_dir, data, objective):
    more = {"max_steps": 5, "save_steps": 2, "eval_data": [data], "objective": objective}
    out = train(options(model_dir, data, tmp_path / "out", **more), "soft")
    scored = [row for row in read(out) if "eval_loss" in row]
    assert [row["step"] for row in scored] == [2, 4, 5]
    last = evaluate_model(str(out), [data], None, seq_len=32).exits
    for score in last:
        found = scored[-1][f"eval_loss_exit_{score.exit_layer}"]
        assert found == pytest.approx(score.loss, abs=2e-4)
    assert scored[-1]["eval_loss"] == pytest.approx(sum(s.loss for s in last) / 3, abs=2e-4)
    assert [row["step"] for row in read(out) if "loss" in row] == [1, 2, 3, 4, 5]


def test_steps_are_told_between_log_lines_where_there_is_no_bar(
    tmp_path, model_dir, data, monkeypatch, capsys
):
    monkeypatch.setattr("adaptive_gen.ui.SILENCE_S", 0.0)
    train(options(model_dir, data, tmp_path / "out", max_steps=4, log_steps=2), "soft")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 1/4" and lines[-1].startswith("step 4/4 loss")


def test_a_share_is_kept_from_training(tmp_path, model_dir, data):
    half = {"max_steps": -1, "epochs": 1, "eval_share": 0.5, "batch_size": 1, "micro_batch": 1}
    steps = []
    for name, more in (("all", {"eval_share": 0.0}), ("half", {})):
        out = train(options(model_dir, data, tmp_path / name, **{**half, **more}), "sft")
        steps.append(json.loads((out / "training.json").read_text())["steps"])
    assert steps[1] == pytest.approx(steps[0] / 2, abs=1)
    assert any("eval_loss" in row for row in read(tmp_path / "half"))


def test_a_resumed_log_is_that_of_an_unbroken_run(tmp_path, model_dir, data):
    more = {"save_steps": 2, "eval_share": 0.2}
    whole = train(options(model_dir, data, tmp_path / "out", **more), "soft")
    expected = read(whole)
    import shutil

    for gone in ("checkpoints/checkpoint-4", "model.safetensors", "training.json"):
        path = whole / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(options(model_dir, data, tmp_path / "out", resume=True, **more), "soft")
    timed = ("runtime", "per_second")
    bare = [
        [{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows if "loss" in row]
        for rows in (read(whole), expected)
    ]
    assert bare[0] == bare[1] and len(bare[0]) == 4


def test_tensorboard_has_a_curve_for_every_exit(tmp_path, model_dir, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"tensorboard": True, "eval_share": 0.2}
    out = train(options(model_dir, data, tmp_path / "out", **more), "soft")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    names = {"train/loss", "train/loss_exit_1", "held-out/loss_exit_1"}
    assert names <= set(events.Tags()["scalars"])
    logged = [row["loss_exit_1"] for row in read(out) if "loss_exit_1" in row]
    found = [event.value for event in events.Scalars("train/loss_exit_1")]
    assert found == pytest.approx(logged) and len(found) == 4


def test_holding_out_twice_or_everything_is_refused(tmp_path, model_dir, data, monkeypatch, capsys):
    both = options(model_dir, data, tmp_path / "o", eval_data=[data], eval_share=0.1)
    with pytest.raises(OptionError, match="give one"):
        train(both, "soft")
    one = tmp_path / "one.txt"
    one.write_text("Just one text.")
    with pytest.raises(OptionError, match="leaves none"):
        train(options(model_dir, one, tmp_path / "o", eval_share=0.1), "soft")
    arguments = ["sft", model_dir, "--eval-data", data, tmp_path / "none.txt", "--data", data]
    code, _, err = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "o")
    assert code and "none.txt" in err
