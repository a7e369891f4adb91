"""What does a massive activation carry, and what does zeroing it only break? Who writes it, who erases it?

Mechanism tests beyond *Massive Activations in Large Language Models* (arXiv 2402.17762): zeroing an
entry changes the keys and values that all later layers read at its token, so a collapse may show
only that a sink was lost, not that the entry carried anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.activations._inputs import fingerprint, first_token, inputs, provenance
from interp.activations.massive import _as_result, _criteria, _scan, first_layer
from interp.activations.massive_intervention import (
    Means,
    _scorer,
    by_class,
    calibrated_means,
    criteria_of,
    overwrite,
    score_table,
)
from interp.core.batching import batches, sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.check import require_live
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.tasks.task import Task

_PAPER = "arXiv:2402.17762"
Hooks = list[tuple[str, HookFn]]

#: The tests of `knockouts`, in the order they are run and shown.
TESTS = (
    "unchanged",
    "zero entries",
    "zero entries, keep keys and values",
    "zero entries, keep keys",
    "zero entries, keep values",
    "hide token as key",
    "zero entries, hide token as key",
    "set entries to mean",
    "zero whole vector",
    "zero random dimensions",
    "zero entries of a random token",
    "hide first token from layer 0",
)


@method(name="Massive activations: what zeroing breaks", paper=_PAPER, notebook="massive_activations")
def knockouts(
    model: Model,
    task: Task | Tensor,
    *,
    calibration: Result,
    layer: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
) -> Result:
    """Loss of a language model under twelve knock-outs that separate what a massive entry carries from its sink.

    All act after `layer`, on the tokens that have massive entries there (found in each prompt). "keep keys and values":
    the entries are zeroed in the stream, but later layers get the token's clean keys and values, so attention works as
    before. "hide token as key": no other position may attend to it in later layers, weights renormalised: the cost of
    losing the sink. Controls: as many random other dimensions of the same token; the same dimensions of a random token.

    Args:
        model: a decoder.
        task: plain text, for example `tasks.text(model)`.
        calibration: what `massive.detect` returned for other prompts; gives the layer, the means and the criteria.
        layer: whose output is changed; None for the first with massive activations in half the calibration prompts.
        seed: seed of the random dimensions and tokens.
        batch_size: prompts a forward pass.

    Returns:
        Result, rows per prompt, `component` (one of `TESTS`) and `metric` ("loss", "loss away from massive tokens");
        unit "nats per token". Each prompt's difference to "unchanged" is the effect.

    Raises:
        ValueError: nothing is massive in the calibration prompts, or the model is not a decoder.
        ModelCheckError: editing attention patterns does nothing on this architecture (OPT in TransformerLens 3.9).

    Cost: 12 forward passes over `task`; the clean keys and values of one batch in memory,
    2 x layers x batch x pos x d_head x KV heads.

    Example:
        >>> from interp.activations.massive import detect
        >>> from interp.models import toy
        >>> model = toy.inflated()
        >>> prompts = toy.random_tokens(model, 4, 8)
        >>> knockouts(model, prompts[:2], calibration=detect(model, prompts[2:])).table["component"].nunique()
        12
    """
    if not (model.causal and model.d_vocab):
        raise ValueError(f"{model.name} is a {model.kind} model: knock-outs are measured by the loss of a decoder.")
    require_live(model, "blocks.0.attn.hook_pattern")
    limits = criteria_of(calibration)
    where = first_layer(calibration) if layer is None else layer
    means = calibrated_means(calibration, where)
    tensor, mask = inputs(model, task)
    score, metrics, unit = _scorer(model, tensor, tensor, mask)

    def batch(rows: slice) -> dict[str, np.ndarray]:
        tokens, real = tensor[rows], mask[rows]
        later = range(where + 1, model.n_layers)
        keys, values = ([f"blocks.{i}.attn.hook_{part}" for i in later] for part in "kv")
        stream = f"blocks.{where}.hook_resid_post"
        clean = run(model, tokens, capture=[stream, *keys, *values], mask=real)
        massive = _criteria(clean.cache[stream], real, **limits)[2]
        if massive is None:
            massive = torch.zeros_like(clean.cache[stream], dtype=torch.bool)
        plans = _plans(model, where, massive, real, clean.cache, keys, values, means, seed + rows.start, limits)
        scores = []
        for test in TESTS:
            logits = clean.logits if test == "unchanged" else run(model, tokens, hooks=plans[test], mask=real).logits
            scores.append(score(logits, clean.logits, rows, massive.any(-1)))
        return {"scores": np.stack(scores, axis=1)}

    identity = {"method": "massive.knockouts", "task": fingerprint(task), "layer": where, "seed": seed}
    identity |= {**model.provenance, **limits, "means": [[*k, v] for k, v in sorted(means.items())]}
    scores = sweep(len(tensor), batch, batch_size=batch_size, identity=identity, description="knock-outs")["scores"]
    table = score_table(scores, where, TESTS, metrics)
    meta = provenance(model, task, calibration=calibration.meta["task_fingerprint"], layer=where, seed=seed, **limits)
    return Result("massive.knockouts", table, unit, meta=meta)


@method(name="Massive activations: where they move", paper=_PAPER, notebook="massive_activations")
def relocate(
    model: Model,
    task: Task | Tensor,
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    batch_size: int = 8,
) -> Result:
    """Massive activations when no position may attend to the first token, from layer 0 on.

    Args:
        model: a decoder.
        task: prompts.
        min_magnitude: see `massive.detect`.
        min_ratio: see `massive.detect`.
        batch_size: prompts a forward pass.

    Returns:
        Result with the rows, unit and arrays of `massive.detect`.

    Cost: one forward pass without the unembedding.

    Example:
        >>> from interp.models import toy
        >>> model = toy.inflated(token=0)
        >>> sorted(relocate(model, toy.random_tokens(model, 2, 8)).table["pos"].unique().tolist())
        [0]
    """
    tensor, mask = inputs(model, task)
    require_live(model, "blocks.0.attn.hook_pattern")
    first = first_token(mask)
    limits = {"min_magnitude": min_magnitude, "min_ratio": min_ratio}
    found = sweep(
        len(tensor),
        lambda rows: _scan(
            model, tensor[rows], mask[rows], rows.start, **limits, hooks=_hide(range(model.n_layers), first[rows])
        ),
        batch_size=batch_size,
        identity={"method": "massive.relocate", "task": fingerprint(task), **model.provenance, **limits},
        description="massive activations",
    )
    return _as_result("massive.relocate", found, model, task, hidden="first token", **limits)


@method(name="Massive activations: writers and erasers", paper=_PAPER, notebook="massive_activations")
def writers(model: Model, task: Task | Tensor, *, detected: Result, batch_size: int = 8) -> Result:
    """How much each attention and MLP output adds to every prompt's largest massive entry, exactly.

    The residual stream is a sum, so the entry at the last layer is the embedding's plus what every attention and MLP
    output added: H_L[t, i] = H_0[t, i] + sum over layers of attn_out[t, i] + mlp_out[t, i].

    Args:
        model: a decoder.
        task: the prompts that `detected` is about.
        detected: what `massive.detect` returned; it gives each prompt's (pos, feature) of largest magnitude. Prompts
            without a massive entry are left out.
        batch_size: prompts a forward pass.

    Returns:
        Result, rows per prompt, layer and `component` ("embedding" with layer 0, "attention", "MLP"), with the `pos`
        and `feature` of the entry; unit "residual-stream units". A prompt's rows sum to its entry after the last layer.

    Raises:
        ValueError: nothing is massive in `detected`.

    Cost: one forward pass without the unembedding.

    Example:
        >>> from interp.activations.massive import detect
        >>> from interp.models import toy
        >>> model = toy.inflated(layer=1)
        >>> prompts = toy.random_tokens(model, 2, 8)
        >>> result = writers(model, prompts, detected=detect(model, prompts))
        >>> result.top(1)[["layer", "component"]].values.tolist()
        [[1, 'MLP']]
    """
    tensor, mask, entries = _entries(model, task, detected)
    parts = [("blocks.0.hook_resid_pre", 0, "embedding")]
    for layer in range(model.n_layers):
        parts += [(f"blocks.{layer}.hook_attn_out", layer, "attention"), (f"blocks.{layer}.hook_mlp_out", layer, "MLP")]

    def batch(rows: slice) -> dict[str, np.ndarray]:
        pos, feature = (
            torch.tensor(entries[column].tolist()[rows], device=model.device) for column in ("pos", "feature")
        )
        read: dict[str, np.ndarray] = {}

        def at_entry(activation: Tensor, hook: object, name: str) -> None:
            read[name] = activation[torch.arange(len(pos)), pos, feature].float().cpu().numpy()

        hooks: Hooks = [(name, lambda a, hook, name=name: at_entry(a, hook, name)) for name, _, _ in parts]
        run(model, tensor[rows], hooks=hooks, mask=mask[rows], stop_after=model.n_layers - 1)
        return {"parts": np.stack([read[name] for name, _, _ in parts], axis=1)}

    identity = {"method": "massive.writers", "task": fingerprint(task), **model.provenance}
    identity["entries"] = entries.to_numpy().tolist()
    found = sweep(len(tensor), batch, batch_size=batch_size, identity=identity, description="writers")["parts"]
    row, part = np.indices(found.shape).reshape(2, -1)
    table = entries.iloc[row].reset_index(drop=True)
    table.insert(1, "layer", np.array([layer for _, layer, _ in parts])[part])
    table["component"] = np.array([component for _, _, component in parts], dtype=object)[part]
    table["value"] = found.ravel().astype(np.float64)
    return Result("massive.writers", table, "residual-stream units", meta=provenance(model, task))


@method(name="Massive activations: MLP neurons", paper=_PAPER, notebook="massive_activations")
def neurons(
    model: Model, task: Task | Tensor, *, detected: Result, layers: Sequence[int], k: int = 10, batch_size: int = 8
) -> Result:
    """Which MLP neurons write, or erase, every prompt's largest massive entry.

    Neuron n of a layer adds hook_post[t, n] x W_out[n, i] to entry (t, i); the output bias adds the rest.

    Args:
        model: a decoder whose MLP output is added to the stream as it is (not normalised again, as Gemma 2 does).
        task: the prompts that `detected` is about.
        detected: what `massive.detect` returned.
        layers: whose MLPs to look at, for example the ones that `writers` shows to write and to erase.
        k: neurons kept a layer, those of largest mean |value|.
        batch_size: prompts a forward pass.

    Returns:
        Result, rows per prompt, layer and `neuron`, and one row with neuron -1 for all other neurons and the bias, so
        that a prompt's rows of a layer sum to its MLP's contribution; unit "residual-stream units".

    Raises:
        ValueError: the neurons of a layer do not sum to its MLP's output.

    Cost: one forward pass up to the last of `layers`; in memory `[prompts d_mlp]` a layer, and `[batch pos d_mlp]`.

    Example:
        >>> from interp.activations.massive import detect
        >>> from interp.models import toy
        >>> model = toy.inflated(layer=1)
        >>> prompts = toy.random_tokens(model, 2, 8)
        >>> neurons(model, prompts, detected=detect(model, prompts), layers=[1], k=1).top(1)["neuron"].item()
        0
    """
    tensor, mask, entries = _entries(model, task, detected)
    position, dimension = (torch.tensor(entries[column].tolist()) for column in ("pos", "feature"))
    hooks_of = {layer: (f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out") for layer in layers}
    posts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    wholes: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for rows in batches(len(tensor), batch_size):
        index = torch.arange(len(position[rows])), position[rows]
        names = [name for pair in hooks_of.values() for name in pair]
        cache = run(model, tensor[rows], capture=names, mask=mask[rows], stop_after=max(layers)).cache
        for layer, (post, out) in hooks_of.items():
            posts[layer].append(cache[post][index].float().cpu())
            wholes[layer].append(cache[out][index[0], index[1], dimension[rows]].float().cpu())
    tables = []
    for layer in layers:
        each = _contributions(model, layer, torch.cat(posts[layer]), torch.cat(wholes[layer]), dimension)
        best = each.abs().mean(0).topk(min(k, each.shape[1])).indices.sort().values
        rest = torch.cat(wholes[layer]) - each[:, best].sum(1)
        values = torch.cat([each[:, best], rest[:, None]], dim=1)
        row, column = np.indices(values.shape).reshape(2, -1)
        table = entries.iloc[row].reset_index(drop=True)
        table.insert(1, "layer", layer)
        table["neuron"] = np.array([*best.tolist(), -1])[column]
        table["value"] = values.numpy().ravel().astype(np.float64)
        tables.append(table)
    meta = provenance(model, task, layers=list(layers), k=k)
    return Result("massive.neurons", pd.concat(tables, ignore_index=True), "residual-stream units", meta=meta)


def _contributions(model: Model, layer: int, post: Tensor, whole: Tensor, dimension: Tensor) -> Tensor:
    """What each neuron adds to each prompt's entry, `[prompt neuron]`; refused when they do not sum to the output."""
    mlp = model.bridge.blocks[layer].mlp
    column = mlp.W_out.detach()[:, dimension.to(mlp.W_out.device)].T.float().cpu()
    bias = 0.0 if mlp.b_out is None else mlp.b_out.detach().float().cpu()[dimension]
    each = post * column
    gap = float((each.sum(1) + bias - whole).abs().max() / whole.abs().max().clamp(min=1e-6))
    # A sum of thousands of float32 terms is good to 1e-3 of its size; bfloat16 activations have 8 bits.
    if gap > (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{model.name}: the neurons of layer {layer} sum to its MLP's output only to {gap:.0%}: something is "
            "applied to it after W_out (a norm, as in Gemma 2, or experts), so neurons cannot be told apart exactly."
        )
    return each


def _entries(model: Model, task: Task | Tensor, detected: Result) -> tuple[Tensor, Tensor, pd.DataFrame]:
    """The prompts that have massive entries, and the place of each one's largest: columns prompt, pos, feature."""
    if detected.table.empty:
        raise ValueError("nothing is massive in `detected`: there is no entry to attribute.")
    if detected.meta["task_fingerprint"] != fingerprint(task):
        raise ValueError("`detected` is about other prompts than `task`: call detect(model, task) first.")
    table = detected.table.assign(size=detected.table["value"].abs())
    largest = table.loc[table.groupby("prompt")["size"].idxmax(), ["prompt", "pos", "feature"]].reset_index(drop=True)
    tensor, mask = inputs(model, task)
    rows = torch.tensor(largest["prompt"].tolist(), device=tensor.device)
    return tensor[rows], mask[rows], largest


def _hide(layers: Sequence[int] | range, hidden: Tensor) -> Hooks:
    """Hooks that let no other position attend to the hidden ones `[batch pos]`: their weight goes to the others.

    On the pattern: renormalised, this is the same as setting the scores to -inf before the softmax.
    """

    def hook(pattern: Tensor, hook: object) -> Tensor:
        own = torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        kept = pattern.masked_fill(hidden[:, None, None, :] & ~own, 0.0)
        total = kept.sum(-1, keepdim=True)
        # A row that saw nothing but hidden tokens keeps what it had.
        return torch.where(total > 0, kept / total.clamp(min=torch.finfo(kept.dtype).tiny), pattern)

    return [(f"blocks.{layer}.attn.hook_pattern", hook) for layer in layers]


def _keep(names: Sequence[str], clean: dict[str, Tensor], tokens: Tensor) -> Hooks:
    """Hooks that give the chosen tokens `[batch pos]` their clean keys or values `[batch pos kv_head d_head]`."""

    def restore(activation: Tensor, hook: object, name: str) -> Tensor:
        return torch.where(tokens[..., None, None], clean[name], activation)

    return [(name, lambda activation, hook, name=name: restore(activation, hook, name)) for name in names]


def _plans(
    model: Model,
    layer: int,
    massive: Tensor,
    mask: Tensor,
    clean: dict[str, Tensor],
    keys: Sequence[str],
    values: Sequence[str],
    means: Means,
    seed: int,
    limits: dict[str, float],
) -> dict[str, Hooks]:
    """The hooks of every test but "unchanged", for one batch."""
    stream = f"blocks.{layer}.hook_resid_post"
    tokens = massive.any(-1)
    first = first_token(mask)
    generator = torch.Generator().manual_seed(seed)
    # As many random dimensions of each massive token as it has massive ones, none of them massive.
    noise = torch.rand(massive.shape, generator=generator).to(massive.device).masked_fill(massive, -1.0)
    counts = massive.sum(-1, keepdim=True)
    dimensions = tokens[..., None] & (noise.argsort(-1, descending=True).argsort(-1) < counts)
    # A random other token of each prompt, the same dimensions.
    chance = torch.rand(mask.shape, generator=generator).to(mask.device)
    chance = chance.masked_fill(tokens | first | (mask == 0), -1.0)
    other = torch.zeros_like(tokens)
    other[torch.arange(len(mask)), chance.argmax(1)] = True
    elsewhere = other[..., None] & massive.any(1, keepdim=True)

    def zero(where: Tensor) -> Hooks:
        return [(stream, lambda h, hook: h.masked_fill(where, 0.0))]

    later = range(layer + 1, model.n_layers)
    return {
        "zero entries": zero(massive),
        "zero entries, keep keys and values": [*zero(massive), *_keep([*keys, *values], clean, tokens)],
        "zero entries, keep keys": [*zero(massive), *_keep(keys, clean, tokens)],
        "zero entries, keep values": [*zero(massive), *_keep(values, clean, tokens)],
        "hide token as key": _hide(later, tokens),
        "zero entries, hide token as key": [*zero(massive), *_hide(later, tokens)],
        "set entries to mean": [(stream, overwrite(mask, by_class(model, means), [], **limits))],
        "zero whole vector": zero(tokens[..., None].expand_as(massive)),
        "zero random dimensions": zero(dimensions),
        "zero entries of a random token": zero(elsewhere),
        "hide first token from layer 0": _hide(range(model.n_layers), first),
    }
