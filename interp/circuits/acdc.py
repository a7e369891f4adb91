"""Which edges can be left out, one after the other? Automatic circuit discovery, from the logits backwards (ACDC)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits._ablated import ABLATIONS, Ablated, Positions, ablated, finite, plain, require_apart
from interp.circuits._checkpoint import Checkpoint, digest_of
from interp.circuits._cone import forward_flops
from interp.circuits._edges import Change, as_weights
from interp.circuits._trials import ByCone, ByPass
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.core.batching import batches
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import _free_bytes
from interp.models.model import Model
from interp.patching._inputs import numbers, provenance, require_decoder
from interp.tasks.task import Task

#: In which order the edges into one input are tested: from the last source to the first, the reverse, or at random.
Order = Literal["reverse", "normal", "shuffle"]

# Bytes of the vectors of all sources of a batch, were they made: what decides how many prompts it has on a CPU.
_BATCH = 2**27


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
    positions: Positions = None,
    batch_size: int | None = None,
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
        positions: of destinations at which edges are cut: names of the task or indices; None for all. At other
            positions every input is whole.
        batch_size: prompts that are run together; None chooses from the free memory. It changes the metric by rounding
            only.
        seed: of order="shuffle" and ablation="resample".

    Returns:
        Circuit with the edges that stay; `scores` are the changes of the metric seen when each was tested,
        m(C - e) - m(C), in the metric's unit, 0 for edges that were not. `meta` has, beside the options: `n_tests`
        (edges that plain ACDC would test, each a forward pass), `n_cells` (parts of forward passes that were computed,
        with those of candidates that were not needed), `flops` and `plain_flops` (of `n_tests` bare forward passes),
        `value_start` and `value` (the metric of the first and the last circuit).

    Raises:
        ValueError: tau is not above 0, an unknown order, metric, ablation or position, a task without what they need,
            a corrupted prompt that equals its clean one, a `start` of another model, or a metric that is not finite
            (the prompt is named).

    Cost: a part of a forward pass for each edge tested, see `meta`; with `positions` a whole one from the destination's
        layer on, with sums over all edges, since where nothing is cut every node is read by every later one. Memory:
        for all prompts layers x tokens x 6 d_model numbers (what is written and read in the off run, and how the
        current circuit differs), and up to about 500 MB for vectors of nodes and inputs, which are made again where
        they would take more; no vector for each source at each token. SmolLM2-135M, from EAP's best 300 edges, above
        the loaded model: 150 MB for 16 pairs of which 5 tokens differ, 300 MB where all 14 do. Several batches take
        longer by what smaller matrices cost (batches of 4 instead of 16: twice the CPU time, for the same operations).
        Can be stopped, and goes on from the last layer that was done.

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
        absolute=absolute, reference=reference, positions=positions, batch_size=batch_size, seed=seed,
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
    positions: Positions = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[Circuit]:
    """`acdc` for several thresholds; they share the off run, no more.

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
        positions: at which edges are cut.
        batch_size: prompts that are run together.
        seed: of "shuffle" and "resample".

    Returns:
        A Circuit for each threshold, as `acdc` returns it.

    Raises:
        ValueError: see `acdc`; no thresholds.

    Cost: that of an `acdc` each: two thresholds part ways at the first edge whose damage lies between them, which is
        one of the first inputs tested.
    """
    _require(model, taus, order, ablation)
    require_apart(task, ablation)
    if start is not None:
        start.require(model)
    graph = Graph.of(model, grouped=grouped) if start is None else start.graph
    made = ablated(
        model, task, graph, metric=metric, ablation=ablation, reference=reference, positions=positions, seed=seed
    )
    options = {"order": order, "absolute": absolute, "seed": seed, "positions": plain(positions)}
    size = _prompts_at_once(made) if batch_size is None else batch_size
    search = _Search(made, graph.possible if start is None else start.kept, options, size)
    return [search.found(tau) for tau in taus]


def _prompts_at_once(made: Ablated) -> int:
    """So many that what all sources of a batch write would fit, were it made, into a part of the free memory."""
    task, taken = made.task, made.source.tokens
    # Positions before the first difference are not computed.
    apart = torch.ones_like(task.clean, dtype=torch.bool) if taken is None else task.clean != taken
    n_pos = max(1, int(apart.any(0).long().cummax(0).values.sum()))
    room = _free_bytes(task.clean.device) // 8
    if task.clean.device.type == "cpu":
        room = min(room, _BATCH)
    return max(1, room // (4 * made.model.d_model * len(made.graph.sources) * n_pos))


class _Search:
    """One task, ready for searches with any threshold."""

    @torch.no_grad()
    def __init__(self, made: Ablated, first: np.ndarray, options: dict[str, Any], batch_size: int) -> None:
        self.made, self.graph, self.first = made, made.graph, first.copy()
        self.options, self.size = options, batch_size
        self.runs = [made.run(rows) for rows in batches(len(made.task), batch_size)]
        self.read = self.runs[0].read
        self.sign = 1.0 if self.read.name == "kl" else -1.0
        self.layers = np.array([each.layer for each in self.graph.destinations])

    @torch.no_grad()
    def found(self, tau: float) -> Circuit:
        """The circuit of one threshold."""
        identity = self._identity(tau)
        key = None if isinstance(self.made.metric, Readout) else {**identity, "batch_size": self.size}
        checkpoint = Checkpoint(key)
        kept, scores, counts = self.first.copy(), np.zeros(self.first.shape), np.zeros(3)
        self.parts: list[ByCone | ByPass] = [
            ByCone(run, kept, 1 / len(self.runs)) if run.counted is None else ByPass(run, kept) for run in self.runs
        ]
        current, done = self._means([part.first[None] for part in self.parts])[0], 0
        value_start = current
        if (state := checkpoint.load(self._shapes())) is not None:
            kept, scores, counts = state["kept"], state["scores"], state["counts"]
            current, done = float(state["current"]), int(state["done"])
            self._restore(state, kept)
        n_layers = self.graph.n_layers
        with tqdm(total=n_layers + 1, initial=done, desc=f"ACDC, tau {tau:g}", leave=False) as bar:
            for layer in range(n_layers - done, -1, -1):
                current = self._layer(layer, tau, current, kept, scores, counts)
                checkpoint.store({
                    "kept": kept, "scores": scores, "counts": counts, "current": np.array(current),
                    "done": np.array(n_layers - layer + 1), **self._written(layer),
                })  # fmt: skip
                bar.update()
        checkpoint.clear()
        weights = as_weights(kept[None], self.made.task.clean)
        value = self._means([run.forward(weights)[0] for run in self.runs])[0]
        n_pos = self.made.task.clean.shape[1]
        n_tests, n_cells, flops = counts.tolist()
        # The first and the last circuit's passes; with sums over all edges, one costs up to twice a bare one.
        flops += 4 * sum(forward_flops(run, run.shape[1]) for run in self.runs)
        meta = {
            **identity, "selection": f"tau {tau:g}", "metric_unit": self.read.unit, "n_tests": int(n_tests),
            "n_cells": int(n_cells), "flops": flops,
            "plain_flops": n_tests * sum(forward_flops(run, n_pos) for run in self.runs),
            "value_start": value_start, "value": value,
        }  # fmt: skip
        return Circuit.of(self.graph, scores, kept=kept, unit=self.read.unit, meta=meta)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of a state."""
        shape = self.first.shape
        z, mlp = (self._over_batches(0, place).shape for place in (0, 1))
        return {
            "kept": shape, "scores": shape, "counts": (3,), "current": (), "done": (),
            "z": (-1, *z), "mlp": (-1, *mlp),
        }  # fmt: skip

    def _written(self, first: int) -> dict[str, np.ndarray]:
        """What the layers write that were computed with other edges than in the beginning: those from one on."""
        found = {}
        for place, name in enumerate(("z", "mlp")):
            own = [self._over_batches(layer, place) for layer in range(first, self.graph.n_layers)]
            found[name] = np.stack(own) if own else np.zeros((0, *self._over_batches(0, place).shape))
        return found

    def _over_batches(self, layer: int, place: int) -> np.ndarray:
        return np.concatenate([numbers(part.changes[layer][place]) for part in self.parts])

    def _restore(self, state: dict[str, np.ndarray], kept: np.ndarray) -> None:
        first, done = self.graph.n_layers - len(state["z"]), 0
        for part in self.parts:
            changes, until = list(part.changes), done + len(part.run.embed)
            for layer, (z, mlp) in enumerate(zip(state["z"], state["mlp"], strict=True), first):
                changes[layer] = Change(*(torch.from_numpy(each[done:until]) for each in (z, mlp)))
            part.restore(changes, kept)
            done = until

    def _layer(
        self, layer: int, tau: float, current: float, kept: np.ndarray, scores: np.ndarray, counts: np.ndarray
    ) -> float:
        """Test the edges into one layer; the metric of what is left. All but tau is kept up to date."""
        changed = np.any([part.changed() for part in self.parts], 0)
        for row in np.flatnonzero(self.layers == layer)[::-1].tolist():
            if not self._is_read(row, kept):
                kept[row] = False
                continue
            counts[0] += kept[row].sum()
            kept[row] &= changed
            current = self._row(row, tau, current, kept, scores, counts)
        return current

    def _is_read(self, row: int, kept: np.ndarray) -> bool:
        """Whether anything reads what depends on a destination."""
        # What a head reads as key or value at one position it writes at others, where its readers may be whole.
        elsewhere = self.options["positions"] is not None and self.graph.destinations[row].kind in "kv"
        return elsewhere or row == len(kept) - 1 or bool(kept[:, self.graph.of_node[row]].any())

    def _row(
        self, row: int, tau: float, current: float, kept: np.ndarray, scores: np.ndarray, counts: np.ndarray
    ) -> float:
        """Test the edges into one destination; the metric of what is left."""
        candidates = self._ordered(row, np.flatnonzero(kept[row]))
        if not len(candidates):
            return current
        most = min(part.begin(kept, row) for part in self.parts)
        before = sum(part.flops for part in self.parts)
        done, size = 0, min(4, most)
        while done < len(candidates):
            some = candidates[done : done + size]
            means = self._means([part.values(some) for part in self.parts])
            counts[1] += len(some)
            cut = 0
            for source, mean in zip(some, means, strict=True):
                done += 1
                scores[row, source] = change = mean - current
                damage = self.sign * change
                if not (abs(damage) if self.options["absolute"] else damage) < tau:
                    break
                kept[row, source], current = False, mean
                cut += 1
            if cut:
                for part in self.parts:
                    part.accept(cut - 1)
            size = min(most, 2 * size) if cut == len(some) else cut + 1
        for part in self.parts:
            part.end()
        counts[2] += sum(part.flops for part in self.parts) - before
        return current

    def _ordered(self, row: int, sources: np.ndarray) -> np.ndarray:
        if self.options["order"] == "shuffle":
            return np.random.default_rng([self.options["seed"], row]).permutation(sources)
        return sources[::-1].copy() if self.options["order"] == "reverse" else sources

    def _means(self, values: list[Tensor]) -> list[float]:
        """Over the prompts of all batches, of `[cell batch]` each."""
        whole = torch.cat(values, 1).double()
        finite(self.made, numbers(whole.T))
        return whole.mean(1).tolist()

    def _identity(self, tau: float) -> dict[str, Any]:
        made = self.made
        return provenance(
            made.model, made.task, method="acdc", tau=tau, metric=self.read.name, ablation=made.source.name,
            **self.options, n_start=int(self.first.sum()), grouped=self.graph == Graph.of(made.model),
            **digest_of(made, self.first),
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
