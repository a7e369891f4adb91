"""Edge Pruning: planted circuits, the distribution of its masks, sparsity, and the same run twice."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.circuits._ablated import ablated, metric_of
from interp.circuits._checkpoint import Checkpoint
from interp.circuits.edge_pruning import drawn, edge_pruning, stays
from interp.circuits.graph import Graph
from interp.core.readout import readout
from interp.models import load, planted, toy
from interp.tasks.task import Task

module = importlib.import_module("interp.circuits.edge_pruning")


def task_of(case):
    pairs = (case.corrupt, case.answers, case.wrong, case.positions)
    return Task(case.name, case.prompts, case.clean, "planted", *pairs)


def random_task(architecture="llama", *, n=3, length=7):
    model = toy.random(architecture)
    tokens = toy.random_tokens(model, 2 * n, length)
    clean, corrupt = tokens[:n], tokens[n:].clone()
    corrupt[:, :2] = clean[:, :2]
    ids = 2 + torch.arange(n)
    return model, Task("pairs", tuple("abcdefgh"[:n]), clean, "random", corrupt, ids, ids + 20)


def edges_of(circuit):
    return {(row.src, row.dst) for row in circuit.edges.itertuples()}


RECOVERED = {
    "ioi_like": (planted.ioi_like, "logit_diff"), "induction_like": (planted.induction_like, "kl"),
    "and_gate": (planted.and_gate, "kl"), "greater_than_like": (planted.greater_than_like, "kl"),
    "saturation": (planted.saturation, "kl"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOVERED)
def test_planted_edges_are_those_that_stay(name):
    make, metric = RECOVERED[name]
    case = make()
    n_edges = Graph.of(case.model).n_edges
    found = edge_pruning(case.model, task_of(case), sparsity=1 - len(case.edges) / n_edges, metric=metric, steps=120)
    assert edges_of(found) == set(case.edges)


def test_masks_have_the_distribution_they_are_said_to_have():
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for log_alpha in (-3.0, 0.0, 2.0):
        masks = drawn(torch.full_like(noise, log_alpha), noise)
        assert 0 <= masks.min() <= masks.max() <= 1
        # The share of 200,000 draws has a standard error of 0.001.
        assert float((masks > 0).float().mean()) == pytest.approx(float(stays(torch.tensor(log_alpha))), abs=0.005)
    # Symmetric about log_alpha = 0: as often 0 as 1.
    masks = drawn(torch.zeros_like(noise), noise)
    assert float((masks == 0).float().mean()) == pytest.approx(float((masks == 1).float().mean()), abs=0.005)


def test_the_circuit_predicts_better_than_as_many_random_edges():
    model, task = random_task()
    found = edge_pruning(model, task, sparsity=0.6, steps=150)
    graph = found.graph
    assert len(found) == round(0.4 * graph.n_edges)
    assert found.meta["expected_sparsity"] == pytest.approx(0.6, abs=0.1)  # what the multipliers hold it to
    rng, kept = np.random.default_rng(0), [found.kept]
    for _ in range(8):
        chosen = rng.choice(np.flatnonzero(graph.possible), len(found), replace=False)
        kept.append(np.isin(np.arange(graph.possible.size), chosen).reshape(graph.possible.shape))
    made = ablated(model, task, graph, metric="kl")
    far = metric_of(made, np.stack(kept), identity={"method": "a test"}).mean(0)
    assert far[0] < 0.5 * far[1:].min()


def test_the_same_seed_gives_the_same_masks_and_global_draws_are_left_alone():
    model, task = random_task(n=4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (edge_pruning(model, task, sparsity=0.5, steps=12, batch_size=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (one.scores == other.scores).all()
    assert one.meta == other.meta
    assert (edge_pruning(model, task, sparsity=0.5, steps=12, batch_size=2, seed=1).scores != one.scores).any()


def test_an_interrupted_training_goes_on_to_the_same_masks(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_EVERY", 4)
    model, task = random_task(n=4)
    options = {"sparsity": 0.5, "steps": 14, "batch_size": 2}
    want = edge_pruning(model, task, **options)
    steps, whole = [], module._Training.move

    def stop(self, target):
        steps.append(self.step)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return whole(self, target)

    monkeypatch.setattr(module._Training, "move", stop)
    with pytest.raises(KeyboardInterrupt):
        edge_pruning(model, task, **options)
    again = edge_pruning(model, task, **options)
    assert steps == [*range(11), *range(8, 14)]
    assert (again.scores == want.scores).all()
    assert not list(tmp_path.rglob("*.npz"))


def test_a_state_of_another_version_is_not_gone_on_from(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_EVERY", 2)
    model, task = random_task()
    want = edge_pruning(model, task, sparsity=0.5, steps=5)
    load = Checkpoint.load
    for change in ({"step": None}, {"log_alpha": np.zeros(3)}):
        states = []

        def older(self, shapes, change=change, states=states):
            state = {name: np.ones(shape) for name, shape in shapes.items()} | change
            self.store({name: each for name, each in state.items() if each is not None})
            states.append(load(self, shapes))
            return states[-1]

        monkeypatch.setattr(Checkpoint, "load", older)
        assert (edge_pruning(model, task, sparsity=0.5, steps=5).scores == want.scores).all()
        assert states == [None]


def test_with_all_masks_open_every_batch_is_at_no_distance_from_the_model():
    model, task = random_task(n=4)
    made = ablated(model, task, Graph.of(model), metric="logit_diff")
    training = module._Training(made, [slice(0, 2), slice(2, 4)], 0.2, 0.2, 0)
    with torch.no_grad():
        training.log_alpha.fill_(30.0)  # so far up that the noise closes no mask, also after the two steps
    # The same sums as of the whole model, of float32.
    assert all(abs(training.move(0.0)) < 1e-5 for _ in range(2))


@pytest.mark.parametrize("positions", [None, [-3, -1]])
def test_padding_changes_nothing(positions):
    model, task = random_task(n=4)
    options = {"sparsity": 0.5, "steps": 6, "batch_size": 2, "positions": positions}
    grow = lambda tokens: torch.cat([torch.ones(len(tokens), 3, dtype=torch.long), tokens], 1)  # noqa: E731
    mask = grow(torch.ones_like(task.clean))
    mask[:, :3] = 0
    padded = replace(task, clean=grow(task.clean), corrupt=grow(task.corrupt), mask=mask)
    want, found = edge_pruning(model, task, **options), edge_pruning(model, padded, **options)
    # Adam's first steps divide a gradient by its size, so rounding of float32 moves a probability by more than itself.
    assert np.allclose(found.scores, want.scores, atol=1e-4)
    assert found.meta["value"] == pytest.approx(want.meta["value"], abs=1e-5)
    # The same, but for the noise of one step: masks are told apart by more than that.
    assert np.abs(want.scores - edge_pruning(model, task, seed=1, **options).scores).max() > 0.01


def test_a_step_is_that_of_prompts_of_different_lengths_one_by_one():
    model, task = random_task(n=3)
    n_pos, mask, corrupt = task.clean.shape[1], torch.ones_like(task.clean), task.corrupt.clone()
    for row, short in enumerate((0, 3, 2)):
        mask[row, :short], corrupt[row, :short] = 0, task.clean[row, :short]
    padded, distances = replace(task, corrupt=corrupt, mask=mask), []
    for row in range(3):
        one = padded[row : row + 1]
        own = slice(n_pos - int(mask[row].sum()), None)
        distances.append(
            first_distance(model, replace(one, clean=one.clean[:, own], corrupt=one.corrupt[:, own], mask=None))
        )
    assert first_distance(model, padded) == pytest.approx(np.mean(distances), abs=1e-5)  # a mean of float32 numbers
    assert np.std(distances) > 1e-3


def first_distance(model, task):
    """How far the predictions are with the masks that the first step draws, closed enough to matter."""
    training = module._Training(ablated(model, task, Graph.of(model), metric="kl"), [slice(0, len(task))], 0.2, 0.2, 0)
    with torch.no_grad():
        training.log_alpha.fill_(0.0)
    return training.move(0.0)


def test_only_one_batch_is_held(monkeypatch):
    model, task = random_task(n=4)
    made, alive, largest = ablated(model, task, Graph.of(model), metric="kl"), [], []
    inner = type(made).run

    def seen(self, rows):
        alive[:] = [each for each in alive if each() is not None]
        largest.append(len(alive))
        run = inner(self, rows)
        alive.append(weakref.ref(run))
        return run

    monkeypatch.setattr(type(made), "run", seen)
    training = module._Training(made, [slice(0, 2), slice(2, 4)], 0.2, 0.2, 0)
    for _ in range(3):
        training.move(0.0)
    assert len(largest) > 2
    assert max(largest) == 0


def test_the_model_needs_no_gradients_and_gets_none():
    model, task = random_task()
    edge_pruning(model, task, sparsity=0.5, steps=2)
    assert all(parameter.grad is None for parameter in model.bridge.parameters())


def test_masks_act_at_the_positions_that_are_named():
    model, task = random_task()
    options = {"sparsity": 0.5, "steps": 4}
    plain, whole = (edge_pruning(model, task, positions=each, **options) for each in (None, list(range(7))))
    assert np.allclose(plain.scores, whole.scores, atol=1e-5)  # the same sums
    # Both prompts agree at the first two positions, so there masks are without effect on the prediction.
    early = edge_pruning(model, task, positions=[0, 1], **options)
    assert early.meta["value"] == pytest.approx(0, abs=1e-5)
    assert plain.meta["value"] > 0.01
    # Masks on edges into the logits act only where they are read: elsewhere sparsity alone moves them, all alike.
    found = edge_pruning(model, task, positions=[4], **options)
    logits = found.scores[-1][found.graph.possible[-1]]
    assert np.ptp(logits) < 1e-6 < 1e-3 < np.ptp(plain.scores[-1][found.graph.possible[-1]])


def test_other_metrics_ablations_and_half_precision_run():
    model, task = random_task()
    for metric in ("logit_diff", "prob", readout(model, task)):
        found = edge_pruning(model, task, metric=metric, sparsity=0.5, steps=3, ablation="mean", grouped=False)
        assert len(found) == round(0.5 * found.graph.n_edges)
    half = load(toy.random_module("llama").to(torch.bfloat16), tokenizer=toy.tokenizer())
    assert len(edge_pruning(half, task, sparsity=0.5, steps=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"ablation": "noise"}, "ablation='noise'"),
        ({"metric": "accuracy"}, "metric 'accuracy'"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, task = random_task("gpt2")
    with pytest.raises(ValueError, match=message):
        edge_pruning(model, task, **options)
    with pytest.raises(ValueError, match="no corrupted prompts"):
        edge_pruning(model, replace(task, corrupt=None))
    with pytest.raises(ValueError, match="prompt 0: clean and corrupt are the same tokens"):
        edge_pruning(model, replace(task, corrupt=task.clean))
