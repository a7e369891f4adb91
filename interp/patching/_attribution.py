"""How are attributions added up? The scores of a batch of prompts, as the gradients arrive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from interp.core.readout import Readout, some
from interp.models.model import Model
from interp.models.program import NoProgramError, Program
from interp.patching._gradients import Prompts, Visit, forward, frozen
from interp.patching._inputs import numbers
from interp.patching._qk_fix import of_key, of_keys, of_query
from interp.patching._runs import readout_of
from interp.patching._sources import Source
from interp.tasks.task import Task

#: Sites that have an attribution, and the axis of theirs that is neither position nor summed over.
AXES = {
    "resid_pre": "", "q": "head", "k": "head", "v": "head", "z": "head", "attn_out": "", "resid_mid": "",
    "post": "neuron", "mlp_out": "", "resid_post": "",
}  # fmt: skip
_START = ("resid_pre", 0)


@dataclass(frozen=True)
class Plan:
    """What is computed.

    Attributes:
        sites: whose activations.
        by: axes that are kept apart, of "layer", "head", "pos", "neuron".
        distances: of the path's points from the base run, the nearest first; the source is at 1.
        path: "embedding" or "activation".
        qk_fix: whether queries and keys go through the softmax again.
    """

    sites: tuple[str, ...]
    by: tuple[str, ...]
    distances: tuple[float, ...]
    path: str
    qk_fix: bool

    @property
    def fixed(self) -> tuple[str, ...]:
        """The sites that go through the softmax again."""
        return tuple(site for site in self.sites if self.qk_fix and site in ("q", "k"))

    def kept(self, n_layers: int) -> set[tuple[str, int]]:
        """What must be known of the base run and of the source: (site, layer)."""
        sites = {
            *self.sites,
            *(("q", "k") if self.fixed else ()),
            *(("resid_pre",) if self.path == "activation" else ()),
        }
        return {(site, layer) for site in sites for layer in range(n_layers)} | {_START}

    def listened(self, n_layers: int) -> set[tuple[str, int]]:
        """Where gradients are taken: (site, layer)."""
        sites = {"pattern" if site in self.fixed else site for site in self.sites}
        return {(site, layer) for site in sites for layer in range(n_layers)}

    def axes(self, site: str) -> tuple[str, ...]:
        """The axes of a site's scores after prompt and layer."""
        return tuple(axis for axis in ("pos", AXES[site]) if axis in self.by)


@dataclass(frozen=True, eq=False)
class Parts:
    """A task, some prompts of which are computed at a time.

    Attributes:
        model, task, metric: as for `attribute`.
        steps: the model's program, or the reason why hooks are used.
        plan: what is computed.
        noising: whether the clean run is the base run.
        origin: of the values.
    """

    model: Model
    steps: Program | NoProgramError
    plan: Plan
    task: Task
    noising: bool
    origin: Source
    metric: str | Readout

    def compute(self, rows: slice) -> dict[str, np.ndarray]:
        """The estimates of some prompts.

        Args:
            rows: which.

        Returns:
            By site `[batch layer *axes]`; "clean" and, if the task has it, "corrupt" `[batch]`, the metric.
        """
        read = readout_of(self.model, self.task, self.metric, rows)
        whole: dict[str, np.ndarray] = {}
        with frozen(self.model):
            for index, first in self._alike(rows):
                part = self._scores(rows, index, first, replace(some(read, index), where=read.where[index] - first))
                for name, scores in part.items():
                    if name in self.plan.sites and "pos" in self.plan.by:
                        scores = np.pad(scores, [(0, 0), (0, 0), (first, 0), *[(0, 0)] * (scores.ndim - 3)])
                    shape = (len(read.where), *scores.shape[1:])
                    whole.setdefault(name, np.zeros(shape))[index.cpu().numpy()] = scores
        return whole

    def _alike(self, rows: slice) -> list[tuple[Tensor, int]]:
        """(which of the rows, tokens of padding to cut off)."""
        n = len(self.task.clean[rows])
        if self.task.mask is None or isinstance(self.steps, Program):
            return [(torch.arange(n), 0)]
        # A padded query sees nothing, and the bridge's softmax of nothing has NaN gradients: no padding, then.
        padding = self.task.mask[rows].long().argmax(1).cpu()
        return [((padding == first).nonzero().flatten(), int(first)) for first in padding.unique()]

    def _scores(self, rows: slice, index: Tensor, first: int, read: Readout) -> dict[str, np.ndarray]:
        task = self.task

        def prompts(tokens: Tensor) -> Prompts:
            mask = None if task.mask is None else task.mask[rows][index, first:]
            return Prompts(tokens[rows][index, first:], None if mask is None or bool(mask.all()) else mask, read)

        clean, corrupt = prompts(task.clean), None if task.corrupt is None else prompts(task.corrupt)
        origin: Prompts | Mapping[tuple[str, int], Tensor]
        if self.origin.name == "corrupt":
            assert corrupt is not None
            base, origin = (clean, corrupt) if self.noising else (corrupt, clean)
        else:
            base, origin = clean, self.origin.means
            if self.origin.tokens is not None:
                origin = prompts(self.origin.tokens)
            elif self.origin.name == "position_mean":
                origin = {at: mean[first:] for at, mean in self.origin.means.items()}
        found = Batch(self.model, self.steps, self.plan, base, origin).scores()
        found["clean" if self.noising else "corrupt"] = found.pop("base")
        other = found.pop("source", None)
        if self.origin.name == "corrupt":
            assert other is not None
            found["corrupt" if self.noising else "clean"] = other
        elif corrupt is not None:
            with torch.no_grad():
                found["corrupt"] = numbers(forward(self.model, self.steps, corrupt, lambda site, layer, a: a, set()))
        return found


class Batch:
    """Some prompts: the activations of the base run and of the source, and scores that grow as gradients arrive."""

    def __init__(
        self,
        model: Model,
        steps: Program | NoProgramError,
        plan: Plan,
        base: Prompts,
        origin: Prompts | Mapping[tuple[str, int], Tensor],
    ) -> None:
        """Run the source.

        Args:
            model: a decoder, its weights frozen.
            steps: its program, or the reason why hooks are used.
            plan: what is computed.
            base: the prompts that would be patched.
            origin: the prompts that the values would come from; or values `[*feature]` or `[pos *feature]`, zero where
                none is given.
        """
        self.model, self.steps, self.plan, self.prompts = model, steps, plan, base
        self.kept, self.listened = plan.kept(model.n_layers), plan.listened(model.n_layers)
        self.base: dict[tuple[str, int], Tensor] = {}
        self.source: dict[tuple[str, int], Tensor] = {}
        self.out: dict[str, Tensor] = {}
        with torch.no_grad():
            if isinstance(origin, Prompts):
                self.out["source"] = forward(model, steps, origin, _keep(self.source), self.kept)
            else:
                self.source.update(origin)
            if plan.path == "activation" or plan.distances[0] != 0:
                self.out["base"] = forward(model, steps, base, _keep(self.base), self.kept)

    def scores(self) -> dict[str, np.ndarray]:
        """The estimates by site `[batch layer *axes]`, and the metric of the runs "base" and "source" `[batch]`."""
        if self.plan.path == "activation":
            self._along_activations()
        else:
            self._along_embedding()
        return {name: numbers(tensor) for name, tensor in self.out.items()}

    def _along_embedding(self) -> None:
        for distance in self.plan.distances:
            leaves: list[Tensor] = []
            metric = forward(
                self.model, self.steps, self.prompts, self._listen(distance, leaves), self.kept | self.listened
            )
            if metric.ndim != 1:
                raise ValueError(
                    f"metric {self.prompts.read.name!r} has several numbers a prompt, and a gradient is of one: take a "
                    "Readout with one, or a name such as 'logit_diff'."
                )
            torch.autograd.grad(metric.sum(), leaves)  # scores are added up as the gradients pass
            self.out.setdefault("base", metric.detach())

    def _listen(self, distance: float, leaves: list[Tensor]) -> Visit:
        first = not self.base

        def visit(site: str, layer: int, activation: Tensor) -> Tensor:
            if (site, layer) == _START:
                if distance:
                    activation = self._between(_START, distance)
                activation = activation.detach().requires_grad_()
                leaves.append(activation)
            if first and (site, layer) in self.kept:
                self.base[site, layer] = activation.detach()
            if (site, layer) in self.listened:
                activation.register_hook(lambda gradient: self._receive(site, layer, gradient))
            return activation

        return visit

    def _along_activations(self) -> None:
        for at in sorted(self.listened):
            for distance in self.plan.distances:
                leaf = self._between(at, distance).requires_grad_()
                start = (at[1], self.base["resid_pre", at[1]])
                visit = _put(leaf)
                metric = forward(self.model, self.steps, self.prompts, visit, {at}, joined=start)
                self._receive(*at, torch.autograd.grad(metric.sum(), leaf)[0])

    def _between(self, at: tuple[str, int], distance: float) -> Tensor:
        return self.base[at] + distance * self._delta(at)

    def _delta(self, at: tuple[str, int]) -> Tensor:
        return self.source[at].to(self.base[at]) - self.base[at] if at in self.source else -self.base[at]

    def _receive(self, site: str, layer: int, gradient: Tensor) -> None:
        if site == "pattern":
            self._through_softmax(layer, gradient)
            return
        product = self._delta((site, layer)).float() * gradient.float()
        self._add(site, layer, product if AXES[site] == "neuron" else product.sum(-1))

    def _through_softmax(self, layer: int, gradient: Tensor) -> None:
        assert isinstance(self.steps, Program)
        frame = self.steps.frame(self.prompts.tokens, self.prompts.mask)
        q, k = self.base["q", layer], self.base["k", layer]
        alone = "pos" in self.plan.by
        for site in self.plan.fixed:
            new = self.base[site, layer] + self._delta((site, layer))
            moved = of_query if site == "q" else of_key if alone else of_keys
            self._add(site, layer, moved(self.steps, layer, frame, q, k, new, gradient.float()))

    def _add(self, site: str, layer: int, scores: Tensor) -> None:
        """Add `[batch pos *axis]` to the scores, summed over what `by` leaves out."""
        left_out = [
            axis for axis, name in ((1, "pos"), (2, AXES[site])) if axis < scores.ndim and name not in self.plan.by
        ]
        scores = scores.sum(left_out) if left_out else scores
        if site not in self.out:
            self.out[site] = scores.new_zeros(len(scores), self.model.n_layers, *scores.shape[1:])
        self.out[site][:, layer] += scores / len(self.plan.distances)


def _keep(store: dict[tuple[str, int], Tensor]) -> Visit:
    def visit(site: str, layer: int, activation: Tensor) -> Tensor:
        store[site, layer] = activation.detach()
        return activation

    return visit


def _put(leaf: Tensor) -> Visit:
    return lambda site, layer, activation: leaf
