"""Which part of the model writes the prediction? The logits or the log-probability, part by part, down to neurons.

The stream at the last position is a sum: the embedding, what each attention layer and each MLP writes. Attention's part
is a sum over heads, source positions and value dimensions ("attention neurons"), an MLP's over its neurons. With the
scale of the final norm held, each part adds a known amount to every logit, and all amounts and the biases sum to it.
`circuits.output_nodes.attribution` asks the same of the labels of multiple choice, for heads and MLPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.flow._direct import asked, prompts_at_once
from interp.flow._increase import Strongest, bases, increases, log_probs
from interp.flow._neurons import View, neuron_values, part_shape, strongest, unravel, view_of
from interp.models.model import Model
from interp.models.program import program
from interp.patching._inputs import numbers, provenance
from interp.tasks.task import Task

By = Literal["layer", "component", "head", "source", "attention_neuron", "neuron"]
Quantity = Literal["logit", "logit_diff", "log_prob_increase"]

_PAPER = "arXiv:2502.10835"
_LEVELS = ("layer", "component", "head", "source", "attention_neuron", "neuron")
_QUANTITIES = {"logit": "logits", "logit_diff": "logits", "log_prob_increase": "nats"}
#: Columns that tell the parts of a level from one another, in the table's order.
_COLUMNS = ("layer", "head", "k_pos", "neuron")


@method(name="Direct attribution and log-probability increase", paper=_PAPER, notebook="logit_flow")
@torch.no_grad()
def attribute(
    model: Model,
    task: Task | Tensor,
    *,
    by: By = "component",
    quantity: Quantity = "logit",
    target: str | Tensor = "answer",
    pos: str | int | None = None,
    top_k: int = 30,
) -> Result:
    """What each layer, component, head, source position or neuron adds to the prediction, exactly.

    With h the last stream at `pos`, L the linear part of the final norm at the scale of h, and W the unembedding:

        logit               (L v) . W[w]                                of the target w
        logit_diff          (L v) . (W[w] - W[w'])                      w' the task's wrong answer
        log_prob_increase   log softmax(bs(x + v))[w] - log softmax(bs(x))[w]

    where bs(x) is L x, the biases of norm and unembedding added, through W, and x is what the part is added to: the
    layer's input for attention, its heads and attention neurons; the stream after attention for an MLP and its
    neurons (in parallel layers too). The parts v:

        layer               embedding, attention and MLP of each layer
        component           embedding, each attention layer, each MLP
        head                embedding, each head, each MLP
        source              embedding, each head by the position it reads, each MLP
        attention_neuron    pattern[h, p] value[h, p, n] W_O[h, n] of each head h, position p and dimension n
        neuron              post[n] W_down[n] of each MLP neuron

    Logits of all parts of the first four levels, with "bias" (output biases that are in no part, those of the final
    norm and the unembedding), sum to the model's logit. Increases by layer or component sum to the log-probability,
    if "embed" counts as the log-probability of the embedding alone; those of heads and neurons do not sum.

    Args:
        model: a decoder. Raw and processed weights agree on differences and increases; on the logits of single tokens
            up to the mean over the vocabulary, which processing takes out.
        task: prompts, or token ids `[batch pos]` (with `target` given).
        by: the level.
        quantity: see above.
        target: "answer", "wrong", "prediction" (the model's own), or token ids `[batch]`.
        pos: position that predicts: a name of the task or an index; None for "end", else the last.
        top_k: neurons kept a prompt; also sources, of increases. The largest in magnitude of logits, the largest of
            increases (proved by a bound, see `interp.flow._increase`).

    Returns:
        Result, unit "logits" or "nats"; columns prompt, component ("embed", "layer", "attn_out", "mlp_out", "z",
        "post", "bias"), then what tells parts apart: layer, head, k_pos, neuron; value. Rows in the model's order, or
        the largest first where only `top_k` are kept. Arrays: "total" `[prompt]`, the model's own logit, difference or
        log-probability; "target" `[prompt]`, the token; for logits of neurons "layers" `[prompt layer]`, the sum over
        all neurons of a layer; where increases were screened "evaluated" and "offered" `[prompt]`, how many were
        computed exactly, and of how many.

    Raises:
        ValueError: an unknown level, quantity or target, answers that the task lacks, top_k below 1, `pos` on padding.
        NoProgramError: a model that caps its logits or whose heads do not add up (Gemma 2), or of an unknown form.

    Cost: one forward pass. For logits nothing worth naming beside it. For increases, a product of d_model x d_vocab for
        each part of the first three levels; for screened ones two a layer, and one for each part evaluated.
        Memory: a prompt's logits twice for each layer; head x pos x d_head numbers of the layer at work.

    Differs from the paper's predecessor: the biases of norm and unembedding are part of bs. Its epsilon of 1e-6 is the
        model's own here.

    Example:
        >>> from interp.models import planted
        >>> case = planted.ioi_like()
        >>> task = Task("doc", case.prompts, case.clean, "planted", answers=case.answers)
        >>> found = attribute(case.model, task, by="head").filter(component="z").summary(["layer", "head"])
        >>> found.nlargest(2, "mean")[["layer", "head"]].values.tolist()
        [[2, 1], [2, 2]]
    """
    if by not in _LEVELS or quantity not in _QUANTITIES:
        raise ValueError(f"by={by!r}, quantity={quantity!r}: use {', '.join(_LEVELS)}; {', '.join(_QUANTITIES)}.")
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: keep at least one.")
    steps = program(model)
    question = asked(model, steps, task, pos, target, compare=quantity == "logit_diff")
    n = len(question.task)
    frames: list[pd.DataFrame] = []
    arrays: dict[str, list[np.ndarray]] = {"target": [question.target.cpu().numpy()]}
    size = prompts_at_once(question.task)
    spans = list(batches(n, size))
    for rows in tqdm(spans, desc="attribution", leave=False, disable=len(spans) < 2):
        view = view_of(steps, question, rows)
        if quantity == "log_prob_increase":
            frame, found = _increases(view, by, top_k)
        else:
            frame, found = _linear(view, by, top_k)
        frames.append(frame.assign(prompt=frame["prompt"] + rows.start))
        for name, array in found.items():
            arrays.setdefault(name, []).append(array)
    axes = {"layers": ("prompt", "layer")}
    named = {k: (axes.get(k, ("prompt",)), np.concatenate(v)) for k, v in arrays.items()}
    table = pd.concat(frames, ignore_index=True)
    table = table[_ordered(table)].sort_values("prompt", kind="stable", ignore_index=True)
    meta = provenance(
        model, question.task, by=by, quantity=quantity, pos=pos, top_k=top_k,
        target="ids" if isinstance(target, Tensor) else target,
    )  # fmt: skip
    return Result("attribution.attribute", table, _QUANTITIES[quantity], named, meta)


def _linear(view: View, by: By, top_k: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """What adds up to the logit, or to a difference of two."""
    seen, wide, layers = view.seen, view.head.gain.dtype, range(len(view.seen.pre))
    direction = view.head.pull(view.row)
    constant = view.head.of_bias(view.row, view.bias)
    found = {"total": numbers(torch.einsum("bd,bd->b", seen.final.to(wide), direction) + constant)}
    if by in ("attention_neuron", "neuron"):
        best = [Strongest(top_k, direction) for _ in direction]
        sums = []
        for layer in layers:
            values = neuron_values(view, layer, by, direction)
            sums.append(values.flatten(1).sum(1))
            for prompt, each in enumerate(best):
                each.keep(layer, values[prompt].flatten(), magnitude=True)
        return _kept(view, by, best), {**found, "layers": numbers(torch.stack(sums, 1))}

    def through(parts: Tensor) -> Tensor:
        return torch.einsum("lbd,bd->bl", parts.to(wide), direction)

    embed, attn, mlp = through(seen.pre[:1])[:, 0], through(seen.attn), through(seen.mlp)
    if by == "layer":
        rest = [_dense("layer", attn + mlp, "layer")]
    elif by == "component":
        rest = [_dense("attn_out", attn, "layer"), _dense("mlp_out", mlp, "layer")]
    else:
        read = torch.stack([neuron_values(view, layer, "source", direction) for layer in layers], 1)
        constant = constant + (attn - read.sum((2, 3))).sum(1)  # attention's output bias is in no head
        heads = _dense("z", read.sum(3), "layer", "head") if by == "head" else _sources(view, read)
        rest = [heads, _dense("mlp_out", mlp, "layer")]
    return pd.concat([_dense("embed", embed), *rest, _dense("bias", constant)], ignore_index=True), found


def _increases(view: View, by: By, top_k: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """What raises the target's log-probability."""
    seen = view.seen
    if by in ("source", "attention_neuron", "neuron"):
        best = [strongest(one, by, top_k) for one in view.each()]
        counts = {"evaluated": [each.n_evaluated for each in best], "offered": [each.n_offered for each in best]}
        total = log_probs(view.head, seen.final[None], view.target)[0]
        return _kept(view, by, best), {"total": numbers(total), **{k: np.array(v) for k, v in counts.items()}}
    before = log_probs(view.head, torch.cat([seen.pre, seen.final[None]]), view.target)
    between = log_probs(view.head, seen.mid, view.target)
    attn, mlp = (between - before[:-1]).T, (before[1:] - between).T
    if by == "layer":
        rest = [_dense("layer", attn + mlp, "layer")]
    elif by == "component":
        rest = [_dense("attn_out", attn, "layer"), _dense("mlp_out", mlp, "layer")]
    else:
        rest = [_dense("z", _of_heads(view), "layer", "head"), _dense("mlp_out", mlp, "layer")]
    table = pd.concat([_dense("embed", before[0]), *rest], ignore_index=True)
    return table, {"total": numbers(before[-1])}


def _of_heads(view: View) -> Tensor:
    """The increase of every head, `[batch layer head]`."""
    found = []
    for one in view.each():
        base = bases(one.head, one.seen.pre[:, 0], int(one.target[0]))
        for layer in range(len(base.log_p)):
            z = one.seen.weighted(layer)[0].sum(1).to(one.head.gain.dtype)
            vectors = torch.einsum("he,hed->hd", z, one.steps.w_o(layer).detach().to(z.dtype))
            found.append(increases(one.head, base, layer, vectors, int(one.target[0])))
    return torch.stack(found).unflatten(0, (len(view.target), -1))


def _kept(view: View, by: By, best: Sequence[Strongest]) -> pd.DataFrame:
    """The rows of the neurons or sources that were kept."""
    shapes = {"neuron": ("neuron",), "source": ("head", "k_pos"), "attention_neuron": ("head", "k_pos", "neuron")}
    frames = []
    for prompt, each in enumerate(best):
        layer, index = each.where.T
        columns = dict(zip(shapes[by], unravel(index, part_shape(view, by)), strict=True))
        frame = pd.DataFrame({"layer": layer.cpu().numpy(), **{k: v.cpu().numpy() for k, v in columns.items()}})
        frames.append(frame.assign(prompt=prompt, value=numbers(each.found)))
    table = pd.concat(frames, ignore_index=True).assign(component="post" if by == "neuron" else "z")
    return table[_ordered(table)]


def _sources(view: View, read: Tensor) -> pd.DataFrame:
    """Rows of `[batch layer head k_pos]`, without positions that attention cannot read."""
    frame = _dense("z", read, "layer", "head", "k_pos")
    return frame[view.real.cpu().numpy()[frame["prompt"], frame["k_pos"].astype(int)]]


def _dense(component: str, values: Tensor, *axes: str) -> pd.DataFrame:
    """A row for each entry of `[batch ...]`, whose further axes are named."""
    index = np.indices(tuple(values.shape)).reshape(values.ndim, -1)
    columns = {name: pd.array(at, dtype="Int64") for name, at in zip(axes, index[1:], strict=True)}
    frame = pd.DataFrame({"prompt": index[0], "component": component, **columns})
    return frame.assign(value=numbers(values).ravel())


def _ordered(table: pd.DataFrame) -> list[str]:
    return ["prompt", "component", *(name for name in _COLUMNS if name in table), "value"]
