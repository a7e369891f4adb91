"""Which numbers do the claims of *Interpretability in the Wild* (arXiv 2211.00593) ask for?"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.core.edits import Edit
from interp.core.result import Result
from interp.models.model import Model
from interp.report.claims import untestable
from interp.tasks.task import Task

Head = tuple[int, int]


def measured(
    *, heads: Result, stream: Result, roles: Result, direct: Result, without: Result, alone: Result, n_layers: int
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/ioi_circuit/claims.csv`.

    Args:
        heads: `activation.patch` of "z"; its array "clean" is the logit difference of each prompt.
        stream: `activation.patch` of "resid_pre" by layer at the position "end".
        roles: `roles.ioi_roles`.
        direct: `effects.effects` of the name movers.
        without: `ablation.ablate` of {"name movers": ...} at the end position.
        alone: `ablation.ablate(keep=True)` of {"circuit": ..., "random 0": ..., ...}.
        n_layers: layers of the model.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    logit_diff = heads.arrays["clean"][1]
    gap = float((logit_diff - heads.arrays["corrupt"][1]).mean())
    kept = alone.table.groupby("target")["value"].mean() / logit_diff.mean()
    random = kept[[name for name in kept.index if name.startswith("random")]]
    restored = stream.summary(["layer"]).set_index("layer")["mean"]
    backup = roles.table[roles.table["component"] == "backup"]
    direct_sum = float(direct.filter(metric="direct").summary(["layer", "head"])["mean"].sum()) * gap
    return {
        "can": float((logit_diff > 0).mean()),
        "sparse": _share_of_top(roles.arrays["effects"][1][0], 5),
        **{claim: _confirmed(roles, role) for claim, role in _ROLES.items()},
        # A head that copies negatively can help too, by attending to the subject: the claim is about those that hurt.
        "negative": _confirmed(roles, "negative name mover", hurting=True),
        "backup": float((backup["value"] >= 0.05).sum()),
        "compensated": float(without.table["value_drop"].mean()) / direct_sum,
        "faithful": float(kept["circuit"]),
        "random_null": float(random.mean()),
        "middle": float(restored.index[restored >= 0.5].min()) / n_layers,
        "same_heads": untestable("needs GPT-2 small, which no package ships: run this notebook with model='gpt2'"),
    }


_ROLES = {
    "movers": "name mover", "inhibition": "S-inhibition", "duplicate": "duplicate token", "induction": "induction",
    "previous": "previous token",
}  # fmt: skip


def _confirmed(roles: Result, role: str, *, hurting: bool = False) -> float:
    table = roles.table[roles.table["component"] == role]
    kept = table[table["value"] < 0] if hurting else table
    return float(kept["value_confirmed"].sum())


def _share_of_top(effects: np.ndarray, n: int) -> float:
    helping = np.sort(effects[effects > 0])
    return float(helping[-n:].sum() / helping.sum())


def stage_maps(roles: Result) -> dict[str, pd.DataFrame]:
    """What every head does in each stage of path patching.

    Args:
        roles: `roles.ioi_roles`.

    Returns:
        {title: mean effects, layers down and heads across}, in the order of the stages, the titles in short lines.
    """
    effects = roles.arrays["effects"][1]
    return {
        textwrap.fill(stage, 24): pd.DataFrame(effect).rename_axis("layer").rename_axis("head", axis=1)
        for stage, effect in zip(roles.meta["stages"], effects, strict=True)
    }


def candidates(roles: Result) -> pd.DataFrame:
    """The candidates of each role, and what confirms them.

    Args:
        roles: `roles.ioi_roles`.

    Returns:
        A row a role and head.
    """
    return roles.table[["component", "layer", "head", *_EVIDENCE]].round(2)


_EVIDENCE = (
    "value", "value_low", "value_high", "value_end_to_io", "value_end_to_s2", "value_s2_to_s1", "value_s2_to_after_s1",
    "value_copy", "value_anti_copy", "value_confirmed",
)  # fmt: skip


def at_end(task: Task, heads: Sequence[Head]) -> list[Edit]:
    """Heads as edits of their z at the end position only.

    Args:
        task: with the position "end".
        heads: (layer, head).

    Returns:
        One edit a head.
    """
    return [Edit("z", layer, head=head, pos=task.positions["end"]) for layer, head in heads]


def circuit_and_controls(model: Model, heads: Sequence[Head], *, n: int, seed: int) -> Mapping[str, list[Head]]:
    """A circuit's heads, and random sets of as many heads in each layer.

    Args:
        model: for its number of heads.
        heads: (layer, head), of the circuit.
        n: how many random sets.
        seed: of the draw.

    Returns:
        {"circuit": heads, "random 0": ..., ...}.
    """
    rng = np.random.default_rng(seed)
    layers = sorted({layer for layer, _ in heads})
    sizes = {layer: sum(at == layer for at, _ in heads) for layer in layers}
    draws = [
        [(layer, int(head)) for layer in layers for head in rng.choice(model.n_heads, sizes[layer], replace=False)]
        for _ in range(n)
    ]
    return {"circuit": sorted(set(heads)), **{f"random {i}": draw for i, draw in enumerate(draws)}}
