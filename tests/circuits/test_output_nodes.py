"""Output nodes: the sum of all effects, every effect by hooks, identities of the last layer, all nodes at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from interp.circuits import output_nodes
from interp.core.result import Result
from interp.models.hooks import run
from interp.patching.effects import Node

#: Float32 over three layers: sums taken in another order differ by some 1e-6 of logits of up to ten.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def centred_logits(task, logits):
    rows = torch.arange(len(task))
    chosen = logits[rows, task.positions["end"]].gather(-1, task.options)
    return chosen - chosen.mean(-1, keepdim=True)


def of_right(task, logits):
    right = (task.options == task.answers[:, None]).float()
    return (centred_logits(task, logits) * right).sum(1)


def value_of(found, node, metric=None):
    table = found.table if metric is None else found.table[found.table["metric"] == metric]
    keep = table["component"] == node.component
    for name in ("layer", "head"):
        mine = getattr(node, name)
        keep &= table[name].isna() if mine is None else (table[name] == mine).fillna(False)
    return table[keep].sort_values("prompt")["value"].to_numpy()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("architecture", "weights"), [
    ("gpt2", "raw"), ("llama", "processed"), ("gpt_neox", "raw"), ("gemma", "raw"), ("opt", "processed"),
])  # fmt: skip
def test_all_effects_sum_to_the_models_own_logits(random_choice, architecture, weights, padded):
    model, task = random_choice(architecture, padded=padded, weights=weights)
    found = output_nodes.attribution(model, task, batch_size=3)
    expected = centred_logits(task, run(model, task.clean, mask=task.mask).logits)
    np.testing.assert_allclose(found.arrays["labels"][1].sum(0), expected.numpy(), **CLOSE)
    np.testing.assert_allclose(found.arrays["logits"][1], expected.numpy(), **CLOSE)
    per_prompt = found.table.groupby("prompt")["value"].sum()
    right = expected.gather(1, (torch.arange(len(task)) % 4)[:, None])[:, 0]
    np.testing.assert_allclose(per_prompt, right, **CLOSE)
    assert len(found.table) == len(task) * (1 + 3 * 4 + 3 + 1)
    np.testing.assert_allclose(found.arrays["labels"][1].sum(2), 0, atol=1e-5)  # centred


def test_an_effect_is_what_the_frozen_norm_and_the_unembedding_make_of_the_output(random_choice):
    model, task = random_choice("llama", weights="raw")
    found = output_nodes.attribution(model, task)
    cache = run(model, task.clean, capture=["blocks.1.attn.hook_z", "blocks.2.hook_resid_post"]).cache
    written = cache["blocks.1.attn.hook_z"][:, 10, 3] @ model.bridge.blocks[1].attn.W_O[3]
    final = cache["blocks.2.hook_resid_post"][:, 10]
    module = model.bridge.original_model
    scale = (final.pow(2).mean(-1, keepdim=True) + module.config.rms_norm_eps).sqrt()
    to_labels = torch.einsum(
        "bd,bkd->bk", written / scale * module.model.norm.weight, module.lm_head.weight[task.options]
    )
    expected = (to_labels - to_labels.mean(1, keepdim=True)).gather(1, (torch.arange(8) % 4)[:, None])[:, 0]
    np.testing.assert_allclose(value_of(found, Node("z", 1, 3)), expected.detach(), **CLOSE)


def by_hooks(model, task, sources, node):
    """Direct and total effect of one node, one hooked pass a source."""
    end, rows = task.positions["end"], torch.arange(len(task))
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    site = {"z": "attn.hook_z", "mlp_out": "hook_mlp_out", "embed": "hook_resid_pre"}[node.component]
    name = f"blocks.{node.layer or 0}.{site}"
    head = slice(None) if node.head is None else node.head
    own = run(model, task.clean, capture=[name], mask=task.mask)
    clean = of_right(task, own.logits)
    totals, directs = [], []
    for column in sources.T:
        source = task[column]
        other = run(model, source.clean, capture=[name], mask=source.mask).cache[name]
        value = (
            other[rows, source.positions["end"], head]
            if node.component == "z"
            else other[rows, source.positions["end"]]
        )

        def put(activation, hook, value=value):
            changed = activation.clone()
            if node.component == "z":
                changed[rows, end, head] = value
            else:
                changed[rows, end] = value
            return changed

        totals.append(clean - of_right(task, run(model, task.clean, hooks=[(name, put)], mask=task.mask).logits))
        mine = own.cache[name][rows, end, head] if node.component == "z" else own.cache[name][rows, end]
        delta = value - mine
        if node.component == "z":
            delta = delta @ model.bridge.blocks[node.layer].attn.W_O[node.head]

        def add(activation, hook, delta=delta):
            changed = activation.clone()
            changed[rows, end] += delta
            return changed

        directs.append(clean - of_right(task, run(model, task.clean, hooks=[(last, add)], mask=task.mask).logits))
    return torch.stack(directs).mean(0).detach(), torch.stack(totals).mean(0).detach()


@pytest.mark.parametrize(("architecture", "padded"), [("gpt2", False), ("llama", True), ("gpt_neox", False)])
def test_effects_equal_hooked_passes(random_choice, architecture, padded):
    model, task = random_choice(architecture, padded=padded)
    found = output_nodes.effects(model, task, n_sources=2, batch_size=5)
    for node in (
        Node("embed"),
        Node("z", 0, 1),
        Node("z", 1, 3),
        Node("mlp_out", 1),
        Node("z", 2, 0),
        Node("mlp_out", 2),
    ):
        direct, total = by_hooks(model, task, found.arrays["source"][1], node)
        np.testing.assert_allclose(value_of(found, node, "direct"), direct, **CLOSE)
        np.testing.assert_allclose(value_of(found, node, "total"), total, **CLOSE)
        np.testing.assert_allclose(value_of(found, node, "indirect"), total - direct, **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_what_nothing_follows_acts_directly(random_choice, architecture):
    model, task = random_choice(architecture)
    found = output_nodes.effects(model, task, n_sources=1).filter(metric="indirect", layer=2)
    largest = found.table.groupby("component")["value"].agg(lambda value: value.abs().max())
    assert largest["mlp_out"] < 1e-4
    # In a parallel layer the MLP does not read the heads beside it; otherwise it does.
    assert (largest["z"] < 1e-4) == (architecture == "gpt_neox")


def test_direct_and_total_effects_read_the_same_capped_logits(random_choice):
    model, task = random_choice("gemma2")
    found = output_nodes.effects(model, task, nodes="mlps", n_sources=1).filter(metric="indirect", layer=2)
    assert found.table["value"].abs().max() < 1e-4
    assert found.arrays["clean"][1] == pytest.approx(of_right(task, run(model, task.clean).logits).numpy(), abs=1e-4)


def test_all_nodes_together_make_the_other_prompts_final_stream(random_choice):
    model, task = random_choice("llama", n=12)
    found = output_nodes.effects(model, task, n_sources=3)
    joined = output_nodes.joint(model, task, found)
    whole = found.arrays["whole"][1]
    steps, end, rows = joined.table["step"].max(), task.positions["end"], torch.arange(len(task))
    for metric in ("direct", "total"):
        values = joined.filter(step=int(steps), metric=metric).table.sort_values("prompt")["value"]
        np.testing.assert_allclose(values, whole, **CLOSE)
    logits = run(model, task.clean).logits[rows, end]
    expected = []
    for column in found.arrays["source"][1].T:
        other = torch.tensor(column)
        theirs = logits[other].gather(1, task.options)
        mine = logits.gather(1, task.options)
        fall = (mine - mine.mean(1, keepdim=True)) - (theirs - theirs.mean(1, keepdim=True))
        expected.append(fall.gather(1, (rows % 4)[:, None])[:, 0])
    np.testing.assert_allclose(whole, torch.stack(expected).mean(0), **CLOSE)
    first = joined.filter(step=1).table.pivot(index="prompt", columns="metric", values="value")
    component, layer, head = joined.meta["order"][0]
    for metric in ("direct", "total"):
        np.testing.assert_allclose(first[metric], value_of(found, Node(component, layer, head), metric), **CLOSE)


def test_joint_sets_equal_one_hooked_pass(random_choice):
    model, task = random_choice("gpt2", n=8)
    nodes = [Node("z", 0, 2), Node("z", 1, 1), Node("z", 2, 3)]
    found = output_nodes.effects(model, task, nodes=nodes, n_sources=1)
    joined = output_nodes.joint(model, task, found, sizes=[2])
    order = [Node(*each) for each in joined.meta["order"]]
    ranking = output_nodes.ranked(found)
    assert ranking["direct"].abs().is_monotonic_decreasing
    assert [(n.layer, n.head) for n in order] == list(zip(ranking["layer"], ranking["head"], strict=True))
    source = task[found.arrays["source"][1][:, 0]]
    names = [f"blocks.{node.layer}.attn.hook_z" for node in order[:2]]
    theirs = run(model, source.clean, capture=names).cache

    def put(activation, hook, node):
        changed = activation.clone()
        changed[:, 10, node.head] = theirs[f"blocks.{node.layer}.attn.hook_z"][:, 10, node.head]
        return changed

    hooks = [(name, lambda a, hook, node=node: put(a, hook, node)) for name, node in zip(names, order[:2], strict=True)]
    expected = of_right(task, run(model, task.clean).logits) - of_right(
        task, run(model, task.clean, hooks=hooks).logits
    )
    mine = joined.filter(metric="total").table.sort_values("prompt")["value"]
    np.testing.assert_allclose(mine, expected.detach(), **CLOSE)


def test_the_planted_correct_letter_head_is_first(planted_choice, planted_task):
    model, task = planted_choice(), planted_task()
    found = output_nodes.effects(model, task, n_sources=3)
    first = output_nodes.ranked(found).iloc[0]
    # Layer 3 doubles what is written: its direct effect is as large as that of all the writers, half of the whole.
    assert (first["component"], first["layer"], first["head"]) == ("z", 3, 0)
    second = output_nodes.ranked(found).iloc[1]
    assert (second["layer"], second["head"]) == (2, 0)
    assert second["total"] == pytest.approx(2 * second["direct"], abs=1e-3)
    joined = output_nodes.joint(model, task, found)
    shares = output_nodes.shares(joined)
    assert shares.loc[1, "direct"] == pytest.approx(0.5, abs=1e-3)
    assert shares.loc[3, "direct"] == pytest.approx(1.0, abs=1e-3)  # both layers, and the single-letter head
    assert output_nodes.needed(joined, 0.4) == 1
    assert output_nodes.needed(joined, 0.999) == 3


def test_sources_have_another_right_label_and_go_round_the_places(planted_task):
    task = planted_task(24)
    sources = output_nodes.draw_sources(task, 3, seed=1)
    right = np.arange(24) % 4
    assert sources.shape == (24, 3)
    for prompt in range(24):
        assert sorted(right[sources[prompt]]) == [k for k in range(4) if k != right[prompt]]
    one = right[output_nodes.draw_sources(task, 1, seed=1)[:, 0]]
    assert np.bincount(one).tolist() == [6, 6, 6, 6]
    assert (output_nodes.draw_sources(task, 3, seed=1) == sources).all()
    assert (output_nodes.draw_sources(task, 3, seed=2) != sources).any()
    # With letters at random, a source in another place may still have the same label: it is no source.
    mixed = planted_task(48, labels="random")
    answers = mixed.answers.numpy()
    assert (answers[output_nodes.draw_sources(mixed, 3, seed=0)] != answers[:, None]).all()


def test_needed_takes_the_first_size_that_has_the_share():
    table = pd.DataFrame({"prompt": 0, "step": [1, 2, 3], "metric": "direct", "value": [1.0, 3.2, 4.0]})
    joined = Result("output_nodes.joint", table, "logits", {"whole": (("prompt",), np.array([4.0]))})
    assert output_nodes.needed(joined) == 2
    assert output_nodes.needed(joined, 0.81) == 3
    with pytest.raises(ValueError, match="larger sizes"):
        output_nodes.needed(joined, 1.1)


def test_bad_input(random_choice):
    model, task = random_choice("llama")
    with pytest.raises(ValueError, match="no options"):
        output_nodes.attribution(model, replace(task, options=None))
    with pytest.raises(ValueError, match="at least one"):
        output_nodes.effects(model, task, n_sources=0)
    with pytest.raises(ValueError, match="give more prompts"):
        output_nodes.effects(model, task[:2])
    found = output_nodes.effects(model, task, nodes=[Node("z", 1, 1)], n_sources=1)
    with pytest.raises(ValueError, match="task_fingerprint"):
        output_nodes.joint(model, task[:4], found)
    with pytest.raises(ValueError, match="from 1 to 1"):
        output_nodes.joint(model, task, found, sizes=[2])
