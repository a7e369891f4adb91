"""Do heads that differ come out as different, and heads that do not as chance has it?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency

from interp.lenses import specialisation
from interp.lenses.attention import AttentionLens, direct
from interp.lenses.cached import cache
from interp.models import toy
from interp.models.program import program


def with_maps(lens: AttentionLens, maps: torch.Tensor) -> AttentionLens:
    """A lens of one layer with other maps `[head d_head d_model]`, read without a scale."""
    return replace(lens, estimand="additive", maps={0: maps})


@pytest.fixture(scope="module")
def split(linear, tmp_path_factory):
    """Words of three disjoint thirds, one each for the three heads, at the ends of 60 prompts."""
    place = tmp_path_factory.mktemp("split")
    return cache(linear.model, linear.prompts(60, thirds=True), skip=4, dtype="float32", folder=place / "a")


@pytest.fixture(scope="module")
def alike(linear, tmp_path_factory):
    """Independent words from the same ten for each head."""
    place = tmp_path_factory.mktemp("alike")
    return cache(linear.model, linear.prompts(60, same=0.0), skip=4, dtype="float32", folder=place / "a")


@pytest.fixture(scope="module")
def copies(linear):
    """Every head is read as its own word, a thousand logits above the others."""
    out = program(linear.model).unembed.weight[linear.words :]  # [word d_model]
    maps = torch.zeros(3, 16, out.shape[1])
    maps[:, : len(out)] = 1000 * out
    return with_maps(direct(linear.model), maps)


def test_three_heads_with_disjoint_vocabularies_have_the_largest_values(linear, copies, split):
    found = specialisation.scores(linear.model, copies, split, n_permutations=99).table.set_index("metric")
    assert found.loc["divergence", "value"] == pytest.approx(math.log(2), abs=1e-6)
    # The tops of each head are its own thirds, as often for each: the token names the head.
    assert found.loc["information", "value"] == pytest.approx(math.log(3), abs=1e-6)
    assert (found["value_p"] == 0.01).all()
    assert (found["value_null_high"] < found["value"]).all()


def test_heads_of_one_distribution_fall_inside_the_null(linear, copies, alike):
    found = specialisation.scores(linear.model, copies, alike, n_permutations=99).table
    assert (found["value_p"] > 0.05).all()
    assert (found["value"] < found["value_null_high"]).all()


def test_p_values_of_heads_that_do_not_differ_are_uniform():
    generator = torch.Generator().manual_seed(0)
    p = []
    for seed in range(40):
        sums = torch.rand(8, 3, 20, generator=generator)
        null = specialisation._under(sums, specialisation._orders(8, 3, 99, seed), specialisation._pairs)
        p.append((1 + int((null[1:] >= null[0]).sum())) / 100)
    # 40 uniform numbers: each count is binomial, and outside these bounds with a probability below .001.
    assert 2 <= sum(x <= 0.25 for x in p) <= 20
    assert 10 <= sum(x <= 0.5 for x in p) <= 30


def test_an_effect_of_the_document_is_no_effect_of_the_head():
    # In each document another head has a token of its own: exchanged document by document that is chance.
    generator = torch.Generator().manual_seed(0)
    owner = torch.rand(12, 3, generator=generator).argsort(-1)
    sums = torch.eye(3)[owner] * 50 + 1
    orders = specialisation._orders(12, 3, 199, 0)
    null = specialisation._under(sums, orders, specialisation._shared)
    assert float((null[1:] >= null[0]).double().mean()) > 0.05


def test_statistics_are_scipys():
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 5, (4, 50), generator=generator).float()
    counts[:, 0] += 200 - counts.sum(1)  # every head as often
    p = counts.double().numpy() / 200
    pairs = [jensenshannon(p[i], p[j]) ** 2 for i in range(4) for j in range(i)]
    # Sums of 50 terms in float64 from counts that float32 holds exactly.
    assert specialisation.divergence(counts) == pytest.approx(np.mean(pairs), abs=1e-12)
    seen = counts[:, counts.sum(0) > 0].numpy()
    g = chi2_contingency(seen, correction=False, lambda_="log-likelihood").statistic
    assert specialisation.information(counts) == pytest.approx(g / (2 * seen.sum()), abs=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_scores_are_those_of_whole_arrays(bias, tmp_path, monkeypatch):
    monkeypatch.setattr(specialisation, "_TILE", 7 * 4 * 3)  # tiles of three tokens of the vocabulary
    monkeypatch.setattr("interp.lenses._heads._TILE", 5 * 4 * 64)  # and of five tokens of the text
    model = toy.random("llama")
    text = cache(model, toy.random_tokens(model, 6, 12), skip=2, dtype="float32", folder=tmp_path / "a")
    generator = torch.Generator().manual_seed(0)
    lens = direct(model)
    biases = {layer: torch.randn(64, generator=generator) for layer in lens.maps}
    lens = replace(lens, estimand="additive", biases=biases)
    found = specialisation.scores(model, lens, text, layers=[1], bias=bias, n_permutations=6, seed=3)
    unembed = program(model).unembed.weight.T
    logits = torch.einsum("thd,hdm,mv->thv", text.activation(1), lens.maps[1], unembed)
    logits = logits + (lens.biases[1] if bias else 0)
    means = logits.softmax(-1).mean(0).detach().double().numpy()
    pairs = [jensenshannon(means[i], means[j]) ** 2 for i in range(4) for j in range(i)]
    tops = torch.nn.functional.one_hot(logits.argmax(-1), 64).sum(0)
    own = found.table.set_index("metric")["value"]
    # Products of 32 numbers in float32, in another order.
    assert own["divergence"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert own["information"] == pytest.approx(specialisation.information(tops), abs=1e-9)
    # One null value by hand: labels permuted document by document.
    order = specialisation._orders(6, 4, 6, 3)[1]
    moved = torch.stack([logits[i].softmax(-1)[order[int(text.document[i])]] for i in range(len(text))]).mean(0)
    moved = moved.detach().double().numpy()
    pairs = [jensenshannon(moved[i], moved[j]) ** 2 for i in range(4) for j in range(i)]
    assert found.arrays["null"][1][0, 0, 0] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_a_common_bias_hides_the_heads(linear, copies, split):
    peaked = torch.zeros(linear.model.d_vocab)
    peaked[0] = 1e6
    flat = replace(copies, biases={0: peaked})
    without, under = (
        specialisation.scores(linear.model, flat, split, bias=bias, n_permutations=9).table["value"]
        for bias in (False, True)
    )
    assert (without > 0.6).all()
    assert (under.abs() < 1e-6).all()


def test_refusals(linear, copies, split, tmp_path):
    one = cache(linear.model, linear.prompts(1), skip=1, dtype="float32", folder=tmp_path / "one")
    with pytest.raises(ValueError, match="of one document"):
        specialisation.scores(linear.model, copies, one)
    with pytest.raises(ValueError, match="n_permutations=0"):
        specialisation.scores(linear.model, copies, split, n_permutations=0)
    with pytest.raises(ValueError, match="no layer 3"):
        specialisation.scores(linear.model, copies, split, layers=[3])
    with pytest.raises(ValueError, match="fingerprint"):
        specialisation.scores(toy.random("llama"), copies, split)
