"""Whether exits pay in batches: what is timed, and that both arms do the same work."""

import pytest
import torch

import adaptive_gen
from adaptive_gen.calibrate import batches


def test_prompts_of_different_lengths_become_a_batch_with_left_padding():
    ids, mask = batches.padded([torch.tensor([[5, 6, 7]]), torch.tensor([[9]])])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_gain_is_full_depth_s_time_over_the_exits(tiny_llama, monkeypatch):
    model = adaptive_gen.wrap(tiny_llama(layers=4, eos_token_id=None), exit_layers=[1, 2])
    calls = []

    def clocked(model, ids, **settings):
        out = model.generate(input_ids=ids, return_dict_in_generate=True, **settings)
        calls.append((len(ids), settings["threshold"], out.report.new_tokens))
        return out, {1.0: 3.0, 0.0: 2.0}[settings["threshold"]]

    monkeypatch.setattr(batches, "generate", clocked)
    monkeypatch.setattr(batches, "ROWS", (2, 3))
    prompts = [torch.tensor([[3, 4]]), torch.tensor([[5, 6, 7]])]
    settings = {"adaptive": True, "threshold": 0.0, "exit_layers": [1, 4], "do_sample": False}
    assert batches.gains(model, prompts, settings, 5) == pytest.approx({2: 1.5, 3: 1.5})
    assert {(rows, tokens) for rows, _, tokens in calls} == {(2, 10), (3, 15)}
    assert sum(threshold == 1.0 for _, threshold, _ in calls) * 2 == len(calls)
