"""Top and bottom tokens against the whole vocabulary by hand, direct contributions against exact attribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from interp.flow.attribution import attribute
from interp.lenses import _output, reading
from interp.lenses.attention import AttentionLens, direct
from interp.lenses.logit import logit_lens
from interp.lenses.reading import top_tokens
from interp.lenses.tuned import identity
from interp.models import load, toy
from interp.models.hooks import run

TEXTS = ["w5 w9 w30 w12 w5", "w7 w8", "w40 w41 w42 w43"]


@pytest.fixture(scope="module")
def model():
    return toy.random("llama")


def made(model, estimand, form, *, seed=0, layers=(0, 2)):
    """A lens of random maps, with biases that would change every list."""
    draw = torch.Generator().manual_seed(seed)
    width = model.d_vocab if form == "full" else model.d_model
    maps = {layer: torch.randn(model.n_heads, model.d_head, width, generator=draw) for layer in layers}
    shape = (model.n_heads, model.d_vocab) if estimand == "independent" else (model.d_vocab,)
    biases = {layer: 100 * torch.randn(shape, generator=draw) for layer in layers}
    return AttentionLens(estimand, form, maps, biases, {**model.provenance, "estimand": estimand})


def by_hand(model, lens, layer, head, ids, pos):
    """A head's logits of every token less their mean, in float64, from the lens's own maps."""
    z = run(model, torch.tensor([ids]), capture=[f"blocks.{layer}.attn.hook_z"]).cache[f"blocks.{layer}.attn.hook_z"]
    said = z[0, pos, head].double() @ lens.maps[layer][head].double()
    if lens.form == "low_rank":
        said = said @ model.bridge.unembed.W_U.detach().double()
    return (said - said.mean()).numpy()


@pytest.mark.parametrize("form", ["low_rank", "full"])
@pytest.mark.parametrize("estimand", ["additive", "independent"])
def test_both_ends_are_those_of_the_whole_vocabulary(model, estimand, form):
    lens = made(model, estimand, form)
    found = top_tokens(model, {"mine": lens}, TEXTS, positions=None, k=4)
    assert len(found.table) == sum(len(text.split()) for text in TEXTS) * 2 * model.n_heads * 2 * 4
    groups = dict(iter(found.table.groupby(["prompt", "pos", "layer", "head", "metric"])))
    width = max(len(text.split()) for text in TEXTS)
    for prompt, text in enumerate(TEXTS):
        ids = model.tokenize(text).ids[0].tolist()
        for pos, layer, head in np.ndindex(len(ids), 3, model.n_heads):
            if layer == 1:  # of which there is no lens
                continue
            logits = by_hand(model, lens, layer, head, ids, pos)
            order = np.argsort(logits)
            where = prompt, pos + width - len(ids), layer, head
            for metric, wanted in (("promotes", order[::-1][:4]), ("suppresses", order[:4])):
                rows = groups[(*where, metric)]
                assert rows["value_token"].tolist() == wanted.tolist()
                # Float32 sums of 32 x 64 products of size 10 or so; padding moves them in the last digits.
                np.testing.assert_allclose(rows["value"], logits[wanted], rtol=1e-4, atol=2e-3)


def test_rows_say_where_they_are(model):
    lenses = {"one": made(model, "additive", "full"), "another": made(model, "independent", "full", seed=1)}
    found = top_tokens(model, lenses, TEXTS, k=2)
    table = found.table
    assert list(table.columns) == [
        "prompt", "pos", "src", "layer", "head", "component", "metric", "token", "value", "value_rank", "value_token"
    ]  # fmt: skip
    assert table["component"].drop_duplicates().tolist() == ["one", "another"]
    assert table["src"].groupby(table["prompt"]).unique().map(list).tolist() == [["w5"], ["w8"], ["w43"]]
    assert set(table["pos"]) == {4} and set(table["layer"]) == {0, 2}
    assert all(text == f"w{i}" for text, i in zip(table["token"], table["value_token"], strict=True) if i > 1)
    assert (table["value_rank"] == np.tile([0, 1], len(table) // 2)).all()
    up, down = table[table["metric"] == "promotes"], table[table["metric"] == "suppresses"]
    assert (up["value"].to_numpy()[::2] >= up["value"].to_numpy()[1::2]).all() and up["value"].min() > 0
    assert (down["value"].to_numpy()[::2] <= down["value"].to_numpy()[1::2]).all() and down["value"].max() < 0
    assert found.meta["estimands"] == {"one": "additive", "another": "independent"}
    assert found.meta["prompts"][1] == [None, None, None, "w7", "w8"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("weights", ["processed", "raw"])
def test_direct_contributions_are_those_of_exact_attribution(architecture, weights):
    model = toy.random(architecture, weights=weights)
    tokens = toy.random_tokens(model, 2, 7)
    found = top_tokens(model, {"direct": direct(model)}, tokens, k=model.d_vocab)
    centred = np.zeros((2, model.n_layers, model.n_heads, model.d_vocab))
    for row in found.filter(metric="promotes").table.itertuples():
        centred[row.prompt, row.layer, row.head, row.value_token] = row.value
    for target in (2, 17, 50):
        other = attribute(model, tokens, by="head", target=torch.tensor([target, target]), pos=-1)
        base = attribute(model, tokens, by="head", target=torch.tensor([9, 9]), pos=-1)
        rows, first = (x.filter(component="z").table for x in (other, base))
        at = rows["prompt"], rows["layer"].astype(int), rows["head"].astype(int)
        # Differences between tokens: the level of attribution's logits is that of the unembedding. Float32 rounding.
        ours = centred[(*at, target)] - centred[(*at, 9)]
        np.testing.assert_allclose(ours, rows["value"] - first["value"], rtol=1e-4, atol=2e-5)
        assert np.abs(ours).max() > 0.1
    # Every token once, and the mean over all of them is zero up to rounding.
    assert len(set(found.filter(prompt=0, layer=0, head=0, metric="promotes").table["value_token"])) == model.d_vocab
    assert np.abs(centred.mean(-1)).max() < 1e-5


def test_a_head_turned_round_suppresses_what_it_promoted(model):
    lens = made(model, "additive", "low_rank")
    turned = AttentionLens("additive", "low_rank", {i: -m for i, m in lens.maps.items()}, lens.biases, lens.meta)
    found = top_tokens(model, {"as it is": lens, "turned": turned}, TEXTS, k=5).table
    key = ["prompt", "layer", "head", "value_rank"]
    one = found[(found["component"] == "as it is") & (found["metric"] == "promotes")].set_index(key)
    other = found[(found["component"] == "turned") & (found["metric"] == "suppresses")].set_index(key)
    assert (one["token"] == other["token"]).all() and (one["value"] == -other["value"]).all()


def test_batches_tiles_and_choices_change_nothing(model, monkeypatch):
    lenses = {"additive": made(model, "additive", "low_rank"), "direct": direct(model), "stream": "logit"}
    tokens = toy.random_tokens(model, 9, 6)
    whole = top_tokens(model, lenses, tokens, positions=None, k=3)
    sizes = []
    ends = reading._ends
    monkeypatch.setattr(reading, "_ends", lambda logits, k: sizes.append(logits.numel()) or ends(logits, k))
    monkeypatch.setattr(_output, "_TILE", 5 * 4 * 64)  # five positions of four heads
    monkeypatch.setattr(reading, "_TOKENS", 12)
    small = top_tokens(model, lenses, tokens, positions=None, k=3)
    assert max(sizes) <= 5 * 4 * 64 < 12 * 4 * 64
    same = whole.table["value_token"] == small.table["value_token"]
    # Equal up to rounding, where two tokens may change places.
    np.testing.assert_allclose(whole.table["value"], small.table["value"], atol=1e-4)
    assert same.mean() > 0.999
    few = top_tokens(model, lenses, tokens[2:3], layers=[2], heads=[3], positions=[1, 4], k=3)
    wanted = whole.filter(prompt=2, layer=2, head=[-1, 3], pos=[1, 4]).table
    assert few.table["token"].tolist() == wanted["token"].tolist()
    np.testing.assert_allclose(few.table["value"], wanted["value"], atol=1e-4)
    assert set(few.table["head"]) == {-1, 3}


def test_the_stream_is_read_as_the_logit_lens_reads_it(model):
    tokens = toy.random_tokens(model, 3, 6)
    found = top_tokens(model, {"stream": "logit"}, tokens, k=5).filter(metric="promotes").table
    lens = logit_lens(model, tokens, positions=-1, layers=[0, 1, 2], k=5)
    assert found["value_token"].to_numpy().reshape(-1, 5).tolist() == lens.arrays["top_tokens"][1].tolist()
    ours = found["value"].to_numpy().reshape(-1, 5)
    theirs = lens.arrays["top_log_probs"][1]
    # Two levels of the same numbers, in float32.
    np.testing.assert_allclose(ours - ours[:, :1], theirs - theirs[:, :1], atol=1e-4)


def test_a_tuned_lens_is_read_through_its_translators(model):
    tokens = toy.random_tokens(model, 3, 6)
    same = identity(model)
    moved = dataclasses.replace(same, bias=torch.randn(same.bias.shape, generator=torch.Generator().manual_seed(0)))
    found = top_tokens(model, {"logit": "logit", "identity": same, "moved": moved}, tokens, k=5).table
    logit, untrained, trained = (found[found["component"] == name] for name in ("logit", "identity", "moved"))
    assert (logit["value"].to_numpy() == untrained["value"].to_numpy()).all()
    layer = 1
    h = run(model, tokens, capture=["blocks.1.hook_resid_pre"]).cache["blocks.1.hook_resid_pre"][:, -1]
    logits = _output.output(model).logits(h + moved.bias[layer])
    wanted = (logits - logits.mean(-1, keepdim=True)).topk(5).values.detach().numpy()
    ours = trained[(trained["layer"] == layer) & (trained["metric"] == "promotes")]["value"].to_numpy().reshape(3, 5)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)  # float32


def test_tokens_that_pad_the_vocabulary_are_left_out():
    model = load(toy.random_module("llama"), tokenizer=toy.tokenizer(50))
    found = top_tokens(model, {"direct": direct(model)}, "w5 w9", k=50)
    assert found.table["value_token"].max() == 49
    with pytest.raises(ValueError, match="from 1 to 50 tokens"):
        top_tokens(model, {"direct": direct(model)}, "w5 w9", k=51)


def test_it_reads_what_induction_writes():
    model = toy.induction()
    found = top_tokens(model, {"direct": direct(model)}, ["w2 w3 w4 w2", "w7 w5 w9 w7"], layers=[1], heads=[0], k=1)
    assert found.filter(metric="promotes").table["token"].tolist() == ["w3", "w5"]


def test_refusals(model):
    lens = made(model, "additive", "full")
    with pytest.raises(ValueError, match="no lenses were given"):
        top_tokens(model, {}, TEXTS)
    with pytest.raises(ValueError, match="not of LlamaForCausalLM"):
        top_tokens(toy.random("llama", seed=1), {"lens": lens}, TEXTS)
    with pytest.raises(ValueError, match="raw"):
        top_tokens(toy.random("llama", weights="raw"), {"lens": lens}, TEXTS)
    with pytest.raises(ValueError, match=r"layers=\[1\]: the lenses have layers \[0, 2\] in common"):
        top_tokens(model, {"lens": lens, "stream": "logit"}, TEXTS, layers=[1])
    for heads in ([4], [-1], []):
        with pytest.raises(ValueError, match="has heads 0 to 3"):
            top_tokens(model, {"lens": lens}, TEXTS, heads=heads)
    with pytest.raises(ValueError, match="k=0"):
        top_tokens(model, {"lens": lens}, TEXTS, k=0)
    with pytest.raises(ValueError, match="is padding"):
        top_tokens(model, {"lens": lens}, TEXTS, positions=0)
    with pytest.raises(ValueError, match="has tokens 0 to 63"):
        top_tokens(model, {"lens": lens}, torch.tensor([[64]]))
