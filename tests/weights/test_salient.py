"""Saliency against direct norms, mappings and atlas against the dense map, measures of unevenness by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from interp.weights import salient
from interp.weights._parts import Inputs, output_maps, value_maps
from interp.weights.salient import atlas, mappings, saliency, unevenness

HEAD = (2, 3)


def direct(model, layer, head):
    """|e W_V W_O| / |e| with the d_model x d_model map formed."""
    e = Inputs(model, torch.arange(model.d_vocab), "mlp0").at(layer)
    w_v = value_maps(model, layer)[head * model.n_key_value_heads // model.n_heads]
    return ((e @ (w_v @ output_maps(model, layer)[head])).norm(dim=1) / e.norm(dim=1)).numpy()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "qwen2"])
def test_the_gram_matrix_gives_the_direct_norms(architecture, toys):
    model = toys(architecture, weights="raw")
    result = saliency(model)
    found = result.arrays["saliency"][1]
    for layer in range(3):
        for head in range(4):
            # Float32 sums over 32 dimensions in another order.
            np.testing.assert_allclose(found[layer, head], direct(model, layer, head), rtol=2e-5)
    row = result.filter(layer=1, head=2).table.iloc[0]
    assert row["value"] == pytest.approx(found[1, 2].mean(), rel=1e-6)
    assert row["value_skewness"] == pytest.approx(scipy.stats.skew(found[1, 2].astype(float)), rel=1e-5)


def test_saliency_is_in_blocks_of_tokens_and_some_layers(toys, monkeypatch):
    model = toys("llama", weights="raw")
    whole = saliency(model).arrays["saliency"][1]
    monkeypatch.setattr(salient, "_TOKENS", 7)
    np.testing.assert_allclose(saliency(model, layers=[2]).arrays["saliency"][1][0], whole[2], rtol=1e-5)


def test_unevenness_of_known_rows():
    one, equal, none = np.eye(1, 50)[0], np.full(50, 0.3, dtype=np.float32), np.zeros(50)
    line = np.arange(1, 51)
    found = unevenness(np.stack([one, equal, none, line]))
    np.testing.assert_allclose(found["value_tokens"][:3], [1, 50, 0], rtol=1e-6)
    np.testing.assert_allclose(found["value_gini"][:3], [0.98, 0, 0], atol=1e-7)  # 1 - 1/n for a single one
    assert found["value_gini"][3] == pytest.approx(np.abs(line[:, None] - line).sum() / (2 * 50**2 * line.mean()))
    np.testing.assert_allclose(found["value_skewness"], [scipy.stats.skew(one), 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found["value_largest"], [1, 0.3, 0, 50], rtol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_mappings_are_the_largest_entries_of_the_most_salient_rows(architecture, toys, dense):
    model = toys(architecture, weights="raw")
    table = mappings(model, [HEAD, (0, 1)], n_tokens=4, k=3).table
    for (layer, head), own in table.groupby(["layer", "head"]):
        m, sigma = dense(model, layer, head), direct(model, layer, head)
        sources = np.argsort(-sigma)[:4]
        assert own["value_source"].tolist() == np.repeat(sources, 3).tolist()
        np.testing.assert_allclose(own["value_saliency"], np.repeat(sigma[sources], 3), rtol=1e-5)
        values, targets = m[sources].topk(3)
        assert own["value_target"].tolist() == targets.flatten().tolist()
        np.testing.assert_allclose(own["value"], values.flatten(), rtol=1e-4)
        assert own["src"].tolist()[0] == model.to_str_tokens([int(sources[0])])[0]
        assert own["dst"].tolist()[0] == model.to_str_tokens([int(targets[0, 0])])[0]
    assert table["head"].tolist()[0] == HEAD[1]  # in the order asked for


@pytest.mark.parametrize(("k", "tile"), [(1, None), (5, None), (5, (7, 3, 4)), (64, (10, 9, 3)), (20, (64, 5, 16))])
def test_the_atlas_is_the_dense_maps_top(k, tile, toys, dense, monkeypatch):
    model = toys("llama", weights="raw")
    if tile:
        for name, size in zip(("_ATLAS_ROWS", "_ATLAS_COLUMNS", "_GROUP"), tile, strict=True):
            monkeypatch.setattr(salient, name, size)
    result = atlas(model, [HEAD, (0, 2)], k=k)  # head 2 reads values 1: not its number modulo the groups
    for index, at in enumerate((HEAD, (0, 2))):
        values, targets = dense(model, *at).topk(k)
        np.testing.assert_allclose(result.arrays["entry"][1][index], values, rtol=1e-3, atol=1e-4)
        # Entries of random rows are told apart; where k is all of them, neighbours may lie within rounding.
        assert (result.arrays["target"][1][index] == targets.numpy()).mean() > (0.99 if k < 64 else 0.95)
    assert result.table["value"][0] == pytest.approx(float(dense(model, *HEAD).max()), rel=1e-4)


def test_an_atlas_goes_on_head_by_head(toys, monkeypatch):
    model = toys("llama", weights="raw")
    heads = [(0, 0), (1, 1), HEAD]
    whole = atlas(model, heads, k=4)
    done, largest = [], salient._largest

    def stops(*args):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return largest(*args)

    monkeypatch.setattr(salient, "_largest", stops)
    with pytest.raises(KeyboardInterrupt):
        atlas(model, heads, k=4)
    np.testing.assert_array_equal(atlas(model, heads, k=4).arrays["target"][1], whole.arrays["target"][1])
    assert len(done) == 4


def test_refusals(toys):
    model = toys("llama", weights="raw")
    with pytest.raises(ValueError, match="heads 0 to 3"):
        mappings(model, [(0, 4)])
    with pytest.raises(ValueError, match="1 to 64"):
        mappings(model, [HEAD], n_tokens=65)
    with pytest.raises(ValueError, match="each head once"):
        atlas(model, [HEAD, HEAD])
    with pytest.raises(ValueError, match='weights="raw"'):
        saliency(toys("llama"))


def test_no_place_beyond_the_vocabulary_is_among_the_largest(monkeypatch):
    monkeypatch.setattr(salient, "_GROUP", 4)
    generator = torch.Generator().manual_seed(0)
    # 29 tokens in groups of 4 leave 3 places over; every entry is below the 0 that those hold.
    z, w_u = torch.rand(6, 3, generator=generator), -torch.rand(3, 29, generator=generator)
    values, targets = salient._largest(z, torch.eye(3), w_u, 5)
    expected = (z @ w_u).topk(5)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(targets, expected.indices)
