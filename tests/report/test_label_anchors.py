"""The claims of Label Words are Anchors: each measurement on tables small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from interp.core.result import Result
from interp.models import toy
from interp.report import claims
from interp.report.claims import Untestable
from interp.report.papers import label_anchors as paper
from interp.tasks.task import Task


def saliency(**kinds):
    """One prompt of 4 tokens, 6 layers: {kind: a value a layer}, with 2, 1 and 3 pairs."""
    pairs = {"wp": 2, "pq": 1, "ww": 3}
    rows = [
        {"prompt": 0, "layer": layer, "component": kind, "value": kinds[kind][layer], "value_pairs": pairs[kind]}
        for layer in range(6)
        for kind in ("wp", "pq", "ww")
    ]
    whole = np.zeros((1, 6, 4, 4))
    whole[0, :, 3, 0] = [sum(kinds[kind][layer] * pairs[kind] for kind in kinds) for layer in range(6)]
    whole[0, :, 0, 0] = 7.0  # the diagonal is none of it
    arrays = {"saliency": (("prompt", "layer", "q_pos", "k_pos"), whole)}
    return Result("anchors.saliency", pd.DataFrame(rows), "nats", arrays=arrays)


def isolation(label_first, label_last, random_first):
    rows = [("label", "first", label_first), ("label", "last", label_last), ("random", "first", random_first),
            ("random", "last", 1.0)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["target", "component", "value"]).assign(prompt=0, value_words=0.5)
    return Result("anchors.isolation", table, "share")


def compressed(**targets):
    rows = [{"prompt": 0, "target": t, **dict(zip(("value", "value_words", "value_right"), values, strict=True))}
            for t, values in targets.items()]  # fmt: skip
    return Result("anchor_compression.compressed", pd.DataFrame(rows), "share")


def confusion(values, confused):
    rows = [{"layer": layer, "src": "a", "dst": str(i), "value": each[i], "value_confused": confused[i]}
            for layer, each in enumerate(values) for i in range(3)]  # fmt: skip
    return Result("anchor_errors.confusion", pd.DataFrame(rows), "share of the largest distance")


def scored(values):
    above = np.array(values) - 0.5
    table = pd.DataFrame({"layer": range(6), "value": values, "value_cumulative": above.cumsum() / above.sum()})
    return Result("anchors.aucroc", table, "AUCROC")


def right(*values):
    return Result(
        "anchor_reweighting.reweighted", pd.DataFrame({"prompt": range(len(values)), "value": values}), "share"
    )


def some(**changes):
    good = saliency(wp=[3, 3, 1, 1, 1, 0], pq=[0, 0, 0, 4, 0, 9], ww=[1, 1, 1, 1, 1, 1])
    poor = saliency(wp=[1, 1, 1, 6, 6, 0], pq=[2, 2, 0, 4, 4, 9], ww=[4, 4, 1, 1, 1, 1])
    table = pd.DataFrame({"prompt": [0], "value": [0.0]})
    matrix = np.array([[[[0.5, 0.0], [0.3, 0.4]]]])
    arrays = {"matrix": (("prompt", "layer", "q_pos", "k_pos"), matrix)}
    rolled = Result("rollout.influence", table, "share", arrays=arrays, meta={"at": [1]})
    flow = {"unnormalised": (("prompt", "layer", "k_pos"), np.array([[[0.5, 0.6]]]))}
    piped = Result("rollout.influence", table, "share", arrays=flow)
    table = compressed(full=(1, 1, 0.9), anchor=(0.8, 0.6, 0.7), text=(0.5, 0.4, 0.6), random=(0.4, 0.1, 0.5),
                       random_top=(0.7, 0.1, 0.4))  # fmt: skip
    attention = pd.DataFrame(
        {"correlation, layers after the first": [0.1, 0.4, 0.05], "share on the first token": [0.2, 0.95, 0.1]},
        index=["raw", "rollout", "flow"],
    )
    given = {
        "saliency": {"a": good, "b": poor, "c": good},
        "isolation": {"a": isolation(0.4, 1.0, 0.9), "b": isolation(0.6, 0.8, 1.0)},
        "aucroc": {"a": scored([0.5, 0.6, 0.6, 0.7, 0.9, 0.7]), "b": scored([0.5, 0.5, 0.5, 0.5, 0.6, 1.0])},
        "compressed": {"a": table, "b": table},
        "confusions": {"a": confusion([[0, 0, 0]] * 4 + [[1, 2, 3]] * 2, [0.3, 0.2, 0.1])},
        "speeds": {"a": (3.0, 1.0), "b": (4.0, 2.0)},
        "before": right(0, 1), "after": right(1, 1), "rolled": rolled, "piped": piped, "attention": attention,
    }  # fmt: skip
    return paper.measured(**{**given, **changes})


def test_each_claim_by_hand():
    assert some() == {
        "sums": pytest.approx(0, abs=1e-12),
        "shallow_wp": 2, "shallow_order": 2,
        "deep_pq": 3,  # 13/3 against 2/3 and 1; in b 17/3 against 4 and 1
        "isolate_first": pytest.approx(0.95 - 0.5), "isolate_last": pytest.approx(0.9),
        "auc_deep": pytest.approx(0.8), "auc_shallow": pytest.approx((0.1 / 1.0 + 0) / 2),
        "reweighting": 0.5,
        "anchor_loyalty": pytest.approx(0.8), "anchor_random": pytest.approx(0.4), "anchor_top": pytest.approx(0.1),
        "anchor_text": pytest.approx(0.3), "anchor_words": pytest.approx(0.5), "anchor_accuracy": pytest.approx(0.2),
        "speed_up": 2.0, "confusion": pytest.approx(-1), "flow_rollout": pytest.approx(0.2),
        "rollout_raw": pytest.approx(0.3), "flow_raw": pytest.approx(-0.05), "sink_collapse": 0.95,
    }  # fmt: skip


def test_every_claim_is_measured():
    assert set(some()) == set(claims.read("label_anchors")[2]["id"])


def test_saliency_that_does_not_add_up_is_seen():
    broken = saliency(wp=[3] * 6, pq=[1] * 6, ww=[1] * 6)
    broken.arrays["saliency"][1][0, 2, 3, 0] += 1
    assert some(saliency={"a": broken})["sums"] == pytest.approx(0.1 / 1.1)  # 10 of 11 in that layer


def test_equal_confusions_cannot_be_correlated():
    same = {"a": confusion([[1, 2, 3]] * 6, [0.0, 0.0, 0.0])}
    assert isinstance(some(confusions=same)["confusion"], Untestable)


def test_where_the_end_takes_over():
    found = {
        "late": saliency(wp=[1] * 6, pq=[2, 0, 0, 2, 2, 2], ww=[1] * 6),
        "never": saliency(wp=[1] * 6, pq=[0] * 6, ww=[1] * 6),
        "always": saliency(wp=[1] * 6, pq=[2] * 6, ww=[1] * 6),
    }
    assert paper.crossings(found)["S_pq above S_wp from layer"].tolist() == [3, 6, 0]


def test_the_whole_prompt_takes_longer():
    model = toy.random("llama", weights="raw")
    tokens = toy.random_tokens(model, 4, 60)
    places = {name: torch.full((4,), at) for name, at in (("label_0", 30), ("format_0", 0), ("query", 50), ("end", 59))}
    full, short = paper.speed(model, Task("long", tuple("abcd"), tokens, "drawn", positions=places), repeats=5)
    assert full > short > 0
