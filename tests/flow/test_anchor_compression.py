"""Context compression: the whole kept is the whole run, what is dropped is masked, batches, padding, and the parts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from interp.flow.anchor_compression import TARGETS, anchors_of, compressed, keep, resume
from interp.models import toy
from interp.models.hooks import run
from interp.tasks.task import Task

N_POS, N = 14, 4
#: Rows with queries of several lengths; the first has two tokens of padding.
QUERY = [9, 10, 8, 10]
ARCHITECTURES = ["gpt2", "llama", "gpt_neox", "mistral", "qwen3", "gemma2"]

random_model = cache(lambda architecture: toy.random(architecture, weights="raw"))


def random_task(model):
    tokens = toy.random_tokens(model, N, N_POS)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    options = torch.tensor([[10, 20, 30]] * N)
    places = {"format_0": [2, 0, 1, 1], "label_0": [4, 3, 2, 3], "format_1": [5, 5, 4, 4], "label_1": [7, 7, 6, 8],
              "query": QUERY, "end": [N_POS - 1] * N}  # fmt: skip
    return Task(
        "random", tuple("abcd"), tokens, "drawn", answers=options[:, 1], options=options, mask=mask,
        positions={name: torch.tensor(at) for name, at in places.items()},
    )  # fmt: skip


def before(task):
    """All positions of the demonstrations, -1 where a prompt has fewer."""
    index = torch.arange(max(QUERY)).expand(N, -1)
    first = task.mask.long().argmax(1)[:, None]
    return torch.where((index >= first) & (index < task.positions["query"][:, None]), index, -1)


@torch.no_grad()
def masked(model, task, kept):
    """Brute force: the whole prompt by the bridge, in which tokens of the query do not see what is dropped."""
    sets = [set(row.tolist()) for row in kept]

    def drop(scores, hook):
        scores = scores.clone()
        for row in range(N):
            for key in set(range(QUERY[row])) - sets[row]:
                scores[row, :, QUERY[row] :, key] = float("-inf")
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", drop) for layer in range(model.n_layers)]
    return run(model, task.clean, hooks=hooks, mask=task.mask).logits[:, -1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keeping_everything_is_the_whole_run(architecture):
    model = random_model(architecture)
    task = random_task(model)
    whole = run(model, task.clean, mask=task.mask).logits[:, -1]
    # Float32 sums in another order.
    torch.testing.assert_close(resume(model, task, keep(model, task, before(task))), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_dropped_is_masked_for_the_query_alone(architecture):
    model = random_model(architecture)
    task = random_task(model)
    for kept in (anchors_of(model, task), torch.tensor([[2, -1], [8, 0], [-1, 7], [9, 4]])):
        found = resume(model, task, keep(model, task, kept))
        torch.testing.assert_close(found, masked(model, task, kept), rtol=1e-4, atol=1e-4)
        whole = run(model, task.clean, mask=task.mask).logits[:, -1]
        assert (found - whole).abs().amax(1).min() > 1e-3, "it makes a difference in every prompt"


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_keeping_nothing_is_the_query_alone_at_its_positions(architecture):
    model = random_model(architecture)
    task = random_task(model)
    none = torch.empty(N, 0, dtype=torch.long)
    found = resume(model, task, keep(model, task, none))
    inner = model.bridge.original_model
    for row in range(N):
        first = int(task.mask[row].argmax())
        places = torch.arange(QUERY[row] - first, N_POS - first)[None]
        alone = inner(input_ids=task.clean[row : row + 1, QUERY[row] :], position_ids=places).logits[:, -1]
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_some_of_what_is_kept_is_what_they_would_be_alone():
    model = random_model("llama")
    task = random_task(model)
    every, some = keep(model, task, before(task)), keep(model, task, anchors_of(model, task))
    picked = every.only(some.positions)
    assert torch.equal(picked.keys, some.keys) and torch.equal(picked.values, some.values)
    assert torch.equal(picked.positions, some.positions)


def test_batches_and_padding_change_nothing():
    model = random_model("llama")
    task = random_task(model)
    whole, single = (compressed(model, task, draws=3, batch_size=size).table for size in (N, 1))
    assert whole.equals(single)
    kept = resume(model, task, keep(model, task, anchors_of(model, task)))
    first = replace(
        task[:1], clean=task.clean[:1, 2:], mask=None, positions={n: at[:1] - 2 for n, at in task.positions.items()}
    )
    alone = resume(model, first, keep(model, first, anchors_of(model, first)))
    torch.testing.assert_close(kept[:1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_target_by_hand():
    model = random_model("gpt2")
    task = random_task(model)
    found = compressed(model, task, draws=40, seed=1)
    rows = {target: found.filter(target=target).table.reset_index(drop=True) for target in TARGETS}
    whole = run(model, task.clean, mask=task.mask).logits[:, -1]
    anchors = masked(model, task, anchors_of(model, task))
    text = []
    for row in range(N):
        at = [*anchors_of(model, task)[row].tolist(), *range(QUERY[row], N_POS)]
        text.append(run(model, task.clean[row : row + 1, at]).logits[0, -1])
    for target, logits in (("full", whole), ("anchor", anchors), ("text", torch.stack(text))):
        for row in range(N):
            said = [values[row, task.options[row]].argmax() for values in (whole, logits)]
            tops = [set(values[row].topk(5).indices.tolist()) for values in (whole, logits)]
            assert rows[target]["value"][row] == float(said[0] == said[1])
            assert rows[target]["value_words"][row] == len(tops[0] & tops[1]) / len(tops[0] | tops[1])
            assert rows[target]["value_right"][row] == float(said[1] == 1)
    assert (rows["full"]["value"] == 1).all() and rows["anchor"]["value_words"].min() < 1
    assert rows["text"]["value_words"].tolist() != rows["anchor"]["value_words"].tolist()
    by_draw = found.arrays["loyalty"][1]
    assert by_draw.shape == (40,) and by_draw.std() > 0
    # Means of the same 0s and 1s.
    assert rows["random_top"]["value"].mean() == pytest.approx(by_draw.max(), abs=1e-12)
    assert rows["random"]["value"].mean() == pytest.approx(by_draw.mean(), abs=1e-12)


@torch.no_grad()
def test_random_words_take_the_place_of_label_words():
    """With one text token to choose from, the random set is known."""
    model = random_model("llama")
    task = random_task(model)
    places = {"format_0": 2, "format_1": 3, "label_0": 4, "format_2": 5, "format_3": 1, "query": 7, "end": N_POS - 1}
    task = replace(task, positions={name: torch.full((N,), at) for name, at in places.items()}, mask=None)
    found = compressed(model, task, draws=2).filter(target="random").table["value_words"]
    logits = resume(model, task, keep(model, task, torch.tensor([[1, 2, 3, 5, 6]] * N)))
    whole = run(model, task.clean).logits[:, -1]
    tops = [[set(row.topk(5).indices.tolist()) for row in values] for values in (whole, logits)]
    assert found.tolist() == [len(a & b) / len(a | b) for a, b in zip(*tops, strict=True)]


def test_positions_in_order():
    model = random_model("llama")
    assert anchors_of(model, random_task(model)).tolist() == [[2, 4, 5, 7], [0, 3, 5, 7], [1, 2, 4, 6], [1, 3, 4, 8]]


def test_refusals():
    model = random_model("llama")
    task = random_task(model)
    where = dict(task.positions)
    with pytest.raises(ValueError, match="prompt 0: positions \\[1\\].*demonstrations are at 2 to 8"):
        keep(model, task, torch.tensor([[1]] * N))
    with pytest.raises(ValueError, match="prompt 2: positions \\[8\\].*demonstrations are at 0 to 7"):
        keep(model, task, torch.tensor([[8]] * N))
    lacking = {name: {n: at for n, at in where.items() if n != name} for name in ("query", "format_0", "label_0")}
    with pytest.raises(ValueError, match="it needs 'query'"):
        compressed(model, replace(task, positions=lacking["query"]))
    with pytest.raises(ValueError, match="it needs the formatting"):
        compressed(model, replace(task, positions=lacking["format_0"]))
    with pytest.raises(ValueError, match="without a gap"):
        compressed(model, replace(task, positions=lacking["label_0"]))
    with pytest.raises(ValueError, match="answers and options"):
        compressed(model, replace(task, answers=None))
    with pytest.raises(ValueError, match="draws=0"):
        compressed(model, task, draws=0)
    short = where | {"query": torch.tensor([8, 8, 7, 9]), "format_2": where["label_0"] + 2}
    with pytest.raises(ValueError, match="take longer prompts"):
        compressed(model, replace(task, positions=short | {"label_2": where["label_1"] - 1}))
    assert np.isfinite(compressed(model, task, draws=1).table["value"]).all()
