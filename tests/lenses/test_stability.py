"""Is the overlap of two lenses' top tokens that of sets, and chance what it should be?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.lenses import controls, stability
from interp.lenses.attention import direct
from interp.lenses.cached import cache
from interp.models import toy
from interp.models.program import program

K = 5


@pytest.fixture(scope="module")
def model():
    return toy.random("llama")


@pytest.fixture(scope="module")
def text(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("text") / "a"
    return cache(model, toy.random_tokens(model, 5, 24), skip=2, dtype="float32", folder=place)


@pytest.fixture(scope="module")
def lens(model):
    return replace(direct(model), estimand="additive")


def tops(model, lens, text, layer):
    unembed = program(model).unembed.weight.T
    logits = torch.einsum("thd,hdm,mv->thv", text.activation(layer), lens.maps[layer], unembed)
    return logits.topk(K, -1).indices


def test_a_lens_agrees_with_itself(model, lens, text):
    found = stability.overlap(model, lens, lens, text, k=K).table
    assert len(found) == 5 * 3 * 4
    assert (found["value"] == 1).all()
    assert (found["value_other_head"] < 1).all()


def test_overlaps_are_those_of_sets(model, lens, text):
    other = controls.rotated(lens, seed=1)
    found = stability.overlap(model, lens, other, text, k=K, layers=[2], seed=4)
    one, two = tops(model, lens, text, 2).tolist(), tops(model, other, text, 2).tolist()
    away = int(torch.randint(1, len(text), (1,), generator=torch.Generator().manual_seed(4)))

    def share(s, t):
        return len(set(s) & set(t)) / len(set(s) | set(t))

    for (document, head), row in found.table.set_index(["prompt", "head"]).iterrows():
        rows = (text.document == document).nonzero()[:, 0].tolist()
        assert row["value_tokens"] == len(rows)
        same = [share(one[i][head], two[i][head]) for i in rows]
        neighbour = [share(one[i][head], two[i][head - 1]) for i in rows]
        elsewhere = [share(one[i][head], two[(i - away) % len(text)][head]) for i in rows]
        for name, values in (("", same), ("_other_head", neighbour), ("_other_position", elsewhere)):
            # Means of 22 numbers in float32.
            assert row[f"value{name}"] == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_lenses_that_have_nothing_in_common_overlap_by_chance(model, lens, text):
    found = stability.overlap(model, controls.randomised(lens, seed=1), controls.randomised(lens, seed=2), text, k=K)
    # Two sets of 5 of 64 share 25/64 tokens on average, so about 0.042 of their union.
    assert found.table["value"].mean() == pytest.approx(0.042, abs=0.015)


def test_refusals(model, lens, text):
    with pytest.raises(ValueError, match="k=65"):
        stability.overlap(model, lens, lens, text, k=65)
    with pytest.raises(ValueError, match="no layer 1"):
        stability.overlap(model, lens, replace(lens, maps={0: lens.maps[0]}), text, layers=[1])
    with pytest.raises(ValueError, match="fingerprint"):
        stability.overlap(toy.random("gpt2"), lens, lens, text)
