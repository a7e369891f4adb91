"""How are the edges of a whole task scored? In batches, added up or prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from interp.circuits._ablated import Positions, counted_at, plain, require_apart
from interp.circuits._edge_gradients import Maps, Plan, Prompts, edge_scores
from interp.circuits.graph import Graph
from interp.core.batching import batches, sweep
from interp.core.readout import Readout, readout
from interp.core.rerun import _CPU_TOKENS, _free_bytes
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._gradients import frozen
from interp.patching._inputs import numbers, provenance, require_decoder
from interp.patching._runs import readout_of
from interp.patching._sources import Source, prepare, require_source
from interp.tasks.task import Task

_ABLATIONS = ("corrupt", "zero", "mean", "position_mean")
#: Bytes of what is kept of a batch's runs on a CPU: more makes nothing faster.
_CPU_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked for.

    Attributes:
        model, task: of the question.
        name: of the method.
        plan: what is computed.
        chosen: options of the method itself, JSON types.
        reference, grouped, positions, metric, batch_size: as for `interp.circuits.eap.eap`.
    """

    model: Model
    task: Task
    name: str
    plan: Plan
    chosen: Mapping[str, Any]
    reference: Task | None
    grouped: bool
    positions: Positions
    metric: str | Readout
    batch_size: int | None

    def __post_init__(self) -> None:
        require_decoder(self.model)
        task, plan = self.task, self.plan
        if plan.ablation not in _ABLATIONS:
            raise ValueError(f"ablation={plan.ablation!r} is not known here; use one of {', '.join(_ABLATIONS)}.")
        require_source(plan.ablation, (), task, self.reference)
        if self._paired:
            require_apart(task, "corrupt")

    @property
    def _paired(self) -> bool:
        return self.plan.ablation == "corrupt" or 1.0 in self.plan.distances and self.plan.along == "embedding"

    @cached_property
    def steps(self) -> Program:
        """The model's program."""
        return program(self.model)

    @cached_property
    def graph(self) -> Graph:
        """The model's graph."""
        return Graph.of(self.model, grouped=self.grouped)

    @cached_property
    def unit(self) -> str:
        """Of the scores."""
        return (
            self.metric if isinstance(self.metric, Readout) else readout(self.model, self.task[:1], self.metric)
        ).unit

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Model, task and options."""
        return provenance(
            self.model, self.task, method=self.name, **self.chosen, ablation=self.plan.ablation, grouped=self.grouped,
            reference=None if self.reference is None else self.reference.fingerprint,
            positions=plain(self.positions),
            metric=self.metric.name if isinstance(self.metric, Readout) else self.metric,
        )  # fmt: skip

    def run(self, *, each: bool) -> dict[str, np.ndarray]:
        """All scores.

        Args:
            each: whether to keep the prompts apart.

        Returns:
            "scores" `[batch dst src]` in float32, or their sum `[1 dst src]` in float64; "clean" `[batch]` and, where
            it was run, "corrupt".
        """
        task = self.task
        counted = counted_at(task, self.positions)
        origin = self._means()
        maps = Maps.of(self.steps)

        def compute(rows: slice) -> dict[str, np.ndarray]:
            prompts = Prompts(
                task.clean[rows],
                task.corrupt[rows] if self._paired and task.corrupt is not None else None,
                None if task.mask is None or bool(task.mask[rows].all()) else task.mask[rows],
                None if counted is None else counted[rows],
                readout_of(self.model, task, self.metric, rows),
            )
            with frozen(self.model):
                found, clean, corrupt = edge_scores(self.steps, maps, self.graph, self.plan, prompts, origin)
            scores = numbers(found) * self.graph.possible
            finite = np.isfinite(scores).all((1, 2))
            if not finite.all():
                row = rows.start + int(np.flatnonzero(~finite)[0])
                raise ValueError(
                    f"task {task.name!r}, prompt {row} ({task.prompts[row]!r}): scores are not finite, so activations, "
                    "gradients or the metric overflow there. Load the model in float32, or leave the prompt out."
                )
            out = {
                "scores": scores.astype(np.float32) if each else scores.sum(0, keepdims=True),
                "clean": numbers(clean),
            }
            return out if corrupt is None else {**out, "corrupt": numbers(corrupt)}

        size = self.batch_size or self._size()
        if isinstance(self.metric, Readout):  # its function has no fingerprint, so a batch could not be known again
            parts = [compute(rows) for rows in batches(len(task), size)]
            found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        else:
            identity = {**self.meta, "each": each}
            found = sweep(len(task), compute, batch_size=size, identity=identity, description=self.name)
        return found if each else {**found, "scores": found["scores"].sum(0, keepdims=True)}

    def _means(self) -> Any:
        """From (site, layer) to what a source writes when it is out."""
        sites = [(site, layer) for site in ("z", "mlp_out") for layer in range(self.model.n_layers)]
        source = Source("zero", None, {})
        if self.plan.ablation in ("mean", "position_mean"):
            name, wanted = self.plan.ablation, [*sites, ("resid_pre", 0)]
            source = prepare(self.model, self.task, name, wanted, reference=self.reference)
        zero = torch.zeros((), device=self.model.device)
        return lambda site, layer: source.means.get((site, layer), zero)

    def _size(self) -> int:
        """Prompts at once, by the memory that their runs take."""
        model, n_pos = self.model, self.task.clean.shape[1]
        heads = model.n_heads * model.d_head
        run = 2 * model.d_model + 2 * model.d_mlp + heads + 2 * model.n_key_value_heads * model.d_head
        kept = len(self.plan.distances) if self.plan.along == "embedding" else 1 + len(self.plan.distances)
        wide = (2 + len(self.graph.destinations) // model.n_layers) * model.d_model * 4
        token = model.n_layers * (kept * run * model.dtype.itemsize + 8 * (heads + model.d_model)) + wide
        fits = _free_bytes(model.device) // 4
        if model.device.type == "cpu":
            fits = min(fits, _CPU_BYTES)
        tokens = fits // token
        return max(1, (min(tokens, _CPU_TOKENS) if model.device.type == "cpu" else tokens) // n_pos)
