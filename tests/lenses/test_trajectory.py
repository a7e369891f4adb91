"""Statistics of a trajectory: each against scipy, at the ends of its range; the depth of a prediction."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy, rankdata

from interp.lenses.logit import logit_lens
from interp.lenses.trajectory import STATISTICS, prediction_depth, statistics
from interp.models import toy


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.01, 30.0))
def test_each_statistic_is_scipys(seed, scale):
    generator = np.random.default_rng(seed)
    log_q, log_p = log_softmax(scale * generator.normal(size=(2, 3, 2, 50)), axis=-1)
    target = generator.integers(50, size=(3, 2))
    found = statistics(torch.tensor(log_q), torch.tensor(log_p), torch.tensor(target))
    assert found.keys() == STATISTICS.keys()
    q, p = np.exp(log_q), np.exp(log_p)
    own = np.take_along_axis(log_q, target[..., None], -1)[..., 0]
    ranks = 50 - rankdata(log_q, method="min", axis=-1)
    expected = {
        "log_prob": own,
        "cross_entropy": -own,
        "rank": np.take_along_axis(ranks, target[..., None], -1)[..., 0],
        "entropy": entropy(q, axis=-1),
        "max_probability": q.max(-1),
        "forward_kl": entropy(p, q, axis=-1),
        "reverse_kl": rel_entr(q, p).sum(-1),
        "js_divergence": jensenshannon(p, q, axis=-1) ** 2,
        "total_variation": np.abs(p - q).sum(-1) / 2,
    }
    for name, values in expected.items():
        # float64; scipy's square root of a divergence near 0 keeps half of its digits.
        np.testing.assert_allclose(found[name], values, rtol=1e-7, atol=1e-9, err_msg=name)


def test_divergences_at_the_ends_of_their_ranges():
    log_p = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    same = statistics(log_p, log_p)
    for name in ("forward_kl", "reverse_kl", "js_divergence", "total_variation"):
        assert (same[name] == 0).all()
    # Nothing in common, and probabilities that underflow in float32: exp(-300) = 0.
    disjoint = torch.tensor([[0.0, -300.0]])
    found = statistics(disjoint, disjoint.flip(-1))
    assert float(found["js_divergence"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(found["total_variation"]) == 1
    assert float(found["forward_kl"]) == float(found["reverse_kl"]) == 300
    # Half of the two divergences' mean would be 300: the tuned-lens library's js_divergence.
    assert (found["js_divergence"] <= math.log(2) + 1e-5).all()


def test_ties_count_against_the_target_and_no_target_is_nan():
    log_q = torch.zeros(2, 4).log_softmax(-1)
    found = statistics(log_q, log_q, torch.tensor([1, -1]))
    assert found["rank"].tolist()[0] == 3
    assert found["rank"].isnan().tolist() == found["log_prob"].isnan().tolist() == [False, True]
    assert "rank" not in statistics(log_q, log_q)
    with pytest.raises(ValueError, match="NaN"):
        statistics(log_q * math.nan, log_q)


def test_the_depth_is_where_the_top_token_stays():
    model = toy.random("llama", scale=0.3)
    read = logit_lens(model, toy.random_tokens(model, 4, 8), k=1)
    top = np.array(
        [[1, 1, 1, 1], [2, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1], [1, 2, 1, 2], [1, 1, 2, 2], [2, 2, 2, 1], [3, 1, 2, 1]]
    )
    expected = [0, 1, 2, 3, 3, 2, 3, 3]
    layer, prompt, pos = (read.table[name].to_numpy() for name in ("layer", "prompt", "pos"))
    planted = top[(pos + prompt) % 8, layer]  # each prompt in another order
    found = prediction_depth(replace(read, arrays={"top_tokens": (("row", "rank"), planted[:, None])}))
    for row in found.table.itertuples():
        assert row.value == expected[(row.pos + row.prompt) % 8]
    assert found.unit == "layers"
    assert len(found.table) == 32
    own = prediction_depth(read).table
    final = read.filter(layer=3).table
    assert own["token"].tolist() == final.sort_values(["prompt", "pos"])["token"].tolist()
    with pytest.raises(ValueError, match="does not have all"):
        prediction_depth(logit_lens(model, toy.random_tokens(model, 1, 3), layers=[0, 3]))
    with pytest.raises(ValueError, match="does not have all"):
        prediction_depth(logit_lens(model, toy.random_tokens(model, 1, 3), sites="resid_post"))
