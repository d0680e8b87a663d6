"""DESIGN's invariants: where two ways compute one thing, they agree."""

import families
import pytest
import torch
from driving import Sure, decode, prefill
from families import FAMILIES, FUSED, WINDOW

import adaptive_gen
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.rules import Rules
from adaptive_gen.engine.scheduler import Scheduler
from adaptive_gen.naming import Parts
from adaptive_gen.settings import state

ENGINES = [
    (f, e) for f in FAMILIES for e in ("module", "fused", "compiled") if e == "module" or f in FUSED
]
# Every schedule and prompt length runs on these, which differ in what the engine itself does:
# tied head, one window, mixed windows, eager masks, learned positions. The others get one of each.
THOROUGH = ("llama", "mistral", "qwen2", "gemma2", "gpt2")
every_family = pytest.mark.parametrize("family", FAMILIES)


def cases(names, **options):
    """Parametrise over families and engines: all `options` for some families, the last for all."""
    return pytest.mark.parametrize(
        ("family", "engine", *names),
        [
            pytest.param(family, engine, *values, id=f"{family}-{engine}-{name}")
            for family, engine in ENGINES
            for name, values in options.items()
            if family in THOROUGH or name == list(options)[-1]
        ],
    )


@pytest.fixture
def double_softmax(monkeypatch):
    """Let eager attention's softmax work in float64, which transformers narrows to float32.

    In float32 its sums depend on the number of keys, and no two block shapes agree to 1e-10.
    """
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)
    )


def prompt(length, vocab=96, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (1, length), generator=generator)


@cases(("length", "new"), one=(1, 32), short=(7, 32), slid=(WINDOW + 4, 16))
def test_never_exiting_is_transformers_greedy(family, engine, length, new):
    model = adaptive_gen.wrap(families.make(family), exit_layers=[2, 4], engine=engine)
    settings = {"input_ids": prompt(length), "max_new_tokens": new, "do_sample": False}
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, adaptive=True, threshold=1.0), expected)
    assert expected.unique().numel() > 3, "a text of one token would agree by chance"


@pytest.mark.parametrize(("family", "engine"), [(f, e) for f, e in ENGINES if f in THOROUGH])
def test_full_depth_draws_transformers_samples_with_and_without_drafts(family, engine):
    model = adaptive_gen.wrap(families.make(family), engine=engine)
    settings = {
        "input_ids": prompt(9),
        "max_new_tokens": 24,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.2,
    }
    torch.manual_seed(11)
    expected = model.generate(**settings)
    for mode in ({"threshold": 1.0}, {"threshold": 0.01, "lossless": True}):
        torch.manual_seed(11)
        assert torch.equal(model.generate(**settings, adaptive=True, **mode), expected)


class EveryThird:
    """Exits at layer 2, 4 or not at all, in turn: a mixed schedule without a confidence."""

    def may_exit(self, exit_layer, position):
        return exit_layer == {0: 2, 1: 4}.get(position % 3)

    def should_exit(self, check):
        return True


class Scattered:
    """Long runs of shallow tokens, then one somewhat deeper, now and then one at full depth."""

    def may_exit(self, exit_layer, position):
        if position % 11 == 10:
            return False
        return exit_layer == (4 if position % 5 == 4 else 2)

    def should_exit(self, check):
        return True


schedules = cases(
    ("policy", "queue_cap"),
    third_cap1=(EveryThird(), 1),
    scattered_cap16=(Scattered(), 16),
    scattered_cap3=(Scattered(), 3),
)


def generate(model, ids, policy, kv="recompute", steps=24, queue_cap=16):
    """Greedy decoding on a scheduler of our own; returns it, the text, and each token's exit."""
    decoder = state(model).decoder
    scheduler = Scheduler(
        decoder,
        state(model).backend.segments((2, 4, 6)),
        KVCache(decoder.n_layers, capacity=4),
        policy,
        Sure(),
        Rules(kv=kv, queue_cap=queue_cap),
    )
    exit_layers = []
    with torch.no_grad():
        readout = prefill(scheduler, ids)
        for _ in range(steps):
            token = readout.logits.argmax(-1)[:, None]
            ids = torch.cat([ids, token], dim=1)
            readout = decode(scheduler, token)
            exit_layers.append(readout.exit_layer)
    return scheduler, ids, exit_layers


def full_forward_cache(model, ids):
    """K/V of one plain forward of the whole text, by the same back end."""
    decoder, backend = state(model).decoder, state(model).backend
    cache = KVCache(decoder.n_layers)
    with torch.no_grad():
        (segment,) = backend.segments((decoder.n_layers,))
        segment.run(decoder.embed(ids), cache)
    return cache


def assert_same_cache(cache, expected, tolerance):
    assert cache.lengths == expected.lengths
    for layer in range(len(cache.lengths)):
        for ours, theirs in zip(cache.keys_values(layer), expected.keys_values(layer), strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@schedules
def test_recompute_gives_the_keys_and_values_of_a_full_forward(
    family, engine, policy, queue_cap, double_softmax
):
    if FAMILIES[family].keys_by_length:
        pytest.skip("its keys depend on the length of the text when they were made")
    model = adaptive_gen.wrap(families.make(family, torch.float64), engine=engine)
    scheduler, ids, exit_layers = generate(model, prompt(5), policy, queue_cap=queue_cap)
    assert len(set(exit_layers)) == 3, "the schedule must mix depths"
    scheduler.flush()
    assert not any(queue.counts[0] for queue in scheduler.queues)
    tolerance = FAMILIES[family].tolerance if engine == "module" else 1e-10
    assert_same_cache(scheduler.cache, full_forward_cache(model, ids), tolerance)


def naive_propagation(model, ids, prompt_length, exit_layers):
    """K/V by token and layer: run up to the exit, then project its state in each layer left."""
    decoder, parts = state(model).decoder, Parts(model)
    cache = KVCache(decoder.n_layers)
    with torch.no_grad():
        decoder.run(decoder.embed(ids[:, :prompt_length]), 0, decoder.n_layers, cache)
        for index, exit_layer in enumerate(exit_layers):
            token = ids[:, prompt_length + index, None]
            hidden = decoder.run(decoder.embed(token, prompt_length + index), 0, exit_layer, cache)
            for layer in range(exit_layer, decoder.n_layers):
                block = decoder.positions.block(hidden, cache.lengths[layer][0])
                # The whole layer runs and its output is dropped: only its K/V are wanted.
                kind = decoder.positions.layer_types[layer]
                shadow = _Recorder()
                parts.call(layer, hidden, None, block.position_ids, block.embeddings[kind], shadow)
                cache.update(*shadow.block, layer)
    return cache


class _Recorder:
    """A cache that keeps the one block it is given and shows the layer nothing else."""

    def update(self, key, value, layer_idx, *args, **kwargs):
        self.block = (key, value)
        return key, value

    def get_seq_length(self, layer_idx=0):
        return 0


@schedules
def test_propagate_is_the_naive_projection_of_the_exit_state(
    family, engine, policy, queue_cap, double_softmax
):
    model = adaptive_gen.wrap(families.make(family, torch.float64), engine=engine)
    scheduler, ids, exit_layers = generate(
        model, prompt(5), policy, "propagate", queue_cap=queue_cap
    )
    assert len(set(exit_layers)) == 3, "the schedule must mix depths"
    scheduler.flush()
    expected = naive_propagation(model, ids, 5, exit_layers)
    # The reference calls the model's own layers, whose norms work in float32.
    tolerance = FAMILIES[family].tolerance if engine == "module" else 5e-5
    assert_same_cache(scheduler.cache, expected, tolerance)


@every_family
def test_exiting_at_one_layer_is_the_truncated_model(family, double_softmax):
    """Every token but the first, which the prompt's full-depth pass gives, leaves at layer 4."""
    model = adaptive_gen.wrap(families.make(family, torch.float64), exit_layers=[4], queue_cap=32)
    if FAMILIES[family].keys_by_length:
        pytest.skip("its keys depend on the length of the text when they were made")
    out = model.generate(
        prompt(12),
        adaptive=True,
        threshold=0.0,
        kv="recompute",
        max_new_tokens=20,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.exit_layers.tolist() == [[6] + [4] * 19]
    (_, shallow), _ = state(model).decoder.readouts(out.sequences[:, :-1], (4, 6))
    ours = torch.stack(out.logits[1:], dim=1)
    torch.testing.assert_close(ours, shallow[:, 12:].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_rewinding_the_cache_then_decoding_is_decoding(kv):
    model = adaptive_gen.wrap(families.make("llama", torch.float64))
    scheduler, ids, _ = generate(model, prompt(5), EveryThird(), kv, steps=21)
    scheduler.flush()
    token = ids[:, -1:]
    first = decode(scheduler, token)
    scheduler.flush()
    scheduler.rewind(0, ids.shape[1])
    second = decode(scheduler, token)
    torch.testing.assert_close(first.logits, second.logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FUSED)
def test_the_back_ends_give_the_same_keys_and_values(family):
    ids = prompt(40)
    caches = [
        full_forward_cache(
            adaptive_gen.wrap(families.make(family, torch.float64), engine=engine), ids
        )
        for engine in ("module", "fused", "compiled")
    ]
    for cache in caches[1:]:
        assert_same_cache(
            caches[0], cache, 5e-5
        )  # keys of size 10, and norms of the module in float32
