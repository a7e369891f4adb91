"""Which numbers do the claims on logit flow of *Back Attention* (arXiv 2502.10835) ask for?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.core.result import Result
from interp.flow import logit_flow, stages
from interp.models.model import Model
from interp.report.claims import untestable
from interp.tasks.task import Task

#: Names of relation positions, with one hop or two.
RELATIONS = ("relation", "relation1", "relation2")
#: Fewer two-hop prompts than this are no comparison.
_ENOUGH = 5


def right_and_wrong(model: Model, task: Task, n: int) -> tuple[Task | None, Task | None]:
    """The first n prompts that a model continues with the answer, and the first n with another fact's answer.

    Args:
        model: a decoder.
        task: with answers. A prompt continued with a word that answers none of its prompts is in neither part.
        n: at most so many of each.

    Returns:
        (right, wrong); None where there are none.
    """
    assert task.answers is not None
    found, answers = (each.cpu().numpy() for each in (logit_flow.predicted(model, task), task.answers))
    right = np.flatnonzero(found == answers)[:n]
    wrong = np.flatnonzero((found != answers) & np.isin(found, answers))[:n]
    return task[right] if len(right) else None, task[wrong] if len(wrong) else None


def shares_by_layer(*neurons: Result) -> pd.DataFrame:
    """In which layers the strongest neurons are.

    Args:
        neurons: of `attribution.attribute` by neurons.

    Returns:
        Layers down, a column for each Result: its share of the neurons kept.
    """
    shares = [each.table["layer"].astype(int).value_counts(normalize=True).sort_index() for each in neurons]
    names = {"z": "attention neurons", "post": "FFN neurons"}
    titles = [names[each.table["component"].iloc[0]] for each in neurons]
    return pd.concat(shares, axis=1, keys=titles).fillna(0.0).rename_axis("layer").sort_index()


def role_maps(found: Result, *, names: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """The flow over layers and roles, mean over prompts.

    Args:
        found: of `logit_flow.flow`.
        names: roles, in the order of the prompt.

    Returns:
        {"attention flow": ..., "FFN flow": ...}, layers down and roles across.
    """
    titles = {"attn": "attention flow", "mlp": "FFN flow"}
    table = logit_flow.roles(found).table
    n_prompts = table["prompt"].nunique()
    maps = table.groupby(["component", "layer", "target"])["value"].sum().unstack("target") / n_prompts
    kept = [name for name in names if name in maps]
    return {title: maps.loc[component][kept].rename_axis("role", axis=1) for component, title in titles.items()}


def measured(
    *,
    components: Result,
    heads: Result,
    neurons: Result,
    found: Result,
    located: Result,
    two_hop: Result | None,
    failed: Result | None,
    n_layers: int,
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/logit_flow/claims.csv`.

    Args:
        components: `attribution.attribute` by component, of log-probability increases.
        heads: the same by head.
        neurons: the same by FFN neuron, the 300 strongest.
        found: `logit_flow.flow` of the prompts that the model gets right.
        located: `stages.locate` of it.
        two_hop: `logit_flow.flow` of two-hop prompts that it gets right, or None.
        failed: `logit_flow.failures` of two-hop prompts that it gets wrong, or None.
        n_layers: layers of the model.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    n = len(components.arrays["total"][1])
    whole = {
        name: float(components.filter(component=name).table["value"].sum()) / n for name in ("attn_out", "mlp_out")
    }
    gap = components.table.groupby("prompt")["value"].sum().to_numpy() - components.arrays["total"][1]
    strongest = heads.filter(component="z").table.groupby("prompt")["value"].nlargest(3)
    late = found.arrays["value_layer"][1] >= 2 * n_layers / 3
    stage = located.table.set_index("component")
    return {
        "telescopes": float(np.abs(gap).max()),
        "attn_ffn": whole["attn_out"] / whole["mlp_out"],
        "heads": float(strongest.sum()) / n / whole["attn_out"],
        "late_attn": float(late[:, : late.shape[1] // 2].mean()),
        "late_ffn": float(late[:, late.shape[1] // 2 :].mean()),
        "few_neurons": float(neurons.table["value"].sum()) / n / whole["mlp_out"],
        **{f"stage_{name.lower()}": float(stage.loc[name, "value"]) for name in "ABCD"},
        "order_ab": float(stage.loc["B", "value_centre"] - stage.loc["A", "value_centre"]) / n_layers,
        "late_end": (_centre(found, "end") - _centre(found, "entity")) / n_layers,
        **_of_failures(two_hop, failed, n_layers),
        "two_hop_relation": _two_hop(found, two_hop),
        "llama_attn": untestable("needs Llama-7B, which no package ships"),
    }


def _centre(found: Result, role: str) -> float:
    """Mean layer of the FFN flow at a role, weighted by its positive part on the mean map."""
    values = role_maps(found, names=(role,))["FFN flow"][role].clip(lower=0)
    return float((values.index.to_numpy() * values).sum() / values.sum())


def _two_hop(found: Result, two_hop: Result | None) -> Any:
    if (n := _prompts(two_hop)) < _ENOUGH or two_hop is None:
        return untestable(f"the model got {n} of the two-hop prompts right; fewer than {_ENOUGH} are no comparison")
    ratio = stages.compare(found, two_hop, groups={"relation": RELATIONS}).set_index("component")["ratio"]
    return float(ratio["attn"])


def _of_failures(two_hop: Result | None, failed: Result | None, n_layers: int) -> dict[str, Any]:
    if (n := _prompts(failed, "prompt")) < _ENOUGH or failed is None:
        why = untestable(f"the model gave {n} wrong facts; fewer than {_ENOUGH} are no comparison")
        return {"wrong_late": why, "wrong_entity": why}
    late = float(np.median(failed.arrays["layer"][1])) / n_layers
    if two_hop is None:
        return {"wrong_late": late, "wrong_entity": untestable("the model got no two-hop prompt right")}
    to_answer = stages.compare(two_hop, failed.filter(metric="answer"), groups={"entity": ["entity"]})
    return {"wrong_late": late, "wrong_entity": float(to_answer.set_index("component").loc["attn", "ratio"])}


def _prompts(found: Result | None, array: str = "target") -> int:
    return 0 if found is None else len(found.arrays[array][1])
