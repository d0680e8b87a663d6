"""The gate: fitted where it can tell, judged on texts it has not seen, stored and read back."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import adaptive_gen
from adaptive_gen.calibrate import gate as fitting
from adaptive_gen.calibrate import maps
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.errors import CalibrationError, OptionError
from adaptive_gen.gate import Gate


def test_a_probe_finds_the_direction_that_decides():
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(4000, 12)) * np.linspace(0.1, 5, 12) + 3
    truth = draw.normal(size=12) / np.linspace(0.1, 5, 12)
    chance = 1 / (1 + np.exp(-((hidden - 3) @ truth) - 0.5))
    agrees = draw.random(4000) < chance
    weight, bias = fitting.probe(hidden, agrees, owner=np.repeat(np.arange(100), 40))
    found = 1 / (1 + np.exp(-(hidden @ weight) - bias))
    assert np.abs(found - chance).mean() < 0.03
    assert maps.auroc(found, agrees) > maps.auroc(chance, agrees) - 0.005


def test_where_nothing_can_be_told_the_penalty_keeps_the_probe_near_the_base_rate():
    draw = np.random.default_rng(0)
    hidden, agrees = draw.normal(size=(300, 60)), draw.random(300) < 0.8
    weight, bias = fitting.probe(hidden, agrees, owner=np.repeat(np.arange(30), 10))
    fresh = 1 / (1 + np.exp(-(draw.normal(size=(500, 60)) @ weight) - bias))
    assert fresh.mean() == pytest.approx(agrees.mean(), abs=0.08)
    assert fresh.std() < 0.2


def test_a_fitted_gate_reads_the_hidden_states_of_the_model(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), exit_layers=[1, 3])
    prompts = [torch.tensor([[i, 2 * i, 7]]) for i in range(8)]
    trace = collect(model, prompts, (1, 3, 4), 12)
    gate, rows = fitting.fit(model, trace, searched=5)
    assert gate.exit_layers == (1, 3)
    assert {(r.confidence, r.exit_layer) for r in rows} == {
        (name, e) for name in ("gate", "margin", "max_prob", "entropy") for e in (1, 3)
    }
    assert all(r.tokens == 3 * 12 for r in rows)
    ids = torch.from_numpy(trace.texts[0][:-1])[None]
    states = model(ids, output_hidden_states=True).hidden_states
    for k, exit_layer in enumerate((1, 3)):
        normed = model.model.norm(states[exit_layer])[0, -12:]
        assert torch.allclose(
            normed, torch.from_numpy(fitting.hidden_states(model, trace)[k][:12]), atol=1e-5
        )
        chance = gate(normed, exit_layer)
        assert chance.shape == (12,) and chance.dtype == torch.float32
        assert 0 <= chance.min() and chance.max() <= 1


def test_a_gate_survives_the_file(tmp_path):
    gate = Gate(
        {2: torch.randn(8), 4: torch.randn(8)}, {2: torch.tensor(0.5), 4: torch.tensor(0.0)}
    )
    path = gate.save(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    hidden = torch.randn(3, 8)
    for read in (Gate.load(path), Gate.load(tmp_path)):
        assert read.exit_layers == (2, 4) and read.hidden_size == 8
        assert torch.equal(read(hidden, 2), gate(hidden, 2))
    assert torch.allclose(gate(hidden, 2), torch.sigmoid(hidden @ gate.weights[2] + 0.5))
    with pytest.raises(OptionError, match="no probe for exit layer 3; it has 2, 4"):
        gate(hidden, 3)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight.2": torch.zeros(8)},
        {"weight.2": torch.zeros(8), "bias.2": torch.zeros(8)},
        {"weight.2": torch.zeros(2, 8), "bias.2": torch.tensor(0.0)},
        {"weight.two": torch.zeros(8), "bias.2": torch.tensor(0.0)},
        {"other": torch.zeros(8)},
    ],
)
def test_a_broken_gate_is_one_clear_line(tmp_path, tensors):
    save_file(tensors, tmp_path / "gate.safetensors")
    with pytest.raises(CalibrationError, match="calibrate gate") as error:
        Gate.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_or_truncated_gate_is_one_clear_line(tmp_path):
    with pytest.raises(CalibrationError, match="calibrate gate"):
        Gate.load(tmp_path)
    (tmp_path / "gate.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(CalibrationError, match="calibrate gate"):
        Gate.load(tmp_path)
