"""A circuit: which edges of a model are in, with the score of each. Cut down, made whole, kept on disk."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from interp.circuits.graph import INPUT, LOGITS, Graph
from interp.models.model import Model

#: Which edges come first: those with the largest |score|, the largest scores, or the lowest. Where a score is the
#: change of the metric when the edge is cut, those that help most have the lowest.
By = Literal["absolute", "signed", "negative"]


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of one model.

    Attributes:
        graph: all edges there are.
        scores: of each edge, float64 `[dst src]`; 0 where there is no edge or none was scored.
        kept: which edges are in, bool `[dst src]`.
        unit: of the scores.
        meta: method and options, fingerprints of model and task; JSON types.
    """

    graph: Graph
    scores: np.ndarray
    kept: np.ndarray
    unit: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scores", "kept"):
            if getattr(self, name).shape != self.graph.possible.shape:
                raise ValueError(
                    f"{name} has the shape {getattr(self, name).shape}; the graph's edges are "
                    f"{self.graph.possible.shape} (destinations, sources)."
                )
        wrong = np.argwhere(self.graph.possible & ~np.isfinite(self.scores))
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} edges have no finite score, the first {self._names(*wrong[0].tolist())}: the model's "
                "activations or the metric overflow there. Run in float32, or on fewer prompts to find the one."
            )
        wrong = np.argwhere(self.kept & ~self.graph.possible)
        if len(wrong):
            raise ValueError(f"{self._names(*wrong[0].tolist())} is kept but is no edge of the model.")

    @classmethod
    def of(
        cls,
        graph: Graph,
        scores: np.ndarray,
        *,
        kept: np.ndarray | None = None,
        unit: str,
        meta: Mapping[str, Any] | None = None,
    ) -> Circuit:
        """A circuit with all edges in, or those that are kept.

        Args:
            graph: of the model.
            scores: `[dst src]`; entries without an edge are ignored.
            kept: `[dst src]`, None for all edges.
            unit: of the scores.
            meta: where it came from.

        Returns:
            The Circuit.

        Raises:
            ValueError: a score of an edge is not finite (which is said), or the shapes are wrong.
        """
        clean = np.where(graph.possible, np.asarray(scores, dtype=np.float64), 0.0)
        return cls(graph, clean, graph.possible.copy() if kept is None else kept.copy(), unit, dict(meta or {}))

    @classmethod
    def from_edges(
        cls, graph: Graph, edges: Iterable[tuple[str, str]], *, meta: Mapping[str, Any] | None = None
    ) -> Circuit:
        """A circuit of named edges, each with the score 1: a reference to compare others with.

        Args:
            graph: of the model.
            edges: (source, destination), for example ("a0.h1", "a1.h0<v>").
            meta: where they came from.

        Returns:
            The Circuit.

        Raises:
            ValueError: an edge that there is not.
        """
        kept = np.zeros_like(graph.possible)
        for src, dst in edges:
            kept[graph.edge(src, dst)] = True
        return cls(graph, kept.astype(np.float64), kept, "membership", dict(meta or {}))

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __repr__(self) -> str:
        name = self.meta.get("method", "edges")
        return f"<Circuit {name}: {len(self)} of {self.graph.n_edges} edges, {len(self.nodes)} nodes>"

    @property
    def edges(self) -> pd.DataFrame:
        """The edges that are in, by |score|, the largest first: `src`, `dst`, `value`."""
        rows, columns = np.nonzero(self.kept)
        order = np.argsort(-np.abs(self.scores[rows, columns]), kind="stable")
        names = np.array([each.name for each in self.graph.destinations], dtype=object)
        return pd.DataFrame({
            "src": np.array(self.graph.sources, dtype=object)[columns[order]],
            "dst": names[rows[order]],
            "value": self.scores[rows, columns][order],
        })  # fmt: skip

    @property
    def nodes(self) -> tuple[str, ...]:
        """Sources with an edge that is in, on either side, in the order of computation.

        An edge into a key or value that several heads share counts for those of them that something reads (all, if
        nothing reads any).
        """
        touched = self.kept.any(0) | self.readers[self.kept.any(1)].any(0)
        return tuple(np.array(self.graph.sources)[touched].tolist())

    @property
    def readers(self) -> np.ndarray:
        """For whom edges into an input are in: as `Graph.of_node`, of heads that share it those with an edge out."""
        read = self.graph.of_node & self.kept.any(0)[None]
        return np.where(read.any(1, keepdims=True), read, self.graph.of_node)

    def with_kept(self, kept: np.ndarray, **meta: Any) -> Circuit:
        """The same scores with other edges in.

        Args:
            kept: bool `[dst src]`.
            meta: added to the circuit's.

        Returns:
            The Circuit.
        """
        return replace(self, kept=kept, meta={**self.meta, **meta})

    def top(self, n: int, *, by: By = "absolute") -> Circuit:
        """The n best of the edges that are in.

        Args:
            n: how many.
            by: "absolute", the largest |score|; "signed", the largest scores; "negative", the lowest ones, which help
                most where the score is the change of the metric when the edge is cut (eap, exact).

        Returns:
            A Circuit with n edges; of equal scores the earlier ones. It need not hang together: see `pruned`.

        Raises:
            ValueError: fewer edges are in, or n is no whole number.
        """
        rank = self._ranked(n, by)
        rows, columns = np.nonzero(self.kept)
        best = np.argsort(-rank[rows, columns], kind="stable")[:n]
        kept = np.zeros_like(self.kept)
        kept[rows[best], columns[best]] = True
        return self.with_kept(kept, selection=f"top {n}, {by}")

    def greedy(self, n: int, *, by: By = "absolute") -> Circuit:
        """The n edges found from the logits backwards, always taking the best edge into a node that is in already.

        Args:
            n: how many.
            by: as for `top`.

        Returns:
            A Circuit of n edges, or all that lead to the logits if those are fewer; each leads to the logits.

        Raises:
            ValueError: fewer edges are in, or n is no whole number.
        """
        rank = self._ranked(n, by)
        kept, open_rows = np.zeros_like(self.kept), np.zeros(len(self.kept), dtype=bool)
        heap: list[tuple[float, int, int]] = []

        def reach(row: int) -> None:
            if not open_rows[row]:
                open_rows[row] = True
                for column in np.flatnonzero(self.kept[row]):
                    heapq.heappush(heap, (-rank[row, column], row, int(column)))

        reach(self.graph.destination_index[LOGITS])
        for _ in range(n):
            if not heap:
                break
            _, row, column = heapq.heappop(heap)
            kept[row, column] = True
            for entry in np.flatnonzero(self.graph.of_node[:, column]):
                reach(int(entry))
        return self.with_kept(kept, selection=f"greedy {n}, {by}")

    def pruned(self) -> Circuit:
        """Without the edges that lie on no path from the input to the logits.

        Returns:
            A Circuit in which each node but the input has an edge into it, and each has one out of it.
        """
        kept = self.kept.copy()
        while True:
            fed = (self.graph.of_node & kept.any(1)[:, None]).any(0)  # sources with an edge into one of their inputs
            fed[self.graph.source_index[INPUT]] = True
            read = kept.any(0)
            useful = (self.graph.of_node & read[None]).any(1)  # inputs of a node that something reads
            useful[self.graph.destination_index[LOGITS]] = True
            smaller = kept & fed[None] & useful[:, None]
            if (smaller == kept).all():
                return self.with_kept(kept, pruned=True)
            kept = smaller

    def save(self, path: str | Path) -> Path:
        """Write the circuit as one `.npz` file without pickles.

        Args:
            path: the file; ".npz" is added if it has no ending.

        Returns:
            The path written.
        """
        path = Path(path) if Path(path).suffix else Path(path).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"graph": asdict(self.graph), "unit": self.unit, "meta": dict(self.meta)}
        with path.open("wb") as stream:
            np.savez_compressed(stream, scores=self.scores, kept=self.kept, head=np.array(json.dumps(head)))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The Circuit.

        Raises:
            ValueError: a file that `save` did not write.
        """
        try:
            stored = np.load(path, allow_pickle=False)
        except (ValueError, EOFError):  # neither an array nor an archive of arrays
            stored = None
        if not isinstance(stored, np.lib.npyio.NpzFile) or "head" not in stored:
            raise ValueError(f"{path} holds no circuit: give a file that Circuit.save wrote.")
        with stored:
            head = json.loads(str(stored["head"]))
            return cls(Graph(**head["graph"]), stored["scores"], stored["kept"], head["unit"], head["meta"])

    def require(self, model: Model) -> None:
        """Refuse a model that the circuit is not of.

        Args:
            model: that it is to be used with.

        Raises:
            ValueError: another fingerprint, weight mode or shape.
        """
        made_on = {key: self.meta.get(key) for key in ("model", "model_fingerprint", "weights")}
        here = {key: model.provenance.get(key) for key in made_on}
        grouped = Graph.of(model), Graph.of(model, grouped=False)
        if self.graph not in grouped or (made_on["model_fingerprint"] and made_on != here):
            # Two models may share a name, such as one before and after training: fingerprints tell them apart.
            ours, theirs = (str(each["model_fingerprint"])[:8] for each in (made_on, here))
            raise ValueError(
                f"this circuit is of {made_on['model'] or self.graph} ({made_on['weights']} weights, {ours}), and the "
                f"model is {model.name} ({model.weights} weights, {theirs}): find one of this model, or load the other."
            )

    def _ranked(self, n: object, by: By) -> np.ndarray:
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
            raise ValueError(
                f"n={n!r} edges were asked for: give a whole number from 0 to {len(self)}, for example "
                f"round(0.05 * {len(self)}) for a share of 5 %."
            )
        if not 0 <= n <= len(self):
            raise ValueError(f"{n} edges were asked for, and {len(self)} are in: give a number from 0 to {len(self)}.")
        return ranks(self.scores, by)

    def _names(self, row: int, column: int) -> str:
        return f"{self.graph.sources[column]} -> {self.graph.destinations[row].name}"


def ranks(scores: np.ndarray, by: By) -> np.ndarray:
    """Numbers by which edges are ranked, the largest first.

    Args:
        scores: any shape.
        by: see `By`.

    Returns:
        The same shape.

    Raises:
        ValueError: an unknown `by`.
    """
    if by not in ("absolute", "signed", "negative"):
        raise ValueError(f'by={by!r} is not known; use "absolute", "signed" (largest first) or "negative".')
    return {"absolute": np.abs(scores), "signed": scores, "negative": -scores}[by]
