"""The claims of MAPS: each measurement on tables small enough to count by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from interp.core.result import Result
from interp.models import toy
from interp.report import claims
from interp.report.claims import Untestable
from interp.report.papers import maps

METRICS = ["all heads", "without its heads", "without random heads", "difference", "controls, all heads",
           "controls, without its heads"]  # fmt: skip


def static(promotes, suppresses):
    """Scores {relation: one of each layer of one head}."""
    rows = [
        {"target": target, "layer": layer, "head": 0, "metric": metric, "value": value}
        for metric, scores in (("promotes", promotes), ("suppresses", suppresses))
        for target, values in scores.items()
        for layer, value in enumerate(values)
    ]
    return Result("maps.relation_scores", pd.DataFrame(rows), "share of pairs", meta={"n_layers": 3, "n_heads": 1})


def agreement(promotes, suppresses):
    """Correlations {relation: (without, with)}; those of single templates are there too, and do not count."""
    rows = [
        {"target": target, "metric": metric, "src": src, "component": component, "value": value}
        for metric, pairs in (("promotes", promotes), ("suppresses", suppresses))
        for target, pair in pairs.items()
        for src, value in zip(("without context", "with context"), pair, strict=True)
        for component in ("templates together", "mean of templates")
    ]
    table = pd.DataFrame(rows)
    table.loc[table["component"] == "mean of templates", "value"] = -1.0
    return Result("dynamic.correlation", table, "Pearson r")


def link(rows):
    table = pd.DataFrame([
        {"target": target, "metric": metric, "value": value, "value_low": value - 0.2}
        for target, values in rows.items()
        for metric, value in zip(METRICS, values, strict=True)
    ])  # fmt: skip
    return Result("causal.link", table, "accuracy")


def some(**changes):
    given = {
        "static": static(
            {"a": [0.0, 0.5, 0.9], "b": [0.0, 0.2, 0.0], "c": [0.1, 0.0, 0.0], "d": [0.0, 0.0, 0.3]},
            {"a": [0.5, 0.0, 0.0], "b": [0.1] * 3, "c": [0.0] * 3, "d": [0.0] * 3},
        ),
        "raw": static({"a": [0.0, 0.95, 0.0], "b": [0.0] * 3, "c": [0.1, 0.0, 0.0], "d": [0.0] * 3}, {}),
        "agreement": agreement(
            {"a": (0.9, 0.5), "b": (0.6, 0.7), "c": (float("nan"), 0.1), "d": (0.8, 0.2)}, {"a": (0.7, 0.1)}
        ),
        "several": agreement({"a": (0.95, 0.1), "b": (0.8, 0.1), "c": (0.1, 0.1)}, {}),
        "link": link({
            "a": (0.8, 0.4, 0.6, 0.2, 0.5, 0.4),
            "b": (0.5, 0.3, 0.5, 0.3, float("nan"), float("nan")),
        }),
        "groups": Result("structure.groups", pd.DataFrame(
            {"metric": ["same sign", "opposite sign", "profile"], "value": 1.0, "value_z": [2.5, 4.0, 0.0]}), "pairs"),
    }  # fmt: skip
    return maps.measured(**{**given, **changes})


def test_each_claim_by_hand():
    found = some()
    numbers = {name: value for name, value in found.items() if not isinstance(value, Untestable)}
    assert numbers == {
        "static_dynamic": pytest.approx(2 / 3),  # a and d of a, b, d
        "context_lowers": pytest.approx(2 / 3),  # a and d; b rises, c cannot be said
        "weak_relations": pytest.approx(1.0),  # .9, .2, .3 with .9, .6, .8
        "suppression_tracks": 0.0,
        "suppression": 0.25,
        "multi_token": 1.0,  # a and b; d was not asked, and no head has c
        "destroyed": 0.5,
        "beats_random": 0.5,  # lows of 0 and 0.1
        "random_harmless": pytest.approx(0.125),
        "controls": pytest.approx(0.2),
        "groups_same": 2.5,
        "groups_opposite": 4.0,
        "universality": 0.75,
        "many_relations": 1.0,  # layer 1: a, b; layer 2: a, d
        "depth": 0.75,
        "embedding": 0.5,  # b and d
    }
    assert set(found) - set(numbers) == {"descriptions", "same_heads", "pair_counts"}


def test_every_claim_has_its_measurement_and_some_cannot_be_tested():
    empty = static({"a": [0.0] * 3}, {"a": [0.0] * 3})
    nan = float("nan")
    none = agreement({"a": (nan, nan)}, {"a": (nan, nan)})
    found = some(static=empty, raw=empty, agreement=none, several=none, groups=None)
    checked = claims.check("maps", found, model=toy.random("llama"))
    untested = checked.table.set_index("id")["verdict"].eq("not testable")
    assert untested[
        ["static_dynamic", "groups_same", "depth", "many_relations", "context_lowers", "weak_relations"]
    ].all()
    assert not untested[["universality", "destroyed"]].any()
