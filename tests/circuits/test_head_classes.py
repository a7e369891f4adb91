"""Classes of output heads: a model in which each is planted, and the bars at their edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.circuits import head_classes, output_nodes
from interp.models.hooks import run

PLANTED = {
    (1, 0): "content gatherer", (2, 0): "correct letter", (2, 1): "single letter", (2, 2): "uniform",
    (2, 3): "constant", (3, 0): "amplification",
}  # fmt: skip


@pytest.fixture(scope="module")
def classified(planted_choice, planted_task):
    model, task = planted_choice(), planted_task()
    return head_classes.classify(model, task, output_nodes.effects(model, task, n_sources=3))


def test_each_planted_head_gets_its_class(classified):
    found = {(row["layer"], row["head"]): row["component"] for row in classified.table.to_dict("records")}
    assert len(found) == 16
    assert {at: name for at, name in found.items() if name != "none"} == PLANTED


def test_the_evidence_is_what_was_planted(classified):
    rows = classified.table.set_index(["layer", "head"])
    letter, single, even, constant = (rows.loc[2, head] for head in range(4))
    assert letter["value_labels"] == pytest.approx(1, abs=1e-3)
    assert letter["value_right_label"] == letter["value_copy"] == letter["value_positive"] == 1
    # 2 logits for the right one, of which 3/4 are left over the mean of four.
    assert letter["value"] == pytest.approx(1.5, abs=1e-2)
    # It rises by 3/2 where it is right; centring lets the others rise by 1/6 each, from -1/2 in a third of the rest.
    assert (single["value_letter"], single["value_rise_share"]) == (0, pytest.approx(1.5 / (1.5 + 3 / 6), abs=1e-3))
    assert letter["value_rise_share"] == pytest.approx(0.25, abs=1e-3)
    assert even["value_entropy"] == pytest.approx(1, abs=1e-3)
    assert even["value_size"] < 1e-3 and even["value_raised"] > 0.3
    assert constant["value_constant"] == pytest.approx(1, abs=1e-3)
    assert rows.loc[(3, 0), "value_late"] == pytest.approx(1, abs=1e-3)
    assert letter["value_late"] < 1e-3  # labels stand among the contents, not after them
    gatherer = rows.loc[1, 0]
    assert gatherer["value_right_content"] == 1 and abs(gatherer["value_direct"]) < 1e-3
    # With sources of other places, what the gatherer finds decides the right letter's logit, but for what is constant.
    assert gatherer["value_total"] > 2


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "content gatherer"),
        ({"value_direct": 0.4}, "none"),  # more than a third of its total effect
        ({"value_direct": -0.4}, "none"),
        ({"value_total": 0.9, "value_direct": 0.0}, "none"),  # less than a tenth of the whole, 10
        ({"value_contents": 0.2}, "none"),
        ({"value_right_content": 0.6}, "none"),
        ({"value_size": 0.06}, "content gatherer"),
        ({"value_size": 0.06, "value_direct": 0.4}, "other output"),
        ({"value_size": 0.06, "value_constant": 0.6}, "constant"),
        ({"value_size": 0.06, "value_positive": 0.8, "value_late": 0.6}, "amplification"),
        ({"value_size": 0.04, "value_positive": 0.8, "value_late": 0.6}, "content gatherer"),
    ],
)
def test_the_bars_at_their_edges(changed, expected):
    row = {
        "value": 0.1, "value_size": 0.01, "value_positive": 0.5, "value_labels": 0.1, "value_right_label": 0.3,
        "value_copy": 0.3, "value_rise_share": 0.3, "value_constant": 0.1, "value_entropy": 0.5, "value_raised": 0.0,
        "value_late": 0.1, "value_contents": 0.8, "value_right_content": 0.9, "value_direct": 0.3, "value_total": 1.0,
    }  # fmt: skip
    assert head_classes._class(row | changed, whole=10.0, logits=1.0) == expected


def test_a_random_model_has_no_correct_letter_head(random_choice):
    model, task = random_choice("llama", n=16)
    found = head_classes.classify(model, task, output_nodes.effects(model, task, n_sources=1))
    assert not (found.table["component"] == "correct letter").any()
    assert set(found.table["component"]) <= set(head_classes.CLASSES)


def test_copying_reads_the_values_of_the_heads_own_group(random_choice):
    model, task = random_choice("llama", weights="raw")  # heads 0 and 1 share values, and 2 and 3
    found = head_classes.classify(model, task, output_nodes.effects(model, task, n_sources=1)).table
    cache = run(model, task.clean, capture=[f"blocks.{layer}.attn.hook_v" for layer in range(3)]).cache
    weight = model.bridge.original_model.model.norm.weight
    directions = model.bridge.original_model.lm_head.weight[task.options]
    for layer, head in [(0, 1), (1, 1), (1, 2), (2, 3)]:
        values = cache[f"blocks.{layer}.attn.hook_v"][:, [2, 4, 6, 8], head // 2]
        out = values @ model.bridge.blocks[layer].attn.W_O[head]
        gains = torch.einsum("bom,bkm->bok", out * weight, directions)  # the scale of the norm moves no argmax
        expected = (gains.argmax(-1) == torch.arange(4)).float().mean()
        mine = found[(found["layer"] == layer) & (found["head"] == head)]["value_copy"].item()
        assert mine == pytest.approx(float(expected), abs=1e-6)


def test_batches_do_not_matter_and_padding_neither(random_choice):
    model, task = random_choice("gpt_neox", padded=True)
    effects = output_nodes.effects(model, task, n_sources=1)
    one = head_classes.classify(model, task, effects, batch_size=3).table
    all_at_once = head_classes.classify(model, task, effects).table
    assert one["component"].tolist() == all_at_once["component"].tolist()
    numeric = [name for name in one if name.startswith("value")]
    assert (one[numeric] - all_at_once[numeric]).abs().max().max() < 1e-4  # float32 sums in another order


def test_bad_input(planted_choice, planted_task):
    model, task = planted_choice(), planted_task()
    found = output_nodes.effects(model, task, nodes="mlps", n_sources=1)
    with pytest.raises(ValueError, match="no effects of head"):
        head_classes.classify(model, task, found)
    with pytest.raises(ValueError, match="right in no prompt"):
        head_classes.classify(model, task[[0, 1, 2, 4]], found)
    late = {**task.positions, "label_0": torch.full((24,), 10), "end": torch.full((24,), 9)}
    with pytest.raises(ValueError, match="after the position 'end'"):
        head_classes.classify(model, replace(task, positions=late), output_nodes.effects(model, task, n_sources=1))
