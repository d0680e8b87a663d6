"""A gate decides without the LM head: the head runs once a token, on the layer that exits."""

import pytest
import torch
from test_batches import LENGTHS, assert_rows_are_alone, padded, wrapped

import adaptive_gen
from adaptive_gen import Patience
from adaptive_gen.errors import OptionError
from adaptive_gen.gate import Gate
from adaptive_gen.settings import state

SETTINGS = {"adaptive": True, "max_new_tokens": 30, "return_dict_in_generate": True}


def gated(layers=(2, 4), **config):
    """A model with a gate that is random, and sure of about half of what it sees."""
    model = wrapped("llama", **config)
    generator = torch.Generator().manual_seed(1)
    weights = {layer: torch.randn(32, generator=generator) for layer in layers}
    state(model).gate = Gate(weights, {layer: torch.tensor(0.0) for layer in layers})
    return model


def test_the_gate_s_confidence_is_of_the_normed_hidden_state():
    model = gated()
    ids = padded([9])["input_ids"]
    out = model.generate(ids, **SETTINGS, confidence="gate", threshold=0.5)
    assert len(out.report.exit_histogram) > 1
    decoder, gate = state(model).decoder, state(model).gate
    from adaptive_gen.calibrate.collect import along

    hidden = dict(along(decoder, out.sequences[:, :-1], (2, 4)))
    checked = 0
    for i, (exit_layer, confidence) in enumerate(
        zip(out.exit_layers[0].tolist(), out.confidences[0].tolist(), strict=True)
    ):
        if exit_layer == 2:  # at layer 4 the state depends on which tokens left before
            with torch.no_grad():
                expected = float(gate(decoder.normed(hidden[2][0, 8 + i])[None], 2))
            assert confidence == pytest.approx(expected, abs=1e-5) and confidence >= 0.5
            checked += 1
    assert checked


def test_the_head_runs_once_a_token():
    model = gated(engine="module")
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    out = model.generate(padded([9])["input_ids"], **SETTINGS, confidence="gate", threshold=0.5)
    handle.remove()
    assert sum(rows) == out.report.new_tokens == 30


@pytest.mark.parametrize("mode", [{}, {"lossless": True}, {"kv": "propagate"}, {"audit": True}])
def test_rows_of_a_gated_batch_are_alone(mode):
    model = gated()
    assert_rows_are_alone(model, padded(LENGTHS[:3]), confidence="gate", threshold=0.5, **mode)


def test_a_policy_may_still_ask_for_the_token():
    model = gated()
    ids = padded([9])["input_ids"]
    by_gate = model.generate(ids, **SETTINGS, confidence="gate", policy=Patience(2))
    by_margin = model.generate(ids, **SETTINGS, policy=Patience(2))
    assert torch.equal(by_gate.sequences, by_margin.sequences)


def test_a_gate_is_found_beside_the_calibration(tmp_path):
    path = adaptive_gen.wrapping.BUILTIN
    (tmp_path / "calibration.json").write_bytes((path / "calibration.json").read_bytes())
    layers = (3, 6, 9)
    Gate(
        {layer: torch.zeros(160) for layer in layers},
        {layer: torch.tensor(9.0) for layer in layers},
    ).save(tmp_path)
    model, tokenizer = adaptive_gen.load(calibration=tmp_path)
    ids = tokenizer("Once", return_tensors="pt")["input_ids"]
    out = model.generate(
        ids,
        **SETTINGS | {"max_new_tokens": 6},
        confidence="gate",
        threshold=0.9,
        exit_layers=[3, 6],
    )
    assert out.exit_layers.tolist() == [[12, 3, 3, 3, 3, 3]][: len(out.exit_layers)]
    with pytest.raises(OptionError, match="no probe for exit layer 5"):
        model.generate(ids, **SETTINGS, confidence="gate", threshold=0.9, exit_layers=[5])


def test_without_a_gate_it_is_refused():
    with pytest.raises(OptionError, match="calibrate run --confidence gate"):
        wrapped("llama").generate(padded([3])["input_ids"], **SETTINGS, confidence="gate")
