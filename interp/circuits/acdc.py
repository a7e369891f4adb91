"""Which edges can be left out, one after the other? Automatic circuit discovery, from the logits backwards (ACDC)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits._ablated import ABLATIONS, Ablated, ablated
from interp.circuits._checkpoint import Checkpoint, digest_of
from interp.circuits._cone import Cone, forward_flops, wrote_of
from interp.circuits._edges import EdgeRun, as_weights
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.core.readout import Readout
from interp.core.registry import method
from interp.models.model import Model
from interp.patching._inputs import provenance, require_decoder
from interp.tasks.task import Task

#: In which order the edges into one input are tested: from the last source to the first, the reverse, or at random.
Order = Literal["reverse", "normal", "shuffle"]

# Bytes of what the nodes of all cells of one pass write.
_BUDGET = 2**28
# Candidates tested in one pass at most.
_MOST = 32


@method(name="ACDC", paper="arXiv:2304.14997", notebook="circuit_discovery")
def acdc(
    model: Model,
    task: Task,
    *,
    tau: float,
    metric: str | Readout = "kl",
    ablation: str = "corrupt",
    start: Circuit | None = None,
    grouped: bool = True,
    order: Order = "reverse",
    absolute: bool = False,
    reference: Task | None = None,
    seed: int = 0,
) -> Circuit:
    """The edges that remain when each is cut in turn, and stays cut where that does less damage than tau.

    Destinations are taken from the logits backwards, and of each the edges into it. With m the metric's mean over
    prompts, C the edges that are still in, and e the one that is tested,

        damage(e) = m(C - e) - m(C) for "kl",  m(C) - m(C - e) for a metric that is the better, the higher;

    e is cut for good if damage(e) < tau (with `absolute`, if |damage(e)| < tau). Each test sees what was cut before
    it, so the outcome depends on the order: of two edges of which one suffices (OR) exactly one stays, the one that is
    tested last, and of a pair that cancels the first one is tested against the other.

    Plain ACDC runs the whole model for each test. Here a test computes the nodes that the destination reaches through
    edges that are in, from the first position on where the prompts differ, with the next candidates in the same batch:
    each with all before it cut, accepted up to the first that has to stay. Edges whose source writes the same in both
    runs, and those into inputs that nothing reads any more, are cut without a test.

    Args:
        model: a decoder.
        task: the prompts, with corrupted ones for ablation="corrupt".
        tau: damage from which on an edge stays, in the metric's unit; above 0.
        metric: "kl" (from the whole model's prediction), "logit_diff", "log_prob", "prob", or a Readout, which is taken
            to be the better, the higher, unless it is named "kl".
        ablation: what edges that are cut carry, one of `interp.circuits._ablated.ABLATIONS`: the paired prompt's value
            ("corrupt"), "zero", "mean", "position_mean", or another prompt's ("resample").
        start: a Circuit whose edges to begin with, for example `eap(...).top(500)`; None for all edges, which is the
            paper's. Its graph decides about groups.
        grouped: whether a key or value that several heads share is one input.
        order: of the edges into one input: "reverse" (the last source first; the authors' default), "normal", or
            "shuffle" (by `seed`).
        absolute: whether an edge whose loss improves the metric by tau stays too.
        reference: prompts of means.
        seed: of order="shuffle" and ablation="resample".

    Returns:
        Circuit with the edges that stay; `scores` are the changes of the metric seen when each was tested,
        m(C - e) - m(C), in the metric's unit, 0 for edges that were not. `meta` has, beside the options: `n_tests`
        (edges that plain ACDC would test, each a forward pass), `n_cells` (parts of forward passes that were computed,
        with those of candidates that were not needed), `flops` and `plain_flops` (of `n_tests` bare forward passes),
        `value_start` and `value` (the metric of the first and the last circuit).

    Raises:
        ValueError: tau is not above 0, an unknown order, metric or ablation, a task without what they need, a `start`
            of another model, or a metric that is not finite.

    Cost: a part of a forward pass for each edge tested, see `meta`; memory for what every source writes, prompts x
        positions x sources x d_model numbers, and as much again for a batch of candidates. Can be stopped, and goes on
        from the last layer that was done.

    An edge is cut at all positions: there is no option `positions` as in `exact` and `edge_pruning`, since at positions
    that are not cut every node would be read by every later one, and a test would save little of a forward pass.

    Differs from the paper: keys and values of a group are one input (`grouped=False` makes them one a head). Edges into
        nodes without a way to the logits are cut without a test, as in the authors' code.

    Example:
        >>> from interp.models import planted
        >>> case = planted.and_gate()
        >>> task = Task("and", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> found = acdc(case.model, task, tau=0.01)
        >>> {(row.src, row.dst) for row in found.edges.itertuples()} == set(case.edges)
        True
    """
    return sweep(
        model, task, taus=[tau], metric=metric, ablation=ablation, start=start, grouped=grouped, order=order,
        absolute=absolute, reference=reference, seed=seed,
    )[0]  # fmt: skip


def sweep(
    model: Model,
    task: Task,
    *,
    taus: Sequence[float],
    metric: str | Readout = "kl",
    ablation: str = "corrupt",
    start: Circuit | None = None,
    grouped: bool = True,
    order: Order = "reverse",
    absolute: bool = False,
    reference: Task | None = None,
    seed: int = 0,
) -> list[Circuit]:
    """`acdc` for several thresholds; they share the off run and the first circuit's pass, no more.

    Args:
        model: a decoder.
        task: the prompts.
        taus: thresholds.
        metric: see `acdc`, as all that follow.
        ablation: what cut edges carry.
        start: edges to begin with.
        grouped: whether keys and values are those of groups.
        order: of the edges into one input.
        absolute: whether edges whose loss helps stay.
        reference: prompts of means.
        seed: of "shuffle" and "resample".

    Returns:
        A Circuit for each threshold, as `acdc` returns it.

    Raises:
        ValueError: see `acdc`; no thresholds.

    Cost: that of an `acdc` each: two thresholds part ways at the first edge whose damage lies between them, which is
        one of the first inputs tested.
    """
    _require(model, taus, order, ablation)
    if start is not None:
        start.require(model)
    graph = Graph.of(model, grouped=grouped) if start is None else start.graph
    made = ablated(model, task, graph, metric=metric, ablation=ablation, reference=reference, seed=seed)
    search = _Search(made, graph.possible if start is None else start.kept, order, absolute, seed)
    return [search.found(tau) for tau in taus]


class _Search:
    """One task, ready for searches with any threshold."""

    @torch.no_grad()
    def __init__(self, made: Ablated, first: np.ndarray, order: Order, absolute: bool, seed: int) -> None:
        self.made, self.graph, self.first = made, made.graph, first.copy()
        self.order, self.absolute, self.seed = order, absolute, seed
        self.run: EdgeRun = made.run(slice(None))
        self.sign = 1.0 if self.run.read.name == "kl" else -1.0
        values, changes = self.run.forward(as_weights(first[None], made.task.clean))
        self.value = self._mean(values)[0]
        self.wrote = wrote_of(self.run, changes)
        self.layers = np.array([each.layer for each in self.graph.destinations])

    @torch.no_grad()
    def found(self, tau: float) -> Circuit:
        """The circuit of one threshold."""
        identity = self._identity(tau)
        checkpoint = Checkpoint(None if isinstance(self.made.metric, Readout) else identity)
        kept, scores, counts = self.first.copy(), np.zeros(self.first.shape), np.zeros(3)
        wrote, current, done = self.wrote.clone(), self.value, 0
        shapes = {
            "kept": kept.shape, "scores": scores.shape, "counts": counts.shape, "nodes": (-1,),
            "wrote": (-1, *wrote.shape[1:]), "current": (), "done": (),
        }  # fmt: skip
        if (state := checkpoint.load(shapes)) is not None:
            kept, scores, counts = state["kept"], state["scores"], state["counts"]
            wrote[torch.from_numpy(state["nodes"]).to(wrote.device)] = torch.from_numpy(state["wrote"]).to(wrote)
            current, done = float(state["current"]), int(state["done"])
        n_layers = self.graph.n_layers
        with tqdm(total=n_layers + 1, initial=done, desc=f"ACDC, tau {tau:g}", leave=False) as bar:
            for layer in range(n_layers - done, -1, -1):
                current = self._layer(layer, tau, current, kept, scores, counts, wrote)
                # Of what was computed here, only what nodes that are still read write is needed again.
                nodes = np.flatnonzero(kept.any(0))
                nodes = nodes[nodes > layer * (self.graph.n_heads + 1)]
                checkpoint.store({
                    "kept": kept, "scores": scores, "counts": counts, "nodes": nodes,
                    "wrote": wrote[nodes].cpu().numpy(), "current": np.array(current),
                    "done": np.array(n_layers - layer + 1),
                })  # fmt: skip
                bar.update()
        values, _ = self.run.forward(as_weights(kept[None], self.made.task.clean))
        value = self._mean(values)[0]
        checkpoint.clear()
        n_pos = self.made.task.clean.shape[1]
        n_tests, n_cells, flops = counts.tolist()
        # The first and the last circuit's passes; with sums over all edges, one costs up to twice a bare one.
        flops += 4 * forward_flops(self.run, self.run.shape[1])
        meta = {
            **identity, "selection": f"tau {tau:g}", "metric_unit": self.run.read.unit, "n_tests": int(n_tests),
            "n_cells": int(n_cells), "flops": flops, "plain_flops": n_tests * forward_flops(self.run, n_pos),
            "value_start": self.value, "value": value,
        }  # fmt: skip
        return Circuit.of(self.graph, scores, kept=kept, unit=self.run.read.unit, meta=meta)

    def _layer(
        self,
        layer: int,
        tau: float,
        current: float,
        kept: np.ndarray,
        scores: np.ndarray,
        counts: np.ndarray,
        wrote: Tensor,
    ) -> float:
        """Test the edges into one layer; the metric of what is left. All but tau is kept up to date."""
        changed = (wrote != 0).flatten(1).any(1).cpu().numpy()
        for row in np.flatnonzero(self.layers == layer)[::-1].tolist():
            if not self._is_read(row, kept):
                kept[row] = False
                continue
            counts[0] += kept[row].sum()
            kept[row] &= changed
            current = self._row(row, tau, current, kept, scores, counts, wrote)
        return current

    def _is_read(self, row: int, kept: np.ndarray) -> bool:
        """Whether anything reads what depends on a destination."""
        return row == len(kept) - 1 or bool(kept[:, self.graph.of_node[row]].any())

    def _row(
        self,
        row: int,
        tau: float,
        current: float,
        kept: np.ndarray,
        scores: np.ndarray,
        counts: np.ndarray,
        wrote: Tensor,
    ) -> float:
        """Test the edges into one destination; the metric of what is left."""
        candidates = self._ordered(row, np.flatnonzero(kept[row]))
        if not len(candidates):
            return current
        cone = Cone(self.run, kept, wrote, row)
        per_cell = 4 * self.made.model.d_model * wrote.shape[1] * (len(cone.nodes) + 4)
        most = max(1, min(_MOST, _BUDGET // per_cell))
        done, size, last = 0, min(4, most), None
        while done < len(candidates):
            some = candidates[done : done + size]
            values, fresh = cone.metric(cone.own(kept[row]) - cone.without(some).cumsum(0))
            counts[1] += len(some)
            cut = 0
            for source, mean in zip(some, self._mean(values), strict=True):
                done += 1
                scores[row, source] = change = mean - current
                damage = self.sign * change
                if not (abs(damage) if self.absolute else damage) < tau:
                    break
                kept[row, source], current, last = False, mean, fresh[cut]
                cut += 1
            size = min(most, 2 * size) if cut == len(some) else cut + 1
        if last is not None:
            wrote[torch.as_tensor(cone.nodes, device=wrote.device)] = last
        counts[2] += cone.flops
        return current

    def _ordered(self, row: int, sources: np.ndarray) -> np.ndarray:
        if self.order == "shuffle":
            return np.random.default_rng([self.seed, row]).permutation(sources)
        return sources[::-1].copy() if self.order == "reverse" else sources

    def _mean(self, values: Tensor) -> list[float]:
        means = values.double().mean(1).tolist()
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"the metric {self.run.read.name!r} is not finite for some circuit: the activations overflow there. "
                "Load the model in float32, or take another ablation."
            )
        return means

    def _identity(self, tau: float) -> dict[str, Any]:
        made = self.made
        return provenance(
            made.model, made.task, method="acdc", tau=tau, metric=self.run.read.name, ablation=made.source.name,
            order=self.order, absolute=self.absolute, seed=self.seed, n_start=int(self.first.sum()),
            grouped=self.graph == Graph.of(made.model), **digest_of(made, self.first),
        )  # fmt: skip


def _require(model: Model, taus: Sequence[float], order: str, ablation: str) -> None:
    require_decoder(model)
    if not len(taus):
        raise ValueError("there is no tau: give at least one, for example taus=[0.1, 0.01].")
    for tau in taus:
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(
                f"tau={tau}: it is the damage from which on an edge stays, a number above 0 in the metric's unit, for "
                "example tau=0.01."
            )
    if order not in ("reverse", "normal", "shuffle"):
        raise ValueError(f"order={order!r} is not known; use 'reverse', 'normal' or 'shuffle'.")
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r} is not known; use one of {', '.join(ABLATIONS)}.")
