"""The sorted loss equals a naive loop over sub-models, in value and gradient, however batched."""

import copy

import families
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptive_gen
from adaptive_gen.errors import ModelError, OptionError
from adaptive_gen.losses import sorted_losses

EXITS = [2, 4, 6]
# Tied and untied heads, a head factor, a divisor, and soft-capping.
MODELS = {
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True},
    "granite": {},
    "cohere": {"logit_scale": 0.3},
}


def make(name):
    """A tiny random model in float64."""
    return families.make(name, dtype=torch.float64, **MODELS[name])


def batch(rows=3, length=20, vocab=96):
    """Ids with a masked prompt of another length in each row."""
    ids = torch.randint(3, vocab, (rows, length))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + 4 * row] = -100
    return ids, labels


def naive(model, ids, labels, distil=0.0, weights=(1, 1, 1), **inputs):
    """Each exit as a model of its own, cut by hand; full logits, no chunks. -> loss, entropies"""
    depth = model.config.num_hidden_layers
    layers = model.model.layers
    logits = []
    for exit_layer in EXITS:
        model.model.layers = layers[:exit_layer]
        model.config.num_hidden_layers = exit_layer
        logits.append(model(input_ids=ids, use_cache=False, **inputs).logits)
    model.model.layers, model.config.num_hidden_layers = layers, depth
    keep = labels[:, 1:] != -100
    targets = labels[:, 1:][keep]
    rows = [item[:, :-1][keep].log_softmax(-1) for item in logits]
    entropies = [F.nll_loss(row, targets) for row in rows]
    objectives = []
    for row, entropy in zip(rows, entropies, strict=True):
        gap = (rows[-1].detach().exp() * (rows[-1].detach() - row)).sum(-1).mean()
        objectives.append(entropy if row is rows[-1] else (1 - distil) * entropy + distil * gap)
    total = sum(w * o for w, o in zip(weights, objectives, strict=True)) / sum(weights)
    return total, entropies


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def same_gradients(model, wanted):
    """The families' norms compute in float32 even here, so gradients agree to that precision."""
    torch.testing.assert_close(gradients(model), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("distil", [0.0, 0.6])
@pytest.mark.parametrize("chunk_size", [7, 4096])
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_loop_over_sub_models(name, chunk_size, distil):
    model = make(name)
    ids, labels = batch()
    expected, entropies = naive(model, ids, labels, distil)
    expected.backward()
    wanted = gradients(model)
    result = sorted_losses(
        model, ids, labels, exit_layers=EXITS, distil=distil, chunk_size=chunk_size
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert list(result.per_exit) == EXITS
    for found, entropy in zip(result.per_exit.values(), entropies, strict=True):
        assert found.item() == pytest.approx(entropy.item(), abs=1e-10)
    same_gradients(model, wanted)


def test_sorted_loss_is_the_value_of_sorted_losses():
    model = make("llama")
    ids, labels = batch()
    loss = adaptive_gen.sorted_loss(model, ids, labels, exit_layers=EXITS)
    assert torch.equal(loss, sorted_losses(model, ids, labels, exit_layers=EXITS).loss)


def test_an_exit_without_weight_is_not_read_out():
    model = make("llama")
    ids, labels = batch()
    found = sorted_losses(model, ids, labels, exit_layers=EXITS, weights={2: 0, 6: 0}, distil=0.5)
    assert list(found.per_exit) == [4]
    _, entropies = naive(model, ids, labels)
    assert found.per_exit[4].item() == pytest.approx(entropies[1].item(), abs=1e-10)


def test_a_second_backward_pass_is_refused():
    loss = sorted_losses(make("llama"), *batch(), exit_layers=EXITS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("distil", [0.0, 0.5])
def test_bfloat16_gathers_its_gradients_in_single_precision(distil):
    """Many small blocks give what one block gives, to bfloat16's own precision."""
    model = make("llama").bfloat16()
    ids, labels = batch(rows=8, length=40)
    for chunk_size in (512, 4):
        options = {"exit_layers": EXITS, "distil": distil, "chunk_size": chunk_size}
        loss = sorted_losses(model, ids, labels, **options).loss
        assert loss.dtype is torch.float32
        loss.backward()
        found = gradients(model)["lm_head.weight"]
        if chunk_size == 512:
            wanted = found
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=2**-7)


def test_weights_count_by_their_ratio():
    model = make("llama")
    ids, labels = batch()
    expected, _ = naive(model, ids, labels, weights=(1, 1, 2))
    for scale in (1, 10):
        found = sorted_losses(
            model, ids, labels, exit_layers=EXITS, weights={2: scale, 4: scale, 6: 2 * scale}
        )
        assert found.loss.item() == pytest.approx(expected.item(), abs=1e-10)


def test_padding_on_the_right_changes_nothing():
    model = make("llama")
    ids, labels = batch(rows=1, length=12)
    alone = sorted_losses(model, ids, labels, exit_layers=EXITS)
    padded = sorted_losses(
        model,
        F.pad(ids, (0, 5)),
        F.pad(labels, (0, 5), value=-100),
        exit_layers=EXITS,
        attention_mask=F.pad(torch.ones_like(ids), (0, 5)),
    )
    assert padded.loss.item() == pytest.approx(alone.loss.item(), abs=1e-10)


@pytest.mark.parametrize("distil", [0.0, 0.5])
@pytest.mark.parametrize("split", [[8], [4, 4], [2, 2, 2, 2], [3, 1, 4]])
def test_gradient_accumulation_is_exact(split, distil):
    """However eight ragged rows are split, the sum of the parts is the whole."""
    model = make("llama")
    torch.manual_seed(1)
    ids, labels = batch(rows=8, length=40)
    items = int((labels[:, 1:] != -100).sum())
    options = {"exit_layers": EXITS, "distil": distil, "chunk_size": 32}
    sorted_losses(model, ids, labels, **options).loss.backward()
    wanted = gradients(model)
    total = 0.0
    for some, learnt in zip(ids.split(split), labels.split(split), strict=True):
        part = sorted_losses(model, some, learnt, num_items_in_batch=items, **options).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(
        sorted_losses(model, ids, labels, **options).loss.item(), abs=1e-10
    )
    same_gradients(model, wanted)


def test_every_parameter_gets_a_gradient_and_no_hook_stays():
    model = make("gemma2")
    sorted_losses(model, *batch(), exit_layers=EXITS, distil=0.5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_distillation_does_not_move_the_teacher():
    """With the KL term alone in the exits, layers past the last exit learn from the CE only."""
    model = make("llama")
    ids, labels = batch()
    options = {"exit_layers": EXITS, "weights": {2: 1, 4: 1, 6: 0}}
    sorted_losses(model, ids, labels, distil=1.0, **options).loss.backward()
    for layer in model.model.layers[4:]:
        assert all(not p.grad.any() for p in layer.parameters() if p.grad is not None)
    assert model.model.layers[3].mlp.down_proj.weight.grad.any()


def test_gradient_checkpointing_gives_the_same_gradient():
    model = make("llama")
    model.train()
    ids, labels = batch()
    sorted_losses(model, ids, labels, exit_layers=EXITS).loss.backward()
    wanted = gradients(model)
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)()
    sorted_losses(model, ids, labels, exit_layers=EXITS).loss.backward()
    same_gradients(model, wanted)


def test_a_batch_with_nothing_to_learn_is_zero_and_harmless():
    model = make("llama")
    ids, _ = batch()
    for distil in (0.0, 0.5):
        loss = sorted_losses(
            model, ids, torch.full_like(ids, -100), exit_layers=EXITS, distil=distil
        ).loss
        loss.backward()
        assert loss.item() == 0.0
        assert not any(grad.any() for grad in gradients(model).values())


def test_exits_default_to_the_checkpoint_then_to_quarters():
    model = make("llama")
    ids, labels = batch()
    assert list(sorted_losses(model, ids, labels).per_exit) == [2, 3, 4, 6]
    model.config.exit_layers = [1, 5]
    assert list(sorted_losses(model, ids, labels).per_exit) == [1, 5, 6]


@pytest.mark.parametrize(
    "options",
    [
        {"exit_layers": [7]},
        {"exit_layers": [0]},
        {"distil": 1.5},
        {"weights": {3: 1.0}},
        {"weights": {2: -1.0}},
        {"weights": dict.fromkeys(EXITS, 0.0)},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(OptionError) as caught:
        sorted_losses(make("llama"), *batch(), **{"exit_layers": EXITS, **options})
    assert "\n" not in str(caught.value)


def test_a_model_without_a_decoder_or_head_is_refused():
    ids, labels = batch()
    model = make("llama")
    with pytest.raises(ModelError):
        sorted_losses(model.model, ids, labels)
    bare = nn.Linear(2, 2)
    bare.config = copy.deepcopy(model.config)
    with pytest.raises(ModelError):
        sorted_losses(bare, ids, labels)
