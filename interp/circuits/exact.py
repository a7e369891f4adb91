"""How much does each edge matter? Every one cut in a run of its own, nothing estimated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from interp.circuits._ablated import ABLATIONS, Ablated, Positions, ablated, plain, require_apart
from interp.circuits._checkpoint import digest_of
from interp.circuits._cone import Cone
from interp.circuits._edges import EdgeRun, as_weights, cells_at_once
from interp.circuits._writes import Writes
from interp.circuits.circuit import Circuit
from interp.circuits.graph import LOGITS, Destination, Graph
from interp.core.batching import batches, sweep
from interp.core.edits import Cell, Edit
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import rerun
from interp.models.model import Model
from interp.patching._inputs import numbers, provenance, require_decoder
from interp.patching._runs import readout_of
from interp.tasks.task import Task


@method(name="Exact edge patching", paper="arXiv:2304.14997", notebook="circuit_discovery")
def patch_edges(
    model: Model,
    task: Task,
    *,
    edges: Iterable[tuple[str, str]] | Circuit | None = None,
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    grouped: bool = True,
    reference: Task | None = None,
    positions: Positions = None,
    seed: int = 0,
) -> Circuit:
    """What cutting each edge alone does to the metric, with all other edges in.

    An edge u -> v is cut by giving v, and no other node, what u writes in the off run in place of what it writes:

        score(u -> v) = mean over prompts of  m(v reads its stream - clean_u + off_u) - m(clean)

    at all positions at once, or at those that are named; everything after v responds. The sign is that of the
    estimates in `interp.circuits.eap`: negative where the edge helps the metric (for "kl", positive where it matters).
    One of two nodes that suffice (OR), or one that a backup replaces, scores 0: what a single cut cannot show.

    Args:
        model: a decoder.
        task: the prompts, with corrupted ones for ablation="corrupt".
        edges: (source, destination) of the edges to cut, for example [("a0.h1", "a1.h0<v>")], or a Circuit, for those
            that are in; None for all.
        metric: "logit_diff", "kl", "log_prob", "prob", or a Readout.
        ablation: what a cut edge carries: "corrupt" (the paired prompt's value), "zero", "mean", "position_mean", or
            "resample" (another prompt's).
        grouped: whether a key or value that several heads share is one input; a Circuit's own graph decides for it.
        reference: prompts of means.
        positions: of destinations at which edges are cut: names of the task or indices; None for all.
        seed: of "resample".

    Returns:
        Circuit of the edges that were cut, all of them in, with their scores in the metric's unit. `meta["value"]` is
        m(clean), `meta["n_runs"]` how many edges were run.

    Raises:
        ValueError: an edge that the model has not, an unknown metric or ablation, a task without what they need, a
            corrupted prompt that equals its clean one, a Circuit of another model, a metric that is not finite.

    Cost: for each edge the layers from its destination on, on the positions from the first on where the prompts differ,
        in batches; edges into the logits only the unembedding; edges whose source writes the same in both runs
        nothing; and a forward pass for each destination. SmolLM2-135M, four prompts of 14 tokens of which the last five
        differ: 25 ms of one CPU core an edge into the MLP of layer 20, so all 70,651 edges are a matter of half an
        hour and more; name some, or use estimates. Can be stopped and goes on with the next destination, unless the
        metric is a Readout. Memory: layers x tokens of all prompts x 6 d_model numbers (what is written and read in the
        off run, and how the clean run differs), and up to 256 MB for the edges of one pass, whose sources alone get a
        vector each.

    Example:
        >>> from interp.models import planted
        >>> case = planted.and_gate()
        >>> task = Task("and", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> found = patch_edges(case.model, task, edges=[("a0.h1", "m1"), ("a0.h2", "m1")])
        >>> found.edges.round(3).values.tolist()
        [['a0.h1', 'm1', -8.0], ['a0.h2', 'm1', 0.0]]
    """
    require_decoder(model)
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r} is not known; use one of {', '.join(ABLATIONS)}.")
    require_apart(task, ablation)
    if isinstance(edges, Circuit):
        edges.require(model)
        graph, wanted = edges.graph, edges.kept
    else:
        graph = Graph.of(model, grouped=grouped)
        wanted = graph.possible if edges is None else Circuit.from_edges(graph, edges).kept
    if not wanted.any():
        raise ValueError("there are no edges: name at least one, for example ('a0.h1', 'logits').")
    made = ablated(
        model, task, graph, metric=metric, ablation=ablation, reference=reference, positions=positions, seed=seed
    )
    rows = np.flatnonzero(wanted.any(1))
    groups = [_Prompts(made, some) for some in batches(len(task), made.batch_size)]
    read = groups[0].run.read
    meta = provenance(
        model, task, method="exact", metric=read.name, ablation=ablation, grouped=graph == Graph.of(model), seed=seed,
        positions=plain(positions), **digest_of(made, wanted),
    )  # fmt: skip

    def compute(some: slice) -> dict[str, np.ndarray]:
        found = [
            sum(group.effects(row, np.flatnonzero(wanted[row])) for group in groups) / len(task)
            for row in rows[some].tolist()
        ]
        whole = np.zeros((len(found), wanted.shape[1]))
        for each, row, effects in zip(whole, rows[some], found, strict=True):
            each[wanted[row]] = effects
        return {"scores": whole}

    if isinstance(metric, Readout):
        parts = compute(slice(None))["scores"]
    else:
        parts = sweep(len(rows), compute, batch_size=1, identity=meta, description="exact edges")["scores"]
    scores = np.zeros(wanted.shape)
    scores[rows] = parts
    value = float(np.concatenate([group.clean for group in groups]).mean())
    meta |= {"metric_unit": read.unit, "value": value, "n_runs": int(wanted.sum())}
    return Circuit.of(graph, scores, kept=wanted, unit=read.unit, meta=meta)


class _Prompts:
    """Some prompts, ready for cuts of single edges."""

    @torch.no_grad()
    def __init__(self, made: Ablated, rows: slice) -> None:
        self.made, self.rows = made, rows
        self.run: EdgeRun = made.run(rows)
        self.read = readout_of(made.model, made.task, made.metric, rows)
        clean, changes = self.run.forward(as_weights(made.graph.possible[None], made.task.clean))
        self.clean = numbers(clean[0])
        self.wrote = Writes(self.run, changes)
        self.changed = self.wrote.changed(slice(None) if self.run.counted is None else self.run.counted)

    @torch.no_grad()
    def effects(self, row: int, sources: np.ndarray) -> np.ndarray:
        """The sum over prompts of what each cut does, `[source]`."""
        found = np.zeros(len(sources))
        live = self.changed[sources]
        if live.any():
            found[live] = (self._metrics(row, sources[live]) - self.clean).sum(1)
        return found

    def _metrics(self, row: int, sources: np.ndarray) -> np.ndarray:
        """The metric with each edge cut, `[source batch]`."""
        to, graph = self.made.graph.destinations[row], self.made.graph
        cone = Cone(self.run, _into(graph, row), self.wrote, row)
        whole = cone.own(graph.possible[row])
        parts = []
        for some in batches(len(sources), cells_at_once(self.run)):
            shift = cone.without(sources[some])
            if (counted := self.run.counted) is not None:
                shift = shift * (counted[self.run.at] if to.name == LOGITS else counted)[:, None]
            inputs = whole - shift
            if to.name == LOGITS:
                parts.append(self.run.metric_of(inputs))
                continue
            values = cone.values(inputs)
            cells = [self._cell(to, each) for each in values]
            task = self.made.task
            mask = None if task.mask is None else task.mask[self.rows]
            parts.append(rerun(self.made.model, task.clean[self.rows], cells, self.read, mask=mask))
        return numbers(torch.cat(parts))

    def _cell(self, to: Destination, value: Tensor) -> Cell:
        """What the nodes of a destination give, `[node token width]`, put where they differ from the clean run."""
        site = "mlp_out" if to.kind == "mlp" else "z"
        heads = [None] if to.kind == "mlp" else [int(node.rpartition("h")[2]) for node in to.nodes]
        by_position = value.unflatten(1, self.run.shape)
        return [
            Edit(site, to.layer, head=head, pos=self.run.start + at, value=own[:, at])
            for head, own in zip(heads, by_position, strict=True)
            for at in range(self.run.shape[1])
        ]


def _into(graph: Graph, row: int) -> np.ndarray:
    """All edges but those that a destination's nodes have, so that its cone holds these alone."""
    to, kept = graph.destinations[row], graph.possible.copy()
    for number, each in enumerate(graph.destinations):
        if each.layer > to.layer or (each.layer == to.layer and each.kind == "mlp"):
            kept[number] = False
    kept[-1] = graph.of_node[row]  # to the logits, so that they count as read
    return kept
