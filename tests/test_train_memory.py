"""What the exits cost in memory, by the allocator's own count, and what `plan` says before."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from training import run

from adaptive_gen.losses import sorted_losses
from adaptive_gen.train.config import TrainConfig
from adaptive_gen.train.plan import Means, plan

PROGRAM = Path(__file__).parents[1] / "benchmarks/train_memory.py"


@pytest.fixture(scope="module")
def program():
    """The measuring program of the benchmarks."""
    spec = importlib.util.spec_from_file_location("train_memory", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step(model, exits, distil=0.0, shape=(2, 64), chunk_size=32):
    ids = torch.randint(0, 200, shape)
    options = {"exit_layers": exits, "distil": distil, "chunk_size": chunk_size}
    return lambda: sorted_losses(model, ids, ids, **options).loss.backward()


def peak(program, model, *arguments, **options):
    run = step(model, *arguments, **options)
    run()
    model.zero_grad(set_to_none=True)
    found = program.allocated(run, "cpu")
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("distil", [0.0, 0.5])
def test_eight_exits_take_at_most_a_third_more_than_one(program, tiny_llama, distil):
    """The head dominates, as at a vocabulary of 128,000; weights and moments are not counted."""
    model = tiny_llama(layers=8, hidden=64, vocab=32000)
    alone = peak(program, model, [8])
    assert peak(program, model, list(range(1, 9)), distil) <= 1.3 * alone
    # It can fail: all logits of one exit at once are more.
    assert peak(program, model, [8], chunk_size=128) > 1.3 * alone


@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_counts_the_memory_that_a_step_takes(program, tiny_llama, tmp_path, recompute):
    model = tiny_llama(layers=8, hidden=64, vocab=2000, heads=4, kv_heads=4).train()
    model.save_pretrained(tmp_path)
    config = TrainConfig(
        model=str(tmp_path),
        exit_layers="2,4,6",
        seq_len=64,
        micro_batch=4,
        chunk_size=64,
        gradient_checkpointing=recompute,
    )
    said = plan(config, Means())
    assert said.parameters == sum(p.numel() for p in model.parameters())
    if recompute:
        new_name = getattr(model, "activation_checkpointing_enable", None)
        (new_name or model.gradient_checkpointing_enable)()
    again = step(model, [2, 4, 6, 8], shape=(4, 64), chunk_size=64)
    again()  # from here on the gradients are there
    taken = program.allocated(again, "cpu")
    assert said.memory.activations == pytest.approx(taken, rel=0.3)


def test_a_plan_names_steps_and_hours_only_where_it_knows_them(tmp_path, tiny_llama):
    tiny_llama(layers=4).save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), seq_len=32, batch_size=4, micro_batch=1, epochs=2)
    unknown = plan(config, Means())
    assert (unknown.steps, unknown.tokens, unknown.seconds) == (None, None, None)
    known = plan(config, Means(tokens=32 * 10, tokens_per_s=64, devices=2, sharded=True))
    assert (known.steps, known.tokens, known.seconds) == (6, 6 * 4 * 32, 12.0)
    assert known.memory.weights == unknown.memory.weights // 2
    assert known.memory.activations == unknown.memory.activations
    (tmp_path / "training.json").write_text(
        json.dumps({"tokens_per_s": 100.0, "parameters": 2 * known.parameters})
    )
    like = plan(config, Means(tokens=32 * 10, like=tmp_path))
    assert like.seconds == pytest.approx(known.tokens / 200)


def test_the_13b_recipe_can_be_planned_without_its_weights(monkeypatch, capsys):
    recipes = PROGRAM.parents[1] / "train/recipes"
    files = ["--config", recipes / "llama2_13b.yaml", "--from-config"]
    code, printed, err = run(
        monkeypatch,
        capsys,
        *["plan", *files, recipes / "llama2_13b_config.json", "--tokens-per-s", 1000, "--json"],
        *["--tokens", 2048 * 256],
    )
    assert code == 0, err
    said = json.loads(printed)
    assert said["parameters"] == 13_015_864_320 and said["exit_layers"][:2] == [12, 16]
    assert said["steps"] == 2 and said["seconds"] == pytest.approx(2 * 256 * 2048 / 1000)
    assert said["memory"]["total"] > 4 * 4 * said["parameters"]


def test_a_plan_that_cannot_be_made_is_one_line(tmp_path, model_dir, monkeypatch, capsys):
    for arguments in (
        ["plan"],
        ["plan", tmp_path / "nowhere"],
        ["plan", model_dir, "--dtype", "auto"],
        ["plan", model_dir, "--like", tmp_path],
        ["plan", model_dir, "--exit-layers", "9"],
    ):
        code, printed, err = run(monkeypatch, capsys, *arguments)
        assert code == 2 and printed == "" and len(err.splitlines()) == 1, (arguments, err)
