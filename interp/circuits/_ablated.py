"""What does a model answer with some edges only, over a whole task? In batches of prompts that fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.circuits._edges import EdgeRun, Written, as_weights, cells_at_once, prepare
from interp.circuits.graph import Graph
from interp.core.batching import batches, sweep
from interp.core.readout import Readout
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching import _sources
from interp.patching._inputs import numbers, provenance, require_pairs, where
from interp.patching._runs import readout_of
from interp.tasks.task import Task

#: What edges that are not in carry: the paired prompt's value ("corrupt"), nothing ("zero"), the mean over prompts and
#: positions ("mean") or over prompts at the same position ("position_mean"), or another prompt's ("resample").
ABLATIONS = _sources.SOURCES

#: Names of a task's positions, or indices; None for all positions.
Positions = str | int | Sequence[str | int] | None

# Positions of prompts that fill the matrix multiplications of one batch.
_ENOUGH = 256


@dataclass(frozen=True, eq=False)
class Ablated:
    """A task whose edges can be cut; make one with `ablated`.

    Attributes:
        model, task, graph, metric: as given.
        source: where the values of cut edges come from.
        counted: positions of destinations at which edges are cut, bool `[batch pos]`; None for all.
    """

    model: Model
    task: Task
    graph: Graph
    metric: str | Readout
    source: _sources.Source
    counted: Tensor | None = None

    @property
    def steps(self) -> Program:
        """The model's program."""
        return program(self.model)

    @property
    def batch_size(self) -> int:
        """Prompts that are run together."""
        return max(1, _ENOUGH // self.task.clean.shape[1])

    def run(self, rows: slice) -> EdgeRun:
        """Some of the prompts, ready for forward passes with weighted edges.

        Args:
            rows: which.

        Returns:
            The EdgeRun. Cost: one forward pass.
        """
        tokens = self.task.clean[rows]
        mask = None if self.task.mask is None else self.task.mask[rows]
        taken = self.source.tokens
        off = self._constant(*tokens.shape) if taken is None else taken[rows]
        read = readout_of(self.model, self.task, self.metric, rows)
        counted = None if self.counted is None else self.counted[rows]
        return prepare(self.steps, self.graph, tokens, mask, off, read, counted)

    def _constant(self, n: int, n_pos: int) -> Written:
        """Zeros, or means, as if every prompt had written them."""
        like = self.steps.embed(self.task.clean[:1])
        steps, layers = self.steps, range(self.graph.n_layers)
        shapes = {"z": (steps.n_heads, steps.d_head), "resid_pre": like.shape[2:], "mlp_out": like.shape[2:]}

        def value(site: str, layer: int) -> Tensor:
            mean = self.source.means.get((site, layer), like.new_zeros(shapes[site])).to(like.dtype)
            return mean.expand(n, n_pos, *shapes[site]).contiguous()

        return Written(
            value("resid_pre", 0),
            tuple(value("z", layer) for layer in layers),
            tuple(value("mlp_out", layer) for layer in layers),
        )


def ablated(
    model: Model,
    task: Task,
    graph: Graph,
    *,
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    reference: Task | None = None,
    positions: Positions = None,
    seed: int = 0,
) -> Ablated:
    """A task whose edges can be cut.

    Args:
        model: a decoder.
        task: the prompts.
        graph: of the model.
        metric: a name or a Readout.
        ablation: one of `ABLATIONS`.
        reference: prompts of means; None for the task's clean ones.
        positions: of destinations at which edges are cut, see `counted_at`.
        seed: of "resample".

    Returns:
        The Ablated.

    Raises:
        ValueError: a task or reference that lacks what the ablation needs; positions that the task has not.

    Cost: for means one forward pass over the reference.
    """
    _sources.require_source(ablation, [], task, reference)
    sites = [("resid_pre", 0), *((site, layer) for site in ("z", "mlp_out") for layer in range(graph.n_layers))]
    source = _sources.prepare(model, task, ablation, sites, reference=reference, seed=seed)
    return Ablated(model, task, graph, metric, source, counted_at(task, positions))


def counted_at(task: Task, positions: Positions) -> Tensor | None:
    """Positions as a mask.

    Args:
        task: with named positions.
        positions: names of the task and indices; None for all.

    Returns:
        Bool `[batch pos]`, or None.

    Raises:
        ValueError: no positions, or one that the task has not.
    """
    if positions is None:
        return None
    given = [positions] if isinstance(positions, (str, int)) else list(positions)
    if not given:
        raise ValueError(
            f"no positions were given: name some of {', '.join(sorted(task.positions))}, or leave them out."
        )
    counted = torch.zeros_like(task.clean, dtype=torch.bool)
    for name in given:
        at = where(task, name)
        assert at is not None
        counted.scatter_(1, at[:, None], True)
    return counted


def require_apart(task: Task, ablation: str) -> None:
    """Refuse pairs that are none.

    Args:
        task: the prompts.
        ablation: where the values of cut edges come from.

    Raises:
        ValueError: with ablation="corrupt", no corrupted prompts, one that is padded otherwise, or one that equals its
            clean prompt, of which nothing can be learnt.
    """
    if ablation == "corrupt":
        same = (require_pairs(task) == task.clean).all(1)
        if bool(same.any()):
            row = int(same.nonzero()[0])
            raise ValueError(f"task {task.name!r}, prompt {row}: clean and corrupt are the same tokens: leave it out.")


def plain(positions: Positions) -> str | int | list[str | int] | None:
    """Positions as a Result's `meta` holds them.

    Args:
        positions: as given.

    Returns:
        The same, with a list for any sequence.
    """
    return positions if positions is None or isinstance(positions, (str, int)) else list(positions)


@torch.no_grad()
def metric_of(made: Ablated, kept: np.ndarray, *, identity: Mapping[str, Any]) -> np.ndarray:
    """The metric of every prompt with every set of edges.

    Args:
        made: the task.
        kept: which edges are in, bool `[cell dst src]`.
        identity: what decides the outcome beside model, task, metric and edges, JSON types: "method", "ablation" ...

    Returns:
        `[batch cell]`.

    Raises:
        ValueError: a metric that is not finite; the prompt is named.

    Cost: about 2.3 forward passes a cell and prompt. Can be stopped and resumed, unless the metric is a Readout.
    """

    def compute(rows: slice) -> dict[str, np.ndarray]:
        run = made.run(rows)
        parts = []
        for some in batches(len(kept), cells_at_once(run)):
            metric, _ = run.forward(as_weights(kept[some], made.task.clean))
            parts.append(numbers(metric.T))
        return {"metric": np.concatenate(parts, 1)}

    n = len(made.task)
    if isinstance(made.metric, Readout):
        return finite(made, np.concatenate([compute(rows)["metric"] for rows in batches(n, made.batch_size)]))
    whole = provenance(
        made.model, made.task, **identity, metric=made.metric, edges=_digest(kept), ablation=made.source.name
    )
    taken = [] if made.source.tokens is None else [made.source.tokens.cpu().numpy()]
    if made.counted is not None:
        whole["positions"] = _digest(made.counted.cpu().numpy())
    whole["source"] = _digest(*taken, *(numbers(mean) for _, mean in sorted(made.source.means.items())))
    found = sweep(n, compute, batch_size=made.batch_size, identity=whole, description=str(identity["method"]))
    return finite(made, found["metric"])


def finite(made: Ablated, values: np.ndarray) -> np.ndarray:
    """The values, if they are numbers: one that is none would make every mean none, without saying where.

    Args:
        made: the task.
        values: `[batch cell]`.

    Returns:
        The same.

    Raises:
        ValueError: one is not finite; the prompt is named.
    """
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, cell = wrong[0].tolist()
        raise ValueError(
            f"task {made.task.name!r}, prompt {row} ({made.task.prompts[row]!r}): the metric is not finite with set "
            f"{cell} of the {values.shape[1]} sets of edges that were run, so activations or the metric overflow "
            "there. Load the model in float32, leave the prompt out, or take another ablation."
        )
    return values


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.packbits(array) if array.dtype == bool else np.ascontiguousarray(array))
    return digest.hexdigest()[:16]
