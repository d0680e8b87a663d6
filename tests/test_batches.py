"""Batches: every row is what that row alone would be, whatever the others do and when they end."""

import families
import pytest
import torch
from families import FAMILIES

import adaptive_gen
from adaptive_gen.errors import OptionError

LENGTHS = (3, 11, 1, 7, 20, 6, 2, 13)


def padded(lengths, vocab=96, seed=3):
    """Left-padded random prompts and their mask, as keywords of `generate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(2, vocab, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def row_alone(batch, row):
    length = int(batch["attention_mask"][row].sum())
    return {name: values[row : row + 1, -length:] for name, values in batch.items()}


def assert_rows_are_alone(model, batch, **settings):
    """Generate the batch and each of its rows; compare tokens, exits and ends."""
    settings = {"adaptive": True, "return_dict_in_generate": True, "max_new_tokens": 30, **settings}
    together = model.generate(**batch, **settings)
    width = batch["input_ids"].shape[1]
    for row in range(len(batch["input_ids"])):
        prompt = row_alone(batch, row)
        alone = model.generate(**prompt, **settings)
        new = alone.sequences[0, prompt["input_ids"].shape[1] :]
        ours = together.sequences[row, width:]
        assert torch.equal(ours[: len(new)], new), f"row {row}"
        assert (ours[len(new) :] == model.generation_config.pad_token_id).all()
        assert torch.equal(together.exit_layers[row, : len(new)], alone.exit_layers[0])
        assert not together.exit_layers[row, len(new) :].any()
    return together


def wrapped(family, **config):
    engine = config.pop("engine", "auto")
    dtype = config.pop("dtype", torch.float64)
    model = adaptive_gen.wrap(families.make(family, dtype, **config), [2, 4], engine=engine)
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_never_exiting_is_transformers_with_left_padding(family):
    for rows in (1, 3, 8):
        batch = padded(LENGTHS[:rows])
        model, expected = untied(family, batch)
        ours = model.generate(**batch, max_new_tokens=18, adaptive=True, threshold=1.0)
        assert torch.equal(ours, expected)


def untied(family, batch):
    """A model, and transformers' texts of it in which no token was as likely as another."""
    for seed in range(8):
        model = wrapped(family, dtype=torch.float32, seed=seed)
        kwargs = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**batch, max_new_tokens=18, **kwargs)
        best, second = torch.stack(out.logits).topk(2).values.unbind(-1)
        if (best - second).min() > 1e-4:  # rounding is far less
            return model, out.sequences
    raise AssertionError("all of them have ties")


MODES = {"recompute": {"kv": "recompute"}, "propagate": {"kv": "propagate"}}
MODES["lossless"] = {"lossless": True}
SCHEDULES = ("stepwise", "lockstep")
# Every mode and schedule where each back end and kind of attention is met, one of each elsewhere.
CLOSELY = ("llama", "mistral", "qwen3", "gemma2", "gpt2")
CROSSED = [(f, m, s) for f in CLOSELY for m in MODES for s in SCHEDULES]
CROSSED += [
    (family, mode, SCHEDULES[(i + j) % 2])
    for i, family in enumerate(f for f in FAMILIES if f not in CLOSELY)
    for j, mode in enumerate(MODES)
]


@pytest.mark.parametrize(("family", "mode", "schedule"), CROSSED)
def test_a_row_is_what_it_is_alone(family, mode, schedule):
    rows = 8 if family == "llama" else 3
    assert_alone_at_mixed_depths(family, mode, schedule, rows, new_tokens=20)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_eight_is_what_it_is_alone(family, mode, schedule):
    assert_alone_at_mixed_depths(family, mode, schedule, rows=8, new_tokens=10)


def assert_alone_at_mixed_depths(family, mode, schedule, rows, new_tokens):
    out = assert_rows_are_alone(
        wrapped(family),
        padded(LENGTHS[:rows]),
        **MODES[mode],
        schedule=schedule,
        policy=Uneven(),
        max_new_tokens=new_tokens,
    )
    assert mode == "lossless" or len(out.report.exit_histogram) == 3, "depths must differ"


class Uneven:
    """Leaves at depths that follow from token and position, so that rows part at every step."""

    def may_exit(self, exit_layer, position):
        return True

    def should_exit(self, check):
        return (check.token + check.position) % 3 == {2: 0, 4: 1}[check.exit_layer]


@pytest.mark.parametrize("schedule", ["stepwise", "lockstep"])
@pytest.mark.parametrize("engine", ["compiled", "fused", "module"])
@pytest.mark.parametrize("mode", [{}, {"lossless": True}, {"prefill": "lazy"}])
def test_rows_that_end_at_different_times(engine, mode, schedule):
    model = wrapped("llama", engine=engine)
    batch = padded(LENGTHS)
    free = model.generate(**batch, max_new_tokens=30, adaptive=True, policy=Uneven())
    ends = free[:, batch["input_ids"].shape[1] :][[0, 3, 5], [4, 9, 0]].tolist()
    out = assert_rows_are_alone(
        model, batch, policy=Uneven(), schedule=schedule, eos_token_id=ends, **mode
    )
    assert len({len(row[row > 0]) for row in out.exit_layers}) > 2, "rows must end apart"


def test_a_finished_row_costs_nothing_more():
    model = wrapped("llama", engine="module")
    rows = []
    layer = model.model.layers[-1]
    handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    batch = padded(LENGTHS[:3])
    free = model.generate(**batch, max_new_tokens=30, adaptive=True, threshold=1.0)
    ends = int(free[1, batch["input_ids"].shape[1] + 5])
    rows.clear()
    out = model.generate(
        **batch,
        max_new_tokens=30,
        adaptive=True,
        threshold=1.0,
        eos_token_id=ends,
        return_dict_in_generate=True,
    )
    handle.remove()
    lengths = (out.exit_layers > 0).sum(-1).tolist()
    assert len(set(lengths)) > 1
    # A pass a step, with the rows that have not ended before it.
    assert rows == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_lockstep_runs_deep_layers_less_often():
    model = wrapped("llama")
    runs = {}
    for schedule in ("stepwise", "lockstep"):
        out = model.generate(
            **padded(LENGTHS),
            max_new_tokens=40,
            adaptive=True,
            policy=Uneven(),
            schedule=schedule,
            return_dict_in_generate=True,
        )
        runs[schedule] = out.report.deep_passes
    assert runs["lockstep"] < runs["stepwise"]


def test_num_return_sequences_and_seeded_sampling_are_transformers():
    model = wrapped("llama", dtype=torch.float32)
    settings = {**padded(LENGTHS[:2]), "max_new_tokens": 16, "do_sample": True, "top_p": 0.9}
    settings["num_return_sequences"] = 3
    torch.manual_seed(5)
    expected = model.generate(**settings)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**settings, adaptive=True, threshold=1.0), expected)


def test_rows_draw_on_as_transformers_does_when_others_have_ended():
    model = wrapped("llama", dtype=torch.float32)
    settings = {**padded(LENGTHS[:3]), "max_new_tokens": 15, "do_sample": True}
    settings |= {"eos_token_id": list(range(2, 20)), "pad_token_id": 0}
    ended = 0
    for seed in range(4):
        torch.manual_seed(seed)
        expected = model.generate(**settings)
        torch.manual_seed(seed)
        ours = model.generate(**settings, adaptive=True, threshold=1.0)
        assert torch.equal(ours, expected)
        ended += int((ours[:, -1] == 0).sum())
    assert ended > 2


def test_scores_of_a_batch_are_transformers():
    model = wrapped("llama", dtype=torch.float32)
    settings = {
        **padded(LENGTHS[:3]),
        "max_new_tokens": 5,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(**settings)
    ours = model.generate(**settings, adaptive=True, threshold=1.0)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(ours, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_allowed_prefixes_are_asked_for_by_the_row_of_the_batch():
    model = wrapped("llama")
    batch = padded(LENGTHS[:3])
    width = batch["input_ids"].shape[1]

    def allowed(row, ids):  # each row may only say its own two tokens; row 0 ends after four
        return [1] if row == 0 and len(ids) - width == 4 else [10 + row, 20 + row]

    settings = {**batch, "prefix_allowed_tokens_fn": allowed, "max_new_tokens": 12}
    settings["eos_token_id"] = 1
    expected = model.generate(**settings, do_sample=False)
    ours = model.generate(**settings, adaptive=True, threshold=1.0)
    assert torch.equal(ours, expected)
    mixed = model.generate(**settings, adaptive=True, policy=Uneven(), schedule="lockstep")
    for row in range(3):
        assert set(mixed[row, width:].tolist()) <= {0, 1, 10 + row, 20 + row}


def test_what_a_batch_cannot_have_is_refused_by_name():
    model = wrapped("llama")
    batch = padded(LENGTHS[:2])
    with pytest.raises(OptionError, match="streamer shows one text"):
        model.generate(**batch, adaptive=True, max_new_tokens=5, streamer=_Streamer())
    hidden = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(OptionError, match="hides a whole prompt"):
        model.generate(**hidden, adaptive=True, max_new_tokens=5)
    right = {name: values.flip(1) for name, values in batch.items()}
    with pytest.raises(OptionError, match="right padding"):
        model.generate(**right, adaptive=True, max_new_tokens=5)


class _Streamer:
    def put(self, value):
        """Take a token."""

    def end(self):
        """End."""
