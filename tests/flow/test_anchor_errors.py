"""Error diagnosis: distances of keys by the bridge's own, one pair and head at a time, and confusions counted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from interp.flow.anchor_errors import confusion
from interp.models import toy
from interp.models.hooks import run
from interp.tasks.task import Task

N, N_POS, LABELS = 12, 10, (10, 20, 30)

random_model = cache(lambda architecture: toy.random(architecture, weights="raw"))


def labelled(model):
    tokens = toy.random_tokens(model, N, N_POS)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    positions = {}
    for i, label in enumerate(LABELS):
        tokens[:, 2 * i + 2] = label
        positions[f"label_{i}"] = torch.full((N,), 2 * i + 2)
    options = torch.tensor([LABELS] * N)
    return Task(
        "labelled", tuple(map(str, range(N))), tokens, "drawn", answers=options[torch.arange(N), torch.arange(N) % 3],
        options=options, positions=positions | {"end": torch.full((N,), N_POS - 1)}, mask=mask,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_distances_and_confusions_one_by_one(architecture):
    model = random_model(architecture)
    task = labelled(model)
    found = confusion(model, task, n_components=3, batch_size=5).table
    names = [f"blocks.{layer}.attn.hook_{site}" for layer in range(3) for site in ("q", "k")]
    seen = run(model, task.clean, mask=task.mask, capture=names)
    pairs = list(combinations(range(3), 2))
    for layer in range(3):
        q, k = (seen.cache[f"blocks.{layer}.attn.hook_{site}"].double().numpy() for site in ("q", "k"))
        squares = dict.fromkeys(pairs, 0.0)
        for head in range(q.shape[2]):
            queries = q[:, -1, head]
            size, directions = np.linalg.eigh(np.cov(queries.T))
            assert (np.diff(size) >= 0).all()
            own = k[:, :, head // (q.shape[2] // k.shape[2])]
            for i, j in pairs:
                apart = own[:, 2 * i + 2].mean(0) - own[:, 2 * j + 2].mean(0)
                squares[i, j] += ((directions[:, -3:].T @ apart) ** 2).sum()
        distance = np.sqrt(list(squares.values()))
        # Float32 activations.
        np.testing.assert_allclose(found.loc[found["layer"] == layer, "value"], distance / distance.max(), rtol=1e-4)
    logits = seen.logits[:, -1]
    for pair, (i, j) in enumerate(pairs):
        wrong = []
        for row in range(N):
            if row % 3 in (i, j):
                other = j if row % 3 == i else i
                wrong.append(float(logits[row, LABELS[other]] > logits[row, LABELS[row % 3]]))
        assert (found["value_confused"][pair::3] == np.mean(wrong)).all()
    assert len(set(found["value_confused"])) > 1


def test_all_directions_are_the_plain_distance():
    """With as many components as dimensions the projection turns nothing away; few shorten every distance."""
    model = random_model("llama")
    task = labelled(model)
    full = confusion(model, task, n_components=model.d_head)
    names = [f"blocks.{layer}.attn.hook_k" for layer in range(3)]
    keys = run(model, task.clean, mask=task.mask, capture=names).cache
    groups = model.n_heads // model.n_key_value_heads
    for layer, name in enumerate(names):
        mean = keys[name].double().mean(0)[[2, 4, 6]].numpy()
        apart = [np.sqrt(groups * ((mean[i] - mean[j]) ** 2).sum()) for i, j in combinations(range(3), 2)]
        value = full.table.loc[full.table["layer"] == layer, "value"]
        np.testing.assert_allclose(value, np.array(apart) / max(apart), rtol=1e-4)  # float32 activations
    fewer = confusion(model, task, n_components=1).table["value"]
    assert not np.allclose(fewer, full.table["value"], atol=0.05)


def test_a_class_that_nobody_asks_for_has_no_confusion():
    model = random_model("llama")
    task = labelled(model)
    asked = replace(task, answers=torch.full((N,), 10))
    found = confusion(model, asked, n_components=2).table.query("layer == 0").set_index(["src", "dst"])
    assert found["value_confused"].isna().sum() == 1
    assert np.isnan(found["value_confused"].iloc[-1])  # the pair without class 0


def test_refusals():
    model = random_model("llama")
    task = labelled(model)
    with pytest.raises(ValueError, match="n_components=9: 12 prompts and heads of 8 dimensions have 1 to 8"):
        confusion(model, task, n_components=9)
    with pytest.raises(ValueError, match="5 prompts .* 1 to 4"):
        confusion(model, task[:5], n_components=5)
    with pytest.raises(ValueError, match="answers and options"):
        confusion(model, replace(task, answers=None), n_components=2)
    positions = {name: at for name, at in task.positions.items() if name != "label_2"}
    with pytest.raises(ValueError, match="each with a label word"):
        confusion(model, replace(task, positions=positions), n_components=2)
