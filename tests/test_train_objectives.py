"""Objectives: what is written is what is weighed, at every step, and reads back as itself."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from adaptive_gen.errors import OptionError
from adaptive_gen.losses import exit_states, score_exits, shared_readout
from adaptive_gen.train.objectives import PARTS, parse
from adaptive_gen.train.random_depth import Departures, layer_dropout, leaving

EXITS = (2, 4, 6)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("uniform", {2: 1, 4: 1, 6: 1}),
        ("linear", {2: 2, 4: 4, 6: 6}),
        ("quadratic", {2: 3, 4: 10, 6: 21}),
        ("quadratic:0.1", {2: 0.3, 4: 1.0, 6: 7.5}),
        ("full:2", {2: 1, 4: 1, 6: 2}),
        ("linear+full:0.5+distil:1", {2: 2, 4: 4, 6: 3}),
        ("every", {2: 1, 4: 1, 6: 1}),
    ],
)
def test_weights_are_those_of_the_papers(text, weights):
    assert parse(text).weights(EXITS) == pytest.approx(weights)


def trained(text, steps=12, exits=EXITS, seed=0):
    """Per step, the exits that weigh something."""
    objective = parse(text)
    return [
        [e for e, w in objective.weights(exits, step, steps, seed).items() if w]
        for step in range(steps)
    ]


def test_rotation_takes_exits_in_turn_and_full_depth_always():
    assert trained("rotating")[:4] == [[2, 6], [4, 6], [2, 6], [4, 6]]
    assert trained("rotating:1")[:2] == [[2, 4, 6]] * 2
    many = trained("rotating:2", exits=(1, 2, 3, 4, 5))
    assert many[:3] == [[1, 3, 5], [2, 4, 5], [1, 3, 5]]


def test_gradual_adds_exits_from_deep_to_shallow_until_its_share_is_over():
    assert trained("gradual") == [[6]] * 3 + [[4, 6]] * 3 + [[2, 4, 6]] * 6
    assert trained("gradual:1")[-1] == [4, 6]
    assert trained("gradual:0")[1] == [2, 4, 6]


def test_sampling_visits_every_exit_and_depends_on_seed_and_step_alone():
    drawn = trained("sampled", steps=300)
    assert {len(d) for d in drawn} == {1}
    counts = [drawn.count([e]) for e in EXITS]
    assert all(70 < count < 130 for count in counts), counts
    assert drawn == trained("sampled", steps=300) != trained("sampled", steps=300, seed=1)
    assert {len(d) for d in trained("sampled:2")} == {2}
    assert trained("sampled:9") == [[2, 4, 6]] * 12
    assert parse("sampled").partial and not parse("rotating").partial


def test_no_step_is_without_a_loss():
    assert all(trained("sampled+full:0", steps=50))


@pytest.mark.parametrize(
    "text",
    "uniform linear quadratic:0.2+rotating:3 gradual:0.25+distil:0.6 sampled:2+full:2 "
    "distil:0.5+dropout:0.1 propagated:0.5 linear+distil:1".split(),
)
def test_an_objective_reads_back_as_it_is_written(text):
    assert parse(str(parse(text))) == parse(text)
    assert str(parse(text)) == text


def test_bare_names_have_values():
    assert parse("distil").distil == 0.5 and parse(" distil : 1 ".replace(" ", "")).distil == 1.0
    for name in PARTS:
        if name not in ("full", "dropout"):
            parse(name)


@pytest.mark.parametrize(
    "text",
    "+ cubic linear+quadratic rotating+sampled distil:2 distil:x full dropout sampled:0 linear:2 "
    "gradual:-1 dropout:1 full:-1 uniform+ quadratic:inf".split(),
)
def test_what_is_no_objective_is_refused_in_one_line(text):
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


class Plus(nn.Module):
    """Adds one."""

    def forward(self, hidden):
        return hidden + 1


def test_layer_dropout_rises_with_depth_and_skips_whole_rows():
    layers = nn.ModuleList(Plus() for _ in range(5))
    rows = torch.zeros(4000, 2, 1)
    with layer_dropout(layers, 0.4):
        hidden, added = rows, []
        for layer in layers:
            after = layer(hidden)
            assert torch.equal(after[:, 0], after[:, 1])  # a row skips as one
            added.append(float((after - hidden).mean()))
            hidden = after
        layers.eval()
        assert all(torch.equal(layer(rows), rows + 1) for layer in layers)
    expected = [1 - 0.4 * (2 ** (i / 4) - 1) for i in range(5)]
    assert added == pytest.approx(expected, abs=0.03) and added[0] == 1.0
    layers.train()
    assert torch.equal(layers[4](rows), rows + 1)  # nothing stays behind


def propagated_by_hand(model, ids, depth):
    """Token by token: layers up to its own depth, then keys and values from the state it left with.

    -> state of each token after each layer that it ran, {(position, layer count): state}
    """
    backbone, cache, states = model.model, DynamicCache(), {}
    for position in range(ids.shape[1]):
        hidden = backbone.embed_tokens(ids[:, position, None])
        place = torch.tensor([[position]])
        for index, layer in enumerate(backbone.layers):
            after = layer(
                hidden,
                position_ids=place,
                past_key_values=cache,
                position_embeddings=backbone.rotary_emb(hidden, place),
            )
            if index < depth[position]:
                hidden = after
            states[position, index + 1] = hidden
    return states


def test_tokens_that_left_give_the_keys_and_values_of_the_state_they_left_with(tiny_llama):
    model = tiny_llama().double().train()  # held-out rows are scored at full depth
    ids = torch.randint(0, 200, (1, 24))
    with torch.no_grad():
        with leaving(model.model, model.model.layers, EXITS, 0.6) as departures:
            states = exit_states(model, ids, EXITS)
        depth = departures.depth[0].tolist()
        expected = propagated_by_hand(model, ids, depth)
    assert set(depth) == set(EXITS)
    for found, exit_layer in zip(states, EXITS, strict=True):
        for position in range(24):
            torch.testing.assert_close(
                found[0, position], expected[position, exit_layer][0, 0], atol=1e-6, rtol=1e-6
            )


def test_leaving_tokens_teach_the_exits_they_reach_and_weights_hold_on_average():
    departures = Departures()
    departures.draw((50, 400), EXITS, 0.5, "cpu")
    shares = departures.shares([0.2, 0.3, 0.5], EXITS, 0.5)
    assert shares[0].unique().tolist() == pytest.approx([0.2])
    assert torch.equal(shares[1] > 0, departures.depth >= 4)
    assert torch.equal(shares[2] > 0, departures.depth == 6)
    assert shares.mean((1, 2)).tolist() == pytest.approx([0.2, 0.3, 0.5], rel=0.05)


def test_only_the_tokens_that_reach_an_exit_count_in_its_loss(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(0, 200, (2, 20))
    with leaving(model.model, model.model.layers, EXITS, 0.5) as departures:
        states = exit_states(model, ids, EXITS)
        shares = departures.shares([1 / 3] * 3, EXITS, 0.5)
    readout = shared_readout(model)
    result = score_exits(dict.fromkeys(EXITS, readout), states, ids, shares, chunk_size=8)
    total = 0.0
    for state, share, found in zip(states, shares, result.per_exit.values(), strict=True):
        entropy = nn.functional.cross_entropy(
            readout(state[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none"
        )
        total += (entropy * share[:, :-1]).sum() / entropy.numel()
        assert found.item() == pytest.approx(entropy[share[:, :-1] > 0].mean().item(), abs=1e-4)
    assert result.loss.item() == pytest.approx(total.item(), abs=1e-4)
