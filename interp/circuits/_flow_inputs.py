"""What do information flow routes run on? Prompts as a Task, groups and queries by token, options in their range."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.models.model import Model
from interp.tasks.task import Task

PAPER = "arXiv:2403.00824"
UNIT = "share of the stream"
#: Positions that are in memory together.
_TOKENS = 1024


def labels_of(task: Task, groups: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
    """The group of each token by number, -1 for none, and the groups' names in order of the alphabet."""
    real = np.ones(tuple(task.clean.shape), dtype=bool) if task.mask is None else task.mask.bool().cpu().numpy()
    if groups is None:
        return np.where(real, 0, -1), ["all"]
    if groups.shape != real.shape:
        raise ValueError(f"groups are {groups.shape}; they are texts [batch pos], one a token: {real.shape}.")
    names = sorted({str(name) for name in groups[real]} - {""})
    if not names:
        raise ValueError('groups has no text but "": name the group of some tokens.')
    numbered = {name: number for number, name in enumerate(names)}
    found = np.array([[numbered.get(str(name), -1) for name in row] for row in groups])
    return np.where(real, found, -1), names


def counted_of(task: Task, queries: Tensor | None) -> Tensor:
    """Which tokens count as queries, bool `[batch pos]`: those asked for, or all, without padding."""
    real = torch.ones_like(task.clean).bool() if task.mask is None else task.mask.bool()
    if queries is None:
        return real
    if queries.shape != real.shape:
        raise ValueError(f"queries are {tuple(queries.shape)}; they are [batch pos], {tuple(real.shape)}.")
    counted = real & queries.to(real.device)
    if not bool(counted.any()):
        raise ValueError("no query counts: `queries` is False at every token.")
    return counted


def as_task(model: Model, task: Task | Tensor) -> Task:
    """A task as it is, or token ids `[batch pos]` as one; refused where the model's context is shorter."""
    if isinstance(task, Tensor):
        if task.ndim != 2 or not len(task):
            raise ValueError(f"tokens are {tuple(task.shape)}; give token ids [batch pos], at least one prompt.")
        names = tuple(f"prompt {i}" for i in range(len(task)))
        task = Task("tokens", names, task.to(model.device), "token ids given by the caller")
    if task.clean.shape[1] > model.n_ctx:
        raise ValueError(f"prompts of {task.clean.shape[1]} tokens: {model.name} has a context of {model.n_ctx}.")
    return task


def prompts_at_once(task: Task) -> int:
    """How many prompts are run together."""
    return max(1, _TOKENS // task.clean.shape[1])


def progress(task: Task, description: str) -> tqdm:
    """The batches of a task's prompts, with a progress bar where there are several."""
    rows = list(batches(len(task), prompts_at_once(task)))
    return tqdm(rows, desc=description, leave=False, disable=len(rows) < 2)


def require(norm: int, floor: float, tau: float) -> None:
    """Refuse a norm, a floor or a threshold that the formula has no meaning for."""
    if norm not in (1, 2):
        raise ValueError(f"norm={norm}: distances are in L1 (norm=1, the paper's) or L2 (norm=2).")
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(
            f"floor={floor}: it is 0 (the paper's) or a small positive number (1e-5 in the published code)."
        )
    if not 0 <= tau < 1:
        raise ValueError(f"tau={tau}: importances are from 0 to 1, so tau is at least 0 and below 1, for example 0.04.")


def require_tokens(task: Task, starts: Tensor) -> None:
    """Refuse routes that start, `[batch]`, at padding."""
    if task.mask is None:
        return
    padding = task.mask.gather(1, starts[:, None])[:, 0] == 0
    if bool(padding.any()):
        row = int(padding.nonzero()[0])
        raise ValueError(
            f"prompt {row}: position {int(starts[row])} is padding: start at a token, for example pos=-1 or pos='end'."
        )
