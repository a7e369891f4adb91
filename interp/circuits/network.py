"""A circuit for networkx, and through it for every program that draws or analyses graphs."""

from __future__ import annotations

import networkx as nx

from interp.circuits.circuit import Circuit
from interp.circuits.graph import INPUT, LOGITS, at


def to_networkx(circuit: Circuit) -> nx.MultiDiGraph:
    """A circuit as a directed graph of components.

    Args:
        circuit: any; nodes are those with an edge that is in.

    Returns:
        A MultiDiGraph: a head can read another in its query, key and value, so edges have these kinds as keys. Nodes
        ("input", "a1.h0", "m1", "logits", in the order of computation) have `kind` ("input", "head", "mlp" or
        "logits"), and heads and MLPs `layer` and `head` (-1 for an MLP). Edges have `score`, `kind` ("q", "k", "v",
        "mlp" or "logits") and `input`, the name of the destination in `circuit.edges`. A key or value that heads share
        makes an edge for each of them that something reads (for all, if nothing reads any); those have the same
        `input` and the one score, so count them once.

    Example:
        >>> from interp.circuits.graph import Graph
        >>> circuit = Circuit.from_edges(Graph(1, 2, 1), [("input", "a0.g0<k>"), ("a0.h1", "logits")])
        >>> list(to_networkx(circuit).edges(data="kind"))
        [('input', 'a0.h1', 'k'), ('a0.h1', 'logits', 'logits')]
    """
    network = nx.MultiDiGraph(unit=circuit.unit, method=str(circuit.meta.get("method", "")))
    readers, graph = circuit.readers, circuit.graph
    for name in circuit.nodes:
        if name == INPUT:
            network.add_node(name, kind="input")
        else:
            layer, head = at(name)
            network.add_node(name, kind="mlp" if head < 0 else "head", layer=layer, head=head)
    if circuit.kept[graph.destination_index[LOGITS]].any():
        network.add_node(LOGITS, kind="logits")
    for row, column in zip(*circuit.kept.nonzero(), strict=True):
        into, source = graph.destinations[row], graph.sources[column]
        score = float(circuit.scores[row, column])
        nodes = [LOGITS] if into.kind == "logits" else [graph.sources[i] for i in readers[row].nonzero()[0]]
        for node in nodes:
            network.add_edge(source, node, key=into.kind, score=score, kind=into.kind, input=into.name)
    return network
