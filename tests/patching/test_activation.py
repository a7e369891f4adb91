"""Activation patching: end points, hooks, TransformerLens, planted truth and blind spots, sources by hand, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import transformer_lens.patching as theirs

from interp.core import rerun as engine
from interp.core.edits import Edit
from interp.core.readout import candidates, readout
from interp.models import ModelCheckError, load, run, toy
from interp.models.program import NoProgramError
from interp.models.vision import toy_vit
from interp.patching import _runs, _sources, activation
from interp.patching.activation import joint, patch

#: Logits of the toys are about 10 and gaps about 1; sums in another order differ by 1e-6 a layer.
TOLERANCE = 1e-4
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "post")


def values(result):
    return result.table["value"].to_numpy()


def means(result, *by):
    return result.table.groupby(list(by))["value"].mean().to_dict()


# --- end points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_everything_patched_is_one_and_shared_positions_are_zero(architecture, random_model, random_task):
    model = random_model(architecture)
    task = random_task(model)
    for direction, reached in (("denoising", "clean"), ("noising", "corrupt")):
        everything = patch(model, task, site="resid_pre", by="layer", layers=[0], direction=direction)
        clean, corrupt = (everything.arrays[which][1] for which in ("clean", "corrupt"))
        assert everything.summary()["mean"].item() == pytest.approx(1.0, abs=TOLERANCE)
        # Per prompt it is the prompt's own gap over the mean gap, and the metric that of the other run.
        np.testing.assert_allclose(values(everything), (clean - corrupt) / (clean - corrupt).mean(), atol=TOLERANCE)
        metric = everything.table["value_metric"].to_numpy()
        np.testing.assert_allclose(metric, everything.arrays[reached][1], atol=TOLERANCE)
        # The first tokens are the same, so their activations are, and nothing is computed.
        shared = patch(model, task, by=("layer", "pos"), positions=[0, 1, 2], direction=direction)
        assert (values(shared) == 0).all()


@pytest.mark.parametrize("site", SITES)
def test_patched_with_itself_nothing_changes(site, random_model, random_task):
    model = random_model("llama")
    task = random_task(model, padded=False)[:1]
    # The mean over one prompt at each position is the prompt's own.
    own = patch(model, task, site=site, by=("layer", "pos"), source="position_mean", direction="noising")
    np.testing.assert_allclose(values(own), 0, atol=TOLERANCE)
    other = patch(
        model, task, site=site, by=("layer", "pos"), source="position_mean", direction="noising",
        reference=replace(task, clean=task.corrupt),
    )  # fmt: skip
    paired = patch(model, task, site=site, by=("layer", "pos"), direction="noising")
    np.testing.assert_allclose(values(other), values(paired), atol=TOLERANCE)
    assert np.abs(values(paired)).max() > 0.1


def test_all_components_together_are_everything(random_model, random_task):
    model = random_model("gpt2")
    task = random_task(model)
    parts = [Edit(site, layer) for site in ("attn_out", "mlp_out") for layer in range(3)]
    sets = {"all": [Edit("resid_pre", 0), *parts], "all but the embedding": parts, "none": []}
    for direction in ("denoising", "noising"):
        found = means(joint(model, task, sets, direction=direction), "target")
        assert found["all"] == pytest.approx(1.0, abs=TOLERANCE)
        assert abs(found["all but the embedding"] - 1) > 0.01
        assert found["none"] == 0


def test_both_directions_agree_where_the_model_is_linear(planted_case):
    # Every head of the cancelling pair copies with a fixed pattern: the answer is a sum over heads.
    case, task = planted_case("cancelling_pair")
    there, back = (
        patch(case.model, task, by=("layer", "head", "pos"), direction=direction)
        for direction in ("denoising", "noising")
    )
    np.testing.assert_allclose(values(there), values(back), atol=TOLERANCE)
    assert np.abs(values(there)).max() > 1


# --- the slow way, and TransformerLens's own -----------------------------------------------------------------------

SWEEPS = [
    {"site": "z", "by": ("head", "pos"), "positions": ["early", -1], "layers": [1], "direction": "noising"},
    {"site": "v", "by": ("layer", "head"), "positions": "early", "layers": [0, 1]},
    {"site": "k", "by": ("pos",), "positions": ["early", "end"], "layers": [1, 2]},
    {"site": "q", "by": ("head",), "direction": "noising", "source": "mean"},
    {"site": "mlp_out", "by": ("pos",), "positions": ["early", "end"], "direction": "noising", "source": "zero"},
    {
        "site": "post",
        "by": ("layer", "neuron"),
        "layers": [1],
        "neurons": [0, 7],
        "direction": "noising",
        "source": "mean",
    },
    {"site": "attn_out", "by": (), "layers": [1, 2], "metric": "kl"},
]


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_fast_is_hooks_with_padding(architecture, random_model, random_task):
    model = random_model(architecture)
    task = random_task(model)
    sweeps = list(SWEEPS)
    if architecture != "opt":
        sweeps.append({"site": "pattern", "by": ("head", "pos"), "layers": [1], "positions": ["early", "end"]})
    if architecture != "gpt_neox":
        sweeps.append({"site": "resid_mid", "by": ("layer", "pos"), "positions": "early"})
    moved = 0.0
    for options in sweeps:
        options = {"min_oriented": 0.0, **options}
        fast, slow = (patch(model, task, **options, exact_path=path) for path in ("rerun", "hooks"))
        np.testing.assert_allclose(values(fast), values(slow), atol=TOLERANCE, err_msg=str(options))
        assert fast.table.drop(columns=["value", "value_metric"]).equals(
            slow.table.drop(columns=["value", "value_metric"])
        )
        moved = max(moved, float(np.abs(values(fast)).max()))
    assert moved > 0.1


@pytest.mark.parametrize("source", ["position_mean", "resample"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fast_is_hooks_for_sources_of_aligned_prompts(source, architecture, random_model, random_task):
    model = random_model(architecture)
    task = random_task(model, padded=False)
    for site, by, layers in (("pattern", "head", [1]), ("z", ("layer", "pos"), [0, 2]), ("post", "layer", None)):
        fast, slow = (
            patch(model, task, site=site, by=by, layers=layers, direction="noising", source=source, exact_path=path)
            for path in ("rerun", "hooks")
        )
        np.testing.assert_allclose(values(fast), values(slow), atol=TOLERANCE, err_msg=site)
        assert np.abs(values(fast)).max() > 0.1


TL = {
    "get_act_patch_attn_head_out_all_pos": {"site": "z", "by": ("layer", "head")},
    "get_act_patch_attn_head_out_by_pos": {"site": "z", "by": ("layer", "pos", "head")},
    "get_act_patch_attn_head_q_all_pos": {"site": "q", "by": ("layer", "head")},
    "get_act_patch_attn_head_k_by_pos": {"site": "k", "by": ("layer", "pos", "head")},
    "get_act_patch_attn_head_v_all_pos": {"site": "v", "by": ("layer", "head")},
    "get_act_patch_attn_head_pattern_all_pos": {"site": "pattern", "by": ("layer", "head")},
    "get_act_patch_resid_pre": {"site": "resid_pre", "by": ("layer", "pos")},
    "get_act_patch_attn_out": {"site": "attn_out", "by": ("layer", "pos")},
    "get_act_patch_mlp_out": {"site": "mlp_out", "by": ("layer", "pos")},
}


@pytest.mark.parametrize("name", TL)
def test_transformer_lens_finds_the_same(name, random_model, random_task):
    model = random_model("llama")
    task = random_task(model, n=2, padded=False)
    _, cache = model.bridge.run_with_cache(task.clean)
    read = readout(model, task)
    result = patch(model, task, **TL[name])
    clean, corrupt = (float(result.arrays[which][1].mean()) for which in ("clean", "corrupt"))
    with torch.no_grad():
        found = getattr(theirs, name)(
            model.bridge, task.corrupt, cache, lambda logits: (read.of(logits).mean() - corrupt) / (clean - corrupt)
        )
    dims, ours = result.arrays["value"]
    order = ["layer", "pos", "head"] if "pos" in dims and "head" in dims else [dim for dim in dims if dim != "prompt"]
    ours = ours.mean(0).transpose([dims.index(axis) - 1 for axis in order])
    np.testing.assert_allclose(ours, found.numpy(), atol=TOLERANCE)
    assert np.abs(ours).max() > 0.05


def test_an_edit_that_the_bridge_only_shows_is_refused_with_hooks(random_model, random_task):
    model = random_model("opt")
    task = random_task(model)
    with pytest.raises(ModelCheckError, match="hook_pattern' does not change the output"):
        patch(model, task, site="pattern", exact_path="hooks")
    assert np.abs(values(patch(model, task, site="pattern"))).max() > 0.1


# --- planted truth, and what single patches miss -------------------------------------------------------------------

EFFECTS = {
    "ioi_like": {"duplicate": [1.0], "inhibition": [1.0], "mover": [0.8, 0.4], "negative": [-0.2]},
    "induction_like": {"previous": [0.5], "induction": [1.0]},
    "cancelling_pair": {"main": [1.0], "plus": [2.0], "minus": [-2.0]},
    "or_gate": {"a": [0.0], "b": [0.0]},
    "and_gate": {"a": [1.0], "b": [1.0]},
    "backup_head": {"primary": [0.0], "backup": [0.0]},
    "saturation": {"reader": [1.0]},
    "greater_than_like": {"reader": [1.0]},
}
#: At a sharpness of 6 the attention off the match is up to e^-6.
PLANTED = 3e-3


@pytest.mark.parametrize("name", EFFECTS)
def test_noising_finds_the_planted_heads_at_their_positions(name, planted_case):
    case, task = planted_case(name)
    expected = dict.fromkeys(product(range(case.model.n_layers), range(case.model.n_heads)), 0.0)
    at_position = {}
    for stage, heads in case.truth.items():
        for head, effect in zip(heads, EFFECTS[name][stage], strict=True):
            expected[head] = effect
            at_position[head] = case.where[stage]
    assert means(patch(case.model, task, direction="noising"), "layer", "head") == pytest.approx(expected, abs=PLANTED)
    by_position = patch(
        case.model, task, by=("layer", "head", "pos"), positions=sorted(case.positions), direction="noising"
    )  # fmt: skip
    wanted = {
        (*head, where): effect if where == at_position.get(head) else 0.0
        for head, effect in expected.items()
        for where in case.positions
    }
    if name == "induction_like":
        # In 6 of 24 prompts the corrupted run has the word asked for before its last one too, which then gets half of
        # the attention: 8 of the gap's 16 logits, halved.
        wanted[0, 2, "end"] = 6 / 24 * 4 / 16
    assert means(by_position, "layer", "head", "token") == pytest.approx(wanted, abs=PLANTED)


def test_what_single_patches_miss_sets_and_the_other_direction_find(planted_case):
    def found(name, sets, direction):
        case, task = planted_case(name)
        return means(joint(case.model, task, sets, direction=direction), "target")

    pair = {"plus": [(0, 1)], "minus": [(1, 2)], "pair": [(0, 1), (1, 2)]}
    cancelling = found("cancelling_pair", pair, "noising")
    assert cancelling == pytest.approx({"plus": 2, "minus": -2, "pair": 0}, abs=PLANTED)
    gate = {"a": [(0, 1)], "b": [(1, 2)], "both": [(0, 1), (1, 2)]}
    # OR: neither is needed, each suffices. AND: each is needed, neither suffices.
    assert found("or_gate", gate, "noising") == pytest.approx({"a": 0, "b": 0, "both": 1}, abs=PLANTED)
    assert found("or_gate", gate, "denoising") == pytest.approx({"a": 1, "b": 1, "both": 1}, abs=PLANTED)
    assert found("and_gate", gate, "noising") == pytest.approx({"a": 1, "b": 1, "both": 1}, abs=PLANTED)
    assert found("and_gate", gate, "denoising") == pytest.approx({"a": 0, "b": 0, "both": 1}, abs=PLANTED)
    # The backup hides the primary head from noising, and is itself idle.
    assert found("backup_head", gate, "noising") == pytest.approx({"a": 0, "b": 0, "both": 1}, abs=PLANTED)
    assert found("backup_head", gate, "denoising")["a"] == pytest.approx(1, abs=PLANTED)


def test_mlps_and_neurons_of_a_planted_mlp(planted_case):
    case, task = planted_case("saturation")
    assert means(patch(case.model, task, site="mlp_out", by="layer", direction="noising"), "layer") == pytest.approx(
        {0: 0.0, 1: 1.0}, abs=PLANTED
    )
    neurons = patch(case.model, task, site="post", by=("layer", "neuron"), direction="noising")
    assert set(neurons.table["neuron"]) == set(range(case.model.d_mlp))
    assert values(neurons.filter(layer=0)) == pytest.approx(0, abs=PLANTED)
    # At x = 3 the neurons of the answer are 3.5 and 2.5, without the word 0.5 and 0, and the gap is 1 - 0.5.
    answer = neurons.filter(layer=1, prompt=0).table.groupby("neuron")["value"].first()
    word = int(task.answers[0]) - int(task.answers.min())
    assert answer[word] == pytest.approx((3.5 - 0.5) / 0.5, abs=PLANTED)
    assert answer[3 + word] == pytest.approx(-2.5 / 0.5, abs=PLANTED)


# --- axes, positions, batches --------------------------------------------------------------------------------------


def test_axes_that_are_not_swept_are_replaced_together(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    by_layer = patch(model, task, by="layer", positions=["early", -1])
    edits = {
        str(layer): [
            Edit("z", layer, head=head, pos=pos) for head in range(4) for pos in (task.positions["early"], 8)
        ]
        for layer in range(3)
    }  # fmt: skip
    np.testing.assert_allclose(values(by_layer), values(joint(model, task, edits)), atol=TOLERANCE)
    dims, array = by_layer.arrays["value"]
    assert dims == ("prompt", "layer") and array.shape == (3, 3)
    two = patch(model, task, by=(), layers=[0, 2], heads=[1, 3])
    same = joint(model, task, {"": [(0, 1), (0, 3), (2, 1), (2, 3)]})
    np.testing.assert_allclose(values(two), values(same), atol=TOLERANCE)
    assert list(two.table.columns) == ["prompt", "value", "value_metric"]
    # Groups of keys and values, not heads.
    assert set(patch(model, task, site="k").table["head"]) == {0, 1}
    assert not np.allclose(values(by_layer), values(patch(model, task, by="layer")), atol=0.01)


def test_named_positions_are_each_prompts_own(random_model, random_task):
    model = random_model("gpt2")
    task = random_task(model)
    named = patch(model, task, site="resid_post", by=("layer", "pos"), positions=["early", "end"]).table
    every = patch(model, task, site="resid_post", by=("pos", "layer")).table
    assert set(named["token"]) == {"early", "end"} and "token" not in every
    assert named.query("token == 'early'").groupby("prompt")["pos"].first().tolist() == [4, 5, 3]
    both = named.merge(every, on=["prompt", "layer", "pos"], suffixes=("", "_every"))
    assert len(both) == len(named) == 3 * 3 * 2
    np.testing.assert_allclose(both["value"], both["value_every"], atol=TOLERANCE)
    assert both["value"].abs().max() > 0.1


@pytest.mark.parametrize("source", ["corrupt", "mean", "resample", "zero"])
def test_batches_change_no_number(source, random_model, random_task):
    model = random_model("qwen2")
    task = random_task(model, n=5, padded=source != "resample")
    options = {"direction": "noising", "source": source, "positions": ["early", "end"], "by": ("layer", "head", "pos")}
    whole = patch(model, task, **options)
    for size in (1, 2):
        part = patch(model, task, **options, batch_size=size)
        np.testing.assert_allclose(values(part), values(whole), atol=TOLERANCE)
    sets = {"with a value": [Edit("resid_pre", 1, pos=task.positions["early"], value=torch.randn(5, 32))]}
    one, all_ = (joint(model, task, sets, direction="noising", batch_size=size) for size in (1, None))
    np.testing.assert_allclose(values(one), values(all_), atol=TOLERANCE)


def test_interrupted_sweeps_go_on_and_never_mix(random_model, random_task, monkeypatch):
    model = random_model("llama")
    task = random_task(model, n=4, padded=False)
    variants = [
        {}, {"direction": "noising"}, {"site": "q"}, {"heads": [1, 2, 3, 0]}, {"layers": [2, 1, 0]},
        {"metric": "log_prob", "min_oriented": 0.0}, {"positions": ["early"]}, {"positions": ["end"]},
        {"direction": "noising", "source": "resample"}, {"direction": "noising", "source": "resample", "seed": 3},
        {"direction": "noising", "source": "mean"},
        {"direction": "noising", "source": "mean", "reference": random_task(model, n=2, padded=False)},
    ]  # fmt: skip
    fresh = [values(patch(model, task, **options, batch_size=2)) for options in variants]
    assert all(not np.allclose(a, b) for i, a in enumerate(fresh) for b in fresh[:i])
    calls = 0
    real = _runs.rerun

    def stopped(model, tokens, cells, *rest, **options):
        nonlocal calls
        if len(cells) > 1:
            calls += 1
            if calls % 2 == 0:
                raise KeyboardInterrupt
        return real(model, tokens, cells, *rest, **options)

    monkeypatch.setattr(_runs, "rerun", stopped)
    for options in variants:
        with pytest.raises(KeyboardInterrupt):
            patch(model, task, **options, batch_size=2)
    done = calls
    for options, expected in zip(variants, fresh, strict=True):
        calls = -1000  # no more interruptions
        assert np.array_equal(values(patch(model, task, **options, batch_size=2)), expected)
        assert calls == -999  # one batch of two was there already
    assert done == 2 * len(variants)


def test_the_clean_and_the_corrupted_run_are_told_apart(random_model, random_task, monkeypatch):
    model = random_model("llama")
    task = random_task(model, n=4, padded=False)
    fresh = patch(model, task, layers=[1], batch_size=2)
    real, calls = _runs.rerun, 0

    def stopped(*given, **options):
        nonlocal calls
        calls += 1
        if calls == 4:  # two batches of the clean run, and the second one of the corrupted run
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(_runs, "rerun", stopped)
    with pytest.raises(KeyboardInterrupt):
        patch(model, task, layers=[1], batch_size=2)
    again = patch(model, task, layers=[1], batch_size=2)
    assert np.array_equal(values(again), values(fresh))
    assert np.array_equal(again.arrays["clean"][1], fresh.arrays["clean"][1])


# --- sources, metrics ----------------------------------------------------------------------------------------------


def test_sources_by_hand(random_model, random_task):
    model = random_model("llama")
    task = random_task(model, n=4)
    layer, head, read = 1, 2, readout(model, task)
    name = f"blocks.{layer}.attn.hook_z"
    cache = run(model, task.clean, capture=[name], mask=task.mask).cache[name]
    real = task.mask.bool()
    tokens = {"zero": torch.zeros(16 // 2), "mean": cache[:, :, head][real].mean(0)}

    def changed(value):
        def hook(z, hook):
            z = z.clone()
            z[:, :, head] = value
            return z

        return read.of(run(model, task.clean, hooks=[(name, hook)], mask=task.mask).logits).numpy()

    for source, value in tokens.items():
        result = patch(model, task, layers=[layer], heads=[head], direction="noising", source=source)
        np.testing.assert_allclose(result.table["value_metric"], changed(value), atol=TOLERANCE)
        clean, corrupt = (result.arrays[which][1] for which in ("clean", "corrupt"))
        expected = (clean - changed(value)) / (clean - corrupt).mean()
        np.testing.assert_allclose(values(result), expected, atol=TOLERANCE)

    even = random_task(model, n=4, padded=False)
    cache = run(model, even.clean, capture=[name]).cache[name]
    result = patch(model, even, layers=[layer], heads=[head], direction="noising", source="position_mean")
    task, read = even, readout(model, even)
    np.testing.assert_allclose(
        result.table["value_metric"], changed(cache[:, :, head].mean(0)), atol=TOLERANCE
    )  # fmt: skip


def test_a_value_of_its_own_is_kept(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    given = {"set": [Edit("z", 1, head=2, value=torch.ones(3, 8)), Edit("mlp_out", 1, value=0.5)]}
    results = [joint(model, task, given, direction="noising", source=source) for source in ("corrupt", "zero", "mean")]
    for result in results[1:]:
        np.testing.assert_allclose(values(result), values(results[0]), atol=TOLERANCE)
    zero = joint(model, task, {"set": [(1, 2), Edit("mlp_out", 1)]}, direction="noising", source="zero")
    assert np.abs(values(zero) - values(results[0])).max() > 0.01


def test_resampling_takes_another_prompt_of_the_same_length(random_model, random_task):
    model = random_model("llama")
    task = random_task(model, n=6, padded=False)
    mask = torch.ones_like(task.clean)
    mask[:3, :2] = 0
    task = replace(task, mask=mask)
    for seed in range(5):
        order = activation.prepare(model, task, "resample", [], seed=seed).tokens
        found = [next(j for j in range(6) if torch.equal(order[i], task.clean[j])) for i in range(6)]
        assert sorted(found) == list(range(6)) and all(i != j and i // 3 == j // 3 for i, j in enumerate(found))
    # The value is the other prompt's: everything patched is the other prompt's run.
    result = patch(model, task, site="resid_pre", by=(), layers=[0], direction="noising", source="resample", seed=4)
    read = readout(model, task)
    np.testing.assert_allclose(
        result.table["value_metric"], read.of(run(model, order, mask=mask).logits), atol=TOLERANCE
    )  # fmt: skip


def test_without_corrupted_prompts_effects_are_in_the_metrics_unit(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    plain = replace(task, corrupt=None)
    result = patch(model, plain, direction="noising", source="zero")
    assert result.unit == "logits" and "corrupt" not in result.arrays
    clean = result.arrays["clean"][1][result.table["prompt"]]
    np.testing.assert_allclose(values(result), clean - result.table["value_metric"], atol=TOLERANCE)
    fraction = patch(model, task, direction="noising", source="zero")
    gap = (fraction.arrays["clean"][1] - fraction.arrays["corrupt"][1]).mean()
    np.testing.assert_allclose(values(result), values(fraction) * gap, atol=TOLERANCE)


def test_metrics_are_fractions_too(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    everything = {"site": "resid_pre", "by": (), "layers": [0]}
    for metric in ("kl", readout(model, task)):
        for direction in ("denoising", "noising"):
            result = patch(model, task, **everything, metric=metric, direction=direction)
            assert result.summary()["mean"].item() == pytest.approx(1.0, abs=TOLERANCE)
    heads = {"layers": [1], "batch_size": 2}
    by_name, by_readout = (
        patch(model, task, **heads, metric=metric) for metric in ("logit_diff", readout(model, task))
    )
    np.testing.assert_allclose(values(by_name), values(by_readout), atol=TOLERANCE)
    # The mean of the rows is the ratio of the means.
    row = by_name.filter(head=2).table
    clean, corrupt = (by_name.arrays[which][1] for which in ("clean", "corrupt"))
    ratio = (row["value_metric"].mean() - corrupt.mean()) / (clean.mean() - corrupt.mean())
    assert row["value"].mean() == pytest.approx(ratio, abs=TOLERANCE)
    assert by_name.summary(by=["head"]).set_index("head").loc[2, "mean"] == pytest.approx(ratio, abs=TOLERANCE)


def test_half_precision(random_task):
    model = load(toy.random_module("llama"), tokenizer=toy.tokenizer(), dtype=torch.bfloat16)
    task = random_task(model)
    everything = patch(model, task, site="resid_pre", by=(), layers=[0], min_oriented=0.0)
    # Bfloat16 keeps 8 bits: logits of 10 are off by 0.05, of gaps of about 1.
    assert everything.summary()["mean"].item() == pytest.approx(1.0, abs=0.1)
    result = patch(model, task, direction="noising", source="mean", min_oriented=0.0)
    assert np.isfinite(values(result)).all() and result.meta["dtype"] == "bfloat16"


def test_a_model_without_a_program_takes_the_slow_way_and_says_so(random_model, random_task, monkeypatch):
    model = random_model("llama")
    task = random_task(model, padded=False)
    options = {"direction": "noising", "source": "position_mean", "layers": [1]}
    fast = patch(model, task, **options)

    def none(model):
        raise NoProgramError("it is of an unknown kind")

    for module in (engine, _runs, _sources):
        monkeypatch.setattr(module, "program", none)
    with pytest.warns(UserWarning, match="unknown kind.* whole forward pass"):
        slow = patch(model, task, **options)
    np.testing.assert_allclose(values(slow), values(fast), atol=TOLERANCE)
    with pytest.raises(NoProgramError):
        patch(model, task, **options, exact_path="rerun")


# --- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {
    "site 'zz' is not known; use one of resid_pre": {"site": "zz"},
    "by='heads' is not known; use any of layer, head, pos, neuron": {"by": ("layer", "heads")},
    "site 'resid_pre' has no heads: leave head out, or take site z, q, k, v, pattern": {"site": "resid_pre"},
    "site 'mlp_out' has no heads": {"site": "mlp_out", "by": "layer", "heads": [0]},
    "site 'z' has no neurons": {"by": ("layer", "neuron")},
    "direction 'up' is not known; use 'denoising' or 'noising'": {"direction": "up"},
    "source 'none' is not known; use one of corrupt, zero": {"source": "none", "direction": "noising"},
    "pass direction='noising'": {"source": "zero"},
    "no position 'middle'; it has early, end": {"positions": ["middle"]},
    "position 9 is outside the prompts of task 'random', which have 9 tokens: 0 to 8": {"positions": [9]},
    "position -10 is outside": {"positions": [-10]},
    "no positions were given: name some of early, end": {"positions": []},
    r"layers=\[\] leaves nothing: name some of 0 to 2": {"layers": []},
    r"heads=\[\] leaves nothing: name some of 0 to 3": {"heads": []},
    "layer 3, but .* has layers 0 to 2": {"layers": [3]},
    "names head 4, but .* has heads 0 to 3": {"heads": [4]},
    r"names head 2, but .* has key-value heads \(groups\) 0 to 1": {"site": "v", "heads": [2]},
    "names neuron 48: neurons are those of site 'post', 0 to 47": {"site": "post", "by": "neuron", "neurons": [48]},
    "prompts of different lengths": {"source": "position_mean", "direction": "noising"},
    "would attend to later positions": {"site": "pattern", "source": "mean", "direction": "noising"},
    "prompt 0 is the only one of 7 tokens": {"source": "resample", "direction": "noising"},
    "metric 'loss' is not known": {"metric": "loss"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_and_says_what_to_do(message, random_model, random_task):
    model = random_model("llama")
    with pytest.raises(ValueError, match=message):
        patch(model, random_task(model), **REFUSED[message])


def test_tasks_that_do_not_fit_are_refused(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    with pytest.raises(ValueError, match="no corrupted prompts: make one with Task.from_pairs"):
        patch(model, replace(task, corrupt=None))
    turned = replace(task, answers=task.wrong, wrong=task.answers)
    with pytest.raises(ValueError, match="on 0% of 3 prompts"):
        patch(model, turned)
    with pytest.raises(ValueError, match="mean gap -"):
        patch(model, turned, min_oriented=0.0)
    with pytest.raises(ValueError, match="mean gap 0 logits"):
        patch(model, replace(task, corrupt=task.clean), min_oriented=0.0)
    # The prompt with the smallest gap turned round: the mean gap is positive still.
    found = patch(model, task, layers=[0]).arrays
    least = torch.arange(3) == int((found["clean"][1] - found["corrupt"][1]).argmin())
    answers, wrong = torch.where(least, task.wrong, task.answers), torch.where(least, task.answers, task.wrong)
    part = replace(task, answers=answers, wrong=wrong)
    kept = ", ".join(str(i) for i in range(3) if not least[i])
    with pytest.raises(ValueError, match=rf"67% of 3 prompts .* task\[\[{kept}\]\]"):
        patch(model, part)
    assert patch(model, part, layers=[0], min_oriented=0.6).unit == "fraction of the mean clean-corrupt gap"
    with pytest.raises(ValueError, match="has no answers, which 'logit_diff' reads"):
        patch(model, replace(task, answers=None))
    with pytest.raises(ValueError, match="several numbers a prompt"):
        patch(model, task, metric=candidates(task.positions["end"], torch.stack([task.answers, task.wrong], 1)))
    even = random_task(model, padded=False)
    with pytest.raises(ValueError, match="reference= gives the prompts of a mean"):
        patch(model, even, reference=task)
    short = replace(even, clean=even.clean[:, 1:], corrupt=even.corrupt[:, 1:])
    with pytest.raises(ValueError, match="prompts of 8 tokens and the task of 9"):
        patch(model, even, direction="noising", source="position_mean", reference=short)
    parallel = random_model("gpt_neox")
    with pytest.raises(ValueError, match="no 'resid_mid': patch 'attn_out'"):
        patch(parallel, random_task(parallel), site="resid_mid", by="layer")
    with pytest.raises(ValueError, match="is a vision model.* load a decoder"):
        patch(load(toy_vit()), task)


def test_sets_that_do_not_fit_are_refused(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    with pytest.raises(ValueError, match="there are no sets"):
        joint(model, task, {})
    with pytest.raises(ValueError, match="names head 4"):
        joint(model, task, {"one": [(0, 4)]})
    with pytest.raises(ValueError, match="mean of attention patterns"):
        joint(model, task, {"one": [Edit("pattern", 0)]}, direction="noising", source="mean")
    with pytest.raises(ValueError, match="scores have no 'zero'"):
        joint(model, task, {"one": [Edit("attn_scores", 0)]}, direction="noising", source="zero")
    with pytest.raises(ValueError, match="no 'position_mean'"):
        even = random_task(model, padded=False)
        edge = [Edit("pattern", 0, pos=4, k_pos=3)]
        joint(model, even, {"one": edge}, direction="noising", source="position_mean")
    with pytest.raises(ValueError, match="denoising puts it back"):
        joint(model, task, {"one": [(0, 0)]}, source="zero")
