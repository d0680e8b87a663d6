"""Which families are taken, and that the others are refused in one line that says why."""

import families
import pytest
import support_table
import torch
from families import FAMILIES, REFUSED

import adaptive_gen
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.errors import ModelError
from adaptive_gen.losses import sorted_losses
from adaptive_gen.settings import state

NAMED = ("gpt2", "gpt_neox", "opt", "opt_350m", "falcon", "phi")
named_differently = pytest.mark.parametrize("family", NAMED)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_run_layer_by_layer_is_refused_in_one_line(family):
    config, reason, _ = REFUSED[family]
    model = families.build(family, config)
    with pytest.raises(ModelError, match=reason) as caught:
        adaptive_gen.wrap(model)
    assert "\n" not in str(caught.value)
    assert type(model).__name__ in str(caught.value)
    assert "adaptive" not in vars(model.generation_config), "a refused model stays as it was"


def test_the_readme_shows_what_was_tested():
    _, shown, _ = support_table.split(support_table.README.read_text(encoding="utf-8"))
    assert shown == support_table.table(), "stale: run `make support-table`"


def test_every_family_that_slides_is_tested_past_its_window():
    """Windows as long as the real ones would never be reached by the tests' texts."""
    windows = []
    for family in FAMILIES:
        config = families.make(family).config
        listed = getattr(config, "layer_types", None) or ["sliding_attention"]
        if getattr(config, "sliding_window", None) and "sliding_attention" in listed:
            windows.append(config.sliding_window)
    assert len(windows) > 10 and set(windows) == {families.WINDOW}


@named_differently
def test_readouts_are_the_logits_of_truncated_models(family):
    """An oracle that shares nothing with the adapter: the model itself, its layers cut off."""
    model = adaptive_gen.wrap(families.make(family, torch.float64))
    ids = torch.randint(2, 96, (1, 11))
    readouts = dict(state(model).decoder.readouts(ids, (2, 4, 6)))
    for exit_layer, logits in readouts.items():
        torch.testing.assert_close(
            logits, truncated(family, exit_layer)(ids).logits, atol=1e-8, rtol=0
        )


def truncated(family, exit_layer):
    model = families.make(family, torch.float64)
    base = model.get_decoder()
    name = "h" if hasattr(base, "h") else "layers"
    setattr(base, name, getattr(base, name)[:exit_layer])
    model.config.num_hidden_layers = exit_layer
    return model


@named_differently
def test_the_sorted_loss_is_the_mean_over_truncated_models(family):
    ids = torch.randint(2, 96, (2, 13))
    expected = torch.stack(
        [
            torch.nn.functional.cross_entropy(
                truncated(family, exit_layer)(ids, use_cache=False).logits[:, :-1].flatten(0, 1),
                ids[:, 1:].flatten(),
            )
            for exit_layer in (2, 4, 6)
        ]
    )
    model = families.make(family, torch.float64)
    found = sorted_losses(model, ids, ids, exit_layers=[2, 4])
    torch.testing.assert_close(torch.stack(list(found.per_exit.values())), expected.detach())
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), expected.mean().detach())
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


@named_differently
def test_traces_are_collected_of_differently_named_families(family):
    model = adaptive_gen.wrap(families.make(family), exit_layers=[2, 4])
    trace = collect(model, [torch.randint(2, 96, (1, n)) for n in (3, 6)], (2, 4, 6), 8)
    assert trace.lengths.tolist() == [8, 8] and trace.agrees.shape == (2, 8, 2)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "ways", [{"adaptive": False}, {"threshold": 1.0}, {"threshold": 0.0, "lossless": True}]
)
def test_a_text_longer_than_the_learned_positions_fails_as_in_transformers(ways, rows):
    """Drafts that would stand behind them are not made."""
    model = adaptive_gen.wrap(families.make("gpt2", max_position_embeddings=24))
    settings = {"input_ids": torch.tensor([[3, 4]] * rows), "do_sample": False}
    ways = {"adaptive": True, **ways}
    just_as_long = model.generate(**settings, max_new_tokens=22)
    assert torch.equal(model.generate(**settings, **ways, max_new_tokens=22), just_as_long)
    with pytest.raises(IndexError):
        model.generate(**settings, **ways, max_new_tokens=30)


def test_a_family_that_cannot_be_wrapped_may_still_be_trained():
    """The sorted loss runs the whole model and reads its layers out: it needs no cache or mask."""
    model = families.build("qwen3_next", REFUSED["qwen3_next"][0])
    ids = torch.randint(2, 96, (2, 9))
    assert list(sorted_losses(model, ids, ids, exit_layers=[2, 4]).per_exit) == [2, 4, 6]


@named_differently
def test_a_saved_model_is_loaded(family, byte_tokenizer, tmp_path):
    families.make(family, vocab_size=259).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = adaptive_gen.load(tmp_path, exit_layers=[3])
    chunks = list(adaptive_gen.stream(model, tokenizer, "abc", threshold=0.0, max_new_tokens=6))
    assert [chunk.exit_layer for chunk in chunks] == [6] + [3] * 5
