"""Certificates on fresh prompts: what the benchmark counts, and that it runs the library's own."""

import json

import numpy as np
import pytest
from scipy.stats import hypergeom

# Fixtures of the module that tests `run`.
from test_calibrate_run import calibrate, model_dir  # noqa: F401

from adaptive_gen.calibrate import certify
from adaptive_gen.calibrate.certify import Promise
from adaptive_gen.calibrate.search import Candidate
from benchmarks import resplit

TEXTS, PROMISE = 200, Promise(0.2, loss="exact")
CAREFUL, FAST = (Candidate(0.9, (4, 8), 6.0, 0.9, speedup) for speedup in (1.1, 1.4))
ORDERED = [(CAREFUL, 0.0), (FAST, 0.1)]


def judge(fast):
    """Losses: the careful setting changes nothing, the fast one the first `fast` texts."""
    return {CAREFUL: np.zeros(TEXTS), FAST: (np.arange(TEXTS) < fast).astype(float)}.__getitem__


def test_a_setting_far_above_the_limit_is_not_certified_and_violates_nothing():
    found = resplit.resplit(ORDERED, judge(80), PROMISE, TEXTS, 50)
    assert found["certified"] == 50 and found["predicted_speedup"] == pytest.approx(1.1)
    assert found["violated"] == found["wrong"] == found["by_chance"] == 0
    none = resplit.resplit(ORDERED[1:], judge(80), PROMISE, TEXTS, 50)
    assert none["certified"] == 0 and none["mean_fresh_risk"] is None


def test_certificates_of_a_careless_test_are_counted_as_broken(monkeypatch):
    def trusting(losses, risk, delta):
        return 0.0

    monkeypatch.setitem(certify.TESTS, "exact", ("none", trusting))
    found = resplit.resplit(ORDERED, judge(44), PROMISE, TEXTS, 200)
    assert found["certified"] == found["wrong"] == 200, "22 % of texts change"
    # 44 of 200 texts fall on a half; more than 20 of 100 are above the limit.
    chance = hypergeom(TEXTS, 44, TEXTS // 2).sf(20)
    assert found["by_chance"] == pytest.approx(200 * chance, abs=200 * 0.05)
    assert found["violated"] == pytest.approx(200 * chance, abs=200 * 0.1)
    assert found["violated"] > found["allowed"] == 10


@pytest.mark.parametrize("loss", ["exact", "em"])
def test_one_command_splits_a_collection(calibrate, model_dir, tmp_path, monkeypatch, capsys, loss):  # noqa: F811
    work, out, file = tmp_path / "work", tmp_path / "found.json", tmp_path / "many.txt"
    file.write_text("\n".join(f"prompt number {i}" for i in range(50)))
    at = [model_dir, "--work", work]
    collect = ["collect", *at, "--prompts", file, "--max-new-tokens", 4, "--exit-layers", "1,3"]
    for args in (collect, ["profile", *at]):
        code, _, err = calibrate(*args)
        assert code == 0, err
    kept = {path.name: path.read_bytes() for path in work.iterdir()}
    monkeypatch.setattr(resplit, "LIMITS", {loss: (0.6, 0.8)})
    words = ["--work", work, "--model", model_dir, "--splits", 5, "--out", out]
    monkeypatch.setattr("sys.argv", ["resplit", *map(str, words)])
    resplit.main()
    assert loss in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["max_risk"] for row in found["rows"]] == [0.6, 0.8]
    assert all(row["splits"] == 5 for row in found["rows"])
    assert {path.name: path.read_bytes() for path in work.iterdir()} == kept, "only read"
