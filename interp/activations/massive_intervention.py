"""What happens when massive activations are overwritten?

The intervention of *Massive Activations in Large Language Models* (arXiv 2402.17762, experiment 3): set the massive
entries to zero, or to their mean, at the first layer that has them, and measure the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.activations._inputs import fingerprint, first_token, inputs, provenance
from interp.activations.massive import _criteria, first_layer
from interp.core.batching import sweep
from interp.core.metrics import next_token_loss
from interp.core.registry import method
from interp.core.result import Result
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.tasks.task import Task

#: Mean massive activation by class of token and dimension.
Means = Mapping[tuple[str, int], float]

_KINDS = ("first token", "other token")


@method(
    name="Massive activations: set to zero or to their mean", paper="arXiv:2402.17762", notebook="massive_activations"
)
def intervene(
    model: Model,
    task: Task | Tensor,
    *,
    calibration: Result,
    layer: int | None = None,
    to: Sequence[str] = ("zero", "mean"),
    batch_size: int = 8,
) -> Result:
    """The model's loss, or its zero-shot accuracy, with massive activations as they are, set to zero, set to the mean.

    At the output of `layer`, each prompt's massive entries (found in that prompt, not at fixed places) are overwritten:
    with 0, or with the mean of the massive entries of that dimension in `calibration`, first tokens and other tokens
    apart. Later layers get the change through the residual stream.

    Args:
        model: any model; a language model for losses and accuracies.
        task: plain text (loss), a task with answers (accuracy), or inputs of an encoder or vision model.
        calibration: what `massive.detect` returned for other prompts; gives the layer, the means and the criteria.
        layer: whose output is overwritten; None for the first with massive activations in half the calibration prompts.
        to: which interventions, of "zero" and "mean"; the unchanged model is always measured.
        batch_size: prompts a forward pass.

    Returns:
        Result, rows per prompt, `component` ("unchanged", "set to zero", "set to mean"), `layer` and `metric`:
        for text "loss" and "loss away from massive tokens" (predictions made at other positions than theirs), unit
        "nats per token", perplexity is exp of the mean; for a task with answers "answer first" (1 when it has the
        highest logit of all tokens) and, where wrong answers are given, "answer above wrong" (chance 0.5), unit "share
        of prompts"; else "cosine with unchanged output" of the first position, unit "cosine similarity".

    Raises:
        ValueError: no massive activations in the calibration prompts; unknown intervention.

    Cost: 1 + len(to) forward passes over `task`.

    Differs from the paper: its constants are written into the code per model; here they are measured, as in the
    re-run by arXiv 2503.22329.

    Example:
        >>> from interp.activations.massive import detect
        >>> from interp.models import toy
        >>> model = toy.inflated()
        >>> prompts = toy.random_tokens(model, 4, 8)
        >>> result = intervene(model, prompts[:2], calibration=detect(model, prompts[2:]))
        >>> sorted(result.table["component"].unique())
        ['set to mean', 'set to zero', 'unchanged']
    """
    if unknown := set(to) - {"zero", "mean"}:
        raise ValueError(f'intervention {sorted(unknown)[0]!r} is not known: use "zero" or "mean".')
    limits = criteria_of(calibration)
    where = first_layer(calibration) if layer is None else layer
    means = calibrated_means(calibration, where)
    tensor, mask = inputs(model, task)
    score, metrics, unit = _scorer(model, task, tensor, mask)
    arms = ["unchanged", *(f"set to {name}" for name in to)]
    replacements = {
        "unchanged": None,
        "set to zero": torch.zeros(2, model.d_model),
        "set to mean": by_class(model, means),
    }

    def batch(rows: slice) -> dict[str, np.ndarray]:
        found: list[Tensor] = []
        scores, before = [], None
        for arm in arms:
            hook = overwrite(mask[rows], replacements[arm], found, **limits)
            logits = run(model, tensor[rows], hooks=[(f"blocks.{where}.hook_resid_post", hook)], mask=mask[rows]).logits
            before = logits if before is None else before
            scores.append(score(logits, before, rows, found[-1]))
        return {"scores": np.stack(scores, axis=1)}

    identity = {"method": "massive.intervene", "task": fingerprint(task), "layer": where, **model.provenance, **limits}
    identity |= {"to": list(to), "means": [[*key, value] for key, value in sorted(means.items())]}
    scores = sweep(len(tensor), batch, batch_size=batch_size, identity=identity, description="interventions")["scores"]
    table = score_table(scores, where, arms, metrics)
    meta = provenance(model, task, calibration=calibration.meta["task_fingerprint"], layer=where, **limits)
    meta["means"] = {f"{kind}, dimension {feature}": value for (kind, feature), value in sorted(means.items())}
    return Result("massive.intervene", table, unit, meta=meta)


def criteria_of(detected: Result) -> dict[str, float]:
    """The two thresholds that a detection used.

    Args:
        detected: what `massive.detect` returned.

    Returns:
        {"min_magnitude", "min_ratio"}.
    """
    return {name: float(detected.meta[name]) for name in ("min_magnitude", "min_ratio")}


def calibrated_means(detected: Result, layer: int) -> dict[tuple[str, int], float]:
    """Mean massive activation of each dimension at a layer, first tokens and all other tokens apart.

    Args:
        detected: what `massive.detect` returned for the calibration prompts.
        layer: whose output is meant.

    Returns:
        {("first token" or "other token", dimension): mean}, in residual-stream units.

    Raises:
        ValueError: nothing is massive at that layer.
    """
    table = detected.filter(layer=layer).table
    if table.empty:
        raise ValueError(
            f"no massive activations after layer {layer} of {detected.meta['model']} in the calibration prompts; "
            f"layers that have some: {sorted(set(detected.table['layer']))}."
        )
    kind = np.where(table["component"] == "first token", *_KINDS)
    grouped = table.assign(component=kind).groupby(["component", "feature"])["value"].mean()
    return {(str(kind), int(feature)): float(value) for (kind, feature), value in grouped.items()}


def by_class(model: Model, means: Means) -> Tensor:
    """The means as a table, with a value for classes and dimensions that the calibration did not see.

    Args:
        model: for d_model.
        means: what `calibrated_means` returned.

    Returns:
        `[2 d_model]`, first tokens and other tokens. A dimension that was massive in one class only has that class's
        mean in both; one that never was is NaN: `overwrite` leaves it as it is.
    """
    table = torch.full((2, model.d_model), float("nan"))
    for (kind, feature), value in means.items():
        table[_KINDS.index(kind), feature] = value
    return torch.where(table.isnan(), table.flip(0), table)


def overwrite(
    mask: Tensor,
    replacement: Tensor | None,
    found: list[Tensor],
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
) -> HookFn:
    """A hook that overwrites massive entries of the residual stream.

    Args:
        mask: 1 on tokens, 0 on padding, `[batch pos]`.
        replacement: new values for first tokens and for other tokens, `[2 d_model]`; NaN leaves an entry as it is. None
            changes nothing and only looks.
        found: gets the positions that have massive entries appended, `[batch pos]`.
        min_magnitude: see `massive.detect`.
        min_ratio: see `massive.detect`.

    Returns:
        A function for `interp.models.run(hooks=...)` at a `hook_resid_post`.
    """
    first = first_token(mask)

    def hook(stream: Tensor, hook: object) -> Tensor | None:
        _, _, massive = _criteria(stream, mask, min_magnitude, min_ratio)
        found.append(torch.zeros_like(first) if massive is None else massive.any(-1))
        if replacement is None or massive is None:
            return None
        values = replacement.to(stream.device, stream.dtype)
        by_token = torch.where(first[..., None], values[0], values[1])
        return torch.where(massive & ~by_token.isnan(), by_token, stream)

    return hook


def score_table(scores: np.ndarray, layer: int, components: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Scores as a tidy table.

    Args:
        scores: `[prompt component metric]`.
        layer: whose output was changed.
        components: names of the second axis.
        metrics: names of the third axis.

    Returns:
        One row a score: `prompt layer component metric value`.
    """
    prompt, component, metric = np.indices(scores.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "prompt": prompt,
            "layer": layer,
            "component": np.array(components, dtype=object)[component],
            "metric": np.array(metrics, dtype=object)[metric],
            "value": scores.ravel(),
        }
    )


_Score = Callable[[Tensor, Tensor, slice, Tensor], np.ndarray]


def _scorer(model: Model, task: Task | Tensor, tensor: Tensor, mask: Tensor) -> tuple[_Score, list[str], str]:
    """What to measure on a model's output: a function to `[batch metric]`, the metrics' names, and the unit."""
    if not model.d_vocab:

        def cosine(output: Tensor, before: Tensor, rows: slice, massive: Tensor) -> np.ndarray:
            values = torch.nn.functional.cosine_similarity(output[:, 0].float(), before[:, 0].float(), dim=-1)
            return values[:, None].cpu().numpy()

        return cosine, ["cosine with unchanged output"], "cosine similarity"
    if isinstance(task, Task) and task.answers is not None:
        answers, wrong = task.answers, task.wrong

        def accuracy(logits: Tensor, before: Tensor, rows: slice, massive: Tensor) -> np.ndarray:
            last = logits[:, -1].cpu()  # tasks are padded on the left
            right = last.gather(1, answers[rows, None].cpu())[:, 0]
            values = [(right == last.max(1).values).float()]
            if wrong is not None:
                values.append((right > last.gather(1, wrong[rows, None].cpu())[:, 0]).float())
            return torch.stack(values, dim=1).numpy()

        return accuracy, ["answer first", "answer above wrong"][: 1 + (wrong is not None)], "share of prompts"

    def loss(logits: Tensor, before: Tensor, rows: slice, massive: Tensor) -> np.ndarray:
        losses = next_token_loss(logits, tensor[rows], mask[rows])
        away = losses.masked_fill(massive[:, :-1].to(losses.device), float("nan"))
        return torch.stack([losses.nanmean(1), away.nanmean(1)], dim=1).cpu().numpy()

    return loss, ["loss", "loss away from massive tokens"], "nats per token"
