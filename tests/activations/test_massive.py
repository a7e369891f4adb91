"""Detection: planted truth, brute force, padding and batches, and what a broken activation is told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from interp.activations import massive
from interp.core.result import Result
from interp.models import run, toy
from interp.models.vision import toy_vit
from interp.tasks.task import Task


def brute_force(model, tokens, *, min_magnitude=100.0, min_ratio=1000.0):
    """The definition, one prompt and one entry at a time, in numpy."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    found = []
    for prompt, row in enumerate(tokens):
        cache = run(model, row[None], capture=names).cache
        for layer, name in enumerate(names):
            stream = cache[name][0].numpy()
            size = np.abs(stream)
            middle = np.sort(size.ravel())[(size.size - 1) // 2]
            for pos, feature in zip(*np.nonzero((size > min_magnitude) & (size >= min_ratio * middle)), strict=True):
                found.append((prompt, layer, pos, feature, stream[pos, feature], size[pos, feature] / middle))
    return np.array(found)


def columns(result: Result) -> np.ndarray:
    return result.table[["prompt", "layer", "pos", "feature", "value", "value_ratio"]].to_numpy(dtype=float)


@pytest.mark.parametrize(("layer", "feature", "token"), [(0, 5, 0), (1, 3, 0), (2, 31, 4)])
def test_planted_entry_is_found_where_it_is_and_nowhere_else(layer, feature, token):
    model = toy.inflated(layer=layer, feature=feature, token=token)
    table = massive.detect(model, toy.random_tokens(model, 3, 9)).table
    expected = [(prompt, depth, token, feature) for prompt in range(3) for depth in range(layer, 3)]
    assert table[["prompt", "layer", "pos", "feature"]].apply(tuple, axis=1).tolist() == expected
    # The neuron writes 5,000; what else reaches the dimension is below 100 by construction.
    assert table["value"].between(4900, 5100).all()


def test_equals_the_definition_spelled_out(smol_raw):
    tokens = torch.arange(5, 5 + 3 * 20).reshape(3, 20) * 37 % smol_raw.d_vocab
    ours, slow = columns(massive.detect(smol_raw, tokens, batch_size=2)), brute_force(smol_raw, tokens)
    assert len(ours) > 20
    assert (ours[:, :4] == slow[:, :4]).all()
    # Batches of two and of one differ by the order of float32 sums only: 1e-5 of values near 20,000.
    np.testing.assert_allclose(ours[:, 4:], slow[:, 4:], rtol=1e-4)


def test_both_criteria_count():
    model = toy.inflated(value=150.0)
    tokens = toy.random_tokens(model, 2, 8)
    profile = massive.detect(model, tokens).arrays["profile"][1]
    largest, median = float(profile[0, 1, 0]), float(profile[0, 1, 3])
    ratio = largest / median
    assert ratio > 100

    def count(**options):
        return len(massive.detect(model, tokens[:1], **options).filter(layer=1).table)

    assert count(min_ratio=ratio * 0.99) == 1
    assert count(min_ratio=ratio * 1.01) == 0
    assert count(min_ratio=1.0, min_magnitude=largest * 0.99) == 1
    assert count(min_ratio=1.0, min_magnitude=largest * 1.01) == 0


def test_injected_entry_on_gaussian_noise_by_the_specification():
    noise = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 20, dtype=torch.long)

    def found(value: float, scale: float = 1.0) -> list[list[int]]:
        stream = noise * scale
        stream[0, 7, 13] = value
        massive_at = massive._criteria(stream, mask, 100.0, 1000.0)[2]
        return [] if massive_at is None else massive_at.nonzero().tolist()

    assert found(5000.0) == [[0, 7, 13]]
    assert found(-5000.0) == [[0, 7, 13]]
    assert found(90.0, scale=0.01) == []  # the magnitude fails, the ratio would pass
    assert found(5000.0, scale=6.0 / 0.6745) == []  # a median of 6: 833 times it


def test_batches_do_not_change_the_numbers():
    model = toy.inflated()
    tokens = toy.random_tokens(model, 5, 8)
    whole, single = (columns(massive.detect(model, tokens, batch_size=size)) for size in (5, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-5)


def test_padding_has_no_activations():
    model = toy.inflated(token=0)
    short, long = toy.random_tokens(model, 1, 5), toy.random_tokens(model, 1, 9, seed=1)
    padded = torch.cat([torch.full((1, 4), model.pad_token), short], dim=1)
    task = Task(
        name="ragged",
        prompts=("short", "long"),
        clean=torch.cat([padded, long]),
        mask=torch.cat([torch.tensor([[0] * 4 + [1] * 5]), torch.ones(1, 9, dtype=torch.long)]),
        source="test",
    )
    together = massive.detect(model, task)
    alone = massive.detect(model, short)
    ours = together.filter(prompt=0).table
    assert (ours["pos"] == 4).all()  # position 0 of the unpadded prompt
    assert (ours["component"] == "first token").all()
    np.testing.assert_allclose(ours["value"], alone.table["value"], rtol=1e-5)
    # The median leaves the padding out: with it, it would be another number.
    np.testing.assert_allclose(together.arrays["profile"][1][0], alone.arrays["profile"][1][0], rtol=1e-4)


def test_vision_transformers_are_models_too():
    model_inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    from interp.models import load

    result = massive.detect(load(toy_vit(token="register 1", layer=1, feature=7)), model_inputs)
    assert set(result.table["token"]) == {"register 1"}
    assert set(result.table["feature"]) == {7}
    assert result.table["layer"].min() == 1


def test_first_layer_wants_most_prompts_not_one():
    model = toy.inflated(layer=1)
    result = massive.detect(model, toy.random_tokens(model, 4, 8))
    lone = result.table.iloc[[0, 1]].assign(layer=0, prompt=0)  # two entries of one prompt are one prompt
    early = Result(result.method, pd.concat([lone, result.table]), result.unit, result.arrays, result.meta)
    assert massive.first_layer(early) == 1
    assert massive.first_layer(early, share=0.25) == 0


def test_nothing_massive_is_an_empty_table_and_a_clear_error():
    model = toy.random("llama")
    result = massive.detect(model, toy.random_tokens(model, 2, 8))
    assert len(result.table) == 0
    with pytest.raises(ValueError, match=r"the largest\s+entry is .* times its layer's median"):
        massive.first_layer(result)


def test_locate_and_constancy_count_prompts_once():
    model = toy.inflated(layer=1)
    result = massive.detect(model, toy.random_tokens(model, 4, 8))
    doubled = pd.concat([result.table, result.table.assign(pos=1)], ignore_index=True)
    twice = Result(result.method, doubled, result.unit, result.arrays, result.meta)
    assert massive.locate(twice).table["value"].tolist() == [1.0, 1.0]
    row = massive.constancy(result).table.iloc[0]
    values = result.filter(layer=1).table["value"]
    assert row["value"] == pytest.approx(values.std(ddof=1) / abs(values.mean()))
    assert row["value_prompts"] == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_activation_is_said_where(bad):
    model = toy.random("gpt2", weights="raw")
    tokens = toy.random_tokens(model, 3, 8)
    poisoned = int(tokens[2, 5])
    with torch.no_grad():
        model.bridge.blocks[1].mlp.b_out[4] = bad
    with pytest.raises(massive.NonFiniteActivationError, match=r"after layer 1 .* prompt 0, position 0, dimension"):
        massive.detect(model, tokens, batch_size=2)
    assert poisoned > 0


def test_prompts_longer_than_the_context_and_no_prompts():
    model = toy.inflated()
    with pytest.raises(ValueError, match="65 tokens, but .* context of 64"):
        massive.detect(model, toy.random_tokens(model, 1, 65))
    with pytest.raises(ValueError, match="no prompts"):
        massive.detect(model, toy.random_tokens(model, 1, 8)[:0])


def test_tokens_are_named_and_classed():
    from interp.activations._inputs import token_kind

    assert token_kind("The", True) == "first token"
    assert token_kind(".", False) == token_kind("\n\n", False) == token_kind(" ,", False) == "delimiter"
    assert token_kind(" and", False) == token_kind(" ", False) == token_kind("", False) == "other token"
