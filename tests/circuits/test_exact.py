"""Exact edge patching: weighted edges one at a time, planted edges, and what a single cut cannot show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp.circuits import exact
from interp.circuits._ablated import ablated
from interp.circuits._edges import as_weights
from interp.circuits._writes import Writes
from interp.circuits.circuit import Circuit
from interp.circuits.eap import eap
from interp.circuits.exact import patch_edges
from interp.circuits.graph import Graph
from interp.core.readout import readout
from interp.models import load, planted, toy
from interp.tasks.task import Task


def task_of(case):
    pairs = (case.corrupt, case.answers, case.wrong, case.positions)
    return Task(case.name, case.prompts, case.clean, "planted", *pairs)


def random_task(architecture, *, n=3, length=7, shared=2, weights="processed"):
    model = toy.random(architecture, weights=weights)
    tokens = toy.random_tokens(model, 2 * n, length)
    clean, corrupt = tokens[:n], tokens[n:].clone()
    corrupt[:, :shared] = clean[:, :shared]
    ids = 2 + torch.arange(n)
    return model, Task("pairs", tuple("abcdefgh"[:n]), clean, "random", corrupt, ids, ids + 20)


def one_by_one(model, task, graph, *, metric="logit_diff", ablation="corrupt", positions=None):
    """Each edge a whole forward pass with all others in."""
    made = ablated(model, task, graph, metric=metric, ablation=ablation, positions=positions).run(slice(None))
    where = np.argwhere(graph.possible)
    kept = np.repeat(graph.possible[None], len(where) + 1, 0)
    kept[np.arange(len(where)), where[:, 0], where[:, 1]] = False
    with torch.no_grad():
        parts = [made.forward(as_weights(some, task.clean))[0] for some in np.array_split(kept, 8)]
    metrics = torch.cat(parts).double().mean(1).numpy()
    scores = np.zeros(graph.possible.shape)
    scores[where[:, 0], where[:, 1]] = metrics[:-1] - metrics[-1]
    return scores


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"grouped": False, "metric": "kl"}),
        ("gpt2", {"ablation": "zero", "metric": "log_prob"}),
        ("gpt_neox", {"ablation": "position_mean"}),
        ("gemma", {"metric": "prob"}),
        ("qwen3", {"ablation": "resample"}),
        ("mistral", {"ablation": "mean", "metric": "kl"}),
        ("llama", {"positions": [3, 6]}),
        ("gpt_neox", {"positions": [-2], "metric": "kl"}),
    ],
)
def test_every_score_is_a_forward_pass_with_one_edge_out(architecture, options):
    model, task = random_task(architecture)
    graph = Graph.of(model, grouped=options.get("grouped", True))
    found = patch_edges(model, task, **options)
    want = one_by_one(model, task, graph, **{key: options[key] for key in options if key != "grouped"})
    # Differences of two float32 metrics of about 10, whose sums run in different orders.
    assert np.allclose(found.scores, want, atol=1e-4)
    assert (np.abs(want) > 1e-3).sum() > 20
    assert found.kept.sum() == graph.n_edges == found.meta["n_runs"]


def test_positions_into_the_logits_are_the_estimate_and_elsewhere_none():
    model, task = random_task("llama")
    everything, at_end = patch_edges(model, task), patch_edges(model, task, positions=[-1])
    row = everything.graph.destination_index["logits"]
    assert np.allclose(at_end.scores[row], everything.scores[row], atol=1e-5)  # read at the end alone
    # Two ways to the same metric of about 10 in float32.
    assert np.allclose(patch_edges(model, task, positions=[4]).scores[row], 0, atol=1e-5)
    assert np.allclose(patch_edges(model, task, positions=list(range(7))).scores, everything.scores, atol=1e-5)
    assert at_end.meta["positions"] == [-1]
    case = planted.cancelling_pair()  # linear, so that the gradient is exact
    task = task_of(case)
    for positions in ("end", 0):
        found, estimate = (each(case.model, task, positions=positions) for each in (patch_edges, eap))
        assert np.allclose(found.scores, estimate.scores, atol=1e-4)


def test_some_edges_are_those_of_all():
    model, task = random_task("llama")
    everything = patch_edges(model, task)
    named = [("input", "a1.g0<k>"), ("a0.h1", "m2"), ("m1", "logits")]
    some = patch_edges(model, task, edges=named)
    assert {(row.src, row.dst) for row in some.edges.itertuples()} == set(named)
    assert np.allclose(some.scores[some.kept], everything.scores[some.kept], atol=1e-5)
    assert not some.scores[~some.kept].any()
    again = patch_edges(model, task, edges=everything.top(10))
    assert np.allclose(again.scores[again.kept], everything.scores[again.kept], atol=1e-5)
    assert len(again) == 10


class _Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, each.numel() if isinstance(each, torch.Tensor) else 0)
        return out


def wrote_of(run, changes):
    """What every source writes, `[src token d_model]`: what `Writes` does not hold."""
    parts = [run.embed[None]]
    for layer, change in enumerate(changes):
        parts += [torch.einsum("thd,hdm->htm", change.z[0], run.steps.w_o(layer)), change.mlp]
    return torch.cat(parts)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_vectors_of_sources_are_made_for_those_asked_for(architecture):
    model, task = random_task(architecture)
    graph = Graph.of(model)
    run = ablated(model, task, graph).run(slice(None))
    _, changes = run.forward(as_weights(graph.possible[None], task.clean))
    small, large = Writes(run, changes), wrote_of(run, changes)
    rng = np.random.default_rng(0)
    for n in (0, 1, 5, 5, len(graph.sources)):  # twice the same number: sums of others are not taken for them
        some = rng.permutation(len(graph.sources))[:n]
        # float32 products of other shapes, of numbers of about 1.
        assert torch.allclose(small.vectors(some), large[some], atol=1e-5)
        for tokens in (slice(None), run.at, torch.arange(len(run.embed)) % 3 == 0):
            assert torch.allclose(small.total(some, tokens), large[some][:, tokens].sum(0), atol=1e-4)
    small.changes[1].z[:, 2] = 0
    changed = np.ones(len(graph.sources), bool)
    changed[graph.source_index["a1.h2"]] = False
    assert (small.changed(slice(None)) == changed).all()
    held = sum(each.numel() for change in small.changes for each in change)
    assert held == graph.n_layers * len(run.embed) * 2 * model.d_model


def test_no_tensor_holds_every_source_at_every_token():
    model, task = random_task("llama", n=4, length=40)
    with _Largest() as largest:
        patch_edges(model, task, edges=[("a0.h1", "m1"), ("m0", "a2.h1<q>")], metric=readout(model, task))
    tokens = len(task) * 38  # from the first that differs
    assert largest.numel < len(Graph.of(model).sources) * tokens * model.d_model


RECOVERED = {
    "ioi_like": planted.ioi_like, "induction_like": planted.induction_like, "and_gate": planted.and_gate,
    "greater_than_like": planted.greater_than_like, "saturation": planted.saturation,
    "cancelling_pair": planted.cancelling_pair, "saturated softmax": lambda: planted.induction_like(sharpness=60.0),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOVERED)
def test_planted_edges_score_and_no_other_does(name):
    case = RECOVERED[name]()
    found = patch_edges(case.model, task_of(case))
    truth = Circuit.from_edges(found.graph, case.edges).kept
    size = np.abs(found.scores[found.graph.possible])
    inside = truth[found.graph.possible]
    assert size[inside].min() > 0.1 > 1e-3 > size[~inside].max()  # in logits; the area under the curve is 1


def test_known_effects_of_planted_edges():
    case = planted.ioi_like()
    found = patch_edges(case.model, task_of(case))
    # The inhibition head's only value carries the whole gap between the runs.
    gap = -found.scores[found.graph.edge("a0.h1", "a1.h0<v>")]
    shares = [-found.scores[found.graph.edge(f"a2.h{h}", "logits")] / gap for h in (1, 2, 3)]
    assert shares == pytest.approx([0.8, 0.4, -0.2], abs=0.02)  # what a softmax of sharpness 3 leaves elsewhere


def test_what_one_cut_cannot_show():
    gate = planted.or_gate()
    found = patch_edges(gate.model, task_of(gate))
    assert all(abs(found.scores[found.graph.edge(head, "m1")]) < 1e-3 for head in ("a0.h1", "a1.h2"))
    assert abs(found.scores[found.graph.edge("m1", "logits")]) > 1
    case = planted.backup_head()
    found = patch_edges(case.model, task_of(case))
    # Without the head's value the backup head does its work.
    assert abs(found.scores[found.graph.edge("input", "a0.h1<v>")]) < 1e-3


def test_batches_of_prompts_and_padding_change_nothing(monkeypatch):
    model, task = random_task("llama", n=6)
    whole = patch_edges(model, task).scores
    with monkeypatch.context() as patch:
        patch.setattr("interp.circuits._ablated._ENOUGH", 4 * task.clean.shape[1])  # four prompts, then two
        assert np.allclose(patch_edges(model, task).scores, whole, atol=1e-5)  # float32 sums of other shapes
    parts = [patch_edges(model, task[rows]).scores for rows in (slice(0, 2), slice(2, 6))]
    assert np.allclose(whole, (2 * parts[0] + 4 * parts[1]) / 6, atol=1e-5)
    grow = lambda tokens: torch.cat([torch.ones(len(tokens), 3, dtype=torch.long), tokens], 1)  # noqa: E731
    mask = grow(torch.ones_like(task.clean))
    mask[:, :3] = 0
    padded = replace(task, clean=grow(task.clean), corrupt=grow(task.corrupt), mask=mask)
    assert np.allclose(patch_edges(model, padded).scores, whole, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_prompts_of_different_lengths_together_and_alone_give_the_same(architecture):
    model, task = random_task(architecture, n=3)
    n_pos, mask, corrupt = task.clean.shape[1], torch.ones_like(task.clean), task.corrupt.clone()
    for row, short in enumerate((0, 3, 2)):
        mask[row, :short], corrupt[row, :short] = 0, task.clean[row, :short]
    padded = replace(task, corrupt=corrupt, mask=mask)
    alone = []
    for row in range(3):
        own = slice(n_pos - int(mask[row].sum()), None)
        one = padded[row : row + 1]
        alone.append(patch_edges(model, replace(one, clean=one.clean[:, own], corrupt=one.corrupt[:, own], mask=None)))
    # Sums of float32 products in other orders.
    assert np.allclose(patch_edges(model, padded).scores, np.mean([each.scores for each in alone], 0), atol=1e-5)


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    model, task = random_task("gpt2")
    want = patch_edges(model, task)
    calls, whole = [], exact._Prompts.effects

    def stop(self, row, sources):
        calls.append(row)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, row, sources)

    monkeypatch.setattr(exact._Prompts, "effects", stop)
    with pytest.raises(KeyboardInterrupt):
        patch_edges(model, task)
    again = patch_edges(model, task)
    assert calls == [*range(5), *range(4, len(want.graph.destinations))]
    assert (again.scores == want.scores).all()


def test_a_readout_and_half_precision():
    model, task = random_task("llama")
    edges = [("input", "m0"), ("m0", "a1.h0<q>")]
    named, own = (patch_edges(model, task, edges=edges, metric=m) for m in ("kl", readout(model, task, "kl")))
    assert np.allclose(named.scores, own.scores)
    half = load(toy.random_module("llama").to(torch.bfloat16), tokenizer=toy.tokenizer())
    assert patch_edges(half, task, edges=edges).scores.any()


def test_bad_inputs_are_refused():
    model, task = random_task("gpt2")
    with pytest.raises(ValueError, match="no corrupted prompts"):
        patch_edges(model, replace(task, corrupt=None))
    with pytest.raises(ValueError, match="prompt 0: clean and corrupt are the same tokens: leave it out"):
        patch_edges(model, replace(task, corrupt=task.clean))
    with pytest.raises(ValueError, match="there is no such edge"):
        patch_edges(model, task, edges=[("m1", "a0.h0<q>")])
    with pytest.raises(ValueError, match="no edges"):
        patch_edges(model, task, edges=[])
    with pytest.raises(ValueError, match="ablation='noise'"):
        patch_edges(model, task, ablation="noise")
    with pytest.raises(ValueError, match="metric 'accuracy'"):
        patch_edges(model, task, metric="accuracy")
    other = toy.random("gpt2", seed=1)
    mine = Circuit.of(Graph.of(other), Graph.of(other).possible * 1.0, unit="none", meta=other.provenance)
    with pytest.raises(ValueError, match="this circuit is of"):
        patch_edges(model, task, edges=mine)
