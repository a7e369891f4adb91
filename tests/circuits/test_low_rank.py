"""Low-rank compression: nothing cut is nothing changed, all cut is the mean, three directions for four places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits import low_rank
from interp.core.edits import Edit
from interp.core.readout import candidates
from interp.core.rerun import rerun
from interp.models.hooks import run

HEAD = [(2, 0)]


def means(found, value="value"):
    return found.table.groupby(["target", "component", "step"], sort=False)[value].mean()


@pytest.mark.parametrize(("architecture", "padded"), [("llama", False), ("gpt2", True)])
def test_full_rank_changes_nothing(random_choice, architecture, padded):
    model, task = random_choice(architecture, padded=padded)
    found = low_rank.compress(
        model, task, task, [(0, 1), (1, 2), (1, 3)], parts=["q", "k", "v", "qkv"], ranks=[0, model.d_head], batch_size=3
    )
    # Four means by right option, less their mean, span three directions, whatever the queries are.
    queries = found.arrays["singular_values"][1][0]
    assert (queries[:, 3:] < 1e-4 * queries[:, :1]).all() and (queries[:, 2] > 1e-2 * queries[:, 0]).all()
    table = found.table.pivot(index="prompt", columns=["component", "step"], values="value")
    rows = torch.arange(len(task))
    logits = run(model, task.clean, mask=task.mask).logits[rows, task.positions["end"]].gather(1, task.options)
    expected = -logits.log_softmax(-1)[rows, rows % 4].numpy()
    np.testing.assert_allclose(table["unchanged", model.d_head], expected, rtol=1e-5, atol=1e-5)
    for part in ("q", "k", "v", "qkv"):
        # A rotation to and from the basis, in float32.
        np.testing.assert_allclose(table[part, model.d_head], expected, rtol=1e-3, atol=1e-4)
        assert np.abs(table[part, 0] - expected).max() > 1e-3


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_rank_0_is_mean_ablation(random_choice, part):
    model, task = random_choice("llama")  # two query heads a group
    layer, head = 1, 3
    index = head if part == "q" else head // 2
    seen = run(model, task.clean, capture=[f"blocks.{layer}.attn.hook_{part}"]).cache[
        f"blocks.{layer}.attn.hook_{part}"
    ]
    where = [10] if part == "q" else [2, 4, 6, 8]
    mean = seen[:, where, index].mean((0, 1)).expand(len(task), -1)
    cell = [Edit(part, layer, head=index, pos=pos, value=mean) for pos in where]
    logits = rerun(model, task.clean, [cell], candidates(task.positions["end"], task.options))[0]
    expected = -logits.log_softmax(-1)[torch.arange(8), torch.arange(8) % 4]
    found = low_rank.compress(model, task, task, [(layer, head)], parts=[part], ranks=[0])
    mine = found.table[found.table["component"] == part].sort_values("prompt")["value"]
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_rank_between_equals_the_projection_written_out(random_choice):
    model, task = random_choice("qwen2", n=12)
    fit, held = task[:8], task[8:]
    keys = run(model, task.clean, capture=["blocks.1.attn.hook_k"]).cache["blocks.1.attn.hook_k"][:, [2, 4, 6, 8], 1]
    mine = keys[:8]
    rows = (mine - mine.mean(1, keepdim=True)).reshape(-1, model.d_head)
    top = np.linalg.svd(rows.double().numpy())[2][:2]
    mean = mine.reshape(-1, model.d_head).double().numpy().mean(0)
    new = mean + (keys[8:].double().numpy() - mean) @ top.T @ top
    cell = [Edit("k", 1, head=1, pos=pos, value=torch.tensor(new[:, i])) for i, pos in enumerate([2, 4, 6, 8])]
    logits = rerun(model, held.clean, [cell], candidates(held.positions["end"], held.options))[0]
    expected = -logits.log_softmax(-1)[torch.arange(4), torch.arange(4) % 4]
    found = low_rank.compress(model, fit, held, [(1, 2)], parts=["k"], ranks=[2])
    got = found.table[found.table["component"] == "k"].sort_values("prompt")["value"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_four_places_span_three_directions(planted_choice, planted_task):
    found = low_rank.compress(planted_choice(), planted_task(), planted_task(seed=1), HEAD, parts=["qk", "v", "qkv"])
    singular = found.arrays["singular_values"][1][:, 0]
    # Keys know the place, queries the place wanted, values one of four letters; the rest is rounding.
    assert (singular[:, :3] > 1e-2).all()
    assert (singular[:, 3:] < 1e-4 * singular[:, :1]).all()
    loss = means(found)["planted"]
    full = loss["unchanged", 16]
    for part in ("qk", "v", "qkv"):
        assert loss[part, 3] == pytest.approx(full, abs=1e-4)
        assert loss[part, 0] > full + 0.3
        assert loss[part, 2] > full + 0.05
    shares = low_rank.recovered(found).set_index(["component", "step"])["share"]
    assert shares["qk", 3] == pytest.approx(1, abs=1e-3) and shares["qk", 0] == 0
    attention = means(found, "value_attention")["planted"]
    assert attention["qk", 3] == pytest.approx(1, abs=1e-3)
    assert attention["qk", 0] < 0.3
    assert means(found, "value_largest")["planted"]["qk", 3] == 1


@pytest.mark.parametrize("keys", ["index", "identity"])
def test_other_labels_tell_place_from_token(planted_choice, planted_task, keys):
    model, fit = planted_choice(keys), planted_task(48)
    tasks = {"letters": planted_task(seed=1), "random": planted_task(48, labels="random", seed=2)}
    found = low_rank.recovered(low_rank.compress(model, fit, tasks, HEAD, parts=["qk", "v"], ranks=[0, 3]))
    shares = found[found["step"] == 3].set_index(["target", "component"])["share"]
    assert shares["letters", "qk"] == pytest.approx(1, abs=1e-3)
    assert (shares["random", "qk"] > 0.999) == (keys == "index")
    assert shares["random", "v"] < 0.9  # values are letters, and E and F were never seen
    coded = low_rank.coding(model, fit, tasks["random"], HEAD).table.set_index(["component", "metric"])["value"]
    # Not 1: less the mean over its prompt, a letter also depends a little on which three others stand beside it.
    assert coded["v", "token"] > 0.85 and abs(coded["v", "place"]) < 0.15
    own, other = ("place", "token") if keys == "index" else ("token", "place")
    assert coded["k", own] > 0.85 and abs(coded["k", other]) < 0.15


@given(n=st.integers(2, 12), d=st.integers(2, 8), rank=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_basis_is_orthonormal_and_begins_with_the_rows(n, d, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, rank, generator=generator) @ torch.randn(rank, d, generator=generator)
    rest = torch.randn(n, d, generator=generator)
    basis, _, values = low_rank._basis(rows, rest, rest.mean(0))
    torch.testing.assert_close(basis @ basis.T, torch.eye(d), atol=1e-4, rtol=0)  # float32
    span = basis[: min(rank, n, d)]
    torch.testing.assert_close(rows @ span.T @ span, rows, atol=2e-3, rtol=1e-3)  # nearly dependent rows
    # Of what the rows leave open, the directions come in the order of how much of `rest` they hold.
    held = (rest @ basis[len(span) :].T).square().sum(0)
    open_to = rest - rest @ span.T @ span
    best = torch.linalg.svdvals(open_to)[: len(held)].square()
    # Float32, and rows that may be nearly dependent, so that the span itself is a little uncertain.
    torch.testing.assert_close(held[: len(best)], best, atol=2e-2, rtol=2e-2)
    expected = torch.linalg.svdvals(rows)[: min(rank, n, d)] / n**0.5
    torch.testing.assert_close(values[: len(expected)], expected, atol=1e-4, rtol=1e-3)


def test_bad_input(random_choice):
    model, task = random_choice("llama")
    with pytest.raises(ValueError, match="at least one head, each once"):
        low_rank.compress(model, task, task, [])
    with pytest.raises(ValueError, match="heads 0 to 3"):
        low_rank.compress(model, task, task, [(0, 4)])
    with pytest.raises(ValueError, match="made of 'q', 'k' and 'v'"):
        low_rank.compress(model, task, task, [(0, 1)], parts=["kz"])
    with pytest.raises(ValueError, match="so 0 to 8"):
        low_rank.compress(model, task, task, [(0, 1)], ranks=[9])
    with pytest.raises(ValueError, match="both alike"):
        answers = task.options[:, 0]
        low_rank.compress(model, task, replace(task, options=task.options[:, :2], answers=answers), [(0, 1)])
