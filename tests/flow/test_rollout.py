"""Rollout and maximum flow: brute force, networkx, hooks, padding; importances by hand; planted patterns."""

from __future__ import annotations

from functools import cache
from itertools import product

import networkx
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from interp.flow import rollout
from interp.flow.rollout import agreement, chained, importance, influence, piped, sink
from interp.models import load, toy
from interp.models.hooks import run
from interp.models.program import program
from interp.tasks import induction
from interp.tasks.task import Task

#: Float32 activations of order one, read by two ways.
CLOSE = {"rtol": 2e-4, "atol": 1e-6}
#: Capacities are rounded to 1e-8; no cut here has more than a hundred edges.
ROUNDED = 1e-6
N_POS = 6

random_model = cache(lambda architecture: toy.random(architecture, weights="raw"))


@cache
def even_model():
    """Its queries are zero."""
    module = toy.random_module("gpt2")
    for block in module.transformer.h:
        block.attn.c_attn.weight.data[:, :32] = 0
        block.attn.c_attn.bias.data[:32] = 0
    return load(module, tokenizer=toy.tokenizer(), weights="raw")


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
    names = tuple(f"prompt {i}" for i in range(n))
    positions = {"end": torch.full((n,), N_POS - 1), "middle": torch.full((n,), 3)}
    return Task("random", names, tokens, "drawn", answers=answers, mask=mask if padded else None, positions=positions)


def cut_off(task, row, start):
    positions = {name: where[row : row + 1] - start for name, where in task.positions.items()}
    tokens, answers = task.clean[row : row + 1, start:], task.answers[row : row + 1]
    return Task("alone", task.prompts[:1], tokens, "drawn", answers=answers, positions=positions)


def causal(n_layers, n_pos, seed):
    weights = np.tril(np.random.default_rng(seed).exponential(size=(n_layers, n_pos, n_pos)) ** 2)
    return weights / weights.sum(-1, keepdims=True)


# --- the two measures ----------------------------------------------------------------------------------------------


def test_rollout_is_the_sum_over_all_paths():
    weights = causal(3, 4, 0)
    mixed = (weights + np.eye(4)) / 2
    paths = np.zeros((4, 4))
    for top, second, first, token in product(range(4), repeat=4):
        paths[top, token] += mixed[2, top, second] * mixed[1, second, first] * mixed[0, first, token]
    np.testing.assert_allclose(chained(weights)[2], paths, atol=1e-12)
    np.testing.assert_allclose(chained(weights).sum(-1), 1, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_flow_is_the_smallest_cut(seed):
    """Max-flow is min-cut: every set of inner nodes on the source's side, by enumeration."""
    weights = causal(3, 3, seed)
    mixed = (weights + np.eye(3)) / 2
    found = piped(weights, 2)
    for token in range(3):
        smallest = np.inf
        for side in product([False, True], repeat=6):  # nodes after layers 1 and 0
            upper, lower = np.array(side[:3]), np.array(side[3:])
            cut = mixed[2, 2][~upper].sum() + mixed[1][upper][:, ~lower].sum() + mixed[0][lower][:, token].sum()
            smallest = min(smallest, cut)
        assert abs(found[2, token] - smallest) < ROUNDED


def test_flow_is_that_of_networkx_and_never_below_rollout():
    for seed in range(3):
        weights = causal(3, 4, 10 + seed)
        graph = networkx.DiGraph()
        for layer, query, key in np.ndindex(weights.shape):
            capacity = (weights[layer, query, key] + (query == key)) / 2
            graph.add_edge((layer + 1, query), (layer, key), capacity=capacity)
        found, rolled = piped(weights, 3), chained(weights)[:, 3]
        for depth, token in np.ndindex(found.shape):
            assert abs(found[depth, token] - networkx.maximum_flow_value(graph, (depth + 1, 3), (0, token))) < ROUNDED
        np.testing.assert_allclose(found[0], rolled[0], atol=ROUNDED)
        assert (found >= rolled - ROUNDED).all() and (found <= 1 + ROUNDED).all()


def test_flow_to_the_first_token_saturates():
    """The first position passes on all it gets, so nothing bounds the flow but what leaves the source."""
    even = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    deep = piped(np.stack([even] * 12), 4)
    assert abs(deep[-1, 0] - 1) < ROUNDED
    assert deep[-1, 4] < 0.61  # nobody but itself passes on to the last: 1/2 + 1/10 at the most


# --- the weights ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_weights_are_what_heads_write(architecture):
    """Against hooks, and the output map run on one head's part at a time (grouped keys in llama, biases in GPT-2)."""
    model = random_model(architecture)
    task = random_task(model, n=2)
    steps = program(model)
    names = [f"blocks.{layer}.attn.hook_{what}" for layer in range(3) for what in ("pattern", "v")]
    seen = run(model, task.clean, capture=names).cache
    found = {kind: influence(model, task, measure="raw", weight=kind) for kind in ("attention", "value", "norm")}
    group = model.n_heads // model.n_key_value_heads
    for layer, prompt in product(range(3), range(2)):
        pattern, v = (seen[f"blocks.{layer}.attn.hook_{what}"][prompt] for what in ("pattern", "v"))
        written = torch.zeros(model.n_heads, N_POS, model.d_model)
        for head, key in product(range(model.n_heads), range(N_POS)):
            z = torch.zeros(model.n_heads, model.d_head)
            nothing = steps.layers[layer].o(z.flatten())
            z[head] = v[key, head // group]
            written[head, key] = steps.layers[layer].o(z.flatten()) - nothing
        by_hand = {
            "attention": pattern.mean(0),
            "value": torch.einsum("hqk,hk->qk", pattern, written.norm(dim=-1)),
            "norm": torch.einsum("hqk,hkm->qkm", pattern, written).norm(dim=-1),
        }
        for kind, weights in by_hand.items():
            rows = (weights / weights.sum(-1, keepdim=True)).numpy()
            np.testing.assert_allclose(found[kind].arrays["matrix"][1][prompt, layer], rows, **CLOSE, err_msg=kind)


def test_receptive_field():
    model = random_model("llama")
    task = random_task(model, n=1)
    plain, fair = (
        influence(model, task, measure="raw", receptive_field=option).arrays["matrix"][1][0] for option in (False, True)
    )
    expected = plain / np.arange(N_POS, 0, -1)
    np.testing.assert_allclose(fair, expected / expected.sum(-1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("measure", ["raw", "rollout", "flow"])
@pytest.mark.parametrize("weight", ["attention", "norm"])
def test_batches_and_padding_change_nothing(measure, weight):
    model = random_model("llama")
    task = random_task(model, padded=True)
    options = {"measure": measure, "weight": weight, "receptive_field": weight == "norm", "position": "middle"}
    whole = influence(model, task, batch_size=3, **options)
    single = influence(model, task, batch_size=1, **options)
    for row, start in enumerate((2, 0, 0)):
        alone = influence(model, cut_off(task, row, start), **options)
        for name in whole.arrays:
            values = whole.arrays[name][1]
            # Float32 on other shapes; the flow is normalised after the rounding of its capacities.
            np.testing.assert_allclose(single.arrays[name][1], values, rtol=1e-4, atol=1e-6)
            own = values[row, ..., start:] if name != "matrix" else values[row, :, start:, start:]
            np.testing.assert_allclose(own, alone.arrays[name][1][0], rtol=1e-4, atol=1e-6)
            assert not values[0, ..., :2].any()
    np.testing.assert_allclose(whole.arrays["value"][1].sum(-1), 1, atol=1e-9)
    assert len(whole.table) == 3 * (2 + 4 + 4)  # tokens up to the middle, in three layers


def test_flow_of_a_model_is_above_its_rollout():
    model = random_model("gpt2")
    task = random_task(model, n=2)
    flow = influence(model, task, measure="flow")
    rolled = influence(model, task).arrays["value"][1]
    raw = flow.arrays["unnormalised"][1]
    assert (raw >= rolled - ROUNDED).all()
    np.testing.assert_allclose(raw[:, 0], rolled[:, 0], atol=ROUNDED)


# --- sink, importance, agreement -----------------------------------------------------------------------------------


def test_sink_of_even_attention_is_its_own_baseline():
    """A model without queries attends evenly; the share of the first token is the baseline, by every measure."""
    model = even_model()
    task = random_task(model, n=2)
    for measure, fair in product(("raw", "rollout", "flow"), (False, True)):
        table = sink(influence(model, task, measure=measure, receptive_field=fair)).table
        np.testing.assert_allclose(table["value"], table["value_uniform"], atol=1e-6)  # float32 softmax
    raw = sink(influence(model, task, measure="raw", position="middle")).table
    np.testing.assert_allclose(raw["value"], 1 / 4, atol=1e-6)


def test_sink_counts_from_the_first_token_that_is_no_padding():
    model = random_model("llama")
    task = random_task(model, padded=True)
    found = influence(model, task)
    shares = sink(found).grid("prompt", "layer").to_numpy()
    values = found.arrays["value"][1]
    np.testing.assert_allclose(shares, np.stack([values[0, :, 2], values[1, :, 0], values[2, :, 0]]))


@torch.no_grad()
def test_importances_by_hand():
    """Ablation is a run with a hook; the gradient is the slope along its own direction, by finite differences."""
    model = random_model("llama")
    task = random_task(model, padded=True)
    gone = importance(model, task, source="zero").arrays["value"][1]
    slope = importance(model, task, by="gradient").arrays["value"][1]
    rows = torch.arange(3)

    def log_prob(change):
        hook = ("blocks.0.hook_resid_pre", lambda stream, hook: change(stream.clone()))
        logits = run(model, task.clean, hooks=[hook], mask=task.mask).logits[:, -1]
        return logits.double().log_softmax(-1)[rows, task.answers]

    clean = log_prob(lambda stream: stream)
    for pos in range(2, N_POS):

        def without(stream, pos=pos):
            stream[:, pos] = 0
            return stream

        np.testing.assert_allclose(gone[:, pos], (clean - log_prob(without)).abs(), rtol=1e-3, atol=1e-5)
        slopes = torch.zeros(3, model.d_model, dtype=torch.float64)
        for feature in range(model.d_model):

            def moved(stream, by, pos=pos, feature=feature):
                stream[:, pos, feature] += by
                return stream

            up, down = (log_prob(lambda stream, by=by, moved=moved: moved(stream, by)) for by in (1e-3, -1e-3))
            slopes[:, feature] = (up - down) / 2e-3
        # Differences of float32 logits (1e-6) over 2e-3, of slopes of order one; 32 of them.
        np.testing.assert_allclose(slope[:, pos], slopes.norm(dim=-1), rtol=2e-2, atol=5e-3)
    assert not gone[0, :2].any() and not slope[0, :2].any()


def test_agreement_is_spearman():
    model = random_model("gpt2")
    task = random_task(model)
    found, matters = influence(model, task, position="middle"), importance(model, task, by="gradient")
    table = agreement(found, matters).table
    values, other = found.arrays["value"][1], matters.arrays["value"][1]
    expected = [spearmanr(values[p, layer, :4], other[p, :4]).statistic for p in range(3) for layer in range(3)]
    np.testing.assert_allclose(table["value"], expected, atol=1e-12)
    np.testing.assert_allclose(
        agreement(influence(model, task, measure="raw"), matters).table["value"].abs() <= 1, True
    )


def test_agreement_of_what_does_not_vary_is_nan():
    model = even_model()
    task = random_task(model, n=1)
    found = influence(model, task, measure="raw", position="middle")
    assert agreement(found, importance(model, task, by="gradient")).table["value"].isna().all()


def test_the_induction_head_looks_at_its_source():
    model = toy.induction()
    task = induction(model, 4, 5)
    raw = influence(model, task, measure="raw", weight="value").arrays["value"][1]
    source = task.positions["source"].numpy()
    assert (raw[:, 1].argmax(-1) == source).all()
    matters = importance(model, task, source="zero", metric="prob").arrays["value"][1]
    assert (matters[np.arange(4), source] > 0.9).all()


# --- bad input -----------------------------------------------------------------------------------------------------


def test_refusals():
    model = random_model("llama")
    task = random_task(model, padded=True)
    with pytest.raises(ValueError, match="no position 'nowhere'"):
        influence(model, task, position="nowhere")
    with pytest.raises(ValueError, match="prompt 0: position 1 is padding"):
        influence(model, task, position=1)
    with pytest.raises(ValueError, match="raw, rollout, flow"):
        rollout._known("measure", "flux", ("raw", "rollout", "flow"))
    found = influence(model, task)
    with pytest.raises(ValueError, match="give one of rollout.influence"):
        sink(importance(model, task))
    with pytest.raises(ValueError, match="give one of rollout.importance"):
        agreement(found, found)
    with pytest.raises(ValueError, match="differ in their task_fingerprint"):
        agreement(found, importance(model, random_task(model)))
    with pytest.raises(ValueError, match="'nothing'"):
        importance(model, task, source="nothing")
