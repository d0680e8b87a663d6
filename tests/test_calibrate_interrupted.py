"""Collecting that is killed, runs out of disk, or is shared by several processes."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

# Fixtures of the module that tests `run`.
from test_calibrate_run import calibrate, model_dir  # noqa: F401

from adaptive_gen.calibrate import trace as traces
from adaptive_gen.calibrate.collect import SHARD

PROMPTS = 480


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt number {i}" for i in range(PROMPTS)))
    return path


def command(model_dir, prompts, work, *more):  # noqa: F811
    words = ["collect", model_dir, "--work", work, "--prompts", prompts, "--max-new-tokens", 4]
    return [sys.executable, "-m", "adaptive_gen.calibrate.cli", *map(str, [*words, *more])]


def equal(one, other):
    return np.array_equal(one.agrees, other.agrees) and all(
        np.array_equal(a, b) for a, b in zip(one.texts, other.texts, strict=True)
    )


def test_after_kill_9_the_same_command_goes_on_from_finished_shards(
    model_dir,  # noqa: F811
    prompt_file,
    tmp_path,
):
    work = tmp_path / "work"
    first = subprocess.Popen(command(model_dir, prompt_file, work), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(work.glob("traces-*.npz"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = {path: path.stat().st_mtime_ns for path in work.glob("traces-*.npz")}
    assert 2 <= len(finished) < PROMPTS // SHARD and not (work / "traces.npz").exists()
    (work / ".half.part").write_bytes(b"PK")  # what a kill in the middle of a file leaves
    subprocess.run(command(model_dir, prompt_file, work), check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(work.glob(".*.part"))
    found = traces.load(work / "traces.npz")
    assert len(found.lengths) == PROMPTS
    shards = sorted(work.glob("traces-*.npz"))
    assert equal(found, traces.join([traces.load(path) for path in shards]))


def test_two_processes_collect_what_one_does(model_dir, prompt_file, tmp_path):  # noqa: F811
    subset = tmp_path / "few.txt"
    subset.write_text("\n".join(prompt_file.read_text().splitlines()[: 5 * SHARD - 3]))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    two = [
        subprocess.Popen(
            command(model_dir, subset, tmp_path / "two"),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    subprocess.run(command(model_dir, subset, tmp_path / "one"), check=True, capture_output=True)
    said = [process.communicate(timeout=240)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert "37 texts" in said[0] and "37 texts" not in said[1]
    one, other = (traces.load(tmp_path / name / "traces.npz") for name in ("one", "two"))
    assert len(one.lengths) == 37 and equal(one, other)


def test_run_and_its_clock_belong_to_one_process(calibrate, model_dir, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = calibrate("run", model_dir)
    assert code == 2 and "runs in one process" in err


LIMITED = """
import resource, sys
from adaptive_gen.calibrate import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
cli.main()
"""


def test_no_room_for_a_shard_is_one_line_and_nothing_is_lost(
    model_dir,  # noqa: F811
    prompt_file,
    tmp_path,
):
    few = tmp_path / "few.txt"
    few.write_text("\n".join(prompt_file.read_text().splitlines()[: 3 * SHARD]))
    whole = tmp_path / "whole"
    subprocess.run(command(model_dir, few, whole), check=True, capture_output=True)
    # The shards fit, the file of them all does not.
    room = max(path.stat().st_size for path in whole.glob("traces-*.npz")) + 1
    work = tmp_path / "work"
    words = command(model_dir, few, work)
    limited = [sys.executable, "-c", LIMITED, str(room), *words[3:]]
    stopped = subprocess.run(limited, capture_output=True, text=True)
    *_, last = stopped.stderr.splitlines()
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "cannot write" in last and "File too large" in last and "--work" in last
    assert not list(work.glob(".*")) and not (work / "traces.npz").exists()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("traces-*.npz")}
    assert len(kept) == 3
    subprocess.run(words, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert equal(traces.load(work / "traces.npz"), traces.load(whole / "traces.npz"))
