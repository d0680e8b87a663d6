"""The benchmark suite: arms do what their labels say, and results say how they were made."""

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from adaptive_gen import paired
from adaptive_gen.paired import measure
from benchmarks import arms, figure, mechanism, readme, shapes, suite, sweep
from benchmarks.arms import Arm, Stage

TINY = dataclasses.replace(shapes.SMALL[0], name="tiny", layers=4, hidden=32, vocab=64)
ROOT = Path(__file__).parents[1]
PLAIN = {"adaptive": False}


@pytest.fixture(scope="module")
def model():
    return shapes.build(TINY, [1, 2], "cpu", torch.float32)


@pytest.fixture(scope="module")
def prompts():
    return arms.random_prompts(TINY.vocab, 6, 2, "cpu")


def test_a_script_has_its_share_of_deep_tokens_spread_evenly():
    for deep in (0.2, 0.3, 0.5):
        depths = shapes.script(1, 4, deep, 100)
        assert depths.count(4) == pytest.approx(100 * deep)
        for start in range(0, 90, 10):
            assert abs(depths[start : start + 10].count(4) - 10 * deep) <= 1


def test_every_depth_of_a_random_model_says_the_same_from_the_first_exit_on(model, prompts):
    states = model(prompts[0], output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2]) and torch.equal(states[2], states[3])


def test_a_truncated_model_is_the_first_layers_and_copies_nothing(model, prompts):
    short = shapes.truncated(model, 2)
    assert len(short.model.layers) == 2 and len(model.model.layers) == 4
    hidden = model(prompts[0], output_hidden_states=True).hidden_states[2]
    assert torch.equal(short(prompts[0]).logits, model.lm_head(model.model.norm(hidden)))
    assert short.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_arms_of_the_mechanism_run_at_the_depth_they_say(monkeypatch):
    once = Arm("early exit", {**PLAIN, "assistant_early_exit": 1})  # tuning takes seconds
    monkeypatch.setattr(arms, "early_exit_arm", lambda _: once)
    found = mechanism.run(
        TINY,
        "cpu",
        tokens=21,
        prompts=1,
        prompt_length=4,
        rounds=1,
        compiled=False,
    )
    rows = found["arms"]
    assert not found["skipped"]
    assert rows["full_depth"]["wall_speedup"] == rows["full_depth"]["decode_speedup"] == 1.0
    assert rows["full_depth"]["mean_depth"] == rows["armed"]["mean_depth"] == 4
    # The first token comes from the prefill; 6 of the other 20 run deep, 14 leave after layer 1.
    deep = shapes.script(1, 4, 0.3, 22)[1:21].count(4)
    for kv in ("recompute", "propagate"):
        expected = (4 * (deep + 1) + (20 - deep)) / 21
        assert rows[f"exit_0.25_{kv}"]["mean_depth"] == pytest.approx(expected)
        assert rows[f"exit_0.25_{kv}"]["deep_passes"] >= deep
        row = rows[f"exit_0.25_{kv}"]
        for speedup, share in (("wall", "realised_share"), ("decode", "decode_realised_share")):
            gained = row[f"{speedup}_speedup"] - 1
            assert row[share] == pytest.approx(gained / (row["layer_speedup"] - 1))
    lossless = rows["lossless"]
    assert lossless["drafted"] == lossless["accepted"] > 0 and "mean_depth" not in lossless
    assert {"cut_2", "transformers", "transformers_static", "transformers_early_exit"} <= set(rows)
    assert all(row["new_tokens"] == 21 for row in rows.values())


def test_draft_settings_reach_the_drafter_and_are_put_back(model, prompts):
    before = model.generation_config.to_dict()
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(model.config.num_hidden_layers))
    for tokens in (1, 4):
        arm = {"assistant_early_exit": 1, "drafting": arms._drafting(tokens, 0.0)}
        calls.clear()
        paired.generate(Stage(model), prompts[0], max_new_tokens=12, **PLAIN, **arm)
        drafts, checks = calls.count(1), calls.count(4)
        # Every draft is right, so a check passes all of them and one token more.
        assert checks <= -(-12 // (tokens + 1)) + 1
        assert drafts >= checks - 1
    hook.remove()
    assert model.generation_config.to_dict() == before

    def fail(*_):
        if model.config.num_hidden_layers == 1:
            raise RuntimeError("out of memory")

    hook = model.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        paired.generate(Stage(model), prompts[0], max_new_tokens=12, **PLAIN, **arm)
    hook.remove()
    assert model.config.num_hidden_layers == 4
    assert model.generation_config.to_dict() == before


def test_the_fastest_choice_runs_and_what_fails_is_named(model, prompts, monkeypatch):
    seen = []

    def generate(stage, ids, *, max_new_tokens, speed=1.0, fails=False, **_):
        seen.append(speed)
        if fails:
            raise RuntimeError("no such device\nat line 3")
        out = type("Out", (), {"sequences": torch.zeros(1, ids.shape[1] + max_new_tokens)})()
        return out, 1.0 / speed

    monkeypatch.setattr(paired, "generate", generate)
    contest = {
        "full_depth": Arm("ours", {}),
        "tuned": Arm("tuned", {}, [{"speed": 1.5}, {"speed": 4.0}, {"speed": 2.0}]),
        "broken": Arm("broken", {"fails": True}),
    }
    found = arms.measure(Stage(model), prompts, contest, tokens=4, rounds=1)
    assert found.settings == {"tuned": {"speed": 4.0}}
    assert found.skipped == {"broken": "RuntimeError: no such device"}
    assert set(found.runs) == {"full_depth", "tuned"}
    assert paired.wall_speedup(found.runs["tuned"], found.runs["full_depth"]) == 4.0


def test_the_realised_share_is_of_what_the_saved_layers_could_give():
    assert arms._share(1.5, 2.0) == 0.5
    assert arms._share(1.0, 1.0) is None


def test_a_sweep_changes_one_thing_at_a_time(monkeypatch):
    axes = {"context": (8, 24), "batch": (3,), "exits": (1, 2), "vocab": (64, 128)}
    monkeypatch.setattr(sweep, "AXES", axes)
    points = sweep.run(TINY, "cpu", list(axes), tokens=4, rounds=1)
    expected = [(axis, value) for axis, values in axes.items() for value in values]
    assert [(p["axis"], p["value"]) for p in points] == expected
    assert [p["exit_layers"] for p in points] == [[1], [1], [1], [1], [1, 3], [1], [1]]
    for point in points:
        ours = {"full_depth", "adaptive", "propagate", "lossless"}
        assert set(point["arms"]) == {"transformers", *ours}
        texts = point["value"] if point["axis"] == "batch" else 1
        assert {arm["new_tokens"] for arm in point["arms"].values()} == {4 * texts}
    ET.fromstring(figure.growth(points[:2]))


def results(arms_of_it):
    recipe = {
        "command": "python -m benchmarks.suite",
        "commit": "abc1234",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": "Some CPU",
        "threads": 1,
        "dtype": "float32",
    }
    found = {
        "model": "small",
        "parameters": 4.4e6,
        "n_layers": 12,
        "prompts": 24,
        "static_truncation": "cut_9",
        "arms": arms_of_it,
    }
    return {"recipe": recipe, "end_to_end": found}


def arm(label, speed, agreement=1.0, **more):
    row = {"label": label, "tokens_per_s": speed, "agreement": agreement}
    return {**row, "wall_speedup": speed / 100, "wall_speedup_interval": [1.1, 1.4], **more}


ARMS = {
    "transformers": arm("transformers `generate`", 50.0),
    "full_depth": arm("full depth", 100.0, mean_depth=12.0),
    "adaptive": arm("adaptive", 125.0, 0.98, mean_depth=8.25),
    "threshold_0.5": arm("threshold 0.5", 150.0, 0.9, mean_depth=6.0),
    "cut_6": arm("cut off at layer 6", 190.0, 0.7),
    "cut_9": arm("cut off at layer 9", 130.0, 0.8),
}


def test_the_readme_s_table_holds_what_the_file_holds(tmp_path, monkeypatch):
    table = readme.table(results(ARMS), "results/x.json")
    assert "| adaptive | 125 | 8.25 | 0.980 |" in table
    assert "| transformers `generate` | 50 | 12 | 1.000 |" in table
    assert "| cut off at layer 9 | 130 | 9 | 0.800 |" in table
    assert "layer 6" not in table and "threshold" not in table
    assert "1.25x over our own full depth (95 % interval 1.10 to 1.40), 2.50x over" in table

    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(results(ARMS)))
    page = "before\n<!-- results: old.json -->\nold\n<!-- end of results -->\nafter\n"
    new = readme.rewritten(page, "x.json")
    assert new.startswith("before\n<!-- results: x.json -->\n| |") and new.endswith("\nafter\n")
    assert "old" not in new and readme.rewritten(new, "x.json") == new
    with pytest.raises(SystemExit, match="0 places"):
        readme.rewritten("nothing here", "x.json")


def test_the_readme_has_one_place_for_results_and_shows_what_its_file_says():
    [(name, shown)] = readme.PLACE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    document = json.loads((ROOT / name).read_text(encoding="utf-8"))
    if "end_to_end" in document:
        assert shown == readme.table(document, name)
    else:  # of `adaptive-gen bench`
        assert f"{document['wall_speedup']:.2f}x over our own full depth" in shown


def test_the_readme_has_one_table_of_machines_and_it_shows_what_the_files_say():
    [shown] = readme.MACHINES.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown == readme.machines() and shown.count("\n") == 2 + len(readme.MEASURED)
    assert f"({readme.RESULTS}/{readme.MEASURED[0][-1]}.json)" in shown


def test_the_figure_is_svg_with_every_point_inside_its_frame():
    picture = ET.fromstring(figure.speed_against_agreement(results(ARMS)["end_to_end"]))
    circles = [c.attrib for c in picture.iter("{http://www.w3.org/2000/svg}circle")]
    text = " ".join(picture.itertext())
    assert "agreement with full depth" in text and "static truncation, by layer" in text
    points = [c for c in circles if float(c["cy"]) > figure._top()]
    assert len(points) == len(ARMS)
    for c in points:
        assert figure.LEFT <= float(c["cx"]) <= figure.WIDTH - figure.RIGHT
        assert float(c["cy"]) <= figure.HEIGHT - figure.BOTTOM
    # Faster is higher, more faithful is further right.
    at = {c["fill"]: (float(c["cx"]), float(c["cy"])) for c in points}
    adaptive, transformers = (at[figure.COLOURS[i]] for i in (2, 0))
    assert adaptive[1] < transformers[1] and adaptive[0] < transformers[0]


def test_one_command_writes_results_that_say_how_they_were_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(shapes.BY_NAME, "5x64", TINY)
    monkeypatch.setattr(suite.micro, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(arms, "early_exit_arm", lambda _: Arm("early exit", PLAIN))
    words = "--track mechanism --shape 5x64 --rounds 1 --tokens 4 --prompts 1 --no-compile"
    monkeypatch.setattr("sys.argv", ["suite", *words.split(), "--out", str(tmp_path)])
    for _ in range(2):  # a second run does not replace the first
        suite.main()
    shown = capsys.readouterr().out
    assert "adaptive_gen, full depth" in shown and "wall_speedup" in shown
    first, second = sorted(tmp_path.glob("*.json"), key=lambda path: len(path.name))
    assert second.stem == f"{first.stem}-2" and str(first) in shown
    document = json.loads(first.read_text())
    assert words in document["recipe"]["command"]
    known = {"commit", "versions", "hardware", "dtype", "threads", "date", "load_before"}
    assert known <= set(document["recipe"])
    assert document["mechanism"][0]["model"] == "tiny"


def test_measuring_needs_no_second_loop():
    assert arms.paired.measure is measure
