"""Oracles: plain loops over sources and destinations, shares that sum to 1, prompts one by one, planted blind spots."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.circuits import flow_routes
from interp.circuits.graph import Graph
from interp.circuits.route_edges import route_edges
from interp.models import planted, toy
from interp.models.program import NoProgramError, program
from interp.tasks import Task


def _task(model, n=3, length=7):
    tokens = toy.random_tokens(model, n, length)
    return Task("random", ("x",) * n, tokens, "drawn")


def _by_loops(model, task, graph, positions=None):
    """Every part written out, every share by the public formula, prompt by prompt and token by token."""
    steps, total, count = program(model), np.zeros(graph.possible.shape), 0
    for prompt, tokens in enumerate(task.clean):
        places = range(len(tokens)) if positions is None else [at[prompt] for at in positions]
        stream, frame = steps.embed(tokens[None]), steps.frame(tokens[None])
        parts, layers = [stream[0]], []
        for layer in range(graph.n_layers):
            seen = steps.layer(layer, stream, frame)
            before = len(parts)
            parts += [seen["z"][0, :, head] @ steps.w_o(layer)[head] for head in range(graph.n_heads)]
            read_by_mlp = (stream[0], before) if graph.parallel else (seen["resid_mid"][0], len(parts))
            layers.append(((stream[0], before), read_by_mlp))
            parts.append(seen["mlp_out"][0])
            stream = seen["resid_post"]
        for row, each in enumerate(graph.destinations):
            last = each.kind == "logits"
            whole, before = (stream[0], len(parts)) if last else layers[each.layer][each.kind == "mlp"]
            assert before == each.n_before
            for at in places:
                z = torch.stack([part[at] for part in parts[:before]])
                total[row, :before] += flow_routes.importance(z, whole[at]).numpy()
        count += len(places)
    return total / count


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_scores_are_those_of_plain_loops(architecture):
    model = toy.random(architecture, weights="raw")
    task, graph = _task(model), Graph.of(model)
    with torch.no_grad():
        expected = _by_loops(model, task, graph)
    # Shares of float32 norms of 32 numbers: a few units of the seventh digit.
    np.testing.assert_allclose(route_edges(model, task).scores, expected, atol=2e-6)


def test_positions_are_those_over_which_shares_are_meaned():
    model = toy.random("gpt2", weights="raw")
    task = replace(_task(model), positions={"middle": torch.tensor([2, 4, 3])})
    with torch.no_grad():
        expected = _by_loops(model, task, Graph.of(model), [(2, 4, 3), (6, 6, 6)])
    found = route_edges(model, task, positions=["middle", -1])
    np.testing.assert_allclose(found.scores, expected, atol=2e-6)  # as above
    assert np.abs(found.scores - route_edges(model, task).scores).max() > 1e-3
    assert found.meta["positions"] == ["middle", -1]
    with pytest.raises(ValueError, match="no position 'nowhere'"):
        route_edges(model, task, positions="nowhere")


def test_shares_sum_to_one_and_are_never_negative():
    model = toy.random("qwen2")
    scores = route_edges(model, _task(model)).scores
    assert scores.min() >= 0
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-6)


def test_padding_and_batches_change_nothing(monkeypatch):
    model = toy.random("llama")
    plain = _task(model)
    padded = Task(
        "padded", plain.prompts, torch.nn.functional.pad(plain.clean, (2, 0), value=1), "drawn",
        mask=torch.nn.functional.pad(torch.ones_like(plain.clean), (2, 0)),
    )  # fmt: skip
    whole = route_edges(model, plain).scores
    # Rotary positions of padded prompts start at the first real token; sums are the same to rounding.
    np.testing.assert_allclose(route_edges(model, padded).scores, whole, atol=2e-6)
    monkeypatch.setattr("interp.circuits.route_edges._ENOUGH", 1)
    np.testing.assert_allclose(route_edges(model, plain).scores, whole, atol=2e-6)


def test_keys_of_a_group_read_what_each_of_its_heads_reads():
    model = toy.random("llama")
    task = _task(model)
    grouped, expanded = (route_edges(model, task, grouped=kind) for kind in (True, False))
    for row, each in enumerate(expanded.graph.destinations):
        kind = {"k": "<k>", "v": "<v>"}.get(each.kind)
        if kind:
            name = f"a{each.layer}.g{each.place // 2}{kind}"
            np.testing.assert_array_equal(expanded.scores[row], grouped.scores[grouped.graph.destination_index[name]])


def test_of_two_that_cancel_the_one_that_points_away_counts_for_nothing():
    net = planted.cancelling_pair()
    found = route_edges(net.model, Task("words", net.prompts, net.clean, "planted"))
    into = found.scores[found.graph.destination_index["logits"]]
    plus, minus = (into[found.graph.source_index[name]] for name in ("a0.h1", "a1.h2"))
    assert plus > 0.02  # a mean over 5 tokens, of which one has it
    assert minus == 0  # patching it has an effect of -2: suppression cannot be seen here


def test_a_model_whose_heads_do_not_add_up_is_refused():
    model = toy.random("gemma2")
    with pytest.raises(NoProgramError, match="heads"):
        route_edges(model, _task(model))
