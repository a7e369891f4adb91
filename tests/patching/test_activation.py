"""Activation patching: end points, hooks, TransformerLens, planted truth and what single patches miss."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import transformer_lens.patching as theirs

from interp.core.edits import Edit
from interp.core.readout import readout
from interp.models import ModelCheckError, toy
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
