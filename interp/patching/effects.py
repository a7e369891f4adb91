"""Directly, or through others? The direct, indirect and total effect of each component."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from interp.core.edits import Edit
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath, rerun
from interp.core.result import Result
from interp.models.model import Model
from interp.patching import _paths, _paths_hooks
from interp.patching._contrast import UNIT, Position, contrast, spots, table
from interp.patching._inputs import Direction
from interp.patching._nodes import LOGITS, Node
from interp.patching._nodes import nodes as _nodes
from interp.tasks.task import Task


@method(name="Direct, indirect and total effects", paper="arXiv:2307.09458", notebook="mcq_at_scale")
def effects(
    model: Model,
    task: Task,
    *,
    nodes: str | Sequence[Node] = "heads",
    position: Position = "end",
    direction: Direction = "noising",
    frozen_norm: bool = False,
    metric: str | Readout = "logit_diff",
    min_oriented: float = 0.75,
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """What each component does to the answer by itself, and what later components make of it.

    The output of a node at `position` on the clean prompt is replaced by what it is on the corrupted prompt. Its total
    effect is what that does to the metric m when everything after it is computed again. Its direct effect is what it
    does when all later heads and MLPs are held: o' - o is added to the final residual stream, and the final norm and
    the unembedding are computed again. The indirect effect is the rest.

        total, direct = (m_clean - m_patched) / mean over prompts of (m_clean - m_corrupt);  indirect = total - direct

    With direction="denoising", the corrupted prompt is run with clean values, and the numerator is
    m_patched - m_corrupt. A direct effect passes no attention: of another position than the metric's it is 0.

    With `frozen_norm`, the final norm divides by the scale that it has on the clean prompt (on the corrupted one when
    denoising), in direct effects only. They are then linear in the final stream, and those of all nodes
    (nodes="all") add up to the metric of the corrupted run's final stream read with that scale.

    In the last layer, the total effect of an MLP is its direct effect. That of a head is, in addition, what the MLP of
    its layer makes of it (no more than the direct effect where attention and MLP are parallel).

    Args:
        model: a decoder.
        task: with clean and corrupted prompts.
        nodes: "heads" (each head's z), "mlps", "all" (with the embedding: the stream before layer 0), or a list of
            `Node`.
        position: a name of the task, an index, one index a prompt; or several names, one after the other.
        direction: "noising" or "denoising".
        frozen_norm: hold the scale of the final norm in direct effects.
        metric: "logit_diff", "log_prob", "prob", or a Readout.
        min_oriented: share of the prompts whose clean metric must be above the corrupted one.
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, unit "fraction of the clean-corrupt gap"; columns prompt, component ("z", "mlp_out", "embed"), layer,
        head, token (the position's name), metric ("direct", "total", "indirect"), value; three rows for each position,
        node and prompt.

    Raises:
        ValueError: no corrupted prompts, a gap that is too small or reversed, an unknown node, a position outside the
            prompt or on padding; frozen_norm for a model without a program or with a norm of another kind.

    Cost: about six forward passes, a final norm and the metric's logits for each direct effect, and for each total
        effect the layers from the node on, on the tokens from the position on. Plain hooks: three forward passes a
        node.

    Differs from the paper: it averages over several corrupted prompts whose label statistics match; here each prompt
        has one, and the table's mean is over prompts.

    Example:
        >>> from interp.models import planted
        >>> case = planted.backup_head()
        >>> pairs = (case.corrupt, case.answers, case.wrong, case.positions)
        >>> task = Task("backup", case.prompts, case.clean, "planted", *pairs)
        >>> found = effects(case.model, task, nodes=[Node("z", 0, 1)]).summary(by=["metric"])
        >>> dict(zip(found["metric"], found["mean"].round(3) + 0.0))
        {'direct': 1.0, 'indirect': -1.0, 'total': 0.0}
    """
    wanted = _nodes(model, nodes)
    places = spots(task, position)
    runs = contrast(
        model, task, metric, direction, n_runs=len(wanted), min_oriented=min_oriented, batch_size=batch_size,
        exact_path=exact_path,
    )  # fmt: skip
    if frozen_norm and runs.steps is None:
        raise ValueError(
            f"{model.name} runs with plain hooks, which cannot hold the scale of the final norm: leave frozen_norm out."
        )
    groups = [[node] for node in wanted]
    named = nodes if isinstance(nodes, str) else [str(node) for node in nodes]
    parts = []
    for label, at in places.items():

        def batch(rows: slice, at: Tensor = at) -> dict[str, Tensor]:
            base, other, mask, read = runs.part(rows)
            here = at[rows]
            cells = [[_edit(node, here)] for node in wanted]
            if runs.steps is None:
                total = rerun(model, base, cells, read, source=other, mask=mask, exact_path="hooks")
                values = _paths_hooks.seen_at(model, other, mask, here)
                direct = _paths_hooks.patched(
                    model, base, mask, here, values, groups, [LOGITS], read, freeze_mlps=True
                )  # fmt: skip
                return {"total": total, "direct": direct}
            total = rerun(model, base, cells, read, source=other, mask=mask, exact_path="rerun")
            direct = _paths.patched(
                runs.steps, base, mask, here, _paths.seen_at(runs.steps, other, mask, here), groups, [LOGITS], read,
                freeze_mlps=True, frozen_norm=frozen_norm, unchanged=runs.unchanged[rows],
            )  # fmt: skip
            elsewhere = here != read.where.to(here.device)
            return {"total": total, "direct": torch.where(elsewhere, runs.unchanged[rows], direct)}

        swept = runs.swept(batch, "effects", nodes=named, frozen_norm=frozen_norm, where=at.tolist())
        total, direct = runs.fractions(swept["total"]), runs.fractions(swept["direct"])
        for kind, value in (("direct", direct), ("total", total), ("indirect", total - direct)):
            parts.append(table(groups, len(task), token=label, metric=kind, value=value))
    meta = runs.meta(nodes=named, frozen_norm=frozen_norm, position=list(places))
    return Result("effects.effects", pd.concat(parts, ignore_index=True), UNIT, meta=meta)


def _edit(node: Node, at: Tensor) -> Edit:
    """The node's output, from the other run."""
    if node.layer is None:
        return Edit("resid_pre", 0, pos=at)
    return Edit(node.component, node.layer, head=node.head, pos=at)


__all__ = ["Node", "effects"]
