"""Singular directions and composition scores against matrices formed in full, and TransformerLens's own scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.models import toy
from interp.weights._parts import Inputs, key_maps, output_maps, query_maps, value_maps
from interp.weights.composition import composition
from interp.weights.svd import decompose, directions, spectrum


def full(model, layer, head, which):
    """The d_model x d_model map, from the model's own weights."""
    attention = model.bridge.blocks[layer].attn
    group = head // (model.n_heads // model.n_key_value_heads)
    if which == "ov":
        return (attention.W_V[group] @ attention.W_O[head]).detach()
    return (attention.W_Q[head] @ attention.W_K[group].T).detach()


@pytest.mark.parametrize("which", ["ov", "qk"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_the_decomposition_gives_the_map_back(architecture, which, toys):
    model = toys(architecture, weights="raw")
    for head in ((0, 0), (2, 1), (1, 3)):
        left, values, right = decompose(model, head, which)
        dense = full(model, *head, which)
        torch.testing.assert_close(left @ values.diag() @ right.T, dense, rtol=1e-4, atol=1e-5)
        theirs = torch.linalg.svdvals(dense)[: len(values)]
        torch.testing.assert_close(values, theirs, rtol=1e-4, atol=1e-5)
        eye = torch.eye(len(values))
        torch.testing.assert_close(left.T @ left, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(right.T @ right, eye, rtol=0, atol=1e-5)


def test_spectrum_is_of_every_head(toys):
    model = toys("llama", weights="raw")
    result = spectrum(model, "qk")
    values = torch.linalg.svdvals(full(model, 2, 1, "qk"))[:8].numpy()
    np.testing.assert_allclose(result.arrays["values"][1][2, 1], values, rtol=1e-4)
    row = result.filter(layer=2, head=1).table.iloc[0]
    assert row["value"] == pytest.approx((values**2).sum() ** 2 / (values**4).sum(), rel=1e-4)
    assert row["value_norm"] == pytest.approx(float(full(model, 2, 1, "qk").norm()), rel=1e-4)


def test_directions_are_read_in_tokens_with_their_signs(toys):
    model = toys("llama", weights="raw")
    e = Inputs(model, torch.arange(64), "mlp0").at(2)
    for which, sides in (("ov", ("reads", "writes")), ("qk", ("query", "key"))):
        result = directions(model, [(2, 1)], which, n_directions=2, k=4)
        left, values, right = decompose(model, (2, 1), which)
        ends = (e @ left, (right.T @ model.bridge.unembed.W_U.detach()).T if which == "ov" else e @ right)
        for side, projected in zip(sides, ends, strict=True):
            for feature in range(2):
                for sign, order in (
                    ("+", projected[:, feature].argsort(descending=True)),
                    ("-", projected[:, feature].argsort()),
                ):
                    own = result.filter(component=side, feature=feature, metric=sign).table
                    assert own["value_token"].tolist() == order[:4].tolist()
                    np.testing.assert_allclose(own["value"], projected[order[:4], feature], rtol=1e-4)
                    assert own["value_singular"].iloc[0] == pytest.approx(float(values[feature]))
        with pytest.raises(ValueError, match="1 to 8 directions"):
            directions(model, [(2, 1)], which, n_directions=9)


def test_folded_raw_maps_are_the_processed_ones(toys):
    for architecture in ("gpt2", "llama"):
        raw, processed = (toys(architecture, weights=weights) for weights in ("raw", "processed"))
        for which in ("ov", "qk"):
            ours = decompose(raw, (1, 2), which, fold_ln_in=True)
            theirs = decompose(processed, (1, 2), which)
            if which == "ov" and architecture == "gpt2":  # processing centres what is written, too
                continue
            torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-5)
            plain = decompose(raw, (1, 2), which)
            assert (plain[1] - ours[1]).abs().max() > 1e-2


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_composition_is_the_ratio_of_norms(architecture, part, toys):
    model = toys(architecture, weights="raw")
    result = composition(model, part)
    found = result.arrays["composition"][1]
    for source in ((0, 0), (0, 3), (1, 1)):
        left = full(model, *source, "ov")
        for target in ((1, 2), (2, 0), (2, 3)):
            if target[0] <= source[0]:
                assert found[(*source, *target)] == 0
                continue
            right = {
                "q": full(model, *target, "qk"),
                "k": full(model, *target, "qk").T,
                "v": full(model, *target, "ov"),
            }
            expected = (left @ right[part]).norm() / (left.norm() * right[part].norm())
            # Products of float32 matrices of 32 dimensions.
            assert found[(*source, *target)] == pytest.approx(float(expected), rel=1e-4)
            row = result.filter(src="{}.{}".format(*source), dst="{}.{}".format(*target)).table
            assert row["value"].item() == pytest.approx(float(expected), rel=1e-4)
    assert len(result.table) == 16 * 3


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_composition_equals_transformer_lens(part, toys):
    from transformer_lens import FactoredMatrix, utils

    model = toys("gpt2", weights="processed")
    stacked = {
        name: torch.stack([getattr(block.attn, f"W_{name}").detach() for block in model.bridge.blocks])
        for name in "QKVO"
    }
    ov = FactoredMatrix(stacked["V"], stacked["O"])
    qk = FactoredMatrix(stacked["Q"], stacked["K"].transpose(-2, -1))
    theirs = utils.composition_scores(ov, {"q": qk, "k": qk.T, "v": ov}[part], broadcast_dims=True)
    ours = torch.as_tensor(composition(model, part).arrays["composition"][1])
    for source, target in ((0, 1), (0, 2), (1, 2)):
        torch.testing.assert_close(ours[source, :, target], theirs[source, :, target], rtol=1e-4, atol=1e-5)


def test_composition_counts_the_norms_between_when_asked(toys):
    raw, processed = (toys("llama", weights=weights) for weights in ("raw", "processed"))
    for part in ("q", "k"):
        ours, theirs = composition(raw, part, fold_ln=True), composition(processed, part)
        np.testing.assert_allclose(ours.table["value"], theirs.table["value"], rtol=1e-3)
        assert np.abs(composition(raw, part).table["value"] - ours.table["value"]).max() > 1e-3


def test_the_baseline_is_what_random_heads_have(toys):
    model = toys("gpt2", weights="raw")
    result = composition(model, "k")
    # 48 pairs of random maps of rank 8 in 32 dimensions: the mean lies near 1 / sqrt(32) = 0.177.
    assert result.table["value"].mean() == pytest.approx(result.meta["baseline"], rel=0.15)


def test_parts_are_the_models_own(toys):
    model = toys("llama", weights="raw")
    assert [len(f(model, 1)) for f in (query_maps, key_maps, value_maps, output_maps)] == [4, 2, 2, 4]
    rows = toy.random_module("llama").model.layers[1].self_attn.v_proj.weight.unflatten(0, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(value_maps(model, 1), rows.detach())
