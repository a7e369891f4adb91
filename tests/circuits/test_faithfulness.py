"""Faithfulness is 1 with everything, 0 with nothing, and 1 for the planted circuits; areas are those done by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from interp.circuits.circuit import Circuit
from interp.circuits.faithfulness import areas, curve, faithfulness, intervals, random_null, random_scores
from interp.circuits.graph import Graph
from interp.core.metrics import kl
from interp.core.result import Result
from interp.models import planted, toy
from interp.models.hooks import run
from interp.tasks.task import Task

CASES = ["ioi_like", "induction_like", "cancelling_pair", "or_gate", "and_gate", "backup_head", "saturation",
         "greater_than_like"]  # fmt: skip


def task_of(case):
    return Task(
        case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, dict(case.positions)
    )


@pytest.fixture(scope="module")
def ioi():
    case = planted.ioi_like()
    return case.model, task_of(case), Circuit.from_edges(Graph.of(case.model), case.edges, meta=case.model.provenance)


def everything(circuit):
    return circuit.with_kept(circuit.graph.possible)


def nothing(circuit):
    return circuit.with_kept(np.zeros_like(circuit.kept))


@pytest.mark.parametrize("name", CASES)
def test_planted_circuits_are_faithful_and_lose_it_with_any_part_that_matters(name):
    case = getattr(planted, name)()
    circuit = Circuit.from_edges(Graph.of(case.model), case.edges, meta=case.model.provenance)
    task = task_of(case)
    every = {"truth": circuit, "all": everything(circuit), "none": nothing(circuit)}
    f = faithfulness(case.model, task, every).grid("target", "prompt").mean(1)
    # Planted logits are sums of a few numbers in float32.
    assert f["truth"] == pytest.approx(1, abs=1e-4)
    assert f["all"] == pytest.approx(1, abs=1e-5)
    assert f["none"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean", "position_mean", "resample"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_is_the_model_and_none_the_ablation(architecture, ablation):
    model = toy.random(architecture)
    tokens = toy.random_tokens(model, 6, 5)
    task = Task(
        "random", tuple(map(str, range(6))), tokens, "random", toy.random_tokens(model, 6, 5, seed=1),
        tokens[:, 1], tokens[:, 2],
    )  # fmt: skip
    graph = Graph.of(model)
    full = Circuit.of(graph, np.zeros(graph.possible.shape), unit="none", meta=model.provenance)
    every = {"all": full, "none": nothing(full)}
    found = faithfulness(model, task, every, ablation=ablation, min_oriented=0.0, **oriented(model, task, ablation))
    table = found.table.set_index(["target", "prompt"])
    logits = run(model, task.clean).logits[:, -1]
    rows = torch.arange(6)
    truth = (logits[rows, task.answers] - logits[rows, task.wrong]).numpy()
    sign = found.meta["metric"] == "flipped"
    # float32 through two layers of another order of sums
    np.testing.assert_allclose(table.loc["all", "value_metric"], -truth if sign else truth, atol=2e-5)
    assert table.loc["all", "value"].mean() == pytest.approx(1)
    assert table.loc["none", "value"].to_numpy() == pytest.approx(0)
    assert table.loc["all", "value_kl"].to_numpy() == pytest.approx(0, abs=1e-5)
    if ablation == "corrupt":
        other = run(model, task.corrupt).logits[:, -1]
        np.testing.assert_allclose(table.loc["none", "value_kl"], kl(other, logits).numpy(), rtol=1e-3, atol=1e-5)


def test_positions_say_where_edges_are_cut(ioi):
    model, task, circuit = ioi
    every = {"all": everything(circuit), "truth": circuit, "none": nothing(circuit)}
    plain, whole = (
        faithfulness(model, task, every, positions=each) for each in (None, list(range(task.clean.shape[1])))
    )
    np.testing.assert_allclose(plain.table["value_metric"], whole.table["value_metric"], atol=1e-5)
    end = faithfulness(model, task, every, positions="end")
    assert end.meta["positions"] == "end"
    f = end.grid("target", "prompt").mean(1)
    assert f["all"] == pytest.approx(1, abs=1e-5)
    assert f["none"] == pytest.approx(0, abs=1e-5)
    # The logits are read at the end: with nothing in there, nothing of the clean prompt arrives.
    np.testing.assert_allclose(*(each.filter(target="none").table["value_metric"] for each in (plain, end)), atol=1e-4)
    # What only the first position reads decides nothing: the edges into it may all be cut.
    with pytest.raises(ValueError, match="every edge is cut"):
        faithfulness(model, task, every, positions=0)
    for found in (
        curve(model, task, everything(circuit), sizes=[0.5, 1.0], positions=["end"]),
        random_null(model, task, circuit, n=2, positions=["end"]),
    ):
        assert found.meta["positions"] == ["end"]
        ends = (each.table.groupby("prompt")["value_empty"].first() for each in (found, end))
        np.testing.assert_allclose(*ends, atol=1e-4)


def oriented(model, task, ablation):
    """The metric, turned round where a random model has it the wrong way."""
    from interp.circuits._ablated import ablated, metric_of
    from interp.core.readout import readout

    graph = Graph.of(model)
    sets = np.stack([graph.possible, np.zeros_like(graph.possible)])
    full, empty = metric_of(ablated(model, task, graph, ablation=ablation), sets, identity={"method": "test"}).mean(0)
    if full > empty:
        return {"metric": "logit_diff"}
    read = readout(model, task, "logit_diff")
    flipped = type(read)("flipped", "logits", read.where, read.tokens, lambda logits, own: -read.score(logits, own))
    return {"metric": flipped}


def test_the_mean_of_value_is_the_ratio_of_means_and_value_own_the_mean_of_ratios(ioi):
    model, task, circuit = ioi
    half = circuit.with_kept(circuit.kept.copy())
    half.kept[circuit.graph.edge("a2.h1", "logits")] = False
    table = faithfulness(model, task, half).table
    own, full, empty = (table[c].to_numpy() for c in ("value_metric", "value_full", "value_empty"))
    assert table["value"].mean() == pytest.approx((own.mean() - empty.mean()) / (full.mean() - empty.mean()))
    assert table["value_own"].to_numpy() == pytest.approx((own - empty) / (full - empty))
    # By construction the first mover does 4/5; what is left is 2/5 - 1/5.
    assert table["value"].mean() == pytest.approx(0.2, abs=0.01)


def test_curves_and_their_areas_on_a_planted_circuit(ioi):
    model, task, circuit = ioi
    n, size = circuit.graph.n_edges, len(circuit)
    true = circuit.with_kept(circuit.graph.possible)
    shares = [size / 2 / n, size / n, 0.5, 1.0]
    found = curve(model, task, {"true": true, "random": random_scores(circuit.graph)}, sizes=shares)
    f = found.grid("target", "value_share")
    assert f.loc["true"].iloc[1:].to_numpy() == pytest.approx(1, abs=1e-4)
    assert f.loc["random"].iloc[:2].to_numpy() == pytest.approx(0, abs=1e-4)
    steps = found.table.drop_duplicates("step")
    assert steps["step"].tolist() == [size // 2, size, n // 2, n]
    assert found.filter(target="true", step=size).table["value_edges"].iloc[0] == size
    area = areas(found).table.set_index(["target", "metric"])["value"]
    start = f.loc["true"].iloc[0]
    by_hand = (1 - shares[1]) + (shares[1] - shares[0]) * (start + 1) / 2
    assert area["true", "cpr"] == pytest.approx(by_hand, abs=1e-4)
    assert area["true", "cmd"] == pytest.approx((shares[1] - shares[0]) * abs(1 - start) / 2, abs=1e-4)
    assert area["random", "cmd"] > 0.2


def as_curve(f, shares, n_prompts=3):
    """A curve's table with f at each share, gaps of 2, 3, 4 and empty runs of 1."""
    rows = [
        {"prompt": p, "target": "c", "step": i, "value_share": x, "value": y, "value_metric": 1 + y * (2.0 + p),
         "value_full": 3.0 + p, "value_empty": 1.0}
        for i, (x, y) in enumerate(zip(shares, f, strict=True)) for p in range(n_prompts)
    ]  # fmt: skip
    return Result("faithfulness.curve", pd.DataFrame(rows), "fraction")


@pytest.mark.parametrize(("f", "cpr", "cmd"), [
    ([1.0] * 10, 0.999, 0.0),  # the ideal of MIB's sizes
    ([0.0] * 10, 0.0, 0.999),
    ([0.0] * 9 + [1.0], 0.25, 0.749),  # a line from .5 to 1: the "Random" of MIB
    ([2.0] * 10, 1.998, 0.999),  # above 1: better by CPR, as far off by CMD
    ([-1.0] * 9 + [1.0], -0.499, 1.498),  # CPR is signed
])  # fmt: skip
def test_areas_by_hand(f, cpr, cmd):
    from interp.circuits.faithfulness import MIB_SIZES

    table = areas(as_curve(f, MIB_SIZES), n_boot=50).table.set_index("metric")
    assert table.loc["cpr", "value"] == pytest.approx(cpr)
    assert table.loc["cmd", "value"] == pytest.approx(cmd)
    assert table.loc["cpr", "value_ideal"] == pytest.approx(0.999)
    # Every prompt has the same curve, so no resample differs.
    assert table["value_low"].to_numpy() == pytest.approx(table["value"].to_numpy())


def test_cmd_where_the_curve_crosses_1_between_sizes():
    """|1 - f| is taken at the sizes, as MIB does, not in between: from .5 to 1.5 the distance stays .5."""
    table = areas(as_curve([0.5, 1.5], [0.5, 1.0]), n_boot=10).table.set_index("metric")
    assert table.loc["cmd", "value"] == pytest.approx(0.25)


def test_intervals_resample_the_gap_too():
    rng = np.random.default_rng(0)
    full = rng.uniform(0.5, 4, 40)
    table = pd.DataFrame(
        {"prompt": range(40), "target": "c", "value_full": full, "value_empty": 0.0, "value_metric": 0.7 * full}
    )
    table = table.assign(value=table["value_metric"] / full.mean(), value_own=0.7)
    found = Result("faithfulness.faithfulness", table, "fraction")
    row = intervals(found).table.iloc[0]
    # Each prompt keeps exactly 0.7 of its gap: no resample can differ, though `value` itself varies a lot.
    assert (row["value_low"], row["value"], row["value_high"]) == pytest.approx((0.7, 0.7, 0.7))
    fixed = found.summary(["target"]).iloc[0]
    assert fixed["high"] - fixed["low"] > 0.1
    spread = table.assign(value_metric=np.where(np.arange(40) % 2, full, 0.0))
    row = intervals(Result("x", spread.assign(value=spread["value_metric"] / full.mean()), "fraction")).table.iloc[0]
    assert row["value_low"] < row["value"] < row["value_high"]


@pytest.mark.parametrize("draw", ["uniform", "connected"])
def test_random_circuits_keep_nothing_of_a_planted_one(ioi, draw):
    model, task, circuit = ioi
    found = random_null(model, task, circuit, n=19, draw=draw)
    f = found.table.groupby("step")["value"].mean()
    assert f[0] == pytest.approx(1, abs=1e-4)
    assert np.abs(f[1:]).max() < 0.05
    assert found.meta["p"] == 1 / 20
    assert found.meta["edges"] == len(circuit)
    again = random_null(model, task, circuit, n=19, draw=draw)
    assert again.table.equals(found.table)


def test_a_null_of_almost_all_edges_is_as_good(ioi):
    model, task, circuit = ioi
    found = random_null(model, task, everything(circuit), n=4)
    assert found.meta["p"] == 1.0


def test_bad_input_is_refused(ioi):
    model, task, circuit = ioi
    with pytest.raises(ValueError, match="there are no circuits"):
        faithfulness(model, task, {})
    with pytest.raises(ValueError, match="find one of this model"):
        faithfulness(planted.and_gate().model, task, circuit)
    with pytest.raises(ValueError, match=r"has 8 edges in, and the largest size asks for .*before it was cut"):
        curve(model, task, circuit)
    for sizes in ([], [0.5, 0.1], [0.0, 1.0], [0.5, 1.5]):
        with pytest.raises(ValueError, match="shares of all edges that grow"):
            curve(model, task, everything(circuit), sizes=sizes)
    with pytest.raises(ValueError, match="selection='best' is not known"):
        curve(model, task, everything(circuit), selection="best")
    with pytest.raises(ValueError, match="needs the table of `curve`"):
        areas(faithfulness(model, task, circuit))
    with pytest.raises(ValueError, match="at least 1"):
        random_null(model, task, circuit, n=0)
    with pytest.raises(ValueError, match="every edge is cut"):
        faithfulness(
            model, Task("same", task.prompts, task.clean, "x", task.corrupt, task.wrong, task.answers), circuit
        )
    with pytest.raises(ValueError, match="source 'noise' is not known"):
        faithfulness(model, task, circuit, ablation="noise")
