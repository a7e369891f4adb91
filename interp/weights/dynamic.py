"""Do heads write on prompts what their weights say? MAPS's dynamic scores, and their correlation with the static ones.

*Inferring Functionality of Attention Heads from their Parameters* (arXiv 2412.11965), its correlative experiment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.tasks.relations import Relations
from interp.weights import maps
from interp.weights._parts import checked_layers, output_maps, require_vocabulary, unembedding
from interp.weights._ranks import Layout, ranks
from interp.weights._values import prompts_of, read
from interp.weights.maps import PAPER, paper_k

#: Names of the two scores in the column `src`: what the head writes at the last position, and what it would write there
#: if it attended to the source alone.
WITH, WITHOUT = "with context", "without context"
#: Names in the column `component` of `correlation`, beside the templates themselves.
POOLED, MEAN = "templates together", "mean of templates"


@method(name="MAPS: dynamic scores", paper=PAPER, notebook="maps")
def dynamic_scores(
    model: Model,
    relations: Relations,
    *,
    templates: Sequence[str] | None = None,
    k: int | None = None,
    multi_token: bool = False,
    layers: Sequence[int] | None = None,
    batch_size: int = 1024,
) -> Result:
    """How strongly each head promotes and suppresses each relation on prompts.

    A prompt is a template with a pair's source in it. With context, a head's vector is z W_O W_U, with z at the last
    position: what the head writes there. Without context it is v W_O W_U, with v the value (bias included) of the
    head's key-value group at the source's last token: what the head would write if it attended to the source alone. The
    scores are those of `maps.relation_scores`, of these vectors instead of a row of the head's map: the share of the
    pairs whose target is among the k largest, or smallest, entries. Ties rank the target last; the bias of the output
    map and the final norm are left out.

    Args:
        model: a decoder with raw weights.
        relations: from `interp.tasks.relations`, for this model's tokenizer.
        templates: each with "{source}" in it once; None for `relations.templates`, the paper's four.
        k: how many entries count, for every relation; None for the paper's (see `maps.paper_k`). `rescored` gives
            others.
        multi_token: ask about the pairs whose source is several tokens (`Relation.multi_token`); relations without any
            are left out (`meta["left_out"]`). The paper does so with the template that ends in the source only.
        layers: which layers; None for all.
        batch_size: prompts whose values are held at once, and stored when done.

    Returns:
        Result, unit "share of pairs", a row for each relation (`target`), template (`component`), `src` ("with context"
        or "without context"), `layer`, `head` and `metric` ("promotes", "suppresses"), with the values of
        `maps.relation_scores`. Arrays "rank" and "rank_suppressed" `[src pair template layer head]`, from 0;
        "relation" `[pair]` (index into `meta["relations"]`) and "target" `[pair]`, token ids.

    Raises:
        ValueError: processed weights, a model that is no decoder, no templates or a wrong one, no pairs, no such layer,
            k below 1, a template whose following text the tokenizer joins with the source.

    Cost: a forward pass without the unembedding over the different prompts (sources x templates), and for each of
        these, each head and each token of the vocabulary 4 d_head FLOPs and two comparisons a target: far more than the
        pass. Memory: z at one position and v at another, batch_size x layers x (heads + groups) x d_head, and a few
        tiles; never a row of the vocabulary. Can be stopped and resumed, batch by batch.

    Differs from the paper: its code makes a second pass with the attention set to the source for the score without
    context; as it holds all else as it was, the value vector says the same. Its code finds the source by its token,
    which a template with the same token ("story") misleads; here it is found by its place. Special tokens are those
    that the model's tokenizer adds of its own accord (GPT-2 and SmolLM2: none), as in the paper.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import Relation, Relations
        >>> model = toy.random("llama", weights="raw")
        >>> copying = Relation.from_pairs(model, "copying", [(f"w{i}", f"w{i}") for i in range(2, 32)])
        >>> scores = dynamic_scores(model, Relations((copying,)), templates=["w5 {source} w6", "w7 {source}"], k=10)
        >>> len(scores.table), scores.arrays["rank"][1].shape
        (96, (2, 30, 2, 3, 4))
    """
    _require_raw_decoder(model)
    wanted = checked_layers(model, layers)
    asked = list(relations.templates if templates is None else templates)
    kept = [(relation, relation.multi_token if multi_token else relation.pairs) for relation in relations]
    left_out = [relation.name for relation, pairs in kept if not pairs]
    kept = [(relation, pairs) for relation, pairs in kept if pairs]
    if not kept or (left_out and not multi_token):
        tokens = "several tokens" if multi_token else "one token"
        raise ValueError(f"the relation {left_out[0]!r} has no pairs whose source is {tokens}: leave it out.")
    pairs = [pair for _, each in kept for pair in each]
    prompts = prompts_of(model, pairs, asked)
    targets = np.repeat(np.array([pair.target_token for pair in pairs])[:, None], len(asked), 1)
    # Pairs of a prompt by its number, so that a batch of prompts has consecutive ones.
    unique, back = np.unique(np.stack([prompts.index.ravel(), targets.ravel()], 1), axis=0, return_inverse=True)
    options = {"templates": asked, "multi_token": multi_token, "layers": wanted}

    def compute(rows: slice) -> Mapping[str, np.ndarray]:
        own = unique[(unique[:, 0] >= rows.start) & (unique[:, 0] < rows.stop)] - [rows.start, 0]
        z, v = read(model, prompts.texts[rows], prompts.position[rows], wanted)
        return _ranked(model, own, z, v, wanted)

    found = sweep(
        len(prompts.texts), compute, batch_size=batch_size, description="dynamic scores",
        identity={"method": "dynamic.scores", "relations": relations.fingerprint, **model.provenance, **options},
    )  # fmt: skip
    shape = (len(pairs), len(asked))
    dims = ("src", "pair", "component", "layer", "head")
    which = np.repeat(np.arange(len(kept)), [len(each) for _, each in kept])
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (dims, np.moveaxis(found[name][back.ravel()].reshape(*shape, *found[name].shape[1:]), 2, 0))
        for name in found
    }
    arrays |= {"relation": (("pair",), which), "target": (("pair",), targets[:, 0])}
    meta = {
        **model.provenance, **options, "relations": [relation.name for relation, _ in kept], "left_out": left_out,
        "task_fingerprint": relations.fingerprint, "n_layers": model.n_layers, "n_heads": model.n_heads,
        "n_key_value_heads": model.n_key_value_heads, "d_vocab": unembedding(model).shape[1],
        "n_prompts": len(prompts.texts),
    }  # fmt: skip
    ks = {relation.name: paper_k(model.name, relation) if k is None else k for relation, _ in kept}
    return rescored(Result("dynamic.dynamic_scores", pd.DataFrame(), "share of pairs", arrays, meta), k=ks)


def rescored(scores: Result, *, k: int | Mapping[str, int]) -> Result:
    """The same dynamic scores at another k, from the ranks that were kept.

    Args:
        scores: what `dynamic_scores` returned.
        k: how many entries count, for every relation or by its name.

    Returns:
        A Result as `dynamic_scores` returns it.

    Raises:
        ValueError: k below 1, or a relation without one.

    Cost: none; a mean over the stored ranks.
    """
    frames, ks = [], k
    for which, src in enumerate((WITH, WITHOUT)):
        for index, template in enumerate(scores.meta["templates"]):
            arrays = {
                name: (("pair", "layer", "head"), scores.arrays[name][1][which, :, index])
                for name in ("rank", "rank_suppressed")
            }
            part = Result(
                scores.method, pd.DataFrame(), scores.unit, {**arrays, "relation": scores.arrays["relation"]},
                scores.meta,
            )  # fmt: skip
            counted = maps.rescored(part, k=k)
            ks = counted.meta["k"]
            frames.append(counted.table.assign(component=template, src=src))
    table = pd.concat(frames, ignore_index=True)
    return Result(scores.method, table, scores.unit, scores.arrays, {**scores.meta, "k": ks})


def _ranked(model: Model, pairs: np.ndarray, z: Tensor, v: Tensor, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Both ranks `[pair src layer head]` of pairs (prompt, target) `[pair 2]`."""
    n, w_u = z.shape[1], unembedding(model)
    # The prompts with context, then those without, as rows of one problem: W_O W_U is made once for both.
    rows = np.concatenate([pairs[:, 0], n + pairs[:, 0]])
    layout = Layout.of(rows, np.tile(pairs[:, 1], 2), model.device)
    w_u_targets = w_u[:, layout.targets].float()
    shape = (len(pairs), 2, len(layers), model.n_heads)
    found = {name: np.empty(shape, dtype=np.int32) for name in ("rank", "rank_suppressed")}
    per_group = model.n_heads // model.n_key_value_heads
    for index, layer in enumerate(layers):
        both = torch.cat([z[index], v[index].repeat_interleave(per_group, 1)]).float().transpose(0, 1)
        ranked = ranks(layout, both[:, layout.sources], output_maps(model, layer), w_u, w_u_targets)
        for name, each in zip(found, ranked, strict=True):
            found[name][:, :, index] = each.cpu().numpy().reshape(2, len(pairs), -1).swapaxes(0, 1)
    return found


def _require_raw_decoder(model: Model) -> None:
    require_vocabulary(model)
    if model.kind != "decoder" or model.weights != "raw":
        raise ValueError(
            f"{model.name} is {'a decoder with processed weights' if model.kind == 'decoder' else f'a {model.kind}'}: "
            "dynamic scores are set beside the static ones of raw weights. Load a decoder with "
            'interp.load("smollm2-135m", weights="raw").'
        )


@method(name="MAPS: static against dynamic", paper=PAPER, notebook="maps")
def correlation(static: Result, dynamic: Result, *, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> Result:
    """How well the static scores of heads say their dynamic ones, by Pearson's r.

    r over heads, of a relation's static scores with its dynamic ones: for each template, for the mean of the templates,
    and for the templates together, where each head is a point for each template with the same static score (the
    paper's). The intervals resample heads, each with all of its templates, because the templates of one head are not
    independent; heads of one key-value group may not be either, so that with few groups the intervals are too narrow.

    Args:
        static: what `maps.relation_scores` returned.
        dynamic: what `dynamic_scores` returned for the same model, at the same k; the heads and relations that both
            have count.
        n_boot: number of bootstrap resamples.
        level: coverage of the percentile interval.
        seed: of the bootstrap.

    Returns:
        Result, unit "Pearson r", a row for each relation (`target`), `metric` ("promotes", "suppresses"), `src` ("with
        context", "without context") and `component` ("templates together", "mean of templates", or a template):
        `value`, `value_low`, `value_high`, `value_max` (the largest static score: where no head has the relation, r
        says nothing) and `value_heads`. r is NaN where a score is the same for all heads, listed in
        `meta["undefined"]` with the reason.

    Raises:
        ValueError: different models or k, or no relation or head in common.

    Cost: none to speak of; n_boot x rows x heads products.

    Differs from the paper: it gives p-values for the templates together, as if all points were independent; here there
    are intervals over heads.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import Relation, Relations
        >>> model = toy.random("llama", weights="raw")
        >>> own = Relations((Relation.from_pairs(model, "next", [(f"w{i}", f"w{i + 1}") for i in range(2, 62)]),))
        >>> dynamic = dynamic_scores(model, own, templates=["w7 {source}"], layers=[0])
        >>> found = correlation(maps.relation_scores(model, own), dynamic)
        >>> found.filter(src="without context", component="templates together").table["value"].round(1).tolist()
        [0.6, 0.9]
    """
    names = _common(static, dynamic)
    cells = ["target", "metric", "src", "layer", "head"]
    wide = dynamic.filter(target=names).table.pivot(index=cells, columns="component", values="value")
    fixed = static.table.set_index(["target", "metric", "layer", "head"])["value"].sort_index()
    rows: list[dict[str, object]] = []
    undefined = []
    for key, own in wide.groupby(["target", "metric", "src"], sort=True):
        target, metric, src = key
        x = fixed.loc[target, metric].reindex(own.index.droplevel([0, 1, 2])).to_numpy()
        there = ~np.isnan(x)
        if not there.any():
            raise ValueError("static and dynamic scores have no head in common: score the same layers in both.")
        x, y = x[there], own[dynamic.meta["templates"]].to_numpy()[there]
        # One template at a time, then all as one: the points of a head have one weight in a resample.
        kinds = {POOLED: y, MEAN: y.mean(1, keepdims=True)}
        kinds |= {template: y[:, [i]] for i, template in enumerate(dynamic.meta["templates"])}
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=n_boot).astype(float)
        for component, scores in kinds.items():
            r = _pearson(x, scores, np.ones((1, len(x))))[0]
            low = high = np.nan
            if np.isnan(r):
                constant = "static" if np.ptp(x) == 0 else "dynamic"
                why = f"the {constant} score is the same for all heads"
                undefined.append({"target": target, "metric": metric, "src": src, "component": component, "why": why})
            else:
                # A resample without the few heads that have a score at all has no r.
                low, high = np.nanquantile(_pearson(x, scores, weights), [(1 - level) / 2, (1 + level) / 2])
            rows.append({
                "target": target, "metric": metric, "src": src, "component": component, "value": r, "value_low": low,
                "value_high": high, "value_max": x.max(), "value_heads": len(x),
            })  # fmt: skip
    meta = {
        **dynamic.meta, "embedding": static.meta["embedding"], "seed": seed, "n_boot": n_boot, "level": level,
        "undefined": undefined,
    }  # fmt: skip
    return Result("dynamic.correlation", pd.DataFrame(rows), "Pearson r", meta=meta)


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's r `[resample]` of x `[head]` and all columns of y `[head template]` as one sample, heads weighted."""
    x, y = x - x.mean(), y - y.mean()
    n_templates = y.shape[1]
    total = weights.sum(1) * n_templates
    mean_x, mean_y = weights @ x * n_templates / total, weights @ y.sum(1) / total
    var_x = weights @ (x * x) * n_templates / total - mean_x**2
    var_y = weights @ (y * y).sum(1) / total - mean_y**2
    both = weights @ (x * y.sum(1)) / total - mean_x * mean_y
    # Scores are shares of pairs, which differ by more than 1e-4 if at all: less than 1e-12 is rounding.
    product = np.where((var_x > 1e-12) & (var_y > 1e-12), var_x * var_y, np.nan)
    return both / np.sqrt(product)


def _common(static: Result, dynamic: Result) -> list[str]:
    """Relations of both, refused where the two cannot be compared."""
    if static.meta["model_fingerprint"] != dynamic.meta["model_fingerprint"]:
        raise ValueError(f"the scores are of two models: {static.meta['model']} and {dynamic.meta['model']}.")
    names = [name for name in dynamic.meta["relations"] if name in static.meta["relations"]]
    if not names:
        raise ValueError("the static and the dynamic scores have no relation in common: score the same ones in both.")
    for name in names:
        ours, theirs = static.meta["k"][name], dynamic.meta["k"][name]
        if ours != theirs:
            raise ValueError(
                f"the relation {name!r} is scored at k={ours} and at k={theirs}: bring both to one, "
                f"maps.rescored(static, k={theirs})."
            )
    return names
