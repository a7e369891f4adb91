"""How are the changed runs of a whole task made? In batches of prompts that fit into memory, each stored when done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.core.batching import batches, sweep
from interp.core.edits import Cell, Edit, sites_of
from interp.core.readout import Readout, readout, some
from interp.core.rerun import ExactPath, _free_bytes, rerun
from interp.models.check import require_live
from interp.models.model import Model
from interp.models.program import NoProgramError, hook_name, program
from interp.patching._inputs import numbers, provenance
from interp.tasks.task import Task

#: The changed runs of some prompts, as edits whose tensors have a row for each of them.
Cells = Callable[[slice], Sequence[Cell]]

#: Positions of changed runs that fill the matrix multiplications of one batch.
_ENOUGH = 4096


def measure(
    model: Model,
    task: Task,
    cells: Cells,
    metric: str | Readout,
    *,
    tokens: Tensor,
    source: Tensor | None = None,
    identity: Mapping[str, Any],
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> np.ndarray:
    """The metric of every changed run of every prompt.

    Args:
        model: a decoder.
        task: whose answers the metric reads.
        cells: the changed runs of a slice of the prompts; as many for each.
        metric: a name or a Readout.
        tokens: the prompts that are changed `[batch pos]`.
        source: the prompts that values come from `[batch pos]`, if any do.
        identity: what decides the outcome beside model, task and metric, JSON types.
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: see `interp.core.rerun`.

    Returns:
        `[batch cell]`.

    Raises:
        ValueError: a metric with several numbers a prompt.
        ModelCheckError: the edits are made with hooks, on an activation that the bridge shows but does not use.

    Cost: one `rerun` a batch. Finished batches are kept on disk until all are done, unless the metric is a Readout,
        whose function has no fingerprint.
    """
    one = cells(slice(0, 1))
    _require_live(model, one, exact_path)
    n = len(task)
    size = batch_size or prompts_at_once(model, tokens.shape[1], len(one))

    def compute(rows: slice) -> dict[str, np.ndarray]:
        found = rerun(
            model,
            tokens[rows],
            cells(rows),
            readout_of(model, task, metric, rows),
            source=None if source is None else source[rows],
            mask=None if task.mask is None else task.mask[rows],
            exact_path=exact_path,
        )
        if found.ndim != 2:
            raise ValueError(
                "the metric has several numbers a prompt: take a Readout with one, or a name such as 'logit_diff'."
            )
        return {"metric": numbers(found.T)}

    if isinstance(metric, Readout):
        return np.concatenate([compute(rows)["metric"] for rows in batches(n, size)])
    whole = provenance(model, task, **identity, metric=metric, exact_path=exact_path)
    return sweep(n, compute, batch_size=size, identity=whole, description=str(identity["method"]))["metric"]


def readout_of(model: Model, task: Task, metric: str | Readout, rows: slice) -> Readout:
    """The metric of some of the prompts, without the work for the others.

    Args:
        model: a decoder.
        task: with answers.
        metric: a name, or a Readout of all prompts.
        rows: which prompts.

    Returns:
        A Readout of those prompts.
    """
    return some(metric, rows) if isinstance(metric, Readout) else readout(model, task[rows], metric)


def prompts_at_once(model: Model, n_pos: int, n_cells: int) -> int:
    """Prompts a batch: as many as the free memory holds, but not more than make it faster.

    Args:
        model: for its sizes, and the device whose memory it is.
        n_pos: tokens a prompt.
        n_cells: changed runs a prompt.

    Returns:
        At least 1.
    """
    per_position = 2 * model.n_key_value_heads * model.d_head + 3 * model.d_model + model.d_mlp + model.n_heads * n_pos
    per_prompt = model.n_layers * n_pos * per_position * 4
    return max(1, min(_free_bytes(model.device) // 4 // per_prompt, max(16, _ENOUGH // (n_cells * n_pos))))


def _require_live(model: Model, cells: Sequence[Cell], exact_path: ExactPath | None) -> None:
    """Refuse hooks on attention that the bridge only shows."""
    if exact_path is None:
        try:
            program(model)
        except NoProgramError:
            exact_path = "hooks"
    if exact_path == "hooks":
        for site in {site for site, _ in sites_of(cells)} & {"attn_scores", "pattern"}:
            require_live(model, hook_name(site, 0))


def rows_of(edit: Edit, rows: slice) -> Edit:
    """An edit of all prompts, for some of them.

    Args:
        edit: whose tensors have a row for each prompt.
        rows: which prompts.

    Returns:
        The Edit.
    """
    cut = {
        field.name: value[rows] for field in fields(edit) if isinstance(value := getattr(edit, field.name), Tensor)
    }  # fmt: skip
    return replace(edit, **cut) if cut else edit  # type: ignore[arg-type]


def described(edit: Edit) -> list[Any]:
    """An edit in plain JSON types, tensors by their fingerprint: a part of a sweep's identity.

    Args:
        edit: any.

    Returns:
        One entry a field.
    """
    plain = []
    for field in fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, Tensor):
            kept = value.detach().cpu().contiguous()
            wide = kept.float() if kept.is_floating_point() else kept
            value = f"{kept.dtype}{tuple(kept.shape)} {hashlib.sha256(wide.numpy().tobytes()).hexdigest()[:16]}"
        elif isinstance(value, float) and not np.isfinite(value):
            value = str(value)
        plain.append(value)
    return plain


def positions_of(places: Sequence[tuple[str | None, int | Tensor]], n_prompts: int) -> np.ndarray:
    """The index of each place in each prompt, `[place batch]`.

    Args:
        places: as `interp.patching._inputs.places` gives them.
        n_prompts: of the task.

    Returns:
        The array.
    """
    return np.stack([torch.as_tensor(at).cpu().expand(n_prompts).numpy() for _, at in places])
