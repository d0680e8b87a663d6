"""Choosing a back end: fused where it gives what the model gives, and a reason where it is not."""

import families
import pytest
import torch
from families import FAMILIES, FUSED

import adaptive_gen
from adaptive_gen.engine import prepared
from adaptive_gen.engine.backend import Backend
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.settings import state

PROMPT = torch.tensor([[3, 4, 5]])


def report(model, **kwargs):
    return model.generate(
        PROMPT,
        adaptive=True,
        threshold=0.5,
        max_new_tokens=8,
        return_dict_in_generate=True,
        **kwargs,
    ).report


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_that_can_be_fused_are(family):
    model = adaptive_gen.wrap(families.make(family))
    assert report(model).engine == ("compiled" if family in FUSED else "module")
    assert bool(state(model).backend.reason) == (family not in FUSED)


def test_the_module_back_end_can_be_asked_for(tiny_llama):
    assert report(adaptive_gen.wrap(tiny_llama(), engine="module")).engine == "module"


def test_insisting_on_fused_says_why_it_cannot_be_had():
    with pytest.raises(ModelError, match="engine='fused' cannot run Dots1ForCausalLM"):
        adaptive_gen.wrap(families.make("dots1"), engine="fused")
    with pytest.raises(OptionError, match="turbo"):
        adaptive_gen.wrap(families.make("llama"), engine="turbo")


@pytest.mark.parametrize(
    "asked",
    [{"engine": "compiled"}, {"engine": "fused"}, {"engine": "static"}, {"weights": "int8"}],
)
def test_a_family_that_a_back_end_does_not_know_is_named_in_one_plain_line(asked):
    known = r"JetMoeForCausalLM.*\(JetMoeDecoderLayer\).*Llama's"
    with pytest.raises(ModelError, match=known) as caught:
        adaptive_gen.wrap(families.build("jetmoe", {}), **asked)
    text = str(caught.value)
    assert "Error" not in text and "object" not in text
    assert "\n" not in text and text.count("JetMoeDecoderLayer") == 1


@pytest.mark.parametrize("engine", ["auto", "compiled", "fused", "module"])
def test_in_training_mode_eval_is_what_the_user_is_told(tiny_llama, engine, caplog):
    model = adaptive_gen.wrap(tiny_llama(), engine=engine).train()
    if engine in ("compiled", "fused"):
        with pytest.raises(ModelError, match=r"training mode, which model.eval\(\) ends"):
            report(model)
        assert "model.eval()" not in caplog.text
    else:
        report(model)
        assert "model.eval()" in caplog.text


def test_a_llama_that_computes_something_else_is_not_fused(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama(hidden_act="mish"))
    assert state(model).backend.name == "module"
    assert "goes through MishActivation" in state(model).backend.reason


def test_hooks_and_training_mode_are_honoured_while_they_last(tiny_llama):
    model = adaptive_gen.wrap(tiny_llama())
    calls = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    assert report(model).engine == "module" and calls
    handle.remove()
    assert report(model).engine == "compiled"
    assert report(model.train()).engine == "module"


def test_a_forward_of_its_own_is_called_wherever_it_is(tiny_llama):
    settings = {"max_new_tokens": 12, "do_sample": False}
    inner = ("layers.1", "layers.1.mlp", "layers.1.self_attn", "norm", "embed_tokens")
    for path in (*(f"model.{name}" for name in inner), "lm_head"):
        for wrapped_before in (True, False):
            model = tiny_llama(tie_word_embeddings=False)
            if wrapped_before:
                adaptive_gen.wrap(model).generate(PROMPT, adaptive=True, **settings)
            plain = model.generate(PROMPT, **settings)
            module = model.get_submodule(path)
            module.forward = lambda *args, own=module.forward, **kwargs: -3 * own(*args, **kwargs)
            if path.endswith("self_attn"):
                module.forward = lambda *args, own=module.__class__.forward, it=module, **kwargs: (
                    -3 * own(it, *args, **kwargs)[0],
                    None,
                )
            expected = model.generate(PROMPT, **settings)
            assert not torch.equal(expected, plain), path
            model = adaptive_gen.wrap(model, engine="auto")
            ours = model.generate(PROMPT, adaptive=True, threshold=1.0, **settings)
            assert torch.equal(ours, expected), (path, wrapped_before)


def multiplied(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(-2)


def multiplied_data(model):
    """As PEFT merges adapters; weights' versions do not count it."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= -2


def head_multiplied(model):
    model.lm_head.weight.data *= -2


def trained(model):
    """By the optimizer that transformers' Trainer takes, which counts no versions either."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("change", [multiplied, multiplied_data, head_multiplied, trained])
@pytest.mark.parametrize("engine", ["compiled", "fused"])
def test_changed_weights_are_used(tiny_llama, engine, change):
    model = adaptive_gen.wrap(tiny_llama(), exit_layers=[2, 4], engine=engine)
    settings = {"max_new_tokens": 30, "do_sample": False}
    before = model.generate(PROMPT, adaptive=True, threshold=1.0, **settings)
    change(model)
    expected = model.generate(PROMPT, **settings)
    assert not torch.equal(before, expected)
    ours = model.generate(PROMPT, adaptive=True, threshold=1.0, **settings)
    assert torch.equal(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [multiplied_data, head_multiplied])
def test_changed_weights_are_used_on_a_gpu(tiny_llama, change):
    model = adaptive_gen.wrap(tiny_llama().cuda(), exit_layers=[2, 4], engine="fused")
    settings = {"max_new_tokens": 30, "do_sample": False}
    before = model.generate(PROMPT.cuda(), adaptive=True, threshold=1.0, **settings)
    change(model)
    ours = model.generate(PROMPT.cuda(), adaptive=True, threshold=1.0, **settings)
    assert not torch.equal(before, ours)


class Narrower(torch.nn.Module):
    """A layer in float8, which is no number to most of torch."""

    def __init__(self, linear):
        super().__init__()
        narrow = linear.weight.detach().to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(narrow, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("odd", ["narrower", "empty"])
def test_odd_weights_are_left_to_the_model(tiny_llama, odd):
    model, settings = tiny_llama(), {"max_new_tokens": 12, "do_sample": False}
    for layer in model.model.layers:
        if odd == "narrower":
            layer.mlp.up_proj = Narrower(layer.mlp.up_proj)
        else:
            layer.mlp.nothing = torch.nn.Parameter(torch.empty(0, 4))
    expected = model.generate(PROMPT, **settings)
    adaptive_gen.wrap(model)
    assert torch.equal(model.generate(PROMPT, adaptive=True, threshold=1.0, **settings), expected)


@pytest.mark.parametrize("what", ["fuse", "prepared"])
def test_preparing_that_was_interrupted_is_done_again(tiny_llama, monkeypatch, what):
    """And changed weights are not forgotten over it."""
    model, settings = adaptive_gen.wrap(tiny_llama(), engine="compiled"), {"max_new_tokens": 8}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-2)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared, what, interrupted)
        model.generate(PROMPT, adaptive=True, threshold=1.0, **settings)
    ours = model.generate(PROMPT, adaptive=True, threshold=1.0, **settings)
    assert state(model).backend.name == "compiled"
    assert ours.tolist() == model.generate(PROMPT, **settings).tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_the_readout_follows_changed_weights_and_hooks(tiny_llama, tied):
    model = adaptive_gen.wrap(tiny_llama(tie_word_embeddings=tied))
    backend = state(model).backend
    hidden = torch.randn(3, model.config.hidden_size)

    def fused():
        backend.segments(state(model).exit_layers)
        readout = backend.readout()
        torch.testing.assert_close(readout(hidden, 4), backend.decoder.readout(hidden))
        return readout != backend.decoder.readout

    assert fused()
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
        model.lm_head.weight.mul_(-2)
    assert fused()
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    assert not fused()
    handle.remove()
    assert fused()


@pytest.mark.parametrize("family", FUSED)
def test_the_fused_readout_is_the_models(family):
    model = adaptive_gen.wrap(families.make(family))
    backend = state(model).backend
    backend.segments(state(model).exit_layers)
    hidden = torch.randn(3, model.config.get_text_config().hidden_size)
    torch.testing.assert_close(backend.readout()(hidden, 6), backend.decoder.readout(hidden))


@torch.no_grad()
def test_the_keys_and_values_of_all_layers_stay_together_however_they_grow(tiny_llama):
    """The back ends take turns on one cache, which grows and drops rows in between."""
    backends = [
        Backend(state(adaptive_gen.wrap(tiny_llama().double())).backend.decoder, engine)
        for engine in ("compiled", "fused", "module")
    ]
    ways = [backend.segments([2, 4]) for backend in backends]
    n_layers = backends[0].decoder.n_layers
    ids = torch.arange(3, 43).reshape(2, 20)
    mixed, expected = (KVCache(n_layers, capacity=4, batch=2) for _ in range(2))
    for step, part in enumerate(ids.split([1, 7, 1, 1, 9, 1], dim=1)):
        if step == 4:
            mixed.keep([1])
            expected.keep([1])
        part = part[-mixed.batch :]
        ours = theirs = backends[0].decoder.embed(part)
        for a, b in zip(ways[step % 3], ways[-1], strict=True):
            ours, theirs = a.run(ours, mixed), b.run(theirs, expected)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for layer in range(4):
        for a, b in zip(mixed.keys_values(layer), expected.keys_values(layer), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_propagation_runs_no_layer_when_fused(tiny_llama):
    """The fused `store` reads the hidden states only: equal to the module's, whatever the depth."""
    outputs = []
    for engine in ("module", "fused", "compiled"):
        model = adaptive_gen.wrap(tiny_llama().double(), exit_layers=[2, 4], engine=engine)
        out = model.generate(
            PROMPT, adaptive=True, threshold=0.3, kv="propagate", max_new_tokens=40
        )
        outputs.append(out.tolist())
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_layer_runs_as_the_model_has_it(tiny_llama):
    model = tiny_llama().eval()
    ids = torch.tensor([[3, 4, 5]])
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.jit.trace(mlp, torch.randn(1, 3, model.config.hidden_size))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    wrapped = adaptive_gen.wrap(model)
    found = wrapped.generate(ids, adaptive=True, threshold=1.0, max_new_tokens=4, do_sample=False)
    assert found.tolist() == expected.tolist()
