"""Which numbers do the claims of *Label Words are Anchors* (arXiv 2305.14160) ask for?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.core.result import Result
from interp.flow.anchor_compression import TARGETS, anchors_of, keep, resume
from interp.flow.anchors import COMPONENTS
from interp.models.model import Model
from interp.report.claims import untestable
from interp.tasks.task import Task

#: Layers of these shares of the depth are shallow and deep.
_THIRD, _HALF = 1 / 3, 1 / 2


def crossings(found: Mapping[str, Result]) -> pd.DataFrame:
    """The layer from which on S_pq stays above S_wp, and the means over shallow and deep layers.

    Args:
        found: {task: `anchors.saliency`}.

    Returns:
        A row a task: the layer (counted from 0; the number of layers where it never does), and S_wp, S_pq, S_ww of the
        first third and the last half of the layers.
    """
    rows = {}
    for task, result in found.items():
        mean = result.grid("layer", "component")
        below = np.flatnonzero(mean["pq"] <= mean["wp"])
        row = {"S_pq above S_wp from layer": int(below[-1]) + 1 if len(below) else 0}
        for name, part in (("first third", _first(mean, _THIRD)), ("last half", _last(mean, _HALF))):
            row |= {f"S_{kind}, {name}": part[kind].mean() for kind in COMPONENTS}
        rows[task] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def isolated(found: Mapping[str, Result]) -> pd.DataFrame:
    """Label loyalty (and word loyalty) of isolation, mean over prompts.

    Args:
        found: {task: `anchors.isolation`}.

    Returns:
        A row a task, and one of their mean; columns are which words, and in which layers.
    """
    columns = {"value": "label loyalty", "value_words": "word loyalty"}
    rows = {
        task: pd.concat({
            title: result.table.groupby(["target", "component"])[column].mean() for column, title in columns.items()
        })
        for task, result in found.items()
    }  # fmt: skip
    table = pd.DataFrame(rows).T
    return pd.concat([table, table.mean().to_frame("mean").T]).rename_axis(columns=["", "words", "layers"])


def compression(found: Mapping[str, Result]) -> pd.DataFrame:
    """Label loyalty, word loyalty and accuracy of every way to compress, mean over prompts and then over tasks.

    Args:
        found: {task: `anchor_compression.compressed`}.

    Returns:
        A row a target; columns are the three measures, each for every task and their mean.
    """
    titles = {"value": "label loyalty", "value_words": "word loyalty", "value_right": "accuracy"}
    tables = {
        title: pd.DataFrame({task: result.table.groupby("target")[column].mean() for task, result in found.items()})
        for column, title in titles.items()
    }
    joined = pd.concat({title: table.assign(mean=table.mean(axis=1)) for title, table in tables.items()}, axis=1)
    return joined.loc[[*TARGETS]]


def speed(model: Model, task: Task, *, repeats: int = 3) -> tuple[float, float]:
    """CPU seconds of a full prompt, and of its query with the anchors kept, by the same code.

    The time of reading the demonstrations once is not in the second number.

    Args:
        model: a decoder.
        task: see `interp.flow.anchor_compression`.
        repeats: pairs of runs, in the order A B B A; after one that does not count.

    Returns:
        (full, compressed), medians, a prompt.
    """
    first = torch.zeros(len(task), dtype=torch.long, device=task.clean.device)
    if task.mask is not None:
        first = task.mask.long().argmax(1)
    whole = replace(task, positions=dict(task.positions) | {"query": first})
    nothing = keep(model, whole, first.new_empty(len(task), 0))
    kept = keep(model, task, anchors_of(model, task))
    seconds: dict[str, list[float]] = {"full": [], "compressed": []}
    for turn in range(repeats + 1):
        runs = [("full", whole, nothing), ("compressed", task, kept)]
        for name, prompts, given in runs if turn % 2 else runs[::-1]:
            started = time.process_time()
            resume(model, prompts, given)
            if turn:
                seconds[name].append((time.process_time() - started) / len(task))
    return float(np.median(seconds["full"])), float(np.median(seconds["compressed"]))


def confusion_by_layer(found: Mapping[str, Result]) -> pd.DataFrame:
    """Spearman's correlation of key distance and confusion over the pairs of classes, in each layer.

    Args:
        found: {task: `anchor_errors.confusion`}, of tasks with more than one pair.

    Returns:
        Layers down, tasks across.
    """
    return pd.DataFrame({
        task: {
            layer: pairs["value"].rank().corr(pairs["value_confused"].rank())
            for layer, pairs in result.table.groupby("layer")
        }
        for task, result in found.items()
    }).rename_axis("layer")  # fmt: skip


def flows(shares: Mapping[str, Result], agreed: Mapping[str, Result]) -> pd.DataFrame:
    """Attention measures in the last layer: their share on the first token, and agreement with importance.

    Args:
        shares: {measure: `rollout.sink`}.
        agreed: {measure: `rollout.agreement`}.

    Returns:
        A row a measure: the share, what it is for attention without preferences, and the mean correlation in the last
        layer and over all layers but the first; means over prompts.
    """
    rows = {}
    for measure, result in shares.items():
        last = result.table[result.table["layer"] == result.table["layer"].max()]
        correlation = agreed[measure].table.groupby("layer")["value"].mean()
        rows[measure] = {
            "share on the first token": last["value"].mean(),
            "of even attention": last["value_uniform"].mean(),
            "correlation, last layer": correlation.iloc[-1],
            "correlation, layers after the first": correlation.iloc[1:].mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def measured(
    *,
    saliency: Mapping[str, Result],
    isolation: Mapping[str, Result],
    aucroc: Mapping[str, Result],
    compressed: Mapping[str, Result],
    confusions: Mapping[str, Result],
    speeds: Mapping[str, tuple[float, float]],
    before: Result,
    after: Result,
    rolled: Result,
    piped: Result,
    attention: pd.DataFrame,
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/label_anchors/claims.csv`.

    Args:
        saliency: {task: `anchors.saliency`}.
        isolation: {task: `anchors.isolation`}.
        aucroc: {task: `anchors.aucroc`}.
        compressed: {task: `anchor_compression.compressed`}.
        confusions: {task: `anchor_errors.confusion`}.
        speeds: {task: `speed`}.
        before: `anchor_reweighting.reweighted` with betas of zero.
        after: the same with trained betas.
        rolled: `rollout.influence` by "rollout".
        piped: `rollout.influence` by "flow".
        attention: `flows`, with rows "raw", "rollout" and "flow".

    Returns:
        {claim id: number}, for `claims.check`.
    """
    means = crossings(saliency)
    shallow = {kind: means[f"S_{kind}, first third"] for kind in COMPONENTS}
    deep = {kind: means[f"S_{kind}, last half"] for kind in COMPONENTS}
    loyal = isolated(isolation).loc["mean", "label loyalty"]
    kept = compression(compressed).xs("mean", axis=1, level=1)
    label, words, accuracy = (kept[name] for name in ("label loyalty", "word loyalty", "accuracy"))
    areas = pd.DataFrame({task: result.table["value"] for task, result in aucroc.items()})
    shares = pd.DataFrame({task: result.table["value_cumulative"] for task, result in aucroc.items()})
    agreement = attention["correlation, layers after the first"]
    prompts = range(len(piped.arrays["unnormalised"][1]))
    whole = np.stack([rolled.arrays["matrix"][1][i, :, rolled.meta["at"][i]] for i in prompts])
    return {
        "sums": max(_unsummed(result) for result in saliency.values()),
        "shallow_wp": int((shallow["wp"] > shallow["ww"]).sum()),
        "shallow_order": int((shallow["wp"] > shallow["pq"]).sum()),
        "deep_pq": int(((deep["pq"] > deep["wp"]) & (deep["pq"] > deep["ww"])).sum()),
        "isolate_first": loyal["random", "first"] - loyal["label", "first"],
        "isolate_last": loyal["label", "last"],
        "auc_deep": _last(areas, _THIRD).to_numpy().mean(),
        "auc_shallow": _first(shares, _THIRD).iloc[-1].mean(),
        "reweighting": after.table["value"].mean() - before.table["value"].mean(),
        "anchor_loyalty": label["anchor"],
        "anchor_random": label["anchor"] - label["random"],
        "anchor_top": label["anchor"] - label["random_top"],
        "anchor_text": label["anchor"] - label["text"],
        "anchor_words": words["anchor"] - words["random"],
        "anchor_accuracy": accuracy["full"] - accuracy["anchor"],
        "speed_up": min(full / short for full, short in speeds.values()),
        "confusion": _or_untestable(_last(confusion_by_layer(confusions), _THIRD).to_numpy().mean()),
        "flow_rollout": float((piped.arrays["unnormalised"][1] - whole).min()),
        "rollout_raw": agreement["rollout"] - agreement["raw"],
        "flow_raw": agreement["flow"] - agreement["raw"],
        "sink_collapse": attention.loc["rollout", "share on the first token"],
    }


def _or_untestable(correlation: float) -> Any:
    if np.isnan(correlation):
        return untestable("all pairs of classes of a task are confused equally often, so nothing can correlate with it")
    return float(correlation)


def _unsummed(found: Result) -> float:
    """How much the three kinds miss of the saliency below the diagonal, relative to it, at most."""
    table = found.table
    sums = (table["value"] * table["value_pairs"]).groupby([table["prompt"], table["layer"]]).sum().unstack().to_numpy()
    whole = np.tril(found.arrays["saliency"][1], -1).sum((2, 3))
    return float(np.abs(sums / whole - 1).max())


def _first(by_layer: pd.DataFrame, share: float) -> pd.DataFrame:
    return by_layer.iloc[: round(share * len(by_layer))]


def _last(by_layer: pd.DataFrame, share: float) -> pd.DataFrame:
    return by_layer.iloc[-round(share * len(by_layer)) :]
