"""What the CPU tests claim, on a CUDA device: `pytest -m gpu`."""

import families
import pytest
import torch
from families import FAMILIES, GRAPHED

import adaptive_gen

pytestmark = pytest.mark.gpu

PROMPT = torch.arange(2, 14)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_never_exiting_is_transformers_greedy(family):
    model = adaptive_gen.wrap(families.make(family, torch.float64).cuda(), exit_layers=[2, 4])
    settings = {"input_ids": PROMPT.cuda(), "max_new_tokens": 48, "do_sample": False}
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, adaptive=True, threshold=1.0), expected)


@pytest.mark.parametrize("mode", [{"threshold": 1.0}, {"threshold": 0.05, "lossless": True}])
@pytest.mark.parametrize("engine", ["module", "graphs"])
def test_sampled_texts_are_transformers_from_the_same_seed(engine, mode):
    model = families.make("llama", torch.float64).cuda()
    model = adaptive_gen.wrap(model, exit_layers=[2, 4], engine=engine)
    batch = torch.stack([PROMPT[0], PROMPT[0].flip(0)]).cuda()
    settings = {"max_new_tokens": 48, "do_sample": True, "top_k": 20, "top_p": 0.9}
    for ids in (PROMPT.cuda(), batch):
        found = []
        for how in ({"adaptive": False}, {"adaptive": True, **mode}):
            torch.manual_seed(0)
            text = model.generate(ids, **settings, **how)
            found.append((text.tolist(), float(torch.rand((), device="cuda"))))
        assert found[0] == found[1]


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


CAPTURED = [family for family in GRAPHED if not FAMILIES[family].keys_by_length]


@pytest.mark.parametrize("mode", [{}, {"kv": "propagate"}, {"lossless": True}, {"audit": True}])
@pytest.mark.parametrize("family", CAPTURED)
def test_captured_steps_are_the_module_back_end(family, mode):
    outputs = []
    for engine in ("graphs", "module"):
        model = families.make(family, torch.float64).cuda()
        model = adaptive_gen.wrap(model, [2, 4], engine=engine)
        out = model.generate(
            PROMPT.cuda(),
            adaptive=True,
            threshold=0.3,
            max_new_tokens=48,
            return_dict_in_generate=True,
            **mode,
        )
        assert out.report.engine == engine
        outputs.append((out.sequences.tolist(), out.exit_layers.tolist()))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lossless_in_half_precision_is_the_same_engines_greedy(dtype):
    model = adaptive_gen.wrap(families.make("llama", dtype).cuda(), [2, 4], engine="graphs")
    settings = {"max_new_tokens": 64, "adaptive": True, "do_sample": False}
    greedy = model.generate(PROMPT.cuda(), threshold=1.0, **settings)
    drafted = model.generate(PROMPT.cuda(), threshold=0.3, lossless=True, **settings)
    assert torch.equal(drafted, greedy)


def test_graphs_are_captured_once_and_the_seconds_are_reported():
    model = families.make("llama", torch.bfloat16).cuda()
    model = adaptive_gen.wrap(model, [2, 4], engine="graphs")
    settings = {"max_new_tokens": 8, "adaptive": True, "threshold": 0.3}
    spent = [
        model.generate(PROMPT.cuda(), return_dict_in_generate=True, **settings).report.warm_up_s
        for _ in range(2)
    ]
    assert spent[0] > 0 and spent[1] == 0
