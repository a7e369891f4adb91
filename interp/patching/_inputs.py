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
#: A name of `task.positions`, an index, or (first, last) for all positions from one to the other.
Position = str | int | tuple[str | int, str | int]


def require_pairs(task: Task) -> Tensor:
    """The corrupted prompts of a task.

    Args:
        task: with clean and corrupted prompts.

    Returns:
        `[batch pos]`.

    Raises:
        ValueError: the task has none, or one that differs from its clean prompt where that has padding.
    """
    if task.corrupt is None:
        raise ValueError(
            f"task {task.name!r} has no corrupted prompts: make one with Task.from_pairs(model, ...), or take the "
            "values from elsewhere, for example source='zero'."
        )
    if task.mask is not None:
        # One mask serves both, so a corrupted prompt that is longer would lose its first tokens without a word.
        apart = ((task.corrupt != task.clean) & ~task.mask.bool()).any(1)
        if bool(apart.any()):
            raise ValueError(
                f"task {task.name!r}, prompt {int(apart.nonzero()[0])}: the corrupt prompt differs where the clean one "
                "has padding, so they are not aligned: make the task with Task.from_pairs, which compares lengths."
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
        min_oriented: share of the prompts whose clean metric must be above the corrupted one (for "kl": below it); 0
            accepts any.

    Raises:
        ValueError: too few prompts are oriented, or the mean gap is not positive.
    """
    # A divergence from the clean prediction is the smaller, the better.
    apart = other - clean if read.name == "kl" else clean - other
    if apart.ndim != 1:
        raise ValueError(
            f"metric {read.name!r} has {apart.shape[-1]} numbers a prompt; effects are fractions of a gap of one: take "
            "a metric with one, for example 'logit_diff'."
        )
    oriented, mean = float((apart > 0).float().mean()), float(apart.mean())
    # Below this the gap is the rounding of the metric itself.
    rounding = 8 * torch.finfo(torch.float32).eps * float((clean.abs() + other.abs()).mean())
    if oriented < min_oriented or not mean > rounding:
        keep = [int(i) for i in (apart > 0).nonzero().flatten()[:6]]
        side = "below" if read.name == "kl" else "above"
        raise ValueError(
            f"task {task.name!r}: {read.name} of the clean run is {side} that of the corrupted run on {oriented:.0%} "
            f"of {len(task)} prompts (mean gap {mean:.3g} {read.unit}). Effects are fractions of that gap: "
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


def places(task: Task, positions: str | int | Sequence[str | int] | None) -> list[tuple[str | None, int | Tensor]]:
    """Positions one by one: those named, or all there are.

    Args:
        task: with named positions.
        positions: names and indices; None for every position of the prompts, padding too.

    Returns:
        (name or None, one index for all prompts or `[batch]`) of each.

    Raises:
        ValueError: for no positions, a name that the task has not, or a position outside the prompt.
    """
    if positions is None:
        return [(None, p) for p in range(task.clean.shape[1])]
    given = [positions] if isinstance(positions, (str, int)) else list(positions)
    if not given:
        raise ValueError(
            f"no positions were given: name some of {', '.join(sorted(task.positions))}, or leave them out."
        )
    found: list[tuple[str | None, int | Tensor]] = []
    for position in given:
        at = where(task, position if isinstance(position, str) else int(position))
        assert at is not None
        found.append((position, at) if isinstance(position, str) else (None, int(at[0])))
    return found


def span(task: Task, position: Position) -> list[Tensor]:
    """Positions that belong together: one, or all from a first to a last.

    Args:
        task: with named positions.
        position: a name or an index, or (first, last), both included.

    Returns:
        `[batch]` each; -1 in prompts whose span is shorter than the longest.

    Raises:
        ValueError: as `where`; a span that ends before it starts.
    """
    if not isinstance(position, tuple):
        at = where(task, position)
        assert at is not None
        return [at]
    if len(position) != 2:
        raise ValueError(f"{position} is no span: give (first, last), or a list of positions.")
    first, last = where(task, position[0]), where(task, position[1])
    assert first is not None and last is not None
    if bool((last < first).any()):
        row = int((last < first).nonzero()[0])
        raise ValueError(
            f"task {task.name!r}, prompt {row}: the span {position} starts at {int(first[row])} and ends at "
            f"{int(last[row])}: give the first position first."
        )
    return [torch.where(first + i <= last, first + i, -1) for i in range(int((last - first).max()) + 1)]


def require_decoder(model: Model) -> None:
    """Refuse a model that does not predict the next token.

    Args:
        model: any.

    Raises:
        ValueError: for an encoder or a vision model.
    """
    if model.kind != "decoder":
        raise ValueError(
            f"{model.name} is a {model.kind} model, and what is measured is the prediction of the next token: load a "
            'decoder, for example interp.load("smollm2-135m").'
        )


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


__all__ = [
    "Direction", "Position", "gap", "numbers", "places", "provenance", "readout", "require_decoder", "require_gap",
    "require_pairs", "span", "where",
]  # fmt: skip
