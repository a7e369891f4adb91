"""The table of planted nets: by hand for one net, and as the README has it; the claims' numbers, of made-up results."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from interp.circuits import faithfulness
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.core.result import Result
from interp.models import planted
from interp.report.papers import circuit_discovery as paper

ROOT = Path(__file__).resolve().parents[2]
QUICK = [name for name in paper.FINDERS if name != "edge pruning"]  # which trains for 20 seconds


@pytest.fixture(scope="module")
def table():
    return paper.planted_table(QUICK)


def test_the_or_gate_is_found_as_arithmetic_says(table):
    rows = table[table["net"] == "or_gate"].set_index("method")
    # Five edges: two heads that read, two that write into the MLP, and the MLP's. One cut, or a gradient where both
    # heads are on, sees the MLP's only; half-way between the prompts each head counts.
    assert rows.loc[["exact", "EAP", "EAP-IG", "ACDC"], "found"].tolist() == [1, 1, 5, 3]
    assert (rows["found"] + rows["missed"] == rows["true"]).all()
    assert rows.loc["exact", "false alarms"] == 0


def test_the_gap_is_that_of_the_prompts():
    assert paper.planted_gap(planted.or_gate()) == pytest.approx(8, abs=1e-4)  # logits of an answer copied once


def test_the_readme_has_this_table(table):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = text.partition("<!-- planted: begin")[2].partition("<!-- planted: end")[0].splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1:-1] for line in written if line.startswith("| ")}
    wide = paper.shown(table)
    assert cells["| method"] == list(wide.columns)
    for name, row in wide.iterrows():
        assert cells[f"| {name}"] == list(row), f"the README's row of {name} is not what it finds"


def test_markdown_has_a_row_a_method(table):
    lines = paper.markdown(table).splitlines()
    assert len(lines) == 2 + len(QUICK)
    assert len({line.count("|") for line in lines}) == 1


def test_sample_has_the_best_and_as_many_others():
    circuit = faithfulness.random_scores(Graph(2, 2, 2), seed=1)
    some = paper.sample(circuit, 4, 0)
    assert len(some) == 8
    assert (some.kept & circuit.top(4).kept).sum() == 4
    assert (some.kept == paper.sample(circuit, 4, 0).kept).all()


def test_node_scores_are_sums_over_the_edges_out_of_each():
    circuit = faithfulness.random_scores(Graph(2, 2, 2))
    by_hand = [circuit.edges.query("src == @name")["value"].sum() for name in ("m0", "m1")]
    np.testing.assert_allclose(paper.node_scores(circuit), by_hand)


def test_resampled_prompts_that_agree_give_one():
    graph = Graph(1, 2, 2)
    one = faithfulness.random_scores(graph).scores
    same = Result(
        "e", pd.DataFrame({"value": [0.0] * 3}), "logits", {"scores": (("prompt", "dst", "src"), np.stack([one] * 3))}
    )
    assert paper.resampled(same, graph, 3, n_boot=4, seed=0) == 1
    rng = np.random.default_rng(0)
    other = {"scores": (("prompt", "dst", "src"), rng.normal(size=(3, *one.shape)))}
    assert paper.resampled(Result("e", same.table, "logits", other), graph, 3, n_boot=6, seed=0) < 1


def _areas(cmd, cpr):
    rows = [{"target": name, "metric": "cmd", "value": value} for name, value in cmd.items()]
    rows += [{"target": name, "metric": "cpr", "value": value} for name, value in cpr.items()]
    return Result("areas", pd.DataFrame(rows), "area")


def test_measured_of_made_up_numbers(table):
    ioi = _areas({"EAP": 0.5, "EAP-IG": 0.2, "random": 0.8, "flow routes": 0.6}, {"EAP": 0.5, "EAP-IG": 0.9})
    years = _areas({"EAP": 0.3, "EAP-IG": 0.2, "random": 0.5}, {"EAP": 0.6, "EAP-IG": 0.4})
    areas = {"ioi": ioi, "greater_than": years}
    graph = Graph(2, 2, 2)
    scores = {name: faithfulness.random_scores(graph, seed=i) for i, name in enumerate(("EAP", "EAP-IG", "RelP"))}
    mlps = pd.DataFrame({"patched": [1.0, 2, 3], "RelP": [2.0, 4, 6], "attribution patching": [3.0, 2, 1]})
    sparse = pd.DataFrame({"edges": [0.001, 0.01, 0.02], "faithfulness": [0.5, 0.85, 0.95]})
    found = paper.measured(
        cmd=areas, cpr=areas, patched=scores["EAP"], scores=scores, mlps=mlps, sparse=sparse, stable=0.7,
        ablations={"corrupt": 0.9, "zero": -0.1}, table=table, eap_forwards=6.0,
    )  # fmt: skip
    expected = {
        "ig_faithful": 0.2, "ig_performs": 0.1, "beats_random": 0.3, "routes_weaker": 0.4, "relp_mlp": 2.0,
        "eap_exact": 1.0, "sparse_gt": 0.01, "fast": graph.n_edges / 6, "stable": 0.7, "ablation_matters": 1.0,
    }  # fmt: skip
    for claim, value in expected.items():
        assert found[claim] == pytest.approx(value), claim
    assert 0 <= found["planted_exact"] <= 1
    assert found["planted_eap"] in (0, 1, 2)
    assert not isinstance(found["same_heads"], float)  # heads of another model
    assert {"pruning_wins", "hand_circuit"} <= found.keys()


def test_agreement_of_a_method_with_itself_is_one():
    circuit = faithfulness.random_scores(Graph(2, 2, 2))
    assert paper.agreement({"itself": circuit}, circuit).loc["itself"].tolist() == [1, 1]


def test_mlp_table_turns_relp_round():
    circuit = Circuit.of(Graph(2, 2, 2), np.ones(Graph(2, 2, 2).possible.shape), unit="logits")
    rows = pd.DataFrame({"layer": [1, 0], "mean": [0.1, 0.2]})
    table = paper.mlp_table(rows, rows, circuit)
    assert table["patched"].tolist() == [0.2, 0.1]
    assert (table["RelP"] < 0).all()
