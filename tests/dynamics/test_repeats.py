"""Oracles: the rule of the data by hand, accuracy on other prompts, and the known algorithm by intervention."""

import pytest
import torch

import interp
from interp.core.edits import Edit
from interp.dynamics.repeats import BLOCKS, LENGTH, batch, train_repeats
from interp.dynamics.train import IGNORED
from interp.patching import ablation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("repeats")


@pytest.fixture(scope="module")
def trained(folder):
    return train_repeats(folder=folder)


def test_a_target_is_what_followed_the_same_token_before():
    tokens, targets = batch(torch.Generator().manual_seed(3), 20)
    assert tokens.shape == targets.shape == (20, LENGTH)
    lengths = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        first = next(i for i, token in enumerate(wanted) if token != IGNORED)
        lengths.add(first - 1)
        assert len(set(row[1:first])) == first - 1  # a block of different tokens
        for place in range(first, LENGTH - 1):
            earlier = max(i for i in range(1, place) if row[i] == row[place])
            assert wanted[place] == row[earlier + 1] == row[place + 1]
    assert min(lengths) >= BLOCKS[0]
    assert max(lengths) <= BLOCKS[1]
    assert len(lengths) > 3


def test_it_does_induction_on_prompts_that_repeat_once(trained):
    model, history = trained
    assert history.filter(metric="held-out accuracy").table["value"].iloc[-1] >= 0.99
    task = interp.tasks.induction(model, 64, 12)
    right = (model(task.clean)[:, -1].argmax(-1) == task.answers).float().mean()
    assert right >= 0.95  # other prompts than those of training, which repeat more than once


def test_the_answer_is_found_by_the_token_before_it(trained):
    model, _ = trained
    task = interp.tasks.induction(model, 32, 12)
    answer = task.positions["source"]
    cut = {
        str(back): [Edit("attn_scores", 0, pos=answer, k_pos=answer - back, value=float("-inf"))] for back in (1, 2, 3)
    }
    lost = ablation.ablate(model, task, cut).table.groupby("target")["value_drop"].mean()
    # Where the answer stands, layer 0 must see the token that will be asked for; its other neighbours do not matter.
    assert lost["1"] > 5
    assert abs(lost["2"]) + abs(lost["3"]) < lost["1"] / 5


def test_a_folder_with_another_recipe_is_refused(trained, folder):
    assert trained[1].meta["seed"] == 0
    with pytest.raises(ValueError, match="another recipe"):
        train_repeats(seed=1, folder=folder)
