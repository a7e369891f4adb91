"""Which numbers do the claims of *Information Flow Routes* (arXiv 2403.00824) ask for?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from interp.circuits.flow_kinds import pair_kinds
from interp.core.result import Result
from interp.models.model import Model
from interp.report.claims import untestable
from interp.tasks.task import Task

Head = tuple[int, int]

_WORDS = {
    "determiner": "the a an this these those each every any some its their his our your my",
    "preposition": "of in on at by with from into for under over between through during without",
    "conjunction": "and or but if because when while although unless whether",
    "auxiliary": "is are was were be been has have had can could may might must will would should does did",
    "punctuation": ", . : ; ( )",
}
#: Closed classes of English words, without those that are often of another class ("that", "to", "no", "her").
CLASSES: Mapping[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in _WORDS.items()}
#: Other tokens: those that go on with a word, and the rest.
CONTINUES, OTHER = "continues a word", "other"


def measured(
    model: Model, *, prose: Result, code: Result, edges: Result, heads: Mapping[str, Sequence[Head]], abc: Result,
    swapped: Result, patched: Result, seconds: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """The measurement of every claim in `data/papers/flow_routes/claims.csv`.

    Args:
        model: that was measured.
        prose: `flow_routes.components` of English prose, grouped by `token_classes`.
        code: the same of Python code, without groups.
        edges: `flow_kinds.kinds` of the prose with `edge_kinds`.
        heads: `head_kinds(edges)`.
        abc: `flow_routes.contrast` of IOI with other names.
        swapped: `flow_routes.contrast` of IOI with the prompts whose names are swapped.
        patched: `activation.patch` of "z" on the same prompts.
        seconds: CPU time of "routes" and of "patching" on these.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    active, in_code = frequency(prose), frequency(code)
    ranked = active["attn"].rank(pct=True)
    merging = frequency(prose.filter(target=CONTINUES))["attn"].rank(pct=True) if heads["merging"] else ranked
    effect = patched.summary(["layer", "head"]).set_index(["layer", "head"])["mean"].abs()
    contrast = abc.filter(component="attn").table.set_index(["layer", "head"])["value"].abs()
    found = {name: set(top(result)) for name, result in (("abc", abc), ("swapped", swapped))}
    strongest = set(effect.nlargest(10).index)
    no_gpt2 = untestable("needs GPT-2 small, which no package ships: run this notebook with model='gpt2'")
    none = untestable("no head of this model attends or merges so")
    return {
        "general": float(active["attn"].quantile(0.95) - active["attn"].median()),
        "previous": _share_in_top_fifth(ranked, heads["previous"]) if heads["previous"] else none,
        "merging": len(heads["merging"]),
        "merging_general": _share_in_top_fifth(merging, heads["merging"]) if heads["merging"] else none,
        "sinks": _weight(edges, "first"),
        "periods": _weight(edges, "full stop") / _weight(edges, "no full stop"),
        "classes": nearest_class(prose),
        "domain_heads": int(((active["attn"] - in_code["attn"]).abs() >= 0.3).sum()),
        "domain_ffn": int(((active["mlp"] - in_code["mlp"]).abs() >= 0.3).sum()),
        "contrast": len(found["abc"] & found["swapped"]) / 10,
        "patching_top": len(found["abc"] & strongest),
        "patching_rank": float(spearmanr(contrast, effect.reindex(contrast.index)).statistic),
        "speed": seconds["patching"] / seconds["routes"],
        "same_heads": len(found["abc"] & {(9, 9), (9, 6), (10, 0)}) if model.name == "gpt2" else no_gpt2,
    }


def frequency(components: Result) -> pd.Series:
    """The activation frequency of each component over all routes of all prompts and groups.

    Args:
        components: of `flow_routes.components`.

    Returns:
        A Series by component ("attn", "mlp"), layer and head.
    """
    table = components.table.assign(active=components.table["value_frequency"] * components.table["value_routes"])
    sums = table.groupby(["component", "layer", "head"], dropna=False)[["active", "value_routes"]].sum()
    return sums["active"] / sums["value_routes"]


def top(contrast: Result, n: int = 10) -> list[Head]:
    """The heads that matter most more on the first kind of prompts.

    Args:
        contrast: of `flow_routes.contrast`.
        n: how many.

    Returns:
        (layer, head), the largest contrast first.
    """
    table = contrast.filter(component="attn").table.nlargest(n, "value")
    return [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]


def token_classes(model: Model, task: Task) -> np.ndarray:
    """The word class of each token, as far as a list of words tells it.

    Args:
        model: for its tokenizer.
        task: prompts.

    Returns:
        Texts `[batch pos]`: a key of `CLASSES` for a word that is one token and in that list, `CONTINUES` for a piece
        that is not a word's first, else `OTHER`.
    """
    goes_on = pair_kinds(model, task)["word"].any(-1).cpu().numpy()
    named = {word: name for name, words in CLASSES.items() for word in words}
    found = np.full(goes_on.shape, OTHER, dtype=object)
    for row, ids in enumerate(task.clean):
        for pos, text in enumerate(model.to_str_tokens(ids)):
            whole = pos + 1 == len(ids) or not goes_on[row, pos + 1]
            found[row, pos] = named.get(text.strip().lower(), OTHER) if whole else OTHER
    found[goes_on] = CONTINUES
    return found


def edge_kinds(model: Model, task: Task) -> dict[str, Tensor]:
    """The kinds of edges that the claims tell apart, and all edges of the queries that they are shares of.

    Args:
        model: for its tokenizer.
        task: prompts.

    Returns:
        {name: `[batch q_pos k_pos]`}, for `flow_kinds.kinds`. The first token is no query.
    """
    kinds = pair_kinds(model, task)
    n_pos = task.clean.shape[1]
    later = kinds["first"].any(-1)[:, :, None].expand(-1, -1, n_pos)
    goes_on = kinds["word"].any(-1)[:, :, None]
    stops = [[text.strip() == "." for text in model.to_str_tokens(row)] for row in task.clean]
    stop = torch.tensor(stops, device=task.clean.device)[:, None, :] & later & ~kinds["first"]
    return {
        "later": later, "first": kinds["first"], "previous": kinds["previous"] & later, "full stop": stop,
        "no full stop": later & ~kinds["first"] & ~stop, "continues": later & goes_on, "starts": later & ~goes_on,
        "word": kinds["word"] & later, "previous of a start": kinds["previous"] & later & ~goes_on,
    }  # fmt: skip


def head_kinds(edges: Result) -> dict[str, list[Head]]:
    """Previous-token heads (by attention) and subword-merging heads (by importance), by the claims' bars.

    Args:
        edges: `flow_kinds.kinds` with `edge_kinds`.

    Returns:
        {"previous", "merging"}: (layer, head) each.
    """
    attention, value = _by_head(edges, "value_attention"), _by_head(edges, "value")
    within = value["word"] / value["continues"]
    before = value["previous of a start"] / value["starts"]
    previous = attention.index[attention["previous"] / attention["later"] > 0.4]
    merging = value.index[(within >= 0.5) & (before <= 0.25)]
    return {name: [(int(layer), int(head)) for layer, head in found] for name, found in
            (("previous", previous), ("merging", merging))}  # fmt: skip


def nearest_class(components: Result) -> float:
    """How often the heads active on a word class are nearest to those of the same class in the other prompts.

    Args:
        components: of `flow_routes.components`, grouped by `token_classes`.

    Returns:
        The share of pairs of a prompt and a class; 0.2 by chance.
    """
    table = components.filter(component="attn", target=list(CLASSES)).table
    vectors = table.pivot_table(index=["target", "prompt"], columns=["layer", "head"], values="value_frequency")
    names = vectors.index.get_level_values("target")
    hits = []
    for (name, prompt), vector in vectors.iterrows():
        others = vectors[vectors.index.get_level_values("prompt") != prompt]
        centres = others.groupby(names[vectors.index.get_level_values("prompt") != prompt]).mean()
        hits.append(((centres - vector) ** 2).sum(axis=1).idxmin() == name)
    return float(np.mean(hits))


def number_tables(model: Model, *, n_prompts: int, length: int, seed: int) -> Task:
    """Windows of tables of random numbers.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of windows.
        length: tokens in each.
        seed: of the numbers.

    Returns:
        The Task.
    """
    rng = np.random.default_rng(seed)
    lines = [", ".join(map(str, row)) for row in rng.integers(0, 1000, size=(n_prompts * length // 8, 5))]
    ids = model.tokenize("\n".join(lines), prepend_bos=False).ids[0]
    windows = ids[: n_prompts * length].view(n_prompts, length)
    texts = tuple("".join(model.to_str_tokens(row)) for row in windows)
    return Task("number tables", texts, windows, f"random numbers below 1000, five a line, seed {seed}")


def _by_head(edges: Result, column: str) -> pd.DataFrame:
    """Sums over prompts: a row a head, a column a kind."""
    return edges.table.pivot_table(index=["layer", "head"], columns="target", values=column, aggfunc="sum")


def _weight(edges: Result, kind: str) -> float:
    """The share of the heads' importance that is on edges of a kind, over the share of their attention that is."""
    value, attention = (_by_head(edges, column).sum() for column in ("value", "value_attention"))
    return float((value[kind] / value["later"]) / (attention[kind] / attention["later"]))


def _share_in_top_fifth(ranked: pd.Series, heads: Sequence[Head]) -> float:
    return float(np.mean([ranked[head] > 0.8 for head in heads]))
