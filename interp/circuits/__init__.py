"""Which subgraph does it? Circuits: the heads of a role, what two tasks share, how answers are written."""

from interp.circuits import evidence, overlap, repair, roles, stages
from interp.circuits.head_set import HeadSet

__all__ = ["HeadSet", "evidence", "overlap", "repair", "roles", "stages"]
