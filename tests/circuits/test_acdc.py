"""ACDC: the plain sequential algorithm with whole forward passes, planted circuits, and what it is known to miss."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from interp.circuits._ablated import ablated
from interp.circuits._edges import as_weights
from interp.circuits.acdc import acdc, sweep
from interp.circuits.circuit import Circuit
from interp.circuits.exact import patch_edges
from interp.circuits.graph import Graph
from interp.core.readout import readout
from interp.models import load, planted, toy
from interp.models.program import forward, program
from interp.tasks.task import Task

acdc_module, trials, cone = (
    importlib.import_module(f"interp.circuits.{name}") for name in ("acdc", "_trials", "_cone")
)


def task_of(case):
    pairs = (case.corrupt, case.answers, case.wrong, case.positions)
    return Task(case.name, case.prompts, case.clean, "planted", *pairs)


def random_task(architecture, *, n=3, length=7, shared=2, seed=0):
    model = toy.random(architecture, seed=seed)
    tokens = toy.random_tokens(model, 2 * n, length, seed=seed)
    clean, corrupt = tokens[:n], tokens[n:].clone()
    corrupt[:, :shared] = clean[:, :shared]
    ids = 2 + torch.arange(n)
    return model, Task("pairs", tuple("abcdefgh"[:n]), clean, "random", corrupt, ids, ids + 20)


def plain(
    model, task, graph, tau, *, metric="kl", ablation="corrupt", kept=None, order="reverse", absolute=False,
    positions=None,
):  # fmt: skip
    """Each edge one whole forward pass."""
    made = ablated(model, task, graph, metric=metric, ablation=ablation, positions=positions).run(slice(None))

    def value(kept):
        with torch.no_grad():
            return float(made.forward(as_weights(kept[None], task.clean))[0].double().mean())

    kept = graph.possible.copy() if kept is None else kept.copy()
    scores, current, tests = np.zeros(kept.shape), value(kept), 0
    for row in reversed(range(len(kept))):
        sources = np.flatnonzero(kept[row])
        for source in sources[::-1] if order == "reverse" else sources:
            kept[row, source] = False
            new = value(kept)
            tests += 1
            damage = (new - current) * (1 if metric == "kl" else -1)
            scores[row, source] = new - current
            if (abs(damage) if absolute else damage) < tau:
                current = new
            else:
                kept[row, source] = True
    return kept, scores, tests


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"tau": 0.01, "share": 0.5}),
        ("gpt2", {"tau": 0.003, "metric": "logit_diff", "share": 0.4}),
        ("gpt_neox", {"tau": 0.01, "order": "normal", "share": 0.3}),
        ("gemma", {"tau": 0.001, "ablation": "zero", "metric": "logit_diff", "share": 0.5, "absolute": True}),
        ("qwen3", {"tau": 0.01, "ablation": "mean", "absolute": True, "metric": "logit_diff", "share": 0.3}),
        ("llama", {"tau": 0.01, "metric": "log_prob", "grouped": False, "share": 0.3, "absolute": True}),
    ],
)
def test_the_same_circuit_as_the_plain_algorithm(architecture, options):
    model, task = random_task(architecture)
    options = dict(options)
    share, tau, grouped = options.pop("share"), options.pop("tau"), options.pop("grouped", True)
    graph = Graph.of(model, grouped=grouped)
    first = (np.random.default_rng(0).random(graph.possible.shape) < share) & graph.possible
    begun = Circuit.of(graph, first, kept=first, unit="none")
    found = acdc(model, task, tau=tau, start=begun, grouped=grouped, **options)
    kept, scores, tests = plain(model, task, graph, tau, kept=first, **options)
    assert (found.kept == kept).all()
    assert 5 < len(found) < first.sum() - 5
    # Both sum a few hundred float32 products in different orders.
    assert np.allclose(found.scores[found.kept], scores[kept], atol=2e-4)
    assert found.meta["n_tests"] <= tests == first.sum()


RECOVERED = {
    "ioi_like": planted.ioi_like, "induction_like": planted.induction_like, "and_gate": planted.and_gate,
    "greater_than_like": planted.greater_than_like, "saturation": planted.saturation,
    "saturated softmax": lambda: planted.induction_like(sharpness=60.0),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOVERED)
def test_planted_edges_are_found(name):
    case = RECOVERED[name]()
    found = acdc(case.model, task_of(case), tau=0.01, metric="logit_diff", absolute=True)
    assert edges_of(found) == set(case.edges)


def test_a_prediction_that_is_sure_enough_hides_what_only_adds_to_it():
    case = planted.ioi_like()
    found = edges_of(acdc(case.model, task_of(case), tau=0.01, metric="kl"))
    # The first mover alone is certain of the answer: without the second and the negative head, KL hardly moves.
    helpers = {("a1.h0", f"a2.h{h}<q>") for h in (2, 3)} | {(f"a2.h{h}", "logits") for h in (2, 3)}
    assert found == set(case.edges) - helpers


def edges_of(circuit):
    return {(row.src, row.dst) for row in circuit.edges.itertuples()}


def test_one_of_two_that_suffice_is_kept_and_the_order_says_which():
    case = planted.or_gate()
    sides = {"first": {("input", "a0.h1<v>"), ("a0.h1", "m1")}, "second": {("input", "a1.h2<v>"), ("a1.h2", "m1")}}
    common = {("m1", "logits")}
    last = acdc(case.model, task_of(case), tau=0.01, order="reverse")
    first = acdc(case.model, task_of(case), tau=0.01, order="normal")
    # Tested first, cut first: "reverse" tests the later head first.
    assert edges_of(last) == common | sides["first"]
    assert edges_of(first) == common | sides["second"]


def test_a_backup_takes_the_place_of_the_head_it_stands_in_for():
    case = planted.backup_head()
    found = acdc(case.model, task_of(case), tau=0.01)
    direct = {("input", "a0.h1<v>"), ("a0.h1", "logits")}
    backup = {("input", "a1.h2<v>"), ("a1.h2", "logits")}
    assert edges_of(found) in (direct, backup)
    assert edges_of(found) < set(case.edges)


def test_a_pair_that_cancels_depends_on_the_metric():
    case = planted.cancelling_pair()
    task = task_of(case)
    assert edges_of(acdc(case.model, task, tau=0.01)) == set(case.edges)  # any change of the prediction is damage
    # Cut, the minus head raises the logit difference, which is no damage; with `absolute` it is a change.
    signed = acdc(case.model, task, tau=0.01, metric="logit_diff")
    assert ("a1.h2", "logits") not in edges_of(signed)
    assert ("a1.h2", "logits") in edges_of(acdc(case.model, task, tau=0.01, metric="logit_diff", absolute=True))


def test_shuffled_orders_repeat_and_differ():
    case = planted.or_gate()
    found = [edges_of(acdc(case.model, task_of(case), tau=0.01, order="shuffle", seed=seed)) for seed in range(6)]
    assert found[0] == edges_of(acdc(case.model, task_of(case), tau=0.01, order="shuffle", seed=0))
    assert len({frozenset(each) for each in found}) == 2


def test_a_sweep_is_one_search_a_threshold():
    model, task = random_task("gpt2")
    found = sweep(model, task, taus=[1.0, 0.1, 0.01])
    alone = acdc(model, task, tau=0.1)
    assert (found[1].kept == alone.kept).all()
    assert (found[1].scores == alone.scores).all()
    assert found[1].meta == alone.meta
    assert len(found[0]) < len(found[1]) < len(found[2])


def assert_same(found, want):
    """The same to the last digit; only vectors that a search held are made again when it goes on."""
    assert (found.kept == want.kept).all()
    assert (found.scores == want.scores).all()
    assert found.meta["flops"] == pytest.approx(want.meta["flops"], rel=0.02)
    assert {**found.meta, "flops": 0} == {**want.meta, "flops": 0}


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"positions": [3, 6]}])
def test_an_interrupted_search_goes_on_to_the_same_circuit(monkeypatch, tmp_path, options):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    model, task = random_task("llama")
    options = {"start": some_edges(model), **options}
    want = acdc(model, task, tau=0.1, **options)
    assert not list(tmp_path.rglob("*.npz"))
    calls, whole = [], acdc_module._Search._layer

    def stop(self, layer, *rest):
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, layer, *rest)

    monkeypatch.setattr(acdc_module._Search, "_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        acdc(model, task, tau=0.1, **options)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    again = acdc(model, task, tau=0.1, **options)
    assert calls == [3, 2, 1, 1, 0]
    assert_same(again, want)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_state_that_is_foreign_or_damaged_starts_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    model, task = random_task("llama")
    want = acdc(model, task, tau=0.1)
    whole = acdc_module._Search._layer

    def stop(self, layer, *rest):
        if layer == 1:
            raise KeyboardInterrupt
        return whole(self, layer, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(acdc_module._Search, "_layer", stop)
        acdc(model, task, tau=0.1)
    (file,) = tmp_path.rglob("*.npz")
    begun = dict(np.load(file))
    older = {name: each for name, each in begun.items() if name != "mlp"}
    for state in (older, {**begun, "kept": begun["kept"][1:]}, {**begun, "z": begun["z"].astype(str)},
                  {**begun, "more": np.zeros(2)}):  # fmt: skip
        np.savez(file, **state)
        again = acdc(model, task, tau=0.1)
        assert_same(again, want)
    file.write_bytes(b"no archive")
    assert (acdc(model, task, tau=0.1).scores == want.scores).all()


def test_the_counted_flops_are_those_that_are_done(monkeypatch):
    model, task = random_task("gpt2", n=4, length=12, shared=6)
    done, inner = [], acdc_module._Search._layer

    def counted(self, *rest):
        with FlopCounterMode(display=False) as counter:
            current = inner(self, *rest)
        done.append(counter.get_total_flops())
        return current

    monkeypatch.setattr(acdc_module._Search, "_layer", counted)
    found = acdc(model, task, tau=0.02)
    ours = found.meta["flops"] - 4 * 0.5 * found.meta["plain_flops"] / found.meta["n_tests"]  # two passes, half shared
    assert sum(done) < ours < 1.15 * sum(done)  # plain sums are counted by us and not by the counter
    with FlopCounterMode(display=False) as counter:
        forward(program(model), task.clean)
    # A bare pass; the counter sees the unembedding at all positions, and ours only where the metric is read.
    extra = 2.0 * len(task) * (task.clean.shape[1] - 1) * model.d_model * model.d_vocab
    one = found.meta["plain_flops"] / found.meta["n_tests"]
    assert one == pytest.approx(counter.get_total_flops() - extra, rel=0.02)
    assert found.meta["plain_flops"] > 4 * found.meta["flops"]


def test_batches_of_candidates_change_nothing(monkeypatch):
    model, task = random_task("gpt_neox")
    want = acdc(model, task, tau=0.02)
    monkeypatch.setattr(trials, "_MOST", 1)
    one = acdc(model, task, tau=0.02)
    assert (one.kept == want.kept).all()
    assert np.allclose(one.scores, want.scores, atol=1e-5)  # float32 sums of other shapes
    assert one.meta["n_cells"] <= want.meta["n_cells"]


def some_edges(model, share=0.15):
    """A start that is quickly searched: all edges into the logits, and some of the others."""
    graph = Graph.of(model)
    kept = (np.random.default_rng(0).random(graph.possible.shape) < share) & graph.possible
    kept[-1] = True
    return Circuit.of(graph, kept, kept=kept, unit="none")


@pytest.mark.parametrize(("architecture", "sizes", "room"), [("llama", (5, 2), 2**26), ("gpt_neox", (2,), 0)])
def test_batches_of_prompts_change_nothing(monkeypatch, architecture, sizes, room):
    model, task = random_task(architecture, n=5)
    start = some_edges(model)
    want = acdc(model, task, tau=0.01, start=start)
    monkeypatch.setattr(cone, "_ROOM", room)
    monkeypatch.setattr(trials, "_HELD", room)
    for size in sizes:
        found = acdc(model, task, tau=0.01, batch_size=size, start=start)
        assert (found.kept == want.kept).all()
        # float32 sums of other shapes, of a metric of about 1 that is subtracted from another.
        assert np.allclose(found.scores, want.scores, atol=1e-5)
        assert found.meta["value"] == pytest.approx(want.meta["value"], abs=1e-5)
        assert found.meta["n_tests"] == want.meta["n_tests"]
        assert found.meta["plain_flops"] == want.meta["plain_flops"]
    assert 3 < len(want) < len(start) - 3


def test_prompts_of_different_lengths_together_and_alone_give_the_same():
    # A search that cuts nothing scores single cuts, of which the mean over prompts can be taken by hand.
    model, task = random_task("llama", n=3)
    n_pos, mask, corrupt = task.clean.shape[1], torch.ones_like(task.clean), task.corrupt.clone()
    for row, short in enumerate((0, 3, 2)):
        mask[row, :short], corrupt[row, :short] = 0, task.clean[row, :short]
    padded = replace(task, corrupt=corrupt, mask=mask)
    nothing = {"tau": 1e-9, "metric": "logit_diff", "absolute": True, "start": some_edges(model)}
    alone = []
    for row in range(3):
        own = slice(n_pos - int(mask[row].sum()), None)
        one = padded[row : row + 1]
        one = replace(one, clean=one.clean[:, own], corrupt=one.corrupt[:, own], mask=None)
        alone.append(acdc(model, one, **nothing).scores)
    assert (np.abs(np.mean(alone, 0)) > 1e-3).sum() > 20
    for size in (3, 1):
        # Sums of float32 products in other orders, of a metric of about 10.
        assert np.allclose(acdc(model, padded, batch_size=size, **nothing).scores, np.mean(alone, 0), atol=3e-5)


def test_no_tensor_holds_every_source_at_every_token(monkeypatch):
    for module, name in ((cone, "_ROOM"), (trials, "_HELD"), (trials, "_BUDGET")):
        monkeypatch.setattr(module, name, 0)
    model, task = random_task("llama", n=4, length=40)
    start = some_edges(model)
    with Largest() as largest:
        found = acdc(model, task, tau=0.01, metric="logit_diff", start=start)
    assert 0 < len(found) < len(start)
    assert largest.numel < len(found.graph.sources) * len(task) * 38 * model.d_model


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, each.numel() if isinstance(each, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"tau": 0.01, "positions": [3, 6]}),
        ("gpt2", {"tau": 0.01, "positions": ["middle"], "metric": "logit_diff", "absolute": True}),
        ("gpt_neox", {"tau": 0.01, "positions": -1, "ablation": "zero", "order": "normal"}),
    ],
)
def test_edges_are_cut_at_the_positions_that_are_named(architecture, options):
    model, task = random_task(architecture)
    task = replace(task, positions={"middle": torch.tensor([2, 4, 3])})
    begun, tau = some_edges(model), options["tau"]
    options = {name: each for name, each in options.items() if name != "tau"}
    kept, scores, _ = plain(model, task, begun.graph, tau, kept=begun.kept, **options)
    for size in (None, 2):
        found = acdc(model, task, tau=tau, start=begun, batch_size=size, **options)
        assert (found.kept == kept).all()
        assert np.allclose(found.scores[kept], scores[kept], atol=2e-4)  # as without positions
    assert 3 < len(found) < len(begun) - 3
    everywhere = acdc(model, task, tau=tau, start=begun, **{**options, "positions": None})
    assert (everywhere.kept != found.kept).any()
    assert found.meta["positions"] == options["positions"]


def test_keys_of_a_head_that_is_read_elsewhere_are_tested():
    model, task = random_task("llama")
    graph = Graph.of(model)
    kinds = np.array([each.kind in "kv" and each.layer == 1 for each in graph.destinations])
    first = graph.possible & kinds[:, None]  # no edge leaves these heads where edges are cut
    kept, scores, _ = plain(model, task, graph, 1e-3, kept=first, positions=[3], absolute=True)
    begun = Circuit.of(graph, first, kept=first, unit="none")
    found = acdc(model, task, tau=1e-3, start=begun, positions=[3], absolute=True)
    assert (found.kept == kept).all()
    assert 3 < len(found) < len(begun) - 3
    assert np.allclose(found.scores[kept], scores[kept], atol=1e-5)  # float32, in one order


def test_a_search_that_cuts_nothing_scores_single_cuts():
    model, task = random_task("llama")
    nothing = {"metric": "logit_diff", "positions": [4, -1]}
    found = acdc(model, task, tau=1e-9, absolute=True, batch_size=2, **nothing)
    # Hooks on a whole run, against passes with weighted edges: float32 metrics of about 10.
    assert np.allclose(found.scores, patch_edges(model, task, **nothing).scores, atol=5e-5)


def test_all_positions_are_no_positions():
    model, task = random_task("llama")
    start = some_edges(model)
    plain, whole = (acdc(model, task, tau=0.01, start=start, positions=each) for each in (None, list(range(7))))
    assert (plain.kept == whole.kept).all()
    assert np.allclose(plain.scores, whole.scores, atol=1e-5)  # float32 sums in other orders


def test_padding_changes_nothing():
    model, task = random_task("llama")
    grow = lambda tokens: torch.cat([torch.ones(len(tokens), 3, dtype=torch.long), tokens], 1)  # noqa: E731
    mask = grow(torch.ones_like(task.clean))
    mask[:, :3] = 0
    padded = replace(task, clean=grow(task.clean), corrupt=grow(task.corrupt), mask=mask)
    one, other = acdc(model, task, tau=0.1), acdc(model, padded, tau=0.1)
    assert (one.kept == other.kept).all()
    # Prompts of different lengths: as with whole forward passes.
    mask[1, :7], padded.corrupt[1, :7] = 0, padded.clean[1, :7]
    found = acdc(model, padded, tau=0.1)
    kept, scores, _ = plain(model, padded, found.graph, 0.1)
    assert (found.kept == kept).all()
    assert np.allclose(found.scores[kept], scores[kept], atol=2e-4)  # float32 products in different orders
    assert (found.kept != one.kept).any()


def test_a_readout_decides_too_and_half_precision_runs():
    model, task = random_task("llama")
    named, own = (acdc(model, task, tau=0.1, metric=each) for each in ("kl", readout(model, task, "kl")))
    assert (named.kept == own.kept).all()
    half = load(toy.random_module("llama").to(torch.bfloat16), tokenizer=toy.tokenizer())
    assert len(acdc(half, task, tau=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "above 0"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"tau": float("inf")}, "tau=inf"),
        ({"tau": 0.1, "ablation": "noise"}, "ablation='noise'"),
        ({"tau": 0.1, "metric": "accuracy"}, "metric 'accuracy'"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, task = random_task("gpt2")
    with pytest.raises(ValueError, match=message):
        acdc(model, task, **options)


def test_bad_inputs_are_refused():
    model, task = random_task("gpt2")
    with pytest.raises(ValueError, match="order='best'"):
        acdc_module._require(model, [0.1], "best", "corrupt")
    with pytest.raises(ValueError, match="no corrupted prompts"):
        acdc(model, replace(task, corrupt=None), tau=0.1)
    same = replace(task, corrupt=torch.cat([task.corrupt[:1], task.clean[1:]]))
    with pytest.raises(ValueError, match="prompt 1: clean and corrupt are the same tokens: leave it out"):
        acdc(model, same, tau=0.1)
    with pytest.raises(ValueError, match="no position 'nowhere'"):
        acdc(model, task, tau=0.1, positions="nowhere")
    with pytest.raises(ValueError, match="batch_size=0"):
        acdc(model, task, tau=0.1, batch_size=0)
    odd = readout(model, task, "logit_diff")
    nan = replace(odd, score=lambda logits, owner: torch.where(owner == 1, torch.nan, logits[..., 0]))
    with pytest.raises(ValueError, match=r"prompt 1 \('b'\): the metric is not finite"):
        acdc(model, task, tau=0.1, metric=nan)
    with pytest.raises(ValueError, match="at least one"):
        sweep(model, task, taus=[])
    other = toy.random("gpt2", seed=1)
    mine = Circuit.of(Graph.of(other), Graph.of(other).possible * 1.0, unit="none", meta=other.provenance)
    with pytest.raises(ValueError, match="this circuit is of"):
        acdc(model, task, tau=0.1, start=mine)
