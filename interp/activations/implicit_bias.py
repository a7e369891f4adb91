"""How much of the attention output is a constant that comes from massive tokens?

*Massive Activations in Large Language Models* (arXiv 2402.17762), section on attention: tokens with
massive activations draw most attention, and what they add to the output hardly depends on the query
or the prompt, so it acts as a bias.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.activations._inputs import fingerprint, inputs, provenance
from interp.activations.massive import first_layer
from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.tasks.task import Task

_METRICS = (
    "attention on massive tokens",
    "norm of bias",
    "norm of rest",
    "variation of bias over queries",
    "variation of rest over queries",
)


@method(name="Massive activations: implicit attention bias", paper="arXiv:2402.17762", notebook="massive_activations")
def decompose(model: Model, task: Task | Tensor, *, detected: Result, batch_size: int = 8) -> Result:
    """Split every head's output into the part from massive tokens, the implicit bias, and the rest.

    With attention pattern p and values v, and C the tokens that have a massive entry at the first layer with massive
    activations: z[q] = sum over k in C of p[q, k] v[k]  +  sum over k not in C of p[q, k] v[k]. The first sum is the
    bias; if it is one it is the same vector for every query. Only queries after the first massive token, and not
    massive themselves, count.

    Args:
        model: a decoder.
        task: the prompts that `detected` is about.
        detected: what `massive.detect` returned. Prompts without massive entries are left out.
        batch_size: prompts a forward pass.

    Returns:
        Result, rows per prompt, layer, head (query head) and metric: "attention on massive tokens" (share, mean over
        queries), "norm of bias" and "norm of rest" (mean over queries of the part's length in `hook_z` units),
        "variation of bias over queries" and "variation of rest over queries" (share of the part's squared length that
        is not its mean over queries: 0 for a constant, 1 when the mean vanishes). Unit "share, or hook_z units for
        norms". Array "bias" `[prompt layer head d_head]`: each prompt's mean bias vector.

    Raises:
        ValueError: nothing is massive in `detected`, or it is about other prompts.

    Cost: one forward pass; one layer's pattern `[batch head pos pos]` and values in memory at a time. With
    grouped-query attention the values stay grouped: query head h reads KV group h // (n_heads / n_key_value_heads).

    Differs from the paper: it shows heat maps of single heads; this gives numbers for all.

    Example:
        >>> from interp.activations.massive import detect
        >>> from interp.models import toy
        >>> model = toy.inflated()
        >>> prompts = toy.random_tokens(model, 2, 8)
        >>> decompose(model, prompts, detected=detect(model, prompts)).arrays["bias"][1].shape
        (2, 3, 4, 8)
    """
    if detected.meta["task_fingerprint"] != fingerprint(task):
        raise ValueError("`detected` is about other prompts than `task`: call detect(model, task) first.")
    entries = detected.filter(layer=first_layer(detected)).table
    prompts = np.unique(entries["prompt"])
    tensor, mask = (t[torch.as_tensor(prompts).to(t.device)] for t in inputs(model, task))
    massive = torch.zeros(mask.shape, dtype=torch.bool)
    massive[np.searchsorted(prompts, entries["prompt"]), entries["pos"].tolist()] = True

    identity = {"method": "massive.implicit_bias", "task": fingerprint(task), "massive": massive.nonzero().tolist()}
    found = sweep(
        len(tensor),
        lambda rows: _batch(model, tensor[rows], mask[rows], massive[rows].to(model.device)),
        batch_size=batch_size,
        identity={**identity, **model.provenance},
        description="implicit bias",
    )
    row, layer, head, metric = np.indices(found["metrics"].shape).reshape(4, -1)
    table = pd.DataFrame(
        {
            "prompt": prompts[row],
            "layer": layer,
            "head": head,
            "metric": np.array(_METRICS, dtype=object)[metric],
            "value": found["metrics"].ravel().astype(np.float64),
        }
    )
    arrays = {"bias": (("prompt", "layer", "head", "d_head"), found["bias"])}
    return Result("massive.implicit_bias", table, "share, or hook_z units for norms", arrays, provenance(model, task))


def agreement(decomposed: Result) -> Result:
    """How alike the bias vectors of different prompts are.

    Args:
        decomposed: what `decompose` returned.

    Returns:
        Result, one row per layer and head: mean cosine similarity of a prompt's mean bias with the mean over all other
        prompts; unit "cosine similarity". 1 for a bias that does not depend on the prompt.

    Raises:
        ValueError: fewer than two prompts.

    Cost: none; `decompose` kept the vectors.
    """
    bias = decomposed.arrays["bias"][1].astype(np.float64)
    if len(bias) < 2:
        raise ValueError("agreement over prompts needs at least two prompts with massive activations.")
    others = bias.sum(0, keepdims=True) - bias
    length = np.linalg.norm(bias, axis=-1) * np.linalg.norm(others, axis=-1)
    cosine = ((bias * others).sum(-1) / np.maximum(length, np.finfo(float).tiny)).mean(0)
    layer, head = np.indices(cosine.shape).reshape(2, -1)
    table = pd.DataFrame({"layer": layer, "head": head, "value": cosine.ravel()})
    return Result("massive.bias_agreement", table, "cosine similarity", meta=decomposed.meta)


def split(pattern: Tensor, values: Tensor, massive: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums of the decomposition.

    Args:
        pattern: attention pattern `[batch head q_pos k_pos]`.
        values: values, grouped, `[batch k_pos kv_head d_head]`.
        massive: which tokens are in C, boolean `[batch k_pos]`.

    Returns:
        (bias, rest), both `[batch q_pos head d_head]`; their sum is `hook_z`.
    """
    batch, heads, n_queries, n_keys = pattern.shape
    grouped = pattern.reshape(batch, values.shape[2], -1, n_queries, n_keys)
    chosen = massive[:, None, None, None, :]

    def mix(weights: Tensor) -> Tensor:
        mixed = torch.einsum("bgrqk,bkgd->bqgrd", weights, values)
        return mixed.reshape(batch, n_queries, heads, values.shape[3])

    return mix(grouped * chosen), mix(grouped * ~chosen)


def _batch(model: Model, tokens: Tensor, mask: Tensor, massive: Tensor) -> dict[str, np.ndarray]:
    metrics = np.empty((len(tokens), model.n_layers, model.n_heads, len(_METRICS)), dtype=np.float32)
    bias_mean = np.empty((len(tokens), model.n_layers, model.n_heads, model.d_head), dtype=np.float32)
    values: dict[int, Tensor] = {}
    # Queries that can see a massive token and are not one.
    queries = (massive.cumsum(1) > 0) & ~massive & mask.bool()
    weight = queries.float() / queries.sum(1, keepdim=True).clamp(min=1)

    def keep(layer: int, v: Tensor) -> None:
        values[layer] = v

    def reduce(layer: int, pattern: Tensor) -> None:
        bias, rest = split(pattern.float(), values.pop(layer).float(), massive)
        share = (pattern.float() * massive[:, None, None, :]).sum(-1)
        columns = [torch.einsum("bhq,bq->bh", share, weight)]
        columns += [torch.einsum("bqh,bq->bh", part.norm(dim=-1), weight) for part in (bias, rest)]
        columns += [_variation(part, weight) for part in (bias, rest)]
        metrics[:, layer] = torch.stack(columns, dim=-1).cpu().numpy()
        bias_mean[:, layer] = torch.einsum("bqhd,bq->bhd", bias, weight).cpu().numpy()

    hooks: list[tuple[str, HookFn]] = []
    for layer in range(model.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_v", lambda v, hook, layer=layer: keep(layer, v)))
        hooks.append((f"blocks.{layer}.attn.hook_pattern", lambda p, hook, layer=layer: reduce(layer, p)))
    run(model, tokens, hooks=hooks, mask=mask, stop_after=model.n_layers - 1)
    return {"metrics": metrics, "bias": bias_mean}


def _variation(part: Tensor, weight: Tensor) -> Tensor:
    """1 - |mean over queries|^2 / mean of |.|^2, per head: `[batch head]`."""
    mean = torch.einsum("bqhd,bq->bhd", part, weight)
    power = torch.einsum("bqh,bq->bh", part.pow(2).sum(-1), weight)
    return 1 - mean.pow(2).sum(-1) / power.clamp(min=torch.finfo(power.dtype).tiny)
