"""How much of each token reaches a position, by attention alone? Rollout and maximum flow, and a check of both.

*Quantifying Attention Flow in Transformers* (arXiv 2005.00928): a layer passes half of what it writes at a position on
from that position, and half by its attention; the layers are chained by multiplication, or as a network of pipes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.stats import rankdata
from torch import Tensor

from interp.core.batching import batches
from interp.core.edits import Edit
from interp.core.readout import Readout, readout
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching import ablation
from interp.patching._gradients import Prompts, forward, frozen, room
from interp.patching._inputs import numbers, provenance, require_decoder, where
from interp.patching._runs import readout_of
from interp.tasks.task import Task

Measure = Literal["raw", "rollout", "flow"]
Weight = Literal["attention", "value", "norm"]

#: Capacities are whole numbers of this part. Sums of a row stay far below the limit of 32 bits.
_SCALE = 10**8

Layers = Float[np.ndarray, "layer q_pos k_pos"]


def chained(weights: Layers) -> Layers:
    """Attention rollout, R_l = A_l R_(l-1) with A_l = (W_l + I) / 2.

    Args:
        weights: W, the weights of every layer; rows sum to 1.

    Returns:
        R, of the stream after each layer on the input tokens; rows sum to 1.

    Cost: layer x pos^3.

    Example:
        >>> chained(np.array([[[1.0, 0.0], [0.5, 0.5]]] * 2))[-1].tolist()
        [[1.0, 0.0], [0.4375, 0.5625]]
    """
    rolled = [np.eye(weights.shape[-1])]
    for layer in _mixed(weights):
        rolled.append(layer @ rolled[-1])
    return np.stack(rolled[1:])


def piped(weights: Layers, position: int) -> Float[np.ndarray, "layer k_pos"]:
    """The maximum flow from one position after each layer to each input token, not normalised.

    Nodes are (layer, position); the edge from (l, i) to (l - 1, j) has the capacity A_l[i, j] = (W_l + I)[i, j] / 2.
    Capacities are rounded to 1e-8, so a flow is off by at most that for each edge of its cut.

    Args:
        weights: W, as in `chained`.
        position: where the flow starts.

    Returns:
        At most 1 each; never less than `chained` at that position, and equal to it after layer 0.

    Cost: layer x pos problems of layer x pos nodes, solved by scipy (Dinic). networkx gives the same, far slower.

    Example:
        >>> piped(np.array([[[1.0, 0.0], [0.5, 0.5]]] * 2), 1).tolist()
        [[0.25, 0.75], [0.5, 0.75]]
    """
    n_layers, n_pos = len(weights), weights.shape[-1]
    layer, query, key = np.indices(weights.shape)
    capacity = np.rint(_mixed(weights) * _SCALE).astype(np.int32).ravel()
    used = capacity > 0
    source, sink = ((layer + 1) * n_pos + query).ravel()[used], (layer * n_pos + key).ravel()[used]
    n_nodes = (n_layers + 1) * n_pos
    pipes = csr_array((capacity[used], (source, sink)), shape=(n_nodes, n_nodes), dtype=np.int32)
    pipes.indices, pipes.indptr = pipes.indices.astype(np.int32), pipes.indptr.astype(np.int32)
    flows = [
        [maximum_flow(pipes, (depth + 1) * n_pos + position, token).flow_value for token in range(n_pos)]
        for depth in range(n_layers)
    ]
    return np.array(flows) / _SCALE


@method(name="Attention rollout and flow", paper="arXiv:2005.00928", notebook="label_anchors")
def influence(
    model: Model,
    task: Task,
    *,
    measure: Measure = "rollout",
    weight: Weight = "attention",
    position: str | int = "end",
    receptive_field: bool = False,
    batch_size: int | None = None,
) -> Result:
    """How much of each input token is at a position after each layer, by attention.

    W_l(q, k) is one of

        attention  mean over heads of a_h(q, k)
        value      sum over heads of a_h(q, k) |v_h(k) W_O^h|
        norm       | sum over heads of a_h(q, k) v_h(k) W_O^h |, as in arXiv 2004.10102

    with rows rescaled to the sum 1; a row without any weight counts as looking at itself. "raw" is W_l itself,
    "rollout" `chained`, "flow" `piped` with each layer's flows rescaled to the sum 1.

    Args:
        model: a decoder.
        task: the prompts.
        measure: "raw", "rollout" or "flow".
        weight: "attention", "value" or "norm".
        position: where it is looked at: a name of the task's positions, or an index.
        receptive_field: divide W_l(q, k) by the number of positions that can see k before rows are rescaled. In a
            decoder everyone sees the first token and only the last sees the last.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a prompt, layer and token up to `position`: `prompt layer k_pos value`, unit "share of the
        position". Arrays: "value" `[prompt layer k_pos]`; "matrix" `[prompt layer q_pos k_pos]`, W_l for "raw" and
        "flow", R_l for "rollout"; with "flow", "unnormalised" `[prompt layer k_pos]`. Padding has 0.

    Raises:
        ValueError: an unknown measure, weight or position; a position in the padding; no decoder.
        NoProgramError: an architecture without a layer-by-layer program, or (for "value" and "norm") whose heads do
            not add up.

    Cost: one forward pass; "norm" layer x head^2 x pos^2 more. "flow": see `piped`, once a prompt.

    Differs from the paper: it advises to normalise by the receptive field for decoders, without a formula; the one here
    is our reading.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> found = influence(model, induction(model, 4, 5))
        >>> rolled = found.arrays["matrix"][1]
        >>> bool(np.allclose(rolled.sum(-1), 1)), list(found.table.columns)
        (True, ['prompt', 'layer', 'k_pos', 'value'])
    """
    require_decoder(model)
    _known("measure", measure, ("raw", "rollout", "flow"))
    at = where(task, position)
    assert at is not None
    ends, firsts, n_pos = at.tolist(), _firsts(task), task.clean.shape[1]
    if late := [i for i, (end, first) in enumerate(zip(ends, firsts, strict=True)) if end < first]:
        raise ValueError(f"prompt {late[0]}: position {position!r} is padding; name one of its tokens.")
    matrix = np.zeros((len(task), model.n_layers, n_pos, n_pos))
    value = np.zeros(matrix.shape[:-1])
    flows = np.zeros_like(value)
    for prompt, weights in enumerate(_weights(model, task, weight, receptive_field, batch_size)):
        own = slice(firsts[prompt], None)
        found = chained(weights) if measure == "rollout" else weights
        matrix[prompt, :, own, own] = found
        value[prompt, :, own] = found[:, ends[prompt] - firsts[prompt]]
        if measure == "flow":
            flows[prompt, :, own] = piped(weights, ends[prompt] - firsts[prompt])
            value[prompt] = flows[prompt] / flows[prompt].sum(-1, keepdims=True)
    arrays = {
        "value": (("prompt", "layer", "k_pos"), value),
        "matrix": (("prompt", "layer", "q_pos", "k_pos"), matrix),
    }
    if measure == "flow":
        arrays["unnormalised"] = (("prompt", "layer", "k_pos"), flows)
    prompt, layer, key = np.indices(value.shape).reshape(3, -1)
    seen = (key >= np.array(firsts)[prompt]) & (key <= np.array(ends)[prompt])
    table = pd.DataFrame({"prompt": prompt, "layer": layer, "k_pos": key, "value": value.ravel()})
    meta = provenance(
        model, task, measure=measure, weight=weight, position=position, receptive_field=receptive_field, first=firsts,
        at=ends,
    )  # fmt: skip
    return Result(
        "rollout.influence", table[seen].reset_index(drop=True), "share of the position", arrays=arrays, meta=meta
    )


@method(name="Attention rollout: share on the first token", paper="arXiv:2005.00928", notebook="label_anchors")
def sink(found: Result) -> Result:
    """How much of a measure lies on each prompt's first token, layer by layer: what collapses onto an attention sink.

    Args:
        found: of `influence`.

    Returns:
        Result, one row a prompt and layer: `prompt layer value value_uniform`; unit as `found`. `value_uniform` is what
        causal attention without any preference gives: attention that is even over the tokens seen, by the same measure.

    Raises:
        ValueError: a Result of another function.

    Cost: none beside `influence`; with "flow", `piped` once a prompt.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> shares = sink(influence(model, induction(model, 4, 5), measure="raw")).table
        >>> shares["value_uniform"].round(2).unique().tolist()  # nine tokens
        [0.11]
    """
    _made_by(found, "influence")
    rows = []
    for prompt, (first, end) in enumerate(zip(found.meta["first"], found.meta["at"], strict=True)):
        value = found.arrays["value"][1][prompt]
        n_pos = value.shape[1] - first
        even = np.tril(np.ones((n_pos, n_pos))) / np.arange(1, n_pos + 1)[:, None]
        if found.meta["receptive_field"]:
            even = _rescaled(even / np.arange(n_pos, 0, -1))
        layers = np.broadcast_to(even, (len(value), n_pos, n_pos)).copy()
        base = layers[:, end - first]
        if found.meta["measure"] == "rollout":
            base = chained(layers)[:, end - first]
        elif found.meta["measure"] == "flow":
            base = piped(layers, end - first)
            base = base / base.sum(-1, keepdims=True)
        rows += [(prompt, layer, float(value[layer, first]), float(base[layer, 0])) for layer in range(len(value))]
    table = pd.DataFrame(rows, columns=["prompt", "layer", "value", "value_uniform"])
    return Result("rollout.sink", table, found.unit, meta=dict(found.meta))


@method(name="Token importance: blank-out and gradient", paper="arXiv:2005.00928", notebook="label_anchors")
def importance(
    model: Model,
    task: Task,
    *,
    by: Literal["ablation", "gradient"] = "ablation",
    source: str = "mean",
    metric: str | Readout = "log_prob",
    batch_size: int | None = None,
) -> Result:
    """How much each input token matters to the prediction, by taking it out or by the gradient at it.

    "ablation" is |m(clean) - m(token's embedding replaced)|, the paper's blank-out; "gradient" the Euclidean norm of
    dm / d(embedding), both of the stream before layer 0.

    Args:
        model: a decoder.
        task: with answers.
        by: "ablation" or "gradient".
        source: what is put in the place of the embedding, see `interp.patching.ablation.ablate`; for "ablation" only.
        metric: see `interp.core.readout.readout`.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a prompt and token: `prompt k_pos value`, unit that of the metric (for "gradient": per unit of
        the embedding). Array "value" `[prompt k_pos]`, 0 at padding.

    Raises:
        ValueError: an unknown `by`, source or metric; no decoder.
        NoProgramError: an architecture without a layer-by-layer program ("gradient").

    Cost: "ablation" a forward pass a token; "gradient" three forward passes.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> found = importance(model, task, source="zero", metric="prob").arrays["value"][1]
        >>> bool((found[range(4), task.positions["source"]] > 0.9).all())
        True
    """
    require_decoder(model)
    _known("by", by, ("ablation", "gradient"))
    n_pos = task.clean.shape[1]
    if by == "ablation":
        sets = {str(pos): [Edit("resid_pre", 0, pos=pos)] for pos in range(n_pos)}
        done = ablation.ablate(model, task, sets, source=source, metric=metric, batch_size=batch_size)
        value = np.abs(done.arrays["clean"][1][:, None] - done.arrays["value"][1])
    else:
        size = batch_size or max(1, room(model, n_pos) // n_pos)
        some = batches(len(task), size)
        value = np.concatenate([_gradient(model, task[r], readout_of(model, task, metric, r)) for r in some])
    firsts = np.array(_firsts(task))
    prompt, key = np.indices(value.shape).reshape(2, -1)
    seen = key >= firsts[prompt]
    value = np.where(seen.reshape(value.shape), value, 0.0)
    table = pd.DataFrame({"prompt": prompt, "k_pos": key, "value": value.ravel()})[seen].reset_index(drop=True)
    read = readout(model, task[:1], metric) if isinstance(metric, str) else metric
    unit = read.unit if by == "ablation" else f"{read.unit} per unit of the embedding"
    meta = provenance(model, task, by=by, source=source if by == "ablation" else None, metric=read.name)
    return Result("rollout.importance", table, unit, arrays={"value": (("prompt", "k_pos"), value)}, meta=meta)


@method(name="Attention rollout: agreement with importance", paper="arXiv:2005.00928", notebook="label_anchors")
def agreement(found: Result, matters: Result) -> Result:
    """Spearman's rank correlation over the tokens of a prompt, of a measure in each layer and the tokens' importance.

    Args:
        found: of `influence`.
        matters: of `importance`, on the same prompts.

    Returns:
        Result, one row a prompt and layer: `prompt layer value`, unit "Spearman correlation"; NaN where one of the two
        is the same for all tokens. The tokens are those up to the position of `found`.

    Raises:
        ValueError: results of other functions, or of different models or prompts.

    Cost: none beside the two.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> agreed = agreement(influence(model, task), importance(model, task, by="gradient"))
        >>> agreed.table["layer"].unique().tolist()
        [0, 1]
    """
    _made_by(found, "influence")
    _made_by(matters, "importance")
    for key in (key for key in matters.meta if key.endswith("fingerprint")):
        if found.meta.get(key) != matters.meta.get(key):
            raise ValueError(f"the two results differ in their {key}: make both of one model and one task.")
    rows = []
    for prompt, (first, end) in enumerate(zip(found.meta["first"], found.meta["at"], strict=True)):
        other = matters.arrays["value"][1][prompt, first : end + 1]
        for layer, values in enumerate(found.arrays["value"][1][prompt, :, first : end + 1]):
            rows.append((prompt, layer, _spearman(values, other)))
    table = pd.DataFrame(rows, columns=["prompt", "layer", "value"])
    meta = {**found.meta, "importance": {key: matters.meta[key] for key in ("by", "source", "metric")}}
    return Result("rollout.agreement", table, "Spearman correlation", meta=meta)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    # Rounded, so that the rounding of the last bits breaks no tie.
    a, b = (rankdata(np.round(values, 12)) for values in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _mixed(weights: Layers) -> Layers:
    return 0.5 * weights + 0.5 * np.eye(weights.shape[-1])


def _rescaled(weights: np.ndarray) -> np.ndarray:
    """Rows to the sum 1; a row of zeros is the position itself."""
    total = weights.sum(-1, keepdims=True)
    own = np.broadcast_to(np.eye(weights.shape[-1]), weights.shape)
    return np.where(total > 0, weights / np.where(total > 0, total, 1.0), own)


@torch.no_grad()
def _weights(
    model: Model, task: Task, weight: Weight, receptive_field: bool, batch_size: int | None
) -> list[Float[np.ndarray, "layer q_pos k_pos"]]:
    """W of each prompt, without its padding."""
    _known("weight", weight, ("attention", "value", "norm"))
    steps = program(model)
    n_pos, firsts = task.clean.shape[1], _firsts(task)
    found: list[np.ndarray] = []
    for rows in batches(len(task), batch_size or max(1, room(model, n_pos) // n_pos)):
        part = task[rows]
        stream, frame = steps.embed(part.clean, part.mask), steps.frame(part.clean, part.mask)
        layers, seers = [], []
        for layer in range(model.n_layers):
            seen = steps.layer(layer, stream, frame)
            layers.append(numbers(_weighted(steps, layer, seen["pattern"], seen["v"], weight)))
            seers.append(numbers(steps.allowed(layer, frame)))
            stream = seen["resid_post"]
        for row, first in enumerate(firsts[rows]):
            one = np.stack([values[row, first:, first:] for values in layers])
            if receptive_field:
                one = one / np.stack([values[row, first:, first:].sum(0) for values in seers])[:, None]
            found.append(_rescaled(one))
    return found


def _weighted(steps: Program, layer: int, pattern: Tensor, v: Tensor, weight: Weight) -> Tensor:
    """W of one layer `[batch q_pos k_pos]`, rows of any sum."""
    pattern = pattern.double()
    if weight == "attention":
        return pattern.mean(1)
    values = v.repeat_interleave(steps.n_heads // steps.n_key_value_heads, dim=2)
    written = torch.einsum("bkhd,hdm->bkhm", values, steps.w_o(layer)).double()
    if weight == "value":
        return torch.einsum("bhqk,bkh->bqk", pattern, written.norm(dim=-1))
    # |sum_h a_h u_h|^2 through the products of the heads' vectors: no vector for each query and key.
    products = torch.einsum("bkhm,bkgm->bkhg", written, written)
    squares = (torch.einsum("bhqk,bkhg->bgqk", pattern, products) * pattern).sum(1)
    return squares.clamp(min=0).sqrt()


def _gradient(model: Model, part: Task, read: Readout) -> np.ndarray:
    embedding: list[Tensor] = []

    def visit(site: str, layer: int, activation: Tensor) -> Tensor:
        embedding.append(activation.detach().requires_grad_())
        return embedding[0]

    with frozen(model), torch.enable_grad():
        total = forward(model, program(model), Prompts(part.clean, part.mask, read), visit, {("resid_pre", 0)}).sum()
        (gradient,) = torch.autograd.grad(total, embedding)
    return numbers(gradient.double().norm(dim=-1))


def _firsts(task: Task) -> list[int]:
    """Index of each prompt's first token after the padding."""
    return [0] * len(task) if task.mask is None else task.mask.long().argmax(1).tolist()


def _made_by(found: Result, function: str) -> None:
    if found.method != f"rollout.{function}":
        raise ValueError(f"this is a Result of {found.method}; give one of rollout.{function}(model, task).")


def _known(label: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{label} {given!r} is not known; use one of {', '.join(allowed)}.")
