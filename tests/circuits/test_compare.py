"""Comparisons by hand, against sampling, and against the fault of counting what is missing as found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import trapezoid

from interp.circuits.circuit import Circuit
from interp.circuits.compare import BAR, correlation, jaccard, overlap, recovery, roc, stability
from interp.circuits.graph import Graph
from interp.models import planted
from interp.tasks.task import Task

GRAPH = Graph(2, 2, 2)


def random_circuit(seed, n, graph=GRAPH):
    scores = np.random.default_rng(seed).integers(-9, 10, graph.possible.shape).astype(float)
    return Circuit.of(graph, scores, unit="logits").top(n)


def test_recovery_by_hand():
    """Four true edges; two found, one of them below a wrong one; two missing."""
    truth = Circuit.from_edges(GRAPH, [("input", "a0.h0<v>"), ("a0.h0", "m1"), ("m1", "logits"), ("input", "a0.h1<q>")])
    scores = np.zeros(GRAPH.possible.shape)
    for (src, dst), score in {("input", "a0.h0<v>"): 3.0, ("input", "m0"): -2.0, ("m1", "logits"): 1.0}.items():
        scores[GRAPH.edge(src, dst)] = score
    found = Circuit.of(GRAPH, scores, kept=scores != 0, unit="logits")
    row = recovery(found, truth).table.set_index("component").loc["edges"]
    n, false = GRAPH.n_edges, GRAPH.n_edges - 4
    assert row["value_precision"] == pytest.approx(2 / 3)
    assert row["value_recall"] == pytest.approx(1 / 2)
    assert row["value_f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert row["value_false_positives"] == pytest.approx(1 / false)
    # Pairs (true, false): the first true edge beats all, the second all but one, a missing one ties with all but one.
    assert row["value"] == pytest.approx((false + (false - 1) + 2 * 0.5 * (false - 1)) / (4 * false))
    lowest = recovery(found, truth, by="negative").table["value"][0]
    # The wrong edge, -2, comes first, and both true ones after it.
    assert lowest == pytest.approx((2 * (false - 1) + 2 * 0.5 * (false - 1)) / (4 * false))
    by_sign = recovery(found, truth, by="signed").table["value"][0]
    assert by_sign == pytest.approx((2 * false + 2 * 0.5 * (false - 1)) / (4 * false))  # -2 still beats what is not in
    assert n == 46


def test_an_edge_that_is_missing_is_negative():
    """MIB's code counts it as positive: there the empty hypothesis would have recall 1 and no true negative."""
    truth = random_circuit(0, 6)
    empty = truth.with_kept(np.zeros_like(truth.kept))
    row = recovery(empty, truth).table.iloc[0]
    assert row["value_recall"] == 0 and row["value_false_positives"] == 0 and np.isnan(row["value_precision"])
    assert row["value"] == 0.5  # all tied
    assert recovery(truth, truth).table["value"].tolist() == [1.0, 1.0]


def test_nodes_by_hand():
    truth = Circuit.from_edges(GRAPH, [("a0.h0", "m1"), ("m1", "logits")])
    scores = np.zeros(GRAPH.possible.shape)
    scores[GRAPH.edge("a0.h0", "logits")] = 2.0
    scores[GRAPH.edge("a0.h1", "m0")] = 5.0
    found = Circuit.of(GRAPH, scores, kept=scores != 0, unit="logits")
    row = recovery(found, truth).table.set_index("component").loc["nodes"]
    # Sources but the input: a0.h0 a0.h1 m0 a1.h0 a1.h1 m1. True: a0.h0, m1. Found: a0.h0, a0.h1, m0.
    assert (row["value_true"], row["value_found"]) == (2, 3)
    assert row["value_precision"] == pytest.approx(1 / 3) and row["value_recall"] == 0.5
    # a0.h0 is below two false ones and above two; m1 ties with those two: (2 + 0 + 2 * .5) of 8 pairs.
    assert row["value"] == pytest.approx(3 / 8)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(0, 46), st.integers(1, 8), st.sampled_from(["edge", "node"]))
def test_the_area_below_roc_is_auroc(seed, n, n_true, level):
    truth, found = random_circuit(seed + 1, n_true), random_circuit(seed, n)
    assume(0 < len(set(truth.nodes) - {"input"}) < 6)
    table = recovery(found, truth).table.set_index("component")
    points = roc(found, truth, level=level)
    x, y = points.table["value_false_positives"].to_numpy(), points.table["value"].to_numpy()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert trapezoid(y, x) == pytest.approx(points.meta["auroc"]) == pytest.approx(table.loc[f"{level}s", "value"])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(0, 40), st.integers(0, 40))
def test_jaccard_is_that_of_the_listed_edges(seed, n, m):
    one, other = random_circuit(seed, n), random_circuit(seed + 1, m)
    a, b = ({(s, d) for s, d in zip(c.edges["src"], c.edges["dst"], strict=True)} for c in (one, other))
    assert jaccard(one, other) == pytest.approx(len(a & b) / len(a | b) if a | b else 1.0)
    nodes = [set(c.nodes) - {"input"} for c in (one, other)]
    either = len(nodes[0] | nodes[1])
    assert jaccard(one, other, level="node") == (len(nodes[0] & nodes[1]) / either if either else 1.0)


@pytest.mark.parametrize("within", ["graph", "kind", "layer", "destination"])
def test_the_null_of_the_overlap(within):
    one, other = random_circuit(0, 14), random_circuit(1, 12)
    table = overlap(one, other, within=within, n_null=2000).table.set_index("component")
    edges = table.loc["edges"]
    # 2000 shuffles: three standard errors of a share are at most 0.034.
    assert edges["value_p"] == pytest.approx(edges["value_p_exact"], abs=0.034)
    if within == "graph":
        exact = stats.hypergeom(GRAPH.n_edges, 14, 12).sf(edges["value_shared"] - 1)
        assert edges["value_p_exact"] == pytest.approx(exact)
    assert edges["value_null_low"] <= edges["value_null"] <= edges["value_null_high"]
    assert edges["value"] == jaccard(one, other)
    same = overlap(one, one, within=within, n_null=200).table.set_index("component")
    assert same["value"].tolist() == [1.0, 1.0]
    if within == "graph":
        assert same.loc["edges", "value_p"] == 1 / 201


def test_within_layers_a_shared_preference_for_one_layer_is_no_overlap():
    """Both take all edges into the logits and nothing else in common: chance within layers, not over the graph."""
    into_logits = [(src, "logits") for src in GRAPH.sources]
    one = Circuit.from_edges(GRAPH, [*into_logits, ("input", "m0")])
    other = Circuit.from_edges(GRAPH, [*into_logits, ("input", "a0.h0<q>")])
    assert overlap(one, other, n_null=300).table["value_p"][0] < 0.01
    assert overlap(one, other, within="layer", n_null=300).table["value_p"][0] == 1.0


def test_correlation_by_kind():
    first = random_circuit(0, 46)
    kinds = np.array([each.kind for each in GRAPH.destinations])
    scores = np.where((kinds == "q")[:, None], -first.scores, np.sign(first.scores) * first.scores**2)
    table = correlation(first, Circuit.of(GRAPH, scores, unit="nats")).table.set_index(["component", "metric"])["value"]
    assert table["q", "pearson"] == pytest.approx(-1) and table["q", "spearman"] == pytest.approx(-1)
    assert table["mlp", "spearman"] == pytest.approx(1) and table["mlp", "pearson"] < 1
    assert np.isnan(correlation(first, Circuit.of(GRAPH, scores * 0, unit="nats")).table["value"]).all()


def test_stability_of_a_finder_that_does_and_one_that_does_not_look_at_the_prompts():
    case = planted.or_gate()
    task = Task("or", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions)
    fixed = stability(case.model, task, lambda some: random_circuit(0, 9), n_boot=4)
    assert (fixed.table["value"] == 1).all() and fixed.meta["above_bar"] and fixed.meta["bar"] == BAR
    seen = []

    def moody(rows):
        seen.append(task[rows])
        return random_circuit(int(rows @ np.arange(len(rows))), 9)

    found = stability(case.model, task, moody, n_boot=5)
    assert found.meta["mean"] < 0.6 and not found.meta["above_bar"]
    assert (found.table["target"] == "pair").sum() == 10 and (found.table["target"] == "whole").sum() == 5
    assert len(seen) == 6 and all(len(some) == len(task) for some in seen)
    assert len({some.fingerprint for some in seen}) == 6  # each resample is another
    assert seen[0].fingerprint == task.fingerprint
    assert found.arrays["frequency"][1].sum() == pytest.approx(9)


def test_bad_input_is_refused():
    one = random_circuit(0, 5)
    with pytest.raises(ValueError, match="0 of 46 edges: where none"):
        recovery(one, one.with_kept(np.zeros_like(one.kept)))
    with pytest.raises(ValueError, match="46 of 46 edges: where none or all"):
        roc(one, one.with_kept(GRAPH.possible))
    with pytest.raises(ValueError, match="different graphs"):
        jaccard(one, random_circuit(0, 5, Graph(2, 2, 1)))
    with pytest.raises(ValueError, match="two different models"):
        jaccard(one.with_kept(one.kept, model_fingerprint="a"), one.with_kept(one.kept, model_fingerprint="b"))
    with pytest.raises(ValueError, match="level='path'"):
        jaccard(one, one, level="path")
    with pytest.raises(ValueError, match="within='head'"):
        overlap(one, one, within="head")
    case = planted.or_gate()
    task = Task("or", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions)
    with pytest.raises(ValueError, match="needs 2 or more"):
        stability(case.model, task, lambda some: one, n_boot=1)


def test_nodes_shared_by_having_many_are_no_overlap():
    """Shuffled edges touch more nodes than edges that hang together: numbers shared alone would flatter the null."""
    graph = Graph(6, 4, 4)
    edges = [("a0.h0", f"a1.h0<{kind}>") for kind in "qkv"] + [("a1.h0", f"a2.h0<{kind}>") for kind in "qkv"]
    one = Circuit.from_edges(graph, edges)
    table = overlap(one, one, n_null=400).table.set_index("component")
    assert table["value_p"].tolist() == [1 / 401, 1 / 401]
