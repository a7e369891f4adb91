"""Is the explained share that of dense arrays, 1 for the truth and 0 for a constant?"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from interp.core.result import Result
from interp.lenses import evaluation
from interp.lenses.attention import direct
from interp.lenses.cached import cache
from interp.lenses.logit import logit_lens
from interp.models import toy
from interp.models.program import program


def texts(model, folder, *, site="z"):
    tokens = toy.random_tokens(model, 10, 16)
    return tuple(
        cache(model, tokens[rows], skip=2, dtype="float32", folder=folder / f"{site}{name}", site=site)
        for name, rows in (("train", slice(6)), ("test", slice(6, 10)))
    )


@pytest.fixture(scope="module")
def model():
    return toy.random("llama")


@pytest.fixture(scope="module")
def cached(model, tmp_path_factory):
    return texts(model, tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="module")
def lenses(model):
    """Random lenses of each kind; the direct one is the model's."""
    generator = torch.Generator().manual_seed(0)
    own = direct(model)

    def drawn(*shape):
        return {layer: 0.3 * torch.randn(*shape, generator=generator) for layer in own.maps}

    additive = replace(own, estimand="additive", maps=drawn(4, 8, 32), biases=drawn(64))
    independent = replace(own, estimand="independent", maps=drawn(4, 8, 32), biases=drawn(4, 64))
    return {"additive": additive, "independent": independent, "direct": own}


def dense_kl(model, cached, logits):
    """KL of each token, for logits `[token (head) d_vocab]`, from a plain pass of the model."""
    tokens = toy.random_tokens(model, 10, 16)[6:]
    log_p = model(tokens)[:, 2:].flatten(0, 1).log_softmax(-1)
    log_p = log_p if logits.ndim == 2 else log_p[:, None]
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def per_document(cached, kl):
    return torch.stack([kl[cached.document == i].mean(0) for i in cached.document.unique()])


@pytest.mark.parametrize("form", ["low_rank", "full"])
def test_divergences_are_those_of_whole_arrays(form, model, cached, lenses, monkeypatch):
    monkeypatch.setattr("interp.lenses._heads._CHUNK", 5)
    monkeypatch.setattr(evaluation, "_TILE", 3 * 4 * 64)
    train, test = cached
    unembed = program(model).unembed.weight.T.detach()
    given = dict(lenses)
    if form == "full":
        del given["direct"]
        given = {
            name: replace(lens, form="full", maps={layer: maps @ unembed for layer, maps in lens.maps.items()})
            for name, lens in given.items()
        }
    found = evaluation.explained(model, given, test, train=train, layers=[0, 2]).table
    for name, layer in ((name, layer) for name in given for layer in (0, 2)):
        lens = lenses[name]
        each = torch.einsum("thd,hdm,mv->thv", test.activation(layer), lens.maps[layer], unembed)
        if name == "direct":
            each = each * test.scale[:, None, None]
        own = found[(found["component"] == name) & (found["layer"] == layer)]
        alone, together = own[own["head"].notna()], own[own["head"].isna()]
        if name != "independent":
            logits = each.sum(1) + (lens.biases[layer] if name == "additive" else 0)
            expected = per_document(test, dense_kl(model, test, logits))
            # Sums over 64 tokens of the vocabulary in float32, in another order.
            assert together["value"].to_numpy() == pytest.approx(expected.numpy(), abs=2e-5)
        else:
            assert together.empty
        if name != "additive":
            logits = each + (lens.biases[layer] if name == "independent" else 0)
            expected = per_document(test, dense_kl(model, test, logits))
            values = alone.pivot(index="prompt", columns="head", values="value").to_numpy()
            assert values == pytest.approx(expected.numpy(), abs=2e-5)
        else:
            assert alone.empty
    assert (found["value_tokens"] == 14).all()


def test_the_predictions_that_look_at_nothing(model, cached, lenses):
    train, test = cached
    found = evaluation.explained(model, lenses, test, train=train, layers=[0]).table
    tokens = toy.random_tokens(model, 10, 16)
    mean = model(tokens[:6])[:, 2:].softmax(-1).mean((0, 1))
    counts = torch.bincount(tokens[:6, 3:].flatten(), minlength=64) + 0.1
    for name, q in (("constant", mean), ("unigram", counts / counts.sum())):
        own = found[found["component"] == name]
        expected = per_document(test, dense_kl(model, test, q.log().expand(len(test), -1)))
        assert own["value"].to_numpy() == pytest.approx(expected.numpy(), abs=2e-5)
        assert own["layer"].isna().all()


def test_logit_lenses_are_those_of_the_logit_lens(model, cached, lenses, tmp_path):
    train, test = cached
    stream = texts(model, tmp_path, site="resid")[1]
    found = evaluation.explained(model, lenses, test, train=train, stream=stream)
    tokens = toy.random_tokens(model, 10, 16)[6:]
    other = logit_lens(model, tokens, sites=("resid_pre", "attn_out")).table
    other = other[(other["pos"] >= 2) & (other["layer"] < 3)]
    theirs = other.groupby(["src", "prompt", "layer"])["value_forward_kl"].mean()
    for name, src in (("logit", "resid_pre"), ("logit attn_out", "attn_out")):
        own = found.filter(component=name).table.set_index(["prompt", "layer"])["value"]
        assert len(own) == 12
        for at, value in own.items():
            assert value == pytest.approx(theirs[(src, *at)], abs=2e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "gemma2"])
@pytest.mark.parametrize("weights", ["processed", "raw"])
def test_other_norms_biases_and_caps(architecture, weights, tmp_path):
    model = toy.random(architecture, weights=weights)
    train, test = texts(model, tmp_path)
    stream = texts(model, tmp_path, site="resid")[1]
    tokens = toy.random_tokens(model, 10, 16)[6:]
    found = evaluation.explained(model, {}, test, train=train, stream=stream, layers=[1])
    other = logit_lens(model, tokens, sites=("resid_pre", "attn_out"), layers=[1]).table
    theirs = other[other["pos"] >= 2].groupby("src")["value_forward_kl"].mean()
    for name, src in (("logit", "resid_pre"), ("logit attn_out", "attn_out")):
        assert found.filter(component=name).table["value"].mean() == pytest.approx(theirs[src], abs=2e-5)


def test_truth_explains_all_and_a_constant_nothing(linear, tmp_path):
    train, test = (
        cache(linear.model, linear.prompts(n, seed=n), skip=1, dtype="float32", folder=tmp_path / str(n))
        for n in (90, 40)
    )
    w_o = program(linear.model).w_o(0).detach()
    truth = replace(direct(linear.model), estimand="additive", maps={0: w_o}, biases={0: torch.zeros(14)})
    log_p = linear.model(linear.prompts(90, seed=90))[:, 1:].softmax(-1).mean((0, 1)).log()
    nothing = replace(truth, maps={0: torch.zeros_like(w_o)}, biases={0: log_p})
    found = evaluation.explained(linear.model, {"truth": truth, "nothing": nothing}, test, train=train)
    share = evaluation.shares(found).table.set_index("component")
    assert share.loc["truth", "value"] == pytest.approx(1, abs=1e-6)
    assert share.loc["nothing", ["value", "value_low", "value_high"]].tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert share.loc["constant", "value"] == 0
    mixed = evaluation.explained(linear.model, {"truth": truth}, test, train=train, shuffled=1)
    assert evaluation.shares(mixed).filter(component="truth").table["value"].item() < 0


def result(rows):
    columns = ["prompt", "layer", "head", "component", "value_draw", "value", "value_tokens"]
    table = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64", "head": "Int64"})
    return Result("evaluation.explained", table, "nats")


def test_shares_weigh_documents_by_their_tokens_and_average_draws():
    found = evaluation.shares(
        result([
            (0, None, None, "constant", 0, 2.0, 10), (7, None, None, "constant", 0, 4.0, 30),
            (0, 1, None, "lens", 0, 1.0, 10), (7, 1, None, "lens", 0, 1.0, 30),
            (0, 1, None, "lens", 1, 2.0, 10), (7, 1, None, "lens", 1, 2.0, 30),
        ])
    )  # fmt: skip
    lens = found.filter(component="lens").table.iloc[0]
    # The constant has 140 nats in all, the lens 40 and 80.
    assert lens["value"] == pytest.approx((100 / 140 + 60 / 140) / 2)
    assert lens["value_spread"] == pytest.approx(20 / 140 * 2**0.5)
    assert lens["value_kl"] == pytest.approx(60 / 40)
    # Only document 0: 1/2 and 0; only document 7: 3/4 and 1/2.
    assert lens["value_low"] == pytest.approx(1 / 4)
    assert lens["value_high"] == pytest.approx(5 / 8)


def test_one_document_has_no_interval():
    rows = [(3, None, None, "constant", 0, 2.0, 10), (3, 1, 0, "lens", 0, 0.5, 10)]
    lens = evaluation.shares(result(rows)).filter(component="lens").table.iloc[0]
    assert lens["value"] == pytest.approx(0.75)
    assert lens[["value_low", "value_high", "value_spread"]].isna().all()


def test_the_interval_has_the_width_of_the_spread_over_documents():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=generator).double()
    rows = [(i, None, None, "constant", 0, 2.0, 5) for i in range(100)]
    rows += [(i, 0, 0, "lens", 0, 1.0 + 0.2 * float(noise[i]), 5) for i in range(100)]
    lens = evaluation.shares(result(rows)).filter(component="lens").table.iloc[0]
    # The standard error of the mean of 100 values of spread 0.2, over 2 nats, and 1.96 of those to either side.
    expected = 2 * 1.96 * 0.2 * float(noise.std()) / 10 / 2
    assert lens["value_high"] - lens["value_low"] == pytest.approx(expected, rel=0.1)


def test_refusals(model, cached, lenses, tmp_path):
    train, test = cached
    with pytest.raises(ValueError, match="the test is the training text"):
        evaluation.explained(model, lenses, test, train=test)
    with pytest.raises(ValueError, match="no layer 9"):
        evaluation.explained(model, lenses, test, train=train, layers=[9])
    with pytest.raises(ValueError, match="fingerprint"):
        evaluation.explained(toy.random("gpt2"), lenses, test, train=train)
    with pytest.raises(ValueError, match="of other tokens"):
        evaluation.explained(model, lenses, test, train=train, stream=texts(model, tmp_path, site="resid")[0])
    with pytest.raises(ValueError, match="what explained returned"):
        evaluation.shares(Result("other", pd.DataFrame({"value": [1.0]}), "nats"))
