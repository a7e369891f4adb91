"""Does a true lens predict what the model loses without a head, and a misleading one the opposite?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from interp.lenses import controls, faithfulness
from interp.lenses.attention import direct, train
from interp.lenses.cached import cache
from interp.models import toy
from interp.models.hooks import run
from interp.models.program import program


@pytest.fixture(scope="module")
def reference(linear, tmp_path_factory):
    place = tmp_path_factory.mktemp("reference") / "a"
    return cache(linear.model, linear.prompts(400), skip=4, dtype="float32", folder=place)


@pytest.fixture(scope="module")
def truth(linear):
    w_o = program(linear.model).w_o(0).detach()
    return replace(direct(linear.model), estimand="additive", maps={0: w_o}, biases={0: torch.zeros(14)})


def by(found, metric="spearman", target="total"):
    table = found.filter(metric=metric, target=target).table
    return table.pivot_table(index="component", columns="head", values="value")


def test_the_true_lens_is_exact_in_every_way(linear, reference, truth):
    lenses = {"truth": truth, "random": controls.randomised(truth)}
    found = faithfulness.ablation(linear.model, linear.prompts(8, seed=1), lenses, reference=reference)
    assert len(found.table) == 8 * 3 * 2 * 2 * 2
    for target in ("total", "direct"):
        # The logits are a sum: the four tokens without a meaning tie in both, the rest are ranked alike.
        assert by(found, target=target).loc["truth"].to_numpy() == pytest.approx(1, abs=1e-9)
        assert (by(found, "sign agreement", target).loc["truth"] == 1).all()
        assert (by(found, target=target).loc["random"].abs() < 0.7).all()


def fitted(linear, reference, estimand):
    """A lens with the smallest divergence on the reference, by plain autograd through dense softmaxes."""
    unembed = program(linear.model).unembed.weight.T.detach()
    z, log_p = reference.activation(0), (reference.r @ unembed).log_softmax(-1)
    maps = torch.zeros(3, 16, 48, requires_grad=True)
    bias = torch.zeros(*(() if estimand == "additive" else (3,)), 14, requires_grad=True)
    optimiser = torch.optim.LBFGS([maps, bias], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss():
        optimiser.zero_grad()
        each = torch.einsum("thk,hkm,mv->htv", z, maps, unembed)
        log_q = (each.sum(0) + bias if estimand == "additive" else each + bias[:, None]).log_softmax(-1)
        total = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).sum()
        total.backward()
        return total

    optimiser.step(loss)
    own = {"maps": {0: maps.detach()}, "biases": {0: bias.detach()}}
    return replace(direct(linear.model), estimand=estimand, **own)


def test_the_suppressors_lens_trained_alone_has_the_sign_wrong(linear, reference):
    lenses = {estimand: fitted(linear, reference, estimand) for estimand in ("additive", "independent")}
    prompts = linear.prompts(40, same=1.0, seed=1)
    found = faithfulness.ablation(linear.model, prompts, lenses, reference=reference)
    rank = by(found)
    # The joint lens is the truth up to what one text leaves open; the suppressor's own announces what it suppresses.
    assert (rank.loc["additive"] > 0.95).all()
    assert rank.loc["independent", 1] < 0 < 0.5 < rank.loc["independent", 0]
    agreed = by(found, "sign agreement")
    assert (agreed.loc["additive"] > 0.9).all()
    assert agreed.loc["independent", 1] < 0.6
    # The suppressed word itself: what is lost with the head makes it likelier, which the independent lens denies.
    run_ = faithfulness._Clean.of(program(linear.model), faithfulness.as_task(linear.model, prompts), [(0, 1)])
    mean = faithfulness.mean_z(reference, 0)
    for name, sign in (("additive", 1), ("independent", -1)):
        change = faithfulness.contributions(linear.model, lenses[name], 0, mean - run_.z[0], run_.scale, 1)[:, 0]
        predicted = faithfulness._normalised(change, run_.clean)
        word = predicted.gather(1, prompts[:, 2:3])
        assert bool((word.sign() == sign).all()), name


def test_trained_lenses_are_judged_the_same(linear, reference):
    """The library's own training, from the truth: the joint lens must stay there, and the independent ones must not."""
    additive, independent = (
        train(linear.model, reference, estimand=estimand, optimiser="lbfgs", start="direct", epochs=300)[0]
        for estimand in ("additive", "independent")
    )
    lenses = {"additive": additive, "independent": independent}
    found = by(faithfulness.ablation(linear.model, linear.prompts(20, same=1.0, seed=1), lenses, reference=reference))
    assert (found.loc["additive"] > 0.95).all()
    assert found.loc["independent", 1] < 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma"])
@pytest.mark.parametrize("weights", ["processed", "raw"])
def test_the_direct_lens_is_the_direct_effect_under_a_frozen_norm(architecture, weights, tmp_path):
    model = toy.random(architecture, weights=weights)
    text = cache(model, toy.random_tokens(model, 3, 20), dtype="float32", folder=tmp_path / "a")
    tokens = toy.random_tokens(model, 3, 10, seed=1)
    lenses = {"direct": direct(model)}
    found = faithfulness.ablation(model, tokens, lenses, reference=text, frozen_norm=True)
    exact = found.filter(target="direct", metric="spearman").table["value"]
    # Ranks of 64 numbers that float32 may order otherwise where two are equal to 1e-6.
    assert exact.min() > 0.9995
    assert (found.filter(target="direct", metric="sign agreement").table["value"] > 0.89).all()
    live = faithfulness.ablation(model, tokens, lenses, reference=text)
    assert live.filter(target="direct", metric="spearman").table["value"].min() < 0.999


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_true_changes_are_those_of_plain_hooks(architecture, tmp_path):
    model = toy.random(architecture)
    text = cache(model, toy.random_tokens(model, 3, 20), dtype="float32", folder=tmp_path / "a")
    tokens = toy.random_tokens(model, 3, 10, seed=1)
    lens = replace(controls.randomised(direct(model)), estimand="additive")
    heads = [(2, 3), (0, 1)]
    found = faithfulness.ablation(model, tokens, {"lens": lens}, reference=text, heads=heads, top=7)
    names = [f"blocks.{layer}.attn.hook_z" for layer in (0, 2)]
    last = "blocks.2.hook_resid_post"
    clean = run(model, tokens, capture=[*names, last])
    log_p = clean.logits[:, -1].log_softmax(-1)
    top = log_p.topk(7, -1).indices
    steps = program(model)
    for layer, head in heads:
        mean = text.activation(layer).mean(0)[head]
        z = clean.cache[f"blocks.{layer}.attn.hook_z"][:, -1, head]

        def put(activation, hook, head=head, mean=mean):
            activation = activation.clone()
            activation[:, -1, head] = mean
            return activation

        total = run(model, tokens, hooks=[(f"blocks.{layer}.attn.hook_z", put)]).logits[:, -1].log_softmax(-1) - log_p
        with torch.no_grad():
            stream = clean.cache[last][:, -1] + (mean - z) @ steps.w_o(layer)[head]
            held = steps.logits(stream).log_softmax(-1) - log_p
            change = (mean - z) @ lens.maps[layer][head] @ steps.unembed.weight.T
            predicted = (log_p + change).log_softmax(-1) - log_p
        for target, true in (("total", total), ("direct", held)):
            own = found.filter(target=target, layer=layer, head=head).table.set_index(["prompt", "metric"])
            for i in range(3):
                rank = spearmanr(predicted[i].numpy(), true[i].numpy()).statistic
                # Two of 64 ranks may be swapped by rounding.
                assert own.loc[(i, "spearman"), "value"] == pytest.approx(rank, abs=1e-3)
                signs = (predicted[i, top[i]].sign() == true[i, top[i]].sign()).float().mean()
                assert own.loc[(i, "sign agreement"), "value"] == pytest.approx(float(signs))
                kl = (log_p[i].exp() * -true[i]).sum()
                assert own.loc[(i, "spearman"), "value_kl"] == pytest.approx(float(kl), abs=1e-5)


def test_neither_batches_nor_the_order_of_heads_change_a_number(linear, reference, truth, monkeypatch):
    tokens = linear.prompts(6, seed=2)
    whole = faithfulness.ablation(linear.model, tokens, {"truth": truth}, reference=reference)
    monkeypatch.setattr(faithfulness, "_ROOM", 2 * 14)  # two rows of logits: two heads of a prompt
    few = faithfulness.ablation(linear.model, tokens, {"truth": truth}, reference=reference)
    assert whole.table.drop(columns="value_kl").equals(few.table.drop(columns="value_kl"))
    assert few.table["value_kl"].to_numpy() == pytest.approx(whole.table["value_kl"].to_numpy(), abs=1e-5)


def test_prompts_are_read_at_their_end(linear, reference, truth):
    from interp.tasks.task import Task

    tokens = linear.prompts(4, seed=3)
    longer = torch.cat([tokens, tokens[:, :2]], 1)
    task = Task("t", ("p",) * 4, longer, "made here", positions={"end": torch.full((4,), 4)})
    found, plain = (
        faithfulness.ablation(linear.model, given, {"truth": truth}, reference=reference).table
        for given in (task, tokens)
    )
    assert found["value_kl"].to_numpy() == pytest.approx(plain["value_kl"].to_numpy(), abs=1e-5)
    assert (found["value_kl"] > 0.01).any()


def test_ranks_are_scipys():
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 2.0]])
    assert (faithfulness._ranks(values).numpy() + 1 == rankdata(values.numpy(), axis=1)).all()
    drawn = torch.randint(0, 30, (50, 100), generator=torch.Generator().manual_seed(0)).float()
    assert (faithfulness._ranks(drawn).numpy() + 1 == rankdata(drawn.numpy(), axis=1)).all()
    own = faithfulness._correlation(faithfulness._ranks(drawn[0]), faithfulness._ranks(drawn[1]))
    assert float(own) == pytest.approx(spearmanr(drawn[0].numpy(), drawn[1].numpy()).statistic, abs=1e-12)
    assert np.isnan(float(faithfulness._correlation(torch.ones(3), torch.arange(3.0))))


def test_refusals(linear, reference, truth):
    tokens = linear.prompts(2)
    with pytest.raises(ValueError, match="no lenses"):
        faithfulness.ablation(linear.model, tokens, {}, reference=reference)
    with pytest.raises(ValueError, match=r"head \(0, 3\)"):
        faithfulness.ablation(linear.model, tokens, {"a": truth}, reference=reference, heads=[(0, 3)])
    with pytest.raises(ValueError, match="top=15"):
        faithfulness.ablation(linear.model, tokens, {"a": truth}, reference=reference, top=15)
    other = toy.random("llama")
    with pytest.raises(ValueError, match="fingerprint"):
        faithfulness.ablation(other, tokens, {"a": direct(other)}, reference=reference)
    with pytest.raises(ValueError, match="fingerprint"):
        faithfulness.ablation(other, tokens, {"a": truth}, reference=reference)
