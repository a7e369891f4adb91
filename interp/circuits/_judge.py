"""What do judgements of circuits share? The metric with sets of edges, between that with all edges and with none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from interp.circuits._ablated import Ablated, Positions, ablated, metric_of
from interp.circuits.circuit import By, Circuit
from interp.circuits.graph import Graph
from interp.core.readout import Readout
from interp.models.model import Model
from interp.patching._inputs import require_gap
from interp.patching._runs import readout_of
from interp.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Judged:
    """The metric of every prompt.

    Attributes:
        metric, ablation: names.
        full, empty: with all edges and with none, `[batch]`.
        values: with each set, `[batch cell]`.
        kl: KL(full model || set) in nats, `[batch cell]`, or None.
    """

    metric: str
    ablation: str
    full: np.ndarray
    empty: np.ndarray
    values: np.ndarray
    kl: np.ndarray | None

    @property
    def fractions(self) -> np.ndarray:
        """Of the mean gap, `[batch cell]`: their mean is the ratio of means."""
        return (self.values - self.empty[:, None]) / (self.full - self.empty).mean()

    @property
    def own_fractions(self) -> np.ndarray:
        """Of each prompt's own gap, NaN where it has none, `[batch cell]`."""
        gap = self.full - self.empty
        # Below this a gap is the rounding of the metric.
        gap[np.abs(gap) <= 8 * np.finfo(np.float32).eps * (np.abs(self.full) + np.abs(self.empty))] = np.nan
        return (self.values - self.empty[:, None]) / gap[:, None]


@dataclass(frozen=True, eq=False)
class Judge:
    """A task whose edges can be cut, with what it is measured between.

    Attributes:
        made: the task.
        what: the method's name, for the progress bar and what is kept of a run that stops.
        seed: of "resample".
    """

    made: Ablated
    what: str
    seed: int

    def __call__(self, sets: np.ndarray) -> np.ndarray:
        """The metric `[batch cell]` with sets of edges `[cell dst src]`; equal sets are run once."""
        flat = np.packbits(sets.reshape(len(sets), -1), axis=1)
        _, first, back = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        identity = {"method": self.what, "seed": self.seed}
        return metric_of(self.made, sets[first], identity=identity)[:, back.reshape(-1)]

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The metric with all edges and with none, each `[batch]`."""
        possible = self.made.graph.possible
        both = self(np.stack([possible, np.zeros_like(possible)]))
        return both[:, 0], both[:, 1]


def judging(
    model: Model,
    task: Task,
    graph: Graph,
    *,
    metric: str | Readout,
    ablation: str,
    reference: Task | None,
    positions: Positions = None,
    seed: int,
    what: str,
) -> Judge:
    """Make a task ready to be run with sets of edges.

    Args:
        model: a decoder.
        task: the prompts.
        graph: of the model.
        metric: a name or a Readout.
        ablation: what cut edges carry.
        reference: prompts of means.
        positions: of destinations at which edges are cut.
        seed: of "resample".
        what: name of the method.

    Returns:
        The Judge.
    """
    made = ablated(
        model, task, graph, metric=metric, ablation=ablation, reference=reference, positions=positions, seed=seed
    )
    return Judge(made, f"faithfulness.{what}", seed)


def judge(
    model: Model,
    task: Task,
    graph: Graph,
    sets: np.ndarray,
    *,
    metric: str | Readout,
    ablation: str,
    reference: Task | None,
    positions: Positions,
    seed: int,
    min_oriented: float,
    what: str,
    kl: bool = False,
) -> Judged:
    """The metric with each set of edges, and with all and none.

    Args:
        model: a decoder.
        task: the prompts.
        graph: of the model.
        sets: which edges are in, `[cell dst src]`.
        metric: a name or a Readout.
        ablation: what cut edges carry.
        reference: prompts of means.
        positions: of destinations at which edges are cut.
        seed: of "resample".
        min_oriented: share of prompts whose metric must be higher with all edges than with none.
        what: name of the method.
        kl: whether the KL from the full model is wanted.

    Returns:
        The Judged.

    Raises:
        ValueError: the metric is not higher with all edges than with none.

    Cost: a forward pass with a weight an edge for each different set and the two ends; as many again for the KL.
    """
    run = judging(
        model, task, graph, metric=metric, ablation=ablation, reference=reference, positions=positions, seed=seed,
        what=what,
    )  # fmt: skip
    whole = np.concatenate([graph.possible[None], np.zeros_like(graph.possible)[None], sets])
    full, empty, values = np.split(run(whole), [1, 2], axis=1)
    require_ends(run, full[:, 0], empty[:, 0], min_oriented)
    name = metric if isinstance(metric, str) else metric.name
    divergence = None
    if kl:
        again = Judge(replace(run.made, metric="kl"), run.what, seed)
        divergence = values if metric == "kl" else again(sets)
    return Judged(name, ablation, full[:, 0], empty[:, 0], values, divergence)


def require_ends(run: Judge, full: np.ndarray, empty: np.ndarray, min_oriented: float) -> None:
    """Refuse a task whose metric is not higher with all edges than with none.

    Args:
        run: the task.
        full: the metric with all edges, `[batch]`.
        empty: with none.
        min_oriented: share of the prompts where it must be higher.

    Raises:
        ValueError: it is not; the message of `patching._inputs.require_gap`, and how that reads here.
    """
    made = run.made
    read = readout_of(made.model, made.task, made.metric, slice(0, 1))
    try:
        require_gap(made.task, read, torch.as_tensor(full), torch.as_tensor(empty), min_oriented)
    except ValueError as error:
        raise ValueError(
            f"{error} (Here the corrupted run is the one in which every edge is cut, ablation={made.source.name!r}.)"
        ) from None


def named(model: Model, circuits: Circuit | Mapping[str, Circuit]) -> dict[str, Circuit]:
    """Circuits of one graph by name.

    Args:
        model: whose circuits they are.
        circuits: one, called by its method, or several.

    Returns:
        {name: circuit}.

    Raises:
        ValueError: none, or circuits of another model or of different graphs.
    """
    if isinstance(circuits, Circuit):
        circuits = {str(circuits.meta.get("method", "circuit")): circuits}
    if not circuits:
        raise ValueError("there are no circuits: give one, or {name: circuit}.")
    for circuit in circuits.values():
        circuit.require(model)
    if len({circuit.graph for circuit in circuits.values()}) > 1:
        raise ValueError(
            "some circuits have one key and value a head and others one a group, so their edges are not the same: "
            "find all of them on Graph.of(model, grouped=True), or all with grouped=False."
        )
    return dict(circuits)


def require_all(name: str, circuit: Circuit, n: int) -> None:
    """Refuse a circuit with too few edges for a curve.

    Args:
        name: of it.
        circuit: that is to be cut.
        n: the largest number of edges.

    Raises:
        ValueError: it has fewer.
    """
    if n > len(circuit):
        raise ValueError(
            f"circuit {name!r} has {len(circuit)} edges in, and the largest size asks for {n} of "
            f"{circuit.graph.n_edges}: give the circuit before it was cut (Circuit.of with the same scores has all "
            f"edges in), or sizes up to {len(circuit) / circuit.graph.n_edges:.3g}."
        )


def of_size(circuit: Circuit, n: int, selection: str, by: By, prune: bool) -> Circuit:
    """The n best edges.

    Args:
        circuit: with scores.
        n: how many.
        selection: "top" or "greedy".
        by: "absolute" or "signed".
        prune: take out what lies on no path.

    Returns:
        The Circuit.

    Raises:
        ValueError: an unknown selection.
    """
    if selection not in ("top", "greedy"):
        raise ValueError(f'selection={selection!r} is not known; use "top" or "greedy".')
    cut = circuit.top(n, by=by) if selection == "top" else circuit.greedy(n, by=by)
    return cut.pruned() if prune else cut
