"""Which nodes write the answer? Net direct effects on the labels of multiple choice, and what the few largest do.

The methods of *Does Circuit Analysis Interpretability Scale?* (arXiv 2307.09458): logit attribution centred over the
labels, direct and total effect by resampling, and joint patching of the nodes with the largest direct effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.circuits._choice import Choice, centred, choice, of_right, written
from interp.core.batching import batches
from interp.core.edits import Activations, Edit
from interp.core.readout import candidates
from interp.core.registry import method
from interp.core.rerun import rerun
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching import _paths
from interp.patching._contrast import table
from interp.patching._inputs import numbers, provenance
from interp.patching._nodes import Node
from interp.patching._nodes import nodes as _nodes
from interp.patching._runs import prompts_at_once
from interp.tasks.task import Task

_PAPER = "arXiv:2307.09458"


@method(name="Net direct effect on the labels", paper=_PAPER, notebook="mcq_at_scale")
def attribution(model: Model, task: Task, *, batch_size: int | None = None) -> Result:
    """What each node adds to the logit of each label, by itself.

    With o a node's output at the position "end", L the linear part of the final norm with its scale held at that of the
    prompt, and W the unembedding, its net direct effect on label k is

        (L o) . W[k]  -  mean over the labels of the same

    The nodes are all heads, all MLPs, the embedding, and the biases together (of attention, final norm and
    unembedding). Their sum over nodes is exactly the model's own logit of the label, less the mean over the labels.

    Args:
        model: a decoder.
        task: multiple choice, with options.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, unit "logits"; columns prompt, component ("embed", "z", "mlp_out", "bias"), layer, head, value, which is
        the effect on the right label. Arrays: "labels" `[node prompt option]`, the effect on each label, in the order
        of the options, the nodes as in the table; "right" `[prompt]`, the index of the right option; "logits"
        `[prompt option]`, the centred logits that it all sums to.

    Raises:
        ValueError: a task without options.
        NoProgramError: a model whose layers are not of the common form.

    Cost: one forward pass, and a final norm for each node.

    Example:
        >>> from interp.models import toy
        >>> tokens = torch.tensor([[2, 3, 4, 5, 2]])
        >>> task = Task("doc", ("w2 w3 w4 w5 w2",), tokens, "by hand", answers=torch.tensor([3]),
        ...             options=torch.tensor([[3, 4, 5]]), positions={"end": torch.tensor([4])})
        >>> found = attribution(toy.induction(), task)
        >>> found.top(1)[["component", "layer", "head"]].values.tolist()
        [['z', 1, 0]]
    """
    steps, chosen, wanted = program(model), choice(task), _nodes(model, "all")
    parts, sums = [], []
    with torch.no_grad():
        for rows in batches(len(task), batch_size or prompts_at_once(model, task.clean.shape[1], 4 * model.n_layers)):
            final, outputs = _outputs(steps, task, rows, chosen.end[rows], wanted)
            weight, bias = steps.directions(chosen.options[rows])
            constant = steps.final_norm(torch.zeros_like(final))
            linear = _paths.scaled_as(steps.final_norm, torch.cat([outputs, _biases(steps, final)[None]]), final)
            to_labels = torch.einsum("nbd,bkd->nbk", linear - constant, weight).float()
            to_labels[-1] += torch.einsum("bd,bkd->bk", constant, weight) + bias
            parts.append(centred(to_labels))
            sums.append(centred(torch.einsum("bd,bkd->bk", steps.final_norm(final), weight) + bias))
    labels = torch.cat(parts, 1)
    groups = [[node] for node in [*wanted, Node("bias")]]
    frame = table(groups, len(task), value=of_right(labels, chosen.right))
    arrays = {
        "labels": (("node", "prompt", "option"), numbers(labels)),
        "right": (("prompt",), chosen.right.cpu().numpy()),
        "logits": (("prompt", "option"), numbers(torch.cat(sums))),
    }
    return Result("output_nodes.attribution", frame, "logits", arrays, provenance(model, task))


@method(name="Direct and total effect by resampling", paper=_PAPER, notebook="mcq_at_scale")
def effects(
    model: Model,
    task: Task,
    *,
    nodes: str | Sequence[Node] = "all",
    n_sources: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> Result:
    """What each node does to the right label, by itself and through others, when it comes from another prompt.

    A node's output o at the position "end" is replaced by o', what it is at the end of another prompt of the task with
    another right label. The total effect is the fall of the right label's logit, less the mean over the labels, when
    everything after the node is computed again. For the direct effect all other nodes are held: o' - o is added to the
    final residual stream, and the final norm (not frozen) and the unembedding are computed again.

    Each prompt has `n_sources` sources, which go round the other places of the right option, so that each of them is a
    source equally often; all are prompts of the same task, so that labels and contents have the same statistics. The
    value is the mean over them.

    In the last layer, the total effect of an MLP is its direct effect; where attention and MLP are parallel, that of a
    head too.

    Args:
        model: a decoder.
        task: multiple choice, with options.
        nodes: "all" (embedding, heads, MLPs), "heads", "mlps", or a list of `Node`.
        n_sources: other prompts that each prompt's values come from.
        seed: of their draw.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, unit "logits"; columns prompt, component, layer, head, metric ("direct", "total", "indirect"), value.
        Arrays: "source" `[prompt source]`; "whole" `[prompt]`, the effect of all nodes together, which is what remains
        of the prompt's answer when its final residual stream is the other's; "clean" `[prompt]`, the centred logit.

    Raises:
        ValueError: a task without options, an unknown node, or a prompt for which there is no source.
        NoProgramError: a model whose layers are not of the common form.

    Cost: for each source, one forward pass, a final norm for each direct effect, and for each total effect the layers
        from the node on at the position "end" and after.

    Example:
        >>> from interp.models import toy
        >>> tokens, options = torch.tensor([[2, 3, 4, 5, 2], [2, 4, 3, 5, 2]]), torch.tensor([[3, 4], [3, 4]])
        >>> task = Task("doc", ("w2 w3 w4 w5 w2", "w2 w4 w3 w5 w2"), tokens, "by hand", answers=torch.tensor([3, 4]),
        ...             options=options, positions={"end": torch.tensor([4, 4])})
        >>> found = effects(toy.induction(), task, n_sources=1)
        >>> ranked(found).head(1)[["component", "layer", "head"]].values.tolist()
        [['z', 1, 0]]
    """
    wanted = _nodes(model, nodes)
    sources = draw_sources(task, n_sources, seed)
    cells = [[node] for node in wanted]
    direct, total, whole, clean = [], [], [], []
    for part in _parts(model, task, sources, wanted, len(wanted), batch_size):
        direct.append(part.direct(torch.eye(len(wanted))))
        total.append(part.total(cells))
        whole.append(part.whole())
        clean.append(part.clean())
    both = {"direct": torch.cat(direct, 1), "total": torch.cat(total, 1)}
    both["indirect"] = both["total"] - both["direct"]
    frame = pd.concat([table(cells, len(task), metric=name, value=value) for name, value in both.items()])
    arrays = {
        "source": (("prompt", "source"), sources),
        "whole": (("prompt",), numbers(torch.cat(whole))),
        "clean": (("prompt",), numbers(torch.cat(clean))),
    }
    meta = provenance(model, task, n_sources=n_sources, seed=seed)
    return Result("output_nodes.effects", frame.reset_index(drop=True), "logits", arrays, meta)


@method(name="Joint patching of the output nodes", paper=_PAPER, notebook="mcq_at_scale")
def joint(
    model: Model,
    task: Task,
    found: Result,
    *,
    sizes: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Result:
    """What the n nodes with the largest direct effects do together, for growing n.

    The nodes of `found` are ranked by the magnitude of their mean direct effect. For each n the first n take their
    values from the same sources as there, all at once: together on the direct path (the sum of their o' - o is added to
    the final residual stream), and together with all others computed again (total).

    With every node (nodes="all"), both are the effect of replacing the final residual stream, `arrays["whole"]`.

    Args:
        model: as in `found`.
        task: as in `found`.
        found: of `effects`.
        sizes: the n; None for every one up to 32, and then each a quarter more than the one before.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, unit "logits"; columns prompt, step (n), metric ("direct", "total"), value (the fall of the right
        label's centred logit). Array "whole" as in `found`. `meta["order"]` has the nodes in their order, as
        [component, layer, head].

    Raises:
        ValueError: `found` is of another task or model, or a size is not between 1 and the number of nodes.

    Cost: as `effects`, a run for each size.

    Example:
        >>> from interp.models import toy
        >>> tokens, options = torch.tensor([[2, 3, 4, 5, 2], [2, 4, 3, 5, 2]]), torch.tensor([[3, 4], [3, 4]])
        >>> task = Task("doc", ("w2 w3 w4 w5 w2", "w2 w4 w3 w5 w2"), tokens, "by hand", answers=torch.tensor([3, 4]),
        ...             options=options, positions={"end": torch.tensor([4, 4])})
        >>> model = toy.induction()
        >>> joined = joint(model, task, effects(model, task, n_sources=1))
        >>> needed(joined), shares(joined).loc[1].round(3).tolist()
        (1, [1.0, 1.0])
    """
    for name, mine in (("task_fingerprint", task.fingerprint), ("model_fingerprint", _fingerprint(model))):
        if found.meta.get(name) != mine:
            raise ValueError(f"`found` has another {name}: make it with effects(model, task) of this model and task.")
    order = ranked(found)
    wanted = [_node(row) for row in order.to_dict("records")]
    counts = _sizes(len(wanted)) if sizes is None else list(sizes)
    if not counts or min(counts) < 1 or max(counts) > len(wanted):
        raise ValueError(f"sizes={counts}: give numbers of nodes from 1 to {len(wanted)}.")
    first = (torch.arange(len(wanted)) < torch.tensor(counts)[:, None]).float()
    direct, total = [], []
    for part in _parts(model, task, found.arrays["source"][1], wanted, len(counts), batch_size):
        direct.append(part.direct(first))
        total.append(part.total([wanted[:n] for n in counts]))
    frames = []
    for name, values in (("direct", torch.cat(direct, 1)), ("total", torch.cat(total, 1))):
        size, prompt = np.indices(tuple(values.shape)).reshape(2, -1)
        columns = {"prompt": prompt, "step": np.array(counts)[size], "metric": name, "value": numbers(values).ravel()}
        frames.append(pd.DataFrame(columns))
    named = [[node.component, node.layer, node.head] for node in wanted]
    meta = {**found.meta, "sizes": counts, "order": named}
    arrays = {"whole": found.arrays["whole"]}
    return Result("output_nodes.joint", pd.concat(frames, ignore_index=True), "logits", arrays, meta)


def ranked(found: Result) -> pd.DataFrame:
    """The nodes by the magnitude of their mean direct effect, largest first.

    Args:
        found: of `effects`.

    Returns:
        One row a node: component, layer, head, direct, total.
    """
    means = found.table.groupby(["component", "layer", "head", "metric"], dropna=False, sort=False)["value"].mean()
    wide = means.unstack("metric").reset_index().rename_axis(columns=None)
    order = wide["direct"].abs().sort_values(ascending=False, kind="stable").index
    return wide.loc[order, ["component", "layer", "head", "direct", "total"]].reset_index(drop=True)


def shares(joined: Result) -> pd.DataFrame:
    """The joint effect of the first n nodes as a share of that of all nodes.

    Args:
        joined: of `joint`.

    Returns:
        Indexed by n, with the columns "direct" and "total": mean over prompts over the mean of "whole".
    """
    means = joined.table.groupby(["step", "metric"])["value"].mean().unstack("metric")
    return means / float(joined.arrays["whole"][1].mean())


def needed(joined: Result, share: float = 0.8, *, metric: str = "direct") -> int:
    """How many nodes have a share of the joint effect of all.

    Args:
        joined: of `joint`.
        share: of the effect.
        metric: "direct" or "total".

    Returns:
        The smallest of the sizes measured that has it.

    Raises:
        ValueError: no size reaches it.
    """
    reached = shares(joined)[metric] >= share
    if not bool(reached.any()):
        raise ValueError(
            f"none of {len(reached)} sizes has {share:.0%} of the joint {metric} effect: give larger sizes."
        )
    return int(reached.index[reached][0])


def draw_sources(task: Task, n_sources: int, seed: int) -> np.ndarray:
    """Other prompts of the task, with another right label, going round the other places of the right option.

    Args:
        task: multiple choice.
        n_sources: sources a prompt.
        seed: of the draw.

    Returns:
        Indices of prompts, `[prompt source]`.

    Raises:
        ValueError: fewer than one source, or a prompt without one.
    """
    if n_sources < 1:
        raise ValueError(f"n_sources={n_sources}: each prompt needs at least one.")
    chosen = choice(task)
    right, n_options = chosen.right.cpu().numpy(), chosen.options.shape[1]
    answers = cast(Tensor, task.answers).cpu().numpy()
    rng = np.random.default_rng(seed)
    found = np.empty((len(task), n_sources), dtype=np.int64)
    for prompt in range(len(task)):
        for source in range(n_sources):
            # Round the other places, starting at another one for each prompt, so that few sources are balanced too.
            place = (right[prompt] + 1 + (prompt // n_options + source) % (n_options - 1)) % n_options
            fits = np.flatnonzero((right == place) & (answers != answers[prompt]))
            if not len(fits):
                raise ValueError(
                    f"task {task.name!r}: no prompt has its right option in place {place} and another right label than "
                    f"prompt {prompt}: give more prompts."
                )
            found[prompt, source] = rng.choice(fits)
    return found


class _Part(NamedTuple):
    """Some prompts, with what their nodes write and what those of their sources do; effects are means over sources."""

    model: Model
    steps: Program
    task: Task
    chosen: Choice
    nodes: Sequence[Node]
    final: Tensor
    seen: list[Activations]
    finals: list[Tensor]
    deltas: list[Tensor]

    def clean(self) -> Tensor:
        return self._right(self.final)

    def whole(self) -> Tensor:
        return self.clean() - torch.stack([self._right(other) for other in self.finals]).mean(0)

    def direct(self, sets: Tensor) -> Tensor:
        """Of each set of nodes, `[set node]` with 1 for a member: `[set batch]`."""
        wide = torch.promote_types(self.final.dtype, torch.float32)
        members = sets.to(self.final.device, wide)
        moved = [torch.einsum("sn,nbd->sbd", members, delta.to(wide)) for delta in self.deltas]
        after = torch.stack([self._right((self.final + move).to(self.final.dtype)) for move in moved])
        return self.clean() - after.mean(0)

    def total(self, sets: Sequence[Sequence[Node]]) -> Tensor:
        """Of each set of nodes: `[set batch]`."""
        read = candidates(self.chosen.end, self.chosen.options)
        after = []
        for seen in self.seen:
            cells = [[self._edit(node, seen) for node in nodes] for nodes in sets]
            logits = rerun(self.model, self.task.clean, cells, read, mask=self.task.mask, exact_path="rerun")
            after.append(of_right(logits, self.chosen.right))
        return self.clean() - torch.stack(after).mean(0)

    def _edit(self, node: Node, seen: Activations) -> Edit:
        if node.layer is None:
            return Edit("resid_pre", 0, pos=self.chosen.end, value=seen["resid_pre", 0])
        value = seen[node.component, node.layer]
        if node.head is not None:
            value = value[:, node.head]
        return Edit(node.component, node.layer, head=node.head, pos=self.chosen.end, value=value)

    @torch.no_grad()
    def _right(self, streams: Tensor) -> Tensor:
        return of_right(centred(self.steps.logits_of(streams, self.chosen.options)), self.chosen.right)


@torch.no_grad()
def _parts(
    model: Model, task: Task, sources: np.ndarray, wanted: Sequence[Node], n_runs: int, batch_size: int | None
) -> Iterator[_Part]:
    steps = program(model)
    for rows in batches(len(task), batch_size or prompts_at_once(model, task.clean.shape[1], n_runs)):
        part = task[rows]
        mine = _seen(steps, part)
        others = [_seen(steps, task[column]) for column in sources[rows].T]
        own = written(steps, mine, wanted)
        yield _Part(
            model, steps, part, choice(part), wanted, _final(steps, mine), others,
            [_final(steps, other) for other in others], [written(steps, other, wanted) - own for other in others],
        )  # fmt: skip


def _seen(steps: Program, task: Task) -> Activations:
    return _paths.seen_at(steps, task.clean, task.mask, choice(task).end)


def _final(steps: Program, seen: Activations) -> Tensor:
    return seen["resid_post", len(steps.layers) - 1]


def _outputs(steps: Program, task: Task, rows: slice, end: Tensor, wanted: Sequence[Node]) -> tuple[Tensor, Tensor]:
    """The final stream `[batch d_model]` and what each node writes `[node batch d_model]`."""
    seen = _paths.seen_at(steps, task.clean[rows], None if task.mask is None else task.mask[rows], end)
    return _final(steps, seen), written(steps, seen, wanted)


def _biases(steps: Program, like: Tensor) -> Tensor:
    """What attention's output biases write, `[batch d_model]`: they belong to no head."""
    none = like.new_zeros(len(like), steps.n_heads, steps.d_head)
    return torch.stack([steps.attn_out(layer, none) for layer in range(len(steps.layers))]).sum(0)


def _node(row: dict[str, object]) -> Node:
    layer, head = (None if pd.isna(cast(float, row[name])) else int(cast(int, row[name])) for name in ("layer", "head"))
    return Node(str(row["component"]), layer, head)


def _sizes(n: int) -> list[int]:
    sizes = list(range(1, min(n, 32) + 1))
    while sizes[-1] < n:
        sizes.append(min(n, round(1.25 * sizes[-1])))
    return sizes


def _fingerprint(model: Model) -> str:
    return str(model.provenance["model_fingerprint"])
