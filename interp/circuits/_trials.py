"""What does cutting the next edges of a circuit do, for a batch of prompts? By cones; by passes where positions count.

Both have `run` (the prompts), `first` (the metric of the circuit that was begun with, `[batch]`), `flops` (so far), and
the same methods: `begin` with an input, then `values` of some edges and `accept` the first of them until there are no
more, then `end`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from interp.circuits._cone import Cone, forward_flops
from interp.circuits._edges import Change, EdgeRun, as_weights, cells_at_once
from interp.circuits._writes import Fresh, Writes

# Bytes of what the nodes of all cells of one pass write; and of what all batches hold so as not to make it again.
_BUDGET, _HELD = 2**27, 2**27
# Candidates tested in one pass at most.
_MOST = 32


class ByCone:
    """Tests that compute what the input reaches, and hold all else.

    Args:
        run: the prompts.
        kept: which edges are in, bool `[dst src]`.
        share: of `_HELD` that this batch may take.
    """

    def __init__(self, run: EdgeRun, kept: np.ndarray, share: float) -> None:
        self.run, self.flops, self._room = run, 0.0, share * _HELD
        first, changes = run.forward(as_weights(kept[None], run.embed))
        self.first = first[0]
        self._writes = Writes(run, changes, alive=kept.any(0), room=self._room)
        self._cone: Cone | None = None
        self._last: dict[int, Fresh] | None = None
        self._taken: dict[int, Fresh] | None = None

    @property
    def changes(self) -> list[Change]:
        """What each layer writes beyond the off run: z `[token head d_head]`, mlp `[token d_model]`."""
        return self._writes.changes

    def changed(self) -> np.ndarray:
        """Which sources may write anything beyond the off run, bool `[src]`."""
        return self._writes.changed()

    def restore(self, changes: Sequence[Change], kept: np.ndarray) -> None:
        """Go on where another search was, with what its nodes wrote."""
        for own, each in zip(self.changes, changes, strict=True):
            own.z.copy_(each.z)
            own.mlp.copy_(each.mlp)
        whole = [Change(own.z[None], own.mlp[None]) for own in self.changes]
        self._writes = Writes(self.run, whole, alive=kept.any(0), room=self._room)

    def begin(self, kept: np.ndarray, row: int) -> int:
        """Turn to the edges into one input.

        Args:
            kept: which edges are in; seen as it is at each call.
            row: number of the input.

        Returns:
            How many may be tested together.
        """
        self._cone = Cone(self.run, kept, self._writes, row)
        per_cell = 4 * self.run.embed.numel() * (len(self._cone.nodes) + 4)
        return max(1, min(_MOST, _BUDGET // per_cell))

    def values(self, sources: np.ndarray) -> Float[Tensor, "source batch"]:
        """The metric with each of some edges cut, and those before it.

        Args:
            sources: of the edges.

        Returns:
            One row an edge.
        """
        cone = self._open
        inputs = cone.own(cone.kept[cone.row]) - cone.without(sources).cumsum(0)
        values, fresh = cone.metric(inputs)
        size = sum(each.nbytes for own in fresh.values() for each in own[1:] if each is not None)
        self._last = fresh if size <= self._room else None
        if cone.bytes_held > self._room:
            cone.release()
        return values

    def accept(self, number: int) -> None:
        """The edges that were tested last stay cut, up to one of them.

        Args:
            number: its place among them.
        """
        self._taken = {layer: own.one(number) for layer, own in (self._last or {}).items()}

    def end(self) -> None:
        """All edges into the input are tested."""
        cone, taken = self._open, self._taken
        if taken is not None:
            if not taken and len(cone.nodes):  # there was no room to hold it
                _, taken = cone.metric(cone.own(cone.kept[cone.row])[None])
            self._writes.put(taken, 0)
        self.flops += cone.flops
        self._cone = self._last = self._taken = None

    @property
    def _open(self) -> Cone:
        assert self._cone is not None
        return self._cone


class ByPass:
    """Tests by passes from the input's layer on: where edges are cut at some positions, all nodes are read at others.

    Inputs are taken from the last to the first, so layers before one write what they wrote in the beginning, and those
    from there on are computed in each pass: nothing that is accepted needs to be held.

    Args:
        run: the prompts.
        kept: which edges are in, bool `[dst src]`.
    """

    def __init__(self, run: EdgeRun, kept: np.ndarray) -> None:
        self.run, self.flops, self._kept, self._row = run, 0.0, kept, 0
        first, self._changes = run.forward(as_weights(kept[None], run.embed))
        self.first = first[0]

    @property
    def changes(self) -> list[Change]:
        """As of ByCone, in the beginning."""
        return [Change(each.z[0], each.mlp[0]) for each in self._changes]

    def changed(self) -> np.ndarray:
        """As of ByCone, at the positions that are counted."""
        return Writes(self.run, self._changes).changed(slice(None) if self.run.counted is None else self.run.counted)

    def restore(self, changes: Sequence[Change], kept: np.ndarray) -> None:
        """As of ByCone."""

    def begin(self, kept: np.ndarray, row: int) -> int:
        """As of ByCone."""
        self._kept, self._row = kept, row
        return min(_MOST, cells_at_once(self.run, _BUDGET))

    def values(self, sources: np.ndarray) -> Float[Tensor, "source batch"]:
        """As of ByCone."""
        cells = np.repeat(self._kept[None], len(sources), 0)
        for number, source in enumerate(sources):
            cells[number:, self._row, source] = False
        layer, n_layers = self.run.graph.destinations[self._row].layer, self.run.graph.n_layers
        values, _ = self.run.forward(as_weights(cells, self.run.embed), first=layer, known=self._changes[:layer])
        # With sums over all edges, a pass costs up to twice a bare one.
        self.flops += 2 * len(sources) * (1 - layer / n_layers) * forward_flops(self.run, self.run.shape[1])
        return values

    def accept(self, number: int) -> None:
        """As of ByCone."""

    def end(self) -> None:
        """As of ByCone."""
