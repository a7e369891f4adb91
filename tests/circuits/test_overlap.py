"""Overlap and stages: by hand, against scipy's hypergeometric, planted senders, resampled prompts, bad input."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from interp.circuits.overlap import count, null_distribution, overlap
from interp.circuits.stages import Step, four_steps, receivers_of, stages, top_heads
from interp.core.result import Result
from interp.models import planted, toy
from interp.patching.path import Receiver
from interp.tasks.task import Task

N_LAYERS, N_HEADS = 10, 10


def table(effects: np.ndarray, *, first: int = 0, task: str = "t") -> Result:
    """Effects `[step prompt head]` as `stages` returns them; the heads start at number `first`."""
    step, prompt, number = np.indices(effects.shape).reshape(3, -1)
    number = number + first
    frame = pd.DataFrame(
        {"prompt": prompt, "step": step + 1, "component": np.array(["logits", "q", "v", "k"], dtype=object)[step],
         "layer": number // N_HEADS, "head": number % N_HEADS, "value": effects.ravel()}
    )  # fmt: skip
    meta = {"n_heads_in_all": N_LAYERS * N_HEADS, "n_heads_a_layer": N_HEADS, "model_fingerprint": "m", "task": task}
    return Result("stages.stages", frame, "fraction", meta=meta)


def random_effects(seed: int, n_steps: int = 2, n_prompts: int = 8, n_heads: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_steps, n_prompts, n_heads))


@pytest.mark.parametrize(
    ("n_heads", "share", "expected"),
    [(384, 0.02, 8), (270, 0.02, 5), (144, 0.02, 3), (12, 0.02, 1), (100, 0.035, 4), (100, 0.145, 15), (10, 1.0, 10)],
)
def test_the_number_of_heads_is_rounded_half_up(n_heads, share, expected):
    assert count(n_heads, share) == expected


def test_a_task_has_everything_in_common_with_itself():
    one = table(random_effects(0))
    found = overlap(one, one, share=0.05, n_null=200, n_boot=50).table
    assert found["value"].tolist() == [1, 1, 1]
    assert found["value_shared"].tolist() == [5, 5, 10]
    assert found["value_selected"].tolist() == [5, 5, 10]
    assert found["step"].tolist() == [1, 2, 0]
    assert found["component"].tolist() == ["logits", "q", "all"]
    assert set(found["target"]) == {"second"}


def test_by_hand():
    # Means 3, -4, 1, 2, 0 ... and 0, 5, 6, -7, 1: the two largest in size are heads 0, 1 and heads 2, 3; three: 0 1 3
    # and 1 2 3.
    first, second = np.zeros((1, 2, 100)), np.zeros((1, 2, 100))
    first[0, :, :4] = [[2, -3, 1, 2], [4, -5, 1, 2]]
    second[0, :, :5] = [[0, 5, 6, -7, 1], [0, 5, 6, -7, 1]]
    pair = table(first), table(second)
    shared = {share: overlap(*pair, share=share, n_null=50, n_boot=20).table.iloc[-1] for share in (0.02, 0.03, 0.1)}
    assert {share: row["value"] for share, row in shared.items()} == {0.02: 0, 0.03: 2 / 3, 0.1: 3 / 4}
    # A share of ten, but four heads have an effect at all in either task: none with effect 0 counts.
    assert shared[0.1]["value_shared"] == 3 and shared[0.1]["value_selected"] == 4


def test_the_null_is_hypergeometric():
    pair = table(random_effects(0, n_steps=3)), table(random_effects(1, n_steps=3))
    n_null, size = 20_000, 10
    found = overlap(*pair, share=0.1, n_null=n_null, n_boot=20).table
    law = stats.hypergeom(100, size, size)
    single = found[found["step"] > 0]
    # The mean of n_null draws is within four standard errors.
    np.testing.assert_allclose(single["value_null"], law.mean() / size, atol=4 * law.std() / size / n_null**0.5)
    assert single["value_null_low"].tolist() == [law.ppf(0.025) / size] * 3
    assert single["value_null_high"].tolist() == [law.ppf(0.975) / size] * 3
    np.testing.assert_allclose(single["value_p_exact"], law.sf(single["value_shared"] - 1), rtol=1e-12)
    # A share of 20,000 draws has a standard error of at most 0.0036.
    np.testing.assert_allclose(found["value_p"], found["value_p_exact"], atol=0.015)
    everything = found[found["step"] == 0].iloc[0]
    assert everything["value_shared"] == single["value_shared"].sum()
    whole = np.convolve(np.convolve(law.pmf(range(11)), law.pmf(range(11))), law.pmf(range(11)))
    assert everything["value_p_exact"] == pytest.approx(whole[int(everything["value_shared"]) :].sum(), rel=1e-9)
    assert everything["value_null"] == pytest.approx(law.mean() / size, abs=4 * law.std() / size / (3 * n_null) ** 0.5)


@pytest.mark.parametrize(("total", "n_first", "n_second"), [(384, 8, 8), (270, 5, 5), (20, 4, 9), (7, 6, 3), (9, 7, 5)])
def test_null_distribution_of_equal_pools_is_scipys(total, n_first, n_second):
    pool = np.arange(total)
    ours = null_distribution(pool, pool, n_first, n_second)
    law = stats.hypergeom(total, n_first, n_second)
    np.testing.assert_allclose(ours, law.pmf(range(min(n_first, n_second) + 1)), rtol=1e-9, atol=1e-15)
    assert ours @ np.arange(len(ours)) == pytest.approx(law.mean())
    assert ours @ np.arange(len(ours)) ** 2 - law.mean() ** 2 == pytest.approx(law.var())


@pytest.mark.parametrize(
    ("first", "second"), [(range(4), range(6)), (range(6), range(4)), (range(5), range(2, 7)), ((0, 1), (2, 3, 4))]
)
def test_null_distribution_of_other_pools_by_counting(first, second):
    ours = null_distribution(np.array(first), np.array(second), 2, 3)
    counts = np.zeros(3)
    for one in combinations(first, 2):
        for other in combinations(second, 3):
            counts[len(set(one) & set(other))] += 1
    np.testing.assert_allclose(ours, counts / counts.sum(), rtol=1e-12, atol=1e-15)


def test_the_null_shuffles_over_the_heads_that_can_send():
    # The second task's receivers are lower: only its first 40 heads can send.
    narrow = table(random_effects(1, n_steps=1, n_heads=40))
    found = overlap(table(random_effects(0, n_steps=1)), narrow, share=0.1, n_null=20_000, n_boot=20).table.iloc[-1]
    law = stats.hypergeom(100, 10, 10)  # which ten of the forty does not matter: the first task's ten are any of 100
    assert found["value_p_exact"] == pytest.approx(law.sf(found["value_shared"] - 1))
    assert found["value_p"] == pytest.approx(found["value_p_exact"], abs=0.015)
    same = overlap(narrow, table(random_effects(2, n_steps=1, n_heads=40)), share=0.1, n_null=20_000, n_boot=20)
    law = stats.hypergeom(40, 10, 10)
    # Four standard errors of 20,000 draws.
    assert same.table.iloc[-1]["value_null"] == pytest.approx(law.mean() / 10, abs=4 * law.std() / 10 / 20_000**0.5)


def test_heads_are_the_same_heads_whatever_the_rows():
    effects = random_effects(0, n_steps=1)
    tail = table(effects[:, :, 30:], first=30)
    found = overlap(table(effects), tail, share=1.0, n_null=20, n_boot=5).table.iloc[-1]
    assert found["value_shared"] == 70 and found["value_selected"] == 100


def test_the_interval_is_over_prompts():
    sure = np.zeros((1, 6, 100)) + np.arange(100)
    steady = overlap(table(sure), table(sure + 1), share=0.05, n_null=20, n_boot=200).table.iloc[-1]
    assert (steady["value_low"], steady["value"], steady["value_high"]) == (1, 1, 1)
    # Head 0 is the largest on average, by one prompt alone; a resample misses it with probability (5/6)^6 = 0.33.
    torn = np.zeros((1, 6, 100))
    torn[0, :, 1] = 1.0
    torn[0, 0, 0] = 50.0
    one = np.zeros((1, 6, 100))
    one[0, :, 0] = 1.0
    found = overlap(table(torn), table(one), share=0.01, n_null=20, n_boot=4000).table.iloc[-1]
    assert (found["value_low"], found["value"], found["value_high"]) == (0, 1, 1)
    low = overlap(table(torn[:, 1:]), table(one), share=0.01, n_null=20, n_boot=50).table.iloc[-1]
    assert (low["value"], low["value_high"]) == (0, 0)


def test_a_control_has_rows_of_its_own():
    one, two = table(random_effects(0), task="a"), table(random_effects(1), task="c")
    result = overlap(one, one, control=two, share=0.05, n_null=50, n_boot=20)
    assert result.filter(target="second", step=0).table["value"].item() == 1
    alone = overlap(one, two, share=0.05, n_null=50, n_boot=20).table
    pd.testing.assert_frame_equal(
        result.filter(target="control").table.drop(columns="target"), alone.drop(columns="target")
    )
    assert result.meta["tasks"] == {"first": "a", "second": "a", "control": "c"}
    again = overlap(one, two, share=0.05, n_null=50, n_boot=20, seed=1).table
    assert not alone["value_null"].equals(again["value_null"])


def test_overlap_refuses_what_it_cannot_compare():
    one = table(random_effects(0))
    with pytest.raises(ValueError, match=r"share=2.0 is not a share"):
        overlap(one, one, share=2.0)
    with pytest.raises(ValueError, match=r"stages \[1, 2\] and \[1, 2, 3\]"):
        overlap(one, table(random_effects(0, n_steps=3)))
    with pytest.raises(ValueError, match="different models"):
        overlap(one, replace(one, meta={**one.meta, "model_fingerprint": "n"}))
    with pytest.raises(ValueError, match="no column 'step': give what circuits.stages"):
        overlap(one, replace(one, table=one.table.drop(columns="step")))
    with pytest.raises(ValueError, match="no number of heads in its meta"):
        overlap(replace(one, meta={}), one)


# --- stages ---------------------------------------------------------------------------------------------------------


def ioi_like() -> tuple[planted.Planted, Task]:
    case = planted.ioi_like()
    task = Task("ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions)
    return case, task


STEPS = (Step(("logits",), "end"), Step(("q",), "end", 1), Step(("v",), "s2", 2))


def test_stages_find_the_planted_senders():
    case, task = ioi_like()
    found = stages(case.model, task, STEPS, share=0.25)
    assert found.meta["top"] == [[[2, 1], [2, 2], [2, 3]], [[1, 0]], [[0, 1]]]
    means = found.summary(by=["step", "layer", "head"]).set_index(["step", "layer", "head"])["mean"]
    assert means[1, 2, 1] == pytest.approx(0.8, abs=1e-3)  # exp(-12) is left on other positions
    assert means[2, 1, 0] == pytest.approx(1, abs=1e-3)
    assert means[3, 0, 1] == pytest.approx(1, abs=1e-3)
    assert means.drop([(1, 2, 1), (1, 2, 2), (1, 2, 3), (2, 1, 0), (3, 0, 1)]).abs().max() < 1e-6
    # Only heads below the receivers can send.
    assert found.table.groupby("step")["layer"].max().tolist() == [2, 1, 0]
    labels = found.table.drop_duplicates("step")["component"].tolist()
    assert labels == ["logits at end", "q of stage 1 at end", "v of stage 2 at s2"]


def test_a_stage_receives_for_the_one_it_names():
    case, task = ioi_like()
    found = stages(case.model, task, (*STEPS, STEPS[1]), share=0.25)
    second, fourth = (found.filter(step=step).table.drop(columns="step") for step in (2, 4))
    pd.testing.assert_frame_equal(second, fourth)


def test_top_heads_of_a_stage_are_limited_by_the_share():
    case, task = ioi_like()
    found = stages(case.model, task, STEPS[:2], share=0.01)
    assert found.meta["top"] == [[[2, 1]], [[1, 0]]]


def test_a_planted_circuit_overlaps_with_itself_on_other_prompts():
    case, task = ioi_like()
    even, odd = (stages(case.model, task[some], STEPS, share=0.25) for some in (slice(0, 24, 2), slice(1, 24, 2)))
    found = overlap(even, odd, share=0.25, n_null=500, n_boot=20)
    whole = found.filter(step=0).table.iloc[0]
    assert (whole["value"], whole["value_shared"], whole["value_low"]) == (1, 5, 1)
    # 3 of 12, 1 of 8 and 1 of 4, all hit by chance.
    assert whole["value_p_exact"] == pytest.approx(1 / 220 / 8 / 4)


def test_four_steps_and_receivers():
    assert [step.label for step in four_steps("subject2")] == [
        "logits at end", "q of stage 1 at end", "v of stage 2 at subject2", "k of stage 2 at subject2",
    ]  # fmt: skip
    model = toy.random("llama")  # 4 heads in 2 groups
    assert receivers_of(model, [(1, 0), (1, 1), (1, 3)], ["q"]) == [Receiver("q", 1, at) for at in (0, 1, 3)]
    assert receivers_of(model, [(1, 0), (1, 1)], ["v", "k"]) == [Receiver("v", 1, 0), Receiver("k", 1, 0)]
    assert receivers_of(model, [(1, 1), (1, 3)], ["v"]) == [Receiver("v", 1, 0), Receiver("v", 1, 1)]
    rows = pd.DataFrame({"layer": [0, 0, 1, 1, 2], "head": [0, 0, 1, 1, 0], "value": [1.0, -3.0, 5.0, -1.0, 0.0]})
    assert top_heads(rows, 3) == [(1, 1), (0, 0)]
    assert top_heads(rows, 1) == [(1, 1)]


def test_stages_refuse_what_cannot_be_patched():
    case, task = ioi_like()
    with pytest.raises(ValueError, match="no steps: give some"):
        stages(case.model, task, ())
    with pytest.raises(ValueError, match="stage 1 .*of an earlier stage's heads"):
        stages(case.model, task, (Step(("q",), "end", 1),))
    with pytest.raises(ValueError, match="stage 1 is"):
        stages(case.model, task, (Step(("q",), "end"),))
    with pytest.raises(ValueError, match="the logits receive alone"):
        stages(case.model, task, (Step(("logits", "q"), "end"),))
    with pytest.raises(ValueError, match=r"the same up to 's1'.*Give a later position"):
        stages(case.model, task, (*STEPS[:2], Step(("k",), "s1", 2)))
    with pytest.raises(ValueError, match="stage 4.*in layer 0"):
        stages(case.model, task, (*STEPS, Step(("k",), "s2", 3)), share=0.1)
    with pytest.raises(ValueError, match="no position 'subject2'"):
        stages(case.model, task, four_steps("subject2"))
    assert torch.equal(task.clean, case.clean)
