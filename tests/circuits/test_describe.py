"""Planted heads look where they were made to look, and write what they were made to write."""

from __future__ import annotations

import pytest

from interp.circuits.circuit import Circuit
from interp.circuits.describe import describe_nodes
from interp.circuits.graph import Graph
from interp.core.edits import Edit
from interp.core.readout import readout
from interp.core.rerun import rerun
from interp.models import planted, toy
from interp.report.circuit import view
from interp.tasks.task import Task


def test_movers_look_at_the_answer_and_write_it():
    case = planted.ioi_like()
    task = Task("ioi", case.prompts, case.clean, "x", case.corrupt, case.answers, case.wrong, dict(case.positions))
    circuit = Circuit.from_edges(Graph.of(case.model), case.edges, meta=case.model.provenance)
    found = describe_nodes(case.model, task, circuit, prompt=3, k=2)
    answer = case.model.to_str_tokens(case.answers[3:4])[0]
    for head in ("a2.h1", "a2.h2"):
        looked, wrote = (found.filter(component=head, metric=m, step=0).table.iloc[0] for m in ("attention", "writes"))
        assert looked["k_pos"] == int(case.positions["io"][3]) and looked["token"] == answer
        assert wrote["token"] == answer and wrote["k_pos"] == -1
    # The first mover writes twice what the second does.
    values = found.filter(metric="writes", step=0).table.set_index("component")["value"]
    assert values["a2.h1"] == pytest.approx(2 * values["a2.h2"], rel=0.01)
    inhibition = found.filter(component="a1.h0", metric="attention", step=0).table.iloc[0]
    assert inhibition["k_pos"] == int(case.positions["s2"][3])
    assert set(found.table["component"]) == set(circuit.nodes) - {"input"}
    assert "a2.h1" in view(circuit, details=found).fragment


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_a_last_layer_node_writes_is_what_the_logits_lose_without_it(architecture):
    """In the last layer nothing else reads it: an ablation by an independent engine says the same."""
    model = toy.random(architecture, weights="raw")  # a processed unembedding has no mean to take away
    tokens = toy.random_tokens(model, 2, 6)
    last = model.n_layers - 1
    task = Task("random", ("a", "b"), tokens, "random", answers=tokens[:, 1], wrong=tokens[:, 2])
    circuit = Circuit.from_edges(Graph.of(model), [(f"m{last}", "logits")])
    vocabulary = model.bridge.cfg.d_vocab
    found = describe_nodes(model, task, circuit, prompt=1, k=vocabulary).table
    wrote = found.assign(value=found["value"])
    texts = model.to_str_tokens(list(range(vocabulary)))
    by_token = dict(zip(wrote["token"], wrote["value"], strict=True))
    values = rerun(model, tokens, [[], [Edit("mlp_out", last, value=0.0)]], readout(model, task), mask=None)
    lost = float(values[0, 1] - values[1, 1])
    a, b = (texts[int(ids[1])] for ids in (task.answers, task.wrong))
    assert by_token[a] - by_token[b] == pytest.approx(lost, abs=1e-4)  # float32 logits
    writes = found[found["metric"] == "writes"]["value"]
    assert len(writes) == vocabulary
    assert writes.mean() == pytest.approx(0, abs=1e-5)  # less its mean over the vocabulary
    assert writes.std() > 0.01


def test_bad_input_is_refused():
    case = planted.or_gate()
    task = Task("or", case.prompts, case.clean, "x", case.corrupt, case.answers, case.wrong, dict(case.positions))
    circuit = Circuit.from_edges(Graph.of(case.model), case.edges, meta=case.model.provenance)
    with pytest.raises(ValueError, match="prompt=99: task 'or' has prompts 0 to 17"):
        describe_nodes(case.model, task, circuit, prompt=99)
    with pytest.raises(ValueError, match="find one of this model"):
        describe_nodes(planted.and_gate().model, task, circuit)
