"""Which subgraph does it? Circuits: the heads of a role, what two tasks share, how answers are written."""

from interp.circuits import (
    acdc,
    compare,
    completeness,
    describe,
    eap,
    edge_pruning,
    evidence,
    exact,
    faithfulness,
    flow_kinds,
    flow_routes,
    head_classes,
    low_rank,
    network,
    output_nodes,
    overlap,
    repair,
    roles,
    route_edges,
    stages,
)  # fmt: skip
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.circuits.head_set import HeadSet

__all__ = [
    "Circuit", "Graph", "HeadSet", "acdc", "compare", "completeness", "describe", "eap", "edge_pruning", "evidence",
    "exact", "faithfulness", "flow_kinds", "flow_routes", "head_classes", "low_rank", "network", "output_nodes",
    "overlap", "repair", "roles", "route_edges", "stages",
]  # fmt: skip
