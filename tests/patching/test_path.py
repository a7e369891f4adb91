"""Path patching: the arithmetic against two whole forward passes with hooks, end points, planted truth, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.core.edits import Edit
from interp.core.readout import candidates, readout
from interp.core.rerun import rerun
from interp.models import Model, load, toy
from interp.models.program import NoProgramError
from interp.patching import _paths
from interp.patching.path import Node, Receiver, patch
from interp.tasks import Task, ioi

N_POS = 9
#: Logits of the toys are about 10, and sums in another order differ by 1e-6 a layer.
TOLERANCE = 5e-5
#: Two heads of a layer, one above, keys and values of a group, MLPs, and the logits.
RECEIVERS = {
    "logits": "logits",
    "q": [Receiver("q", 1, 3), Receiver("q", 2, 0)],
    "k v": [Receiver("k", 1, 0), Receiver("v", 2, 0), Receiver("v", 1, 0)],
    "mlp": [Receiver("mlp", 1), Receiver("mlp", 2)],
    "all kinds": [Receiver("mlp", 0), Receiver("q", 2, 1), Receiver("k", 2, 0), Receiver("v", 2, 0)],
}


def means(model: Model, task: Task, **options: Any) -> dict[tuple[Any, ...], float]:
    """{(component, layer, head): mean value}, -1 where there is none."""
    table = patch(model, task, **options).table.fillna({"layer": -1, "head": -1})
    found = table.groupby(["component", "layer", "head"])["value"].mean()
    return {tuple(key): float(value) for key, value in found.items()}


def heads(model: Model, task: Task, **options: Any) -> dict[tuple[int, int], float]:
    return {(key[1], key[2]): value for key, value in means(model, task, **options).items()}


# --- the arithmetic is the algorithm -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=toy.ARCHITECTURES)
def random_case(request: pytest.FixtureRequest, random_model, random_task) -> tuple[Model, Task]:
    model = random_model(request.param)
    return model, random_task(model)


@pytest.fixture(scope="module")
def llama(random_model, random_task) -> tuple[Model, Task]:
    model = random_model("llama")
    return model, random_task(model)


@pytest.mark.parametrize(
    ("kind", "position", "freeze", "direction"),
    [
        ("logits", "end", False, "noising"),
        ("q", "end", True, "denoising"),
        ("k v", "early", False, "denoising"),
        ("mlp", "early", True, "noising"),
        ("all kinds", "early", False, "noising"),
    ],
)
def test_equals_two_forward_passes_with_hooks(
    random_case: tuple[Model, Task], kind: str, position: str, freeze: bool, direction: str
):
    model, task = random_case
    senders = [Node("embed"), Node("z", 0, 1), Node("mlp_out", 0), Node("z", 1, 2)]
    senders += [Node("mlp_out", 1), Node("z", 2, 3), Node("mlp_out", 2)] if kind == "logits" else []
    options: dict[str, Any] = {
        "receivers": RECEIVERS[kind], "senders": senders, "position": position, "freeze_mlps": freeze,
        "direction": direction,
    }  # fmt: skip
    fast = patch(model, task, **options, exact_path="rerun", batch_size=2)
    slow = patch(model, task, **options, exact_path="hooks")
    columns = ["prompt", "component", "layer", "head", "token"]
    assert fast.table[columns].equals(slow.table[columns])
    np.testing.assert_allclose(fast.table["value_metric"], slow.table["value_metric"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(fast.table["value"], slow.table["value"], atol=TOLERANCE, rtol=0)
    assert slow.table["value"].abs().max() > 100 * TOLERANCE, "nothing happened at all"


def test_equals_hooks_on_the_default_model(smol: Model):
    task = ioi(smol, 1, corrupt="swap")
    receivers = [Receiver("v", 21, 1), Receiver("k", 24, 2), Receiver("mlp", 22)]
    options: dict[str, Any] = {"senders": [Node("z", 4, 0), Node("mlp_out", 15)], "receivers": receivers}
    options["position"] = "subject2"
    fast, slow = (patch(smol, task, **options, exact_path=path) for path in ("rerun", "hooks"))
    # 30 layers, logits about 20.
    np.testing.assert_allclose(fast.table["value_metric"], slow.table["value_metric"], atol=1e-4, rtol=0)
    assert fast.table["value_metric"].nunique() == 2


@pytest.mark.parametrize("architecture", ["qwen3", "phi"])
def test_equals_hooks_on_architectures_with_norms_in_attention_or_one_norm(
    random_model, random_task, architecture: str
):
    model = random_model(architecture)
    task = random_task(model)
    senders = [Node("embed"), Node("z", 0, 1), Node("mlp_out", 0), Node("z", 1, 2)]
    for receivers, position in (("logits", "end"), (RECEIVERS["all kinds"], "early")):
        options: dict[str, Any] = {"receivers": receivers, "senders": senders, "position": position}
        fast, slow = (patch(model, task, **options, exact_path=path) for path in ("rerun", "hooks"))
        np.testing.assert_allclose(fast.table["value_metric"], slow.table["value_metric"], atol=TOLERANCE, rtol=0)
        assert fast.table["value"].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("metric", ["log_prob", "prob", "kl"])
def test_metrics_of_the_whole_vocabulary(llama: tuple[Model, Task], metric: str):
    model, task = llama
    senders = [Node("embed"), Node("z", 1, 2), Node("mlp_out", 2)]
    options: dict[str, Any] = {"senders": senders, "metric": metric, "min_oriented": 0.0}
    if metric != "kl":  # the answer drawn need not be any likelier on the clean prompt
        likeliest = rerun(model, task.clean, [[]], _whole(task), mask=task.mask)[0].argmax(-1)
        task = dataclasses.replace(task, answers=likeliest)
    fast, slow = (patch(model, task, **options, exact_path=path) for path in ("rerun", "hooks"))
    np.testing.assert_allclose(fast.table["value_metric"], slow.table["value_metric"], atol=TOLERANCE, rtol=0)
    whole = patch(model, task, **options | {"senders": "all"}, together=True).summary()
    assert whole["mean"][0] == pytest.approx(1.0, abs=1e-4)


def _whole(task: Task) -> Any:
    return candidates(task.positions["end"], torch.arange(64).expand(len(task), -1))


def test_a_sender_set_to_zero(random_model, random_task):
    model = random_model("gpt2")
    task = random_task(model)
    senders = [Node("embed"), Node("z", 1, 2), Node("mlp_out", 0)]
    options: dict[str, Any] = {"receivers": [Receiver("q", 2, 0)], "senders": senders, "source": "zero"}
    fast, slow = (patch(model, task, **options, exact_path=path) for path in ("rerun", "hooks"))
    np.testing.assert_allclose(fast.table["value"], slow.table["value"], atol=TOLERANCE, rtol=0)
    # A head that is set to zero writes nothing, wherever its value came from: the corrupted prompt does not matter.
    same = patch(model, task, senders=[Node("z", 1, 2)], source="zero").table["value_metric"]
    flipped = torch.where(task.mask.bool(), task.corrupt.flip(0), task.corrupt)  # type: ignore[union-attr]
    other = dataclasses.replace(task, corrupt=flipped)
    np.testing.assert_array_equal(
        same, patch(model, other, senders=[Node("z", 1, 2)], source="zero", min_oriented=0.0).table["value_metric"]
    )


def test_half_precision_stays_close(random_task):
    module = toy.random_module("llama")
    full = load(module, tokenizer=toy.tokenizer(), weights="raw")
    task = random_task(full)
    exact = patch(full, task, senders="all")
    half = load(module, tokenizer=toy.tokenizer(), weights="raw", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    rounded = patch(half, task, senders="all", exact_path="rerun")
    # bfloat16 has 8 bits: logits of 10 are off by 0.05, and the gap is a few logits.
    difference = (rounded.table["value_metric"] - exact.table["value_metric"]).abs()
    assert difference.max() < 0.3
    assert np.corrcoef(rounded.table["value_metric"], exact.table["value_metric"])[0, 1] > 0.99


def test_a_batch_is_its_prompts_one_by_one_and_padding_changes_nothing(random_model, random_task):
    model = random_model("mistral")
    task = random_task(model)
    options: dict[str, Any] = {"receivers": RECEIVERS["all kinds"], "senders": "all", "position": "early"}
    whole = patch(model, task, **options).table["value_metric"].to_numpy().reshape(-1, 3)
    single = patch(model, task, **options, batch_size=1).table["value_metric"].to_numpy().reshape(-1, 3)
    np.testing.assert_allclose(whole, single, atol=TOLERANCE, rtol=0)
    # The padded prompt by itself, without its padding: "early" is two tokens earlier.
    cut = {"clean": task.clean[:1, 2:], "corrupt": task.corrupt[:1, 2:], "mask": None}  # type: ignore[index]
    alone = dataclasses.replace(task[:1], **cut, positions={k: v[:1] - 2 for k, v in task.positions.items()})  # type: ignore[arg-type]
    unpadded = patch(model, alone, **options).table["value_metric"].to_numpy()
    np.testing.assert_allclose(whole[:, 0], unpadded, atol=TOLERANCE, rtol=0)


def test_many_senders_are_cut_into_chunks(random_model, random_task, monkeypatch: pytest.MonkeyPatch):
    model = random_model("gpt2")
    task = random_task(model)
    whole = patch(model, task, senders="all", receivers=RECEIVERS["q"]).table
    logits = patch(model, task, senders="all").table
    monkeypatch.setattr(_paths, "_ROWS", 7)  # two senders of three prompts
    np.testing.assert_allclose(
        whole["value"], patch(model, task, senders="all", receivers=RECEIVERS["q"]).table["value"], atol=1e-6, rtol=0
    )  # fmt: skip
    np.testing.assert_allclose(logits["value"], patch(model, task, senders="all").table["value"], atol=1e-6, rtol=0)


def test_a_model_without_a_program_runs_with_hooks_and_says_so(random_model, random_task):
    model = random_model("gemma2")  # has a program, but its heads do not add up
    with pytest.warns(UserWarning, match="whole forward passes, with hooks"):
        whole = patch(model, task := random_task(model), senders="all", together=True)
    assert whole.meta["exact_path"] == "hooks"
    np.testing.assert_allclose(whole.summary()["mean"], 1.0, atol=1e-4)
    with pytest.raises(NoProgramError):
        patch(model, task, exact_path="rerun")


# --- end points ----------------------------------------------------------------------------------------------------


def test_a_sender_that_does_not_differ_has_exactly_no_effect(random_case: tuple[Model, Task]):
    model, task = random_case
    same = task.corrupt.clone()  # type: ignore[union-attr]
    same[1] = task.clean[1]
    equal = dataclasses.replace(task, corrupt=same)
    for receivers in RECEIVERS.values():
        table = patch(model, equal, receivers=receivers, senders="all", min_oriented=0.0).table
        assert (table["value"][table["prompt"] == 1] == 0.0).all()
        assert (table["value"][table["prompt"] == 2] != 0.0).any()
    # Before the first token that differs all senders are what they were: not 1e-9 but 0.
    early = patch(model, task, receivers=RECEIVERS["k v"], senders="all", position=[2, 2, 2])
    assert (early.table["value"] == 0.0).all()


def test_everything_to_the_logits_is_the_other_run(random_case: tuple[Model, Task]):
    model, task = random_case
    for direction in ("noising", "denoising"):
        for freeze in (False, True):
            result = patch(model, task, senders="all", together=True, direction=direction, freeze_mlps=freeze)
            assert list(result.table["component"].unique()) == ["together"]
            assert result.summary()["mean"][0] == pytest.approx(1.0, abs=1e-5)
            other = task.corrupt if direction == "noising" else task.clean
            expected = rerun(model, other, [[]], readout(model, task), mask=task.mask)[0]
            np.testing.assert_allclose(result.table["value_metric"], expected, atol=TOLERANCE, rtol=0)


def test_everything_to_some_inputs_is_patching_these_inputs(random_case: tuple[Model, Task]):
    model, task = random_case
    at = task.positions["early"]
    edits = {
        Receiver("q", 2, 3): Edit("q", 2, head=3, pos=at),
        Receiver("k", 1, 0): Edit("k", 1, head=0, pos=at),
        Receiver("v", 1, model.n_key_value_heads - 1): Edit("v", 1, head=model.n_key_value_heads - 1, pos=at),
        Receiver("mlp", 0): Edit("mlp_out", 0, pos=at),
    }
    read = readout(model, task)
    for chosen in ([receiver] for receiver in edits):
        _, expected = (
            rerun(model, task.clean, [cell], read, source=task.corrupt, mask=task.mask)[0]
            for cell in ([], [edits[receiver] for receiver in chosen])
        )
        # Senders of all layers below: the stream that the receivers read is then the corrupted run's own.
        result = patch(model, task, receivers=chosen, senders="all", together=True, position="early")
        np.testing.assert_allclose(result.table["value_metric"], expected, atol=TOLERANCE, rtol=0)


def test_receivers_that_are_not_reached_are_left_alone(llama: tuple[Model, Task]):
    model, task = llama
    low, high = Receiver("q", 1, 0), Receiver("q", 2, 0)
    senders = [Node("z", 1, 0), Node("mlp_out", 1)]
    both = patch(model, task, receivers=[low, high], senders=senders).table["value"]
    np.testing.assert_array_equal(both, patch(model, task, receivers=[high], senders=senders).table["value"])
    listed = patch(model, task, receivers=[low], senders="all").table
    assert set(listed["layer"].dropna()) == {0}
    assert set(listed["component"]) == {"embed", "z", "mlp_out"}


def test_a_head_reaches_the_mlp_of_its_layer_unless_they_are_parallel(random_model, random_task):
    for architecture, reached in (("llama", {0, 1}), ("gpt_neox", {0}), ("phi", {0})):
        model = random_model(architecture)
        table = patch(model, random_task(model), receivers=[Receiver("mlp", 1)], position="early").table
        assert set(table["layer"]) == reached
        assert (table.groupby("layer")["value"].agg(lambda v: v.abs().max()) > 1e-4).all()


def test_frozen_mlps_leave_the_direct_path_only(random_model, random_task):
    # Between a parallel layer and the next there is no MLP on the way, but there is one after the embedding.
    model = random_model("gpt_neox")
    task = random_task(model)
    options: dict[str, Any] = {"receivers": [Receiver("q", 1, 0), Receiver("q", 1, 2)], "senders": "all"}
    free, frozen = (patch(model, task, **options, freeze_mlps=freeze).table for freeze in (False, True))
    direct = free["component"] != "embed"
    np.testing.assert_allclose(free["value"][direct], frozen["value"][direct], atol=1e-6, rtol=0)
    assert (free["value"] - frozen["value"])[~direct].abs().max() > 1e-3


# --- planted truth -------------------------------------------------------------------------------------------------


def test_the_stages_of_planted_ioi_have_exactly_the_true_senders(planted_case):
    case, task = planted_case("ioi_like")
    expected: list[tuple[Any, str, dict[tuple[int, int], float]]] = [
        ("logits", "end", {(2, 1): 0.8, (2, 2): 0.4, (2, 3): -0.2}),
        ([Receiver("q", layer, head) for layer, head in case.truth["mover"]], "end", {(1, 0): 1.2}),
        ([Receiver("q", 2, head) for head in (1, 2, 3)], "end", {(1, 0): 1.0}),
        ([Receiver("k", 2, head) for head in (1, 2, 3)], "end", {}),
        ([Receiver("v", 1, 0)], "s2", {(0, 1): 1.0}),
        ([Receiver("q", 1, 0)], "end", {}),
    ]
    for receivers, position, truth in expected:
        found = heads(case.model, task, receivers=receivers, position=position)
        # At sharpness 6 attention is right to exp(-6) = 0.0025 at each of three stages.
        for at, value in found.items():
            assert value == pytest.approx(truth.get(at, 0.0), abs=0.02), (receivers, at)
        assert set(truth) <= set(found)


def test_planted_induction_composes_through_keys_at_an_earlier_position(planted_case):
    case, task = planted_case("induction_like")
    by_key = heads(case.model, task, receivers=[Receiver("k", 1, 0)], position="next")
    assert max(by_key, key=by_key.__getitem__) == (0, 2)
    assert by_key.pop((0, 2)) == pytest.approx(0.5, abs=0.02)
    assert max(map(abs, by_key.values())) < 1e-3
    by_query = means(case.model, task, receivers=[Receiver("q", 1, 0)], senders="all")
    assert max(by_query, key=by_query.__getitem__) == ("embed", -1, -1)
    to_logits = heads(case.model, task)
    assert to_logits.pop((1, 0)) == pytest.approx(1.0, abs=0.02)
    assert max(map(abs, to_logits.values())) < 1e-3


def test_two_heads_that_cancel_are_seen_one_by_one_and_vanish_together(planted_case):
    case, task = planted_case("cancelling_pair")
    single = heads(case.model, task)
    for stage, value in (("main", 1.0), ("plus", 2.0), ("minus", -2.0)):
        assert single.pop(case.truth[stage][0]) == pytest.approx(value, abs=1e-3)
    assert max(map(abs, single.values())) < 1e-5
    pair = [Node("z", *case.truth[stage][0]) for stage in ("plus", "minus")]
    both = patch(case.model, task, senders=pair, together=True)
    assert both.summary()["mean"][0] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("gate", "alone"), [("or_gate", 0.0), ("and_gate", 1.0)])
def test_gates_are_paths_through_the_mlp(planted_case, gate: str, alone: float):
    case, task = planted_case(gate)
    both = [Node("z", *stage[0]) for stage in case.truth.values()]
    for receivers in ("logits", [Receiver("mlp", 1)]):
        found = means(case.model, task, senders=both, receivers=receivers)
        assert list(found.values()) == pytest.approx([alone, alone], abs=1e-3)
        together = patch(case.model, task, senders=both, receivers=receivers, together=True)
        assert together.summary()["mean"][0] == pytest.approx(1.0, abs=1e-3)
        # Held MLPs cut the way to the logits, but not the last step of the way to the MLP.
        held = patch(case.model, task, senders=both, receivers=receivers, together=True, freeze_mlps=True)
        assert held.summary()["mean"][0] == pytest.approx(0.0 if receivers == "logits" else 1.0, abs=1e-3)


def test_a_backup_head_hears_of_the_primary_by_its_query(planted_case):
    case, task = planted_case("backup_head")
    assert heads(case.model, task)[0, 1] == pytest.approx(1.0, abs=1e-3)
    # The other way round: without the primary head in its query, the backup adds the answer a second time.
    found = heads(case.model, task, receivers=[Receiver("q", 1, 2)])
    assert found.pop((0, 1)) == pytest.approx(-1.0, abs=1e-3)
    assert max(map(abs, found.values())) < 1e-5


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_is_in_units_of_the_gap(random_model, random_task):
    model = random_model("qwen2")
    task = random_task(model)
    read = readout(model, task)
    clean, corrupt = (
        rerun(model, tokens, [[]], read, mask=task.mask)[0] for tokens in (task.clean, task.corrupt)
    )  # fmt: skip
    gap = float((clean - corrupt).mean())
    for direction, sign, base in (("noising", -1, clean), ("denoising", 1, corrupt)):
        result = patch(model, task, senders="all", direction=direction)
        assert result.unit == "fraction of the clean-corrupt gap"
        table = result.table
        unchanged = base.numpy()[table["prompt"]]
        np.testing.assert_allclose(
            table["value"], sign * (table["value_metric"] - unchanged) / gap, atol=1e-5, rtol=0
        )  # fmt: skip
        assert list(table.columns) == ["prompt", "component", "layer", "head", "token", "value", "value_metric"]
        assert len(table) == 3 * (1 + 3 * (4 + 1))
    assert patch(model, task).table["layer"].dtype == np.int64
    assert result.filter(component="z", head=2).table["layer"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_several_positions_by_name_and_saved(random_model, random_task, tmp_path: Any):
    model = random_model("opt")
    task = random_task(model)
    receivers = [Receiver("v", 1, 0)]
    result = patch(model, task, receivers=receivers, senders="all", position=["early", "end"])
    for name in ("early", "end"):
        alone = patch(model, task, receivers=receivers, senders="all", position=name)
        assert result.filter(token=name).table.equals(alone.table)
    indexed = patch(model, task, receivers=receivers, senders="all", position=task.positions["early"])
    np.testing.assert_array_equal(indexed.table["value"], result.filter(token="early").table["value"])
    assert (indexed.table["token"] == "as given").all()
    again = type(result).load(result.save(tmp_path))
    assert again.table.equals(result.table)
    assert again.meta == result.meta


def test_a_stopped_run_goes_on(llama: tuple[Model, Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    model, task = llama
    whole = patch(model, task, batch_size=1)
    calls, real = [], _paths.patched

    def dies(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(_paths, "patched", dies)
    with pytest.raises(KeyboardInterrupt):
        patch(model, task, batch_size=1)
    assert patch(model, task, batch_size=1).table.equals(whole.table)
    assert len(calls) == 4


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"receivers": [Receiver("q", 1, 0)], "senders": [Node("z", 1, 2)]}, "receivers before senders: head 1.2"),
        ({"receivers": [Receiver("q", 0, 0)]}, "receivers before senders: head 0.0 reaches none"),
        ({"receivers": [Receiver("mlp", 1)], "senders": [Node("mlp_out", 1)]}, "MLP 1 reaches none"),
        ({"receivers": "logit"}, "receivers='logit' is not known"),
        ({"receivers": []}, "no receivers"),
        ({"receivers": [Receiver("z", 1, 0)]}, "component is one of 'q', 'k', 'v', 'mlp', 'logits'"),
        ({"receivers": [Receiver("q", 1, 4)]}, "has heads 0 to 3"),
        ({"receivers": [Receiver("v", 1, 2)]}, r"key-value heads \(groups\) 0 to 1"),
        ({"receivers": [Receiver("q", 3, 0)]}, "layers 0 to 2"),
        ({"receivers": [Receiver("q", 1)]}, "'q' has a layer and a head"),
        ({"receivers": [Receiver("mlp", 1, 0)]}, "'mlp' has a layer and no head"),
        ({"receivers": [Receiver("logits", 2)]}, "neither layer nor head"),
        ({"receivers": [Receiver("q", 1, 0)] * 2}, "given twice"),
        ({"receivers": [Receiver("logits"), Receiver("q", 1, 0)]}, "receivers='logits' by itself"),
        ({"senders": "neurons"}, "use 'heads', 'mlps', 'all'"),
        ({"senders": []}, "no nodes"),
        ({"senders": [Node("z", 0, 9)]}, "has heads 0 to 3"),
        ({"senders": [Node("q", 0, 0)]}, "component is one of 'z', 'mlp_out', 'embed'"),
        ({"position": "early"}, "the logits are read at token 8 of prompt 0"),
        ({"position": "subject"}, "has no position 'subject'; it has early, end"),
        ({"position": 9}, "position 9 is outside the prompts"),
        ({"position": []}, "there is no position"),
        ({"receivers": [Receiver("v", 1, 0)], "position": 1}, "token 1, which is padding: the prompt starts at 2"),
        ({"receivers": [Receiver("v", 1, 0)], "receiver_position": "early"}, "a change stays at its position"),
        ({"source": "mean"}, "'corrupt' or 'zero'"),
        ({"source": "zero", "direction": "denoising"}, "restores nothing"),
        ({"direction": "both"}, "'noising' or 'denoising'"),
        ({"metric": "loss"}, "metric 'loss' is not known"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_to_do(llama: tuple[Model, Task], options: dict[str, Any], says: str):
    # beartype, on in tests only, would refuse a Literal of another value before the function's own words.
    with pytest.raises(ValueError, match=says):
        getattr(patch, "__wrapped__", patch)(*llama, **options)


def test_tasks_that_say_nothing_are_refused(llama: tuple[Model, Task]):
    model, task = llama
    with pytest.raises(ValueError, match="has no corrupted prompts"):
        patch(model, dataclasses.replace(task, corrupt=None))
    with pytest.raises(ValueError, match="min_oriented"):
        patch(model, dataclasses.replace(task, corrupt=task.clean))
    with pytest.raises(ValueError, match="the clean run is above that of the corrupted run on 0%"):
        patch(model, dataclasses.replace(task, answers=task.wrong, wrong=task.answers))
    with pytest.raises(ValueError, match="corrupt is"):
        dataclasses.replace(task, corrupt=task.clean[:, 1:])
    late = dataclasses.replace(
        task, positions={"end": torch.full((3,), N_POS - 2), "last": torch.full((3,), N_POS - 1)}
    )
    with pytest.raises(ValueError, match="'last' comes after"):
        patch(model, late, position="last", receivers=[Receiver("v", 1, 0)], min_oriented=0.0)


def test_the_same_position_for_receivers_may_be_written_out(llama: tuple[Model, Task]):
    model, task = llama
    receivers: Sequence[Receiver] = [Receiver("v", 1, 0)]
    plain = patch(model, task, receivers=receivers, position="end").table
    assert plain.equals(patch(model, task, receivers=receivers, position="end", receiver_position=-1).table)
