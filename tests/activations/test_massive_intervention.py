"""Interventions: exact values in the stream, identities of the knock-outs, exact attribution, the split of z."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.activations import implicit_bias, massive, massive_intervention, massive_mechanism
from interp.core.metrics import next_token_loss
from interp.models import ModelCheckError, load, run, toy
from interp.models.vision import toy_vit


@pytest.fixture(scope="module")
def planted():
    model = toy.inflated(layer=1, feature=3)
    return model, toy.random_tokens(model, 4, 10), massive.detect(model, toy.random_tokens(model, 4, 10, seed=1))


@pytest.fixture(scope="module")
def real(smol_raw):
    """The default model on a few real sentences, and its detection."""
    sentences = [
        "The war lasted from the spring until the first snow fell on the hills.",
        "Paris is the capital of France, and Rome is the capital of Italy today.",
        "She opened the door, looked at the garden and smiled at the old dog.",
    ]
    tokens = torch.stack([smol_raw.tokenize(s).ids[0, :14] for s in sentences])
    return smol_raw, tokens, massive.detect(smol_raw, tokens)


def means_of(result, component, metric):
    return result.filter(component=component, metric=metric).table["value"].to_numpy()


def test_overwritten_entries_have_exactly_the_values_asked_for(planted):
    model, tokens, calibration = planted
    means = massive_intervention.calibrated_means(calibration, 1)
    assert set(means) == {("first token", 3)}
    name = "blocks.1.hook_resid_post"
    clean = run(model, tokens, capture=[name]).cache[name]
    for replacement, expected in (
        (torch.zeros(2, 32), 0.0),
        (massive_intervention.by_class(model, means), means["first token", 3]),
    ):
        hook = massive_intervention.overwrite(torch.ones_like(tokens), replacement, [])
        changed = run(model, tokens, hooks=[(name, hook)], capture=[name]).cache[name]
        assert torch.equal(changed[:, 0, 3], torch.full((4,), expected))
        untouched = torch.ones_like(clean, dtype=torch.bool)
        untouched[:, 0, 3] = False
        assert torch.equal(changed[untouched], clean[untouched])


def test_first_and_other_tokens_get_their_own_means_and_unseen_dimensions_stay(planted):
    model, tokens, _ = planted
    table = massive_intervention.by_class(
        model, {("first token", 3): 7.0, ("other token", 3): 9.0, ("other token", 5): 2.0}
    )
    assert table[:, 3].tolist() == [7.0, 9.0]
    assert table[:, 5].tolist() == [2.0, 2.0]  # seen in one class only
    assert bool(table[:, 6].isnan().all())
    stream = torch.zeros(1, 3, 32)
    stream += 0.01
    stream[0, 0, [3, 6]] = 5000.0
    stream[0, 2, [3, 5]] = -5000.0
    out = massive_intervention.overwrite(torch.ones(1, 3, dtype=torch.long), table, [])(stream, hook=None)
    assert out[0, 0, [3, 6]].tolist() == [7.0, 5000.0]
    assert out[0, 2, [3, 5]].tolist() == [9.0, 2.0]


def test_intervention_is_the_manual_edit(real):
    model, tokens, detected = real
    result = massive_intervention.intervene(model, tokens, calibration=detected, batch_size=2)
    layer = massive.first_layer(detected)
    rows = detected.filter(layer=layer).table

    def zero(stream, hook):
        stream = stream.clone()
        stream[rows["prompt"].tolist(), rows["pos"].tolist(), rows["feature"].tolist()] = 0.0
        return stream

    edited = run(model, tokens, hooks=[(f"blocks.{layer}.hook_resid_post", zero)]).logits
    # Batches of two against three rows at once: float32 sums in another order.
    expected = next_token_loss(edited, tokens).mean(1).numpy()
    np.testing.assert_allclose(means_of(result, "set to zero", "loss"), expected, rtol=1e-4)
    plain = next_token_loss(model(tokens), tokens).mean(1).numpy()
    np.testing.assert_allclose(means_of(result, "unchanged", "loss"), plain, rtol=1e-4)
    assert (expected - plain > 3).all()


def test_accuracy_counts_right_answers(smol_raw, real):
    from interp.tasks import ioi

    task = ioi(smol_raw, 6)
    result = massive_intervention.intervene(smol_raw, task, calibration=real[2], to=("zero",))
    last = smol_raw(task.clean, task.mask)[:, -1]
    first = (last.argmax(-1) == task.answers).float().numpy()
    before = (last.gather(1, task.answers[:, None]) > last.gather(1, task.wrong[:, None]))[:, 0].float().numpy()
    assert (means_of(result, "unchanged", "answer first") == first).all()
    assert (means_of(result, "unchanged", "answer above wrong") == before).all()
    assert first.mean() > means_of(result, "set to zero", "answer first").mean()


def test_vision_model_is_measured_by_its_output():
    model = load(toy_vit(token="CLS", layer=1, feature=7))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibration = massive.detect(model, pixels[:2])
    result = massive_intervention.intervene(model, pixels[2:], calibration=calibration)
    same = means_of(result, "unchanged", "cosine with unchanged output")
    zero = means_of(result, "set to zero", "cosine with unchanged output")
    mean = means_of(result, "set to mean", "cosine with unchanged output")
    np.testing.assert_allclose(same, 1.0, rtol=1e-6)
    assert (zero < 0.99).all()
    assert (mean > zero).all()


def test_unknown_intervention_and_empty_layer(planted):
    model, tokens, calibration = planted
    with pytest.raises(ValueError, match="'one' is not known"):
        massive_intervention.intervene(model, tokens, calibration=calibration, to=("one",))
    with pytest.raises(ValueError, match="no massive activations after layer 0"):
        massive_intervention.intervene(model, tokens, calibration=calibration, layer=0)


def test_keeping_keys_and_values_repairs_every_other_position_exactly(real):
    # An identity: after the layer, other positions read a token through its keys and values only.
    model, tokens, detected = real
    result = massive_mechanism.knockouts(model, tokens, calibration=detected, batch_size=3)
    away = "loss away from massive tokens"
    unchanged = means_of(result, "unchanged", away)
    np.testing.assert_allclose(means_of(result, "zero entries, keep keys and values", away), unchanged, rtol=1e-5)
    # The other tests must move it, or the identity would show nothing.
    for test in ("zero entries", "zero entries, keep keys", "zero entries, keep values", "hide token as key"):
        assert (np.abs(means_of(result, test, away) - unchanged) > 1e-3).all(), test
    # Hidden as a key, the token's stream cannot reach the others, so zeroing it too changes nothing for them.
    np.testing.assert_allclose(
        means_of(result, "zero entries, hide token as key", away),
        means_of(result, "hide token as key", away),
        rtol=1e-5,
    )


@pytest.mark.parametrize("architecture", sorted(set(toy.ARCHITECTURES) - {"opt"}))
def test_hiding_a_key_is_renormalised_attention_on_every_architecture(architecture):
    model = toy.random(architecture, weights="raw")
    tokens = toy.random_tokens(model, 2, 7)
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, 2] = True
    name = "blocks.1.attn.hook_pattern"
    clean = run(model, tokens, capture=[name]).cache[name]
    hooks = massive_mechanism._hide([1], hidden)
    changed = run(model, tokens, hooks=hooks, capture=[name])
    pattern = changed.cache[name]
    assert float(pattern[:, :, 3:, 2].abs().max()) == 0.0
    np.testing.assert_allclose(pattern.sum(-1), 1.0, rtol=1e-5)
    # Ratios among the other keys stay, and the hidden token still sees itself.
    kept = clean[:, :, 5, [0, 4]] / clean[:, :, 5, [0, 4]].sum(-1, keepdim=True)
    np.testing.assert_allclose(
        pattern[:, :, 5, [0, 4]] / pattern[:, :, 5, [0, 4]].sum(-1, keepdim=True), kept, rtol=1e-4
    )
    torch.testing.assert_close(pattern[:, :, :3], clean[:, :, :3])
    assert float((changed.logits - model(tokens)).abs().max()) > 1e-3


def test_an_architecture_that_ignores_edited_patterns_is_refused():
    model = toy.random("opt", weights="raw")
    with pytest.raises(ModelCheckError, match="does not change the output"):
        massive_mechanism.relocate(model, toy.random_tokens(model, 2, 7))


def test_controls_touch_as_many_entries_elsewhere(real):
    model, tokens, detected = real
    layer = massive.first_layer(detected)
    name = f"blocks.{layer}.hook_resid_post"
    mask = torch.ones_like(tokens)
    clean = run(model, tokens, capture=[name]).cache
    where = massive._criteria(clean[name], mask, 100.0, 1000.0)[2]
    plans = massive_mechanism._plans(
        model, layer, where, mask, clean, [], [], {}, 0, {"min_magnitude": 100.0, "min_ratio": 1000.0}
    )
    for test in ("zero random dimensions", "zero entries of a random token"):
        changed = run(model, tokens, hooks=plans[test], capture=[name]).cache[name]
        touched = (changed == 0) & (clean[name] != 0)
        assert not bool((touched & where).any()), test
        assert touched.sum((1, 2)).tolist() == where.sum((1, 2)).tolist(), test


def test_writers_sum_to_the_entry_and_name_the_planted_neuron(planted):
    model, tokens, _ = planted
    detected = massive.detect(model, tokens)
    writers = massive_mechanism.writers(model, tokens, detected=detected, batch_size=3)
    total = writers.table.groupby("prompt")["value"].sum()
    final = run(model, tokens, capture=["blocks.2.hook_resid_post"]).cache["blocks.2.hook_resid_post"][:, 0, 3]
    np.testing.assert_allclose(total, final.numpy(), rtol=1e-5)
    top = writers.top(4)
    assert set(top["component"]) == {"MLP"} and set(top["layer"]) == {1}
    neurons = massive_mechanism.neurons(model, tokens, detected=detected, layers=[0, 1], k=2, batch_size=3)
    assert set(neurons.top(4)["neuron"]) == {0}
    sums = neurons.table.groupby(["layer", "prompt"])["value"].sum()
    mlp = writers.filter(component="MLP", layer=[0, 1]).table.groupby(["layer", "prompt"])["value"].sum()
    np.testing.assert_allclose(sums, mlp, rtol=1e-4, atol=1e-5)


def test_writers_sum_on_the_real_model(real):
    model, tokens, detected = real
    writers = massive_mechanism.writers(model, tokens, detected=detected)
    places = writers.table.groupby("prompt")[["pos", "feature"]].first()
    name = f"blocks.{model.n_layers - 1}.hook_resid_post"
    final = run(model, tokens, capture=[name]).cache[name]
    expected = [float(final[i, row.pos, row.feature]) for i, row in enumerate(places.itertuples())]
    # 60 float32 terms of up to 25,000 that cancel to a few thousand: 1e-4 relative is their rounding.
    np.testing.assert_allclose(writers.table.groupby("prompt")["value"].sum(), expected, rtol=1e-4)


def test_neurons_that_do_not_sum_are_refused(planted):
    model, tokens, _ = planted
    detected = massive.detect(model, tokens)
    point = model.hook_point("blocks.1.hook_mlp_out")
    point.add_hook(lambda out, hook: out * 1.5)  # stands for a norm after the MLP
    try:
        with pytest.raises(ValueError, match="sum to its MLP's output only to"):
            massive_mechanism.neurons(model, tokens, detected=detected, layers=[1])
    finally:
        point.remove_hooks()


def test_relocation_hides_the_first_token_from_layer_0(planted):
    model, tokens, _ = planted
    hidden = massive_mechanism.relocate(model, tokens)
    assert hidden.meta["hidden"] == "first token"
    # The planted entry depends on the position alone, so it stays; the streams of the others differ.
    assert set(hidden.table["pos"]) == {0}
    plain = massive.detect(model, tokens).arrays["profile"][1]
    assert np.abs(hidden.arrays["profile"][1] - plain).max() > 1e-6


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma"])
def test_bias_and_rest_sum_to_z(architecture):
    model = toy.random(architecture, weights="raw")
    tokens = toy.random_tokens(model, 2, 7)
    names = [f"blocks.1.attn.hook_{part}" for part in ("pattern", "v", "z")]
    cache = run(model, tokens, capture=names).cache
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[:, [0, 3]] = True
    bias, rest = implicit_bias.split(cache[names[0]], cache[names[1]], chosen)
    torch.testing.assert_close(bias + rest, cache[names[2]], rtol=1e-4, atol=1e-5)
    # Query head 2 of llama reads KV group 1: the same sum by hand, one head and query.
    group = 2 // (model.n_heads // model.n_key_value_heads)
    by_hand = sum(cache[names[0]][0, 2, 5, k] * cache[names[1]][0, k, group] for k in (0, 3))
    torch.testing.assert_close(bias[0, 5, 2], by_hand, rtol=1e-4, atol=1e-5)


def test_implicit_bias_metrics_by_hand(real):
    model, tokens, detected = real
    result = implicit_bias.decompose(model, tokens, detected=detected, batch_size=2)
    layer, head, prompt = 20, 4, 1
    names = [f"blocks.{layer}.attn.hook_{part}" for part in ("pattern", "v")]
    cache = run(model, tokens[prompt : prompt + 1], capture=names).cache
    pattern, value = cache[names[0]][0, head], cache[names[1]][0, :, head // 3]
    at = sorted(set(detected.filter(layer=massive.first_layer(detected), prompt=prompt).table["pos"]))
    assert at == [0]
    parts = pattern[1:, :1] * value[:1]

    def found(metric):
        return result.filter(layer=layer, head=head, prompt=prompt, metric=metric).table["value"].item()

    assert found("attention on massive tokens") == pytest.approx(float(pattern[1:, 0].mean()), rel=1e-4)
    assert found("norm of bias") == pytest.approx(float(parts.norm(dim=-1).mean()), rel=1e-4)
    variation = 1 - float(parts.mean(0).pow(2).sum() / parts.pow(2).sum(-1).mean())
    assert found("variation of bias over queries") == pytest.approx(
        variation, rel=1e-3, abs=1e-6
    )  # 1 minus a number near 1


def test_agreement_is_one_for_equal_and_low_for_random_biases(real):
    model, tokens, detected = real
    result = implicit_bias.decompose(model, tokens, detected=detected)
    dims, bias = result.arrays["bias"]
    same = implicit_bias.agreement(
        type(result)(result.method, result.table, result.unit, {"bias": (dims, bias[[0, 0, 0]])}, result.meta)
    )
    np.testing.assert_allclose(same.table["value"], 1.0, rtol=1e-6)
    noise = np.random.default_rng(0).normal(size=(3, *bias.shape[1:]))
    low = implicit_bias.agreement(
        type(result)(result.method, result.table, result.unit, {"bias": (dims, noise)}, result.meta)
    )
    assert abs(low.table["value"].mean()) < 0.1


def test_other_prompts_than_detected_are_refused(planted):
    model, tokens, calibration = planted
    for method in (massive_mechanism.writers, implicit_bias.decompose):
        with pytest.raises(ValueError, match="other prompts than `task`"):
            method(model, tokens, detected=calibration)


def test_knockouts_need_a_decoder():
    model = load(toy_vit())
    with pytest.raises(ValueError, match="loss of a decoder"):
        massive_mechanism.knockouts(
            model, torch.randn(2, 3, 32, 32), calibration=massive.detect(model, torch.randn(2, 3, 32, 32))
        )
