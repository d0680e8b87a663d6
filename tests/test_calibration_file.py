"""The calibration artefact: what is written is what is read, and what is broken is refused."""

import dataclasses
import json

import pytest
import torch

import adaptive_gen
from adaptive_gen.calibration import (
    FILE_NAME,
    Calibration,
    ConfidenceMap,
    OperatingPoint,
    fingerprint,
    load,
    save,
)
from adaptive_gen.certificate import Certificate
from adaptive_gen.errors import CalibrationError, OutputError, Unreachable
from adaptive_gen.settings import state

PROMPT = torch.tensor([[3, 4, 5]])


def make(**changes):
    slow = OperatingPoint(0.95, (2, 4, 6), 5.0, 1.2, 0.99, 1.15, 1.1, (1.05, 1.15), 900)
    fast = OperatingPoint(0.7, (2, 6), 3.0, 2.0, 0.93, 1.7, None, None, 900)
    curve = ConfidenceMap((0.1, 0.5, 0.9), (0.2, 0.8, 0.98))
    values = {
        "n_layers": 6,
        "confidence": "margin",
        "kv": "recompute",
        "maps": {"margin": {2: curve, 4: curve}},
        "points": (slow, fast),
        "default": 0,
        "fingerprint": {},
        "recipe": {"seed": 0},
    }
    return Calibration(**{**values, **changes})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = save(make(), tmp_path)
    assert path == tmp_path / FILE_NAME
    assert load(tmp_path) == load(path) == make()
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


def test_a_map_is_linear_between_knots_and_flat_beyond():
    curve = ConfidenceMap((0.1, 0.5, 0.9), (0.2, 0.8, 0.98))
    assert [curve(x) for x in (0.0, 0.1, 0.9, 1.0)] == [0.2, 0.2, 0.98, 0.98]
    assert curve(0.3) == pytest.approx(0.5)
    assert ConfidenceMap((0.5, 0.5), (0.1, 0.9))(0.5) == 0.9


@pytest.mark.parametrize(
    ("raw", "chance"),
    [((), ()), ((0.1,), (0.1, 0.2)), ((0.5, 0.1), (0.1, 0.2)), ((0.1, 2.0), (0.1, 0.2))],
)
def test_broken_maps_are_refused(raw, chance):
    with pytest.raises(CalibrationError):
        ConfidenceMap(raw, chance)


def test_a_target_picks_the_most_faithful_point_that_is_fast_enough():
    calibration = make()
    assert calibration.for_speedup(1.05).threshold == 0.95
    assert calibration.for_speedup(1.5).threshold == 0.7
    with pytest.raises(Unreachable, match=r"1\.70x"):
        calibration.for_speedup(1.9)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(version=99),
        lambda d: d.pop("points"),
        lambda d: d.update(points=[]),
        lambda d: d.update(default=7),
        lambda d: d.update(maps=[]),
        lambda d: d.update(confidence="entropy"),
        lambda d: d["maps"]["margin"].update({"x": {"raw": [0], "chance": [0]}}),
        lambda d: d["points"][0].update(surprise=1),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, damage):
    path = save(make(), tmp_path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="calibrate run") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "", "{", "[1]"])
def test_a_missing_or_truncated_file_is_one_clear_line(tmp_path, text):
    if text is not None:
        (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CalibrationError, match="calibrate run"):
        load(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        save(make(), tmp_path / "nowhere")


def test_generation_uses_the_calibrated_point_and_maps(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(), calibration=make())
    assert state(model).exit_layers == (2, 4, 6)
    ids = {"input_ids": PROMPT, "max_new_tokens": 20, "return_dict_in_generate": True}
    chosen = model.generate(**ids, adaptive=True)
    same = model.generate(**ids, adaptive=True, threshold=0.95, exit_layers=[2, 4])
    assert chosen.exit_layers.tolist() == same.exit_layers.tolist()

    fast = model.generate(**ids, adaptive=True, target_speedup=1.5)
    assert set(fast.report.exit_histogram) <= {2, 6}

    # No confidence is mapped above 0.98: beyond it every token runs at full depth.
    never = model.generate(**ids, adaptive=True, threshold=0.981)
    assert set(never.report.exit_histogram) == {6}
    # The least chance of the map is 0.2: at or below it every token leaves at once.
    always = model.generate(**ids, adaptive=True, threshold=0.2)
    assert set(always.report.exit_histogram) == {2, 6}
    assert always.confidences.nan_to_num(1.0).min() >= 0.2


def test_a_calibration_of_another_depth_is_refused(tiny_llama):
    with pytest.raises(CalibrationError, match="8 layers"):
        adaptive_gen.wrap(tiny_llama(), calibration=dataclasses.replace(make(), n_layers=8))


def test_the_fingerprint_tells_weights_apart_and_not_how_they_are_stored(tiny_llama):
    same = fingerprint(tiny_llama().bfloat16())["model"]
    assert fingerprint(tiny_llama().bfloat16().float())["model"] == same
    assert fingerprint(tiny_llama(seed=1).bfloat16())["model"] != same


def test_a_calibration_of_other_weights_is_used_and_said(tiny_llama, caplog):
    made_on = fingerprint(tiny_llama(seed=1), engine="fused")
    model = adaptive_gen.wrap(tiny_llama(), calibration=make(fingerprint=made_on))
    assert "another model" in caplog.text
    out = model.generate(PROMPT, adaptive=True, max_new_tokens=3)
    assert out.shape == (1, 6)
    caplog.clear()
    adaptive_gen.wrap(tiny_llama(seed=1), calibration=make(fingerprint=made_on))
    assert not caplog.text


@pytest.mark.parametrize("engine", ["fused", "compiled"])
def test_auto_keeps_to_the_back_end_that_was_calibrated(tiny_llama, engine, caplog):
    made_on = fingerprint(tiny_llama(), engine)
    kept = adaptive_gen.wrap(tiny_llama(), calibration=make(fingerprint=made_on))
    assert state(kept).backend.name == engine
    assert not caplog.text
    other = adaptive_gen.wrap(tiny_llama(), calibration=make(fingerprint=made_on), engine="module")
    assert state(other).backend.name == "module"
    assert "another engine" in caplog.text


def certified(**changes):
    promise = Certificate("prefix", 0.1, 0.95, 0.05, 0.01, 200, "betting", 64, ({"risk": 0.05},))
    points = make().points
    return make(points=(dataclasses.replace(points[0], certificate=promise), points[1]), **changes)


def test_certificates_thresholds_per_exit_and_qualities_survive_the_file(tmp_path):
    slow, fast = certified().points
    own = dataclasses.replace(fast, threshold={2: 0.9, 4: 0.6}, quality={"exact": (0.1, 0.0, 0.2)})
    found = make(points=(slow, own))
    save(found, tmp_path)
    assert load(tmp_path) == found
    assert found.certified and not found.without_certificates().certified


def test_a_file_of_version_1_is_still_read(tmp_path):
    path = save(make(), tmp_path)
    document = json.loads(path.read_text())
    document["version"] = 1
    for point in document["points"]:
        for field in ("latency_ms", "decode_speedup", "quality", "certificate"):
            del point[field]
    path.write_text(json.dumps(document))
    assert load(tmp_path) == make()


def test_thresholds_of_their_own_decide_generation(tiny_llama):
    own = dataclasses.replace(make().points[0], threshold={2: 0.95, 4: 0.3})
    model = adaptive_gen.wrap(tiny_llama(), calibration=make(points=(own,)))
    ids = {"input_ids": PROMPT, "max_new_tokens": 20, "return_dict_in_generate": True}
    chosen = model.generate(**ids, adaptive=True)
    same = model.generate(**ids, adaptive=True, threshold={2: 0.95, 4: 0.3})
    assert chosen.exit_layers.tolist() == same.exit_layers.tolist()
    assert 4 in chosen.report.exit_histogram


@pytest.mark.parametrize("difference", ["model", "tokenizer", "dtype", "sampling", "kv"])
def test_whatever_differs_withdraws_the_certificate_and_is_said_once(
    tiny_llama, byte_tokenizer, tmp_path, caplog, difference
):
    model = tiny_llama(eos_token_id=None)
    made_on = fingerprint(model, "fused", byte_tokenizer)
    if difference in ("model", "tokenizer", "dtype"):
        made_on[difference] = "another"
    model.generation_config.do_sample = difference == "sampling"
    model.save_pretrained(tmp_path)
    if difference == "kv":
        config = json.loads((tmp_path / "generation_config.json").read_text())
        config.update(kv="propagate", _from_model_config=False)
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    byte_tokenizer.save_pretrained(tmp_path)
    save(certified(fingerprint=made_on), tmp_path)
    loaded, _ = adaptive_gen.load(tmp_path)
    assert caplog.text.count("certificate is withdrawn") == 1
    assert not state(loaded).calibration.certified
    assert loaded.generate(PROMPT, adaptive=True, max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_where_nothing_differs_the_certificate_stands(tiny_llama, byte_tokenizer, tmp_path, caplog):
    model = tiny_llama()
    save(certified(fingerprint=fingerprint(model, "fused", byte_tokenizer)), tmp_path)
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    loaded, _ = adaptive_gen.load(tmp_path)
    assert state(loaded).calibration.certified
    assert not caplog.text
