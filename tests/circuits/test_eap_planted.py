"""Edge attribution on planted mechanisms: what each estimate sees and misses, as a fraction of the gap."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from interp.circuits.circuit import Circuit
from interp.circuits.eap import eap, eap_ig, relp
from interp.models import planted
from interp.tasks import Task


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps are stored in the cache folder: a test must not go on where another one was killed."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


@cache
def case_of(name: str) -> tuple[planted.Planted, Task]:
    case = getattr(planted, name)()
    return case, Task(
        case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions
    )


def share(circuit: Circuit, src: str, dst: str) -> float:
    gap = circuit.meta["clean"] - circuit.meta["corrupt"]
    return -float(circuit.scores[circuit.graph.edge(src, dst)]) / gap


@pytest.mark.parametrize(
    ("grid", "steps", "each"),
    [("paper", 5, 0.4), ("code", 5, 0.6), ("midpoint", 4, 0.5), ("paper", 1, 0.0), ("code", 1, 1.0)],
)
def test_or_is_flat_at_the_clean_run_and_half_each_on_the_way(grid, steps, each):
    case, task = case_of("or_gate")
    for src in ("a0.h1", "a1.h2"):
        assert share(eap(case.model, task), src, "m1") == pytest.approx(0, abs=1e-5)
        found = eap_ig(case.model, task, steps=steps, grid=grid)
        # min(1, a + b) has slope 1 for a + b < 1, which is the share k/m < 1/2 of the way from (0, 0) to (1, 1).
        assert share(found, src, "m1") == pytest.approx(each, abs=1e-5)
    assert share(found, "m1", "logits") == pytest.approx(1, abs=1e-5)


def test_and_is_seen_at_the_clean_run_and_half_at_both_ends():
    case, task = case_of("and_gate")
    for src in ("a0.h1", "a1.h2"):
        assert share(eap(case.model, task), src, "m1") == pytest.approx(1, abs=1e-5)
        assert share(eap_ig(case.model, task, path="ends"), src, "m1") == pytest.approx(0.5, abs=1e-5)


def test_a_ceiling_hides_its_edges_and_the_way_shows_them():
    case, task = case_of("saturation")
    edge = ("a1.h1", "m1")
    assert share(eap(case.model, task), *edge) == pytest.approx(0, abs=1e-5)
    # The slope is 6 (of the gap) on the first sixth of the way: two of twelve points.
    for path in ("embedding", "activation"):
        found = eap_ig(case.model, task, steps=12, grid="midpoint", path=path)
        assert share(found, *edge) == pytest.approx(1, abs=1e-4)


def test_a_saturated_softmax_hides_queries_and_keys_and_the_way_shows_them():
    case = planted.induction_like(sharpness=60.0)
    pairs = (case.corrupt, case.answers, case.wrong, case.positions)
    task = Task(case.name, case.prompts, case.clean, "planted", *pairs)
    first, way = eap(case.model, task), eap_ig(case.model, task, steps=20, grid="midpoint")
    for edge in (("input", "a1.h0<q>"), ("a0.h2", "a1.h0<k>"), ("input", "a0.h2<v>")):
        assert abs(share(first, *edge)) < 1e-5
        assert share(way, *edge) > 0.01
    assert share(first, "input", "a1.h0<v>") == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["ioi_like", "induction_like", "cancelling_pair", "greater_than_like"])
def test_planted_edges_score_and_others_do_not(name):
    case, task = case_of(name)
    found = eap_ig(case.model, task, steps=8, grid="midpoint")
    mine = {found.graph.edge(*edge) for edge in case.edges}
    # A mechanism on words is carried by the stream as a whole: the input reaches every reader of words, and an edge
    # that is not in the truth is one whose source or reader does nothing.
    quiet = [at for at in zip(*np.nonzero(found.graph.possible), strict=True) if at not in mine]
    loud = max(abs(found.scores[at]) for at in mine)
    assert min(abs(found.scores[at]) for at in mine) > 0.01 * loud
    assert max(abs(found.scores[at]) for at in quiet) < 1e-4 * loud


def test_a_caller_without_gradients_gets_the_same():
    case = planted.ioi_like()
    task = Task("ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
    for find in (eap, eap_ig, relp):
        expected = find(case.model, task).scores
        with torch.no_grad():
            np.testing.assert_array_equal(find(case.model, task).scores, expected)
