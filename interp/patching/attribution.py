"""What would patching do, by the gradient? All components at once, for the price of about three forward passes.

Attribution patching (EAP without its edges, arXiv 2310.10348), with integrated gradients (EAP-IG, arXiv 2403.17806) and
with queries and keys through the softmax (AtP*, arXiv 2403.00745).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from interp.core.batching import batches, sweep
from interp.core.edits import Edit, checked
from interp.core.readout import Readout, readout
from interp.core.registry import method
from interp.core.rerun import ExactPath
from interp.core.result import Result
from interp.models.check import require_live
from interp.models.model import Model
from interp.models.program import NoProgramError, Program, hook_name
from interp.patching._attribution import AXES, Parts, Plan
from interp.patching._gradients import room, steps_of
from interp.patching._inputs import provenance, require_decoder, require_gap
from interp.patching._sources import prepare, require_source
from interp.tasks.task import Task

_BY = ("layer", "head", "pos", "neuron")
_PATHS = ("embedding", "activation")
#: How far the first point of a path is from the base run, in steps.
_GRIDS = {"paper": 0.0, "code": 1.0, "midpoint": 0.5}


@method(name="Attribution patching", paper="arXiv:2310.10348", notebook="ioi_circuit")
def attribute(
    model: Model,
    task: Task,
    *,
    sites: str | Sequence[str] = ("z", "mlp_out"),
    by: str | Sequence[str] = ("layer", "head"),
    direction: str = "noising",
    source: str = "corrupt",
    reference: Task | None = None,
    steps: int = 0,
    path: str = "embedding",
    grid: str = "paper",
    qk_fix: bool = False,
    n_neurons: int = 100,
    metric: str | Readout = "logit_diff",
    min_oriented: float = 0.75,
    seed: int = 0,
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """What patching each component would do to the metric, estimated from gradients, for all components at once.

    The base run is the one that would be patched (the clean prompt when noising, the corrupted one when denoising), the
    source is where the values would come from. For an activation a of the base run that would become a*, the estimate
    of m(patched) - m(base) is the sum, over all that the row names, of

        (a* - a) . G

    where G is the gradient of the metric m by a:

    - steps=0: at the base run. Exact in the limit of a small change and where m is linear in a; blind where m is flat
      at the base run (a softmax or an MLP that is saturated, an OR, a backup).
    - steps=m, path="embedding" (EAP-IG, inputs): the mean gradient of m runs whose input embeddings lie on the straight
      line from the source's, e*, to the base run's, e: e* + (k/m)(e - e*). Of the embeddings themselves ("resid_pre" of
      layer 0) the sum becomes m(source) - m(base) as m grows; nothing guarantees that for later activations.
    - steps=m, path="activation" (EAP-IG, activations): the same with one site of one layer on the line, at all heads
      and positions together, and everything before it as in the base run. The sum over a layer's site becomes the
      exact effect of patching all of it as m grows.

    With `qk_fix` (AtP*), queries and keys go through the softmax again instead of its derivative. P is the attention
    pattern of the base run, P* the pattern with the new query or key, G the (mean) gradient by the pattern; the
    estimate is the sum of (P* - P) G over the rows of all query heads that read it. For the key at one position j (`by`
    with "pos") a row adds (P*_j - P_j)(G_j - M_j), with P*_j = 1 / (1 + exp(S - s*_j)), s*_j the new score, S the
    log-sum-exp of the row's other scores, and M_j the mean of G over the other keys, weighted by their attention.
    Without "pos" the keys of all positions are new together, which is not the sum over positions.

    Args:
        model: a decoder.
        task: with answers and, for fractions of the gap, corrupted prompts.
        sites: of "resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid" (not where attention and MLP are parallel),
            "post" (the MLP's neurons), "mlp_out", "resid_post".
        by: what a row stands for: "layer" and any of "head", "pos" and "neuron" (of "post"; not with "pos"). Along the
            other axes everything would be replaced together. `head` of k and v is the key-value group.
        direction: "noising" or "denoising".
        source: "corrupt", the paired prompt (its clean one when denoising); for noising also "zero", "mean",
            "position_mean" or "resample", as for `interp.patching.activation.patch`.
        reference: prompts of the two means; None for the task's own.
        steps: m, the number of points of the path; 0 takes the gradient at the base run only.
        path: "embedding" or "activation"; see above.
        grid: "paper" has the points k = 1..m (the last is the base run), "code" k = 0..m-1 (the first is the source),
            "midpoint" k = 1/2..m-1/2, whose error falls as 1/m^2 where that of the others falls as 1/m.
        qk_fix: whether queries and keys go through the softmax again.
        n_neurons: with "neuron" in `by`, how many are kept: those with the largest mean over the prompts, either sign.
        metric: see `interp.core.readout.readout`; one number a prompt.
        min_oriented: share of the prompts whose clean metric must be better than the corrupted one.
        seed: of "resample".
        batch_size: prompts at once; None chooses from the free memory. It does not change the numbers beyond rounding.
        exact_path: "rerun" takes gradients through the model's steps, "hooks" through the bridge; None takes the second
            for a model whose layers are not of the common form.

    Returns:
        Result, one row a prompt, site ("component"), layer and, where the site has them, head, pos or neuron that `by`
        names; none for padding. `value` is counted as that of `interp.patching.activation.patch`, of which it is an
        estimate: positive for what helps the answer, 1 for all of the gap; `value_metric` is the estimated metric of
        the changed run. Unit "fraction of the mean clean-corrupt gap"; for a task without corrupted prompts that of
        the metric. Arrays "clean" and "corrupt" `[prompt]`: the metric of the unchanged runs.

    Raises:
        ValueError: an unknown site, axis, direction, source, path or grid; a site that the model has not; options that
            exclude each other; no corrupted prompts; a gap that is not positive; an encoder or vision model.
        ModelCheckError: gradients by hooks, at a site that the bridge shows but does not compute with.
        NoProgramError: `qk_fix` or exact_path="rerun" for a model whose layers are not of the common form.

    Cost: two forward passes and one backward pass to the activations (not the weights), about three forward passes, for
        any number of components; with m points 1 + 2m (2 + 2m on other grids than "paper") along the embedding and 2 +
        m x layers x sites along activations; a pass more for means. Memory: the graph of one pass, which is all its
        activations, and those of both runs at the sites; nothing is larger than a layer's activation or pattern.

    Differs from the paper: nodes are scored and not edges, and none is pruned; AtP*'s GradDrop is not here. That the
        paper of EAP-IG has k = 1..m (its code has 0..m-1), and the formulas of AtP*, are from memory.

    Example:
        >>> from interp.models import planted
        >>> case = planted.or_gate()
        >>> pairs = (case.corrupt, case.answers, case.wrong, case.positions)
        >>> task = Task("or", case.prompts, case.clean, "planted", *pairs)
        >>> first, path = (attribute(case.model, task, sites="z", steps=m, grid="midpoint") for m in (0, 10))
        >>> [(found.grid("layer", "head").round(3) + 0.0).values.tolist() for found in (first, path)]
        [[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]]
    """
    require_decoder(model)
    axes = (by,) if isinstance(by, str) else tuple(by)
    plan = Plan(_sites(sites), axes, _distances(steps, grid), path, qk_fix)
    noising = direction == "noising"
    way = steps_of(model, exact_path)
    _check(plan, steps, direction, source, metric, way)
    whole = [Edit(site, 0) for site in plan.sites]
    checked(model, [whole], task.clean.shape[1], len(task), sourced=True)
    require_source(source, whole, task, reference)
    if isinstance(way, NoProgramError):
        for site in plan.sites:  # where the bridge only shows an activation, it has no gradient
            require_live(model, hook_name("attn_out" if site == "resid_mid" else site, 0))
    origin = prepare(
        model, task, source, plan.kept(model.n_layers), reference=reference, seed=seed, exact_path=exact_path
    )  # fmt: skip
    parts = Parts(model, way, plan, task, noising, origin, metric)
    options = {
        "sites": list(plan.sites), "by": list(axes), "direction": direction, "source": source, "seed": seed,
        "reference": None if reference is None else reference.fingerprint, "steps": steps, "path": path, "grid": grid,
        "qk_fix": qk_fix, "metric": metric.name if isinstance(metric, Readout) else metric,
        "exact_path": "hooks" if isinstance(way, NoProgramError) else "rerun",
    }  # fmt: skip
    size = batch_size or max(1, room(model, task.clean.shape[1]) // task.clean.shape[1])
    if isinstance(metric, Readout):  # its function has no fingerprint, so a batch could not be known again
        done = [parts.compute(rows) for rows in batches(len(task), size)]
        found = {name: np.concatenate([part[name] for part in done]) for name in done[0]}
    else:
        identity = provenance(model, task, method="attribution.attribute", **options)
        found = sweep(len(task), parts.compute, batch_size=size, identity=identity, description="attribution patching")

    read = metric if isinstance(metric, Readout) else readout(model, task[:1], metric)
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    arrays.update({name: (("prompt",), found[name]) for name in ("clean", "corrupt") if name in found})
    divisor, unit = 1.0, read.unit
    if "corrupt" in found:
        clean, corrupt = torch.from_numpy(found["clean"]), torch.from_numpy(found["corrupt"])
        require_gap(task, read, clean, corrupt, min_oriented)
        divisor, unit = float((clean - corrupt).mean()), "fraction of the mean clean-corrupt gap"
    table = pd.concat([_table(found[site], site, plan.axes(site), n_neurons) for site in plan.sites], ignore_index=True)
    if "pos" in axes and task.mask is not None:
        table = table[task.mask.bool().cpu().numpy()[table["prompt"], table["pos"]]].reset_index(drop=True)
    effect = table.pop("value")
    order = [column for column in ("prompt", "component", *_BY) if column in table.columns]
    table = table[order].astype({axis: "Int64" for axis in ("head", "neuron") if axis in order})
    unchanged = found["clean" if noising else "corrupt"][table["prompt"]]
    table = table.assign(value=(-effect if noising else effect) / divisor + 0.0, value_metric=unchanged + effect)
    meta = provenance(model, task, **options, min_oriented=min_oriented, n_neurons=n_neurons)
    return Result("attribution.attribute", table, unit, arrays, meta)


def _sites(sites: str | Sequence[str]) -> tuple[str, ...]:
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if not names or any(name not in AXES for name in names):
        raise ValueError(f"sites={list(names)}: name at least one of {', '.join(AXES)}, and no other.")
    return names


def _distances(steps: int, grid: str) -> tuple[float, ...]:
    """How far from the base run the points of the path are, the nearest first; the source is at 1."""
    if steps < 0:
        raise ValueError(f"steps={steps}: give the number of points of the path, or 0 for the base run alone.")
    if grid not in _GRIDS:
        raise ValueError(f"grid {grid!r} is not known; use one of {', '.join(_GRIDS)}.")
    return tuple((_GRIDS[grid] + index) / steps for index in range(steps)) or (0.0,)


def _check(
    plan: Plan, steps: int, direction: str, source: str, metric: str | Readout, way: Program | NoProgramError
) -> None:
    """Refuse options that are unknown or exclude each other, before anything runs."""
    if "layer" not in plan.by or any(axis not in _BY for axis in plan.by):
        raise ValueError(f"by={list(plan.by)}: rows are by 'layer', and may be by {', '.join(_BY[1:])} too.")
    if "neuron" in plan.by and ("post" not in plan.sites or "pos" in plan.by):
        raise ValueError(
            f"by={list(plan.by)} with sites={list(plan.sites)}: neurons are those of 'post', summed over positions. "
            "Add 'post' to sites, or leave 'neuron' or 'pos' out."
        )
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction {direction!r} is not known; use 'noising' or 'denoising'.")
    if direction == "denoising" and source != "corrupt":
        raise ValueError(
            f"source={source!r} takes information away, which denoising, from the corrupted run to the clean one, "
            "cannot use: pass direction='noising'."
        )
    if plan.path not in _PATHS:
        raise ValueError(f"path {plan.path!r} is not known; use one of {', '.join(_PATHS)}.")
    if plan.path == "activation" and not steps:
        raise ValueError("path='activation' needs points on the path: give steps, for example steps=5.")
    if plan.path == "embedding" and steps and source not in ("corrupt", "resample"):
        raise ValueError(
            f"source={source!r} gives values of activations, and no embeddings for a path to start from: pass "
            "path='activation', or steps=0."
        )
    if plan.qk_fix and not plan.fixed:
        raise ValueError(f"qk_fix is for queries and keys, and sites={list(plan.sites)} has neither: add 'q' or 'k'.")
    if plan.qk_fix and plan.path == "activation":
        raise ValueError("qk_fix and path='activation' are two ways around the softmax's derivative: choose one.")
    if plan.qk_fix and isinstance(way, NoProgramError):
        raise NoProgramError(f"qk_fix computes the attention pattern step by step, but {way}")
    if metric == "kl" and direction == "noising" and not steps:
        raise ValueError(
            "the gradient of a divergence from the clean run is 0 at the clean run: take metric='logit_diff' or "
            "'log_prob', direction='denoising', or points on a path, for example steps=5."
        )


def _table(scores: np.ndarray, site: str, axes: tuple[str, ...], n_neurons: int) -> pd.DataFrame:
    """One row a number of `[prompt layer *axes]`; of neurons, tens of thousands a prompt, those that matter most."""
    if "neuron" in axes:
        largest = np.argsort(-np.abs(scores.mean(0)), axis=None, kind="stable")[:n_neurons]
        layer, neuron = np.unravel_index(np.sort(largest), scores.shape[1:])
        prompt, which = np.indices((len(scores), len(layer))).reshape(2, -1)
        columns = {"prompt": prompt, "layer": layer[which], "neuron": neuron[which]}
        scores = scores[:, layer, neuron]
    else:
        names = ("prompt", "layer", *axes)
        columns = dict(zip(names, np.indices(scores.shape).reshape(len(names), -1), strict=True))
    return pd.DataFrame({**columns, "component": site, "value": scores.ravel()})
