"""By which paths does it act? What a sender does through chosen receivers only, all other heads held.

Path patching as in *Interpretability in the Wild* (arXiv 2211.00593) and *Circuit Component Reuse* (arXiv 2310.08744):
stage by stage from the logits upwards, the senders of one stage become the receivers of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from interp.core.edits import Activations
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath
from interp.core.result import Result
from interp.models.model import Model
from interp.patching import _paths, _paths_hooks
from interp.patching._contrast import UNIT, Contrast, Position, contrast, spots, table
from interp.patching._inputs import Direction
from interp.patching._nodes import LOGITS, Node, Receiver, is_parallel, nodes, reaches
from interp.patching._nodes import receivers as _receivers
from interp.tasks.task import Task

#: What a sender's output is replaced by.
Source = Literal["corrupt", "zero"]


@method(name="Path patching", paper="arXiv:2310.08744", notebook="circuit_reuse")
def patch(
    model: Model,
    task: Task,
    *,
    receivers: str | Sequence[Receiver] = "logits",
    senders: str | Sequence[Node] = "heads",
    position: Position = "end",
    receiver_position: str | int | Sequence[int] | Tensor | None = None,
    freeze_mlps: bool = False,
    together: bool = False,
    direction: Direction = "noising",
    metric: str | Readout = "logit_diff",
    source: Source = "corrupt",
    min_oriented: float = 0.75,
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """How much each component matters through chosen receivers alone: no other head may respond.

    For each sender s two runs. (a) On the clean prompt the output of s at `position` is replaced by what it is on the
    corrupted prompt; every other head's z is held at its clean value, at all positions; MLPs respond (or are held,
    `freeze_mlps`). What the receivers read in this run (the query, key or value of their head, the MLP's input, or the
    final residual stream) is noted. (b) On the clean prompt, nothing held, the receivers that s reaches are overwritten
    with what was noted, all together, at `position`. With m the metric,

        value = (m_clean - m_patched) / mean over prompts of (m_clean - m_corrupt)

    so that a path that helps is positive and one that carries the whole contrast is 1. With direction="denoising", the
    corrupted prompt is run with clean values, and value = (m_patched - m_corrupt) / the same.

    As no head responds in (a), a sender at one position changes that position only, so the receivers are read there.
    Composition through attention at an earlier position is found by asking for keys or values there: for example
    receivers=[Receiver("v", l, h)] with position="subject2".

    A head or MLP of layer l reaches the queries, keys and values of layers above l and their MLPs; a head also the MLP
    of its own layer (not where attention and MLP are parallel). The embedding reaches all, and all reach the logits.

    Args:
        model: a decoder.
        task: with clean and corrupted prompts.
        receivers: "logits" (the final residual stream where the metric is read) or a list of `Receiver`. Keys and
            values are those of a key-value group.
        senders: "heads", "mlps", "all" (with the embedding), or a list of `Node`.
        position: of senders and receivers: a name of the task, an index, one index a prompt; or several names, which
            are run one after the other.
        receiver_position: where the receivers are read: None, or the same again.
        freeze_mlps: hold the MLPs in (a), so that a path goes from sender to receiver directly.
        together: change all the senders in one run: one row, component "together".
        direction: "noising" or "denoising".
        metric: "logit_diff", "log_prob", "prob", or a Readout.
        source: what the sender's output becomes: "corrupt" (that of the paired prompt) or "zero" (noising only).
        min_oriented: share of the prompts whose clean metric must be above the corrupted one.
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: "rerun" computes (a) without attention and (b) in the causal cone only; "hooks" does two whole
            forward passes a sender, word by word; None takes the first where the model has a program.

    Returns:
        Result, unit "fraction of the clean-corrupt gap"; columns prompt, component ("z", "mlp_out", "embed"), layer,
        head, token (the position's name), value, value_metric (m_patched); a row for each position, sender and prompt.
        Senders of a sweep that reach no receiver are left out.

    Raises:
        ValueError: no corrupted prompts, a gap that is too small or reversed, an unknown component, a sender asked for
            by name that reaches no receiver, a position outside the prompt, on padding or after the metric's,
            receivers at another position than the senders.

    Cost: about four forward passes; (a) one position of the MLPs above the sender for each sender and prompt; (b)
        nothing for the logits, else the layers from the receivers on, for the tokens from `position` on, for each
        sender and prompt. Plain hooks: two forward passes a sender.

    Differs from the paper: the authors' code of arXiv 2310.08744 prints
        -100 (m_patched - m_clean) / (m_corrupt - m_clean), which is -100 times this value with means over batches; it
        holds the other heads at `position` only, which comes to the same; and it stops at the layer of the lowest
        receiver, that layer included (where a sender comes out 0): here every sender is run that reaches any receiver,
        and receivers that it does not reach are left alone.

    Example:
        >>> from interp.models import planted
        >>> case = planted.ioi_like()
        >>> pairs = (case.corrupt, case.answers, case.wrong, case.positions)
        >>> task = Task("ioi", case.prompts, case.clean, "planted", *pairs)
        >>> found = patch(case.model, task, receivers=[Receiver("q", 2, 1), Receiver("q", 2, 2)])
        >>> found.summary(by=["layer", "head"]).sort_values("mean").iloc[-1][["layer", "head"]].tolist()
        [1.0, 0.0]
    """
    if source not in ("corrupt", "zero"):
        raise ValueError(f"source={source!r} is not known; use 'corrupt' or 'zero'.")
    if source == "zero" and direction == "denoising":
        raise ValueError("source='zero' restores nothing: use source='corrupt', or direction='noising'.")
    targets = _receivers(model, receivers)
    groups = _groups(model, senders, targets, together)
    places = spots(task, position)
    runs = contrast(
        model, task, metric, direction, n_runs=len(groups), min_oriented=min_oriented, batch_size=batch_size,
        exact_path=exact_path,
    )  # fmt: skip
    _require_reach(runs, targets, places, receiver_position)
    options: dict[str, Any] = {
        "receivers": [str(target) for target in targets],
        "senders": senders if isinstance(senders, str) else [str(node) for node in senders],
        "freeze_mlps": freeze_mlps,
        "together": together,
        "source": source,
    }
    if runs.steps is None:
        _paths_hooks.require_live(model, targets)
    parts = []
    for label, at in places.items():

        def batch(rows: slice, at: Tensor = at) -> dict[str, Tensor]:
            base, other, mask, read = runs.part(rows)
            here = at[rows]
            if runs.steps is None:
                values = _source(_paths_hooks.seen_at(model, other, mask, here), source)
                metrics = _paths_hooks.patched(
                    model, base, mask, here, values, groups, targets, read, freeze_mlps=freeze_mlps
                )
            else:
                values = _source(_paths.seen_at(runs.steps, other, mask, here), source)
                metrics = _paths.patched(
                    runs.steps, base, mask, here, values, groups, targets, read, freeze_mlps=freeze_mlps,
                    unchanged=runs.unchanged[rows],
                )  # fmt: skip
            return {"metric": metrics}

        patched = runs.swept(batch, "path patching", **options, where=at.tolist())["metric"]
        parts.append(table(groups, len(task), token=label, value=runs.fractions(patched), value_metric=patched))
    meta = runs.meta(**options, position=list(places))
    return Result("path.patch", pd.concat(parts, ignore_index=True), UNIT, meta=meta)


def _groups(
    model: Model, senders: str | Sequence[Node], targets: Sequence[Receiver], together: bool
) -> list[list[Node]]:
    """The senders of each run: those that reach a receiver, refused where one asked for by name does not."""
    wanted, parallel = nodes(model, senders), is_parallel(model)
    kept = [node for node in wanted if any(reaches(node, target, parallel=parallel) for target in targets)]
    lost = [node for node in wanted if node not in kept]
    if lost and (not kept or not isinstance(senders, str)):
        raise ValueError(
            f"receivers before senders: {lost[0]} reaches none of the receivers ({', '.join(map(str, targets))}). What "
            "is written in a layer is read by queries, keys and values of later layers"
            + ("" if parallel else " (a head's also by its own layer's MLP)")
            + f": give senders of layers below {max(target.layer or 0 for target in targets)}, or later receivers."
        )
    return [kept] if together else [[node] for node in kept]


def _require_reach(
    runs: Contrast, targets: Sequence[Receiver], places: dict[str, Tensor], receiver_position: Any
) -> None:
    """Refuse positions from which nothing can arrive."""
    for label, at in places.items():
        if receiver_position is not None and not torch.equal(spots(runs.task, receiver_position).popitem()[1], at):
            raise ValueError(
                f"senders at {label!r} do not reach receivers at {receiver_position!r}: with all other heads held, a "
                "change stays at its position. Ask for the keys or values that are read there, for example "
                f"receivers=[Receiver('v', layer, head)] with position={label!r}, and leave receiver_position out."
            )
        if LOGITS in targets and not torch.equal(at, runs.where):
            row = int((at != runs.where).nonzero()[0])
            raise ValueError(
                f"the logits are read at token {int(runs.where[row])} of prompt {row}, and senders at {label!r} are at "
                f"token {int(at[row])}: with all other heads held, a change stays at its position. Use position='end', "
                "or take as receivers the keys or values of the heads that attend there."
            )
        if bool((at > runs.where).any()):
            raise ValueError(
                f"position {label!r} comes after the one at which {runs.reads[0].name} is read, so nothing arrives: "
                "choose an earlier one."
            )


def _source(seen: Activations, source: Source) -> Activations:
    return seen if source == "corrupt" else {key: torch.zeros_like(value) for key, value in seen.items()}


__all__ = ["Node", "Receiver", "Source", "patch"]
