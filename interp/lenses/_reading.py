"""How are many layers and positions read through one vocabulary? A tile of positions at a time, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.result import Result
from interp.lenses._output import Output, output, tiles
from interp.lenses.trajectory import STATISTICS, statistics
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.patching._inputs import places, provenance
from interp.tasks.task import Task

Target = str | Tensor
Positions = str | int | Sequence[str | int] | None

#: Vectors of the stream, or added to it, that the final norm and the unembedding can read.
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
#: Positions whose activations are in memory together.
_TOKENS = 1024


class Place(NamedTuple):
    """Where a vector is read: a site and its layer. The stream before the layer after the last is the output."""

    site: str
    layer: int


class Rows(NamedTuple):
    """The positions that are read: their prompts and columns, and the token compared with (-1 for none); `[row]`."""

    prompt: Tensor
    pos: Tensor
    target: Tensor


def as_task(model: Model, task: Task | Tensor) -> Task:
    """Token ids as a task; a task as it is.

    Args:
        model: whose tokens they are.
        task: a task, or ids `[batch pos]`.

    Returns:
        The Task.

    Raises:
        ValueError: ids of another shape, or that the model has not.
    """
    if isinstance(task, Tensor):
        if task.ndim != 2 or not task.numel():
            raise ValueError(f"tokens are {tuple(task.shape)}; give token ids [batch pos], at least one prompt.")
        names = tuple(f"prompt {i}" for i in range(len(task)))
        task = Task("tokens", names, task.to(model.device), "token ids given by the caller")
    if int(task.clean.min()) < 0 or int(task.clean.max()) >= model.d_vocab:
        raise ValueError(
            f"task {task.name!r} has token ids from {int(task.clean.min())} to {int(task.clean.max())}, but "
            f"{model.name} has tokens 0 to {model.d_vocab - 1}: it was made for another tokenizer; make it with this "
            "model."
        )
    return task


def where_read(model: Model, sites: str | Sequence[str], layers: Sequence[int] | None) -> list[Place]:
    """The places of some sites and layers.

    Args:
        model: for its layers.
        sites: one or several of `SITES`.
        layers: of each site; None for all, which for "resid_pre" includes the output, as the layer after the last.

    Returns:
        Places, site by site.

    Raises:
        ValueError: an unknown site, or a layer that it has not.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names or not set(names) <= set(SITES):
        raise ValueError(f"sites={sites!r}: use one or several of {', '.join(SITES)}.")
    found = []
    for site in dict.fromkeys(names):
        n = model.n_layers + (site == "resid_pre")
        asked = range(n) if layers is None else sorted(set(layers))
        if outside := [layer for layer in asked if not 0 <= layer < n]:
            raise ValueError(
                f"layer {outside[0]} of {site}, but {model.name} has {site} of layers 0 to {n - 1}"
                + (f" ({n - 1} is the output)." if site == "resid_pre" else ".")
            )
        found += [Place(site, layer) for layer in asked]
    if not found:
        raise ValueError("no layers were given: name some, or leave them out for all.")
    return found


def rows_of(model: Model, task: Task, positions: Positions, target: Target) -> Rows:
    """The positions that are asked for, padding left out, and the token that each is compared with.

    Args:
        model: for the number of its tokens.
        task: prompts.
        positions: names of the task or indices; None for all.
        target: "next" is the token that follows, and at the last position the task's answer, if it has answers;
            "answer" is the answer at every position; or ids `[batch]`.

    Returns:
        The Rows, prompt by prompt.

    Raises:
        ValueError: a position that is padding or not there, or a target that is not.
    """
    tokens, device = task.clean, task.clean.device
    real = torch.ones_like(tokens, dtype=torch.bool) if task.mask is None else task.mask.bool()
    wanted = real
    if positions is not None:
        wanted = torch.zeros_like(real)
        prompts = torch.arange(len(tokens), device=device)
        for name, at in places(task, positions):
            index = torch.as_tensor(at, device=device).expand(len(tokens))
            if not bool(real[prompts, index].all()):
                row = int((~real[prompts, index]).nonzero()[0])
                raise ValueError(
                    f"task {task.name!r}: position {int(index[row]) if name is None else name!r} of prompt {row} is "
                    "padding: name a position of each prompt, such as 'end', or count from the end."
                )
            wanted[prompts, index] = True
    if isinstance(target, Tensor):
        if target.shape != (len(task),) or int(target.min()) < 0 or int(target.max()) >= model.d_vocab:
            raise ValueError(
                f"target is {tuple(target.shape)}; give one token id of 0 to {model.d_vocab - 1} for each of the "
                f"{len(task)} prompts."
            )
        targets = target.to(device)[:, None].expand_as(tokens)
    elif target == "answer":
        if task.answers is None:
            raise ValueError(f"task {task.name!r} has no answers: take target='next', or give ids [batch].")
        targets = task.answers[:, None].expand_as(tokens)
    elif target == "next":
        following = torch.full_like(tokens, -1)
        following[:, :-1] = tokens[:, 1:].masked_fill(~real[:, 1:], -1)
        if task.answers is not None:
            following[:, -1] = task.answers
        targets = following
    else:
        raise ValueError(f"target={target!r}: use 'next', 'answer', or token ids [batch].")
    prompt, pos = wanted.nonzero(as_tuple=True)
    return Rows(prompt, pos, targets[prompt, pos])


@torch.no_grad()
def read(
    model: Model,
    task: Task | Tensor,
    component: str,
    translate: Callable[[int, Tensor], Tensor],
    *,
    where: list[Place],
    positions: Positions,
    target: Target,
    k: int,
    method: str,
    **options: Any,
) -> Result:
    """What a lens says at each place and position, beside the model's output.

    Args:
        model: a decoder.
        task: prompts, or token ids `[batch pos]`.
        component: name of the lens.
        translate: from a layer and its vectors `[row d_model]` to vectors that the final norm and unembedding read.
        where: places.
        positions: see `rows_of`.
        target: see `rows_of`.
        k: top tokens kept.
        method: name of the method.
        **options: for `meta`.

    Returns:
        The Result that `logit_lens` describes.
    """
    way = output(model)
    task = as_task(model, task)
    if not 1 <= k <= model.d_vocab:
        raise ValueError(f"k={k}: keep from 1 to {model.d_vocab} top tokens.")
    rows = rows_of(model, task, positions, target)
    kept: dict[str, list[np.ndarray]] = {}
    spans = list(batches(len(task), max(1, _TOKENS // task.clean.shape[1])))
    for span in tqdm(spans, desc=method, leave=False, disable=len(spans) < 2):
        inside = (rows.prompt >= span.start) & (rows.prompt < span.stop)
        if bool(inside.any()):
            some = Rows(*(part[inside] for part in rows))
            for name, array in _batch(model, way, task[span], some, span.start, where, translate, k).items():
                kept.setdefault(name, []).append(array)
    arrays = {name: np.concatenate(parts, axis=1) for name, parts in kept.items()}  # [place row ...]
    if positions is not None:
        positions = [positions] if isinstance(positions, (str, int)) else list(positions)
    meta = provenance(
        model, task, lens=component, n_layers=model.n_layers, k=k,
        target="ids" if isinstance(target, Tensor) else target,
        positions=positions,
        units={_column(name): f"{unit}: {formula}" for name, (formula, unit) in STATISTICS.items()}, **options,
    )  # fmt: skip
    table = _table(model, component, where, rows, arrays)
    # Rows of the table are prompt by prompt, places in order within each.
    order = np.lexsort((table["pos"], table["prompt"]))
    tops = {name: (("row", "rank"), arrays[name].reshape(-1, k)[order]) for name in ("top_tokens", "top_log_probs")}
    return Result(method, table.iloc[order].reset_index(drop=True), "nats", tops, meta)


def _batch(
    model: Model,
    way: Output,
    task: Task,
    rows: Rows,
    first: int,
    where: list[Place],
    translate: Callable[[int, Tensor], Tensor],
    k: int,
) -> dict[str, np.ndarray]:
    """Arrays `[place row ...]` of the rows of one batch, whose prompts start at `first`."""
    last = hook_name("resid_post", model.n_layers - 1)
    hooks = [last if place.layer == model.n_layers else hook_name(*place) for place in where]
    cache = run(model, task.clean, capture=[*hooks, last], mask=task.mask, stop_after=model.n_layers - 1).cache
    vectors = {name: cache.pop(name)[rows.prompt - first, rows.pos] for name in dict.fromkeys([*hooks, last])}
    parts: list[list[dict[str, Tensor]]] = []
    for tile in tiles(len(rows.prompt), model.d_vocab):
        log_p = way.log_probs(vectors[last][tile])
        parts.append([])
        for place, hook in zip(where, hooks, strict=True):
            own = place.layer == model.n_layers  # the output itself, which no lens changes
            log_q = log_p if own else way.log_probs(translate(place.layer, vectors[hook][tile]))
            measured = statistics(log_q, log_p, rows.target[tile])
            top = log_q.topk(k, -1)
            parts[-1].append({**measured, "top_log_probs": top.values, "top_tokens": top.indices})
    return {
        name: np.stack([np.concatenate([_array(part[i][name]) for part in parts]) for i in range(len(where))])
        for name in parts[0][0]
    }


def _array(values: Tensor) -> np.ndarray:
    return (values.double() if values.is_floating_point() else values).cpu().numpy()


def _column(name: str) -> str:
    return "value" if name == "log_prob" else f"value_{name}"


def _table(model: Model, component: str, where: list[Place], rows: Rows, arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row for each place and position, place by place."""
    n_places, n_rows = len(where), len(rows.prompt)
    target, top = rows.target.cpu().numpy(), arrays["top_tokens"][..., 0]
    known = np.unique(np.concatenate([target[target >= 0], top.ravel()]))
    text = dict(zip(known.tolist(), model.to_str_tokens(known.tolist()), strict=True))
    columns: dict[str, Any] = {
        "prompt": np.tile(rows.prompt.cpu().numpy(), n_places),
        "component": component,
        "src": np.repeat(np.array([place.site for place in where], dtype=object), n_rows),
        "layer": np.repeat([place.layer for place in where], n_rows),
        "pos": np.tile(rows.pos.cpu().numpy(), n_places),
        "token": [text[i] for i in top.ravel().tolist()],
        "target": [text.get(i) for i in target.tolist()] * n_places,
    }
    return pd.DataFrame({**columns, **{_column(name): arrays[name].ravel() for name in STATISTICS}})
