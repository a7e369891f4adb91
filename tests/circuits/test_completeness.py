"""Incomplete and superfluous parts of planted circuits are found, with the sets that show them."""

from __future__ import annotations

import numpy as np
import pytest

from interp.circuits._judge import judging
from interp.circuits.circuit import Circuit
from interp.circuits.completeness import _without, completeness, minimality
from interp.circuits.faithfulness import faithfulness
from interp.circuits.graph import Graph
from interp.core.edits import Edit
from interp.core.readout import readout
from interp.models import planted, toy
from interp.patching.ablation import ablate
from interp.tasks.task import Task


def made(name, *, without=(), extra=()):
    case = getattr(planted, name)()
    task = Task(
        case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, dict(case.positions)
    )
    edges = [edge for edge in sorted(case.edges) if not set(edge) & set(without)]
    circuit = Circuit.from_edges(Graph.of(case.model), [*edges, *extra], meta=case.model.provenance)
    return case.model, task, circuit


def means(found):
    return found.table.groupby(["component", "step"])["value"].mean()


@pytest.mark.parametrize("name", ["or_gate", "ioi_like", "backup_head"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_the_whole_truth_is_complete(name, level):
    found = completeness(*made(name), level=level, n_random=10, steps=3)
    # Sums of a few numbers in float32.
    assert np.abs(means(found)).max() < 1e-4
    assert set(found.meta["worst"]) == {"nothing", "random", "greedy"}


def test_a_circuit_without_the_second_way_is_faithful_and_incomplete():
    """Of an OR gate one half suffices; without that half the model goes on and the circuit does not."""
    model, task, half = made("or_gate", without=("a1.h2", "a1.h2<v>"))
    assert faithfulness(model, task, half).table["value"].mean() == pytest.approx(1, abs=1e-4)
    found = completeness(model, task, half, classes={"first": ["a0.h1"]}, n_random=20, n_greedy=2, steps=2)
    worst = found.meta["worst"]
    assert worst["nothing"] == pytest.approx(0, abs=1e-4)
    assert worst["first"] == worst["greedy"] == worst["random"] == pytest.approx(1, abs=1e-4)
    assert means(found)["first"].iloc[0] == pytest.approx(-1, abs=1e-4)  # the circuit does less
    assert ["a0.h1"] in found.meta["sets"]
    one = found.filter(component="first").table
    assert one["value_model"].to_numpy() == pytest.approx(one["value_circuit"].to_numpy() + 8, abs=1e-3)


def test_every_part_of_the_truth_is_needed_with_some_others_out():
    model, task, circuit = made("or_gate")
    alone = minimality(model, task, circuit, n_random=0)
    # One way alone can go without effect: only the MLP is needed with nothing else out.
    assert alone.meta["failing"] == ["a0.h1", "a1.h2"]
    classes = {"ways": ["a0.h1", "a1.h2"]}
    found = minimality(model, task, circuit, n_random=0, classes=classes)
    assert found.meta["passing"] == 1 and found.meta["failing"] == []
    assert found.table.groupby("src")["value"].mean().to_numpy() == pytest.approx(1, abs=1e-4)
    assert set(found.filter(src="a0.h1").table["component"]) == {"ways"}
    assert minimality(model, task, circuit, n_random=60).meta["passing"] == 1  # random sets find it too


def test_a_distractor_is_not_minimal():
    model, task, circuit = made("or_gate", extra=[("input", "a0.h2<v>"), ("a0.h2", "logits")])
    found = minimality(model, task, circuit, n_random=60)
    assert found.meta["failing"] == ["a0.h2"]
    assert found.meta["passing"] == pytest.approx(3 / 4)
    edges = minimality(model, task, circuit, level="edge", n_random=60)
    assert sorted(edges.meta["failing"]) == ["a0.h2 -> logits", "input -> a0.h2<v>"]
    assert {"src", "dst"} <= set(edges.table.columns)


def test_bad_input_is_refused():
    model, task, circuit = made("or_gate")
    with pytest.raises(ValueError, match="class 'x' has 'a1.h1', which is not among the circuit's 3 parts"):
        completeness(model, task, circuit, classes={"x": ["a1.h1"]})
    with pytest.raises(ValueError, match="level='head'"):
        minimality(model, task, circuit, level="head")
    with pytest.raises(ValueError, match="nothing to take out"):
        completeness(model, task, circuit.with_kept(np.zeros_like(circuit.kept)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("source", ["corrupt", "zero", "mean"])
def test_a_node_that_is_out_is_a_node_that_is_ablated(architecture, source):
    """By another engine, with key-value groups that a head shares with others (llama)."""
    model = toy.random(architecture)
    tokens, other = toy.random_tokens(model, 4, 5), toy.random_tokens(model, 4, 5, seed=1)
    task = Task("random", tuple("abcd"), tokens, "random", other, tokens[:, 1], tokens[:, 2])
    graph = Graph.of(model)
    full = Circuit.of(graph, np.zeros(graph.possible.shape), unit="none", meta=model.provenance)
    read = readout(model, task)
    # A random model may have the metric either way round.
    gap = ablate(model, task, {"x": []}, source="zero").table["value"].to_numpy()
    names = {"head": ["a1.h2"], "both": ["a0.h1", "m1"]}
    cells = {"head": [(1, 2)], "both": [(0, 1), Edit("mlp_out", 1)]}
    run = judging(
        model, task, graph, metric=read, ablation=source, reference=None, seed=0, what="test"
    )  # fmt: skip
    cut = run(np.stack([_without(full, full.kept, each) for each in names.values()]))
    expected = ablate(model, task, cells, source=source).table
    for cell, name in enumerate(names):
        wanted = expected.loc[expected["target"] == name, "value"].to_numpy()
        # float32 through three layers of another order of sums
        np.testing.assert_allclose(cut[:, cell], wanted, atol=2e-5)
        assert np.abs(wanted - gap).max() > 1e-3  # it makes a difference


@pytest.mark.parametrize(("method", "options"), [(completeness, {"n_random": 2, "steps": 2}), (minimality, {})])
def test_positions_say_where_parts_are_taken_out(method, options):
    model, task, circuit = made("ioi_like")
    every = list(range(task.clean.shape[1]))
    plain, whole, end = (method(model, task, circuit, positions=each, **options) for each in (None, every, ["end"]))
    # Sums of a few numbers in float32.
    assert np.allclose(plain.table["value"], whole.table["value"], atol=1e-4)
    assert end.meta["positions"] == ["end"]
    if method is minimality:  # the duplicate token head works at the second subject: at the end it is not missed
        effects = [each.table.groupby("src")["value"].mean().abs() for each in (plain, end)]
        assert effects[0]["a0.h1"] > 0.5 > 1e-3 > effects[1]["a0.h1"]
