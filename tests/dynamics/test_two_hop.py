from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp.dynamics import two_hop as gained
from interp.dynamics.back_attention import Upper, examples, train_back_attention
from interp.dynamics.train import IGNORED
from interp.dynamics.two_hop import VARIANTS, two_hop_answers, two_hop_gain
from interp.interventions.back_attention import effect
from interp.models import Model
from interp.models.back_attention import Attached, BackAttention
from interp.tasks import Task, two_hop, two_hop_facts, two_hop_split

SHORT: dict[str, Any] = {"steps": 2, "batch_size": 4, "every": 2}


@pytest.fixture(scope="module")
def task(smol: Model) -> Task:
    return two_hop(smol, 12, seed=1)


@pytest.fixture(scope="module")
def singles(smol: Model) -> tuple[Task, Task]:
    return two_hop(smol, 6, hop="first", seed=1), two_hop(smol, 6, hop="second", seed=1)


@pytest.fixture(scope="module")
def found(smol: Model, task: Task, singles: tuple[Task, Task], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, Result) of one seed and all variants."""
    folder = tmp_path_factory.mktemp("gain")
    return folder, two_hop_gain(smol, task, source=20, target=26, singles=singles, seeds=(5,), folder=folder, **SHORT)


def test_the_upper_part_is_the_whole_model_at_the_last_tokens(smol: Model, task: Task) -> None:
    back = BackAttention(smol.d_model, source=12, target=20, d_inner=8, n_heads=2)
    with torch.no_grad():
        back.o.copy_(torch.randn(back.o.shape, generator=torch.Generator().manual_seed(0)))
    some = task[:6]
    tokens, targets = examples(some)
    assert len(set((targets != IGNORED).nonzero()[:, 1].tolist())) > 1, "prompts of unequal length"
    upper = Upper(smol, back, some, task[:2])
    with torch.no_grad():
        mine = upper(tokens)
        theirs = Attached(smol, back)(some.clean, some.mask)[:, -1]
        plain = smol(some.clean, some.mask)[:, -1]
        # padding on the other side, fused attention: float32 sums in another order, over 30 layers
        torch.testing.assert_close(mine[targets != IGNORED], theirs, rtol=0, atol=2e-3)
        assert float((theirs - plain).abs().max()) > 0.5
        assert float(mine[targets == IGNORED].abs().max()) == 0.0
        known = dict(upper.known)
        torch.testing.assert_close(upper(tokens[[4, 1]])[:, -1], mine[[4, 1]][:, -1], rtol=0, atol=2e-3)
        assert all(upper.known[key][0] is known[key][0] for key in known), "computed once"


def test_the_numbers_are_those_of_effect_and_of_the_whole_model(smol: Model, task: Task, found: Any) -> None:
    folder, result = found
    train, test = two_hop_split(task, seed=5)
    back, _ = train_back_attention(
        smol, train, held_out=test[:8], source=20, target=26, seed=5, learning_rate=1e-2, warmup=5, weight_decay=0.01,
        folder=folder / "back attention, seed 5", **SHORT,
    )  # fmt: skip
    measured = effect(smol, back, test)
    rows = result.filter(component="back attention", target="two_hop").table
    for mine, theirs in (("first choice", "accuracy"), ("log-probability", "log-probability")):
        for column in ("value_before", "value_after"):
            one = rows[rows["metric"] == mine].sort_values("prompt")[column]
            other = measured.filter(metric=theirs).table.sort_values("prompt")[column]
            # as above, in nats
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-3)
    with torch.no_grad():
        logits = smol(test.clean, test.mask)[:, -1]
    facts = two_hop_facts(test)
    everything = two_hop_facts(task)
    right = []
    for index, (kind, answer) in enumerate(zip(facts["kind"], test.answers.tolist(), strict=True)):
        offered = set(task.answers[np.flatnonzero(everything["kind"] == kind)].tolist())
        # single hops offer their answers too
        offered |= {int(a) for a in found_answers(found, smol, kind)}
        best = max(offered, key=lambda token: float(logits[index, token]))
        right.append(float(best == answer))
    among = rows[rows["metric"] == "among answers"].sort_values("prompt")["value_before"]
    assert among.tolist() == right


def found_answers(found: Any, smol: Model, kind: str) -> list[int]:
    singles = two_hop(smol, 6, hop="first", seed=1), two_hop(smol, 6, hop="second", seed=1)
    return [
        answer
        for single in singles
        for answer, each in zip(single.answers.tolist(), two_hop_facts(single)["kind"], strict=True)
        if each == kind
    ]


def test_rows_and_what_was_seen(smol: Model, task: Task, singles: tuple[Task, Task], found: Any) -> None:
    _, result = found
    table = result.table
    train, test = two_hop_split(task, seed=5)
    facts = two_hop_facts(test)
    assert set(table["component"]) == set(VARIANTS) and set(table["value_seed"]) == {5}
    for variant in VARIANTS:
        rows = result.filter(component=variant, target="two_hop", metric="first choice").table
        assert rows["src"].tolist() == facts["entity"].tolist()
        assert rows["dst"].tolist() == facts["country"].tolist()
        assert rows["token"].tolist() == facts["relation"].tolist()
        seen = [answer in train.answers.tolist() for answer in test.answers.tolist()]
        assert rows["value_seen"].astype(bool).tolist() == seen
    assert not set(table["dst"]) & set(two_hop_facts(train)["country"]), "single hops are of held-out countries too"
    np.testing.assert_allclose(table["value"], table["value_after"] - table["value_before"])
    assert result.meta["n_parameters"] == 4 * smol.d_model * 16
    # The variants are different modules, measured from one start.
    logs = result.filter(metric="log-probability", target="two_hop").table
    after = logs.pivot(index="prompt", columns="component", values="value_after")
    assert (after.std(axis=1) > 1e-3).all()
    assert (logs.groupby("prompt")["value_before"].nunique() == 1).all()
    answers = two_hop_answers(smol, test, *(two_hop_split(single, seed=5)[1] for single in singles))
    theirs = answers.table.query("metric == 'log-probability' and target == 'two_hop'").sort_values("prompt")
    # as above
    np.testing.assert_allclose(logs.groupby("prompt")["value_before"].first(), theirs["value"], rtol=0, atol=2e-3)


def test_a_second_call_reads(
    smol: Model, task: Task, singles: tuple[Task, Task], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = found

    def no_training(*given: Any, **named: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(gained, "train_back_attention", no_training)
    again = two_hop_gain(smol, task, source=20, target=26, singles=singles, seeds=(5,), folder=folder, **SHORT)
    assert again.table.equals(result.table)
    with pytest.raises(ValueError, match="another recipe"):
        two_hop_gain(smol, task, source=20, target=25, singles=singles, seeds=(5,), folder=folder, **SHORT)


def test_shuffled_answers_stay_with_their_relation(task: Task) -> None:
    other = gained._shuffled(task, 3)
    assert not torch.equal(other.answers, task.answers)
    for rows in two_hop_facts(task).groupby("relation").indices.values():
        assert sorted(other.answers[rows].tolist()) == sorted(task.answers[rows].tolist())
    assert torch.equal(gained._shuffled(task, 3).answers, other.answers)


def test_refusals(smol: Model, task: Task, tmp_path: Path) -> None:
    for variants in (("reversed",), ()):
        with pytest.raises(ValueError, match="give some of 'back attention', 'plain attention', 'shuffled answers'"):
            two_hop_gain(smol, task, source=1, target=2, variants=variants, folder=tmp_path)
    with pytest.raises(ValueError, match="needs a task"):
        two_hop_answers(smol)
