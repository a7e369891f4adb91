"""What is read off a forward pass? A number for each prompt, from the logits at one position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from interp.core import metrics
from interp.models.hooks import run
from interp.models.model import Model
from interp.tasks.task import Task

#: Metrics that `readout` knows by name.
METRICS = ("logit_diff", "log_prob", "prob", "kl")


@dataclass(frozen=True)
class Readout:
    """A metric over the prompts of one batch.

    Attributes:
        name: what is read, for example "logit_diff".
        unit: its unit.
        where: position that is read, for each prompt `[batch]`.
        tokens: the only token ids whose logits are needed `[batch k]`, or None for all; a few cost far less than all.
        score: from logits `[rows k]` (or `[rows d_vocab]`) and the prompt of each row `[rows]` to numbers `[rows]` (or
            `[rows n]`). Rows are any number of changed runs of these prompts.
    """

    name: str
    unit: str
    where: Tensor
    tokens: Tensor | None
    score: Callable[[Tensor, Tensor], Tensor]

    def of(self, logits: Tensor) -> Tensor:
        """The numbers of one run of every prompt, from whole logits `[batch pos d_vocab]`."""
        rows = torch.arange(len(logits), device=logits.device)
        at = logits[rows, self.where.to(logits.device)]
        if self.tokens is not None:
            at = at.gather(-1, self.tokens.to(logits.device))
        return self.score(at, rows)


def readout(model: Model, task: Task, metric: str | Readout = "logit_diff") -> Readout:
    """The metric of that name over a task's prompts, read at their position "end" (else the last).

    Args:
        model: for the clean reference of "kl".
        task: with answers; "logit_diff" needs wrong answers too.
        metric: "logit_diff" (answer minus wrong answer, logits), "log_prob" (of the answer, nats), "prob" (of the
            answer), "kl" (from the clean run's prediction, nats), or a Readout, which is returned as it is.

    Returns:
        A Readout for this batch of prompts.

    Raises:
        ValueError: for an unknown metric, or a task without what it needs.
    """
    if isinstance(metric, Readout):
        return metric
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not known; use one of {', '.join(METRICS)}, or a Readout.")
    if task.answers is None and metric != "kl":
        raise ValueError(
            f"task {task.name!r} has no answers, which {metric!r} reads: use metric='kl', or another task."
        )
    where = task.positions.get("end", torch.full((len(task),), task.clean.shape[1] - 1, device=task.clean.device))
    if metric == "logit_diff":
        if task.wrong is None:
            raise ValueError(
                f"task {task.name!r} has no wrong answers, which 'logit_diff' reads: use metric='log_prob'."
            )
        pair = torch.stack([task.answers, task.wrong], 1)  # type: ignore[list-item]
        return Readout("logit_diff", "logits", where, pair, _difference)
    if metric == "kl":
        with torch.no_grad():
            clean = run(model, task.clean, mask=task.mask).logits
        reference = clean[torch.arange(len(task), device=clean.device), where.to(clean.device)]
        return Readout("kl", "nats", where, None, lambda logits, rows: metrics.kl(logits, reference[rows]))
    answers = task.answers
    assert answers is not None

    def log_prob(logits: Tensor, rows: Tensor) -> Tensor:
        return metrics.log_prob(logits, answers.to(logits.device)[rows])

    if metric == "prob":
        return Readout("prob", "probability", where, None, lambda logits, rows: log_prob(logits, rows).exp())
    return Readout("log_prob", "nats", where, None, log_prob)


def candidates(where: Tensor, tokens: Tensor) -> Readout:
    """The logits of a few tokens themselves, `[batch k]`, centred over them (a logit's level means nothing).

    Args:
        where: position that is read, `[batch]`.
        tokens: token ids `[batch k]`.

    Returns:
        A Readout whose numbers are `[rows k]`, in logits.
    """
    return Readout("candidates", "logits", where, tokens, lambda logits, rows: logits - logits.mean(-1, keepdim=True))


def some(read: Readout, rows: slice | Tensor) -> Readout:
    """The Readout of some of the prompts.

    Args:
        read: of a batch.
        rows: which prompts of it.

    Returns:
        A Readout of those prompts only.
    """
    index = torch.arange(len(read.where), device=read.where.device)[rows]
    return replace(
        read,
        where=read.where[index],
        tokens=None if read.tokens is None else read.tokens[index],
        score=lambda logits, own: read.score(logits, index.to(own.device)[own]),
    )


def _difference(logits: Tensor, rows: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide[:, 0] - wide[:, 1]
