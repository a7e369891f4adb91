"""What do the methods of multiple choice share? Options, where they stand, and what each node writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from interp.core.edits import Activations
from interp.models.program import Program
from interp.patching._inputs import where
from interp.patching._nodes import Node
from interp.tasks.task import Task


class Choice(NamedTuple):
    """The options of each prompt.

    `options` are the label tokens `[batch option]`, `right` the index of the right one `[batch]`, `end` the position
    that answers `[batch]`.
    """

    options: Tensor
    right: Tensor
    end: Tensor


def choice(task: Task) -> Choice:
    """The options of a multiple-choice task.

    Args:
        task: with answers, options and the position "end".

    Returns:
        The Choice.

    Raises:
        ValueError: what the task lacks.
    """
    if task.options is None or task.answers is None:
        raise ValueError(
            f"task {task.name!r} has no {'options' if task.options is None else 'answers'}: use a task of multiple "
            "choice, for example interp.tasks.multiple_choice(model, 64)."
        )
    right = (task.options == task.answers[:, None]).long().argmax(1)
    return Choice(task.options, right, cast(Tensor, where(task, "end")))


def places(task: Task, prefix: str) -> Tensor:
    """Where each option's label or content stands.

    Args:
        task: multiple choice.
        prefix: "label" or "content", the positions "label_0", "label_1", ...

    Returns:
        `[batch option]`.

    Raises:
        ValueError: a position that the task does not name, or that lies after the position "end".
    """
    options, _, end = choice(task)
    found = torch.stack([cast(Tensor, where(task, f"{prefix}_{i}")) for i in range(options.shape[1])], 1)
    if bool((found > end[:, None]).any()):
        prompt = int((found > end[:, None]).any(1).nonzero()[0])
        raise ValueError(f"prompt {task.prompts[prompt]!r}: a {prefix} stands after the position 'end', which asks.")
    return found


def written(steps: Program, seen: Activations, nodes: Sequence[Node]) -> Tensor:
    """What nodes write into the residual stream at one position.

    Args:
        steps: of the model.
        seen: {(site, layer): `[batch ...]`}, as `interp.patching._paths.seen_at` gives them.
        nodes: heads ("z"), MLPs and the embedding.

    Returns:
        `[node batch d_model]`. Attention's output bias belongs to no head and is not in it.
    """
    maps = {layer: steps.w_o(layer) for node in nodes if node.component == "z" and (layer := node.layer) is not None}
    found = []
    for node in nodes:
        if node.component == "embed":
            found.append(seen["resid_pre", 0])
        elif node.component == "mlp_out":
            found.append(seen["mlp_out", cast(int, node.layer)])
        else:
            found.append(seen["z", cast(int, node.layer)][:, node.head] @ maps[cast(int, node.layer)][node.head])
    return torch.stack(found)


def centred(logits: Tensor) -> Tensor:
    """Logits of the options `[... option]` less their mean: their common level means nothing."""
    wide = logits.float()
    return wide - wide.mean(-1, keepdim=True)


def of_right(values: Tensor, right: Tensor) -> Tensor:
    """The value of the right option `[... batch]`, from `[... batch option]` and its index `[batch]`."""
    return values.gather(-1, right[:, None].expand(*values.shape[:-1], 1)).squeeze(-1)
