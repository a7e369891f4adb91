"""How few dimensions does a head need? Its queries, keys and values at the labels, cut down to a subspace.

The compression of *Does Circuit Analysis Interpretability Scale?* (arXiv 2307.09458): a head's queries at the position
that answers, and its keys and values at the labels, keep the directions in which they differ between right options, or
between the labels of a prompt; all else is replaced by its mean. Fitted on the letters A to D and tried on other
labels, it says what these directions code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.circuits._choice import centred, choice, of_right, places
from interp.circuits.head_set import Head
from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.patching._inputs import numbers, provenance, require_decoder
from interp.patching._runs import prompts_at_once
from interp.tasks.task import Task

_PAPER = "arXiv:2307.09458"
#: What can be compressed: queries at the end, keys and values at the labels.
PARTS = ("q", "k", "v")


@method(name="Low-rank compression of heads", paper=_PAPER, notebook="mcq_at_scale")
def compress(
    model: Model,
    fit: Task,
    tasks: Task | Mapping[str, Task],
    heads: Sequence[Head],
    *,
    parts: Sequence[str] = ("qk", "v", "qkv"),
    ranks: Sequence[int] | None = None,
    prefix: str = "label",
    batch_size: int | None = None,
) -> Result:
    """The loss when heads keep a few dimensions of their queries, keys or values, against their number.

    For each head, on the prompts of `fit`: its queries q at the position "end", and its keys k and values v at the
    labels (before any rotation; for grouped-query attention those of the head's group). Centred:

        keys and values: less their mean over the labels of the same prompt; one row a prompt and label;
        queries: their means by right option, less their mean; one row an option, counted as often as it is right.

    The first r right singular vectors of these rows span the subspace P. In the forward pass, at the same positions,

        x  ->  mean + P (x - mean),        mean over all those positions of `fit`,

    for all heads together, and the loss is measured. r = 0 is mean ablation; r = d_head changes nothing. With n options
    the centred rows of one prompt span at most n - 1 directions, and so do the queries' means; later directions of
    queries are those of their variation within an option.

    Args:
        model: a decoder.
        fit: multiple choice that the subspaces and means come from.
        tasks: held-out prompts to measure on, or {name: task}: other labels, other separators.
        heads: (layer, head), compressed together. A key-value group that they share is compressed once, and so are the
            heads of it that are not named.
        parts: what is compressed together: "q", "k", "v" or several of them, each as one run of ranks.
        ranks: the r; None for 0, 1, 2, 3, 4, 6, 8, 12, 16 ... up to d_head.
        prefix: where keys and values are compressed: at "label_0", ..., or with "content" at "content_0", ....
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, unit "nats", one row for each prompt, task (`target`), what is compressed (`component`) and rank
        (`step`); the unchanged model is component "unchanged" at rank d_head. `value` is -log of the right label's
        probability among the options; `value_right` 1 where its logit is the largest; `value_attention` the attention
        from the end to the right option's label (or content), mean over the heads; `value_largest` the share of the
        heads in which that is the largest of the options. Array "singular_values" `[part head direction]` in the order
        of `meta["parts"]` ("q", "k", "v") and `meta["heads"]`, divided by the root of the number of rows.

    Raises:
        ValueError: no heads or one twice, an unknown part, a rank above d_head, tasks without options or with another
            number of them.

    Cost: one forward pass over `fit`; for each task, part and rank one over its prompts.

    Differs from the paper: details of its procedure were not found. Here queries and keys have subspaces of their own,
        and in a model with rotary positions they are cut before the rotation.

    Example:
        >>> from interp.models import toy
        >>> tokens, options = torch.tensor([[2, 3, 4, 5, 2], [2, 4, 3, 5, 2]]), torch.tensor([[3, 4], [4, 3]])
        >>> places = {"end": [4, 4], "label_0": [1, 1], "label_1": [2, 2]}
        >>> task = Task("doc", ("w2 w3 w4 w5 w2", "w2 w4 w3 w5 w2"), tokens, "by hand", answers=torch.tensor([3, 4]),
        ...             options=options, positions={name: torch.tensor(at) for name, at in places.items()})
        >>> found = compress(toy.induction(), task, task, [(1, 0)], parts=["v"], ranks=[0, 1])
        >>> (found.table.groupby(["component", "step"], sort=False)["value"].mean().round(1) + 0.0).tolist()
        [0.0, 0.7, 0.0]
    """
    require_decoder(model)
    named = {tasks.name: tasks} if isinstance(tasks, Task) else dict(tasks)
    sweep = _ranks(model.d_head) if ranks is None else list(ranks)
    _require(model, fit, named, heads, parts, sweep)
    subspaces = fitted(model, fit, heads, "".join(part for part in PARTS if any(part in p for p in parts)), prefix)
    frames = []
    for name, task in named.items():
        runs = [("unchanged", model.d_head), *((part, rank) for part in parts for rank in sweep)]
        for part, rank in runs:
            chosen = [] if part == "unchanged" else [space for space in subspaces if space.part in part]
            columns = _measured(model, task, heads, chosen, rank, prefix, batch_size)
            frames.append(
                pd.DataFrame(
                    {"prompt": np.arange(len(task)), "target": name, "component": part, "step": rank, **columns}
                )
            )
    used = [part for part in PARTS if any(space.part == part for space in subspaces)]
    singular = {(space.part, space.layer, space.index): space.singular for space in subspaces}
    grid = [[singular[part, layer, _index(model, part, head)] for layer, head in heads] for part in used]
    arrays = {"singular_values": (("part", "head", "direction"), np.array([[numbers(s) for s in row] for row in grid]))}
    meta = provenance(
        model, fit, tasks={name: task.fingerprint for name, task in named.items()}, heads=[list(at) for at in heads],
        parts=used, ranks=sweep, prefix=prefix,
    )  # fmt: skip
    return Result("low_rank.compress", pd.concat(frames, ignore_index=True), "nats", arrays, meta)


@method(name="What a subspace codes", paper=_PAPER, notebook="mcq_at_scale")
def coding(
    model: Model, fit: Task, task: Task, heads: Sequence[Head], *, rank: int = 3, prefix: str = "label"
) -> Result:
    """Whether keys and values in their subspace tell the place of a label, or which token it is.

    The subspaces of `compress`, fitted on `fit`, are read on `task`: its keys and values at the labels, less their mean
    over the labels of the same prompt, projected onto the first `rank` directions. The value is the share of the sum of
    squares that lies in the means of groups, adjusted for the number of groups: 1 - (within / (N - groups)) /
    (all / (N - 1)), for groups by place (the first option, the second, ...) and by token.

    Args:
        model: a decoder.
        fit: multiple choice that the subspaces come from, for example with the labels A to D.
        task: with labels in random order, so that place and token are not the same thing.
        heads: (layer, head).
        rank: directions kept.
        prefix: as in `compress`.

    Returns:
        Result, one row a head, part (`component`, "k" or "v") and grouping (`metric`, "place" or "token"); unit "share
        of variance". `value_kept` is the share of the whole sum of squares that lies in the subspace.

    Raises:
        ValueError: as `compress`.

    Cost: one forward pass over each task.

    Example:
        >>> from interp.models import toy
        >>> tokens, options = torch.tensor([[2, 3, 4, 5, 2], [2, 4, 3, 5, 2]]), torch.tensor([[3, 4], [4, 3]])
        >>> places = {"end": [4, 4], "label_0": [1, 1], "label_1": [2, 2]}
        >>> task = Task("doc", ("w2 w3 w4 w5 w2", "w2 w4 w3 w5 w2"), tokens, "by hand", answers=torch.tensor([3, 4]),
        ...             options=options, positions={name: torch.tensor(at) for name, at in places.items()})
        >>> found = coding(toy.induction(), task, task, [(1, 0)], rank=1).filter(component="v").table
        >>> dict(zip(found["metric"], found["value"].round(3)))
        {'place': -0.5, 'token': 1.0}
    """
    require_decoder(model)
    _require(model, fit, {task.name: task}, heads, ["kv"], [rank])
    spaces = {(s.part, s.layer, s.index): s for s in fitted(model, fit, heads, "kv", prefix)}
    read = _collected(model, task, heads, "kv", prefix)
    options = choice(task).options
    groups = {
        "place": torch.arange(options.shape[1], device=options.device).expand_as(options).reshape(-1),
        "token": options.reshape(-1),
    }
    records = []
    for layer, head in heads:
        for part in "kv":
            at = (part, layer, _index(model, part, head))
            rows = _deltas(read[at])
            inside = rows @ spaces[at].basis[:rank].T
            kept = float(inside.square().sum() / rows.square().sum().clamp_min(1e-30))
            for name, by in groups.items():
                value = _explained(inside, by)
                records.append(
                    {
                        "component": part,
                        "layer": layer,
                        "head": head,
                        "metric": name,
                        "value": value,
                        "value_kept": kept,
                    }
                )
    meta = provenance(model, fit, task_read=task.fingerprint, rank=rank, prefix=prefix)
    return Result("low_rank.coding", pd.DataFrame(records), "share of variance", meta=meta)


def recovered(found: Result) -> pd.DataFrame:
    """Of the loss that rank 0 adds to the unchanged model, the share that a higher rank takes back.

    Args:
        found: of `compress`, with rank 0.

    Returns:
        One row for each target, component and rank (`step`): loss, right (share of prompts), share. Where rank 0 adds
        less than 0.01 nats there is nothing to take back, and the share is NaN.
    """
    means = found.table.groupby(["target", "component", "step"], sort=False)[["value", "value_right"]].mean()
    means = means.rename(columns={"value": "loss", "value_right": "right"}).reset_index()
    full = means[means["component"] == "unchanged"].set_index("target")["loss"]
    rest = means[means["component"] != "unchanged"]
    none = rest[rest["step"] == 0].set_index(["target", "component"])["loss"]
    ablated = none.loc[list(zip(rest["target"], rest["component"], strict=True))].to_numpy()
    added = ablated - full.loc[rest["target"]].to_numpy()
    share = np.where(added >= 0.01, (ablated - rest["loss"]) / np.where(added >= 0.01, added, 1.0), np.nan)
    return rest.assign(share=share).reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class Subspace:
    """The directions of one head's queries, or one group's keys or values, most important first.

    Attributes:
        part: "q", "k" or "v".
        layer: of the head.
        index: the head, or the key-value group.
        basis: `[d_head d_head]`, orthonormal rows.
        mean: `[d_head]`.
        singular: `[d_head]`, of the centred rows, over the root of their number; 0 where they have no direction.
    """

    part: str
    layer: int
    index: int
    basis: Tensor
    mean: Tensor
    singular: Tensor


@torch.no_grad()
def fitted(model: Model, task: Task, heads: Sequence[Head], parts: str, prefix: str = "label") -> list[Subspace]:
    """The subspaces of heads.

    Args:
        model: a decoder.
        task: that they are fitted on.
        heads: (layer, head).
        parts: of "qkv".
        prefix: "label" or "content".

    Returns:
        One for each head, or group of heads, and part. Cost: one forward pass.
    """
    right = choice(task).right
    found = []
    for (part, layer, index), read in _collected(model, task, heads, parts, prefix).items():
        if part == "q":
            rows, rest = _by_option(read, right)
            mean = read.mean(0)
        else:
            rows, mean = _deltas(read), read.flatten(0, 1).mean(0)
            rest = read.mean(1) - mean
        found.append(Subspace(part, layer, index, *_basis(rows, rest, mean)))
    return found


def _basis(rows: Tensor, rest: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis of the whole space: the directions of `rows`, then of `rest`, then any others."""
    # The triangle of a QR factorisation has the same directions, and as few rows as there are dimensions.
    _, values, first = torch.linalg.svd(torch.linalg.qr(rows, mode="r").R, full_matrices=True)
    values = torch.cat([values, values.new_zeros(len(first) - len(values))]) / len(rows) ** 0.5
    # Below this a singular value is rounding, and its direction arbitrary.
    n = int((values > 1e-5 * values[0].clamp_min(1e-12)).sum())
    beyond = first[n:]  # spans what the rows leave open
    if len(beyond):
        turned = torch.linalg.svd(torch.linalg.qr(rest @ beyond.T, mode="r").R, full_matrices=True)[2]
        beyond = turned @ beyond
    return torch.cat([first[:n], beyond]), mean, values


def _deltas(read: Tensor) -> Tensor:
    """Keys or values `[batch option d_head]` less the mean over the options, one row a prompt and option."""
    return (read - read.mean(1, keepdim=True)).flatten(0, 1)


def _by_option(read: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Queries' means by right option, less their mean, a row a prompt; and what varies within an option."""
    options, which = right.unique(return_inverse=True)
    means = torch.stack([read[right == option].mean(0) for option in options])
    return (means - means.mean(0))[which], read - means[which]


def _explained(rows: Tensor, groups: Tensor) -> float:
    """Adjusted share of the sum of squares of rows `[n d]`, of mean zero, that is in the means of groups `[n]`."""
    names, which = groups.unique(return_inverse=True)
    means = torch.stack([rows[which == i].mean(0) for i in range(len(names))])
    within, every = (rows - means[which]).square().sum(), rows.square().sum().clamp_min(1e-30)
    return float(1 - (within / max(len(rows) - len(names), 1)) / (every / (len(rows) - 1)))


@torch.no_grad()
def _collected(
    model: Model, task: Task, heads: Sequence[Head], parts: str, prefix: str
) -> dict[tuple[str, int, int], Tensor]:
    """Queries `[batch d_head]` at the end, keys and values `[batch option d_head]` at the labels, in float32."""
    wanted = list(dict.fromkeys((part, layer, _index(model, part, head)) for layer, head in heads for part in parts))
    names = sorted({hook_name(part, layer) for part, layer, _ in wanted})
    end, label = choice(task).end, places(task, prefix)
    found: dict[tuple[str, int, int], list[Tensor]] = {at: [] for at in wanted}
    for rows in batches(len(task), prompts_at_once(model, task.clean.shape[1], 1)):
        mask = None if task.mask is None else task.mask[rows]
        cache = run(model, task.clean[rows], capture=names, mask=mask, stop_after=max(at[1] for at in wanted)).cache
        prompts = torch.arange(len(end[rows]), device=end.device)
        for part, layer, index in wanted:
            where = end[rows] if part == "q" else label[rows]
            each = prompts if part == "q" else prompts[:, None]
            found[part, layer, index].append(cache[hook_name(part, layer)][each, where, index].float())
    return {at: torch.cat(read) for at, read in found.items()}


def _cutting(spaces: Sequence[Subspace], rank: int, task: Task, prefix: str) -> list[tuple[str, HookFn]]:
    """Hooks that replace what lies outside the first `rank` directions by the mean."""
    end, label = choice(task).end, places(task, prefix)
    prompts = torch.arange(len(task), device=end.device)

    def cut(activation: Tensor, hook: object, space: Subspace) -> Tensor:
        each, where = (prompts, end) if space.part == "q" else (prompts[:, None], label)
        read = activation[each, where, space.index].float()
        kept = space.basis[:rank]
        changed = activation.clone()
        changed[each, where, space.index] = (space.mean + (read - space.mean) @ kept.T @ kept).to(activation.dtype)
        return changed

    return [
        (hook_name(space.part, space.layer), lambda activation, hook, space=space: cut(activation, hook, space))
        for space in spaces
    ]


@torch.no_grad()
def _measured(
    model: Model,
    task: Task,
    heads: Sequence[Head],
    spaces: Sequence[Subspace],
    rank: int,
    prefix: str,
    batch_size: int | None,
) -> dict[str, np.ndarray]:
    """Loss, right answer and attention of each prompt, with some heads cut down."""
    patterns = sorted({hook_name("pattern", layer) for layer, _ in heads})
    found: dict[str, list[Tensor]] = {"value": [], "value_right": [], "value_attention": [], "value_largest": []}
    for rows in batches(len(task), batch_size or prompts_at_once(model, task.clean.shape[1], 1)):
        part = task[rows]
        options, right, end = choice(part)
        seen = run(model, part.clean, hooks=_cutting(spaces, rank, part, prefix), capture=patterns, mask=part.mask)
        prompts = torch.arange(len(part), device=end.device)
        assert seen.logits is not None
        logits = centred(seen.logits[prompts, end].gather(-1, options))
        mine = of_right(logits, right)
        found["value"].append(-of_right(logits.log_softmax(-1), right))
        found["value_right"].append(((logits >= mine[:, None]).sum(-1) == 1).float())
        where = places(part, prefix)
        looks = torch.stack(
            [
                seen.cache[hook_name("pattern", layer)][prompts[:, None], head, end[:, None], where]
                for layer, head in heads
            ]
        ).float()  # [head batch option]
        found["value_attention"].append(of_right(looks, right).mean(0))
        found["value_largest"].append((looks.argmax(-1) == right).float().mean(0))
    return {name: numbers(torch.cat(values)) for name, values in found.items()}


def _index(model: Model, part: str, head: int) -> int:
    return head if part == "q" else head * model.n_key_value_heads // model.n_heads


def _ranks(d_head: int) -> list[int]:
    small = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]
    return [*(rank for rank in small if rank < d_head), d_head]


def _require(
    model: Model,
    fit: Task,
    tasks: Mapping[str, Task],
    heads: Sequence[Head],
    parts: Sequence[str],
    ranks: Sequence[int],
) -> None:
    if not heads or len(set(heads)) != len(heads):
        raise ValueError(f"heads={list(heads)}: name at least one head, each once, for example heads=[(12, 3)].")
    for layer, head in heads:
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise ValueError(
                f"head {(layer, head)} does not exist: {model.name} has layers 0 to {model.n_layers - 1} and heads 0 "
                f"to {model.n_heads - 1}."
            )
    for part in parts:
        if not part or set(part) - set(PARTS) or len(set(part)) != len(part):
            raise ValueError(f"parts has {part!r}: each is made of 'q', 'k' and 'v', for example parts=['qk', 'v'].")
    if not parts or not ranks or not tasks:
        raise ValueError("there is nothing to measure: give at least one part, one rank and one task.")
    if wrong := [rank for rank in ranks if not 0 <= rank <= model.d_head]:
        raise ValueError(
            f"rank {wrong[0]}: {model.name} has heads of {model.d_head} dimensions, so 0 to {model.d_head}."
        )
    n = choice(fit).options.shape[1]
    for name, task in tasks.items():
        if choice(task).options.shape[1] != n:
            raise ValueError(
                f"task {name!r} has {choice(task).options.shape[1]} options, and the one it is fitted on {n}: make "
                "both alike."
            )
