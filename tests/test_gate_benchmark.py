"""The comparison of confidence measures: settings keep to the agreement, checks are counted."""

import numpy as np
import pytest
import torch
from test_calibrate_run import model  # noqa: F401

from adaptive_gen.calibrate.cost import TERMS, Cost
from adaptive_gen.calibrate.search import Traced
from adaptive_gen.calibrate.trace import Trace
from adaptive_gen.calibration import ConfidenceMap
from benchmarks import gate

IDENTITY = ConfidenceMap((0.0, 1.0), (0.0, 1.0))


def test_the_fastest_setting_at_an_agreement_and_its_checks():
    # Four decoded tokens: two sure and right, one unsure and right, one nearly sure and wrong.
    raw = np.array([1.0, 0.99, 0.99, 0.4, 0.8])[None, :, None]
    agrees = np.array([1, 1, 1, 1, 0], bool)[None, :, None]
    trace = Trace((2, 8), np.array([5]), {"margin": raw}, agrees)
    cost = Cost({**dict.fromkeys(TERMS, 0.0), "layers": 1.0}, 0.0)
    traced = Traced.of(trace, {2: IDENTITY}, "margin", cost, "recompute", 16)
    found, checks = gate.chosen(traced, 1.0)
    assert found.agreement == 1.0 and 0.8 < found.threshold <= 0.99
    assert checks == pytest.approx(4 / 5), "every decoded token is asked once"
    loose, _ = gate.chosen(traced, 0.8)
    assert loose.threshold <= 0.4 and loose.speedup > found.speedup


def test_every_measure_is_ranked_priced_and_measured(model):  # noqa: F811
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(200, (1, n), generator=draw) for n in (3, 4, 5, 6)]
    unseen, costs, ranks = gate.prepared(model, prompts, 4)
    rows = gate.compare(model, unseen, costs, 0.5, 4, 1)
    names = {"margin", "max_prob", "entropy", "gate"}
    assert names == set(costs) == {row["confidence"] for row in rows}
    assert {(r["confidence"], r["exit_layer"]) for r in ranks} == {
        (name, e) for name in names for e in (1, 2, 3)
    }
    for row in rows:
        assert 0 < row["checks_per_token"] <= 3 and row["wall_speedup"] > 0
