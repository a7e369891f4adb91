"""Do label words gather what the demonstrations say, and does the prediction read it there? In-context classification.

*Label Words are Anchors* (arXiv 2305.14160), for prompts with one demonstration a class and labels of a single token: a
task with positions "label_0", "label_1", ... (the label words of the demonstrations), "end" (where the answer is asked
for), answers, and options (the labels). Demonstration i belongs to `label_i` in every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.batching import batches
from interp.core.readout import Readout, readout
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._gradients import Prompts, Visit, forward, frozen, room
from interp.patching._inputs import numbers, provenance, require_decoder
from interp.tasks.task import Task

#: Text to label word, label word to the position that predicts, and all other pairs.
COMPONENTS = ("wp", "pq", "ww")

#: How many of the most probable tokens word loyalty compares.
_TOP = 5


def saliency(model: Model, task: Task, *, batch_size: int | None = None) -> Result:
    """How much information flows along which kind of attention edge, layer by layer.

    I_l = | sum over heads of A_lh * dL/dA_lh |, with L the cross-entropy of the answer at "end" (nats). With p_1 to p_C
    the label words and q the end, both counted from the prompt's first token:

        S_wp  mean of I_l(p_k, j) over j < p_k             n = sum of p_k
        S_pq  mean of I_l(q, p_k)                          n = C
        S_ww  mean of I_l(i, j) over the other j < i <= q  n = q (q + 1) / 2 - sum of p_k - C

    so that S_wp n + S_pq n + S_ww n is the sum of I_l below the diagonal.

    Args:
        model: a decoder.
        task: see the module; with answers.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a prompt, layer and kind: `prompt layer component value value_pairs`, component "wp", "pq" or
        "ww", `value_pairs` its n; unit "nats". Arrays: "value" `[prompt layer component]`; "saliency" and "signed"
        (before the absolute value) `[prompt layer q_pos k_pos]`.

    Raises:
        ValueError: no answers; label words that are missing, equal, or not before the end; an end that is not the last
            token; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: one forward and one backward pass, the attention of all layers in memory.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> from dataclasses import replace
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> named = {"label_0": task.positions["source"], "end": task.positions["end"]}
        >>> found = saliency(model, replace(task, positions=named))
        >>> found.grid("layer", "component").shape
        (2, 3)
    """
    labels = _labels(model, task)
    readout(model, task, "log_prob")  # refuses a task without answers
    steps, n_pos = program(model), task.clean.shape[1]
    parts = [_signed(model, steps, task[rows]) for rows in batches(len(task), batch_size or _at_once(model, n_pos))]
    signed = np.concatenate(parts)
    size = np.abs(signed)
    first, end = _bounds(task)
    p, q = labels.cpu().numpy() - first[:, None], end - first
    rows = np.arange(len(task))
    below = np.tril(np.ones((n_pos, n_pos), dtype=bool), -1)
    total = (size * below).sum((2, 3))
    to_labels = np.stack([(size * below)[rows, :, at].sum(-1) for at in labels.cpu().numpy().T]).sum(0)
    to_end = np.stack([size[rows, :, end, at] for at in labels.cpu().numpy().T]).sum(0)
    pairs = np.stack([p.sum(1), np.full(len(p), p.shape[1]), q * (q + 1) // 2 - p.sum(1) - p.shape[1]], 1)
    sums = np.stack([to_labels, to_end, total - to_labels - to_end], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums / pairs[:, None]
    prompt, layer, kind = np.indices(value.shape).reshape(3, -1)
    columns = {"prompt": prompt, "layer": layer, "component": np.array(COMPONENTS, dtype=object)[kind]}
    table = pd.DataFrame(columns | {"value": value.ravel(), "value_pairs": pairs[prompt, kind]})
    dims = ("prompt", "layer", "q_pos", "k_pos")
    arrays = {
        "value": (("prompt", "layer", "component"), value), "saliency": (dims, size), "signed": (dims, signed),
    }  # fmt: skip
    return Result("anchors.saliency", table, "nats", arrays=arrays, meta=provenance(model, task))


def isolation(
    model: Model, task: Task, *, layers: int = 5, draws: int = 5, seed: int = 0, batch_size: int | None = None
) -> Result:
    """Whether the model still says the same when label words cannot gather anything, in the first or the last layers.

    A_l(p, j) is set to 0 for all j < p, without renormalising the row, where p are the label words, or as many other
    positions at random (not the first token, which has nothing before it, and not the end).

    Args:
        model: a decoder.
        task: see the module; with options.
        layers: how many of the first, and of the last, layers.
        draws: random sets of positions; loyalties are averaged over them.
        seed: of the random positions; prompt i has its own draws from (seed, i).
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a prompt, kind and side: `prompt target component value value_words`, target "label" or
        "random", component "first" or "last"; value is label loyalty, 1 where the most probable option is as before;
        `value_words` is word loyalty, the Jaccard index of the five most probable tokens; unit "share".

    Raises:
        ValueError: no options; label words as for `saliency`; more layers than there are, or none; prompts with too few
            other positions; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: 3 + 2 draws forward passes.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> from dataclasses import replace
        >>> import torch
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> named = {"label_0": task.positions["source"], "end": task.positions["end"]}
        >>> options = torch.stack([task.wrong, task.answers], 1)
        >>> found = isolation(model, replace(task, positions=named, options=options), layers=1)
        >>> found.grid("target", "component").shape
        (2, 2)
    """
    labels = _labels(model, task)
    _require_options(task)
    if not 1 <= layers <= model.n_layers:
        raise ValueError(f"layers={layers}, but {model.name} has {model.n_layers}: take 1 to {model.n_layers}.")
    if draws < 1:
        raise ValueError(f"draws={draws}: take at least 1.")
    random = _elsewhere(task, labels, draws, seed)
    steps = program(model)
    sides = {"first": range(layers), "last": range(model.n_layers - layers, model.n_layers)}
    kinds = {"label": [labels], "random": list(random.unbind(1))}
    rows = []
    for cut in batches(len(task), batch_size or _at_once(model, task.clean.shape[1])):
        part = task[cut]
        before = _logits(model, steps, part)
        for target, sets in kinds.items():
            for component, where in sides.items():
                after = [_logits(model, steps, part, _isolating(chosen[cut]), where) for chosen in sets]
                loyal = np.mean([_loyalty(part, before, logits) for logits in after], axis=0)
                rows += [
                    (cut.start + i, target, component, float(one), float(words)) for i, (one, words) in enumerate(loyal)
                ]
    table = pd.DataFrame(rows, columns=["prompt", "target", "component", "value", "value_words"])
    table = table.sort_values("prompt", kind="stable", ignore_index=True)
    meta = provenance(model, task, layers=layers, draws=draws, seed=seed)
    return Result("anchors.isolation", table, "share", meta=meta)


def reweighted(
    model: Model, task: Task, betas: Float[Tensor, "layer head label"], *, batch_size: int | None = None
) -> Result:
    """The prediction with attention from the end to each label word scaled, A'(q, p_i) = exp(beta_i) A(q, p_i).

    One beta a layer, head and label word; rows are not renormalised.

    Args:
        model: a decoder.
        task: see the module; with answers and options.
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
    labels = _labels(model, task)
    answers, options = _require_options(task, answers=True)
    shape = (model.n_layers, model.n_heads, labels.shape[1])
    if tuple(betas.shape) != shape:
        raise ValueError(f"betas are {tuple(betas.shape)}; one for each layer, head and label word is {shape}.")
    steps, found = program(model), []
    for cut in batches(len(task), batch_size or _at_once(model, task.clean.shape[1])):
        found.append(_logits(model, steps, task[cut], _scaling(task[cut], labels[cut], betas.to(model.device))))
    logits = torch.cat(found).double()
    chosen = logits.gather(1, options)
    right = options.gather(1, chosen.argmax(1, keepdim=True))[:, 0] == answers
    log_prob = logits.log_softmax(-1).gather(1, answers[:, None])[:, 0]
    table = pd.DataFrame({"prompt": range(len(task)), "value": numbers(right), "value_log_prob": numbers(log_prob)})
    arrays = {"logits": (("prompt", "option"), numbers(chosen))}
    return Result("anchors.reweighted", table, "share", arrays=arrays, meta=provenance(model, task))


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
        ValueError: no answers or options; label words as for `saliency`; no epochs; no decoder.
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
    labels = _labels(model, task)
    _require_options(task, answers=True)
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
            loss = _loss(model, steps, part, _scaling(part, labels[prompt : prompt + 1], betas)).sum()
            loss.backward()
            optimiser.step()
            rows.append((len(rows), prompt, float(loss.detach())))
    learned = betas.detach()
    table = pd.DataFrame(rows, columns=["step", "prompt", "value"])
    meta = provenance(model, task, lr=lr, epochs=epochs, seed=seed)
    arrays = {"beta": (("layer", "head", "label"), numbers(learned))}
    return learned, Result("anchors.train", table, "nats", arrays=arrays, meta=meta)


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


def _isolating(chosen: Tensor) -> Visit:
    """Nothing before a position reaches it by attention."""

    def visit(site: str, layer: int, pattern: Tensor) -> Tensor:
        index = torch.arange(pattern.shape[-1], device=pattern.device)
        cut = (index[None, :, None] == chosen[:, None, :]).any(-1)  # [batch q_pos]
        return pattern.masked_fill((cut[:, :, None] & (index[None, :] < index[:, None]))[:, None], 0.0)

    return visit


@torch.no_grad()
def _logits(
    model: Model, steps: Program, part: Task, visit: Visit | None = None, layers: Sequence[int] | None = None
) -> Tensor:
    """Logits at the end, `[batch d_vocab]`, of a run whose patterns a function changes in some layers (None: all)."""
    read = Readout("logits", "logits", part.positions["end"], None, lambda logits, rows: logits)
    return forward(model, steps, Prompts(part.clean, part.mask, read), visit or _unchanged, _patterns(model, layers))


def _loss(model: Model, steps: Program, part: Task, visit: Visit) -> Tensor:
    """Cross-entropy of the answers, `[batch]`."""
    read = readout(model, part, "log_prob")
    return -forward(model, steps, Prompts(part.clean, part.mask, read), visit, _patterns(model, None))


def _patterns(model: Model, layers: Sequence[int] | None) -> set[tuple[str, int]]:
    return {("pattern", layer) for layer in (range(model.n_layers) if layers is None else layers)}


def _unchanged(site: str, layer: int, activation: Tensor) -> Tensor:
    return activation


def _signed(model: Model, steps: Program, part: Task) -> np.ndarray:
    """Sum over heads of A * dL/dA, `[prompt layer q_pos k_pos]`."""
    patterns: list[Tensor] = []

    def visit(site: str, layer: int, pattern: Tensor) -> Tensor:
        patterns.append(pattern if pattern.requires_grad else pattern.detach().requires_grad_())
        return patterns[-1]

    with frozen(model), torch.enable_grad():
        loss = _loss(model, steps, part, visit).sum()
        gradients = torch.autograd.grad(loss, patterns)
    flows = [(a.double() * g.double()).sum(1) for a, g in zip(patterns, gradients, strict=True)]
    return numbers(torch.stack(flows, 1))


def _loyalty(part: Task, before: Tensor, after: Tensor) -> list[tuple[float, float]]:
    """(label loyalty, word loyalty) of each prompt."""
    assert part.options is not None
    same = before.gather(1, part.options).argmax(1) == after.gather(1, part.options).argmax(1)
    tops = [logits.topk(min(_TOP, logits.shape[1])).indices.tolist() for logits in (before, after)]
    words = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(*tops, strict=True)]
    return list(zip(same.double().tolist(), words, strict=True))


def _elsewhere(task: Task, labels: Tensor, draws: int, seed: int) -> Tensor:
    """Random positions `[batch draw label]`, neither label words nor the first token nor the end."""
    found = []
    for row, (first, end) in enumerate(zip(*(bound.tolist() for bound in _bounds(task)), strict=True)):
        others = sorted(set(range(first + 1, end)) - set(labels[row].tolist()))
        if len(others) < labels.shape[1]:
            raise ValueError(
                f"task {task.name!r}, prompt {row}: {len(others)} positions are neither first, label word nor end, and "
                f"{labels.shape[1]} are drawn for comparison: take longer prompts."
            )
        rng = np.random.default_rng([seed, row])
        found.append([rng.choice(others, labels.shape[1], replace=False) for _ in range(draws)])
    return torch.as_tensor(np.array(found), device=labels.device)


def _bounds(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """First token after the padding and the end of each prompt."""
    first = np.zeros(len(task), dtype=int) if task.mask is None else task.mask.long().argmax(1).cpu().numpy()
    return first, task.positions["end"].cpu().numpy()


def _at_once(model: Model, n_pos: int) -> int:
    return max(1, room(model, n_pos) // n_pos)


def _require_options(task: Task, *, answers: bool = False) -> tuple[Tensor, Tensor]:
    if task.options is None or (answers and task.answers is None):
        raise ValueError(
            f"task {task.name!r} needs {'answers and ' if answers else ''}options, the token ids of the labels: give "
            "options=`[batch option]` (and answers=`[batch]`) when you make it."
        )
    return (task.answers if task.answers is not None else task.options[:, 0]), task.options


def _labels(model: Model, task: Task) -> Tensor:
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
    first = torch.as_tensor(_bounds(task)[0], device=labels.device)
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
