"""Label words as anchors: the identity of the sums, finite differences, hooks, and a planted collector and reader."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from interp.flow import _labels, anchors
from interp.flow.anchor_reweighting import _scaling, reweighted, train
from interp.flow.anchors import aucroc, isolation, saliency
from interp.models import toy
from interp.models._planted_build import WORDS, blank, finish, head
from interp.models._planted_case import any_of, prompt
from interp.models.hooks import run
from interp.models.program import program
from interp.tasks.task import Task

N_POS = 9

random_model = cache(lambda architecture: toy.random(architecture, weights="raw"))


def random_task(model, *, n=3, padded=False):
    tokens = toy.random_tokens(model, n, N_POS)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    options = torch.tensor([[10, 20], [20, 10], [11, 21]])[:n]
    positions = {"label_0": torch.tensor([4, 2, 3])[:n], "label_1": torch.tensor([6, 6, 5])[:n]}
    positions["end"] = torch.full((n,), N_POS - 1)
    return Task(
        "random", tuple(f"prompt {i}" for i in range(n)), tokens, "drawn", answers=options[:, 1], options=options,
        positions=positions, mask=mask if padded else None,
    )  # fmt: skip


@cache
def collector_reader():
    """Layer 0: each label word attends evenly to the text before it; layer 1: the end reads the label words.

    Words 0 to 2 are text, 3 and 4 label words. The prompt is <bos> text text label_0 text text label_1 filler end.
    """
    build = blank(2, 3, n_words=5, n_neurons=1, collected=3, out=3)
    text, labels = build.words[:3], build.words[3:]
    head(
        build, (0, 1), asks=any_of(labels), want=any_of(labels), offer=any_of(text), value=text,
        write=build["collected"],
    )  # fmt: skip
    head(
        build, (1, 2), asks=build.end, want=build.end, offer=any_of(labels), value=build["collected"],
        write=build["out"],
    )  # fmt: skip
    model = finish(build, out=build["out"], scale=6.0)
    texts = [(0, 0, 0, 1), (1, 1, 1, 2), (2, 2, 0, 2), (1, 0, 1, 1)]
    tokens = [prompt(9, {1: a, 2: b, 3: 3, 4: c, 5: d, 6: 4}) for a, b, c, d in texts]
    positions = {name: torch.full((4,), at) for name, at in (("label_0", 3), ("label_1", 6), ("end", 8))}
    answers = torch.tensor([0, 1, 2, 1]) + WORDS
    options = (torch.arange(3) + WORDS).expand(4, 3)
    names = tuple("abcd")
    return model, Task(
        "collect", names, torch.tensor(tokens), "planted", answers=answers, options=options, positions=positions
    )


# --- saliency ------------------------------------------------------------------------------------------------------


def test_planted_flow_is_text_to_label_then_label_to_end():
    model, task = collector_reader()
    found = saliency(model, task).grid("layer", "component")
    assert found.loc[0, "wp"] > 0.01 and found.loc[1, "pq"] > 0.01
    assert found.loc[0, "pq"] == 0 and found.loc[1, "wp"] == 0
    assert (found["ww"] == 0).all()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("padded", [False, True])
def test_kinds_and_their_pairs_make_up_all_below_the_diagonal(architecture, padded):
    model = random_model(architecture)
    task = random_task(model, padded=padded)
    found = saliency(model, task)
    value = found.arrays["value"][1]
    pairs = found.table.groupby(["prompt", "layer", "component"], sort=False)["value_pairs"].first().to_numpy()
    below = np.tril(found.arrays["saliency"][1], -1).sum((2, 3))
    # Sums of float64 numbers; the gradients are the same ones on both sides.
    np.testing.assert_allclose((value * pairs.reshape(value.shape)).sum(-1), below, rtol=1e-9)
    n_tokens = np.array([N_POS - 2 if padded else N_POS, N_POS, N_POS])
    np.testing.assert_array_equal(pairs.reshape(value.shape).sum(-1)[:, 0], n_tokens * (n_tokens - 1) / 2)


def test_kinds_by_brute_force():
    model = random_model("llama")
    task = random_task(model, padded=True)
    found = saliency(model, task)
    size = found.arrays["saliency"][1]
    for row in range(3):
        first = 2 if row == 0 else 0
        labels = {int(task.positions[name][row]) for name in ("label_0", "label_1")}
        edges = {"wp": [], "pq": [], "ww": []}
        for query in range(first, N_POS):
            for key in range(first, query):
                at_end = query == N_POS - 1 and key in labels
                edges["wp" if query in labels else "pq" if at_end else "ww"].append(size[row, :, query, key])
        by_hand = np.stack([np.mean(edges[kind], axis=0) for kind in anchors.COMPONENTS], -1)
        np.testing.assert_allclose(found.arrays["value"][1][row], by_hand, rtol=1e-9)


@torch.no_grad()
def test_signed_saliency_is_the_slope_of_the_loss():
    """Scaling one attention weight in all heads by 1 + e, by a hook, changes the loss by e times the saliency."""
    model = random_model("llama")
    task = random_task(model, padded=True)
    found = saliency(model, task)
    signed = found.arrays["signed"][1]
    np.testing.assert_array_equal(np.abs(signed), found.arrays["saliency"][1])

    def loss(layer, query, key, factor):
        def scaled(pattern, hook):
            pattern = pattern.clone()
            pattern[:, :, query, key] *= factor
            return pattern

        hooks = [(f"blocks.{layer}.attn.hook_pattern", scaled)]
        logits = run(model, task.clean, hooks=hooks, mask=task.mask).logits[:, -1].double()
        return -logits.log_softmax(-1)[torch.arange(3), task.answers].numpy()

    for layer, query, key in [(0, 6, 2), (0, 8, 4), (1, 5, 3), (1, 8, 6), (2, 8, 5), (2, 6, 2)]:
        slope = (loss(layer, query, key, 1.02) - loss(layer, query, key, 0.98)) / 0.04
        # Float32 logits of order ten over 0.04: 1e-4; the rest is curvature.
        np.testing.assert_allclose(signed[:, layer, query, key], slope, rtol=1e-2, atol=3e-4)


def test_batches_and_padding_change_nothing():
    model = random_model("llama")
    task = random_task(model, padded=True)
    whole, single = (saliency(model, task, batch_size=size).arrays["value"][1] for size in (3, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-3, atol=1e-6)  # float32 gradients on other shapes
    positions = {name: where - 2 for name, where in task.positions.items()}
    alone = replace(task, clean=task.clean[:, 2:], mask=None, positions=positions)[:1]
    np.testing.assert_allclose(whole[:1], saliency(model, alone).arrays["value"][1], rtol=1e-3, atol=1e-6)


# --- isolation -----------------------------------------------------------------------------------------------------


def test_isolating_planted_label_words():
    """Nothing is collected without layer 0; in layer 1 the label words look at nothing, so nothing changes there."""
    model, task = collector_reader()
    found = isolation(model, task, layers=1, draws=3)
    mean = found.grid("target", "component")
    assert mean.loc["label", "first"] == 0.25  # three equal logits: the first option, right for one prompt
    assert mean.loc["label", "last"] == 1 and (mean.loc["random"] == 1).all()
    words = found.grid("target", "component", value="value_words")
    assert words.loc["label", "last"] == 1 and (words.loc["random"] == 1).all()


@torch.no_grad()
def test_isolation_is_what_a_hook_does():
    model = random_model("llama")
    task = random_task(model, padded=True)
    found = isolation(model, task, layers=2)

    def cut(pattern, hook):
        pattern = pattern.clone()
        for row in range(3):
            for name in ("label_0", "label_1"):
                at = int(task.positions[name][row])
                pattern[row, :, at, :at] = 0
        return pattern

    for side, layers in (("first", (0, 1)), ("last", (1, 2))):
        hooks = [(f"blocks.{layer}.attn.hook_pattern", cut) for layer in layers]
        before, after = (run(model, task.clean, hooks=h, mask=task.mask).logits[:, -1] for h in ([], hooks))
        rows = found.filter(target="label", component=side).table
        for row in range(3):
            one, other = (set(logits[row].topk(5).indices.tolist()) for logits in (before, after))
            assert rows["value_words"][row] == len(one & other) / len(one | other)
            same = [logits[row, task.options[row]].argmax() for logits in (before, after)]
            assert rows["value"][row] == float(same[0] == same[1])
    assert found.table["value_words"].min() < 1


def test_random_positions_are_none_of_the_named():
    task = random_task(random_model("llama"), padded=True)
    labels = torch.stack([task.positions["label_0"], task.positions["label_1"]], 1)
    drawn = _labels.elsewhere(task, labels, 2, task.positions["end"], 20, 0)
    for row, allowed in enumerate(({3, 5, 7}, {1, 3, 4, 5, 7}, {1, 2, 4, 6, 7})):
        assert set(drawn[row].flatten().tolist()) == allowed
        assert all(len(set(draw.tolist())) == 2 for draw in drawn[row])


# --- re-weighting --------------------------------------------------------------------------------------------------


def test_no_reweighting_is_the_model_and_its_slope_the_signed_saliency():
    model = random_model("llama")
    task = random_task(model, padded=True)
    betas = torch.zeros(3, 4, 2, requires_grad=True)
    found = reweighted(model, task, betas.detach())
    steps = program(model)
    plain = _labels.logits_at_end(model, steps, task).double()
    assert (found.arrays["logits"][1] == plain.gather(1, task.options).numpy()).all()  # times exp(0): the same bits
    bridge = run(model, task.clean, mask=task.mask).logits[:, -1].double().log_softmax(-1)
    expected = bridge[torch.arange(3), task.answers]
    np.testing.assert_allclose(found.table["value_log_prob"], expected, atol=1e-4)  # float32, two programs
    signed = saliency(model, task).arrays["signed"][1]
    labels = _labels.label_positions(model, task)
    for row in range(3):
        part = task[row : row + 1]
        loss = _labels.answer_loss(model, steps, part, _scaling(part, labels[row : row + 1], betas)).sum()
        (slope,) = torch.autograd.grad(loss, [betas])
        by_layer = signed[row][:, N_POS - 1, labels[row].numpy()]
        np.testing.assert_allclose(slope.sum(1), by_layer, rtol=1e-3, atol=1e-5)  # float32


@torch.no_grad()
def test_reweighting_is_what_a_hook_does():
    model = random_model("gpt2")
    task = random_task(model)
    betas = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))

    def hook_of(layer):
        def scaled(pattern, hook):
            pattern = pattern.clone()
            for row in range(3):
                for label in range(2):
                    pattern[row, :, -1, task.positions[f"label_{label}"][row]] *= betas[layer, :, label].exp()
            return pattern

        return f"blocks.{layer}.attn.hook_pattern", scaled

    logits = run(model, task.clean, hooks=[hook_of(layer) for layer in range(3)]).logits[:, -1]
    found = reweighted(model, task, betas)
    np.testing.assert_allclose(found.arrays["logits"][1], logits.gather(1, task.options), rtol=1e-4, atol=1e-4)
    right = logits.gather(1, task.options).argmax(1) == 1  # the answer is the second option
    assert found.table["value"].tolist() == right.double().tolist()


def test_training_finds_the_label_word_that_matters():
    """The answer stands between the label words: the reader turns from label_0 to label_1; no other beta moves."""
    model, task = collector_reader()
    task = task[[1, 2]]
    task = replace(
        task, clean=torch.tensor([prompt(9, {1: a, 2: a, 3: 3, 4: b, 5: b, 6: 4}) for a, b in [(2, 1), (0, 2)]])
    )
    before = {name: weight.clone() for name, weight in model.bridge.named_parameters()}
    betas, steps = train(model, task, epochs=10)
    assert betas[1, 2, 0] < -0.5 and betas[1, 2, 1] > 0.5
    betas[1, 2] = 0
    assert not betas.any()
    assert steps.table["value"].iloc[-2:].mean() < 0.5 * steps.table["value"].iloc[:2].mean()
    assert all(torch.equal(weight, before[name]) for name, weight in model.bridge.named_parameters())
    again = train(model, task, epochs=10)[1]
    assert again.table.equals(steps.table)
    assert sorted(steps.table["prompt"].iloc[:2]) == [0, 1]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_refusals():
    model = random_model("llama")
    task = random_task(model)
    where = dict(task.positions)
    for positions, text in [
        ({"end": where["end"]}, "without a gap"),
        ({"end": where["end"], "label_1": where["label_1"]}, "without a gap"),
        (where | {"label_1": where["label_0"]}, "different tokens"),
        (where | {"label_1": where["end"]}, "before the end"),
        (where | {"end": where["end"] - 1}, "its last token"),
    ]:
        with pytest.raises(ValueError, match=text):
            saliency(model, replace(task, positions=positions))
    with pytest.raises(ValueError, match="no answers"):
        saliency(model, replace(task, answers=None))
    with pytest.raises(ValueError, match="needs options"):
        isolation(model, replace(task, options=None))
    with pytest.raises(ValueError, match="has 3: take 1 to 3"):
        isolation(model, task)
    with pytest.raises(ValueError, match="draws=0"):
        isolation(model, task, layers=1, draws=0)
    with pytest.raises(ValueError, match="is \\(3, 4, 2\\)"):
        reweighted(model, task, torch.zeros(3, 4, 3))
    with pytest.raises(ValueError, match="answers and options"):
        train(model, replace(task, answers=None))
    with pytest.raises(ValueError, match="epochs=0"):
        train(model, task, epochs=0)
    short = replace(
        task,
        clean=task.clean[:, :5],
        positions={
            "end": torch.full((3,), 4),
            "label_0": where["label_0"] * 0 + 2,
            "label_1": where["label_0"] * 0 + 3,
        },
    )
    with pytest.raises(ValueError, match="take longer prompts"):
        isolation(model, short, layers=1)


# --- attention as a score ------------------------------------------------------------------------------------------


def labelled(model, *, n=12, padded=False):
    """Prompts whose label words are their options, the same ones in all."""
    tokens = toy.random_tokens(model, n, N_POS)
    tokens[:, 3], tokens[:, 6] = 10, 20
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    options = torch.tensor([[10, 20]] * n)
    positions = {name: torch.full((n,), at) for name, at in (("label_0", 3), ("label_1", 6), ("end", N_POS - 1))}
    return Task(
        "labelled", tuple(map(str, range(n))), tokens, "drawn", answers=options[torch.arange(n), torch.arange(n) % 2],
        options=options, positions=positions, mask=mask if padded else None,
    )  # fmt: skip


@torch.no_grad()
def test_aucroc_by_pairs_of_prompts():
    """The share of (said, not said) pairs whose attention is in order, counted one by one on the bridge's patterns."""
    model = random_model("llama")
    task = labelled(model, padded=True)
    found = aucroc(model, task, batch_size=5)
    seen = run(model, task.clean, mask=task.mask, capture=[f"blocks.{i}.attn.hook_pattern" for i in range(3)])
    said = seen.logits[:, -1].gather(1, task.options).argmax(1)
    assert 0 < said.sum() < len(said) and found.arrays["predicted"][1].tolist() == said.tolist()
    areas = []
    for layer in range(3):
        attention = seen.cache[f"blocks.{layer}.attn.hook_pattern"][:, :, -1, [3, 6]].mean(1)
        np.testing.assert_allclose(found.arrays["attention"][1][:, layer], attention, atol=1e-6)  # float32
        for option in range(2):
            yes, no = (found.arrays["attention"][1][(said == option).numpy() == kind, layer, option] for kind in (1, 0))
            pairs = [float(a > b) + 0.5 * float(a == b) for a in yes for b in no]
            areas.append(np.mean(pairs))
    np.testing.assert_allclose(found.arrays["auc"][1].ravel(), areas, atol=1e-12)
    above = found.table["value"] - 0.5
    np.testing.assert_allclose(found.table["value"], np.reshape(areas, (3, 2)).mean(1), atol=1e-12)
    np.testing.assert_allclose(found.table["value_cumulative"], above.cumsum() / above.sum(), atol=1e-12)
    assert found.table["value_cumulative"].iloc[-1] == pytest.approx(1)


def test_aucroc_of_several_label_words_and_of_what_is_never_said():
    model = random_model("llama")
    task = labelled(model)
    twice = replace(task, clean=task.clean.clone(), positions=dict(task.positions) | {"label_2": torch.full((12,), 5)})
    twice.clean[:, 5] = 10
    found = aucroc(model, twice).arrays["attention"][1]
    plain = replace(twice, positions=task.positions)
    first = aucroc(model, plain).arrays["attention"][1]
    assert (found[:, :, 0] > first[:, :, 0]).all() and (found[:, :, 1] == first[:, :, 1]).all()
    three = replace(twice, positions=twice.positions, options=torch.tensor([[10, 20, 30]] * 12))
    three.clean[:, 4] = 30
    three = replace(three, positions=dict(three.positions) | {"label_3": torch.full((12,), 4)})
    auc = aucroc(model, three)
    said = set(auc.arrays["predicted"][1].tolist())
    never = [option for option in range(3) if option not in said]
    assert np.isnan(auc.arrays["auc"][1][:, never]).all() and not auc.table.isna().any(axis=None)


def test_aucroc_refuses():
    model = random_model("llama")
    task = labelled(model)
    with pytest.raises(ValueError, match="prompt 0: its label words are tokens \\[10, 20\\] .* \\[10, 30\\]"):
        aucroc(model, replace(task, answers=None, options=torch.tensor([[10, 30]] * 12)))
    changed = task.options.clone()
    changed[4] = changed[4].flip(0)
    with pytest.raises(ValueError, match="prompt 4: .* the same one of them in each"):
        aucroc(model, replace(task, options=changed))
    said = aucroc(model, task).arrays["predicted"][1]
    with pytest.raises(ValueError, match="says the same of all"):
        aucroc(model, task[np.flatnonzero(said == 0)])
