"""Attribution patching in use: batches, neurons, metrics, cost, half precision, and everything that is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp.core.readout import Readout, readout
from interp.models import Model, program, toy
from interp.models.check import ModelCheckError
from interp.models.hooks import run
from interp.patching import _gradients, attribution
from interp.patching.activation import patch
from interp.patching.attribution import attribute
from interp.tasks import ioi

#: Logits of the toys are about 10; sums in another order differ by 1e-6 a layer, their gradients likewise.
TOLERANCE = 5e-5
AXES = ("layer", "head", "pos")


@pytest.fixture(scope="module")
def smooth() -> Model:
    """Small weights, so that a line of a few points follows the curve."""
    return toy.random("llama", scale=0.15)


def test_a_source_equal_to_the_base_run_has_no_effect(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    corrupt = task.corrupt.clone()
    corrupt[1] = task.clean[1]
    same = dataclasses.replace(task, corrupt=corrupt)
    for options in ({}, {"steps": 2}, {"qk_fix": True, "by": AXES}):
        options = {"sites": ("q", "k", "v", "z", "post")} | options
        table = attribute(model, same, min_oriented=0.0, **options).table
        # The two runs are the same computation, but for rounding in another order.
        assert table[table["prompt"] == 1]["value"].abs().max() < 1e-5
        assert table[table["prompt"] != 1]["value"].abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"steps": 2, "grid": "midpoint"}, {"qk_fix": True, "by": AXES}])
def test_batches_and_padding_change_nothing(options, random_model, random_task):
    model = random_model("qwen2")
    task = random_task(model)
    options = {"sites": ("q", "k", "z", "mlp_out"), "min_oriented": 0.0} | options
    together = attribute(model, task, **options).table
    apart = attribute(model, task, batch_size=1, **options).table
    np.testing.assert_allclose(apart["value"], together["value"], atol=TOLERANCE)
    first = task[:1]
    cut = {"clean": first.clean[:, 2:], "corrupt": first.corrupt[:, 2:], "mask": None, "positions": {}}
    alone = attribute(model, dataclasses.replace(first, **cut), **options).table
    padded = together[together["prompt"] == 0].reset_index(drop=True)
    np.testing.assert_allclose(alone["value_metric"], padded["value_metric"], atol=TOLERANCE)
    if "pos" in padded:
        assert (padded["pos"] - alone["pos"]).unique().tolist() == [2]


def test_neurons_are_those_with_the_largest_mean_and_sum_to_the_mlp(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    every = attribute(model, task, sites="post", by=("layer", "neuron"), n_neurons=3 * model.d_mlp)
    assert len(every.table) == 3 * 3 * model.d_mlp
    total = every.table.groupby(["prompt", "layer"])["value"].sum().to_numpy()
    np.testing.assert_allclose(total, attribute(model, task, sites="mlp_out").table["value"], atol=TOLERANCE)
    few = attribute(model, task, sites=("post", "mlp_out"), by=("layer", "neuron"), n_neurons=4)
    mean = every.summary(by=["layer", "neuron"])
    wanted = mean.reindex(mean["mean"].abs().sort_values(ascending=False).index)[:4]
    kept = few.filter(component="post").table
    assert set(zip(kept["layer"], kept["neuron"], strict=True)) == set(
        zip(wanted["layer"], wanted["neuron"], strict=True)
    )
    assert few.filter(component="mlp_out").table["neuron"].isna().all()
    both = kept.merge(every.table, on=["prompt", "layer", "neuron"])
    np.testing.assert_allclose(both["value_x"], both["value_y"], atol=TOLERANCE)


def test_a_source_without_pairs_needs_no_gap_and_a_path_of_its_own(smooth, random_task):
    model = smooth
    task = dataclasses.replace(random_task(model), corrupt=None)
    found = attribute(model, task, sites="mlp_out", source="zero", steps=12, grid="midpoint", path="activation")
    assert found.unit == "logits" and "corrupt" not in found.arrays
    exact = patch(model, task, site="mlp_out", by="layer", source="zero", direction="noising").table
    ours = found.table.sort_values(["prompt", "layer"])
    exact = exact.sort_values(["prompt", "layer"])
    # One node a layer, so the path on it gives all of its effect, up to the midpoint rule.
    np.testing.assert_allclose(ours["value"], exact["value"], atol=0.01 * exact["value"].abs().max())
    np.testing.assert_allclose(ours["value_metric"], exact["value_metric"], atol=0.01 * exact["value"].abs().max())
    with pytest.raises(ValueError, match="no corrupted prompts"):
        attribute(model, task)


def test_metrics_by_name_and_of_ones_own(smooth, random_task):
    model, task = smooth, random_task(smooth)

    def difference(logits: Tensor, rows: Tensor) -> Tensor:
        which = torch.arange(len(rows))
        return logits[which, task.answers[rows]] - logits[which, task.wrong[rows]]

    mine = Readout("mine", "logits", readout(model, task).where, None, difference)
    own = attribute(model, task, metric=mine, batch_size=2)
    np.testing.assert_allclose(own.table["value"], attribute(model, task).table["value"], atol=TOLERANCE)
    assert own.meta["metric"] == "mine"
    # The divergence from the clean run falls when clean values are put in: what helps is positive here too.
    options = {"direction": "denoising", "sites": "resid_pre", "by": "layer", "steps": 24, "grid": "midpoint"}
    kl = attribute(model, task, metric="kl", **options)
    assert kl.filter(layer=0).table["value"].mean() == pytest.approx(1.0, abs=0.01)  # the whole input, see above


def test_weights_have_no_gradients_meanwhile_and_are_left_as_they_were(random_model, random_task):
    model = random_model("gpt2")
    task = random_task(model)
    weights = list(model.bridge.parameters())
    before = [weight.requires_grad for weight in weights]
    assert all(before)
    where, meanwhile = readout(model, task).where, []

    def first(logits: Tensor, rows: Tensor) -> Tensor:
        meanwhile.append(any(weight.requires_grad for weight in weights))
        return logits[:, 0]

    own = Readout("first", "logits", where, None, first)
    attribute(model, dataclasses.replace(task, corrupt=None), metric=own, source="zero")
    assert meanwhile and not any(meanwhile)
    assert [weight.requires_grad for weight in weights] == before
    wrong = Readout("two", "logits", where, None, lambda logits, rows: logits[:, :2])
    with pytest.raises(ValueError, match="several numbers"):
        attribute(model, task, metric=wrong)
    assert [weight.requires_grad for weight in weights] == before
    assert all(weight.grad is None for weight in weights)


class _Largest(TorchDispatchMode):
    """Notes how large tensors get, and how many products the multiplications by weights have."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.bridge.parameters()}
        self.numel = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.numel = max(self.numel, tensor.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        return out


def test_costs_three_forward_passes_and_no_buffer_of_heads_times_model(smol):
    task = ioi(smol, 2)
    program.program(smol)  # compared with the bridge at its first call
    with _Largest(smol) as once:
        run(smol, task.clean)
    with _Largest(smol) as ours:
        attribute(smol, task, by=AXES)
    # Forward, forward, backward to the activations: three, less the unembedding, of which two tokens are read.
    assert 2.2 < ours.products / once.products < 2.6
    assert ours.numel == task.clean.numel() * smol.d_mlp < task.clean.numel() * smol.n_heads * smol.d_model


def test_many_prompts_in_batches_by_the_memory(smol, monkeypatch):
    monkeypatch.setattr(_gradients, "free_bytes", lambda device: 4 * 10**6)
    assert 1 <= _gradients.room(smol, 15) < 15  # not one prompt fits, and one is taken


def test_finds_the_heads_of_ioi_that_exact_patching_finds(smol):
    task = ioi(smol, 4)
    layers = [24, 25, 26, 27, 28, 29]
    exact = patch(smol, task, site="z", layers=layers, direction="noising").summary(by=["layer", "head"])["mean"]
    ours = attribute(smol, task, sites="z").filter(layer=layers).summary(by=["layer", "head"])["mean"]
    # Late heads have few nonlinear layers after them.
    assert pearsonr(ours, exact)[0] > 0.9


def test_half_precision_is_close(random_task):
    module = toy.random_module("llama")
    from interp.models import load

    model = load(module.to(torch.bfloat16), tokenizer=toy.tokenizer())
    task = random_task(model)
    exact = toy.random("llama")
    options = {"sites": ("z", "q", "mlp_out"), "min_oriented": 0.0}
    for extra in ({}, {"qk_fix": True}):
        half, full = (attribute(one, task, **options, **extra).table["value_metric"] for one in (model, exact))
        assert np.isfinite(half).all()
        assert pearsonr(half, full)[0] > 0.98  # eight bits a number, over three layers


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sites": "pattern"}, "name at least one of"),
        ({"sites": ()}, "name at least one of"),
        ({"by": ("head",)}, "rows are by 'layer'"),
        ({"by": ("layer", "token")}, "rows are by 'layer'"),
        ({"by": ("layer", "neuron")}, "neurons are those of 'post'"),
        ({"by": ("layer", "neuron", "pos"), "sites": "post"}, "neurons are those of 'post'"),
        ({"direction": "forward"}, "direction 'forward' is not known"),
        ({"source": "noise"}, "source 'noise' is not known"),
        ({"source": "zero", "direction": "denoising"}, "takes information away"),
        ({"source": "zero", "steps": 5}, "no embeddings for a path"),
        ({"steps": -1}, "steps=-1"),
        ({"path": "weights"}, "path 'weights' is not known"),
        ({"path": "activation"}, "needs points on the path"),
        ({"grid": "simpson"}, "grid 'simpson' is not known"),
        ({"qk_fix": True}, "for queries and keys"),
        ({"qk_fix": True, "sites": "q", "path": "activation", "steps": 2}, "two ways around"),
        ({"qk_fix": True, "sites": "q", "exact_path": "hooks"}, "step by step"),
        ({"metric": "kl"}, "is 0 at the clean run"),
        ({"metric": "loss"}, "metric 'loss' is not known"),
        ({"batch_size": -1}, "at least one row"),
    ],
)
def test_refuses(options, match, random_model, random_task):
    model = random_model("llama")
    with pytest.raises((ValueError, NotImplementedError), match=match):
        attribute(model, random_task(model), **options)


def test_refuses_tasks_and_models_that_do_not_fit(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    swapped = dataclasses.replace(task, answers=task.wrong, wrong=task.answers)
    with pytest.raises(ValueError, match="mean gap -"):
        attribute(model, swapped)
    parallel = random_model("gpt_neox")
    with pytest.raises(ValueError, match="in parallel"):
        attribute(parallel, random_task(parallel), sites="resid_mid")


def test_a_model_without_a_program_is_answered_with_a_warning(random_model, random_task, monkeypatch):
    model = random_model("llama")
    task = random_task(model)
    expected = attribute(model, task).table["value"]

    def none(model: Model) -> None:
        raise program.NoProgramError("no program here.")

    monkeypatch.setattr(_gradients, "program", none)
    with pytest.warns(UserWarning, match="no program here"):
        found = attribute(model, task)
    np.testing.assert_allclose(found.table["value"], expected, atol=TOLERANCE)
    assert found.meta["exact_path"] == "hooks"


def test_hooks_on_what_is_only_shown_are_refused(random_model, random_task, monkeypatch):
    model = random_model("opt")
    asked = []

    def dead(model: Model, name: str) -> None:
        asked.append(name)
        if name.endswith("hook_mlp_out"):
            raise ModelCheckError(name)

    monkeypatch.setattr(attribution, "require_live", dead)
    with pytest.raises(ModelCheckError):
        attribute(model, random_task(model), sites=("resid_mid", "mlp_out"), exact_path="hooks")
    assert asked == ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]
    attribute(model, random_task(model), sites=("resid_mid", "mlp_out"))  # no hooks, nothing to refuse


@pytest.mark.parametrize("options", [{}, {"exact_path": "hooks"}, {"path": "activation", "steps": 2}])
def test_a_caller_without_gradients_gets_the_same(random_model, random_task, options):
    model = random_model("llama")
    task = random_task(model)
    expected = attribute(model, task, **options).table["value"]
    with torch.no_grad():
        found = attribute(model, task, **options).table["value"]
    np.testing.assert_array_equal(found, expected)
