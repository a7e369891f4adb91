"""Do label words gather what the demonstrations say, and does the prediction read it there? In-context classification.

*Label Words are Anchors* (arXiv 2305.14160), for prompts with one demonstration a class and labels of a single token: a
task with positions "label_0", "label_1", ... (the label words of the demonstrations), "end" (where the answer is asked
for), answers, and options (the labels). Demonstration i belongs to `label_i` in every prompt.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from interp.core.batching import batches
from interp.core.readout import readout
from interp.core.registry import method
from interp.core.result import Result
from interp.flow._labels import (
    answer_loss,
    at_once,
    bounds,
    classes,
    elsewhere,
    label_positions,
    logits_at_end,
    loyalty,
    require_options,
)  # fmt: skip
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._gradients import Visit, frozen
from interp.patching._inputs import numbers, provenance
from interp.tasks.task import Task

#: Text to label word, label word to the position that predicts, and all other pairs.
COMPONENTS = ("wp", "pq", "ww")


@method(name="Label-word saliency", paper="arXiv:2305.14160", notebook="label_anchors")
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
    labels = label_positions(model, task)
    readout(model, task, "log_prob")  # refuses a task without answers
    steps, n_pos = program(model), task.clean.shape[1]
    parts = [_signed(model, steps, task[rows]) for rows in batches(len(task), batch_size or at_once(model, n_pos))]
    signed = np.concatenate(parts)
    size = np.abs(signed)
    first, end = bounds(task)
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


@method(name="Label words: isolation test", paper="arXiv:2305.14160", notebook="label_anchors")
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
    labels = label_positions(model, task)
    require_options(task)
    if not 1 <= layers <= model.n_layers:
        raise ValueError(f"layers={layers}, but {model.name} has {model.n_layers}: take 1 to {model.n_layers}.")
    if draws < 1:
        raise ValueError(f"draws={draws}: take at least 1.")
    random = elsewhere(task, labels, labels.shape[1], task.positions["end"], draws, seed)
    steps = program(model)
    sides = {"first": range(layers), "last": range(model.n_layers - layers, model.n_layers)}
    kinds = {"label": [labels], "random": list(random.unbind(1))}
    rows = []
    for cut in batches(len(task), batch_size or at_once(model, task.clean.shape[1])):
        part = task[cut]
        before = logits_at_end(model, steps, part)
        for target, sets in kinds.items():
            for component, where in sides.items():
                after = [logits_at_end(model, steps, part, _isolating(chosen[cut]), where) for chosen in sets]
                loyal = np.mean([loyalty(part, before, logits) for logits in after], axis=0)
                rows += [
                    (cut.start + i, target, component, float(one), float(words)) for i, (one, words) in enumerate(loyal)
                ]
    table = pd.DataFrame(rows, columns=["prompt", "target", "component", "value", "value_words"])
    table = table.sort_values("prompt", kind="stable", ignore_index=True)
    meta = provenance(model, task, layers=layers, draws=draws, seed=seed)
    return Result("anchors.isolation", table, "share", meta=meta)


@method(name="Label words: attention as a score (AUCROC)", paper="arXiv:2305.14160", notebook="label_anchors")
def aucroc(model: Model, task: Task, *, batch_size: int | None = None) -> Result:
    """How well the attention of the end to the label words tells what the model will say, layer by layer.

    A_l(q, p_i), the mean over heads of the attention from the end to the label word of class i, is the score for "the
    model's most probable option is i". AUC_l is the area under the curve of true against false positives over the
    prompts, mean over classes. R_l is the sum of AUC - 1/2 up to layer l, over that of all layers.

    Args:
        model: a decoder.
        task: see the module; with options, the same ones in every prompt.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a layer: `layer value value_cumulative`, AUC_l and R_l; unit "AUCROC". Arrays: "auc" `[layer
        option]`, NaN for an option that all prompts or none are given; "attention" `[prompt layer option]`, where an
        option has several label words their sum; "predicted" `[prompt]`, an index of the options.

    Raises:
        ValueError: no options, or other ones in another prompt; label words that are not options; label words as for
            `saliency`; a model that says the same of all prompts; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: one forward pass.

    Example:
        >>> from interp.models import toy
        >>> model, tokens = toy.random("llama"), toy.random_tokens(toy.random("llama"), 8, 9)
        >>> tokens[:, 3], tokens[:, 6] = 10, 20
        >>> places = {name: torch.full((8,), at) for name, at in (("label_0", 3), ("label_1", 6), ("end", 8))}
        >>> options = torch.tensor([[10, 20]] * 8)
        >>> task = Task("drawn", tuple("abcdefgh"), tokens, "drawn", options=options, positions=places)
        >>> found = aucroc(model, task)
        >>> found.arrays["attention"][1].shape, found.table["value"].between(0, 1).all().item()
        ((8, 3, 2), True)
    """
    labels = label_positions(model, task)
    _, options = require_options(task)
    of_class, steps = classes(task, labels), program(model)
    cuts = batches(len(task), batch_size or at_once(model, task.clean.shape[1]))
    logits, attention = zip(*(_to_labels(model, steps, task[cut], labels[cut]) for cut in cuts), strict=True)
    words = numbers(torch.cat(attention))
    found = np.stack([words[:, :, numbers(of_class) == i].sum(-1) for i in range(options.shape[1])], -1)
    chosen = torch.cat(logits).gather(1, options).argmax(1).cpu().numpy()
    auc = np.stack([_area(found[:, :, i], chosen == i) for i in range(options.shape[1])], -1)
    if np.isnan(auc).all():
        raise ValueError(
            f"{model.name} says the same of all {len(task)} prompts of task {task.name!r}, and no score can tell them "
            "apart: take more prompts, or others."
        )
    value = np.nanmean(auc, 1)
    table = pd.DataFrame({"layer": range(len(value)), "value": value})
    table["value_cumulative"] = (value - 0.5).cumsum() / (value - 0.5).sum()
    arrays = {
        "auc": (("layer", "option"), auc), "attention": (("prompt", "layer", "option"), found),
        "predicted": (("prompt",), chosen),
    }  # fmt: skip
    return Result("anchors.aucroc", table, "AUCROC", arrays=arrays, meta=provenance(model, task))


def _to_labels(model: Model, steps: Program, part: Task, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the end, and the mean over heads of its attention to the label words `[prompt layer label]`."""
    rows, end = torch.arange(len(part), device=labels.device)[:, None], part.positions["end"][:, None]
    layers: list[Tensor] = []

    def visit(site: str, layer: int, pattern: Tensor) -> Tensor:
        layers.append(pattern[rows, :, end, labels].double().mean(-1))
        return pattern

    return logits_at_end(model, steps, part, visit), torch.stack(layers, 1)


def _area(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Share of pairs of a positive and a negative row `[prompt layer]` whose scores are in order; a tie is half one."""
    n, others = positive.sum(), (~positive).sum()
    if not n or not others:
        return np.full(scores.shape[1], np.nan)
    return (rankdata(scores, axis=0)[positive].sum(0) - n * (n + 1) / 2) / (n * others)


def _isolating(chosen: Tensor) -> Visit:
    """Nothing before a position reaches it by attention."""

    def visit(site: str, layer: int, pattern: Tensor) -> Tensor:
        index = torch.arange(pattern.shape[-1], device=pattern.device)
        cut = (index[None, :, None] == chosen[:, None, :]).any(-1)  # [batch q_pos]
        return pattern.masked_fill((cut[:, :, None] & (index[None, :] < index[:, None]))[:, None], 0.0)

    return visit


def _signed(model: Model, steps: Program, part: Task) -> np.ndarray:
    """Sum over heads of A * dL/dA, `[prompt layer q_pos k_pos]`."""
    patterns: list[Tensor] = []

    def visit(site: str, layer: int, pattern: Tensor) -> Tensor:
        patterns.append(pattern if pattern.requires_grad else pattern.detach().requires_grad_())
        return patterns[-1]

    with frozen(model), torch.enable_grad():
        loss = answer_loss(model, steps, part, visit).sum()
        gradients = torch.autograd.grad(loss, patterns)
    flows = [(a.double() * g.double()).sum(1) for a, g in zip(patterns, gradients, strict=True)]
    return numbers(torch.stack(flows, 1))
