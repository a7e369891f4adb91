"""What kind of output node is a head? Tests of the classes of arXiv:2307.09458, with bars fixed in advance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.circuits._choice import centred, choice, places
from interp.circuits.evidence import attention_rows
from interp.circuits.output_nodes import attribution, ranked
from interp.core.batching import batches
from interp.core.registry import method
from interp.core.rerun import trace
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching import _paths
from interp.patching._inputs import numbers, provenance
from interp.patching._runs import prompts_at_once
from interp.tasks.task import Task

#: Classes of output heads, in the order in which they are tried, then those of other heads.
CLASSES = ("correct letter", "single letter", "amplification", "uniform", "constant", "other output",
           "content gatherer", "none")  # fmt: skip

#: An output head's effects on the labels have at least this share of the size of the centred logits.
MATERIAL = 0.05
#: A gatherer's total effect is at least this share of the effect of all nodes ...
GATHERED = 0.1
#: ... and its direct effect at most this share of its total effect.
INDIRECT = 1 / 3
#: Share of the prompts on which something has to be so.
MOST = 0.7
#: Least attention on the labels, or on the contents, for a head that is said to read them.
READS = 0.3
#: One letter that has this share of the rises of all makes a head a single-letter head.
SINGLE = 0.6
#: Least share of the effects that is the same whatever is right, in a constant head.
CONSTANT = 0.5
#: Least entropy of the attention over the labels, as a share of the largest, in a uniform head.
EVEN = 0.9
#: Least attention on the tokens after the options in an amplification head.
LATE = 0.5


@method(name="Classes of output heads", paper="arXiv:2307.09458", notebook="mcq_at_scale")
def classify(model: Model, task: Task, found: Result, *, batch_size: int | None = None) -> Result:
    """Of which class each head is, with the evidence.

    All is measured at the position "end". D[p, k] is a head's net direct effect on label k in prompt p
    (`output_nodes.attribution`). An output head has a root mean square of D of at least 5% of that of the centred
    logits; for a uniform head, in which D is small by definition, what it raises all labels by has that size. The first
    class that fits is given; the bars are constants of this module:

    - "correct letter": D of the right label is positive on 70% of the prompts; attention on the labels sums to 0.3; the
      right label has the largest attention of the labels on 70% of the prompts; of what the head writes about each
      label where it attends to that label alone, that label gains most in 70% of the cases (it copies); and it is not
      for a single letter.
    - "single letter": one label has 60% of the rises, where the rise of label k is the mean of D[., k] where k is right
      less that where it is not, if positive; the mean of D of the right label is positive, and the head not constant.
    - "amplification": attention on the tokens after the last option, the asking one included, sums to 0.5, and D of the
      right label is positive on 70% of the prompts: the answer is already written there.
    - "uniform": attention on the labels sums to 0.3, its entropy over them is 0.9 of the largest, and each label's
      logit is raised, on average, over the mean of the vocabulary.
    - "constant": half of the sum of squares of D is in its mean over prompts (each right option counting equally).
    - "other output": none of these.

    Of the other heads, and of "other output" ones, a "content gatherer" has a total effect of at least 10% of that of
    all nodes, a direct effect of at most a third of its total effect, attention on the contents of at least 0.3, and of
    the contents, the largest attention on the right one on 70% of the prompts.

    Args:
        model: a decoder.
        task: multiple choice with the same labels in each prompt, in the same order: with random labels, an option is a
            place and not a letter.
        found: `output_nodes.effects` of all heads on this task.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a head, unit "logits": component (the class, of `CLASSES`), layer, head, value (mean D of the
        right label), value_direct and value_total (of `found`), value_size (root mean square of D over that of the
        centred logits), value_positive (share of prompts on which D of the right label is), value_labels (attention on
        the labels), value_right_label (share of prompts), value_copy, value_rise_share (of the label that rises most),
        value_letter (its index), value_constant, value_entropy, value_raised (of the label that is raised least),
        value_late, value_contents, value_right_content.

    Raises:
        ValueError: a task without options, labels or contents; an option that is never right; `found` without a head.
        NoProgramError: a model whose layers are not of the common form.

    Cost: three forward passes, and a final norm for each head and label.

    Example:
        >>> from interp.circuits.output_nodes import effects
        >>> from interp.models import toy
        >>> model, options = toy.induction(), torch.tensor([[3, 5], [3, 5]])
        >>> tokens = torch.tensor([[2, 3, 4, 5, 2], [2, 3, 4, 5, 4]])  # what followed this word?
        >>> named = {"label_0": [1, 1], "label_1": [3, 3], "content_0": [0, 0], "content_1": [2, 2], "end": [4, 4]}
        >>> task = Task("doc", ("w2 w3 w4 w5 w2", "w2 w3 w4 w5 w4"), tokens, "by hand", answers=torch.tensor([3, 5]),
        ...             options=options, positions={name: torch.tensor(at) for name, at in named.items()})
        >>> found = classify(model, task, effects(model, task, n_sources=1))
        >>> found.filter(component="correct letter").table[["layer", "head"]].values.tolist()
        [[1, 0]]
    """
    n_options = choice(task).options.shape[1]
    right = choice(task).right
    if missing := [k for k in range(n_options) if not bool((right == k).any())]:
        raise ValueError(f"option {missing[0]} is right in no prompt, so no effect of it is known: give more prompts.")
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    attributed = attribution(model, task, batch_size=batch_size)
    names = attributed.table.drop_duplicates(["component", "layer", "head"])["component"]
    labels = attributed.arrays["labels"][1][(names == "z").to_numpy()]
    size = batch_size or prompts_at_once(model, task.clean.shape[1], 4 * model.n_layers)
    parts = [_looks(model, task[rows]) for rows in batches(len(task), size)]
    looks = _Looks(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    nodes = [row for row in ranked(found).to_dict("records") if row["component"] == "z"]
    rest = {(int(row["layer"]), int(row["head"])): row for row in nodes}
    if absent := [at for at in heads if at not in rest]:
        raise ValueError(f"`found` has no effects of head {absent[0]}: make it with effects(model, task).")
    whole = float(found.arrays["whole"][1].mean())
    logits = float(np.sqrt((attributed.arrays["logits"][1] ** 2).mean()))
    records = []
    for index, (layer, head) in enumerate(heads):
        row = _measure(labels[index], looks, (layer, head), right.cpu().numpy())
        row["value_size"] /= logits
        effect = rest[layer, head]
        row |= {"value_direct": float(effect["direct"]), "value_total": float(effect["total"])}
        records.append({"component": _class(row, whole, logits), "layer": layer, "head": head, **row})
    meta = provenance(model, task, sources=found.meta["n_sources"], seed=found.meta["seed"])
    return Result("head_classes.classify", pd.DataFrame(records), "logits", meta=meta)


class _Looks(NamedTuple):
    """What heads look at and copy, prompts first."""

    labels: np.ndarray  # [prompt layer head option]
    contents: np.ndarray  # [prompt layer head option]
    late: np.ndarray  # [prompt layer head]
    copied: np.ndarray  # [prompt layer head option], whether the label gains most from attention to it
    raised: np.ndarray  # [prompt layer head option], logit over the mean of the vocabulary


@torch.no_grad()
def _looks(model: Model, task: Task) -> _Looks:
    chosen, label, content = choice(task), places(task, "label"), places(task, "content")
    rows = attention_rows(model, task, {"end": chosen.end})["end"].permute(1, 0, 2, 3)

    def at(where: Tensor) -> Tensor:
        index = where[:, None, None].expand(*rows.shape[:3], -1)
        return rows.gather(-1, index)

    position = torch.arange(rows.shape[-1], device=rows.device)
    late = (position > content.max(1).values[:, None]) & (position <= chosen.end[:, None])
    attended = (rows * late[:, None, None]).sum(-1)
    copied, raised = _written(program(model), task, label)
    return _Looks(*(numbers(part) for part in (at(label), at(content), attended, copied, raised)))


def _written(steps: Program, task: Task, label: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each head copies each label; and by how much it raises each label over the mean token."""
    model, chosen = steps.model, choice(task)
    n_layers = model.n_layers
    seen = _paths.seen_at(steps, task.clean, task.mask, chosen.end)
    values = trace(steps, task.clean, task.mask, {("v", layer) for layer in range(n_layers)})
    final = seen["resid_post", n_layers - 1]
    constant = steps.final_norm(torch.zeros_like(final))
    weight, _ = steps.directions(chosen.options)
    every, _ = steps.directions(torch.arange(model.d_vocab, device=final.device))
    over_mean = weight - every.mean(0)
    prompts = torch.arange(len(task), device=final.device)
    copied, raised = [], []
    for layer in range(n_layers):
        read = values["v", layer][prompts[:, None], label]  # [batch option kv_head d_head]
        read = read.repeat_interleave(model.n_heads // model.n_key_value_heads, dim=2)
        alone = torch.einsum("bohd,hdm->hobm", read, steps.w_o(layer))
        linear = _paths.scaled_as(steps.final_norm, alone, final) - constant
        gains = centred(torch.einsum("hobm,bkm->bhok", linear, weight))
        copied.append(gains.argmax(-1) == torch.arange(gains.shape[-1], device=final.device))
        out = torch.einsum("bhd,hdm->hbm", seen["z", layer], steps.w_o(layer))
        linear = _paths.scaled_as(steps.final_norm, out, final) - constant
        raised.append(torch.einsum("hbm,bkm->bhk", linear, over_mean))
    return torch.stack(copied, 1), torch.stack(raised, 1)


def _measure(effect: np.ndarray, looks: _Looks, at: tuple[int, int], right: np.ndarray) -> dict[str, float]:
    """The evidence about one head, from its effects on the labels `[prompt option]`."""
    prompts = np.arange(len(right))
    of_right = effect[prompts, right]
    by_right = np.stack([effect[right == k].mean(0) for k in range(effect.shape[1])])  # [right option, option]
    n = len(by_right)
    rises = np.clip(np.diag(by_right) - (by_right.sum(0) - np.diag(by_right)) / (n - 1), 0, None)
    energy = float((effect**2).mean(0).sum())
    labels, contents = looks.labels[:, at[0], at[1]], looks.contents[:, at[0], at[1]]
    among = labels / np.maximum(labels.sum(1, keepdims=True), 1e-12)
    entropy = -(among * np.log(np.maximum(among, 1e-12))).sum(1) / np.log(n)
    return {
        "value": float(of_right.mean()),
        "value_size": float(np.sqrt((effect**2).mean())),
        "value_positive": float((of_right > 0).mean()),
        "value_labels": float(labels.sum(1).mean()),
        "value_right_label": float((labels.argmax(1) == right).mean()),
        "value_copy": float(looks.copied[:, at[0], at[1]].mean()),
        "value_rise_share": float(rises.max() / max(rises.sum(), 1e-12)),
        "value_letter": float(rises.argmax()),
        "value_constant": float((by_right.mean(0) ** 2).sum() / max(energy, 1e-12)),
        "value_entropy": float(entropy.mean()),
        "value_raised": float(looks.raised[:, at[0], at[1]].mean(0).min()),
        "value_late": float(looks.late[:, at[0], at[1]].mean()),
        "value_contents": float(contents.sum(1).mean()),
        "value_right_content": float((contents.argmax(1) == right).mean()),
    }


def _class(row: dict[str, float], whole: float, logits: float) -> str:
    material = row["value_size"] >= MATERIAL
    if material and (name := _writes_for_some(row)) is not None:
        return name
    even = row["value_labels"] >= READS and row["value_entropy"] >= EVEN
    if even and row["value_raised"] >= MATERIAL * logits:
        return "uniform"
    if material and row["value_constant"] >= CONSTANT:
        return "constant"
    gathers = row["value_total"] >= GATHERED * abs(whole) and abs(row["value_direct"]) <= INDIRECT * row["value_total"]
    if gathers and row["value_contents"] >= READS and row["value_right_content"] >= MOST:
        return "content gatherer"
    return "other output" if material else "none"


def _writes_for_some(row: dict[str, float]) -> str | None:
    helps, single = row["value_positive"] >= MOST, row["value_rise_share"] >= SINGLE
    right = row["value_labels"] >= READS and row["value_right_label"] >= MOST
    if helps and right and row["value_copy"] >= MOST and not single:
        return "correct letter"
    if single and row["value"] > 0 and row["value_constant"] < CONSTANT:
        return "single letter"
    return "amplification" if helps and row["value_late"] >= LATE else None
