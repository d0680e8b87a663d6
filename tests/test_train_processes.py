"""Several processes train as one, and a process that is killed can be taken up again."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from training import losses, options, weights

from adaptive_gen.train.run import train


def command(model_dir, data, out, *more):
    """The command line of `options(model_dir, data, out)`."""
    fixed = ["--exit-layers", "1,3", "--seq-len", 32, "--batch-size", 4, "--micro-batch", 2]
    fixed += ["--max-steps", 4, "--log-steps", 1, "--lr", 1e-3]
    words = ["soft", model_dir, "--data", data, "--out", out, *fixed, *more]
    return [sys.executable, "-m", "adaptive_gen.train.cli", *map(str, words)]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("objective", ["distil", pytest.param("sampled", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path, model_dir, data, objective):
    """Answers of different lengths, so that the two processes hold unequal numbers of labels."""
    rows = [{"prompt": "p" * (1 + i % 7), "completion": "c" * (1 + i % 13)} for i in range(16)]
    ragged = data.with_name("ragged.jsonl")
    ragged.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    line = command(model_dir, ragged, tmp_path / "two", "--objective", objective)
    started = [
        subprocess.Popen(
            line,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    one = train(options(model_dir, ragged, tmp_path / "one", objective=objective), "soft")
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    found, expected = losses(tmp_path / "two"), losses(one)
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=1e-4)
    wanted = weights(one)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-4)


KILLED = """
import os, signal, sys
from adaptive_gen.train import cli, trainer
score, calls = trainer.score_exits, []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 6:  # half way through the third step, after the checkpoint of the second
        os.kill(os.getpid(), signal.SIGKILL)
    return score(*args, **kwargs)
trainer.score_exits = dying
sys.argv[0] = "adaptive-train"
cli.main()
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, model_dir, data):
    _, _, _, *arguments = command(model_dir, data, tmp_path / "out", "--save-steps", 2)
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out/model.safetensors").exists()
    more = {"micro_batch": 2, "save_steps": 2}
    out = train(options(model_dir, data, tmp_path / "out", resume=True, **more), "soft")
    whole = train(options(model_dir, data, tmp_path / "whole", **more), "soft")
    assert [r["loss"] for r in losses(out)] == [r["loss"] for r in losses(whole)]
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())
