"""What activation patching is asked for: axes, positions, batches, sources by hand, metrics, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.core import rerun as engine
from interp.core.edits import Edit
from interp.core.readout import candidates, readout
from interp.models import load, run, toy
from interp.models.program import NoProgramError
from interp.models.vision import toy_vit
from interp.patching import _runs, _sources, activation
from interp.patching.activation import joint, patch

#: Logits of the toys are about 10 and gaps about 1; sums in another order differ by 1e-6 a layer.
TOLERANCE = 1e-4


def values(result):
    return result.table["value"].to_numpy()


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
