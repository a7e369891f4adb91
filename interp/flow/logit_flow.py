"""Through which layers and positions do the logits flow toward the prediction?

The neurons that raise the prediction most (value neurons) are found at the last position; then the vectors that
activated them, at the positions that they read, and so on back to the embedding, each with its share of the importance.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.flow._back import Everything, Parents, Step, back, everything, joined, next_parents
from interp.flow._direct import asked
from interp.flow._increase import Strongest
from interp.flow._neurons import View, part_shape, strongest, unravel, view_of
from interp.models.model import Model
from interp.models.program import program
from interp.patching._inputs import provenance
from interp.tasks.task import Task

PAPER = "arXiv:2502.10835"
#: Rows of the map.
COMPONENTS = ("attn", "mlp")
#: What positions without a name of their own are called.
OTHER = "other"


@method(name="Logit flow", paper=PAPER, notebook="logit_flow")
def flow(
    model: Model,
    task: Task | Tensor,
    *,
    target: str | Tensor = "answer",
    pos: str | int | None = None,
    top_k: int = 30,
    n_steps: int = 4,
) -> Result:
    """How much each layer and position contributes to the prediction, through neurons and what activated them.

    Step 0 takes the `top_k` attention neurons and the `top_k` MLP neurons with the largest log-probability increase at
    the last position (value neurons, as `attribution.attribute`). The increase of an attention neuron (head h, source
    position p, dimension n) is booked at p, since that is where it reads; that of an MLP neuron at the last position.

    Each further step books the importance of those neurons on what activated them. A neuron reads the stream at one
    position along a direction k: column n of W_V, or its rows of the gate and the up projection, through the gain (and
    centring) of the norm before them. The stream is the sum of the embedding and all earlier attention and MLP outputs
    c there, and

        score(c) = sum over neurons of  importance x (c . k) / (sum over c' of c' . k)

    Of a gated MLP neuron, a product of two factors, each factor has half of the importance. Attention outputs are
    booked at the positions that they come from. Then the `top_k` attention and the `top_k` MLP neurons with the largest
    scores are the next step's. Shares sum to 1, so each step books exactly the importance it was handed; but scores of
    different steps are one importance seen at different depths, and their sum over steps counts it repeatedly.

    A neuron whose parts cancel (the sum is below 0.05 of the sum of magnitudes) is not followed; what it had is kept
    as "dropped".

    Args:
        model: a decoder.
        task: prompts with named positions, or token ids `[batch pos]`.
        target: "answer", "wrong", "prediction", or token ids `[batch]`.
        pos: position that predicts: a name of the task or an index; None for "end", else the last.
        top_k: neurons of each kind that are followed in a step.
        n_steps: steps back, after the value neurons.

    Returns:
        Result, unit "nats"; one row a prompt, component ("attn", "mlp"), layer and position up to the one that
        predicts: prompt, component, layer, pos, target (the position's name in the task, else "other"), value (sum over
        steps). Arrays: "flow" `[prompt step component layer pos]`; "embed" `[prompt step pos]`; "bias", "dropped" and
        "followed" `[prompt step]` (output biases of attention; what was not followed; what the step was handed), zero
        for step 0; "increase" `[prompt neuron]`, those of the value neurons, attention first, and "value_layer"
        `[prompt neuron]`, their layers; "target" `[prompt]`; "evaluated" `[prompt]`, exact increases computed.

    Raises:
        ValueError: as `attribution.attribute`; top_k or n_steps below 1.
        NoProgramError: as `attribution.attribute`.

    Cost: two forward passes a prompt, the increases of the value neurons (see `attribution.attribute`), and a step back
        for each: products of d_model x (d_mlp + head x d_head) for every layer and position that is read. Memory: the
        activations of one prompt. Prompts are computed one by one and stored, so that a stopped run goes on.

    Differs from the paper: number of steps, k and normalisation were not found in a public text; the rules above follow
        its predecessor's code for attention neurons. For MLP neurons that takes the output column as what they read;
        here it is the gate and the up rows. Components are booked whole, and neurons decide only what is followed.

    Example:
        >>> from interp.models import planted
        >>> case = planted.ioi_like()
        >>> task = Task("doc", case.prompts, case.clean, "planted", answers=case.answers, positions=case.positions)
        >>> found = flow(case.model, task[:4], n_steps=1)
        >>> found.filter(component="attn").top(1)[["layer", "target"]].values.tolist()
        [[2, 'io']]
    """
    if top_k < 1 or n_steps < 1:
        raise ValueError(f"top_k={top_k}, n_steps={n_steps}: follow at least one neuron, for at least one step.")
    steps = program(model)
    question = asked(model, steps, task, pos, target, compare=False)
    task = question.task

    def compute(rows: slice) -> dict[str, np.ndarray]:
        with torch.no_grad():
            view = view_of(steps, question, rows)
            mask = None if task.mask is None else task.mask[rows]
            seen = everything(steps, task.clean[rows], mask)
            return _trace(view, seen, int(question.at[rows]), top_k, n_steps)

    meta = provenance(
        model, task, pos=question.at.tolist(), target=question.target.tolist(), top_k=top_k, n_steps=n_steps
    )
    done = sweep(
        len(task), compute, batch_size=1, identity={"method": "logit_flow.flow", **meta}, description="logit flow"
    )
    table = _table(task, question.at, done["flow"].sum(1))
    dims = {
        "flow": ("prompt", "step", "component", "layer", "pos"), "embed": ("prompt", "step", "pos"),
        **dict.fromkeys(("bias", "dropped", "followed"), ("prompt", "step")),
        **dict.fromkeys(("increase", "value_layer"), ("prompt", "neuron")),
        **dict.fromkeys(("target", "evaluated"), ("prompt",)),
    }  # fmt: skip
    return Result("logit_flow.flow", table, "nats", {k: (dims[k], v) for k, v in done.items()}, meta)


def _trace(view: View, seen: Everything, at: int, top_k: int, n_steps: int) -> dict[str, np.ndarray]:
    """The flow of one prompt; arrays with a first axis of one."""
    attention, mlp = (strongest(view, kind, top_k) for kind in ("attention_neuron", "neuron"))
    parents = joined(_as_parents(view, attention, at, heads=True), _as_parents(view, mlp, at, heads=False))
    flows = [seen.pre.new_zeros(2, len(seen.pre), seen.pre.shape[1])]
    kinds = (parents.heads < 0).long()
    flows[0].index_put_((kinds, parents.layer, parents.pos), parents.importance, accumulate=True)
    embeds, rest = [seen.pre.new_zeros(seen.pre.shape[1])], [[0.0, 0.0, 0.0]]
    for _ in range(n_steps):
        parents = _positive(parents)
        if len(parents):
            step = back(seen, parents)
        else:
            nothing = seen.pre.new_zeros(())
            step = Step(torch.zeros_like(flows[0]), torch.zeros_like(embeds[0]), nothing, nothing, nothing, nothing)
        flows.append(step.flow)
        embeds.append(step.embed)
        rest.append([float(step.bias), float(step.dropped), float(parents.importance.sum())])
        if len(parents):
            parents = next_parents(step, top_k)
    bias, dropped, followed = np.array(rest).T
    both = torch.cat([attention.found, mlp.found])
    found = {
        "flow": torch.stack(flows).double().cpu().numpy(), "embed": torch.stack(embeds).double().cpu().numpy(),
        "bias": bias, "dropped": dropped, "followed": followed, "increase": both.double().cpu().numpy(),
        "value_layer": torch.cat([attention.where[:, 0], mlp.where[:, 0]]).cpu().numpy(),
        "target": view.target[0].cpu().numpy(), "evaluated": np.array(attention.n_evaluated + mlp.n_evaluated),
    }  # fmt: skip
    return {name: array[None] for name, array in found.items()}


def _as_parents(view: View, best: Strongest, at: int, *, heads: bool) -> Parents:
    layer, index = best.where.T
    if not heads:
        return Parents(layer, torch.full_like(layer, at), torch.full_like(layer, -1), index, best.found)
    head, source, neuron = unravel(index, part_shape(view, "attention_neuron"))
    return Parents(layer, source, head, neuron, best.found)


def _positive(parents: Parents) -> Parents:
    """Those that matter: a neuron that lowers the target is not followed."""
    keep = parents.importance > 0
    return Parents(*(part[keep] for part in parents))


def _table(task: Task, at: Tensor, flows: np.ndarray) -> pd.DataFrame:
    """A row for each entry of `[prompt component layer pos]` that is a token up to `at`."""
    prompt, component, layer, pos = np.indices(flows.shape).reshape(4, -1)
    names = np.full(task.clean.shape, OTHER, dtype=object)
    rows = np.arange(len(task))
    # The position that predicts keeps its own name where others share it.
    for name in sorted(task.positions, key=lambda name: name == "end"):
        names[rows, task.positions[name].cpu().numpy()] = name
    if "end" not in task.positions:
        names[rows, at.cpu().numpy()] = "end"
    real = np.arange(task.clean.shape[1]) <= at.cpu().numpy()[:, None]
    if task.mask is not None:
        real &= task.mask.bool().cpu().numpy()
    table = pd.DataFrame({
        "prompt": prompt, "component": np.array(COMPONENTS, dtype=object)[component], "layer": layer, "pos": pos,
        "target": names[prompt, pos], "value": flows.ravel(),
    })  # fmt: skip
    return table[real[prompt, pos]].reset_index(drop=True)


def roles(found: Result) -> Result:
    """The map of each prompt over aligned roles: positions of one name taken together.

    Args:
        found: of `flow`.

    Returns:
        Result, unit "nats"; one row a prompt, component, layer and target (name of a position, or "other"): the sum
        over its positions. A prompt that lacks a role has no rows for it.
    """
    table = found.table.groupby(["prompt", "component", "layer", "target"], sort=True)["value"].sum().reset_index()
    return Result("logit_flow.roles", table, found.unit, meta=found.meta)


@method(name="Where a wrong answer's logits enter", paper=PAPER, notebook="logit_flow")
def failures(model: Model, task: Task, *, pos: str | int | None = None, top_k: int = 30, n_steps: int = 4) -> Result:
    """For prompts that the model gets wrong, the flow to its prediction less the flow to the right answer.

    The wrong answer enters where that difference is largest.

    Args:
        model: a decoder.
        task: with answers; prompts whose prediction is the answer are left out.
        pos: see `flow`.
        top_k: see `flow`.
        n_steps: see `flow`.

    Returns:
        Result, unit "nats"; rows as in `flow`, with metric ("prediction", "answer", "difference"); `prompt` counts in
        the whole task. Arrays, for each wrong prompt: "prompt", its number; "prediction", the token; "component" (0
        attention, 1 MLP), "layer" and "pos" of the entry.

    Raises:
        ValueError: the model gets every prompt right; and as `flow`.

    Cost: that of `flow`, twice for each wrong prompt.

    Example:
        >>> from interp.models import planted
        >>> case = planted.ioi_like()
        >>> task = Task("doc", case.prompts, case.clean, "planted", answers=case.wrong, positions=case.positions)
        >>> found = failures(case.model, task[:2], n_steps=1)
        >>> found.arrays["layer"][1].tolist(), found.arrays["prediction"][1].tolist() == case.answers[:2].tolist()
        ([2, 2], True)
    """
    question = asked(model, program(model), task, pos, "answer", compare=False)
    said = predicted(model, task, pos=pos)
    rows = (said != question.target).nonzero()[:, 0].tolist()
    if not rows:
        raise ValueError(f"{model.name} gets all {len(task)} prompts of task {task.name!r} right: there is no failure.")
    wrong = task[rows]
    options = {"pos": pos, "top_k": top_k, "n_steps": n_steps}
    to_wrong = flow(model, wrong, target=said[rows], **options)  # type: ignore[arg-type]
    to_right = flow(model, wrong, target="answer", **options)  # type: ignore[arg-type]
    difference = replace(to_wrong, table=to_wrong.table.assign(value=to_wrong.table["value"] - to_right.table["value"]))
    each = {"prediction": to_wrong, "answer": to_right, "difference": difference}
    frames = [result.table.assign(metric=name) for name, result in each.items()]
    table = pd.concat(frames, ignore_index=True)
    largest = difference.table.loc[difference.table.groupby("prompt")["value"].idxmax()]
    numbers = np.array(rows)
    table["prompt"] = numbers[table["prompt"]]
    arrays = {
        "prompt": (("wrong",), numbers),
        "prediction": (("wrong",), said[rows].cpu().numpy()),
        "component": (("wrong",), largest["component"].map(COMPONENTS.index).to_numpy()),
        "layer": (("wrong",), largest["layer"].to_numpy()),
        "pos": (("wrong",), largest["pos"].to_numpy()),
    }
    return Result("logit_flow.failures", table, "nats", arrays, provenance(model, task, **options))


def predicted(model: Model, task: Task, *, pos: str | int | None = None) -> Tensor:
    """What the model says: the token with the largest logit, of the whole vocabulary.

    Args:
        model: a decoder.
        task: prompts.
        pos: see `flow`.

    Returns:
        Token ids `[batch]`. Cost: one forward pass.
    """
    return asked(model, program(model), task, pos, "prediction", compare=False).target
