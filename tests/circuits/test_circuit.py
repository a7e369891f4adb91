"""Circuits are cut, pruned and stored as the graph says, and refuse what they cannot be."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph, at
from interp.circuits.network import to_networkx
from interp.models import planted, toy

GRAPHS = [Graph(2, 4, 4), Graph(3, 4, 2), Graph(2, 2, 1, parallel=True)]


@st.composite
def circuits(draw):
    """A circuit with whole-numbered scores (so that there are ties) and a random set of edges."""
    graph = draw(st.sampled_from(GRAPHS))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    scores = rng.integers(-4, 5, graph.possible.shape).astype(float)
    kept = graph.possible & (rng.random(graph.possible.shape) < draw(st.sampled_from([0.05, 0.2, 0.5, 1.0])))
    return Circuit.of(graph, scores, kept=kept, unit="logits")


def on_paths(circuit):
    """Edges on a path from the input to the logits, by networkx: the oracle of `pruned`."""
    network = to_networkx(circuit)
    if "input" not in network or "logits" not in network:
        return set()
    reached = nx.descendants(network, "input") | {"input"}
    useful = nx.ancestors(network, "logits") | {"logits"}
    return {(a, data["input"]) for a, b, data in network.edges(data=True) if a in reached and b in useful}


@settings(deadline=None, max_examples=60)
@given(circuits())
def test_pruned_is_what_lies_on_a_path(circuit):
    small = circuit.pruned()
    assert set(zip(small.edges["src"], small.edges["dst"], strict=True)) == on_paths(circuit)
    assert (small.pruned().kept == small.kept).all()
    assert not (small.kept & ~circuit.kept).any()
    out = set(small.edges["src"])
    assert all(node in out for node in small.nodes)  # no node without a way on, also where heads share a key


@settings(deadline=None, max_examples=60)
@given(circuits(), st.floats(0, 1), st.sampled_from(["absolute", "signed", "negative"]))
def test_top_takes_the_best_and_greedy_hangs_together(circuit, share, by):
    n = int(share * len(circuit))
    rank = {"absolute": np.abs(circuit.scores), "signed": circuit.scores, "negative": -circuit.scores}[by]
    top, greedy = circuit.top(n, by=by), circuit.greedy(n, by=by)
    assert len(top) == n
    left = circuit.kept & ~top.kept
    if n and left.any():
        assert rank[top.kept].min() >= rank[left].max()
    assert len(greedy) <= n and not (greedy.kept & ~circuit.kept).any()
    network = to_networkx(greedy)
    assert all(nx.has_path(network, dst, "logits") for _, dst in network.edges())
    if len(greedy) < n:  # nothing more leads to the logits
        open_rows = greedy.graph.of_node[:, greedy.kept.any(0)].any(1)
        open_rows[-1] = True  # the logits
        assert not (circuit.kept & ~greedy.kept & open_rows[:, None]).any()


def test_greedy_by_hand():
    graph = Graph(2, 2, 2)
    scores = np.zeros(graph.possible.shape)
    for (src, dst), score in {
        ("a1.h0", "logits"): 1.0, ("m0", "logits"): -3.0, ("a0.h0", "m0"): 9.0, ("a0.h1", "a1.h0<k>"): 5.0,
        ("input", "a0.h1<v>"): 7.0,
    }.items():  # fmt: skip
        scores[graph.edge(src, dst)] = score
    circuit = Circuit.of(graph, scores, unit="logits")

    def names(cut):
        return set(zip(cut.edges["src"], cut.edges["dst"], strict=True))

    assert names(circuit.greedy(2)) == {("m0", "logits"), ("a0.h0", "m0")}
    # By sign a1.h0 comes first, and opens the way to two larger ones.
    assert names(circuit.greedy(3, by="signed")) == {
        ("a1.h0", "logits"), ("a0.h1", "a1.h0<k>"), ("input", "a0.h1<v>"),
    }  # fmt: skip
    assert names(circuit.top(2)) == {("a0.h0", "m0"), ("input", "a0.h1<v>")}


def test_an_edge_into_a_shared_key_counts_for_the_heads_that_are_read():
    graph = Graph(2, 4, 2)
    edges = [("input", "a0.g1<k>")]
    assert Circuit.from_edges(graph, edges).nodes == ("input", "a0.h2", "a0.h3")
    assert Circuit.from_edges(graph, [*edges, ("a0.h3", "logits")]).nodes == ("input", "a0.h3")


@pytest.mark.parametrize("graph", GRAPHS)
def test_numbers_of_edges(graph):
    """By a formula: sources before each input."""
    n, heads, groups = graph.n_layers, graph.n_heads, graph.n_key_value_heads
    before = [1 + layer * (heads + 1) for layer in range(n)]
    mlp = 0 if graph.parallel else heads
    assert graph.n_edges == sum(b * (heads + 2 * groups) + b + mlp for b in before) + 1 + n * (heads + 1)


def test_published_sizes_of_graphs():
    # Edges split into q, k and v inputs: GPT-2 small 32,491, as in the papers on automated discovery.
    assert Graph(12, 12, 12).n_edges == 32_491
    assert Graph(30, 9, 3).n_edges == 70_651


@settings(deadline=None, max_examples=10)
@given(circuits())
def test_save_and_load(tmp_path_factory, circuit):
    path = circuit.with_kept(circuit.kept, method="x", n=3).save(tmp_path_factory.mktemp("c") / "circuit")
    again = Circuit.load(path)
    assert path.name == "circuit.npz"
    assert (again.scores == circuit.scores).all() and (again.kept == circuit.kept).all()
    assert again.graph == circuit.graph and again.unit == "logits" and again.meta == {"method": "x", "n": 3}
    assert again.edges.equals(circuit.edges)


def test_other_files_are_no_circuits(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(ValueError, match=f"{name} holds no circuit: give a file that Circuit.save wrote"):
            Circuit.load(tmp_path / name)


def test_edges_are_listed_by_size_of_score():
    graph = Graph(1, 1, 1)
    scores = np.where(graph.possible, np.arange(graph.possible.size).reshape(graph.possible.shape) - 4.0, 0)
    values = Circuit.of(graph, scores, unit="logits").edges["value"].abs().to_numpy()
    assert (np.diff(values) <= 0).all() and len(values) == graph.n_edges


def test_bad_circuits_are_refused():
    graph = Graph(1, 2, 2)
    scores = np.zeros(graph.possible.shape)
    bad = scores.copy()
    bad[graph.edge("input", "a0.h1<k>")] = np.nan
    with pytest.raises(ValueError, match=r"1 edges have no finite score, the first input -> a0.h1<k>.*float32"):
        Circuit.of(graph, bad, unit="logits")
    with pytest.raises(ValueError, match="scores has the shape"):
        Circuit(graph, scores[1:], graph.possible, "logits")
    with pytest.raises(ValueError, match="a0.h0 -> a0.h0<q> is kept but is no edge"):
        Circuit.of(graph, scores, kept=np.ones_like(graph.possible), unit="logits")
    every = Circuit.of(graph, scores, unit="logits")
    with pytest.raises(ValueError, match=rf"{graph.n_edges + 1} edges were asked for, and {graph.n_edges} are in"):
        every.top(graph.n_edges + 1)
    with pytest.raises(ValueError, match="'m0' comes after 'a0.h0<q>' has been read"):
        Circuit.from_edges(graph, [("m0", "a0.h0<q>")])
    with pytest.raises(ValueError, match="no source 'a0.h7'"):
        graph.edge("a0.h7", "logits")
    with pytest.raises(ValueError, match="no destination 'a0.h0'"):
        graph.edge("input", "a0.h0")
    with pytest.raises(ValueError, match="neither a head"):
        at("input")


def test_a_circuit_of_another_model_is_refused():
    case, other = planted.or_gate(), planted.and_gate()
    graph = Graph.of(case.model)
    circuit = Circuit.from_edges(graph, case.edges, meta=case.model.provenance)
    circuit.require(case.model)
    # Both are called alike, so the message has to name what differs.
    ours, theirs = (model.provenance["model_fingerprint"][:8] for model in (case.model, other.model))
    with pytest.raises(ValueError, match=f"this circuit is of .*{ours}.*{theirs}.* find one of this model"):
        circuit.require(other.model)
    with pytest.raises(ValueError, match="Graph"):
        Circuit.from_edges(graph, case.edges).require(toy.random("llama"))


@pytest.mark.parametrize("n", [2.5, "3", True, None])
def test_a_number_of_edges_that_is_none_is_refused(n):
    whole = Circuit.of(GRAPHS[0], GRAPHS[0].possible * 1.0, unit="none")
    with pytest.raises(ValueError, match=f"n={n!r} edges were asked for: give a whole number from 0 to"):
        whole._ranked(n, "absolute")  # the types of `top` and `greedy` are checked in tests, before they are called
