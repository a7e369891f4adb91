"""Along which edges did a representation come about? Information flow routes, from one forward pass.

Each stream is a sum: after attention, of the stream before and what every head writes of every earlier token; after the
MLP, of the stream before and the MLP's output. An edge is as important as its part is near to the sum. The route of a
token is what is left when the graph is followed from its last stream downwards, along the edges above a threshold.

Routes follow values. Attention patterns are held as they are, so how a head came to look where it looks (composition
through queries and keys) is never found; nor is what pushes against the sum, whose importance is 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits._flow import Edges, cut, flows, proximity, walk
from interp.circuits._flow_inputs import (
    PAPER,
    UNIT,
    as_task,
    labels_of,
    progress,
    prompts_at_once,
    require,
    require_tokens,
)  # fmt: skip
from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._inputs import numbers, provenance, where
from interp.tasks.task import Task


def importance(
    parts: Float[Tensor, "... part d_model"], whole: Float[Tensor, "... d_model"], *, norm: int = 1, floor: float = 0.0
) -> Float[Tensor, "... part"]:
    """How large a share each part has in a sum, by its nearness.

    With y the sum and z_j its parts, proximity_j = max(||y|| - ||y - z_j||, floor), and importance_j is the proximity
    over the sum of all. A part that is longer than y, or points away from it, can have none: nothing is negative.

    Args:
        parts: z. They need not sum to `whole` (a bias is in the sum and no part).
        whole: y.
        norm: 1 (the paper's) or 2.
        floor: the smallest proximity: 0 (the paper's), or 1e-5 (the published code's).

    Returns:
        Shares that sum to 1; all 0 where every proximity is.

    Raises:
        ValueError: another norm, or a negative floor.

    Example:
        >>> parts = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [2.0, 1.0]])
        >>> [round(share, 5) for share in importance(parts, torch.tensor([2.0, 2.0]), norm=2).tolist()]
        [0.43613, 0.0, 0.56387]
    """
    require(norm, floor, 0.0)
    near = proximity(parts, whole, norm).clamp(min=floor)
    total = near.sum(-1, keepdim=True)
    return near / torch.where(total > 0, total, 1)


@method(name="Information flow routes", paper=PAPER, notebook="flow_routes")
def routes(
    model: Model,
    task: Task | Tensor,
    *,
    pos: str | int | Sequence[int] | Tensor = -1,
    tau: float = 0.04,
    renormalise: bool = False,
    norm: int = 1,
    floor: float = 0.0,
) -> Result:
    """The subgraph of important edges that leads to one token's last stream, for each prompt.

    Two sums a layer, whose parts have the shares that `importance` says: the stream after attention, of the stream
    before and alpha_ij v_j W_O for every head and token j <= i; the stream after the MLP, of the stream before and the
    MLP's output. alpha and v are those of the run, after the norm; biases are in the sums but no part. From the stream
    after the last layer at `pos`, edges above `tau` are followed down; an MLP's edge leads to what it reads.
    Importances are local: not multiplied along the way.

    Args:
        model: a decoder. For a model with LayerNorm, give weights="raw": the processed ones centre the streams.
        task: prompts, or token ids `[batch pos]`.
        pos: where the route starts: a name of `task.positions`, an index, or one a prompt.
        tau: edges must be larger. The paper's: 0.04 for GPT-2 (recalled, not verified).
        renormalise: whether the edges above tau at each node are divided by their sum, as the published demo does.
        norm: 1 (the paper's) or 2.
        floor: the smallest proximity: 0 (the paper's), or 1e-5 (the published code's).

    Returns:
        Result, unit "share of the stream": one row an edge of the route: prompt, layer, head (for attention), `q_pos`
        (the position of the stream it leads to), `k_pos` (where it comes from), component ("attn", "resid_attn",
        "mlp", "resid_mlp"), value.

    Raises:
        ValueError: tau, norm or floor out of their range; a start that is padding, or outside the prompt.
        NoProgramError: a model whose layers are not of the common form, or whose heads do not add up (Gemma 2).

    Cost: one forward pass, and head x d_model x pos^2 / 2 differences a layer and prompt (as much time again at 128
        tokens of the default model). Memory: head x pos^2 for the layer at work, what is above tau for the others.

    Differs from the paper: edges of a pair of tokens are kept head by head, where the published code sums them over
        heads before it compares with tau, and merges a token's attention to itself with the residual edge. It counts
        the value bias twice on models that have one; here it counts once.

    Example:
        >>> from interp.models import planted
        >>> case = planted.induction_like()
        >>> found = routes(case.model, case.clean[:1], tau=0.1).filter(component="attn")
        >>> found.table[["layer", "head", "q_pos", "k_pos"]].values.tolist()
        [[0, 2, 2, 1], [0, 2, 6, 5], [1, 0, 6, 2]]
    """
    require(norm, floor, tau)
    steps, task = program(model), as_task(model, task)
    starts = where(task, pos)
    assert starts is not None
    require_tokens(task, starts)
    tables = []
    for rows in progress(task, "information flow routes"):
        for row, layers in _edges(steps, task, rows, tau, renormalise, norm, floor):
            reached = walk(layers, starts[row : row + 1], parallel=steps.parallel)
            tables += [_rows(row, layer, edges, reached[layer]) for layer, edges in enumerate(layers)]
    table = pd.concat(tables, ignore_index=True).sort_values(["prompt", "layer"], kind="stable", ignore_index=True)
    meta = provenance(
        model, task, pos=starts.tolist(), tau=tau, renormalise=renormalise, norm=norm, floor=floor,
        n_layers=model.n_layers, n_heads=model.n_heads,
    )  # fmt: skip
    return Result("flow_routes.routes", table, UNIT, meta=meta)


@method(name="Components in information flow routes", paper=PAPER, notebook="flow_routes")
def components(
    model: Model,
    task: Task | Tensor,
    *,
    pos: str | int | Sequence[int] | Tensor | None = None,
    groups: np.ndarray | None = None,
    tau: float = 0.04,
    renormalise: bool = False,
    norm: int = 1,
    floor: float = 0.0,
) -> Result:
    """How important each head and MLP is, and in what share of the routes it takes part.

    There is a route (see `routes`) for every start: every token of every prompt, or one a prompt. A component's
    importance in a route is the sum of its edges there, and it takes part (is active) if it has any.

    Args:
        model: a decoder.
        task: prompts, or token ids `[batch pos]`.
        pos: where routes start: a name of `task.positions`, an index, or one a prompt; None for all tokens.
        groups: texts `[batch pos]`: the group of each start (a part of speech, a domain); "" leaves it out.
        tau: see `routes`.
        renormalise: see `routes`.
        norm: see `routes`.
        floor: see `routes`.

    Returns:
        Result, unit "share of the stream, summed over the route": one row a prompt, group and component: prompt,
        target (the group, if there are groups), component ("attn", "mlp"), layer, head (for attention); the mean over
        the prompt's routes of that group, `value` of the importance and `value_frequency` of taking part;
        `value_routes`, how many they are. A prompt without a token of a group has no rows for it.

    Raises:
        ValueError: as `routes`; groups of another shape, or none that is not "".
        NoProgramError: as `routes`.

    Cost: as `routes`, and pos^3 comparisons a layer and prompt.

    Example:
        >>> from interp.models import planted
        >>> case = planted.induction_like()
        >>> found = components(case.model, case.clean, pos=-1).filter(component="attn")
        >>> found.grid("layer", "head", value="value_frequency").values.tolist()
        [[0.75, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    require(norm, floor, tau)
    steps, task = program(model), as_task(model, task)
    labels, names = labels_of(task, groups)
    if pos is not None:
        starts = where(task, pos)
        assert starts is not None
        require_tokens(task, starts)
        labels = np.where(np.arange(labels.shape[1]) == starts.cpu().numpy()[:, None], labels, -1)
    options = {"tau": tau, "renormalise": renormalise, "norm": norm, "floor": floor}

    def compute(rows: slice) -> dict[str, np.ndarray]:
        found = [
            _components(steps, layers, labels[row], len(names))
            for row, layers in _edges(steps, task, rows, tau, renormalise, norm, floor)
        ]
        return {key: np.stack([each[key] for each in found]) for key in found[0]}

    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    meta = provenance(model, task, **options, groups=names if groups is not None else None, starts=digest)
    done = sweep(
        len(task), compute, batch_size=prompts_at_once(task), identity={"method": "flow_routes.components", **meta},
        description="information flow routes",
    )  # fmt: skip
    table = _component_table(done, names if groups is not None else None)
    return Result("flow_routes.components", table, f"{UNIT}, summed over the route", meta=meta)


@method(name="Contrast of information flow routes", paper=PAPER, notebook="flow_routes")
def contrast(first: Result, second: Result) -> Result:
    """What matters for one kind of prompt and not for another: mean importances, one minus the other.

    Args:
        first: of `components`, on the prompts of interest (T).
        second: the same on contrasting ones (T').

    Returns:
        Result, one row a component: component, layer, head, and T minus T' of the means over prompts: `value` of the
        importance, `value_frequency` of taking part. Its unit and options are those of the two.

    Raises:
        ValueError: results of another method, or of different models or options.

    Cost: that of the two results; no forward pass.

    Example:
        >>> from interp.models import planted
        >>> case = planted.backup_head()
        >>> two = (components(case.model, tokens, pos=-1) for tokens in (case.clean, case.corrupt))
        >>> contrast(*two).top(1)[["layer", "head"]].values.tolist()
        [[0, 1]]
    """
    for result in (first, second):
        if result.method != "flow_routes.components":
            raise ValueError(f"contrast compares two results of flow_routes.components; one is {result!r}.")
    ignored = ("task", "task_fingerprint", "starts", "groups")
    one, other = ({k: v for k, v in result.meta.items() if k not in ignored} for result in (first, second))
    if one != other:
        unequal = next(key for key in one if one[key] != other.get(key))
        raise ValueError(
            f"the two results differ in {unequal}: {one[unequal]} and {other.get(unequal)}. Make both alike."
        )
    columns = ["value", "value_frequency"]
    means = [r.table.groupby(["component", "layer", "head"], dropna=False)[columns].mean() for r in (first, second)]
    meta = {**one, "task": [r.meta["task"] for r in (first, second)],
            "task_fingerprint": [r.meta["task_fingerprint"] for r in (first, second)]}  # fmt: skip
    return Result("flow_routes.contrast", (means[0] - means[1]).reset_index(), first.unit, meta=meta)


def _edges(
    steps: Program, task: Task, rows: slice, tau: float, renormalise: bool, norm: int, floor: float
) -> list[tuple[int, list[Edges]]]:
    """(prompt, edges by layer) of some prompts."""
    ids, mask = task.clean[rows], None if task.mask is None else task.mask[rows]
    found: list[list[Edges]] = [[] for _ in ids]
    with torch.no_grad():
        for _, row, flow in flows(steps, ids, mask, norm=norm, floor=floor):
            found[row].append(cut(flow, tau, renormalise=renormalise))
    return list(enumerate(found, rows.start))


def _rows(prompt: int, layer: int, edges: Edges, reached: tuple[Tensor, Tensor]) -> pd.DataFrame:
    """The edges of one layer that lead to a node that was reached, from one start."""
    middle, after = (nodes[0] for nodes in reached)
    kept = middle[edges.query]
    frames = [pd.DataFrame({
        "head": edges.head[kept].cpu(), "q_pos": edges.query[kept].cpu(), "k_pos": edges.key[kept].cpu(),
        "component": "attn", "value": numbers(edges.value[kept]),
    })]  # fmt: skip
    for component, nodes in (("resid_attn", middle), ("mlp", after), ("resid_mlp", after)):
        share = getattr(edges, component)
        at = (nodes & (share > 0)).nonzero()[:, 0].cpu()
        frames.append(pd.DataFrame({"q_pos": at, "k_pos": at, "component": component, "value": numbers(share)[at]}))
    table = pd.concat([frame for frame in frames], ignore_index=True).assign(prompt=prompt, layer=layer)
    table["head"] = table["head"].astype("Int64")
    return table[["prompt", "layer", "head", "q_pos", "k_pos", "component", "value"]]


def _components(steps: Program, layers: list[Edges], labels: np.ndarray, n_groups: int) -> dict[str, np.ndarray]:
    """Means over the starts of each group, `[group layer component]`; the last component of a layer is its MLP."""
    device = layers[0].mlp.device
    group = torch.as_tensor(labels, device=device)
    starts = (group >= 0).nonzero()[:, 0]
    member = (group[starts] == torch.arange(n_groups, device=device)[:, None]).float()
    counts = member.sum(1)
    mean = member / counts.clamp(min=1)[:, None]
    values, active = [], []
    for edges, (middle, after) in zip(layers, walk(layers, starts, parallel=steps.parallel), strict=True):
        by_query = torch.zeros(steps.n_heads, len(group), device=device)
        by_query.index_put_((edges.head, edges.query), edges.value, accumulate=True)
        sums = torch.cat([middle.float() @ by_query.T, after.float() @ edges.mlp[:, None]], 1)  # [start component]
        values.append(mean @ sums)
        active.append(mean @ (sums > 0).float())
    return {
        "value": numbers(torch.stack(values, 1)), "value_frequency": numbers(torch.stack(active, 1)),
        "value_routes": numbers(counts),
    }  # fmt: skip


def _component_table(done: Mapping[str, np.ndarray], names: Sequence[str] | None) -> pd.DataFrame:
    prompt, group, layer, part = (axis.ravel() for axis in np.indices(done["value"].shape))
    n_heads = done["value"].shape[-1] - 1
    frame = pd.DataFrame({
        "prompt": prompt, "component": np.where(part < n_heads, "attn", "mlp").astype(object), "layer": layer,
        "head": pd.array(np.where(part < n_heads, part, 0), dtype="Int64"),
        "value": done["value"].ravel(), "value_frequency": done["value_frequency"].ravel(),
        "value_routes": done["value_routes"][prompt, group].astype(int),
    })  # fmt: skip
    frame.loc[part == n_heads, "head"] = pd.NA
    if names is not None:
        frame.insert(1, "target", np.array(names, dtype=object)[group])
    return frame[frame["value_routes"] > 0].reset_index(drop=True)
