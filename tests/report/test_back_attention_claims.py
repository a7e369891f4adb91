"""The claims of back attention: each measurement on tables small enough to count by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from interp.core.result import Result
from interp.models import Model
from interp.report import claims
from interp.report.claims import Untestable
from interp.report.papers import back_attention as paper
from interp.tasks import two_hop, two_hop_facts

KEYS = ["component", "value_seed", "target", "prompt", "src", "dst", "metric"]


def depths(one: list[float], back: list[float], two: list[float], *, late: int = 10) -> Result:
    """Curves of three measurements; the model with back attention has its last accuracy at step `late` already."""
    rows = []
    for model, ends in ((paper.ONE, one), (paper.BACK, back), (paper.TWO, two)):
        for seed, end in enumerate(ends):
            values = {0: 0.0, late: end, 20: end} if model == paper.BACK else {0: 0.0, 10: end, 20: end}
            values.setdefault(10, 0.0)
            rows += [
                {"component": model, "value_seed": seed, "step": step, "metric": metric, "value": value}
                for step, value in sorted(values.items())
                for metric in ("held-out accuracy", "held-out loss", "accuracy")
            ]
    meta = {"n_parameters": {paper.ONE: 10, paper.BACK: 14, paper.TWO: 20}}
    return Result("depths", pd.DataFrame(rows), "by metric", meta=meta)


def gain(after: dict[str, list[float]], before: list[float], singles: float = 0.0) -> Result:
    """Four prompts of two entities of each variant, the first entity with three of them."""
    rows = []
    for variant, values in after.items():
        for metric in ("first choice", "among answers"):
            for prompt, (old, new) in enumerate(zip(before, values, strict=True)):
                entity = "a" if prompt < 3 else "b"
                rows.append([variant, 1, "two_hop", prompt, entity, entity.upper(), metric, old, new])
            for hop, change in (("first", 0.0), ("second", singles)):
                rows.append([variant, 1, f"two_hop_{hop}", 0, "a", "A", metric, 0.5, 0.5 + change])
    table = pd.DataFrame(rows, columns=[*KEYS, "value_before", "value_after"])
    return Result("gain", table.assign(value=table["value_after"] - table["value_before"]), "by metric")


FOUND = gain(
    {"back attention": [1, 1, 1, 1], "plain attention": [1, 1, 1, 0], "shuffled answers": [0, 0, 0, 0]},
    [0, 0, 0, 1],
    -0.2,
)


def test_small_transformers_seed_by_seed() -> None:
    found = depths([0.1, 0.3, 0.2], [0.9, 0.2, 0.95], [1.0, 1.0, 1.0], late=20)
    table = paper.finals(found)
    assert table["parameters"].tolist() == [10, 14, 20]
    assert table.loc[paper.BACK, ["seed 0", "seed 1", "seed 2"]].tolist() == [0.9, 0.2, 0.95]
    assert table.loc[paper.ONE, "mean"] == pytest.approx(0.2)
    numbers = paper._toy(found, "x")
    assert numbers["x_depth"] == pytest.approx(0.8)  # 0.9, 0.7, 0.8
    assert numbers["x_gain"] == pytest.approx(0.75)  # 0.8, -0.1, 0.75
    assert numbers["x_closed"] == pytest.approx((2.05 - 0.6) / (3.0 - 0.6))
    assert paper._steps_needed(found, paper.BACK).tolist() == [20, 40, 20], "never: twice all steps"
    assert isinstance(paper._toy(depths([0.5], [0.4], [0.5]), "x")["x_closed"], Untestable)


def test_every_entity_counts_the_same() -> None:
    table = paper.intervals(FOUND, value="value_before").set_index(["component", "target", "metric"])
    row = table.loc[("back attention", "two_hop", "first choice")]
    assert (row["n"], row["mean"], row["low"], row["high"]) == (2, 0.5, 0.0, 1.0)
    by_country = paper.intervals(FOUND, value="value_before", by="country")
    assert by_country["mean"].tolist() == table["mean"].tolist()
    gains = paper.gains(FOUND).loc[("among answers", "plain attention")]
    assert gains[["entities", "before", "after"]].tolist() == [2, 0.5, 0.5]


def test_variants_are_compared_prompt_by_prompt() -> None:
    rows = paper.against(FOUND, "plain attention").filter(target="two_hop", metric="first choice").table
    assert rows["value"].tolist() == [0, 0, 0, 1]
    differences = paper.differences({"shuffled answers": paper.against(FOUND, "shuffled answers")})
    row = differences.loc[("shuffled answers", "among answers")]
    assert row.tolist() == [1.0] * 5
    plain = paper.differences({"plain attention": paper.against(FOUND, "plain attention")})
    assert plain.loc[("plain attention", "first choice")].tolist() == [0.5, 0.0, 1.0, 0.0, 1.0]


def test_the_same_chains_in_both_orders(smol: Model) -> None:
    tasks = [two_hop(smol, 200, order=order, seed=i) for i, order in enumerate(("entity_first", "relation_first"))]
    cut = paper.same_chains(*tasks)
    facts = [two_hop_facts(task)[["entity", "relation"]].to_numpy().tolist() for task in cut]
    assert facts[0] == facts[1] and 5 < len(facts[0]) < 100
    assert cut[0].answers.tolist() == cut[1].answers.tolist()
    everything = [set(map(tuple, two_hop_facts(task)[["entity", "relation"]].to_numpy())) for task in tasks]
    assert {tuple(row) for row in facts[0]} == everything[0] & everything[1]


def order(first: list[float], second: list[float]) -> Result:
    parts = [
        Result("answers", pd.DataFrame({"prompt": [0, 1], "src": ["a", "b"], "dst": ["A", "B"], "target": "two_hop",
                                        "metric": "among answers", "value": values}), "share")
        for values in (first, second)
    ]  # fmt: skip
    return paper.orders(*parts)


def test_orders() -> None:
    row = paper.orders_table(order([0, 1], [1, 1])).loc["among answers"]
    assert row.tolist() == [0.5, 1.0, 0.5, 0.0, 1.0]


def test_every_claim_is_measured() -> None:
    toy = depths([0.1], [0.95], [1.0])
    given: dict[str, Any] = {"composition": toy, "sums": toy, "gain": FOUND, "order": order([0, 0], [1, 1])}
    numbers = paper.measured(**given)
    assert set(numbers) == set(claims.read("back_attention")[2]["id"])
    assert numbers["faster"] == 1.0 and numbers["parameters"] == 0.7
    assert numbers["frozen_first"] == pytest.approx(1.0)
    assert numbers["frozen_answers"] == 0.0  # entity a gains 1, entity b nothing
    assert (numbers["over_plain"], numbers["over_shuffled"]) == (0.0, 1.0)
    assert numbers["singles_unharmed"] == pytest.approx(-0.2)
    assert numbers["order"] == 1.0
    nothing = gain({name: [0, 0, 0, 0] for name in ("back attention", "plain attention", "shuffled answers")}, [0] * 4)
    assert isinstance(paper.measured(**given | {"gain": nothing})["frozen_first"], Untestable)
