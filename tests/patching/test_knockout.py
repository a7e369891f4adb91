"""Attention knock-out: renormalised rows by hand, planted edges, windows, spans, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.core.readout import readout
from interp.models import ModelCheckError, load, run, toy
from interp.models.vision import toy_vit
from interp.patching.knockout import attention
from interp.tasks import Task

#: Log-probabilities of the toys are about 5 nats; sums in another order differ by 1e-6 a layer.
TOLERANCE = 1e-4


def cut_by_hand(model, task, edges, layers, heads=None, metric="log_prob"):
    """The metric with patterns whose cut entries are zero and whose rows are scaled to 1 again."""

    def hook(pattern, hook):
        left = pattern.clone()
        for prompt, query, key in edges:
            left[prompt, slice(None) if heads is None else heads, query, key] = 0.0
        return left / left.sum(-1, keepdim=True).clamp(min=1e-6)  # the bridge's rows of padding are zero

    hooks = [(f"blocks.{layer}.attn.hook_pattern", hook) for layer in layers]
    return readout(model, task, metric).of(run(model, task.clean, hooks=hooks, mask=task.mask).logits).numpy()


@pytest.mark.parametrize("architecture", [name for name in toy.ARCHITECTURES if name != "opt"])
def test_cut_edges_are_rows_renormalised_by_hand(architecture, random_model, random_task):
    model = random_model(architecture)
    task = random_task(model)
    early = task.positions["early"].tolist()
    result = attention(model, task, [("end", "early"), ("early", 3)], metric="log_prob")
    assert set(result.table["target"]) == {"end <- early", "early <- 3"} and result.unit == "nats"
    for layer in range(3):
        rows = result.filter(layer=layer, target="end <- early").table
        expected = cut_by_hand(model, task, [(i, 8, early[i]) for i in range(3)], [layer])
        np.testing.assert_allclose(rows["value_metric"], expected, atol=TOLERANCE)
        np.testing.assert_allclose(rows["value"], expected - result.arrays["clean"][1], atol=TOLERANCE)
    rows = result.filter(layer=0, target="early <- 3").table
    expected = cut_by_hand(model, task, [(i, early[i], 3) for i in (0, 1)], [0])
    # In prompt 2 "early" is 3 itself, which sees other tokens still.
    np.testing.assert_allclose(rows["value_metric"][:2], expected[:2], atol=TOLERANCE)
    assert result.table["value"].abs().max() > 0.01


def test_a_query_that_sees_only_itself(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    others = {
        "others": [("end", (2, 7))],
        "with the first": [("end", (0, 7))],
        "one by one": [(8, k) for k in range(2, 8)],
    }
    with pytest.raises(ValueError, match="none that attention uses"):
        attention(model, task[:1], {"padding": [("end", (0, 1))]})
    result = attention(model, task, others, window=20, layers=[1], metric="log_prob")
    found = {name: rows["value_metric"].to_numpy() for name, rows in result.table.groupby("target")}
    hooks = [(i, 8, k) for i in range(3) for k in range(2, 8)]
    np.testing.assert_allclose(found["others"], cut_by_hand(model, task, hooks, range(3)), atol=TOLERANCE)
    np.testing.assert_allclose(found["others"], found["one by one"], atol=TOLERANCE)
    # The end alone: as a prompt of one token at that place (rotary positions are relative).
    alone = readout(model, task, "log_prob")
    one = replace(alone, where=torch.zeros(3, dtype=torch.long))
    np.testing.assert_allclose(
        found["with the first"], one.of(run(model, task.clean[:, 8:]).logits), atol=TOLERANCE
    )  # fmt: skip


def test_spans_are_each_prompts_own(random_model, random_task):
    model = random_model("gpt2")
    task = random_task(model)
    task = replace(task, positions={**task.positions, "last": torch.tensor([4, 7, 5])})
    result = attention(model, task, [("end", ("early", "last"))], metric="log_prob")
    assert set(result.table["target"]) == {"end <- early..last"}
    edges = [(i, 8, k) for i, (a, b) in enumerate([(4, 4), (5, 7), (3, 5)]) for k in range(a, b + 1)]
    for layer in range(3):
        expected = cut_by_hand(model, task, edges, [layer])
        np.testing.assert_allclose(result.filter(layer=layer).table["value_metric"], expected, atol=TOLERANCE)
    dims, array = result.arrays["value"]
    assert dims == ("prompt", "layer", "target") and array.shape == (3, 3, 1)


def test_windows_and_heads(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    edges = [(i, 8, int(task.positions["early"][i])) for i in range(3)]
    wide = attention(model, task, [("end", "early")], window=2, metric="log_prob")
    for layer, layers in ((0, [0]), (1, [0, 1]), (2, [1, 2])):
        expected = cut_by_hand(model, task, edges, layers)
        np.testing.assert_allclose(wide.filter(layer=layer).table["value_metric"], expected, atol=TOLERANCE)
    single = attention(model, task, [("end", "early")], heads=[(1, 0), (1, 3)], metric="log_prob")
    assert "layer" not in single.table and single.arrays["value"][0] == ("prompt", "target")
    expected = cut_by_hand(model, task, edges, [1], heads=[0, 3])
    np.testing.assert_allclose(single.table["value_metric"], expected, atol=TOLERANCE)
    together, layer = (
        attention(model, task, [("end", "early")], **where, metric="log_prob").table["value"]
        for where in ({"heads": [(1, head) for head in range(4)]}, {"layers": [1]})
    )
    np.testing.assert_allclose(together, layer, atol=TOLERANCE)


def test_fast_is_hooks_and_batches_change_nothing(random_model, random_task):
    model = random_model("mistral")
    task = random_task(model)
    options = {"edges": {"set": [("end", (3, 6)), ("early", 2)], "one": [("end", "end")]}, "metric": "log_prob"}
    fast = attention(model, task, **options)
    for other in ({"exact_path": "hooks"}, {"batch_size": 1}, {"batch_size": 2}):
        changed = attention(model, task, **options, **other)
        np.testing.assert_allclose(changed.table["value"], fast.table["value"], atol=TOLERANCE)
    assert fast.table["value"].abs().max() > 0.01


def test_planted_edges_are_found_and_others_do_nothing(planted_case):
    case, task = planted_case("ioi_like")
    task = replace(task, corrupt=None)
    edges = [("end", "io"), ("end", "s1"), ("end", "s2"), ("s2", "s1"), ("s2", "io")]
    result = attention(case.model, task, edges, metric="logit_diff")
    found = result.table.groupby(["layer", "target"])["value"].mean()
    gap = result.arrays["clean"][1].mean()
    # Layer 0: the duplicate-token head, from S2 to S1. Layer 1: inhibition, from the end to S2. Layer 2: movers, to IO.
    assert {key for key, value in found.items() if abs(value) > 0.1 * gap} == {
        (0, "s2 <- s1"), (1, "end <- s2"), (2, "end <- io"),
    }  # fmt: skip
    heads = attention(case.model, task, [("end", "s2")], heads=[(1, 0)], metric="logit_diff")
    np.testing.assert_allclose(heads.table["value"].mean(), found[1, "end <- s2"], rtol=1e-4)
    idle = attention(case.model, task, [("end", "s2")], heads=[(1, 1), (1, 2)], metric="logit_diff")
    np.testing.assert_allclose(idle.table["value"], 0, atol=1e-3 * gap)


def test_probabilities_by_default(random_model, random_task):
    model = random_model("llama")
    result = attention(model, random_task(model), [("end", 4)])
    assert result.unit == "probability"
    assert (result.table["value_metric"].between(0, 1)).all()


def test_refusals(random_model, random_task):
    model = random_model("llama")
    task = random_task(model)
    edge = [("end", "early")]
    for options, message in (
        ({"edges": []}, "there are no edges to cut"),
        ({"edges": {"none": []}}, "there are no edges to cut"),
        ({"edges": [("end", "verb")]}, "no position 'verb'; it has early, end"),
        ({"edges": [("end", 9)]}, "position 9 is outside"),
        ({"edges": [("early", "end")]}, "edges 'early <- end' are none that attention uses"),
        ({"edges": [("end", ("end", "early"))]}, "starts at 8 and ends at 4"),
        ({"edges": [("end", (0, 8))]}, "cut every key that position 8 of prompt 0 sees in layer 0"),
        ({"edges": [(2, 2)]}, "cut every key that position 2 of prompt 0 sees"),  # padding before it
        ({"layers": []}, r"layers=\[\] leaves nothing to cut"),
        ({"layers": [3]}, "layer 3: .* has layers 0 to 2"),
        ({"window": 0}, "window=0"),
        ({"heads": []}, r"heads=\[\] leaves nothing to cut"),
        ({"heads": [(0, 4)]}, "names head 4"),
        ({"heads": [(5, 0)]}, "layers 0 to 2"),
        ({"heads": [(0, 0)], "layers": [1]}, "leave layers and window out"),
        ({"heads": [(0, 0)], "window": 3}, "leave layers and window out"),
        ({"metric": "loss"}, "metric 'loss' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(model, task, **{"edges": edge, **options})
    with pytest.raises(ValueError, match="load a decoder"):
        attention(load(toy_vit()), task, edge)


def test_sliding_windows_count(random_model):
    # Mistral's toy sees 8 tokens: at position 15 no earlier one than 8.
    model = random_model("mistral")
    tokens = toy.random_tokens(model, 2, 16)
    task = Task("long", ("a", "b"), tokens, "drawn", answers=tokens[:, 0], wrong=tokens[:, 1])
    with pytest.raises(ValueError, match="outside a sliding window"):
        attention(model, task, [(15, (0, 7))])
    with pytest.raises(ValueError, match="cut every key that position 15"):
        attention(model, task, [(15, (8, 15))])
    assert attention(model, task, [(15, (8, 14))]).table["value"].abs().max() > 0


def test_an_architecture_that_only_shows_its_scores(random_model, random_task):
    model = random_model("opt")
    task = random_task(model)
    with pytest.raises(ModelCheckError, match="hook_attn_scores' does not change the output"):
        attention(model, task, [("end", "early")], exact_path="hooks")
    assert attention(model, task, [("end", "early")]).table["value"].abs().max() > 0
