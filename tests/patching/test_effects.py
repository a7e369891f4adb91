"""Direct, indirect and total effects: against hooks, the sum that they must have, the last layer, planted truth."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from interp.core.readout import readout
from interp.core.rerun import rerun
from interp.models import Model, planted, program, toy
from interp.models.hooks import run
from interp.patching import effects as module
from interp.patching._paths import scaled_as
from interp.patching.effects import Node, effects
from interp.patching.path import Receiver, patch
from interp.tasks import Task, ioi

N_POS = 9
#: Logits of the toys are about 10, and sums in another order differ by 1e-6 a layer.
TOLERANCE = 5e-5


def drawn(model: Model) -> Task:
    """Random pairs that share their first three tokens, one of them padded, answers oriented by the model."""
    clean = toy.random_tokens(model, 3, N_POS)
    corrupt = clean.clone()
    corrupt[:, 3:] = toy.random_tokens(model, 3, N_POS, seed=1)[:, 3:]
    pair = toy.random_tokens(model, 3, 2, seed=5)
    mask = torch.ones_like(clean)
    mask[0, :2] = 0
    positions = {"early": torch.tensor([4, 5, 4]), "end": torch.full((3,), N_POS - 1)}
    prompts = ("one", "two", "three")
    task = Task("drawn", prompts, clean, "drawn", corrupt, pair[:, 0], pair[:, 1], positions, mask)
    read = readout(model, task)
    swap = (rerun(model, clean, [[]], read, mask=mask) < rerun(model, corrupt, [[]], read, mask=mask))[0]
    answers, wrong = torch.where(swap, pair[:, 1], pair[:, 0]), torch.where(swap, pair[:, 0], pair[:, 1])
    return dataclasses.replace(task, answers=answers, wrong=wrong)


def as_task(case: planted.Planted) -> Task:
    return Task(
        case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions
    )  # fmt: skip


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each node and prompt, a column for each effect."""
    table = table.fillna({"layer": -1, "head": -1})
    return table.pivot(index=["component", "layer", "head", "prompt"], columns="metric", values="value")


def means(case: planted.Planted, *nodes: Node) -> dict[str, tuple[float, float, float]]:
    """{node: (direct, total, indirect)}."""
    table = wide(effects(case.model, as_task(case), nodes=list(nodes)).table)
    table = table.groupby(["component", "layer", "head"]).mean().round(2) + 0.0
    names = [str(Node(c, int(layer), None if head < 0 else int(head))) for c, layer, head in table.index]
    return dict(zip(names, table[["direct", "total", "indirect"]].itertuples(index=False, name=None), strict=True))


@pytest.fixture(scope="module", params=toy.ARCHITECTURES)
def random_case(request: pytest.FixtureRequest) -> tuple[Model, Task]:
    model = toy.random(request.param)
    return model, drawn(model)


# --- against other ways of computing it ----------------------------------------------------------------------------


def test_equal_whole_forward_passes_with_hooks(random_case: tuple[Model, Task]):
    model, task = random_case
    nodes = [Node("embed"), Node("z", 0, 1), Node("mlp_out", 0), Node("z", 2, 3), Node("mlp_out", 2)]
    for position, direction in (("end", "noising"), ("early", "denoising")):
        options: dict[str, Any] = {"nodes": nodes, "position": position, "direction": direction}
        fast = effects(model, task, **options, exact_path="rerun", batch_size=2).table
        slow = effects(model, task, **options, exact_path="hooks").table
        assert fast.drop(columns="value").equals(slow.drop(columns="value"))
        np.testing.assert_allclose(fast["value"], slow["value"], atol=TOLERANCE, rtol=0)
        direct = fast[fast["metric"] == "direct"]["value"]
        assert (direct == 0.0).all() if position == "early" else direct.abs().max() > 0.01


def final_norm_by_hand(model: Model, stream: Tensor, scale_of: Tensor) -> Tensor:
    """The final norm in float64 from its definition, divided by the scale of another stream."""
    norm = program.program(model).final_norm
    assert isinstance(norm, nn.Module)
    weight = norm.weight.double() + (1.0 if "Gemma" in type(norm).__name__ else 0.0)
    bias = 0.0
    if isinstance(norm, nn.LayerNorm):
        bias = norm.bias.double()
        stream, scale_of = (x - x.mean(-1, keepdim=True) for x in (stream, scale_of))
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    return stream / (scale_of.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def test_direct_effects_of_all_nodes_add_up_under_the_frozen_norm(random_case: tuple[Model, Task]):
    model, task = random_case
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    clean, corrupt = (
        run(model, tokens, capture=[last], mask=task.mask).cache[last][:, -1].double()
        for tokens in (task.clean, task.corrupt)
    )
    unembed = model.bridge.unembed.original_component
    rows = (unembed.weight[task.answers] - unembed.weight[task.wrong]).double()
    read = readout(model, task)
    gap = [rerun(model, t, [[]], read, mask=task.mask)[0].double() for t in (task.clean, task.corrupt)]
    for direction, base in (("noising", clean), ("denoising", corrupt)):
        moved = final_norm_by_hand(model, clean, base) - final_norm_by_hand(model, corrupt, base)
        expected = (moved * rows).sum(-1) / (gap[0] - gap[1]).mean()
        result = effects(model, task, nodes="all", frozen_norm=True, direction=direction)
        found = result.filter(metric="direct").table.groupby("prompt")["value"].sum()
        # The sum of 16 float32 numbers, each a small difference of logits of about 10.
        np.testing.assert_allclose(found, expected.detach(), atol=1e-4, rtol=0)
        free = effects(model, task, nodes="all", direction=direction).filter(metric="direct")
        assert np.abs(free.table.groupby("prompt")["value"].sum() - expected.detach().numpy()).max() > 1e-3


def test_direct_effects_add_up_on_the_default_model(smol: Model):
    task = ioi(smol, 2, corrupt="swap")
    result = effects(smol, task, nodes="all", frozen_norm=True).filter(metric="direct")
    stream = [
        run(smol, tokens, capture=["blocks.29.hook_resid_post"]).cache["blocks.29.hook_resid_post"][:, -1].double()
        for tokens in (task.clean, task.corrupt)
    ]
    unembed = smol.bridge.unembed.original_component.weight.double()
    moved = final_norm_by_hand(smol, stream[0], stream[0]) - final_norm_by_hand(smol, stream[1], stream[0])
    difference = (moved * (unembed[task.answers] - unembed[task.wrong])).sum(-1).detach()
    read = readout(smol, task)
    gap = rerun(smol, task.clean, [[]], read)[0] - rerun(smol, task.corrupt, [[]], read)[0]
    # 301 nodes.
    np.testing.assert_allclose(
        result.table.groupby("prompt")["value"].sum(), difference / gap.mean(), atol=3e-4, rtol=0
    )  # fmt: skip


def test_in_the_last_layer_total_is_direct(random_case: tuple[Model, Task]):
    model, task = random_case
    table = wide(effects(model, task, nodes="all").table)
    last = table.loc[["z", "mlp_out"]].query("layer == 2")
    mlp, heads = last.loc["mlp_out"], last.loc["z"]
    np.testing.assert_allclose(mlp["total"], mlp["direct"], atol=TOLERANCE, rtol=0)
    # A head is read by its layer's MLP too, where the two are not parallel; that way is all there is besides.
    parallel = program.program(model).parallel
    assert (np.abs(heads["indirect"]).max() < TOLERANCE) == parallel
    through = patch(model, task, senders=[Node("z", 2, head) for head in range(4)]).table
    np.testing.assert_allclose(heads["total"], through["value"], atol=TOLERANCE, rtol=0)
    assert np.abs(table["indirect"]).max() > 0.01
    np.testing.assert_allclose(table["indirect"], table["total"] - table["direct"], atol=1e-12, rtol=0)


def test_direct_effects_are_paths_to_the_logits_with_frozen_mlps(random_case: tuple[Model, Task]):
    model, task = random_case
    direct = effects(model, task, nodes="all").filter(metric="direct").table["value"]
    held = patch(model, task, senders="all", receivers=[Receiver("logits")], freeze_mlps=True).table["value"]
    np.testing.assert_array_equal(direct, held)


def test_a_node_that_does_not_differ_has_no_effect(random_case: tuple[Model, Task]):
    model, task = random_case
    same = task.corrupt.clone()  # type: ignore[union-attr]
    same[1] = task.clean[1]
    equal = dataclasses.replace(task, corrupt=same)
    for frozen in (False, True):
        table = effects(model, equal, nodes="all", frozen_norm=frozen, min_oriented=0.0).table
        direct = table[table["metric"] == "direct"]
        assert (direct["value"][direct["prompt"] == 1] == 0.0).all()
        np.testing.assert_allclose(table["value"][table["prompt"] == 1], 0.0, atol=TOLERANCE, rtol=0)
        assert table["value"][table["prompt"] == 2].abs().max() > 0.01


def test_the_norm_held_is_linear_and_an_unknown_norm_is_refused():
    generator = torch.Generator().manual_seed(0)
    streams, others = torch.randn(2, 4, 32, generator=generator)
    gemma: Any = program.program(toy.random("gemma", weights="raw")).final_norm
    for norm in (nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-5), gemma):
        for parameter in norm.parameters():
            nn.init.normal_(parameter.requires_grad_(False), generator=generator)
        held = scaled_as(norm, others, others)
        torch.testing.assert_close(held, norm(others))
        zero = scaled_as(norm, torch.zeros_like(others), others)
        once, twice = (scaled_as(norm, n * streams, others) - zero for n in (1, 2))
        torch.testing.assert_close(twice, 2 * once)

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    with pytest.raises(ValueError, match="scale of a Root is not known: leave frozen_norm out"):
        scaled_as(Root(), streams, others)


# --- planted truth -------------------------------------------------------------------------------------------------


def test_planted_effects():
    case = planted.ioi_like()
    mover, inhibition = Node("z", 2, 1), Node("z", 1, 0)
    found = means(case, mover, inhibition, Node("z", 0, 0))
    assert found[str(mover)] == pytest.approx((0.8, 0.8, 0.0), abs=0.02)
    assert found[str(inhibition)] == pytest.approx((0.0, 1.0, 1.0), abs=0.02)
    assert found[str(Node("z", 0, 0))] == (0.0, 0.0, 0.0)

    case = planted.backup_head()
    found = means(case, Node("z", 0, 1), Node("z", 1, 2))
    assert found == {"head 0.1": (1.0, 0.0, -1.0), "head 1.2": (0.0, 0.0, 0.0)}

    case = planted.saturation()
    found = means(case, Node("z", 1, 1), Node("mlp_out", 1))
    assert found == {"MLP 1": (1.0, 1.0, 0.0), "head 1.1": (0.0, 1.0, 1.0)}

    case = planted.cancelling_pair()
    found = means(case, Node("z", 1, 0), Node("z", 0, 1), Node("z", 1, 2))
    assert found == {"head 0.1": (2.0, 2.0, 0.0), "head 1.0": (1.0, 1.0, 0.0), "head 1.2": (-2.0, -2.0, 0.0)}

    for gate, alone in ((planted.or_gate(), 0.0), (planted.and_gate(), 1.0)):
        found = means(gate, Node("z", 0, 1), Node("mlp_out", 1))
        assert found == {"head 0.1": (0.0, alone, alone), "MLP 1": (1.0, 1.0, 0.0)}


def test_an_earlier_position_has_total_effects_only():
    case = planted.ioi_like()
    result = effects(case.model, as_task(case), nodes=[Node("z", 0, 1), Node("embed")], position=["s2", "end"])
    found = result.summary(by=["token", "component", "metric"]).set_index(["token", "component", "metric"])["mean"]
    assert found["s2", "z", "total"] == pytest.approx(1.0, abs=0.02)
    assert found["s2", "embed", "total"] == pytest.approx(1.0, abs=0.02)  # S2 is the only token that differs
    assert found["s2", "z", "direct"] == found["s2", "embed", "direct"] == 0.0
    assert found["end", "z", "total"] == pytest.approx(0.0, abs=0.02)
    assert found["end", "embed", "total"] == 0.0


# --- table and refusals --------------------------------------------------------------------------------------------


def test_the_table_and_its_copy_on_disk(tmp_path: Any):
    model = toy.random("llama")
    task = drawn(model)
    result = effects(model, task, nodes="all")
    assert list(result.table.columns) == ["prompt", "component", "layer", "head", "token", "metric", "value"]
    assert len(result.table) == 3 * 3 * 16
    assert result.unit == "fraction of the clean-corrupt gap"
    assert type(result).load(result.save(tmp_path)).table.equals(result.table)
    assert set(effects(model, task, nodes="mlps").table["component"]) == {"mlp_out"}
    assert set(effects(model, task).table["component"]) == {"z"}


def test_bad_input_is_refused():
    model = toy.random("llama")
    task = drawn(model)
    with pytest.raises(ValueError, match="has heads 0 to 3"):
        effects(model, task, nodes=[Node("z", 0, 4)])
    with pytest.raises(ValueError, match="use 'heads', 'mlps', 'all'"):
        effects(model, task, nodes="everything")
    with pytest.raises(ValueError, match="has no corrupted prompts"):
        effects(model, dataclasses.replace(task, corrupt=None))
    with pytest.raises(ValueError, match="which is padding"):
        effects(model, task, position=0)
    with pytest.raises(ValueError, match="leave frozen_norm out"):
        effects(model, task, frozen_norm=True, exact_path="hooks")
    with pytest.raises(ValueError, match="min_oriented"):
        effects(model, dataclasses.replace(task, answers=task.wrong, wrong=task.answers))


def test_the_module_exports_what_its_users_need():
    assert set(module.__all__) == {"Node", "effects"}
