"""What the tests of training share: a short run, what it logged and what it wrote."""

import json
import sys

from transformers import AutoModelForCausalLM

from adaptive_gen.train import cli
from adaptive_gen.train.config import TrainConfig


def options(model_dir, data, out, **more):
    return TrainConfig(
        **{
            "model": str(model_dir),
            "data": [data],
            "out": out,
            "exit_layers": "1,3",
            "seq_len": 32,
            "batch_size": 4,
            "micro_batch": 4,
            "max_steps": 4,
            "log_steps": 1,
            "lr": 1e-3,
            **more,
        }
    )


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def losses(folder):
    """Logged loss of each step, from the last checkpoint."""
    (last,) = sorted(folder.glob("checkpoints/*"), key=lambda p: int(p.name.split("-")[1]))[-1:]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def run(monkeypatch, capsys, *arguments):
    """The command in this process. -> exit code, stdout, stderr"""
    monkeypatch.setattr(sys, "argv", ["adaptive-train", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err
