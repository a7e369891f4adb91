"""Which tokens does each head speak of? The top and bottom of several lenses side by side, a tile of logits at a time.

Three estimands of one head are three questions, and their lists differ: what it adds to the output (direct), its part
of what a layer's heads explain together (additive), what its value alone lets one guess (independent).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._final import final_norm
from interp.lenses._output import Output, output, tiles
from interp.lenses._reading import Positions, Rows, as_task, rows_of
from interp.lenses.attention import AttentionLens
from interp.lenses.tuned import TunedLens
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.patching._inputs import provenance
from interp.tasks.task import Task

#: What `value` is the contribution of: the tokens whose logit a part raises most, and those that it lowers most.
SIDES = ("promotes", "suppresses")
#: Positions whose activations are in memory together.
_TOKENS = 512

Lens = AttentionLens | TunedLens | Literal["logit"]


@method(name="Tokens of heads", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def top_tokens(
    model: Model,
    lenses: Mapping[str, Lens],
    prompts: str | Sequence[str] | Task | Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Positions = -1,
    k: int = 10,
) -> Result:
    """The tokens that each head promotes and suppresses most at a position, by each of several lenses.

    With z `[d_head]` of a head at a position, a lens gives every token of the vocabulary a logit:

        additive      A z            the head's part of the layer's joint lens
        independent   A z            of the head's own lens
        direct        (z W_O) gamma / sigma U    what the head adds to the model's logits, sigma that of this run

    and `value` is that logit less its mean over the vocabulary, since the level of logits means nothing. Biases are
    left out: they are the same at every position (of an additive lens, for all heads of a layer too), and would put the
    commonest tokens on top everywhere. So no list is a prediction: it is what this z moves. Lenses of the stream, for
    comparison, are read as they predict: `value` is their logit, bias and all, less its mean, of the stream before the
    layer.

    Args:
        model: that the lenses are of.
        lenses: {name: lens}, in the order in which they are shown: attention lenses, tuned lenses, "logit" for the
            logit lens.
        prompts: one text, several, a task, or token ids `[batch pos]`.
        layers: which; None for all that every lens has.
        heads: which of each layer; None for all.
        positions: names of the task or indices; None for all that are no padding. Texts of unequal length are padded on
            the left, so that -1 is the last token of each.
        k: tokens of either side.

    Returns:
        Result, unit "logits"; for each prompt, pos, layer, head (-1 for the stream), component (name of the lens) and
        metric ("promotes", "suppresses") k rows, strongest first: src (the token at the position), token, value,
        value_rank (from 0) and value_token (its id). Tokens beyond the tokenizer's, which pad some vocabularies, are
        left out. `meta["prompts"]` holds the tokens of each prompt (None for padding), `meta["estimands"]` what each
        lens is.

    Raises:
        ValueError: no lens, a lens of another model or weight mode, a layer or head that is not there, k out of range.

    Cost: one forward pass without the unembedding; then 2 d_model d_vocab FLOPs for each position, head and lens.
        Memory: z of 512 positions, and a few tiles of 16 MB of logits.

    Example:
        >>> from interp.lenses.attention import direct
        >>> from interp.models import toy
        >>> model = toy.induction()
        >>> found = top_tokens(model, {"direct": direct(model)}, "w2 w3 w4 w2", layers=[1], k=1)
        >>> found.filter(metric="promotes").top(1)[["layer", "head", "token"]].values.tolist()
        [[1, 0, 'w3']]
    """
    way = output(model)
    task = _task(model, prompts)
    chosen = _layers(model, lenses, layers)
    own = list(range(model.n_heads)) if heads is None else list(dict.fromkeys(heads))
    if not own or min(own) < 0 or max(own) >= model.n_heads:
        raise ValueError(f"heads={own}: {model.name} has heads 0 to {model.n_heads - 1}.")
    n_tokens = min(model.d_vocab, len(model.tokenizer))
    if not 1 <= k <= n_tokens:
        raise ValueError(f"k={k}: keep from 1 to {n_tokens} tokens of either side.")
    rows = rows_of(model, task, positions, "next")
    frames: list[pd.DataFrame] = []
    spans = list(batches(len(task), max(1, _TOKENS // task.clean.shape[1])))
    for span in tqdm(spans, desc="top tokens", leave=False, disable=len(spans) < 2):
        inside = (rows.prompt >= span.start) & (rows.prompt < span.stop)
        if not bool(inside.any()):
            continue
        some = Rows(*(part[inside] for part in rows))
        frames += _batch(model, way, lenses, task[span], some, span.start, chosen, own, n_tokens, k)
    estimands = {n: getattr(lens, "estimand", lens if isinstance(lens, str) else "tuned") for n, lens in lenses.items()}
    meta = provenance(
        model, task, layers=chosen, heads=own, k=k, estimands=estimands, prompts=_texts(model, task),
        centred="value is a logit less its mean over the vocabulary",
    )  # fmt: skip
    return Result("reading.top_tokens", _table(model, task, pd.concat(frames), list(lenses)), "logits", meta=meta)


def _task(model: Model, prompts: str | Sequence[str] | Task | Tensor) -> Task:
    if isinstance(prompts, (Task, Tensor)):
        return as_task(model, prompts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids, mask = model.tokenize(texts)
    return Task("texts", tuple(texts), ids, "texts given by the caller", mask=None if bool(mask.all()) else mask)


def _layers(model: Model, lenses: Mapping[str, Lens], layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, or all that every lens has."""
    if not lenses:
        raise ValueError(
            'no lenses were given: name some, for example {"direct": interp.lenses.attention.direct(model)}.'
        )
    known = set(range(model.n_layers))
    for name, lens in lenses.items():
        if isinstance(lens, str):
            if lens != "logit":
                raise ValueError(f'lens {name!r} is {lens!r}: give an attention lens, a tuned lens, or "logit".')
            continue
        lens.require(model)
        known &= set(lens.layers)
    chosen = sorted(known) if layers is None else list(dict.fromkeys(layers))
    if not chosen or not set(chosen) <= known:
        raise ValueError(
            f"layers={None if layers is None else chosen}: the lenses have layers {sorted(known)} in common: name some "
            "of these, or give lenses of more layers."
        )
    return chosen


def _batch(
    model: Model,
    way: Output,
    lenses: Mapping[str, Lens],
    task: Task,
    rows: Rows,
    first: int,
    layers: list[int],
    heads: list[int],
    n_tokens: int,
    k: int,
) -> list[pd.DataFrame]:
    """The rows of some prompts, which start at `first`."""
    norm, last = final_norm(model), hook_name("resid_post", model.n_layers - 1)
    sites = {"z" if isinstance(lens, AttentionLens) else "resid_pre" for lens in lenses.values()}
    hooks = [hook_name(site, layer) for site in sorted(sites) for layer in layers]
    cache = run(model, task.clean, capture=[*hooks, last], mask=task.mask, stop_after=model.n_layers - 1).cache
    at = rows.prompt - first, rows.pos
    seen = {name: cache.pop(name)[at] for name in dict.fromkeys([*hooks, last])}
    stream = seen[last].float()
    scale = norm.inverse_scale(stream, norm.norm(seen[last]).float())
    frames = []
    for layer in layers:
        for name, lens in lenses.items():
            if isinstance(lens, AttentionLens):
                numbers, read = heads, _of_heads(model, lens, layer, heads, seen[hook_name("z", layer)].float(), scale)
            else:
                numbers, read = [-1], _of_stream(way, lens, layer, seen[hook_name("resid_pre", layer)])
            parts = [
                _ends(read(tile)[..., :n_tokens], k) for tile in tiles(len(rows.prompt), model.d_vocab * len(numbers))
            ]
            values, ids = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
            frames.append(_frame(rows, layer, numbers, name, values, ids))
    return frames


def _of_heads(
    model: Model, lens: AttentionLens, layer: int, heads: list[int], z: Tensor, scale: Tensor
) -> Callable[[slice], Tensor]:
    # An independent lens's logits are its prediction; what z moves is that without its bias.
    bias = lens.biases[layer][heads] if lens.estimand == "independent" else 0.0
    return lambda tile: lens.logits(model, layer, z[tile], heads=heads, scale=scale[tile]) - bias


def _of_stream(
    way: Output, lens: TunedLens | Literal["logit"], layer: int, stream: Tensor
) -> Callable[[slice], Tensor]:
    def read(tile: slice) -> Tensor:
        moved = stream[tile] if isinstance(lens, str) else lens.translate(layer, stream[tile])
        return way.logits(moved)[:, None]

    return read


def _ends(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest and the k smallest of `[... token]`, less the mean, and their ids: `[... side rank]`."""
    centred = logits - logits.mean(-1, keepdim=True)
    top, bottom = centred.topk(k, -1), centred.topk(k, -1, largest=False)
    return torch.stack([top.values, bottom.values], -2), torch.stack([top.indices, bottom.indices], -2)


def _frame(
    rows: Rows, layer: int, heads: Sequence[int], name: str, values: np.ndarray, ids: np.ndarray
) -> pd.DataFrame:
    """A table of `[row head side rank]`, still without texts."""
    row, head, side, rank = (axis.ravel() for axis in np.indices(values.shape))
    return pd.DataFrame({
        "prompt": rows.prompt.cpu().numpy()[row], "pos": rows.pos.cpu().numpy()[row], "layer": layer,
        "head": np.asarray(heads)[head], "component": name, "metric": np.asarray(SIDES, dtype=object)[side],
        "value": values.ravel().astype(float), "value_rank": rank, "value_token": ids.ravel(),
    })  # fmt: skip


def _table(model: Model, task: Task, found: pd.DataFrame, lenses: Sequence[str]) -> pd.DataFrame:
    """The rows in order, prompt by prompt and lens by lens within each head, with the tokens' texts."""
    found = found.assign(_lens=found["component"].map({name: i for i, name in enumerate(lenses)}))
    by = ["prompt", "pos", "layer", "head", "_lens", "metric", "value_rank"]
    found = found.sort_values(by, ignore_index=True).drop(columns="_lens")
    source = task.clean.cpu().numpy()[found["prompt"], found["pos"]]
    known = np.unique(np.concatenate([found["value_token"], source])).tolist()
    text = dict(zip(known, model.to_str_tokens(known), strict=True))
    found["src"] = [text[i] for i in source.tolist()]
    found["token"] = [text[i] for i in found["value_token"].tolist()]
    return found[["prompt", "pos", "src", "layer", "head", "component", "metric", "token", "value", "value_rank",
                  "value_token"]]  # fmt: skip


def _texts(model: Model, task: Task) -> list[list[str | None]]:
    """The tokens of each prompt, None where it is padded."""
    real = torch.ones_like(task.clean) if task.mask is None else task.mask
    return [
        [text if kept else None for text, kept in zip(model.to_str_tokens(ids), mask, strict=True)]
        for ids, mask in zip(task.clean.tolist(), real.tolist(), strict=True)
    ]
