"""On which kinds of edges is a head's importance? Beside its attention: self, previous, first token, same word."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from interp.circuits._flow import flows
from interp.circuits._flow_inputs import PAPER, UNIT, as_task, counted_of, prompts_at_once, require
from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import program
from interp.patching._inputs import numbers, provenance
from interp.tasks.task import Task

_COLUMNS = ("value", "value_attention", "value_head")


@method(name="Importance by kind of edge", paper=PAPER, notebook="flow_routes")
def kinds(
    model: Model,
    task: Task | Tensor,
    pairs: Mapping[str, Bool[Tensor, "batch q_pos k_pos"]],
    *,
    queries: Bool[Tensor, "batch pos"] | None = None,
    norm: int = 1,
    floor: float = 0.0,
) -> Result:
    """How much of each head's importance, and of its attention, is on some kinds of edges.

    For each query, the importances and the attention of a head are summed over the keys that make a pair of that kind,
    and averaged over the queries of the prompt. Importances are those of `flow_routes.routes`, without a threshold.

    Args:
        model: a decoder.
        task: prompts, or token ids `[batch pos]`.
        pairs: by name, which (query, key) are of that kind; for example `pair_kinds(model, task)`.
        queries: which queries count; None for all tokens. Padding never does.
        norm: see `flow_routes.routes`.
        floor: see `flow_routes.routes`.

    Returns:
        Result, unit "share of the stream": one row a prompt, head and kind: prompt, target (the kind), layer, head;
        `value` (importance), `value_attention`, `value_head` (importance over all keys). Prompts in which no query
        counts have no rows.

    Raises:
        ValueError: as `flow_routes.routes`; pairs or queries of another shape; no query that counts.
        NoProgramError: as `flow_routes.routes`.

    Cost: as `flow_routes.routes`.

    Example:
        >>> from interp.models import planted
        >>> case = planted.induction_like()
        >>> found = kinds(case.model, case.clean, pair_kinds(case.model, case.clean)).filter(target="previous")
        >>> found.grid("layer", "head", value="value_attention").round(2).values.tolist()
        [[0.23, 0.23, 0.86], [0.19, 0.23, 0.23]]
    """
    require(norm, floor, 0.0)
    steps, task = program(model), as_task(model, task)
    counted = counted_of(task, queries)
    shape = (*task.clean.shape, task.clean.shape[1])
    for name, given in pairs.items():
        if tuple(given.shape) != shape:
            raise ValueError(f"pairs of kind {name!r} are {tuple(given.shape)}; they are [batch q_pos k_pos], {shape}.")
    if not pairs:
        raise ValueError("no kinds of pairs were given: give some, for example pair_kinds(model, task).")
    masks = torch.stack([given.to(task.clean.device) for given in pairs.values()], 1)

    def compute(rows: slice) -> dict[str, np.ndarray]:
        ids, mask = task.clean[rows], None if task.mask is None else task.mask[rows]
        sums = torch.zeros(3, len(ids), model.n_layers, model.n_heads, len(pairs), device=ids.device)
        with torch.no_grad():
            for layer, row, flow in flows(steps, ids, mask, norm=norm, floor=floor):
                weight = (masks[rows][row] & counted[rows][row][:, None]).float()
                whole = (flow.attn * counted[rows][row][:, None]).sum((1, 2))[:, None]
                by_kind = [torch.einsum("hqk,nqk->hn", shares, weight) for shares in (flow.attn, flow.pattern)]
                sums[:, row, layer] = torch.stack([*by_kind, whole.expand(-1, len(pairs))])
        n = counted[rows].sum(1)
        means = sums / n.clamp(min=1)[:, None, None, None]
        return {"n": n.cpu().numpy(), **dict(zip(_COLUMNS, map(numbers, means), strict=True))}

    digest = hashlib.sha256(masks.cpu().numpy().tobytes() + counted.cpu().numpy().tobytes()).hexdigest()
    meta = provenance(model, task, norm=norm, floor=floor, kinds=list(pairs), pairs=digest)
    done = sweep(
        len(task), compute, batch_size=prompts_at_once(task), identity={"method": "flow_kinds.kinds", **meta},
        description="kinds of edges",
    )  # fmt: skip
    prompt, layer, head, kind = (axis.ravel() for axis in np.indices(done["value"].shape))
    names = np.array(list(pairs), dtype=object)
    frame = pd.DataFrame({"prompt": prompt, "target": names[kind], "layer": layer, "head": head})
    for column in _COLUMNS:
        frame[column] = done[column].ravel()
    table = frame[(done["n"] > 0)[prompt]].reset_index(drop=True)
    return Result("flow_kinds.kinds", table, UNIT, meta=meta)


def pair_kinds(model: Model, task: Task | Tensor) -> dict[str, Bool[Tensor, "batch q_pos k_pos"]]:
    """The kinds of pairs of tokens that the paper's heads are told apart by.

    Args:
        model: for its tokenizer.
        task: prompts, or token ids `[batch pos]`.

    Returns:
        {"self", "previous" (key one before the query), "first" (key the first token, query another), "word" (key an
        earlier piece of the query's word: an unbroken run of letters)}: `[batch q_pos k_pos]` each. Queries that
        continue a word are `["word"].any(-1)`. Without a tokenizer there is no "word".
    """
    task = as_task(model, task)
    n_pos, device = task.clean.shape[1], task.clean.device
    index = torch.arange(n_pos, device=device)
    real = torch.ones_like(task.clean).bool() if task.mask is None else task.mask.bool()
    both = real[:, :, None] & real[:, None, :]
    first = real.long().argmax(1)[:, None, None]
    found = {
        "self": both & (index[:, None] == index),
        "previous": both & (index[:, None] == index + 1),
        "first": both & (index == first) & (index[:, None] > first),
    }
    if model.tokenizer is not None:
        texts = [model.to_str_tokens(row) for row in task.clean]
        goes_on = [
            [i > 0 and now[:1].isalpha() and before[-1:].isalpha() for i, (before, now) in
             enumerate(zip([row[-1], *row], row, strict=False))] for row in texts
        ]  # fmt: skip
        word = (~torch.tensor(goes_on, device=device)).cumsum(1)
        found["word"] = both & (word[:, :, None] == word[:, None, :]) & (index[:, None] > index)
    return found
