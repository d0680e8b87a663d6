"""The gate: fitted where it can tell, judged on texts it has not seen, stored and read back."""

import dataclasses

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


@pytest.fixture
def collected(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), exit_layers=[1, 3])
    prompts = [torch.tensor([[i, 2 * i, 7]]) for i in range(8)]
    return model, collect(model, prompts, (1, 3, 4), 12)


def test_a_fitted_gate_reads_the_hidden_states_of_the_model(collected):
    model, trace = collected
    gate, found = fitting.with_gate(model, trace, searched=5)
    assert gate.exit_layers == (1, 3)
    assert set(found.confidence) == {*trace.confidence, "gate"}
    states = [
        model(torch.from_numpy(text[:-1])[None], output_hidden_states=True).hidden_states
        for text in trace.texts
    ]
    for k, exit_layer in enumerate((1, 3)):
        normed = [model.model.norm(of[exit_layer])[0, -12:] for of in states]
        read = torch.from_numpy(fitting.hidden_states(model, trace)[k])
        assert torch.allclose(torch.cat(normed), read, atol=1e-5)
        for text in range(5, 8):  # those it was not fitted on
            chance = gate(normed[text], exit_layer)
            assert chance.shape == (12,) and chance.dtype == torch.float32
            noted = found.confidence["gate"][text, :, k]
            assert np.allclose(chance.detach().numpy(), noted, atol=1e-5)


def test_what_a_gate_says_of_texts_it_was_fitted_on_is_said_by_others(collected):
    """Its own scores would tell nearly every token of these few texts apart."""
    model, trace = collected
    draw = np.random.default_rng(0)
    trace = dataclasses.replace(trace, agrees=draw.random(trace.agrees.shape) < 0.5)
    gate, found = fitting.with_gate(model, trace, searched=6)
    hidden = fitting.hidden_states(model, trace)[0][: 6 * 12]
    own = gate(torch.from_numpy(hidden), 1).numpy()
    others = found.confidence["gate"][:6, :, 0].ravel()
    agrees = trace.agrees[:6, :, 0].ravel()
    assert maps.auroc(own, agrees) > maps.auroc(others, agrees) + 0.1
    assert abs(maps.auroc(others, agrees) - 0.5) < 0.2, "there is nothing to tell"


def test_a_fit_that_outgrows_memory_takes_fewer_texts(collected, monkeypatch):
    model, trace = collected
    whole, _ = fitting.with_gate(model, trace, searched=4)
    monkeypatch.setattr(fitting, "MOST_NUMBERS", 4 * 12 * 32)
    some, found = fitting.with_gate(model, trace, searched=8)
    assert torch.equal(whole.weights[1], some.weights[1])
    assert np.all(found.confidence["gate"] > 0)


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
    with pytest.raises(CalibrationError, match="calibrate run --confidence gate") as error:
        Gate.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_or_truncated_gate_is_one_clear_line(tmp_path):
    with pytest.raises(CalibrationError, match="calibrate run --confidence gate"):
        Gate.load(tmp_path)
    (tmp_path / "gate.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(CalibrationError, match="calibrate run --confidence gate"):
        Gate.load(tmp_path)
