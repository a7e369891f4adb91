"""Roles: planted circuits with all of the stages, criteria at their bars, compensation by brute force, bad input."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from interp.circuits import roles
from interp.circuits.head_set import HeadSet
from interp.core.result import Result
from interp.models import Model, planted, run, toy
from interp.models._planted_build import BOS, END, FILLER, WORDS, blank, copier, finish, head
from interp.models.program import NoProgramError
from interp.tasks.task import Task


def ioi_like(**options) -> tuple[planted.Planted, Task]:
    case = planted.ioi_like(**options)
    at = case.positions
    positions = {
        "indirect_object": at["io"], "subject1": at["s1"], "after_subject1": at["s1"] + 1, "subject2": at["s2"],
        "end": at["end"],
    }  # fmt: skip
    return case, Task("ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, positions)


def with_induction() -> tuple[Model, Task]:
    """IOI by induction: "<bos> A . B . . B . <end>", where S2 is known for a repeated name by what followed S1.

    Head (0, 2) writes the token before. Head (1, 1) attends, from a name, to the position whose previous token it is,
    and writes the name into "dup". (2, 0) attends from the end to what is in "dup" and writes it into "inhibit"; (3, 1)
    copies a name that is not in "inhibit"; (3, 2) attends to the name that is, and writes minus half of it.
    """
    n = 6
    build = blank(4, 4, n_words=n, prev=n, dup=n, inhibit=n, out=n, junk=n)
    names, end, pos = build.words, build.end, build["pos"]
    every = build["one"] - build["tok"][BOS]
    head(build, (0, 2), asks=every, want=pos[1:], offer=pos[:-1], value=names, write=build["prev"], sharpness=200.0)
    head(
        build, (1, 1), asks=names.sum(0, keepdim=True), want=names, offer=build["prev"], value=build["prev"],
        write=build["dup"], sharpness=20.0,
    )  # fmt: skip
    dup = build["dup"].sum(0, keepdim=True)
    head(build, (2, 0), asks=end, want=end, offer=dup, value=build["dup"], write=build["inhibit"], sharpness=20.0)
    late = pos[4:].sum(0, keepdim=True)
    for at, sign, strength in (((3, 1), -1, 1.0), ((3, 2), 1, -0.5)):
        head(
            build, at, asks=end, want=end + sign * build["inhibit"], offer=names, value=names,
            write=strength * build["out"], sharpness=20.0, bar=(end, late),
        )  # fmt: skip
    copier(build, (1, 2), value=names, write=build["junk"])
    model = finish(build, out=build["out"], scale=8.0)
    clean, corrupt, columns = [], [], []
    for index, (io, s) in enumerate(permutations(range(n), 2)):
        first, s2 = index % 2, 5 + index % 2
        prompt = [BOS, *[FILLER] * 7, END]
        prompt[1 + 2 * first], prompt[3 - 2 * first] = WORDS + io, WORDS + s
        for texts, name in ((clean, s), (corrupt, io)):
            texts.append([*prompt[:s2], WORDS + name, *prompt[s2 + 1 :]])
        columns.append((1 + 2 * first, 3 - 2 * first, 4 - 2 * first, s2, 8, WORDS + io, WORDS + s))
    io_at, s1_at, after, s2_at, end_at, answers, wrong = (torch.tensor(column) for column in zip(*columns, strict=True))
    positions = {
        "indirect_object": io_at, "subject1": s1_at, "after_subject1": after, "subject2": s2_at, "end": end_at,
    }  # fmt: skip
    task = Task(
        "ioi", ("",) * len(clean), torch.tensor(clean), "planted", torch.tensor(corrupt), answers, wrong, positions
    )
    return model, task


def test_planted_heads_are_found_and_no_others():
    case, task = ioi_like()
    result = roles.ioi_roles(case.model, task, copy_top=1, random_length=3)
    found = HeadSet.of(result, confirmed=True)
    assert {role: found[role] for role in found} == {
        "name mover": ((2, 1), (2, 2)),
        "negative name mover": ((2, 3),),
        "S-inhibition": ((1, 0),),
        "duplicate token": ((0, 1),),
    }
    # The movers write 1 and 1/2, the negative head -1/4; inhibition carries all that reaches the movers' queries, less
    # the negative head's share of the contrast, which gets no part of it: (1 + 1/2) / (1 + 1/2 - 1/4).
    table = result.table.set_index(["component", "layer", "head"])
    expected = {
        ("name mover", 2, 1): 0.8, ("name mover", 2, 2): 0.4, ("negative name mover", 2, 3): -0.2,
        ("S-inhibition", 1, 0): 1.2, ("duplicate token", 0, 1): 1.0,
    }  # fmt: skip
    # exp(-12), what is left on the other positions at this sharpness, is 6e-6; a few of them add up.
    assert table["value"].to_dict() == pytest.approx(expected, abs=1e-3)
    assert (table["value_low"] <= table["value"] + 1e-9).all() and (table["value"] <= table["value_high"] + 1e-9).all()
    effects = result.arrays["effects"][1]
    assert effects.shape == (4, 3, 4)
    assert np.isnan(effects[1, 2]).all()  # the movers' own layer does not reach their queries
    assert effects[0, 2].tolist() == pytest.approx([0, 0.8, 0.4, -0.2], abs=1e-3)
    assert result.meta["other_names_in_stage_4"] is False
    assert len(HeadSet.of(result)) == 5


def test_planted_induction_chain_goes_to_its_start():
    model, task = with_induction()
    result = roles.ioi_roles(model, task, copy_top=1, random_length=4)
    found = HeadSet.of(result, confirmed=True)
    assert {role: found[role] for role in found if found[role]} == {
        "name mover": ((3, 1),),
        "negative name mover": ((3, 2),),
        "S-inhibition": ((2, 0),),
        "induction": ((1, 1),),
        "previous token": ((0, 2),),
    }
    assert HeadSet.of(result)["name mover"] == ((3, 1),)  # (3, 2) helps too, but is no candidate for this
    rows = result.table.set_index("component")
    # The negative head attends to S and writes against it: it helps, by half as much as the mover.
    assert rows.loc["negative name mover", "value"] == pytest.approx(1 / 3, abs=1e-3)
    assert rows.loc["S-inhibition", "value"] == pytest.approx(1, abs=1e-3)
    assert rows.loc["induction", "value_s2_to_after_s1"] == pytest.approx(1, abs=1e-6)
    # corrupt="swap" says nothing of S1: other names are put in. Then there is no induction, and the two names tie.
    assert result.meta["other_names_in_stage_4"] is True
    assert rows.loc["previous token", "value"] == pytest.approx(1, abs=1e-3)
    assert rows.loc["previous token", "value_previous"] == pytest.approx(1, abs=1e-6)


def test_other_names_are_other_names():
    _, task = with_induction()
    for seed in (0, 1):
        renamed = roles._renamed(task, seed)
        places = [task.positions[name] for name in ("indirect_object", "subject1", "subject2")]
        rows = torch.arange(len(task))
        changed = torch.zeros_like(task.clean, dtype=torch.bool)
        for place in places:
            changed[rows, place] = True
        assert torch.equal(renamed.corrupt != task.clean, changed)
        new = torch.stack([renamed.corrupt[rows, place] for place in places], 1)
        assert all(len(set(row)) == 3 for row in new.tolist())
        assert int(new.min()) >= WORDS
        old = torch.stack([task.clean[rows, place] for place in places], 1)
        assert not (new[:, :, None] == old[:, None, :]).any()
    few = task[[0, 5]]
    with pytest.raises(ValueError, match="2 different names.*needs five"):
        roles._renamed(few, 0)


GOOD = {
    "value_end_to_io": 0.2, "value_end_to_s1": 0.1, "value_end_to_s2": 0.2, "value_s2_to_s1": 0.2,
    "value_s2_to_after_s1": 0.2, "value_after_s1_to_s1": 0.2, "value_duplicate": 0.2, "value_induction": 0.2,
    "value_previous": 0.2, "value_copy": 0.5, "value_anti_copy": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "needed"),
    [
        ("name mover", ["end_to_io", "copy"]),
        ("backup", ["end_to_io", "copy"]),
        ("negative name mover", ["anti_copy"]),
        ("S-inhibition", ["end_to_s2"]),
        ("duplicate token", ["s2_to_s1", "duplicate"]),
        ("induction", ["s2_to_after_s1", "induction"]),
        ("previous token", ["after_s1_to_s1", "previous"]),
    ],
)
def test_each_criterion_counts(role, needed):
    good = GOOD | ({"value_end_to_s2": 0.19} if role in ("name mover", "backup") else {})
    assert roles.is_confirmed(role, good)
    for name in good:
        lowered = good | {name: good[name] - 0.011}
        assert roles.is_confirmed(role, lowered) == (name.removeprefix("value_") not in needed), name


def test_a_mover_prefers_io_and_a_negative_head_sees_names():
    for rival in ("value_end_to_s1", "value_end_to_s2"):
        rest = GOOD | {"value_end_to_io": 0.5, "value_end_to_s1": 0.4, "value_end_to_s2": 0.4}
        assert roles.is_confirmed("name mover", rest)
        assert not roles.is_confirmed("name mover", rest | {rival: 0.5})
    names = {"value_end_to_io": 0.07, "value_end_to_s1": 0.07, "value_end_to_s2": 0.07}
    assert roles.is_confirmed("negative name mover", GOOD | names)
    for name in names:
        assert not roles.is_confirmed("negative name mover", GOOD | names | {name: 0.05})


def test_candidates_are_strong_and_sure():
    rng = np.random.default_rng(0)
    means = {(0, 0): 0.5, (0, 1): 0.3, (0, 2): 0.009, (1, 0): -0.4, (1, 1): -0.05, (1, 2): 0.2}
    rows = [
        {"prompt": prompt, "layer": layer, "head": at, "value": mean + (9.0 if (layer, at) == (1, 2) else 1e-4) * noise}
        for (layer, at), mean in means.items() for prompt, noise in enumerate(rng.normal(size=20))
    ]  # fmt: skip
    result = Result("test", pd.DataFrame(rows), "fraction")

    def chosen(sign, top):
        return [at for at, _ in roles._candidates(result, sign, top, 0.01, 0)]

    assert chosen(1, 5) == [(0, 0), (0, 1)]  # one is weak, and one as often below 0 as above
    assert chosen(1, 1) == [(0, 0)]
    assert chosen(-1, 5) == [(1, 0), (1, 1)]
    mean, low, high = roles._candidates(result, -1, 1, 0.01, 0)[0][1]
    assert low < mean < high < 0


def test_backup_head_makes_up_for_the_primary_one():
    case = planted.backup_head()
    task = Task(
        "backup", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, positions=case.positions
    )
    removed = list(case.truth["primary"])
    hooks = roles._mean_ablation(case.model, task, removed)
    growth = roles._compensation(case.model, task, removed, hooks, 0.75).table
    assert (0, 1) not in set(zip(growth["layer"], growth["head"], strict=True))
    means = growth.groupby(["layer", "head"])["value"].mean()
    # The backup writes all of what the primary wrote, and no other head answers.
    assert means.drop((1, 2)).abs().max() == pytest.approx(0, abs=1e-6)
    assert growth.set_index(["layer", "head"]).loc[(1, 2), "value"].tolist() == pytest.approx([1] * 9, abs=1e-5)


def small_ioi(model, n=6, length=10) -> Task:
    clean, corrupt = (toy.random_tokens(model, n, length, seed=seed) for seed in (1, 2))
    mask = torch.ones_like(clean)
    mask[0, :2], corrupt[0, :2] = 0, clean[0, :2]
    at = {"indirect_object": 3, "subject1": 4, "after_subject1": 5, "subject2": 7, "end": length - 1}
    positions = {name: torch.full((n,), place) for name, place in at.items()}
    logits = [run(model, tokens, mask=mask).logits[:, -1] for tokens in (clean, corrupt)]
    difference = logits[0] - logits[1]  # answers for which the clean run is the better one
    return Task(
        "ioi", ("",) * n, clean, "random", corrupt, difference.argmax(-1), difference.argmin(-1), positions, mask
    )


@pytest.mark.parametrize(("architecture", "weights"), [("llama", "processed"), ("gpt2", "raw"), ("gemma", "raw")])
def test_compensation_is_the_change_of_one_head_alone(architecture, weights):
    model = toy.random(architecture, weights=weights)
    task = small_ioi(model)
    removed = [(0, 1), (0, 2), (1, 3)]
    hooks = roles._mean_ablation(model, task, removed)
    found = roles._compensation(model, task, removed, hooks, 0.75).table
    z_names = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    other = run(model, task.corrupt, capture=z_names, mask=task.mask).cache
    means = {at: other[z_names[at[0]]][:, -1, at[1]].mean(0) for at in removed}

    def knock_out(z, hook, layer):
        z = z.clone()
        for at, mean in means.items():
            if at[0] == layer:
                z[:, -1, at[1]] = mean
        return z

    edits = [(z_names[layer], lambda z, hook, layer=layer: knock_out(z, hook, layer)) for layer in (0, 1)]
    after = run(model, task.clean, hooks=edits, capture=z_names, mask=task.mask).cache
    rows = torch.arange(len(task))

    def difference(logits):
        return logits[rows, -1, task.answers] - logits[rows, -1, task.wrong]

    gap = (
        difference(run(model, task.clean, mask=task.mask).logits)
        - difference(run(model, task.corrupt, mask=task.mask).logits)
    ).mean()
    last = "blocks.2.hook_resid_post"
    for layer, at in ((1, 0), (1, 2), (2, 1), (2, 3)):
        out = f"blocks.{layer}.hook_attn_out"

        def swap(z, hook, layer=layer, at=at):
            z = z.clone()
            z[:, -1, at] = after[z_names[layer]][:, -1, at]
            return z

        outs = [
            run(model, task.clean, hooks=changed, capture=[out], mask=task.mask).cache[out]
            for changed in ([], [(z_names[layer], swap)])
        ]
        added = run(model, task.clean, hooks=[(last, lambda a, hook, outs=outs: a + outs[1] - outs[0])], mask=task.mask)
        slow = (difference(added.logits) - difference(run(model, task.clean, mask=task.mask).logits)) / gap
        ours = found[(found["layer"] == layer) & (found["head"] == at)]["value"].to_numpy()
        assert np.abs(ours).max() > 1e-3
        # Differences of float32 logits of size 10 over a gap of about 10: 1e-6 each, a few of them.
        np.testing.assert_allclose(ours, slow.numpy(), atol=1e-5)


def test_a_real_circuit_has_its_writers(smol):
    """One stage, on few prompts: what the heads of the last stage do is not a matter of the number of prompts."""
    from interp.circuits import evidence
    from interp.tasks import ioi

    task = ioi(smol, 6, corrupt="swap")
    copies = evidence.copying(smol, task, [(23, 0), (24, 4), (0, 0)], names=["indirect_object", "subject1"])
    rates = copies.summary(by=["metric", "layer"]).set_index(["metric", "layer"])["mean"]
    assert rates["copy", 23] >= 0.9 and rates["anti-copy", 24] >= 0.9
    assert rates["copy", 0] <= 0.1 and rates["anti-copy", 0] <= 0.1
    scores = evidence.repeated_tokens(smol, n_prompts=2)
    assert scores.filter(metric="induction").grid("layer", "head").loc[17, 4] > 0.5
    assert scores.filter(metric="previous token").grid("layer", "head").loc[16, 0] > 0.5
    assert scores.filter(metric="duplicate token").grid("layer", "head").loc[14, 3] > 0.5


def test_bad_input_is_told_what_to_do():
    case, task = ioi_like()
    with pytest.raises(ValueError, match="no position 'after_subject1'.*interp.tasks.ioi"):
        positions = {name: place for name, place in task.positions.items() if name != "after_subject1"}
        roles.ioi_roles(case.model, replace(task, positions=positions))
    with pytest.raises(ValueError, match="no answers or wrong answers"):
        roles.ioi_roles(case.model, replace(task, wrong=None))
    with pytest.raises(ValueError, match="no corrupted prompts"):
        roles.ioi_roles(case.model, replace(task, corrupt=None))
    with pytest.raises(NoProgramError, match="no head writes a part of its own"):
        roles.ioi_roles(toy.random("gemma2"), task)
    backwards = replace(task, clean=task.corrupt, corrupt=task.clean)
    with pytest.raises(ValueError, match="on 0% of 24 prompts"):
        roles.ioi_roles(case.model, backwards, random_length=3)


def test_head_set_orders_and_names():
    found = HeadSet({"mover": {(9, 6): 0.4, (9, 9): -0.7}, "inhibition": {(7, 3): 0.1, (9, 6): 0.1}})
    assert found["mover"] == ((9, 9), (9, 6))
    assert found.names("mover") == ("9.9", "9.6")
    assert found.heads == {(9, 6), (9, 9), (7, 3)}
    assert len(found) == 3
    assert list(found) == ["mover", "inhibition"]
    assert found.role_of((9, 6)) == ("mover", "inhibition")
    assert found.role_of((0, 0)) == ()
    with pytest.raises(KeyError, match="no role 'backup'; this HeadSet has 'mover', 'inhibition'"):
        found["backup"]
