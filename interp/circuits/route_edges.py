"""How much of what each component reads comes from each earlier one? Information flow routes as scores of edges."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from interp.circuits._ablated import Positions, counted_at, plain
from interp.circuits._edges import Written, written
from interp.circuits._flow import proximity
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.core.batching import batches
from interp.core.registry import method
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._inputs import provenance
from interp.tasks.task import Task

# Positions of prompts that are read at once.
_ENOUGH = 256


@method(name="Information flow over edges", paper="arXiv:2403.00824", notebook="circuit_discovery")
@torch.no_grad()
def route_edges(model: Model, task: Task, *, grouped: bool = True, positions: Positions = None) -> Circuit:
    """The nearness of every component's output to every stream that is read: flow routes between components.

    With y the stream that a destination reads at a token and z_j what source j wrote into it there, the score is
    max(||y||_1 - ||y - z_j||_1, 0) over the sum of the same of all sources, meaned over tokens and prompts. This is the
    form in which the MIB benchmark (arXiv 2504.13151) compares information flow routes with other finders; the paper's
    own graph has tokens, and edges through heads, for which see `flow_routes`. Queries, keys, values of a layer read
    one stream, so their scores are equal: nothing here knows what a head looks for, or what the answer is.

    Args:
        model: a decoder whose heads add up.
        task: prompts; only the clean ones are read, and no answers.
        grouped: whether keys and values that heads share are one input each, or one a head.
        positions: of destinations over which shares are meaned: names of the task or indices; None for all.

    Returns:
        Circuit with all edges, unit "share of the stream". Scores are 0 or more, and sum to 1 at each destination. Grow
        a circuit with `greedy`, as the benchmark does: shares at different destinations do not compare.

    Raises:
        NoProgramError: the model has no layer-by-layer program, or its heads do not add up.
        ValueError: positions that the task has not.

    Cost: one forward pass, about two more to write the heads' outputs out, and 3 x sources x layers x tokens x d_model
        additions; memory for tokens x d_model x 2 layers. No backward pass and no corrupt prompts.

    Example:
        >>> from interp.models import planted
        >>> from interp.tasks import Task
        >>> net = planted.cancelling_pair()
        >>> task = Task("words", net.prompts, net.clean, "planted")
        >>> found = route_edges(net.model, task)
        >>> bool(np.allclose(found.scores.sum(1), 1))
        True
    """
    steps, graph, counted = program(model), Graph.of(model, grouped=grouped), counted_at(task, positions)
    scores, n_tokens = np.zeros(graph.possible.shape), 0
    streams = _streams_of(graph)
    for rows in batches(len(task), max(1, _ENOUGH // task.clean.shape[1])):
        mask = None if task.mask is None else task.mask[rows]
        wrote = written(steps, task.clean[rows], mask)
        real = torch.ones_like(task.clean[rows]).bool() if mask is None else mask.bool()
        real = real if counted is None else real & counted[rows]
        for number, (stream, n_before) in enumerate(_streams(steps, wrote)):
            shares = _shares(steps, wrote, stream, n_before)[:, real].sum(1)
            scores[np.flatnonzero(streams == number), :n_before] += shares.double().cpu().numpy()
        n_tokens += int(real.sum())
    meta = provenance(model, task, method="route_edges", grouped=grouped, positions=plain(positions))
    return Circuit.of(graph, scores / n_tokens, unit="share of the stream", meta=meta)


def _streams_of(graph: Graph) -> np.ndarray:
    """Which stream each destination reads: two a layer, then the last."""
    return np.array([2 * each.layer + (each.kind == "mlp") for each in graph.destinations])


def _streams(steps: Program, wrote: Written) -> Iterator[tuple[Tensor, int]]:
    """Each stream that is read, `[batch pos d_model]`, and how many sources it holds."""
    stream, n_before = wrote.embed, 1
    for layer, (z, mlp) in enumerate(zip(wrote.z, wrote.mlp, strict=True)):
        yield stream, n_before
        middle = stream + steps.attn_out(layer, z)
        yield (stream, n_before) if steps.parallel else (middle, n_before + steps.n_heads)
        stream, n_before = middle + mlp, n_before + steps.n_heads + 1
    yield stream, n_before


def _shares(steps: Program, wrote: Written, stream: Tensor, n_before: int) -> Tensor:
    """Importance of each source in a stream, `[source batch pos]`."""
    stream = stream.float()
    near = [proximity(wrote.embed.float()[..., None, :], stream, 1)[..., 0]]
    for layer, (z, mlp) in enumerate(zip(wrote.z, wrote.mlp, strict=True)):
        if len(near) == n_before:
            break
        heads = torch.einsum("bphd,hdm->bphm", z, steps.w_o(layer)).float()
        near += proximity(heads, stream, 1).unbind(-1)
        if len(near) < n_before:
            near.append(proximity(mlp.float()[..., None, :], stream, 1)[..., 0])
    kept = torch.stack(near).clamp(min=0)
    total = kept.sum(0)
    return kept / torch.where(total > 0, total, 1)
