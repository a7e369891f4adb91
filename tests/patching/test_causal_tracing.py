"""Causal tracing: noise by hand, what restoring must give back, planted recall, windows, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.core.edits import Edit
from interp.core.readout import readout
from interp.core.rerun import rerun
from interp.models import load, run, toy
from interp.models.vision import toy_vit
from interp.patching import causal_tracing
from interp.patching._grid import window_of
from interp.patching.causal_tracing import trace

#: Log-probabilities of the toys are about 5 nats; sums in another order differ by 1e-6 a layer.
TOLERANCE = 1e-4


def spread(task):
    """A task whose subject is two or three tokens, in the first prompt from position 3 on."""
    first = torch.tensor([3, 4, 3])
    return replace(task, corrupt=None, positions={**task.positions, "first": first, "last": first + 2 - first % 2})


def table(result):
    return result.table.set_index(["prompt", "layer", "pos"])


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_noise_and_restoration_by_hand_with_padding(architecture, random_model, random_task):
    model = random_model(architecture)
    task = spread(random_task(model))
    at = task.positions
    drawn = np.stack([np.random.default_rng([7, i]).standard_normal((2, 3, 32), np.float32) for i in range(3)])
    names = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    clean = run(model, task.clean, capture=names, mask=task.mask)
    tokens = [clean.cache["hook_embed"][i, at["first"][i] : at["last"][i] + 1] for i in range(3)]
    scale = 2.0 * torch.cat(tokens).std()
    result = trace(model, task, subject=("first", "last"), noise=2.0, n_draws=2, seed=7, metric="log_prob")
    assert result.meta["noise_std"] == pytest.approx(float(scale), rel=1e-5)
    read = readout(model, task, "log_prob")

    def metric(draw, layer=None, pos=None):
        def noisy(stream, hook):
            stream = stream.clone()
            for i in range(3):
                for token, p in enumerate(range(int(at["first"][i]), int(at["last"][i]) + 1)):
                    stream[i, p] += scale * torch.as_tensor(drawn[i, draw, token])
            return stream

        def restored(stream, hook):
            stream = stream.clone()
            stream[:, pos] = clean.cache[names[2]][:, pos]
            return stream

        hooks = [(names[1], noisy)] + ([(names[2], restored)] if pos is not None else [])
        return read.of(run(model, task.clean, hooks=hooks, mask=task.mask).logits).numpy()

    corrupt = np.stack([metric(0), metric(1)], 1)
    np.testing.assert_allclose(result.arrays["corrupt"][1], corrupt, atol=TOLERANCE)
    found = table(result)
    for pos in (2, 4, 8):
        back = (metric(0, 1, pos) + metric(1, 1, pos)) / 2
        rows = found.xs((1, pos), level=("layer", "pos"))
        np.testing.assert_allclose(rows["value_metric"], back, atol=TOLERANCE)
        np.testing.assert_allclose(rows["value"], back - corrupt.mean(1), atol=TOLERANCE)
        total = read.of(clean.logits).numpy() - corrupt.mean(1)
        np.testing.assert_allclose(rows["value_total"], total, atol=TOLERANCE)
    assert np.abs(total).max() > 0.1 and np.abs(back - corrupt.mean(1)).max() > 0.1


def test_ends(random_model, random_task):
    model = random_model("llama")
    task = spread(random_task(model))
    result = trace(model, task, subject="early", n_draws=2)
    assert result.unit == "probability"
    found = table(result)
    # The last layer's output at the position that is read is the whole answer.
    last = found.xs((2, 8), level=("layer", "pos"))
    np.testing.assert_allclose(last["value"], last["value_total"], atol=1e-6)
    # Before the subject nothing has changed, so nothing can be restored.
    assert (found.xs(2, level="pos")["value"] == 0).all()
    # A subject of one token is undone at the input, wherever its position is given by name.
    undone = trace(model, task, subject="early", n_draws=2, site="resid_pre", layers=[0], positions="early").table
    np.testing.assert_allclose(undone["value"], undone["value_total"], atol=1e-6)
    assert undone["token"].tolist() == ["early"] * 3 and undone["pos"].tolist() == [4, 5, 3]
    assert undone["value_total"].abs().max() > 1e-3
    # Without noise there is nothing to restore.
    silent = trace(model, task, subject="early", noise=0.0, n_draws=1)
    np.testing.assert_allclose(silent.table[["value", "value_total"]], 0, atol=1e-6)


@pytest.mark.parametrize("site", causal_tracing.SITES)
def test_fast_is_hooks(site, random_model, random_task):
    model = random_model("gpt2")
    task = spread(random_task(model))
    options = {"subject": ["early", 8], "n_draws": 1, "site": site, "window": 2, "positions": [4, "end"]}
    fast, slow = (trace(model, task, **options, exact_path=path, metric="log_prob") for path in ("rerun", "hooks"))
    np.testing.assert_allclose(fast.table["value"], slow.table["value"], atol=TOLERANCE)
    assert fast.table["value"].abs().max() > 0.01


def test_batches_and_seeds(random_model, random_task):
    model = random_model("qwen2")
    task = spread(random_task(model))
    options = {"subject": ("first", "last"), "n_draws": 2, "layers": [1], "metric": "log_prob"}
    whole = trace(model, task, **options)
    single = trace(model, task, **options, batch_size=1)
    np.testing.assert_allclose(single.table["value"], whole.table["value"], atol=TOLERANCE)
    other = trace(model, task, **options, seed=1)
    assert np.abs(other.table["value"] - whole.table["value"]).max() > 1e-3
    draws = whole.arrays["corrupt"][1]
    assert np.abs(draws[:, 0] - draws[:, 1]).min() > 1e-4


def test_windows_restore_their_layers_together(random_model, random_task):
    model = random_model("llama")
    task = spread(random_task(model))
    options = {"subject": 5, "n_draws": 1, "site": "mlp_out", "positions": [5, 8], "metric": "log_prob"}
    wide = table(trace(model, task, **options, window=2))
    scale = trace(model, task, **options).meta["noise_std"]
    noisy = causal_tracing._noisy(model, task, [torch.full((3,), 5)], slice(0, 3), scale, 1, 0)
    cells = [[*noisy[0], *(Edit("mlp_out", layer, pos=5) for layer in layers)] for layers in ([0], [0, 1], [1, 2])]
    read = readout(model, task, "log_prob")
    expected = rerun(model, task.clean, cells, read, source=task.clean, mask=task.mask)
    for layer in range(3):
        rows = wide.xs((layer, 5), level=("layer", "pos"))["value_metric"]
        np.testing.assert_allclose(rows, expected[layer], atol=TOLERANCE)


@given(st.integers(1, 12), st.integers(1, 15), st.data())
def test_windows_are_those_of_the_papers_code(random_model, n_layers, size, data):
    layer = data.draw(st.integers(0, n_layers - 1))
    expected = range(max(0, layer - size // 2), min(n_layers, layer - (-size // 2)))
    assert window_of(replace(random_model("gpt2"), n_layers=n_layers), layer, size) == expected


def test_recall_is_traced_along_the_planted_path(planted_case):
    # The reader attends from the end to the year in layer 1, and the MLP of layer 1 turns it into the answer: what must
    # be restored is the year's position before layer 1, and the end from then on.
    case, task = planted_case("greater_than_like")
    result = trace(
        case.model, replace(task, corrupt=None), subject="year", n_draws=4, positions=["year", "end"],
        metric="logit_diff",
    )  # fmt: skip
    found = result.table.groupby(["layer", "token"])[["value", "value_total"]].mean()
    total = found["value_total"].iloc[0]
    assert total > 1
    expected = {(0, "year"): 1.0, (0, "end"): 0.0, (1, "year"): 0.0, (1, "end"): 1.0}
    assert (found["value"] / total).to_dict() == pytest.approx(expected, abs=1e-3)
    mlp = trace(
        case.model, task, subject="year", n_draws=4, positions=["year", "end"], site="mlp_out", metric="logit_diff"
    )
    found = mlp.table.groupby(["layer", "token"])["value"].mean() / total
    assert found.to_dict() == pytest.approx({(0, "year"): 0, (0, "end"): 0, (1, "year"): 0, (1, "end"): 1}, abs=1e-3)


def test_refusals(random_model, random_task):
    model = random_model("llama")
    task = spread(random_task(model))
    for options, message in (
        ({"site": "z"}, "site 'z' is not known; use one of resid_pre"),
        ({"subject": "verb"}, "no position 'verb'; it has early, end, first, last"),
        ({"subject": 9}, "position 9 is outside"),
        ({"subject": []}, r"subject=\[\] names no position"),
        ({"subject": ("last", "first")}, "prompt 0: the span .* starts at 4 and ends at 3"),
        ({"positions": []}, "no positions were given"),
        ({"layers": []}, r"layers=\[\] leaves nothing"),
        ({"layers": [3]}, "layer 3: .* has layers 0 to 2"),
        ({"window": 0}, "window=0: give 1 for single layers"),
        ({"n_draws": 0}, "n_draws=0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"metric": "loss"}, "metric 'loss' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(model, task, **{"subject": "early", **options})
    with pytest.raises(ValueError, match="no answers, which 'prob' reads"):
        trace(model, replace(task, answers=None), subject="early")
    parallel = random_model("gpt_neox")
    with pytest.raises(ValueError, match="no 'resid_mid'"):
        trace(parallel, random_task(parallel), subject="early", site="resid_mid")
    with pytest.raises(ValueError, match="load a decoder"):
        trace(load(toy_vit()), task, subject="early")
