"""Where do the parts of a circuit's picture stand? Layers upwards, heads of a layer side by side, MLPs on the right."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import networkx as nx

from interp.circuits.circuit import Circuit
from interp.circuits.graph import INPUT, LOGITS
from interp.circuits.network import to_networkx

#: More edges than this are a grey cloud.
MOST_EDGES = 400

#: Where MLPs stand; heads are between 0 and `_HEADS`.
_MLP, _HEADS = 1.0, 0.84
_SWEEPS = 4


@dataclass(frozen=True)
class Wire:
    """One edge: names, kind, score, and its ends (x0, y0) and (x1, y1) with the sideways bulge between them.

    `shift` says which side of the node it reaches, -1 (query) to 1 (value). `input` is the destination's name.
    """

    src: str
    dst: str
    kind: str
    score: float
    input: str
    bulge: float

    @property
    def shift(self) -> int:
        """-1, 0 or 1."""
        return {"q": -1, "v": 1}.get(self.kind, 0)


@dataclass(frozen=True)
class Layered:
    """A circuit's picture in units: x from 0 to 1, y in rows from 0 (the input).

    Attributes:
        at: (x, y) of each node.
        wires: the edges, weakest first.
        layers: (y, layer) of each row.
        n_rows: with those of input and logits.
        widest: most heads in a row.
        smallest, largest: |score|.
        unit: of the scores.
    """

    at: dict[str, tuple[float, float]]
    wires: tuple[Wire, ...]
    layers: tuple[tuple[int, int], ...]
    n_rows: int
    widest: int
    smallest: float
    largest: float
    unit: str


def layered(circuit: Circuit) -> Layered:
    """Places for the nodes of a circuit, layers without nodes left out.

    Args:
        circuit: to draw.

    Returns:
        The Layered.

    Raises:
        ValueError: no edge, or too many to be read.
    """
    if not 0 < len(circuit) <= MOST_EDGES:
        raise ValueError(
            f"the circuit has {len(circuit)} edges; a picture can be read with 1 to {MOST_EDGES}: draw its best ones, "
            "circuit.greedy(100), or circuit.top(100).pruned()."
        )
    network = to_networkx(circuit)
    layers = sorted({data["layer"] for _, data in network.nodes(data=True) if "layer" in data})
    row = {layer: index for index, layer in enumerate(layers, 1)}
    at = {INPUT: (_HEADS / 2, 0.0), LOGITS: (_HEADS / 2, float(len(layers) + 1))}
    heads: dict[int, list[str]] = defaultdict(list)
    for name, data in network.nodes(data=True):
        if data["kind"] == "mlp":
            at[name] = (_MLP, row[data["layer"]] + 0.5)  # read after the heads of the layer
        elif data["kind"] == "head":
            heads[data["layer"]].append(name)
    _spread(heads, row, at, network)
    wires = [
        Wire(a, b, data["kind"], data["score"], data["input"], _bulge(at[a], at[b]))
        for a, b, data in network.edges(data=True)
    ]
    wires.sort(key=lambda wire: abs(wire.score))
    return Layered(
        at={name: at[name] for name in network.nodes},
        wires=tuple(wires),
        layers=tuple((row[layer], layer) for layer in layers),
        n_rows=len(layers) + 2,
        widest=max((len(names) for names in heads.values()), default=1),
        smallest=abs(wires[0].score),
        largest=abs(wires[-1].score),
        unit=circuit.unit,
    )


def _spread(
    heads: dict[int, list[str]], row: dict[int, int], at: dict[str, tuple[float, float]], network: nx.MultiDiGraph
) -> None:
    """Stand the heads of each layer side by side, near what they are joined to."""
    around = network.to_undirected(as_view=True)
    for sweep in range(_SWEEPS):
        for layer in sorted(heads, reverse=bool(sweep % 2)):
            names = heads[layer]
            if sweep:
                names = sorted(names, key=lambda name: sum(at[n][0] for n in around[name]) / max(1, len(around[name])))
            # Rows are set off against each other, so that a line to a far row does not run through the nodes between.
            offset = (row[layer] * 0.618) % 1.0
            for index, name in enumerate(names):
                at[name] = (_HEADS * (index + 0.15 + 0.7 * offset) / len(names), float(row[layer]))


def _bulge(start: tuple[float, float], end: tuple[float, float]) -> float:
    """How far sideways a line between MLPs runs, which stand above each other."""
    apart = end[1] - start[1]
    return min(0.17, 0.03 + 0.012 * apart) if start[0] == end[0] == _MLP else 0.0
