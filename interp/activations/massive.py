"""Which activations of the residual stream are massive, where do they sit, and do they vary?

*Massive Activations in Large Language Models* (arXiv 2402.17762): a few entries of the residual
stream are thousands of times larger than the median, sit in fixed dimensions, at the first token
and at delimiters, and hardly depend on the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.activations._inputs import fingerprint, first_positions, inputs, provenance, token_kind, token_namer
from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.tasks.task import Task

_PAPER = "arXiv:2402.17762"
_RANKS = ("largest |h|", "second |h|", "third |h|", "median |h|")


class NonFiniteActivationError(ValueError):
    """An activation is NaN or infinite."""


@method(name="Massive activations: detection", paper=_PAPER, notebook="massive_activations")
def detect(
    model: Model,
    task: Task | Tensor,
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    batch_size: int = 8,
) -> Result:
    """Every entry of the residual stream that is massive by the paper's two criteria.

    H_l `[pos d_model]` is the residual stream of one prompt at the output of block l (after both residual adds, before
    the final norm). Entry H_l[t, i] is massive when |H_l[t, i]| > `min_magnitude` and |H_l[t, i]| >= `min_ratio` x the
    median of |H_l| over all its pos x d_model entries. The median, and so the criterion, is each prompt's own.

    Args:
        model: a decoder, encoder or vision model. Centring the writing weights (processed LayerNorm models such as
            GPT-2) shifts entries by their mean over d_model; load with weights="raw" to compare with published values.
        task: a Task, token ids `[batch pos]`, or for a vision model pixels `[batch channel height width]`.
        min_magnitude: smallest magnitude, in units of the residual stream.
        min_ratio: smallest multiple of the layer's median.
        batch_size: prompts a forward pass; it does not change the numbers beyond rounding.

    Returns:
        Result, one row a massive entry: `prompt layer pos feature token value value_ratio`; unit "residual-stream
        units"; `value` is signed, `value_ratio` is |value| / median, `feature` the residual dimension, `component` the
        token's class ("first token", "delimiter", "other token"). No rows when nothing is massive. Arrays
        "profile" `[prompt layer rank]`: the three largest |h| and the median of each layer (see `layer_profile`).

    Raises:
        NonFiniteActivationError: with prompt, layer, position and dimension of the first NaN or infinite entry.
        ValueError: no prompts, or prompts longer than the context.

    Cost: one forward pass without the unembedding; one layer's stream in memory at a time, `[batch_size pos d_model]`.

    Differs from the paper: its code caches every layer of one prompt and shows the top 3; the thresholds are those of
    its text. torch's median of an even count is the lower of the two middle values.

    Example:
        >>> from interp.models import toy
        >>> model = toy.inflated(layer=1, feature=3, token=0)
        >>> detect(model, toy.random_tokens(model, 2, 8)).table[["prompt", "layer", "pos", "feature"]].values.tolist()
        [[0, 1, 0, 3], [0, 2, 0, 3], [1, 1, 0, 3], [1, 2, 0, 3]]
    """
    tensor, mask = inputs(model, task)
    options = {"min_magnitude": min_magnitude, "min_ratio": min_ratio}
    found = sweep(
        len(tensor),
        lambda rows: _scan(model, tensor[rows], mask[rows], rows.start, min_magnitude, min_ratio),
        batch_size=batch_size,
        identity={"method": "massive.detect", "task": fingerprint(task), **model.provenance, **options},
        description="massive activations",
    )
    return _as_result("massive.detect", found, model, task, **options)


@method(name="Massive activations: layer profile", paper=_PAPER, notebook="massive_activations")
def layer_profile(detected: Result) -> Result:
    """The three largest magnitudes and the median of every layer, per prompt.

    Args:
        detected: what `detect` returned.

    Returns:
        Result, one row per prompt, layer and metric ("largest |h|", "second |h|", "third |h|", "median |h|"): prompts x
        layers x 4 rows; unit "residual-stream units".

    Cost: none; `detect` kept the numbers.

    Example:
        >>> from interp.models import toy
        >>> model = toy.inflated(layer=1, feature=3, token=0)
        >>> layer_profile(detect(model, toy.random_tokens(model, 2, 8))).filter(metric="median |h|").table.shape
        (6, 4)
    """
    profile = detected.arrays["profile"][1]
    n_prompts, n_layers, _ = profile.shape
    prompt, layer, rank = np.indices(profile.shape).reshape(3, -1)
    table = pd.DataFrame(
        {"prompt": prompt, "layer": layer, "metric": np.array(_RANKS, dtype=object)[rank], "value": profile.ravel()}
    )
    return Result("massive.layer_profile", table, detected.unit, meta=detected.meta)


@method(name="Massive activations: location", paper=_PAPER, notebook="massive_activations")
def locate(detected: Result) -> Result:
    """In which layers, dimensions and kinds of token massive activations sit, and in what share of the prompts.

    Args:
        detected: what `detect` returned.

    Returns:
        Result, one row per layer, dimension (`feature`) and class of token (`component`: "first token", "delimiter",
        "other token") with any massive entry; `value` is the share of prompts that have one there, `value_magnitude`
        the mean |value| of those entries. Unit "share of prompts".

    Cost: none; a grouping of the table.

    Example:
        >>> from interp.models import toy
        >>> model = toy.inflated(layer=1, feature=3, token=0)
        >>> locate(detect(model, toy.random_tokens(model, 2, 8))).table["value"].tolist()
        [1.0, 1.0]
    """
    keys = ["layer", "feature", "component"]
    entries = detected.table.assign(value_magnitude=detected.table["value"].abs())
    grouped = entries.groupby(keys, sort=True)
    table = pd.DataFrame(
        {
            "value": grouped["prompt"].nunique() / detected.meta["n_prompts"],
            "value_magnitude": grouped["value_magnitude"].mean(),
        }
    ).reset_index()
    return Result("massive.locate", table, "share of prompts", meta=detected.meta)


@method(name="Massive activations: constancy", paper=_PAPER, notebook="massive_activations")
def constancy(detected: Result) -> Result:
    """How little massive activations vary over inputs and over layers.

    For each layer, dimension and class of token: the mean over prompts of the signed value, and its coefficient of
    variation s.d. / |mean|. A prompt with several entries there counts once, with their mean.

    Args:
        detected: what `detect` returned.

    Returns:
        Result, one row per layer, `feature` and `component` that at least two prompts share; `value` is the coefficient
        of variation over prompts, `value_mean` and `value_sd` the mean and standard deviation in residual-stream units,
        `value_prompts` the number of prompts. Unit "coefficient of variation".

    Cost: none; a grouping of the table.

    Example:
        >>> from interp.models import toy
        >>> model = toy.inflated(layer=1, feature=3, token=0)
        >>> constancy(detect(model, toy.random_tokens(model, 4, 8))).table["value_prompts"].tolist()
        [4, 4]
    """
    keys = ["layer", "feature", "component"]
    per_prompt = detected.table.groupby([*keys, "prompt"], sort=True)["value"].mean()
    grouped = per_prompt.groupby(level=keys)
    table = pd.DataFrame(
        {"value_mean": grouped.mean(), "value_sd": grouped.std(), "value_prompts": grouped.size()}
    ).reset_index()
    table = table[table["value_prompts"] >= 2].reset_index(drop=True)
    table.insert(3, "value", table["value_sd"] / table["value_mean"].abs())
    return Result("massive.constancy", table, "coefficient of variation", meta=detected.meta)


def first_layer(detected: Result, *, share: float = 0.5) -> int:
    """The first layer whose output has a massive activation in at least a share of the prompts.

    A single prompt's early precursor that just passes the threshold does not count as the layer where they appear.

    Args:
        detected: what `detect` returned.
        share: smallest share of the prompts.

    Returns:
        The layer.

    Raises:
        ValueError: there is none; the largest ratio that was seen is given.
    """
    prompts = detected.table.groupby("layer")["prompt"].nunique() / detected.meta["n_prompts"]
    layers = prompts.index[prompts >= share]
    if len(layers) == 0:
        profile = detected.arrays["profile"][1]
        ratio = float((profile[..., 0] / profile[..., 3]).max())
        raise ValueError(
            f"no layer of {detected.meta['model']} has massive activations in {share:.0%} of the prompts: the largest "
            f"entry is {profile[..., 0].max():.0f}, {ratio:.0f} times its layer's median. Lower min_ratio or "
            "min_magnitude in detect() if that is what you want to call massive."
        )
    return int(layers.min())


def _as_result(name: str, found: dict[str, np.ndarray], model: Model, task: Task | Tensor, **options: Any) -> Result:
    """The table of massive entries, with the text and class of their tokens, from what `_scan` found."""
    where, values = found["where"], found["values"]
    named = token_namer(model, task)
    starts = first_positions(inputs(model, task)[1])
    tokens = [named(int(prompt), int(pos)) for prompt, _, pos, _ in where]
    kinds = [
        token_kind(token, bool(pos == starts[prompt])) for token, (prompt, _, pos, _) in zip(tokens, where, strict=True)
    ]
    table = pd.DataFrame(where, columns=["prompt", "layer", "pos", "feature"]).assign(
        token=np.array(tokens, dtype=object),
        component=np.array(kinds, dtype=object),
        value=values[:, 0].astype(np.float64),
        value_ratio=values[:, 1].astype(np.float64),
    )
    table = table.sort_values(["prompt", "layer", "pos", "feature"], ignore_index=True)
    arrays = {"profile": (("prompt", "layer", "rank"), found["profile"])}
    meta = provenance(model, task, n_prompts=len(starts), n_layers=model.n_layers, **options)
    return Result(name, table, "residual-stream units", arrays, meta)


def _scan(
    model: Model,
    tensor: Tensor,
    mask: Tensor,
    offset: int,
    min_magnitude: float,
    min_ratio: float,
    hooks: Sequence[tuple[str, HookFn]] = (),
) -> dict[str, np.ndarray]:
    """Run one batch; each layer's stream is reduced inside its hook and never kept."""
    profile = np.empty((len(tensor), model.n_layers, len(_RANKS)), dtype=np.float32)
    where: list[np.ndarray] = []
    values: list[np.ndarray] = []

    def reduce(layer: int, stream: Tensor) -> None:
        top, median, massive = _criteria(stream.detach(), mask, min_magnitude, min_ratio)
        if not bool(top[:, 0].isfinite().all()):  # NaN sorts above everything, so it is in the top too
            raise _non_finite(model, layer, stream, offset)
        profile[:, layer] = torch.cat([top, median[:, None]], dim=1).cpu().numpy()
        if massive is None:
            return
        index = massive.nonzero(as_tuple=True)
        prompt, pos, feature = (axis.cpu().numpy() for axis in index)
        entries = stream[index].float()
        where.append(np.stack([prompt + offset, np.full_like(prompt, layer), pos, feature], axis=1))
        values.append(torch.stack([entries, entries.abs() / median[index[0]]], dim=1).cpu().numpy())

    reducers: list[tuple[str, HookFn]] = [
        (f"blocks.{layer}.hook_resid_post", lambda stream, hook, layer=layer: reduce(layer, stream))
        for layer in range(model.n_layers)
    ]
    run(model, tensor, hooks=[*hooks, *reducers], mask=mask, stop_after=model.n_layers - 1)
    return {
        "profile": profile,
        "where": np.concatenate(where) if where else np.empty((0, 4), dtype=np.int64),
        "values": np.concatenate(values) if values else np.empty((0, 2), dtype=np.float32),
    }


def _criteria(
    stream: Tensor, mask: Tensor, min_magnitude: float, min_ratio: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Top three |h| `[batch 3]`, median `[batch]`, and where it is massive `[batch pos d_model]`, None if nowhere."""
    size = stream.abs()
    padded = not bool(mask.all())
    if padded:
        size = size.masked_fill(~mask.bool()[..., None], -1.0)  # padding has no activations
    flat = size.flatten(1)
    top = flat.topk(3, dim=1).values.float()
    median = _median(flat, mask.sum(1) * size.shape[2] if padded else None)
    if not bool(((top[:, 0] > min_magnitude) & (top[:, 0] >= min_ratio * median)).any()):
        return top, median, None
    size = size.float()
    return top, median, (size > min_magnitude) & (size >= min_ratio * median[:, None, None])


def _median(flat: Tensor, counts: Tensor | None) -> Tensor:
    """Lower median of each row; with counts, of the `counts[row]` largest entries (the rest is padding at -1)."""
    if counts is None:
        return flat.median(dim=1).values.float()
    rows = [
        row.topk(int(count), largest=True, sorted=False).values.median()
        for row, count in zip(flat, counts, strict=True)
    ]
    return torch.stack(rows).float()


def _non_finite(model: Model, layer: int, stream: Tensor, offset: int) -> NonFiniteActivationError:
    prompt, pos, feature = (int(i) for i in (~stream.isfinite()).nonzero()[0])
    value = float(stream[prompt, pos, feature])
    return NonFiniteActivationError(
        f"{model.name}: the residual stream after layer {layer} is {value} at prompt {prompt + offset}, "
        f"position {pos}, dimension {feature} ({model.dtype}). float16 overflows at 65,504: load with "
        "dtype='bfloat16' or 'float32'."
    )
