"""What the CPU tests claim, on a CUDA device: `pytest -m gpu`."""

import families
import pytest
import torch
from families import FAMILIES

import adaptive_gen

pytestmark = pytest.mark.gpu

PROMPT = torch.arange(2, 14)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_never_exiting_is_transformers_greedy(family):
    model = adaptive_gen.wrap(families.make(family, torch.float64).cuda(), exit_layers=[2, 4])
    settings = {"input_ids": PROMPT.cuda(), "max_new_tokens": 48, "do_sample": False}
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, adaptive=True, threshold=1.0), expected)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_changes_no_token_and_no_depth(family, kv):
    settings = {"max_new_tokens": 48, "adaptive": True, "threshold": 0.3, "kv": kv}
    outputs = []
    for device in ("cpu", "cuda"):
        model = adaptive_gen.wrap(families.make(family, torch.float64).to(device), [2, 4])
        out = model.generate(PROMPT.to(device), return_dict_in_generate=True, **settings)
        outputs.append((out.sequences.tolist(), out.exit_layers.tolist()))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_decode(dtype):
    model = adaptive_gen.wrap(families.make("llama", dtype).cuda())
    out = model.generate(PROMPT.cuda(), adaptive=True, threshold=0.3, max_new_tokens=8)
    assert out.shape == (1, PROMPT.shape[1] + 8)
