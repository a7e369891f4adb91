"""Thresholds, universality and key-value groups on scores made by hand, where the right answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from interp.core.result import Result
from interp.weights.maps import relation_scores
from interp.weights.structure import groups, implementing, per_head, universality


def scores(promotes, suppresses=None, *, n_kv=None, names=None):
    """A Result like that of `relation_scores`, from arrays `[relation layer head]`."""
    promotes = np.asarray(promotes, dtype=float)
    suppresses = np.zeros_like(promotes) if suppresses is None else suppresses
    n_relations, n_layers, n_heads = promotes.shape
    names = names or [f"r{i}" for i in range(n_relations)]
    relation, layer, head = (axis.ravel() for axis in np.indices(promotes.shape))
    frames = [
        pd.DataFrame({
            "target": np.array(names, dtype=object)[relation], "layer": layer, "head": head, "metric": metric,
            "value": values.ravel(),
        })
        for metric, values in (("promotes", promotes), ("suppresses", suppresses))
    ]  # fmt: skip
    meta = {"n_layers": n_layers, "n_heads": n_heads, "n_key_value_heads": n_kv or n_heads, "model": "synthetic"}
    return Result("maps.relation_scores", pd.concat(frames, ignore_index=True), "share of pairs", meta=meta)


def test_the_threshold_counts_from_its_own_value_on():
    table = implementing(scores([[[0.15, 0.1499], [0.9, 0.2]]])).table
    assert table[["layer", "head"]].values.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert table["value_depth"].tolist() == [1.0, 1.0, 0.0]
    assert len(implementing(scores([[[0.15, 0.1499]]]), threshold=0.1).table) == 2
    with pytest.raises(ValueError, match="threshold=0"):
        implementing(scores([[[0.5]]]), threshold=0.0)


def test_relations_per_head():
    promotes, suppresses = np.zeros((3, 1, 2)), np.zeros((3, 1, 2))
    promotes[:, 0, 0], suppresses[2, 0, 1] = (0.2, 0.5, 0.1), 0.4
    table = per_head(scores(promotes, suppresses)).table.set_index(["head", "metric"])
    assert table.loc[(0, "promotes"), ["value", "target", "value_strongest"]].tolist() == [2, "r1", 0.5]
    assert table.loc[(1, "suppresses"), ["value", "target"]].tolist() == [1, "r2"]
    assert table.loc[(1, "promotes"), ["value", "target"]].tolist() == [0, ""]


def test_universality_counts_models_with_any_head():
    one = scores([[[0.5, 0.3]], [[0.0, 0.2]], [[0.9, 0.9]]], names=["a", "b", "only here"])
    two = scores([[[0.0], [0.4]], [[0.1], [0.1]]], names=["a", "b"])
    result = universality({"one": one, "two": two})
    assert set(result.table["target"]) == {"a", "b"}
    table = result.filter(metric="promotes").table.set_index(["target", "component"])
    assert table["value"].tolist() == [1.0, 0.5, 0.5, 0.0]
    assert table["value_models"].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert table["value_strongest"].tolist() == [0.5, 0.4, 0.2, 0.1]
    assert table.loc[("a", "two"), "value_depth"] == 1.0 and np.isnan(table.loc[("b", "two"), "value_depth"])
    with pytest.raises(ValueError, match="no relation in common"):
        universality({"one": one, "two": scores([[[0.1]]], names=["c"])})


def counted(promotes, suppresses, n_kv, tau=0.15):
    """Pairs of group-mates, one by one."""
    n_relations, n_layers, n_heads = promotes.shape
    same = opposite = 0
    for r in range(n_relations):
        for layer in range(n_layers):
            for a in range(n_heads):
                for b in range(a + 1, n_heads):
                    if a // (n_heads // n_kv) == b // (n_heads // n_kv):
                        p, s = promotes[r, layer] >= tau, suppresses[r, layer] >= tau
                        same += int(p[a] and p[b]) + int(s[a] and s[b])
                        opposite += int(p[a] and s[b]) + int(s[a] and p[b])
    return same, opposite


def test_pairs_are_counted_one_by_one():
    rng = np.random.default_rng(0)
    promotes, suppresses = rng.random((5, 4, 6)) * 0.4, rng.random((5, 4, 6)) * 0.3
    result = groups(scores(promotes, suppresses, n_kv=2), n_permutations=20)
    assert result.table["value"].tolist()[:2] == list(counted(promotes, suppresses, 2))
    # All heads are active here: mean |r| over the mates.
    profile = promotes - suppresses
    expected = [
        abs(np.corrcoef(profile[:, layer, a], profile[:, layer, b])[0, 1])
        for layer in range(4) for group in (0, 3) for a in range(group, group + 3) for b in range(a + 1, group + 3)
    ]  # fmt: skip
    assert result.table["value"][2] == pytest.approx(np.mean(expected))


def test_planted_groups_are_found_and_others_not():
    rng = np.random.default_rng(1)
    n_relations, n_layers, n_heads = 8, 10, 8
    promotes, suppresses = (np.zeros((n_relations, n_layers, n_heads)) for _ in range(2))
    for layer in range(n_layers):
        relation = rng.integers(n_relations)
        promotes[relation, layer, 2], suppresses[relation, layer, 3] = 0.8, 0.6  # mates, of opposite signs
        promotes[rng.integers(n_relations), layer, rng.integers(4, 8)] = 0.5
    table = groups(scores(promotes, suppresses, n_kv=4), n_permutations=300).table.set_index("metric")
    assert table.loc["opposite sign", "value"] == 10
    # One of the 7 other places is the mate's: 10/7 are expected by chance.
    assert table.loc["opposite sign", "value_null"] == pytest.approx(10 / 7, rel=0.25)
    assert table.loc["opposite sign", "value_p"] < 0.01 < 0.05 < table.loc["same sign", "value_p"]
    assert table.loc["opposite sign", "value_z"] > 5
    # The same scores with the pair in two groups: nothing.
    promotes[:, :, [2, 1]] = promotes[:, :, [1, 2]]
    apart = groups(scores(promotes, suppresses, n_kv=4), n_permutations=300).table.set_index("metric")
    assert apart.loc["opposite sign", "value"] == 0 and apart.loc["opposite sign", "value_p"] == 1.0


def test_the_null_is_calibrated():
    rng = np.random.default_rng(2)
    p = []
    for _ in range(40):
        values = scores(rng.random((4, 5, 6)) * 0.3, rng.random((4, 5, 6)) * 0.3, n_kv=3)
        p.append(groups(values, n_permutations=60).table["value_p"].to_numpy())
    # Uniform p-values average 1/2 with s.d. 0.29 / sqrt(40) = 0.046; counts tie, which only raises them.
    assert (np.mean(p, 0) > 0.36).all() and (np.mean(p, 0) < 0.72).all()


def test_seeds_and_refusals(toys, pairs):
    model = toys("llama", weights="raw")
    made = relation_scores(model, pairs(model, a=[(2, 3), (4, 5)], b=[(6, 7), (8, 9)]))
    one, other = (groups(made, n_permutations=10, seed=seed).table for seed in (0, 0))
    pd.testing.assert_frame_equal(one, other)
    with pytest.raises(ValueError, match="of its own for each of its 4 heads"):
        groups(scores(np.zeros((2, 1, 4))))
    with pytest.raises(ValueError, match="at least two relations"):
        groups(scores(np.zeros((1, 1, 4)), n_kv=2))
