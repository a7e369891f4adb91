"""Logit flow: keys against hooks, shares by brute force, conservation, a planted two-hop net, stages, failures."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from interp.core.result import Result
from interp.flow import attribution, logit_flow, stages
from interp.flow._back import Parents, back, everything, next_parents, reads
from interp.models import load, toy
from interp.models._planted_build import BOS, END, WORDS, blank, finish, head, neurons
from interp.models._planted_case import any_of, distract
from interp.models.hooks import run
from interp.models.program import program
from interp.tasks.task import Task

#: Float32 over three layers; importances are of order one.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
N_POS = 6

random_model = cache(lambda architecture: toy.random(architecture, weights="raw"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Sweeps are stored in the cache folder: a test must not go on where another one was killed."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


def random_task(model, *, n=3, padded=False):
    tokens = toy.random_tokens(model, n, N_POS)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    answers = toy.random_tokens(model, n, 1, seed=5)[:, 0]
    positions = {"entity": torch.full((n,), 3), "relation": torch.full((n,), 4), "end": torch.full((n,), N_POS - 1)}
    names = tuple(f"prompt {i}" for i in range(n))
    return Task("random", names, tokens, "drawn", answers=answers, mask=mask if padded else None, positions=positions)


def some_parents(model):
    """Attention neurons and MLP neurons of several layers, two of them at one position."""
    rows = [(2, 3, 1, 2, 0.7), (2, 3, 0, 5, 0.2), (1, 2, 3, 1, 0.4), (2, 5, -1, 7, 0.5), (1, 3, -1, 40, 0.3)]
    layer, pos, heads, neuron, importance = zip(*rows, strict=True)
    return Parents(*(torch.tensor(part) for part in (layer, pos, heads, neuron, importance)))


# --- one step back -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma", "qwen2", "opt"])
def test_keys_are_what_neurons_read(architecture):
    """The stream along a key, over the norm's scale and with the biases, is the value or the pre-activation."""
    model = random_model(architecture)
    task = random_task(model, n=1)
    steps, parents = program(model), some_parents(model)
    seen = everything(steps, task.clean, None)
    read = reads(seen, parents)
    names = {"v": "attn.hook_v", "pre": "mlp.hook_pre", "gate": "mlp.hook_pre", "post": "mlp.hook_post"}
    cache = run(model, task.clean, capture=[f"blocks.{i}.{h}" for i in range(3) for h in set(names.values())]).cache
    group = model.n_heads // model.n_key_value_heads
    keys = iter(zip(read.key, read.pos, read.attn_below, read.mlp_below, read.importance, strict=True))
    order = sorted(range(len(parents)), key=lambda i: (int(parents.layer[i]), int(parents.heads[i]) < 0))
    for layer in (1, 2):
        for attention in (True, False):
            mine = [i for i in order if parents.layer[i] == layer and (parents.heads[i] >= 0) == attention]
            modules = steps.layers[layer]
            gated = modules.gate is not None and not attention
            for projection in [modules.v] if attention else [m for m in (modules.gate, modules.up) if m is not None]:
                for i in mine:
                    key, pos, attn_below, mlp_below, importance = next(keys)
                    source = seen.pre if attention or steps.parallel else seen.mid
                    stream = source[layer, pos]
                    norm = modules.ln1 if attention else modules.ln2
                    # The norm is linear but for its scale, which is the ratio of any two such products.
                    bias = norm(torch.zeros(32))
                    centred = stream - stream.mean() if isinstance(norm, torch.nn.LayerNorm) else stream
                    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
                    scale = (centred.pow(2).mean() + eps).sqrt()
                    column = int(parents.neuron[i])
                    if attention:
                        column += model.d_head * (int(parents.heads[i]) // group)
                    at_zero = projection(bias)[column]
                    value = stream @ key / scale + at_zero
                    np.testing.assert_allclose(value, projection(norm(stream))[column], rtol=1e-4, atol=1e-4)
                    if attention:
                        hooked = cache[f"blocks.{layer}.attn.hook_v"][0, pos].flatten()[column]
                        np.testing.assert_allclose(value, hooked, rtol=1e-4, atol=1e-4)
                    assert (int(pos), int(mlp_below)) == (int(parents.pos[i]), layer)
                    assert int(attn_below) == (layer if attention or steps.parallel else layer + 1)
                    np.testing.assert_allclose(importance, parents.importance[i] / (2 if gated else 1))
    assert next(keys, None) is None


@torch.no_grad()
def slow_step(model, tokens, parents):
    """One step by its definition: parent by parent, part by part, from the hooks and the bridge's own weights."""
    steps = program(model)
    sites = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern", "attn.hook_v", "mlp.hook_post")
    cache = run(model, tokens, capture=[f"blocks.{i}.{site}" for i in range(3) for site in sites]).cache
    get = {(i, site): cache[f"blocks.{i}.{site}"][0].double() for i in range(3) for site in sites}
    n_pos, group = tokens.shape[1], model.n_heads // model.n_key_value_heads
    attention = np.zeros((3, model.n_heads, n_pos, model.d_head))
    mlp, embed, flow = np.zeros((3, n_pos, model.d_mlp)), np.zeros(n_pos), np.zeros((2, 3, n_pos))
    for layer, pos, at_head, neuron, importance in zip(*(p.tolist() for p in parents), strict=True):
        block = model.bridge.blocks[layer]
        norm = (block.ln1 if at_head >= 0 else block.ln2).original_component
        if at_head >= 0:
            columns = [block.attn.W_V[at_head if len(block.attn.W_V) == model.n_heads else at_head // group, :, neuron]]
        else:
            columns = [block.mlp.W_in[:, neuron]] + ([block.mlp.W_gate[:, neuron]] if model.gated_mlp else [])
        gain = norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight
        for column in columns:
            key = (gain * column).double()
            if isinstance(norm, torch.nn.LayerNorm):
                key = key - key.mean()
            n_attn = layer if at_head >= 0 or steps.parallel else layer + 1
            parts = [get[0, "hook_resid_pre"][pos] @ key]
            parts += [get[i, "hook_attn_out"][pos] @ key for i in range(n_attn)]
            parts += [get[i, "hook_mlp_out"][pos] @ key for i in range(layer)]
            unit = importance / len(columns) / float(sum(parts))
            embed[pos] += unit * float(parts[0])
            for i in range(n_attn):
                for h in range(model.n_heads):
                    written = model.bridge.blocks[i].attn.W_O[h].double() @ key  # [d_head]
                    for source in range(pos + 1):
                        value = get[i, "attn.hook_v"][source, h // group] * get[i, "attn.hook_pattern"][h, pos, source]
                        attention[i, h, source] += unit * (value * written).numpy()
            for i in range(layer):
                flow[1, i, pos] += unit * float(get[i, "hook_mlp_out"][pos] @ key)
                down = model.bridge.blocks[i].mlp.W_out.double() @ key
                mlp[i, pos] += unit * (get[i, "mlp.hook_post"][pos] * down).numpy()
    flow[0] = attention.sum((1, 3))
    return flow, embed, attention, mlp


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma"])
def test_a_step_is_its_definition(architecture, monkeypatch):
    monkeypatch.setattr("interp.flow._back.CANCELS", 0.0)
    model = random_model(architecture)
    task, parents = random_task(model, n=1), some_parents(model)
    step = back(everything(program(model), task.clean, None), parents)
    expected = slow_step(model, task.clean, parents)
    for mine, slow in zip((step.flow, step.embed, step.attention, step.mlp), expected, strict=True):
        np.testing.assert_allclose(mine.detach(), slow, **CLOSE)
    followed = next_parents(step, 4)
    assert len(followed) == 8
    for parent in range(8):
        layer, pos, at_head, neuron = (int(part[parent]) for part in followed[:4])
        one = expected[2][layer, at_head, pos, neuron] if at_head >= 0 else expected[3][layer, pos, neuron]
        np.testing.assert_allclose(followed.importance[parent], one, **CLOSE)
    for slow, mine in zip(expected[2:], (followed.importance[:4], followed.importance[4:]), strict=True):
        np.testing.assert_allclose(mine, np.sort(slow.ravel())[::-1][:4], **CLOSE)


@pytest.mark.parametrize(("architecture", "padded"), [
    ("gpt2", True), ("llama", True), ("gpt_neox", False), ("opt", False), ("qwen3", False), ("phi", False),
])  # fmt: skip
def test_each_step_books_what_it_was_handed(architecture, padded):
    model = random_model(architecture)
    task = random_task(model, padded=padded)
    found = logit_flow.flow(model, task, top_k=6, n_steps=3)
    arrays = {name: array for name, (_, array) in found.arrays.items()}
    booked = arrays["flow"].sum((2, 3, 4)) + arrays["embed"].sum(2) + arrays["bias"] + arrays["dropped"]
    scale = 1 + np.abs(arrays["flow"]).sum((2, 3, 4))[:, 1:]  # what cancels in the sum is rounded too
    assert (np.abs(booked - arrays["followed"])[:, 1:] < 2e-5 * scale).all()
    assert (arrays["followed"][:, 1] > 0).all()
    # Step 0 is the value neurons.
    np.testing.assert_allclose(booked[:, 0], arrays["increase"].sum(1), **CLOSE)
    np.testing.assert_allclose(arrays["followed"][:, 1], arrays["increase"].clip(min=0).sum(1), **CLOSE)
    # The table is the map, without padding.
    assert np.isclose(found.table["value"].sum(), arrays["flow"].sum(), rtol=1e-4, atol=1e-4)
    assert len(found.table) == 2 * 3 * (N_POS * 3 - (2 if padded else 0))


def test_value_neurons_are_those_of_attribution():
    model = random_model("llama")
    task = random_task(model)
    found = logit_flow.flow(model, task, top_k=5, n_steps=1)
    for kind, mine in (("attention_neuron", slice(0, 5)), ("neuron", slice(5, 10))):
        own = attribution.attribute(model, task, by=kind, quantity="log_prob_increase", top_k=5)
        np.testing.assert_allclose(found.arrays["increase"][1][:, mine].ravel(), own.table["value"], **CLOSE)
        np.testing.assert_array_equal(found.arrays["value_layer"][1][:, mine].ravel(), own.table["layer"])
        where = own.table["k_pos"] if kind == "attention_neuron" else pd.Series(N_POS - 1, index=own.table.index)
        booked = own.table.assign(pos=where).groupby(["prompt", "layer", "pos"])["value"].sum()
        step0 = found.arrays["flow"][1][:, 0, 0 if kind == "attention_neuron" else 1]
        for at, value in booked.items():
            np.testing.assert_allclose(step0[tuple(int(i) for i in at)], value, **CLOSE)
        np.testing.assert_allclose(step0.sum(), booked.sum(), **CLOSE)


# --- alone, padded, grouped ----------------------------------------------------------------------------------------


def test_prompts_alone_and_padded():
    model = random_model("gpt2")
    task = random_task(model)
    together = logit_flow.flow(model, task, top_k=4, n_steps=2)
    for row in range(3):
        alone = logit_flow.flow(model, task[row : row + 1], top_k=4, n_steps=2)
        np.testing.assert_allclose(together.arrays["flow"][1][row], alone.arrays["flow"][1][0], **CLOSE)
    wide = torch.cat([torch.ones(3, 2, dtype=torch.long), task.clean], 1)
    mask = torch.cat([torch.zeros(3, 2), torch.ones(3, N_POS)], 1).long()
    positions = {name: at + 2 for name, at in task.positions.items()}
    padded = Task("padded", task.prompts, wide, "drawn", answers=task.answers, mask=mask, positions=positions)
    found = logit_flow.flow(model, padded, top_k=4, n_steps=2)
    np.testing.assert_allclose(found.arrays["flow"][1][..., 2:], together.arrays["flow"][1], rtol=1e-3, atol=1e-4)
    assert len(found.table) == len(together.table)
    np.testing.assert_array_equal(found.table["target"], together.table["target"])


def test_grouped_keys_are_the_same_model_written_out():
    grouped = toy.random_module("llama")
    config = transformers.LlamaConfig.from_dict(grouped.config.to_dict() | {"num_key_value_heads": 4})
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = dict(grouped.state_dict())
    for name, weight in weights.items():
        if ".k_proj" in name or ".v_proj" in name:
            weights[name] = weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    module.load_state_dict(weights)
    one, other = (load(m.eval(), tokenizer=toy.tokenizer(), weights="raw") for m in (grouped, module))
    task = random_task(one)
    maps = [logit_flow.flow(m, task, top_k=5, n_steps=2).table["value"] for m in (one, other)]
    np.testing.assert_allclose(*maps, rtol=1e-3, atol=1e-4)
    heads = [attribution.attribute(m, task, by="source").table for m in (one, other)]
    np.testing.assert_allclose(heads[0]["value"], heads[1]["value"], rtol=1e-4, atol=1e-4)


# --- planted -------------------------------------------------------------------------------------------------------


@cache
def two_hop():
    """Prompts "<bos> entity . relation <end>": at the entity an MLP writes its bridge (layer 0), the relation attends
    there and takes the bridge over (1), an MLP turns it into the answer (2), which the end fetches (3)."""
    n = 3
    build = blank(4, 3, n_words=n + 2, n_neurons=n, bridge=n, taken=n, answer=n, out=n, junk=n + 2)
    entities, relation = build.words[:n], build.words[n : n + 1]
    bridge, taken, answer = build["bridge"], build["taken"], build["answer"]
    neurons(build, 0, read=entities, bias=0.0, write=bridge.roll(1, 0))
    head(build, (1, 1), asks=relation, want=relation, offer=any_of(bridge), value=bridge, write=taken)
    neurons(build, 2, read=taken, bias=0.0, write=answer)
    head(build, (3, 2), asks=build.end, want=build.end, offer=any_of(answer), value=answer, write=build["out"])
    distract(build, (2, 0))
    model = finish(build, out=build["out"], scale=8.0)
    tokens = torch.tensor([[BOS, WORDS + i, WORDS + n + 1, WORDS + n, END] for i in range(n)])
    # Entity i writes the bridge i - 1, whose word is the answer.
    answers = torch.tensor([WORDS + (i - 1) % n for i in range(n)])
    positions = {"entity": torch.full((n,), 1), "relation": torch.full((n,), 3), "end": torch.full((n,), 4)}
    prompts = tuple(" ".join(model.to_str_tokens(row)) for row in tokens)
    return model, Task("two_hop", prompts, tokens, "planted", answers=answers, positions=positions)


def test_the_planted_stages_are_found():
    model, task = two_hop()
    assert torch.equal(logit_flow.predicted(model, task), task.answers)
    found = logit_flow.flow(model, task, n_steps=4)
    flow = found.arrays["flow"][1]
    followed = found.arrays["followed"][1]
    # (step, component, layer, position): one place a step, and the whole importance of it.
    truth = [(0, 0, 3, 3), (1, 1, 2, 3), (2, 0, 1, 1), (3, 1, 0, 1)]
    for step, *place in truth:
        booked = flow[:, step].copy()
        np.testing.assert_allclose(booked[(slice(None), *place)], followed[:, 1], rtol=1e-4)
        booked[(slice(None), *place)] = 0
        assert np.abs(booked).max() < 1e-3
    np.testing.assert_allclose(found.arrays["embed"][1][:, 4, 1], followed[:, 1], rtol=1e-4)
    located = stages.locate(found, entity="entity", relation="relation").table.set_index("component")
    assert located["value_present"].tolist() == [1, 1, 1, 1]
    assert located["value_centre"].round(3).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(located["value"], 0.25, atol=1e-3)
    assert (located["value_low"] == located["value_high"]).all()


def test_a_wrong_answer_enters_where_it_was_planted():
    model, task = two_hop()
    # The first two prompts are said to have each other's answers, so that the model's own are wrong.
    answers = task.answers[[1, 0, 2]]
    confused = Task("confused", task.prompts, task.clean, "planted", answers=answers, positions=task.positions)
    found = logit_flow.failures(model, confused)
    assert found.arrays["prompt"][1].tolist() == [0, 1]
    assert found.arrays["prediction"][1].tolist() == task.answers[:2].tolist()
    assert set(found.table["prompt"]) == {0, 1}
    assert {"prediction", "answer", "difference"} == set(found.table["metric"])
    wide = found.table.pivot(index=["prompt", "component", "layer", "pos"], columns="metric", values="value")
    np.testing.assert_allclose(wide["difference"], wide["prediction"] - wide["answer"])
    for name, allowed in (("layer", {0, 1, 2, 3}), ("pos", {1, 3})):
        assert set(found.arrays[name][1].tolist()) <= allowed
    best = wide["difference"].groupby("prompt").idxmax()
    entry = [(("attn", "mlp")[c], layer, pos) for c, layer, pos in zip(
        *(found.arrays[name][1] for name in ("component", "layer", "pos")), strict=True)]  # fmt: skip
    assert [at[1:] for at in best] == entry
    with pytest.raises(ValueError, match="gets all 3 prompts"):
        logit_flow.failures(model, task)


# --- reading the map -----------------------------------------------------------------------------------------------


def by_hand(values, *, n_layers=4):
    """A flow whose map is {(prompt, component, layer, pos, role): value}, and 0 elsewhere."""
    places = {"entity": [0], "relation": [1], "other": [2, 3], "end": [4]}
    rows = [
        (prompt, component, layer, pos, role, 0.0)
        for prompt in range(2) for component in ("attn", "mlp") for layer in range(n_layers)
        for role, at in places.items() for pos in at
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["prompt", "component", "layer", "pos", "target", "value"])
    for (prompt, component, layer, pos), value in values.items():
        at = (table["prompt"] == prompt) & (table["component"] == component)
        table.loc[at & (table["layer"] == layer) & (table["pos"] == pos), "value"] = value
    return Result("logit_flow.flow", table, "nats")


def test_stages_by_hand():
    found = by_hand({
        (0, "mlp", 0, 0): 2.0, (1, "mlp", 1, 0): 4.0, (0, "mlp", 2, 0): 7.0,  # the last is above the lower half
        (0, "attn", 3, 0): 1.0, (1, "attn", 3, 0): -0.5,  # mean 0.25
        (0, "mlp", 3, 1): -5.0,  # negative: no stage C
        (0, "attn", 2, 1): 1.0, (0, "attn", 3, 4): 2.0, (1, "mlp", 3, 4): 3.0,  # D
        (0, "attn", 1, 2): 0.5, (1, "attn", 1, 3): 0.5,  # other positions, in the whole
    })  # fmt: skip
    located = stages.locate(found, entity="entity", relation="relation", bar=0.1).table.set_index("component")
    whole = (2 + 4 + 7 + 0.5 + 1 + 2 + 3 + 1) / 2
    np.testing.assert_allclose(located["value"], [3 / whole, 0.25 / whole, 0, 3 / whole])
    np.testing.assert_allclose(located["value_centre"], [2 / 3, 3, np.nan, (0.5 * 2 + 2.5 * 3) / 3])
    assert located["value_low"].tolist()[:2] == [0, 3] and located["value_high"].tolist()[:2] == [1, 3]
    assert located["value_present"].tolist() == [1, 0, 0, 1]
    assert (stages.locate(found, entity="entity", relation=None).table["value"].to_numpy()[2]) == 0
    with pytest.raises(ValueError, match="no position is called 'subject'; there are end, entity"):
        stages.locate(found, entity="subject", relation=None)
    with pytest.raises(ValueError, match="different positions"):
        stages.locate(found, entity="entity", relation="entity")


def test_roles_and_comparison_by_hand():
    one = by_hand({(0, "attn", 1, 2): 1.0, (0, "attn", 1, 3): 2.0, (1, "attn", 0, 1): 4.0, (0, "attn", 2, 1): 4.0})
    two = by_hand({(0, "attn", 1, 1): 1.0, (1, "attn", 3, 1): 3.0, (0, "attn", 2, 3): 6.0})
    summed = logit_flow.roles(one).table
    assert summed.query("prompt == 0 and layer == 1 and target == 'other' and component == 'attn'")["value"].item() == 3
    assert len(summed) == 2 * 2 * 4 * 4
    ratio = stages.compare(one, two).set_index(["component", "target"])
    assert ratio.loc[("attn", "relation")][["first", "second", "ratio"]].tolist() == [4, 2, 0.5]
    assert ratio.loc[("attn", "relation"), "low"] < 0.5 < ratio.loc[("attn", "relation"), "high"]
    assert ratio.loc[("attn", "other"), "ratio"] == 2
    grouped = stages.compare(one, two, groups={"rest": ["other", "relation"]}).set_index("component")
    assert grouped.loc["attn"][["first", "second"]].tolist() == [5.5, 5]
    with pytest.raises(ValueError, match=r"role 'x' \(there\) has no position"):
        stages.compare(one, two, groups={"x": ["there"]})


def test_what_cannot_be_followed_is_refused():
    model = random_model("llama")
    task = random_task(model)
    for options in ({"top_k": 0}, {"n_steps": 0}):
        with pytest.raises(ValueError, match="at least one"):
            logit_flow.flow(model, task, **options)
    with pytest.raises(ValueError, match="has no answers"):
        logit_flow.flow(model, task.clean)
    found = logit_flow.flow(model, task.clean, target="prediction", top_k=2, n_steps=1)
    assert set(found.table["target"]) == {"end", "other"}
