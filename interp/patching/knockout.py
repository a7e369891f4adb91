"""Through which attention edges does the answer come? Edges are cut, in some layers, and the answer is looked at again.

Attention knock-out as in *Dissecting Recall of Factual Associations in Auto-Regressive Language Models* (arXiv
2304.14767).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.edits import Edit, checked
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import NoProgramError, program
from interp.patching._grid import window_of
from interp.patching._inputs import Position, provenance, require_decoder, span
from interp.patching._runs import measure, readout_of, rows_of
from interp.tasks.task import Task

#: (query position, key position): the query no longer sees the key.
Edge = tuple[Position, Position]


@method(name="Attention knock-out", paper="arXiv:2304.14767", notebook="ioi_circuit")
def attention(
    model: Model,
    task: Task,
    edges: Sequence[Edge] | Mapping[str, Sequence[Edge]],
    *,
    layers: Sequence[int] | None = None,
    window: int = 1,
    heads: Sequence[tuple[int, int]] | None = None,
    metric: str | Readout = "prob",
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """How the answer changes when queries can no longer see some keys, in a window of layers.

    The attention score of each cut edge is set to minus infinity before the softmax, so that the row's other weights
    grow to a sum of 1. Per prompt, value = m(cut) - m(clean).

    Args:
        model: a decoder.
        task: with answers; corrupted prompts are not needed.
        edges: (query, key) pairs that are cut one at a time, or {name: pairs} that are cut together. A position is a
            name of `task.positions`, an index, or (first, last) for all positions from one to the other: ("end",
            ("subject_start", "subject")).
        layers: centres of the windows; None for all layers.
        window: layers that are cut together around each layer l, from l - window // 2 on; 1 for that layer only. The
            paper takes about a fifth of the layers.
        heads: (layer, head): cut in these heads only, all at once; no `layers` and no `window` then. None for all heads
            of the window's layers.
        metric: see `interp.core.readout.readout`.
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, one row a prompt, window and edge (or set of edges): `prompt`, `layer` (the centre; not with `heads`),
        `target` ("query <- key", or the set's name), `value` and `value_metric` (m(cut)); unit that of the metric.
        Arrays: "value" `[prompt layer target]` (without layer with `heads`), "clean" `[prompt]`: the paper's relative
        change in probability is value / clean.

    Raises:
        ValueError: no edges or layers; a key after its query, or outside its sliding window, in every prompt; a query
            that is left without any key; an unknown position, layer or head; an encoder or vision model.
        ModelCheckError: with hooks, on an architecture whose attention the bridge only shows (OPT).

    Cost: for each row the layers from the window on, at the positions from the first query on; one forward pass.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> result = attention(model, induction(model, 4, 5), [("end", "source"), ("end", "repeat")])
        >>> result.grid("layer", "target")["end <- source"].round(2).tolist()  # the induction head is in layer 1
        [0.0, -1.0]
    """
    require_decoder(model)
    named = _named(edges)
    pairs = {name: _pairs(task, some) for name, some in named.items()}
    if heads is not None:
        if layers is not None or window != 1:
            raise ValueError("heads= names single heads, which are cut together: leave layers and window out.")
        if not len(heads):
            raise ValueError("heads=[] leaves nothing to cut: name some as (layer, head), or leave heads out.")
        where: list[list[tuple[int, int | None]]] = [[(int(layer), int(head)) for layer, head in heads]]
    else:
        centres = [int(layer) for layer in (range(model.n_layers) if layers is None else layers)]
        if not centres:
            raise ValueError(f"layers=[] leaves nothing to cut: name some of 0 to {model.n_layers - 1}.")
        where = [[(layer, None) for layer in window_of(model, centre, window)] for centre in centres]
    cells = [
        [
            Edit("attn_scores", layer, head=head, pos=query, k_pos=key, value=float("-inf"))
            for layer, head in places
            for query, key in pairs[name]
        ]
        for places in where
        for name in named
    ]
    checked(model, cells, task.clean.shape[1], len(task), sourced=False)
    _require_keys(model, task, pairs, sorted({layer for places in where for layer, _ in places}))
    options = {
        "method": "knockout.attention", "edges": {name: [_text(edge) for edge in some] for name, some in named.items()},
        "layers": None if heads is not None else centres, "window": window,
        "heads": None if heads is None else [list(place) for place in where[0]],
    }  # fmt: skip
    metrics = measure(
        model, task, lambda rows: [[], *([rows_of(edit, rows) for edit in cell] for cell in cells)], metric,
        tokens=task.clean, identity=options, batch_size=batch_size, exact_path=exact_path,
    )  # fmt: skip
    clean = metrics[:, 0]
    cut = metrics[:, 1:].reshape(len(task), len(where), len(named))
    change = cut - clean[:, None, None]
    prompt, at, which = np.indices(cut.shape).reshape(3, -1)
    columns = {"prompt": prompt} | ({} if heads is not None else {"layer": np.array(centres)[at]})
    columns["target"] = np.array(list(named), dtype=object)[which]
    table = pd.DataFrame(columns | {"value": change.ravel(), "value_metric": cut.ravel()})
    dims = ("prompt", "target") if heads is not None else ("prompt", "layer", "target")
    arrays = {"value": (dims, change[:, 0] if heads is not None else change), "clean": (("prompt",), clean)}
    read = readout_of(model, task, metric, slice(0, 1))
    return Result("knockout.attention", table, read.unit, arrays, provenance(model, task, **options, metric=read.name))


def _named(edges: Sequence[Edge] | Mapping[str, Sequence[Edge]]) -> dict[str, list[Edge]]:
    found = (
        {name: list(some) for name, some in edges.items()}
        if isinstance(edges, Mapping)
        else {_text(edge): [edge] for edge in edges}
    )
    if not found or not all(found.values()):
        raise ValueError('there are no edges to cut: give (query, key) pairs, for example [("end", "subject")].')
    return found


def _text(edge: Edge) -> str:
    query, key = (f"{end[0]}..{end[1]}" if isinstance(end, tuple) else str(end) for end in edge)
    return f"{query} <- {key}"


def _pairs(task: Task, edges: Sequence[Edge]) -> list[tuple[Tensor, Tensor]]:
    """Single (query, key) positions, `[batch]` each, of some edges; -1 in prompts that have fewer."""
    return [(query, key) for edge in edges for query in span(task, edge[0]) for key in span(task, edge[1])]


def _require_keys(
    model: Model, task: Task, pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]], layers: Sequence[int]
) -> None:
    """Refuse edges that attention never uses, and queries that are left without a key."""
    seen = _seen(model, task)
    rows = torch.arange(len(task), device=task.clean.device)
    for name, some in pairs.items():
        used = False
        for layer in layers:
            allowed = seen(layer)
            left = allowed.clone()
            for query, key in some:
                there = (query >= 0) & (key >= 0)
                used |= bool(allowed[rows[there], query[there], key[there]].any())
                left[rows[there], query[there], key[there]] = False
            empty = (allowed.any(-1) & ~left.any(-1)).nonzero()
            if len(empty):
                prompt, query_at = empty[0].tolist()
                raise ValueError(
                    f"edges {name!r} cut every key that position {query_at} of prompt {prompt} sees in layer {layer}, "
                    "and a softmax over nothing is undefined: leave it one, for example itself or the first token."
                )
        if not used:
            raise ValueError(
                f"edges {name!r} are none that attention uses in these layers: a key after its query, outside a "
                "sliding window, or padding. An edge is (query position, key position), the query later than the key."
            )


def _seen(model: Model, task: Task) -> Callable[[int], Tensor]:
    """Who sees whom in a layer, `[batch q_pos k_pos]`."""
    try:
        steps = program(model)
    except NoProgramError:
        n_pos = task.clean.shape[1]
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=task.clean.device).tril()
        both = causal if task.mask is None else causal & task.mask.bool()[:, None, :]
        return lambda layer: both.expand(len(task), -1, -1)
    frame = steps.frame(task.clean, task.mask)
    return lambda layer: steps.allowed(layer, frame)
