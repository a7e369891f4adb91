"""Which subgraph does it? Circuits: the heads of a role, what two tasks share, how answers are written."""
