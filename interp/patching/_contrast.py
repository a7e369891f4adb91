"""Which run is changed, which gives the values, and what is an effect a fraction of?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.batching import batches, sweep
from interp.core.readout import Readout
from interp.core.rerun import ExactPath, rerun
from interp.models.model import Model
from interp.models.program import NoProgramError, Program, program
from interp.patching._inputs import numbers, provenance, require_decoder, require_gap, require_pairs, where
from interp.patching._nodes import Node
from interp.patching._runs import prompts_at_once, readout_of
from interp.tasks.task import Task

#: One position for each prompt, or several such by their names.
Position = str | int | Sequence[str] | Sequence[int] | Tensor

UNIT = "fraction of the clean-corrupt gap"


class Contrast(NamedTuple):
    """The two runs of a task.

    `steps` is the model's program, or None for plain hooks. `reads` is the metric, a Readout for each batch of
    `batch_size` prompts. `clean` and `corrupt` are the metrics `[batch]` of the unchanged runs.
    """

    model: Model
    task: Task
    steps: Program | None
    direction: str
    reads: Sequence[Readout]
    clean: Tensor
    corrupt: Tensor
    batch_size: int

    @property
    def unchanged(self) -> Tensor:
        """The metric of the run that is changed, `[batch]`."""
        return self.clean if self.direction == "noising" else self.corrupt

    @property
    def where(self) -> Tensor:
        """Position at which the metric is read, `[batch]`."""
        return torch.cat([read.where for read in self.reads]).to(self.task.clean.device)

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None, Readout]:
        """What belongs to one batch of prompts.

        Args:
            rows: a slice of `batch_size` prompts.

        Returns:
            Token ids of the run that is changed and of the one that gives the values, their mask, and the metric.
        """
        assert self.task.corrupt is not None
        pair = self.task.clean[rows], self.task.corrupt[rows]
        base, other = pair if self.direction == "noising" else pair[::-1]
        mask = None if self.task.mask is None else self.task.mask[rows]
        return base, other, mask, self.reads[rows.start // self.batch_size]

    def fractions(self, metric: Tensor) -> Tensor:
        """Effects of changed runs, positive where the change takes the metric towards the other run's.

        Args:
            metric: `[... batch]`.

        Returns:
            `[... batch]`, in units of the mean gap.
        """
        unchanged = self.unchanged.to(metric)
        moved = metric - unchanged if self.direction == "denoising" else unchanged - metric
        return moved / (self.clean - self.corrupt).mean().to(metric)

    def swept(self, compute: Callable[[slice], Mapping[str, Tensor]], label: str, **identity: Any) -> dict[str, Tensor]:
        """All prompts, in batches, resumable.

        Args:
            compute: from a slice of `batch_size` prompts to tensors `[group batch]`.
            label: of the progress bar, and the method's name.
            **identity: what else decides the outcome.

        Returns:
            The tensors of all prompts, `[group batch]`, in float64 on the CPU.
        """

        def part(rows: slice) -> dict[str, np.ndarray]:
            with torch.no_grad():
                return {name: numbers(metric.T) for name, metric in compute(rows).items()}

        # The unchanged metrics say which metric it is, also where that is the caller's own.
        known = {"method": label, **self.meta(), "clean": self.clean.tolist(), "corrupt": self.corrupt.tolist()}
        size = self.batch_size
        parts = sweep(len(self.task), part, batch_size=size, identity=known | identity, description=label)
        return {name: torch.from_numpy(metric.T) for name, metric in parts.items()}

    def meta(self, **options: Any) -> dict[str, Any]:
        """What a Result's `meta` says.

        Args:
            **options: plain values.

        Returns:
            A dictionary of plain values.
        """
        return provenance(
            self.model, self.task, direction=self.direction, metric=self.reads[0].name, metric_unit=self.reads[0].unit,
            exact_path="hooks" if self.steps is None else "rerun", **options,
        )  # fmt: skip


def contrast(
    model: Model,
    task: Task,
    metric: str | Readout,
    direction: str,
    *,
    n_runs: int,
    min_oriented: float,
    batch_size: int | None,
    exact_path: ExactPath | None,
) -> Contrast:
    """The two runs of a task, refused when they do not differ the right way.

    Args:
        model: a decoder.
        task: with clean and corrupted prompts.
        metric: see `interp.core.readout.readout`.
        direction: "noising" changes the clean run, "denoising" the corrupted one.
        n_runs: changed runs a prompt, for the batch size.
        min_oriented: share of the prompts whose clean metric must be above the corrupted one.
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        The Contrast. Cost: two forward passes.

    Raises:
        ValueError: no corrupted prompts, a metric that does not fit the task, a gap that is too small or reversed, an
            unknown direction.
        NoProgramError: exact_path="rerun" for a model without a program.
    """
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction={direction!r} is not known; use 'noising' or 'denoising'.")
    require_decoder(model)
    corrupted = require_pairs(task)
    steps = _steps(model, exact_path)
    size = batch_size or prompts_at_once(model, task.clean.shape[1], n_runs)
    rows = list(batches(len(task), size))
    reads = [readout_of(model, task, metric, some) for some in rows]

    def unchanged(tokens: Tensor) -> Tensor:
        masks = [None if task.mask is None else task.mask[some] for some in rows]
        way: ExactPath = "hooks" if steps is None else "rerun"
        return torch.cat(
            [
                rerun(model, tokens[some], [[]], read, mask=mask, exact_path=way)[0]
                for some, read, mask in zip(rows, reads, masks, strict=True)
            ]
        )

    clean, corrupt = unchanged(task.clean), unchanged(corrupted)
    require_gap(task, reads[0], clean, corrupt, min_oriented)
    return Contrast(model, task, steps, direction, reads, clean, corrupt, size)


def _steps(model: Model, exact_path: ExactPath | None) -> Program | None:
    if exact_path == "hooks":
        return None
    try:
        steps = program(model)
        if not steps.heads_add:
            raise NoProgramError(f"{model.name} normalises attention's output, so a head writes no part of its own.")
        return steps
    except NoProgramError as reason:
        if exact_path == "rerun":
            raise
        warnings.warn(f"{reason} Each changed run is whole forward passes, with hooks: exact, slower.", stacklevel=4)
        return None


def spots(task: Task, position: Position) -> dict[str, Tensor]:
    """The positions asked for, by the name that the table gives them.

    Args:
        task: with named positions.
        position: a name, an index, one index a prompt, or several names.

    Returns:
        {name: `[batch]`}.

    Raises:
        ValueError: an unknown name, a position outside the prompt or on its padding, or none.
    """
    several = isinstance(position, Sequence) and not isinstance(position, str)
    if several and not len(position):  # type: ignore[arg-type]
        raise ValueError("there is no position: name one, for example position='end'.")
    by_name = several and all(isinstance(name, str) for name in position)  # type: ignore[union-attr]
    found = {}
    for name in position if by_name else [position]:  # type: ignore[union-attr]
        at = where(task, name)  # type: ignore[arg-type]
        assert at is not None
        label = str(name) if isinstance(name, (str, int)) else "as given"
        if task.mask is not None and len(out := (task.mask.gather(1, at[:, None]) == 0).nonzero()):
            row = int(out[0, 0])
            raise ValueError(
                f"position {label!r} of prompt {row} is token {int(at[row])}, which is padding: the prompt starts at "
                f"{int(task.mask[row].long().argmax())}. Name a position of the task, or count from the end (-1)."
            )
        found[label] = at
    return found


def table(groups: Sequence[Sequence[Node]], n_prompts: int, **columns: Tensor | str) -> pd.DataFrame:
    """A row for each group and prompt.

    Args:
        groups: the nodes of each row; a group of several is called "together".
        n_prompts: how many prompts.
        **columns: further columns: `[group batch]`, or a constant.

    Returns:
        The DataFrame, with prompt, component, layer and head first.
    """
    single = [group[0] if len(group) == 1 else Node("together") for group in groups]
    rows: dict[str, Any] = {"prompt": np.tile(np.arange(n_prompts), len(groups))}
    rows["component"] = np.repeat([node.component for node in single], n_prompts)
    for name in ("layer", "head"):
        numbered = [getattr(node, name) for node in single]
        # Whole numbers, also where the embedding has no layer and an MLP no head.
        kind = "Int64" if None in numbered else "int64"
        rows[name] = pd.Series(numbered, dtype=kind).repeat(n_prompts).reset_index(drop=True)
    for name, given in columns.items():
        rows[name] = numbers(given).reshape(-1) if isinstance(given, Tensor) else given
    return pd.DataFrame(rows)
