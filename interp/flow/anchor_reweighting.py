"""Does the prediction become better when the end reads other label words more? Trained scales of its attention to them.

Anchor re-weighting of *Label Words are Anchors* (arXiv 2305.14160), for the tasks that `interp.flow.anchors` describes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.flow._labels import answer_loss, at_once, label_positions, logits_at_end, require_options
from interp.models.model import Model
from interp.models.program import program
from interp.patching._gradients import Visit, frozen
from interp.patching._inputs import numbers, provenance
from interp.tasks.task import Task


@method(name="Anchor re-weighting: prediction", paper="arXiv:2305.14160", notebook="label_anchors")
def reweighted(
    model: Model, task: Task, betas: Float[Tensor, "layer head label"], *, batch_size: int | None = None
) -> Result:
    """The prediction with attention from the end to each label word scaled, A'(q, p_i) = exp(beta_i) A(q, p_i).

    One beta a layer, head and label word; rows are not renormalised.

    Args:
        model: a decoder.
        task: see `interp.flow.anchors`; with answers and options.
        betas: 0 leaves the model as it is.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a prompt: `prompt value value_log_prob`: 1 where the most probable option is the answer, and the
        answer's log-probability over the whole vocabulary (nats); unit "share". Array "logits" `[prompt option]`.

    Raises:
        ValueError: as `train`; betas of another shape.

    Cost: one forward pass.

    Example:
        >>> import torch
        >>> from dataclasses import replace
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> named = {"label_0": task.positions["source"], "end": task.positions["end"]}
        >>> task = replace(task, positions=named, options=torch.stack([task.wrong, task.answers], 1))
        >>> betas = torch.zeros(model.n_layers, model.n_heads, 1)
        >>> [reweighted(model, task, betas - off).table["value"].mean().item() for off in (0, 50)]
        [1.0, 0.0]
    """
    labels = label_positions(model, task)
    answers, options = require_options(task, answers=True)
    shape = (model.n_layers, model.n_heads, labels.shape[1])
    if tuple(betas.shape) != shape:
        raise ValueError(f"betas are {tuple(betas.shape)}; one for each layer, head and label word is {shape}.")
    steps, found = program(model), []
    for cut in batches(len(task), batch_size or at_once(model, task.clean.shape[1])):
        found.append(logits_at_end(model, steps, task[cut], _scaling(task[cut], labels[cut], betas.to(model.device))))
    logits = torch.cat(found).double()
    chosen = logits.gather(1, options)
    right = options.gather(1, chosen.argmax(1, keepdim=True))[:, 0] == answers
    log_prob = logits.log_softmax(-1).gather(1, answers[:, None])[:, 0]
    table = pd.DataFrame({"prompt": range(len(task)), "value": numbers(right), "value_log_prob": numbers(log_prob)})
    arrays = {"logits": (("prompt", "option"), numbers(chosen))}
    return Result("anchor_reweighting.reweighted", table, "share", arrays=arrays, meta=provenance(model, task))


@method(name="Anchor re-weighting: training", paper="arXiv:2305.14160", notebook="label_anchors")
def train(
    model: Model, task: Task, *, lr: float = 0.1, epochs: int = 10, seed: int = 0
) -> tuple[Float[Tensor, "layer head label"], Result]:
    """Learn the betas of `reweighted` on labelled examples: Adam, one example a step, from 0, the model frozen.

    Args:
        model: a decoder; its weights do not change.
        task: examples, each with the demonstrations before it; with answers and options.
        lr: learning rate.
        epochs: how often each example is seen.
        seed: of the order.

    Returns:
        The betas, and a Result with one row a step: `step prompt value`, the cross-entropy of the answer (nats) before
        the step. Array "beta" `[layer head label]`.

    Raises:
        ValueError: no answers or options; label words as for `anchors.saliency`; no epochs; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: a forward and a backward pass an example and epoch.

    Example:
        >>> import torch
        >>> from dataclasses import replace
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> named = {"label_0": task.positions["source"], "end": task.positions["end"]}
        >>> task = replace(task, positions=named, options=torch.stack([task.wrong, task.answers], 1))
        >>> betas, steps = train(model, task, epochs=2)
        >>> tuple(betas.shape), len(steps.table)
        ((2, 2, 1), 8)
    """
    labels = label_positions(model, task)
    require_options(task, answers=True)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: take at least 1.")
    steps = program(model)
    betas = torch.zeros(model.n_layers, model.n_heads, labels.shape[1], device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([betas], lr=lr)
    order = np.random.default_rng(seed)
    rows: list[tuple[int, int, float]] = []
    with frozen(model), torch.enable_grad():
        for prompt in (int(i) for _ in range(epochs) for i in order.permutation(len(task))):
            optimiser.zero_grad()
            part = task[prompt : prompt + 1]
            loss = answer_loss(model, steps, part, _scaling(part, labels[prompt : prompt + 1], betas)).sum()
            loss.backward()
            optimiser.step()
            rows.append((len(rows), prompt, float(loss.detach())))
    learned = betas.detach()
    table = pd.DataFrame(rows, columns=["step", "prompt", "value"])
    meta = provenance(model, task, lr=lr, epochs=epochs, seed=seed)
    arrays = {"beta": (("layer", "head", "label"), numbers(learned))}
    return learned, Result("anchor_reweighting.train", table, "nats", arrays=arrays, meta=meta)


def _scaling(part: Task, labels: Tensor, betas: Tensor) -> Visit:
    """Scales attention from the end to the label words."""
    rows, end = torch.arange(len(part), device=labels.device), part.positions["end"]

    def visit(site: str, layer: int, pattern: Tensor) -> Tensor:
        factor = torch.ones_like(pattern, dtype=betas.dtype)
        for which, at in enumerate(labels.unbind(1)):
            factor = factor.index_put((rows[:, None], torch.arange(pattern.shape[1], device=rows.device)[None],
                                       end[:, None], at[:, None]), betas[layer, :, which].exp()[None])  # fmt: skip
        return (pattern * factor).to(pattern.dtype)

    return visit
