"""What do the methods of this room share? The two runs of a task, the gap between them, and named positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from interp.core.readout import Readout, readout
from interp.core.rerun import rerun
from interp.models.model import Model
from interp.tasks.task import Task

#: "denoising" puts clean activations into the corrupted run (what suffices), "noising" the reverse (what is needed).
Direction = Literal["denoising", "noising"]


def require_pairs(task: Task) -> Tensor:
    """The corrupted prompts of a task.

    Args:
        task: with clean and corrupted prompts.

    Returns:
        `[batch pos]`.

    Raises:
        ValueError: the task has none.
    """
    if task.corrupt is None:
        raise ValueError(
            f"task {task.name!r} has no corrupted prompts: make one with Task.from_pairs(model, ...), or take the "
            "values from elsewhere, for example source='zero'."
        )
    return task.corrupt


def gap(model: Model, task: Task, read: Readout, *, min_oriented: float = 0.75) -> tuple[Tensor, Tensor]:
    """The metric of the clean and of the corrupted run, refused when they do not differ the right way.

    Args:
        model: a decoder.
        task: with clean and corrupted prompts.
        read: the metric.
        min_oriented: share of the prompts whose clean metric must be above the corrupted one; 0 accepts any.

    Returns:
        (clean, corrupt), each `[batch]`, in the metric's unit.

    Raises:
        ValueError: too few prompts are oriented, or the mean gap is not positive, of which effects would be fractions.

    Cost: two forward passes.
    """
    corrupt = require_pairs(task)
    clean = rerun(model, task.clean, [[]], read, mask=task.mask)[0]
    other = rerun(model, corrupt, [[]], read, mask=task.mask)[0]
    require_gap(task, read, clean, other, min_oriented)
    return clean, other


def require_gap(task: Task, read: Readout, clean: Tensor, other: Tensor, min_oriented: float) -> None:
    """Refuse a clean and a corrupted run whose metrics do not differ the right way.

    Args:
        task: whose runs they are.
        read: the metric.
        clean: the metric of the clean run, `[batch]`.
        other: that of the corrupted run, `[batch]`.
        min_oriented: share of the prompts whose clean metric must be above the corrupted one; 0 accepts any.

    Raises:
        ValueError: too few prompts are oriented, or the mean gap is not positive.
    """
    apart = clean - other
    oriented = float((apart > 0).float().mean())
    if oriented < min_oriented or not float(apart.mean()) > 0:
        keep = [int(i) for i in (apart > 0).nonzero().flatten()[:6]]
        raise ValueError(
            f"task {task.name!r}: {read.name} of the clean run is above that of the corrupted run on {oriented:.0%} of "
            f"{len(task)} prompts (mean gap {float(apart.mean()):.3g} {read.unit}). Effects are fractions of that gap: "
            "check that the answers belong to the clean prompts and that this model can do the task; keep the prompts "
            f"that it can, for example task[{keep}]; or pass min_oriented=0.0 where the mean gap is positive."
        )


def where(task: Task, position: str | int | Sequence[int] | Tensor | None) -> Tensor | None:
    """A position for each prompt `[batch]`, from a name of the task, a number or numbers; None stays None.

    Args:
        task: with named positions.
        position: a name such as "end", an index (-1 is the last), or one for each prompt.

    Returns:
        `[batch]` on the task's device, or None.

    Raises:
        ValueError: for a name that the task has not, or a position outside the prompt.
    """
    if position is None:
        return None
    n_pos, device = task.clean.shape[1], task.clean.device
    if isinstance(position, str):
        if position not in task.positions:
            raise ValueError(
                f"task {task.name!r} has no position {position!r}; it has {', '.join(sorted(task.positions))}."
            )
        return task.positions[position]
    found = torch.as_tensor(position, device=device).expand(len(task)).clone()
    outside = (found >= n_pos) | (found < -n_pos)
    if bool(outside.any()):
        raise ValueError(
            f"position {int(found[outside][0])} is outside the prompts of task {task.name!r}, which have {n_pos} "
            f"tokens: 0 to {n_pos - 1}, or -{n_pos} to -1."
        )
    return torch.where(found < 0, found + n_pos, found)


def provenance(model: Model, task: Task, **options: Any) -> dict[str, Any]:
    """What a Result's `meta` says: model, task and options.

    Args:
        model: that ran.
        task: the prompts.
        **options: plain values.

    Returns:
        A dictionary of plain values.
    """
    return {**model.provenance, "task": task.name, "task_fingerprint": task.fingerprint, **options}


def numbers(values: Tensor) -> np.ndarray:
    """A tensor as float64 on the CPU.

    Args:
        values: any shape.

    Returns:
        The array.
    """
    return values.detach().double().cpu().numpy()


__all__ = ["Direction", "gap", "numbers", "provenance", "readout", "require_gap", "require_pairs", "where"]
