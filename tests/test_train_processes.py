"""Several processes train as one, and a process that is killed can be taken up again."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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


def logged(out, name):
    """One number of the log, in the order of the steps."""
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


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
    more = ["--objective", objective, "--eval-share", 0.25]
    line = command(model_dir, ragged, tmp_path / "two", *more)
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
    alone = {"objective": objective, "eval_share": 0.25}
    one = train(options(model_dir, ragged, tmp_path / "one", **alone), "soft")
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    found, expected = losses(tmp_path / "two"), losses(one)
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=1e-4)
    scored = logged(tmp_path / "two", "eval_loss_exit_1")
    assert scored == pytest.approx(logged(one, "eval_loss_exit_1"), abs=2e-4) and len(scored) == 1
    wanted = weights(one)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-4)


SHARDED = """
import os, sys
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
# accelerate shards on accelerators alone and takes DDP on CPUs; torch shards on CPUs as well.
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
made = transformers.TrainingArguments.__init__
def make(self, *args, **kwargs):
    made(self, *args, **{**kwargs, "use_cpu": False, "ddp_backend": None})
transformers.TrainingArguments.__init__ = make
from adaptive_gen.train import cli
sys.argv[0] = "adaptive-train"
cli.main()
"""


def test_two_shards_of_fsdp2_equal_one_process(tmp_path, model_dir, data):
    """The recipe's own settings through `accelerate launch`: weights sharded layer by layer."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    recipe = Path(__file__).parents[1] / "train/recipes/fsdp2.yaml"
    _, _, _, _, *arguments = command(model_dir, data, tmp_path / "two", "--eval-share", 0.2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(recipe)]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port())]
    launched = subprocess.Popen(
        [*launch, str(script), "soft", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    one = train(options(model_dir, data, tmp_path / "one", eval_share=0.2), "soft")
    _, err = launched.communicate(timeout=400)
    assert launched.returncode == 0, err
    for name in ("loss", "eval_loss_exit_1", "eval_loss_exit_4"):
        expected = logged(one, name)
        assert logged(tmp_path / "two", name) == pytest.approx(expected, abs=2e-4) and expected
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
