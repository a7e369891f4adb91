"""What do the files on label words share? Their positions, the run's logits at the end, and loyalty to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from interp.core.readout import Readout, readout
from interp.models.model import Model
from interp.models.program import Program
from interp.patching._gradients import Prompts, Visit, forward, room
from interp.patching._inputs import require_decoder
from interp.tasks.task import Task

#: How many of the most probable tokens word loyalty compares.
_TOP = 5


def at_once(model: Model, n_pos: int) -> int:
    """Prompts that fit into a forward pass."""
    return max(1, room(model, n_pos) // n_pos)


def require_options(task: Task, *, answers: bool = False) -> tuple[Tensor, Tensor]:
    """(answers, options) of a task that has them."""
    if task.options is None or (answers and task.answers is None):
        raise ValueError(
            f"task {task.name!r} needs {'answers and ' if answers else ''}options, the token ids of the labels: give "
            "options=`[batch option]` (and answers=`[batch]`) when you make it."
        )
    return (task.answers if task.answers is not None else task.options[:, 0]), task.options


def label_positions(model: Model, task: Task) -> Tensor:
    """Positions of the label words `[batch label]`, on the task's device."""
    require_decoder(model)
    names = [name for i in range(len(task.positions)) if (name := f"label_{i}") in task.positions]
    stray = [name for name in task.positions if name.startswith("label_") and name not in names]
    if not names or stray or names[-1] != f"label_{len(names) - 1}" or "end" not in task.positions:
        raise ValueError(
            f"task {task.name!r} has positions {', '.join(sorted(task.positions))}; it needs 'end' and the label words "
            "of the demonstrations as 'label_0', 'label_1', ... without a gap."
        )
    labels, end = torch.stack([task.positions[name] for name in names], 1), task.positions["end"]
    first = torch.as_tensor(bounds(task)[0], device=labels.device)
    ordered = labels.sort(1).values
    refused = (ordered[:, 1:] == ordered[:, :-1]).any(1) | (labels >= end[:, None]).any(1)
    refused |= (labels < first[:, None]).any(1) | (end != task.clean.shape[1] - 1)
    if bool(refused.any()):
        row = int(refused.nonzero()[0])
        raise ValueError(
            f"task {task.name!r}, prompt {row}: label words at {labels[row].tolist()} and end {int(end[row])}. Label "
            f"words are different tokens of the prompt, before the end, and the end is its last token."
        )
    return labels


def bounds(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """First token after the padding and the end of each prompt."""
    first = np.zeros(len(task), dtype=int) if task.mask is None else task.mask.long().argmax(1).cpu().numpy()
    return first, task.positions["end"].cpu().numpy()


def elsewhere(task: Task, named: Tensor, count: int, until: Tensor, draws: int, seed: int) -> Tensor:
    """Random positions `[batch draw count]` before `until`, none of those named `[batch k]` and not the first token."""
    found = []
    for row, (first, end) in enumerate(zip(bounds(task)[0].tolist(), until.tolist(), strict=True)):
        others = sorted(set(range(first + 1, end)) - set(named[row].tolist()))
        if len(others) < count:
            raise ValueError(
                f"task {task.name!r}, prompt {row}: {len(others)} positions before {end} have no name and are not the "
                f"first, and {count} are drawn for comparison: take longer prompts."
            )
        rng = np.random.default_rng([seed, row])
        found.append([rng.choice(others, count, replace=False) for _ in range(draws)])
    return torch.as_tensor(np.array(found), device=named.device)


def classes(task: Task, labels: Tensor) -> Tensor:
    """Index of the option that each label word is, `[label]`, the same in every prompt."""
    _, options = require_options(task)
    words = task.clean.gather(1, labels)
    same = words[:, :, None] == options[:, None, :]  # [batch label option]
    refused = ~same.any(-1).all(-1) | (same != same[:1]).flatten(1).any(1) | (options != options[:1]).any(1)
    if bool(refused.any()):
        row = int(refused.nonzero()[0])
        raise ValueError(
            f"task {task.name!r}, prompt {row}: its label words are tokens {words[row].tolist()} and its options "
            f"{options[row].tolist()}. All prompts need the same options, and label_i the same one of them in each."
        )
    return same[0].long().argmax(-1)


def loyalty(part: Task, before: Tensor, after: Tensor) -> list[tuple[float, float]]:
    """(label loyalty, word loyalty) of each prompt."""
    assert part.options is not None
    same = before.gather(1, part.options).argmax(1) == after.gather(1, part.options).argmax(1)
    tops = [logits.topk(min(_TOP, logits.shape[1])).indices.tolist() for logits in (before, after)]
    words = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(*tops, strict=True)]
    return list(zip(same.double().tolist(), words, strict=True))


@torch.no_grad()
def logits_at_end(
    model: Model, steps: Program, part: Task, visit: Visit | None = None, layers: Sequence[int] | None = None
) -> Tensor:
    """Logits at the end, `[batch d_vocab]`, of a run whose patterns a function changes in some layers (None: all)."""
    read = Readout("logits", "logits", part.positions["end"], None, lambda logits, rows: logits)
    return forward(model, steps, Prompts(part.clean, part.mask, read), visit or _unchanged, _patterns(model, layers))


def answer_loss(model: Model, steps: Program, part: Task, visit: Visit) -> Tensor:
    """Cross-entropy of the answers, `[batch]`."""
    read = readout(model, part, "log_prob")
    return -forward(model, steps, Prompts(part.clean, part.mask, read), visit, _patterns(model, None))


def _patterns(model: Model, layers: Sequence[int] | None) -> set[tuple[str, int]]:
    return {("pattern", layer) for layer in (range(model.n_layers) if layers is None else layers)}


def _unchanged(site: str, layer: int, activation: Tensor) -> Tensor:
    return activation
