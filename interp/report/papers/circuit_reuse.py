"""Which numbers do the claims of *Circuit Component Reuse Across Tasks* (arXiv 2310.08744) ask for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from interp.circuits.repair import repair
from interp.core.batching import batches
from interp.core.readout import readout, some
from interp.core.rerun import rerun
from interp.core.result import Result
from interp.models.model import Model
from interp.report.claims import untestable
from interp.tasks.task import Task


def measured(
    *, ioi: np.ndarray, years: Result, capitals: Result, repaired: Result, agreement: pd.DataFrame
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/circuit_reuse/claims.csv`.

    Args:
        ioi: logit difference of each IOI prompt.
        years: `overlap.overlap` of IOI with Coloured Objects, whose control is Greater-Than.
        capitals: the same, whose control is country capitals.
        repaired: `repair.repair` on Coloured Objects, on all its prompts.
        agreement: `each_head`'s table.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    shared = _row(years, "second", 0)
    conditions = repaired.table.groupby("component")["value"].mean()
    given = repaired.table[repaired.table["component"] == "given heads"]
    attention = repaired.table.groupby("component")["value_attention_wrong"].mean()
    table = untestable("the paper's heads are GPT-2 Medium's: run this notebook with model='gpt2-medium'")
    return {
        "ioi_accuracy": float((ioi > 0).mean()),
        "objects_accuracy": float(conditions["unchanged"]),
        "overlap": float(shared["value"]),
        "overlap_null": float(shared["value_p"]),
        "control_years": float(shared["value"] - _row(years, "control", 0)["value"]),
        "control_capitals": float(shared["value"] - _row(capitals, "control", 0)["value"]),
        "movers": float(_row(years, "second", 1)["value"]),
        "gatherers": float(_row(years, "second", 2)["value"]),
        "repair": float(conditions["given heads"] - conditions["unchanged"]),
        "repair_safe": float(given["value_mistake"].mean()),
        "repair_specific": float(conditions["given heads"] - conditions["random heads"]),
        "downstream": float(attention["given heads"] - attention["unchanged"]),
        "path_agrees": float(spearmanr(agreement["value_repair"], agreement["value"]).statistic),
        "head_table": table,
    }


def _row(result: Result, target: str, step: int) -> pd.Series:
    return result.filter(target=target, step=step).table.iloc[0]


def able(model: Model, task: Task, *, margin: float = 0.0) -> Task:
    """The prompts on which a model prefers the right answer to the wrong one, and the other way in the contrast.

    Args:
        model: a decoder.
        task: with clean and corrupted prompts, right and wrong answers.
        margin: by how many logits, at least, in both.

    Returns:
        Those prompts, as a Task. Cost: two forward passes.
    """
    read = readout(model, task)
    clean, corrupt = (
        torch.cat([
            rerun(model, tokens[rows], [[]], some(read, rows), mask=None if task.mask is None else task.mask[rows])[0]
            for rows in batches(len(task), 64)
        ])
        for tokens in (task.clean, task.corrupt) if tokens is not None
    )  # fmt: skip
    kept = ((clean > margin) & (corrupt < -margin)).nonzero().flatten().tolist()
    return task[kept]


def each_head(model: Model, task: Task, stages: Result, *, step: int, n: int, attend_to: Sequence[str]) -> pd.DataFrame:
    """What each of the strongest heads of a stage does when it alone is made to attend to some positions.

    Args:
        model: a decoder.
        task: on which attention is overwritten, with the positions named.
        stages: `stages.stages` of the task that the heads come from.
        step: its stage, from 1.
        n: how many heads, by magnitude of their path effect.
        attend_to: names of positions of `task`.

    Returns:
        A row a head: `layer`, `head`, `value` (mean path effect), `value_repair` (mean change of the logit difference,
        in logits). Cost: n times that of `repair`.
    """
    effects = stages.filter(step=step).summary(["layer", "head"]).set_index(["layer", "head"])["mean"]
    strongest = effects.reindex(effects.abs().sort_values(ascending=False).index[:n])
    rows = []
    for (layer, head), effect in strongest.items():
        found = repair(model, task, [(int(layer), int(head))], attend_to=attend_to, n_random=0).table
        means = found.groupby("component")["value_logit_diff"].mean()
        rows.append({
            "layer": int(layer), "head": int(head), "value": float(effect),
            "value_repair": float(means["given heads"] - means["unchanged"]),
        })  # fmt: skip
    return pd.DataFrame(rows)
