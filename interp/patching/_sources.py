"""What is put in place of an activation? The other prompt's, nothing, a mean, or that of another prompt of the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.core.batching import batches
from interp.core.edits import Cell, Edit
from interp.core.rerun import ExactPath, trace
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import NoProgramError, hook_name, program
from interp.patching._inputs import require_pairs
from interp.patching._runs import prompts_at_once, rows_of
from interp.tasks.task import Task

#: Where values come from. "corrupt": the paired prompt at the same place; "zero"; "mean": the mean over prompts and
#: positions; "position_mean": the mean over prompts at the same position; "resample": another prompt of the task.
SOURCES = ("corrupt", "zero", "mean", "position_mean", "resample")

_MEANS = ("mean", "position_mean")


@dataclass(frozen=True, eq=False)
class Source:
    """Where the values of edits come from, for all prompts of a task.

    Attributes:
        name: one of `SOURCES`.
        tokens: prompts that values are taken from `[batch pos]`, for "corrupt" and "resample".
        means: {(site, layer): mean `[*feature]`, or `[pos *feature]`}, for means.
    """

    name: str
    tokens: Tensor | None
    means: Mapping[tuple[str, int], Tensor]

    def fill(self, cell: Cell, rows: slice, n_prompts: int) -> list[Edit]:
        """A cell for some of the prompts, its edits with the values of this source.

        Args:
            cell: edits for all prompts; those with a value keep it.
            rows: which prompts.
            n_prompts: how many they are.

        Returns:
            The edits.
        """
        return [self._filled(rows_of(edit, rows), n_prompts) for edit in cell]

    def _filled(self, edit: Edit, n_prompts: int) -> Edit:
        if edit.value is not None or self.tokens is not None:
            return edit
        if self.name == "zero":
            return replace(edit, value=0.0)
        mean = self.means[edit.site, edit.layer]
        axis = 1 if self.name == "position_mean" else 0
        for chosen in (edit.head, edit.neuron):
            if chosen is not None:
                mean = mean.select(axis, chosen)
        return replace(edit, value=mean.expand(n_prompts, *mean.shape))


def require_source(name: str, edits: Iterable[Edit], task: Task, reference: Task | None) -> None:
    """Refuse a source that is not known, or has no values for these edits.

    Args:
        name: of the source.
        edits: whose values it is to give.
        task: the prompts.
        reference: prompts of the means, or None.

    Raises:
        ValueError: says what the source needs.
    """
    if name not in SOURCES:
        raise ValueError(f"source {name!r} is not known; use one of {', '.join(SOURCES)}.")
    if reference is not None and name not in _MEANS:
        raise ValueError(f"reference= gives the prompts of a mean, but source={name!r}: use 'mean' or 'position_mean'.")
    if name == "corrupt":
        require_pairs(task)
        return
    over = reference or task
    if name == "position_mean":
        if over.mask is not None and not bool(over.mask.all()):
            raise ValueError(
                f"task {over.name!r} has prompts of different lengths, so a position means another thing in each: "
                "use source='mean', or prompts of one length."
            )
        if over.clean.shape[1] != task.clean.shape[1]:
            raise ValueError(
                f"the reference has prompts of {over.clean.shape[1]} tokens and the task of {task.clean.shape[1]}: "
                "source='position_mean' needs equal lengths."
            )
    for edit in edits:
        if edit.value is not None or name == "resample":
            continue
        if edit.site == "attn_scores":
            raise ValueError(
                f"attention scores have no {name!r} that means anything: edit 'pattern', or give the Edit a value."
            )
        if edit.site == "pattern" and name == "mean":
            raise ValueError(
                "the mean of attention patterns over queries would attend to later positions: use "
                "source='position_mean', where prompts are of one length, 'resample' or 'corrupt'."
            )
        if edit.k_pos is not None and name == "position_mean":
            raise ValueError("an edit of a single key position has no 'position_mean': give the Edit a value.")


def prepare(
    model: Model,
    task: Task,
    name: str,
    sites: Iterable[tuple[str, int]],
    *,
    reference: Task | None = None,
    seed: int = 0,
    exact_path: ExactPath | None = None,
) -> Source:
    """The values of a source.

    Args:
        model: a decoder.
        task: the prompts.
        name: of the source.
        sites: (site, layer) whose values are needed.
        reference: prompts of the means; None for the clean prompts of the task.
        seed: of the order in which prompts are taken by "resample".
        exact_path: see `interp.core.rerun`.

    Returns:
        A Source.

    Raises:
        ValueError: "resample" for a prompt without another of its length.

    Cost: one forward pass over the reference for means, in batches, with memory for the sums only; else none.
    """
    if name == "corrupt":
        return Source(name, require_pairs(task), {})
    if name == "resample":
        return Source(name, task.clean[torch.as_tensor(others(task, seed), device=task.clean.device)], {})
    if name == "zero":
        return Source(name, None, {})
    return Source(name, None, _means(model, reference or task, sorted(set(sites)), name == "position_mean", exact_path))


def others(task: Task, seed: int) -> np.ndarray:
    """Another prompt of the same length for each prompt, each used once.

    Args:
        task: the prompts.
        seed: of the order.

    Returns:
        `[batch]`, a permutation that leaves none in its place.

    Raises:
        ValueError: a prompt is the only one of its length.
    """
    rng = np.random.default_rng(seed)
    lengths = np.full(len(task), task.clean.shape[1]) if task.mask is None else task.mask.sum(1).cpu().numpy()
    found = np.empty(len(task), dtype=np.int64)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        if len(members) < 2:
            raise ValueError(
                f"task {task.name!r}: prompt {members[0]} is the only one of {length} tokens, so there is no other to "
                "resample from: give more prompts, leave it out, or use source='mean'."
            )
        order = rng.permutation(members)
        found[order] = np.roll(order, 1)
    return found


def _means(
    model: Model,
    task: Task,
    sites: Sequence[tuple[str, int]],
    by_position: bool,
    exact_path: ExactPath | None,
) -> dict[tuple[str, int], Tensor]:
    """Means over prompts, and over positions that are not padding unless `by_position`."""
    if not sites:
        return {}
    sums: dict[tuple[str, int], Tensor] = {}
    n_pos = task.clean.shape[1]
    mask = torch.ones_like(task.clean) if task.mask is None else task.mask
    for rows in batches(len(task), prompts_at_once(model, n_pos, 1)):
        seen = _activations(model, task.clean[rows], mask[rows], sites, exact_path)
        for at, activation in seen.items():
            if at[0] == "pattern":
                activation = activation.transpose(1, 2)  # positions of the query second, as everywhere else
            real = mask[rows].bool().view(*mask[rows].shape, *[1] * (activation.ndim - 2))
            # Half precision would lose the later prompts in the sum of the earlier ones.
            kept = activation.float().masked_fill(~real, 0.0)
            total = kept.sum(0) if by_position else kept.sum((0, 1))
            sums[at] = sums[at] + total if at in sums else total
    n = len(task) if by_position else int(mask.sum())
    return {at: total / n for at, total in sums.items()}


def _activations(
    model: Model, tokens: Tensor, mask: Tensor, sites: Sequence[tuple[str, int]], exact_path: ExactPath | None
) -> dict[tuple[str, int], Any]:
    if exact_path != "hooks":
        try:
            steps = program(model)
        except NoProgramError:
            if exact_path == "rerun":
                raise
        else:
            with torch.no_grad():
                return dict(trace(steps, tokens, mask, set(sites)))
    names = {at: hook_name(*at) for at in sites}
    cache = run(model, tokens, capture=list(names.values()), mask=mask).cache
    return {at: cache[name] for at, name in names.items()}
