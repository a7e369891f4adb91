"""Repair: a planted circuit that was broken, forced attention by plain hooks, the control, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.circuits.repair import repair
from interp.models import planted, run, toy
from interp.tasks.task import Task


def lopsided() -> tuple[planted.Planted, Task]:
    """IOI where of two names that are copied alike, the later in the vocabulary wins; it is never the answer."""
    case = planted.ioi_like(sharpness=60.0)
    with torch.no_grad():
        for index, row in enumerate(case.model.bridge.original_model.lm_head.weight):
            row *= 1 + 0.01 * index
    positions = {**case.positions, "start": torch.zeros_like(case.positions["end"])}
    options = torch.stack([case.answers, case.wrong], 1)
    task = Task(
        "ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, positions, options=options
    )
    return case, task[(case.answers < case.wrong).nonzero().flatten().tolist()]


def broken() -> tuple[planted.Planted, Task]:
    """The inhibition head finds S2 no more: its key lost the row that reads "dup", and it rests at the start."""
    case, task = lopsided()
    keys = 4 * 16  # after the queries of 4 heads of 16 dimensions, those of head 0
    with torch.no_grad():
        case.model.bridge.original_model.transformer.h[1].attn.c_attn.weight[:, keys] = 0.0
    return case, task


def means(result, **conditions):
    table = result.filter(**conditions).table
    return {column: table[column].mean() for column in table if column.startswith("value")}


def test_a_broken_circuit_is_repaired_by_attention_alone():
    case, task = broken()
    result = repair(
        case.model, task, [(1, 0)], attend_to=["s2"], movers=[(2, 1), (2, 2)], right=["io"], n_random=6, seed=1
    )
    before, after = (means(result, component=name) for name in ("unchanged", "given heads"))
    assert (before["value"], before["value_options"], before["value_repaired"]) == (0, 0, 0)
    assert (after["value"], after["value_options"], after["value_repaired"], after["value_mistake"]) == (1, 1, 1, 0)
    # The movers and the negative head write 1 + 1/2 - 1/4, at 8 logits a unit, 4% to 6% more for the answers here.
    assert 10.4 <= after["value_logit_diff"] <= 10.6
    assert -0.2 <= before["value_logit_diff"] < 0
    # The movers looked at both names alike, and look at IO now; none of them looks at S2.
    assert before["value_attention_right"] == pytest.approx(0.5, abs=1e-4)
    assert after["value_attention_right"] == pytest.approx(1, abs=1e-6)
    assert after["value_attention_wrong"] == pytest.approx(0, abs=1e-6)
    # Of the other heads only the negative one repairs anything: it writes against the name it is shown.
    control = result.filter(component="random heads").grid("step", "prompt")
    assert control.to_numpy().tolist() == [[float([2, 3] in s)] * 12 for s in result.meta["random_heads"]]
    assert [[2, 3]] in result.meta["random_heads"]
    assert len(result.table) == 12 * 8


def test_new_mistakes_are_counted():
    case, task = lopsided()
    result = repair(case.model, task, [(1, 0)], attend_to=["start"], n_random=0)
    before, after = (means(result, component=name) for name in ("unchanged", "given heads"))
    assert before["value"] == 1
    assert (after["value"], after["value_mistake"], after["value_repaired"]) == (0, 1, 0)
    assert set(result.table["component"]) == {"unchanged", "given heads"}
    assert "value_attention_right" not in result.table


def random_task(model, n=5, length=9) -> Task:
    tokens = toy.random_tokens(model, n, length, seed=4)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    generator = torch.Generator().manual_seed(0)
    options = torch.stack([torch.randperm(model.d_vocab, generator=generator)[:4] for _ in range(n)])
    positions = {
        "a": torch.tensor([2, 3, 4, 2, 5]), "b": torch.tensor([3, 2, 4, 5, 2]), "late": torch.tensor([6, 7, 6, 7, 7]),
        "end": torch.full((n,), length - 1),
    }  # fmt: skip
    logits = run(model, tokens, mask=mask).logits[:, -1]
    answers = options[:, 0].clone()
    answers[:3] = logits.argmax(-1)[:3]  # some are right to begin with
    options[:3, 0] = answers[:3]
    return Task("random", ("",) * n, tokens, "random", tokens, answers, options[:, 1], positions, mask, options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("position", ["end", "late"])
def test_equals_plain_hooks(architecture, position):
    model = toy.random(architecture, scale=0.6)
    task = random_task(model)
    heads, movers = [(0, 1), (0, 3), (2, 2)], [(1, 1), (2, 0)]
    result = repair(
        model, task, heads, attend_to=["a", "b"], position=position, movers=movers, right=["a"], n_random=3, seed=2,
        batch_size=2,
    )  # fmt: skip
    query = task.positions[position]
    rows = torch.arange(len(task))
    sets = [[], heads, *([tuple(at) for at in s] for s in result.meta["random_heads"])]
    unchanged = None
    for condition, chosen in enumerate(sets):

        def force(pattern, hook, chosen=chosen):
            pattern = pattern.clone()
            for layer, head in chosen:
                if hook.name == f"blocks.{layer}.attn.hook_pattern":
                    for row in range(len(task)):
                        where = {int(task.positions[name][row]) for name in ("a", "b")}
                        pattern[row, head, int(query[row])] = 0
                        for at in where:
                            pattern[row, head, int(query[row]), at] = 1 / len(where)
            return pattern

        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
        ran = run(model, task.clean, hooks=[(name, force) for name in names], capture=names, mask=task.mask)
        logits = ran.logits[:, -1]
        right = (logits.argmax(-1) == task.answers).double()
        unchanged = right if unchanged is None else unchanged
        attention = torch.stack([ran.cache[names[layer]][rows, head, query] for layer, head in movers]).mean(0)
        both = attention[rows, task.positions["a"]] + attention[rows, task.positions["b"]]
        both = torch.where(task.positions["a"] == task.positions["b"], both / 2, both)
        expected = {
            "value": right,
            "value_options": (task.options[rows, logits.gather(1, task.options).argmax(-1)] == task.answers).double(),
            "value_logit_diff": logits[rows, task.answers] - logits[rows, task.wrong],
            "value_mistake": unchanged * (1 - right),
            "value_repaired": (1 - unchanged) * right,
            "value_attention_right": attention[rows, task.positions["a"]],
            "value_attention_wrong": both,
        }
        name = ("unchanged", "given heads", "random heads")[min(condition, 2)]
        ours = result.filter(component=name, step=max(condition - 2, 0)).table
        assert ours["prompt"].tolist() == list(range(len(task)))
        for column, values in expected.items():
            # The rerun sums in another order: 1e-6 of logits of size 10 to 100.
            np.testing.assert_allclose(ours[column], values.numpy(), atol=2e-4, err_msg=f"{column} of {name}")
    accuracy = result.table.groupby(["component", "step"])["value"].mean()
    assert 0 < accuracy["unchanged", 0] < 1
    assert accuracy.nunique() > 1


def test_the_control_is_random_and_never_the_given_heads():
    model = toy.random("llama")
    task = random_task(model)
    heads = [(0, 0), (1, 1), (2, 2)]
    draws = [
        repair(model, task, heads, attend_to=["a"], n_random=20, seed=seed).meta["random_heads"] for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len({tuple(at) for at in s}) == 3 for s in draws[0])
    drawn = {tuple(at) for s in draws[0] for at in s}
    assert not drawn & set(heads)
    assert len(drawn) == 9  # all of the others come up in 60 draws


def test_without_options_or_wrong_answers_there_is_still_accuracy():
    model = toy.random("llama")
    task = replace(random_task(model), options=None, wrong=None)
    table = repair(model, task, [(1, 0)], attend_to=["a"], n_random=0).table
    assert table[["value_options", "value_logit_diff"]].isna().all(axis=None)
    assert table["value"].isin([0, 1]).all()


def test_bad_input_is_told_what_to_do():
    model = toy.random("llama")
    task = random_task(model)

    def call(heads=((1, 0),), **options):
        return repair(model, task, list(heads), **{"attend_to": ["a"], "n_random": 1, **options})

    with pytest.raises(ValueError, match="no heads were given"):
        call(heads=[])
    with pytest.raises(ValueError, match="names a head twice"):
        call(heads=[(1, 0), (1, 0)])
    with pytest.raises(ValueError, match=r"head \(1, 4\), but .* heads 0 to 3"):
        call(heads=[(1, 4)])
    with pytest.raises(ValueError, match=r"movers names head \(3, 0\)"):
        call(movers=[(3, 0)], right=["a"])
    with pytest.raises(ValueError, match="movers were given without right="):
        call(movers=[(2, 0)])
    with pytest.raises(ValueError, match="attend_to is empty"):
        call(attend_to=[])
    with pytest.raises(ValueError, match="no position 'c'; it has a, b, end, late"):
        call(attend_to=["c"])
    with pytest.raises(ValueError, match="'late' is at 6, after 'a' at 2"):
        call(attend_to=["late"], position="a")
    with pytest.raises(ValueError, match="too few for a random control"):
        call(heads=[(layer, head) for layer in range(3) for head in range(3)])
    with pytest.raises(ValueError, match="has no answers"):
        repair(model, replace(task, answers=None, options=None), [(1, 0)], attend_to=["a"])
