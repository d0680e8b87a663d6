"""Wrapped models together with what else is done to models: adapters, precisions, offloading."""

import copy
import pickle

import families
import pytest
import torch

import adaptive_gen
from adaptive_gen.engine.scheduler import Scheduler
from adaptive_gen.engine.stretch import Pace
from adaptive_gen.errors import ModelError
from adaptive_gen.generate import LoopHandover
from adaptive_gen.settings import state

IDS = torch.randint(2, 96, (1, 9), generator=torch.Generator().manual_seed(3))
GREEDY = {"input_ids": IDS, "max_new_tokens": 20, "do_sample": False}
FULL = {**GREEDY, "adaptive": True, "threshold": 1.0}
EXITS = [2, 4]
# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def assert_decodes_as_transformers(model, generate=None):
    """Never exiting gives the tokens of the very model; exiting runs; returns the tokens."""
    generate = generate or model.generate
    expected = generate(**GREEDY)
    assert torch.equal(generate(**FULL), expected)
    assert expected.unique().numel() > 3
    out = generate(**{**GREEDY, "adaptive": True, "threshold": 0.0}, return_dict_in_generate=True)
    assert out.report.mean_depth < 6 and out.report.new_tokens == 20
    return expected


# --- PEFT ---


@pytest.fixture
def adapted():
    """Factory: a LoRA adapter with random weights around a model, the head and embedding too."""
    peft = pytest.importorskip("peft")

    def make(model, **options):
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"]
        config = peft.LoraConfig(
            r=4,
            target_modules=targets,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **options,
        )
        return peft.get_peft_model(model, config).eval()

    return make


def untied():
    return families.make("llama", tie_word_embeddings=False)


def test_a_peft_model_is_wrapped_with_its_adapter(adapted):
    plain = untied().generate(**GREEDY)
    model = adapted(untied())
    assert adaptive_gen.wrap(model, EXITS) is model
    tuned = assert_decodes_as_transformers(model)
    assert not torch.equal(tuned, plain)
    assert "peft" in state(model).backend.reason
    with model.disable_adapter():
        assert torch.equal(model.generate(**FULL), plain)
    assert torch.equal(model.generate(**FULL), tuned)


def test_an_adapter_added_after_wrapping_is_used_everywhere(adapted):
    model = adaptive_gen.wrap(untied(), EXITS)
    assert state(model).backend.name == "compiled"
    expected = adapted(untied()).generate(**GREEDY)
    assert torch.equal(assert_decodes_as_transformers(adapted(model)), expected)
    assert state(model).backend.name == "module"


def test_the_causal_lm_inside_a_peft_model_may_be_wrapped_by_itself(adapted):
    model = adapted(untied())
    inner = adaptive_gen.wrap(model.get_base_model(), EXITS)
    assert torch.equal(assert_decodes_as_transformers(inner), assert_decodes_as_transformers(model))


def test_merged_adapters_run_on_the_fast_back_end(adapted):
    model = adapted(untied())
    adaptive_gen.wrap(model, EXITS)
    tuned = model.generate(**FULL)
    merged = model.merge_and_unload()
    assert torch.equal(assert_decodes_as_transformers(merged), tuned)
    assert state(merged).backend.name == "compiled"


def test_the_sorted_loss_reaches_the_adapter_only(adapted):
    model = adapted(untied())
    adaptive_gen.sorted_loss(model, IDS, IDS, exit_layers=EXITS).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in model.named_parameters() if "lora_" in name}


def test_learned_prompts_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        adaptive_gen.wrap(peft.get_peft_model(untied(), config))


# --- precisions, attention implementations, inference mode ---


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_uncapped", "gpt2", "falcon"])
def test_readouts_are_the_models_own_logits_in_every_precision(family, dtype, attention):
    """Compared along the text, since two equally good tokens may tie in half precision.

    (So may two experts, which is why no mixture of experts is among these.) Where hidden states are
    float32, it is the model's float32 copy that ours are compared with.
    """
    model = families.make(family, dtype, attn_implementation=attention)
    adaptive_gen.wrap(model, EXITS)
    out = model.generate(**FULL, output_logits=True, return_dict_in_generate=True)
    reference = model
    if state(model).backend.widens:
        reference = families.make(family, dtype, attn_implementation=attention).float()
        dtype = torch.float32
    with torch.no_grad():
        own = reference(out.sequences[:, :-1], use_cache=False).logits.float()
    own, ours = own[:, IDS.shape[1] - 1 :], torch.stack(out.logits, 1)
    tolerance = 8 * torch.finfo(dtype).eps * float(own.abs().max()) + 1e-4
    torch.testing.assert_close(ours, own, atol=tolerance, rtol=0)
    exited = model.generate(**{**FULL, "threshold": 0.0})
    assert exited.shape == out.sequences.shape


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tables_made_in_inference_mode_serve_outside_it(family):
    model = adaptive_gen.wrap(families.make(family), EXITS)
    with torch.inference_mode():
        inside = assert_decodes_as_transformers(model)
    assert torch.equal(model.generate(**FULL), inside)
    adaptive_gen.sorted_loss(model, IDS, IDS, exit_layers=EXITS).backward()


def test_a_model_made_in_inference_mode_can_be_wrapped():
    with torch.inference_mode():
        model = adaptive_gen.wrap(untied(), EXITS)
        assert_decodes_as_transformers(model)


@pytest.mark.parametrize("engine", ["compiled", "fused", "module"])
def test_a_text_begun_in_inference_mode_goes_on_outside_it(engine):
    model = adaptive_gen.wrap(untied(), EXITS, engine=engine)
    settings = {**FULL, "threshold": 0.01, "return_dict_in_generate": True}

    def continued(mode):
        with mode():
            begun = model.generate(**{**settings, "max_new_tokens": 8})
        longer = {"input_ids": begun.sequences, "past_key_values": begun.past_key_values}
        return model.generate(**{**settings, **longer}).sequences

    def streamed(mode):
        with mode():
            steps = iter(model.generate(**settings, streamer=LoopHandover()))
            first = next(steps)
        return [first.token, *(step.token for step in steps)]

    assert torch.equal(continued(torch.inference_mode), continued(torch.no_grad))
    whole = model.generate(**settings).sequences[0, IDS.shape[1] :].tolist()
    assert streamed(torch.inference_mode) == streamed(torch.no_grad) == whole


# --- quantisation ---


def test_int8_weights_of_torchao_are_used_as_they_are():
    torchao = pytest.importorskip("torchao.quantization")
    model = untied()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    plain = untied().generate(**GREEDY, output_logits=True, return_dict_in_generate=True)
    adaptive_gen.wrap(model, EXITS)
    assert_decodes_as_transformers(model)
    assert "no plain tensors" in state(model).backend.reason
    out = model.generate(**FULL, output_logits=True, return_dict_in_generate=True)
    assert not torch.equal(out.logits[0], plain.logits[0]), "the weights were not quantised"


# --- several devices, offloading, hooks ---


def test_forward_hooks_on_layers_are_called():
    model = adaptive_gen.wrap(untied(), EXITS)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    out = model.generate(**FULL)
    assert len(seen) == out.shape[1] - IDS.shape[1] and state(model).backend.name == "module"
    handle.remove()
    model.generate(**FULL)
    assert len(seen) == out.shape[1] - IDS.shape[1] and state(model).backend.name == "compiled"


def split_over(model, second, **options):
    """Dispatch the deeper layers of a model to `second`; as `device_map` does when loading."""
    from accelerate import dispatch_model

    first = str(model.device)
    where = {"model.embed_tokens": first, "model.rotary_emb": first}
    where |= {f"model.layers.{i}": first if i < 3 else second for i in range(6)}
    where |= {"model.norm": second, "lm_head": second}
    return dispatch_model(model, where, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_layers_offloaded_to_disk_are_fetched(family, kv, tmp_path):
    expected = families.make(family, tie_word_embeddings=False).generate(**GREEDY)
    model = families.make(family, tie_word_embeddings=False)
    split_over(model, "disk", main_device="cpu", offload_dir=tmp_path)
    assert model.lm_head.weight.device.type == "meta"
    adaptive_gen.wrap(model, EXITS)
    assert torch.equal(model.generate(**FULL, kv=kv), expected)
    out = model.generate(**{**FULL, "threshold": 0.0}, kv=kv, return_dict_in_generate=True)
    assert out.report.mean_depth < 6
    assert "hooks" in state(model).backend.reason


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_over_two_devices_decodes_as_on_one(family):
    model = families.make(family, torch.float64, tie_word_embeddings=False)
    expected = copy.deepcopy(model).generate(**GREEDY)
    model.hf_device_map = {}
    model = adaptive_gen.wrap(split_over(model, "cuda:0", main_device="cuda:0"), EXITS)
    assert torch.equal(model.generate(**FULL), expected)
    assert model.generate(**{**FULL, "threshold": 0.0}).shape == expected.shape


@pytest.mark.parametrize("engine", ["compiled", "fused"])
def test_a_cache_is_not_handed_on_by_who_was_interrupted_within_a_token(engine, monkeypatch):
    """Ctrl-C comes up behind a kernel, when queues and cache do not yet say what has been run."""
    model = adaptive_gen.wrap(untied(), EXITS, engine=engine)

    def interrupted(*_):
        raise KeyboardInterrupt

    loop = model.generate(**{**FULL, "threshold": 0.01}, streamer=LoopHandover())
    steps = iter(loop)
    next(steps)
    assert loop.cache() is not None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pace, "keep", interrupted)
        patch.setattr(Scheduler, "_ask", interrupted)
        next(steps)
    assert loop.cache() is None and loop.report().new_tokens == 1


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_wrapped_model_can_be_copied(copied):
    """The copy decodes with its own weights, also where these change later."""
    model = adaptive_gen.wrap(untied(), EXITS)
    expected = model.generate(**FULL)
    twin = copied(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        model.lm_head.weight.neg_()
        model.model.embed_tokens.weight.neg_()
    assert torch.equal(twin.generate(**FULL), expected)
    assert not torch.equal(model.generate(**FULL), expected)


def test_a_class_derived_from_a_wrapped_models_can_be_copied():
    model = adaptive_gen.wrap(untied(), EXITS)
    model.__class__ = type("Mine", (type(model),), {})
    assert torch.equal(copy.deepcopy(model).generate(**FULL), model.generate(**FULL))


def test_a_model_that_accelerate_has_let_go_of_is_as_before():
    hooks = pytest.importorskip("accelerate.hooks")
    model = adaptive_gen.wrap(untied(), EXITS)
    expected = model.generate(**FULL)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.mlp, hooks.ModelHook())
    assert torch.equal(model.generate(**FULL), expected)
    assert state(model).backend.name == "module"
    for layer in model.model.layers:
        hooks.remove_hook_from_module(layer.mlp)
    assert torch.equal(model.generate(**FULL), expected)
    assert state(model).backend.name == "compiled"
