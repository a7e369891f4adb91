"""Which stages does a logit flow go through, and how do two kinds of prompts differ? Read from the maps of `flow`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from interp.core.registry import method
from interp.core.result import Result
from interp.flow.logit_flow import COMPONENTS, PAPER, roles


@method(name="Stages of knowledge retrieval", paper=PAPER, notebook="logit_flow")
def locate(found: Result, *, entity: str, relation: str | None, last: str = "end", bar: float = 0.05) -> Result:
    """In which layers the four stages of retrieving a fact are, by a fixed rule.

    On the map averaged over prompts, with negative entries set to 0:

        A  entity enrichment              MLP flow at the entity, in the lower half of the layers
        B  entity attribute extraction    attention flow from the entity, in all layers
        C  relation enrichment            MLP flow at the relation, in all layers
        D  relation attribute extraction  attention flow from the relation and the last position, and MLP flow at the
                                          last position, in all layers

    A stage's share is its part of the sum over the whole map; it is present where that is at least `bar`. It lies in
    the layers from the first in which its running sum reaches a tenth of it to the first in which it reaches nine
    tenths; its centre is the mean layer, weighted by its flow.

    Args:
        found: of `logit_flow.flow`.
        entity: name of the entity's position.
        relation: name of the relation's position, or None where the prompts have none apart; then there is no C.
        last: name of the position that predicts.
        bar: share from which a stage is present.

    Returns:
        Result, unit "share of the positive flow"; one row a stage: component ("A" to "D"), value, value_centre,
        value_low, value_high (layers; NaN without any flow), value_present (1 or 0).

    Raises:
        ValueError: a role that no prompt has, or one name for two roles.

    Cost: none beside `logit_flow.flow`.

    Example:
        >>> from interp.flow.logit_flow import flow
        >>> from interp.models import planted
        >>> from interp.tasks.task import Task
        >>> case = planted.ioi_like()
        >>> task = Task("doc", case.prompts, case.clean, "planted", answers=case.answers, positions=case.positions)
        >>> located = locate(flow(case.model, task[:4]), entity="io", relation="s2").table
        >>> located[located["value_present"] == 1][["component", "value_centre"]].values.tolist()
        [['B', 2.0]]
    """
    named = [role for role in (entity, relation, last) if role is not None]
    known = sorted(set(found.table["target"]))
    if missing := [role for role in named if role not in known]:
        raise ValueError(f"no position is called {missing[0]!r}; there are {', '.join(known)}. Name them in the task.")
    if len(set(named)) < len(named):
        raise ValueError(f"entity, relation and last are {named}: they are different positions.")
    table = roles(found).table
    n_prompts = table["prompt"].nunique()
    mean = table.groupby(["component", "target", "layer"])["value"].sum().clip(lower=0) / n_prompts
    n_layers = int(table["layer"].max()) + 1

    def at(component: str, role: str | None) -> np.ndarray:
        return np.zeros(n_layers) if role is None else mean[component, role].to_numpy()

    lower = np.arange(n_layers) < n_layers / 2
    flows = {
        "A": at("mlp", entity) * lower,
        "B": at("attn", entity),
        "C": at("mlp", relation),
        "D": at("attn", relation) + at("attn", last) + at("mlp", last),
    }
    whole = float(mean.sum())
    rows = []
    for stage, values in flows.items():
        total = float(values.sum())
        share = total / whole if whole else 0.0
        low, high, centre = float("nan"), float("nan"), float("nan")
        if total > 0:
            low, high = (float(np.argmax(values.cumsum() >= part * total)) for part in (0.1, 0.9))
            centre = float((np.arange(n_layers) * values).sum() / total)
        rows.append((stage, share, centre, low, high, float(share >= bar)))
    columns = ["component", "value", "value_centre", "value_low", "value_high", "value_present"]
    meta = {**found.meta, "entity": entity, "relation": relation, "last": last, "bar": bar}
    return Result("stages.locate", pd.DataFrame(rows, columns=columns), "share of the positive flow", meta=meta)


def compare(first: Result, second: Result, *, groups: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
    """The flow of two kinds of prompts, role by role: single-hop and two-hop, or right and wrong.

    Args:
        first: of `logit_flow.flow`.
        second: of `logit_flow.flow`, on other prompts.
        groups: {role: names of positions that play it in either}; None for the names that both have.

    Returns:
        One row a component and role: component, target, `first` and `second`, the flow summed over layers and
        positions of the role, mean over prompts (nats), `ratio`, second over first, and `low` and `high`, the 95%
        bootstrap interval of the ratio over prompts of both. Without any flow in `first` there is no ratio (NaN).

    Raises:
        ValueError: a role that one of the two has not.

    Example:
        >>> from interp.flow.logit_flow import flow
        >>> from interp.models import planted
        >>> from interp.tasks.task import Task
        >>> case = planted.ioi_like()
        >>> task = Task("doc", case.prompts, case.clean, "planted", answers=case.answers, positions=case.positions)
        >>> found = flow(case.model, task[:3], n_steps=1)
        >>> compare(found, found, groups={"names": ["io", "s1"]})[["component", "target", "ratio"]].values.tolist()
        [['attn', 'names', 1.0], ['mlp', 'names', nan]]
    """
    tables = [roles(each).table for each in (first, second)]
    if groups is None:
        shared = set(tables[0]["target"]) & set(tables[1]["target"])
        groups = {name: [name] for name in sorted(shared)}
    rng = np.random.default_rng(0)
    rows = []
    for role, names in groups.items():
        for component in COMPONENTS:
            sides = []
            for table in tables:
                here = table[table["target"].isin(list(names)) & (table["component"] == component)]
                if here.empty:
                    raise ValueError(f"role {role!r} ({', '.join(names)}) has no position in one of the two results.")
                per_prompt = here.groupby("prompt")["value"].sum()
                sides.append(per_prompt.reindex(table["prompt"].unique(), fill_value=0.0).to_numpy())
            draws = [side[rng.integers(len(side), size=(1000, len(side)))].mean(1) for side in sides]
            means = [float(side.mean()) for side in sides]
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high = np.quantile(draws[1] / draws[0], [0.025, 0.975])
                ratio = float(np.float64(means[1]) / means[0])
            rows.append((component, role, *means, ratio, float(low), float(high)))
    return pd.DataFrame(rows, columns=["component", "target", "first", "second", "ratio", "low", "high"])
