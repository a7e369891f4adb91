"""Which numbers do the claims of *Back Attention* (arXiv 2502.10835) on its module ask for?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.core.result import Result
from interp.report import _drawing as drawing
from interp.report.claims import untestable
from interp.tasks.task import Task
from interp.tasks.two_hop import two_hop_facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The three small transformers, in the order in which they are shown.
ONE, BACK, TWO = "1 layer", "1 layer + back attention", "2 layers"
#: A model has learned a task when its held-out accuracy is this.
LEARNED = 0.9


# --- small transformers --------------------------------------------------------------------------------------------


def finals(found: Result) -> pd.DataFrame:
    """Held-out accuracy at the end of training, seed by seed.

    Args:
        found: of `dynamics.depth.compare_depths`.

    Returns:
        A row a model: `parameters`, a column a seed, and `mean`.
    """
    table = found.filter(metric="held-out accuracy").table
    last = table[table["step"] == table["step"].max()]
    wide = last.pivot(index="component", columns="value_seed", values="value").loc[[ONE, BACK, TWO]]
    wide = wide.assign(mean=wide.mean(axis=1))
    wide.columns = [name if name == "mean" else f"seed {name:.0f}" for name in wide.columns]
    wide.insert(0, "parameters", pd.Series(found.meta["n_parameters"]))
    return wide.rename_axis(None)


def draw_curves(found: Mapping[str, Result]) -> Figure:
    """Held-out accuracy over training, a line a seed.

    Args:
        found: {title: Result of `compare_depths`}, a panel each.

    Returns:
        The Figure.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.2), sharey=True, layout="constrained")
    for ax, (title, each) in zip(np.atleast_1d(axes), found.items(), strict=True):
        table = each.filter(metric="held-out accuracy").table
        for colour, model in zip(drawing.COLOURS, (ONE, BACK, TWO), strict=False):
            for index, (_, run) in enumerate(table[table["component"] == model].groupby("value_seed")):
                label = model if index == 0 else None
                ax.plot(run["step"], run["value"], color=colour, lw=1, alpha=0.8, label=label)
        ax.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
    np.atleast_1d(axes)[0].set_ylabel("held-out accuracy (a line a seed)")
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _steps_needed(found: Result, model: str) -> np.ndarray:
    """Steps until a run has learned the task, seed by seed; twice all steps where it never has."""
    table = found.filter(metric="held-out accuracy", component=model).table
    wide = table.pivot(index="step", columns="value_seed", values="value")
    never = 2 * int(table["step"].max())
    return np.array([next((step for step in wide.index if wide[seed][step] >= LEARNED), never) for seed in wide])


def _toy(found: Result, name: str) -> dict[str, Any]:
    """Three claims on one task."""
    seeds = finals(found).drop(columns=["parameters", "mean"])
    one, back, two = (seeds.loc[model].to_numpy(dtype=float) for model in (ONE, BACK, TWO))
    gap = float(two.mean() - one.mean())
    return {
        f"{name}_depth": float(np.median(two - one)),
        f"{name}_gain": float(np.median(back - one)),
        f"{name}_closed": untestable("two layers are no better than one: there is no gap to close")
        if gap <= 0
        else float(back.mean() - one.mean()) / gap,
    }


# --- the frozen model ----------------------------------------------------------------------------------------------


def intervals(found: Result, *, by: str = "entity", value: str = "value_after", seed: int = 0) -> pd.DataFrame:
    """Means with 95% bootstrap intervals over entities or countries, whose prompts are not independent.

    Every entity (country) counts the same: its prompts, and the seeds in which it was held out, are averaged first.

    Args:
        found: of `dynamics.two_hop.two_hop_gain`.
        by: "entity" or "country".
        value: the column.
        seed: of the bootstrap.

    Returns:
        A row for each `component`, `target` (the task) and `metric`: `n` (entities), `mean`, `se`, `low`, `high`.
    """
    # `Result.summary` resamples prompts: here a "prompt" is all that belongs to one entity.
    table = found.table.assign(prompt=found.table[{"entity": "src", "country": "dst"}[by]])
    keys = [key for key in ("component", "target", "metric") if key in table]
    return replace(found, table=table).summary(keys, value=value, seed=seed)


def against(found: Result, other: str) -> Result:
    """Back attention less another variant, prompt by prompt.

    Args:
        found: of `two_hop_gain`.
        other: the variant.

    Returns:
        Its Result for the prompts of back attention: `value_before` is the other variant's `value_after`.
    """
    keys = ["value_seed", "target", "prompt", "metric"]
    sides = [found.filter(component=name).table for name in ("back attention", other)]
    joined = sides[0].merge(sides[1][[*keys, "value_after"]], on=keys, suffixes=("", "_other"), validate="1:1")
    joined = joined.assign(
        component=f"back attention - {other}",
        value_before=joined["value_after_other"],
        value=joined["value_after"] - joined["value_after_other"],
    )
    return replace(found, table=joined.drop(columns="value_after_other"))


def differences(found: Mapping[str, Result], *, task: str = "two_hop") -> pd.DataFrame:
    """How much back attention is ahead of other variants, with 95% intervals over entities and over countries.

    Args:
        found: {variant: Result of `against`}.
        task: name of the task.

    Returns:
        A row for each variant and metric: `difference`, the ends of both intervals.
    """
    parts = []
    for other, each in found.items():
        both = [intervals(each, by=by, value="value") for by in ("entity", "country")]
        both = [table[table["target"] == task] for table in both]
        columns = {"against": other, "metric": both[0]["metric"], "difference": both[0]["mean"]}
        for by, table in zip(("entities", "countries"), both, strict=True):
            columns |= {f"low, {by}": table["low"], f"high, {by}": table["high"]}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts).set_index(["against", "metric"])


def gains(found: Result, task: str = "two_hop") -> pd.DataFrame:
    """Before and after on held-out countries, with intervals over entities.

    Args:
        found: of `two_hop_gain`.
        task: name of the task.

    Returns:
        A row for each metric and variant: `entities`, `before`, `after`, `low`, `high` (of after).
    """
    before, after = (intervals(found, value=value) for value in ("value_before", "value_after"))
    table = after.assign(before=before["mean"])
    table = table[table["target"] == task].rename(columns={"mean": "after", "n": "entities"})
    return table.set_index(["metric", "component"])[["entities", "before", "after", "low", "high"]]


def draw_gains(found: Result, *, metrics: tuple[str, ...] = ("first choice", "among answers")) -> Figure:
    """Accuracy before and after on every task, with 95% intervals over entities.

    Args:
        found: of `two_hop_gain`.
        metrics: a panel each.

    Returns:
        The Figure.
    """
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(found.table["target"]))
    variants = list(dict.fromkeys(found.table["component"]))
    after, before = (intervals(found, value=value) for value in ("value_after", "value_before"))
    figure, axes = plt.subplots(1, len(metrics), figsize=(7.2, 3.2), sharey=True, layout="constrained")
    for ax, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        sets = [("before", before[before["component"] == variants[0]], "#555555")]
        sets += [(name, after[after["component"] == name], drawing.COLOURS[i]) for i, name in enumerate(variants)]
        for offset, (name, table, colour) in enumerate(sets):
            rows = table[table["metric"] == metric].set_index("target").loc[tasks]
            ends = np.abs(rows[["low", "high"]].to_numpy().T - rows["mean"].to_numpy())
            place = np.arange(len(tasks)) + 0.13 * (offset - (len(sets) - 1) / 2)
            ax.errorbar(place, rows["mean"], yerr=ends, fmt="o", ms=3.5, lw=1, color=colour, label=name)
        names = {"two_hop": "two hops", "two_hop_first": "first hop", "two_hop_second": "second hop"}
        ax.set(title=metric, ylim=(-0.03, 1.03))
        ax.set_xticks(range(len(tasks)), [names.get(task, task) for task in tasks])
    np.atleast_1d(axes)[0].set_ylabel("accuracy, held-out countries")
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def same_chains(first: Task, second: Task) -> tuple[Task, Task]:
    """The prompts of two tasks that ask the same, in one order.

    Args:
        first: of `interp.tasks.two_hop`.
        second: another, for example of the other wording.

    Returns:
        Both, cut to the chains that both have.
    """
    facts = [two_hop_facts(task)[["entity", "relation", "prompt"]] for task in (first, second)]
    both = facts[0].merge(facts[1], on=["entity", "relation"], validate="1:1")
    return first[both["prompt_x"].to_numpy()], second[both["prompt_y"].to_numpy()]


def orders(entity_first: Result, relation_first: Result) -> Result:
    """The two wordings side by side, prompt by prompt.

    Args:
        entity_first: of `dynamics.two_hop.two_hop_answers`, on one of the tasks of `same_chains`.
        relation_first: the same on the other.

    Returns:
        A Result with `value_before` (entity first), `value_after` (relation first) and `value`, the difference.
    """
    joined = entity_first.table.assign(
        value_before=entity_first.table["value"],
        value_after=relation_first.table["value"],
        value=relation_first.table["value"] - entity_first.table["value"],
    )
    return replace(entity_first, table=joined)


def orders_table(found: Result) -> pd.DataFrame:
    """Accuracy of the two wordings, and their difference with its interval over entities.

    Args:
        found: of `orders`.

    Returns:
        A row a metric: `entity first`, `relation first`, `difference`, `low`, `high`.
    """
    means = [intervals(found, value=value).set_index("metric") for value in ("value_before", "value_after", "value")]
    table = pd.DataFrame({"entity first": means[0]["mean"], "relation first": means[1]["mean"]})
    return table.assign(difference=means[2]["mean"], low=means[2]["low"], high=means[2]["high"])


# --- the claims ----------------------------------------------------------------------------------------------------


def measured(*, composition: Result, sums: Result, gain: Result, order: Result) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/back_attention/claims.csv`.

    Args:
        composition: `compare_depths("function_composition")`.
        sums: `compare_depths("double_sum")`.
        gain: `two_hop_gain`, all variants, with both single hops.
        order: `orders`.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    counts = composition.meta["n_parameters"]
    before = _mean(intervals(gain, value="value_before"), "first choice")
    singles = intervals(gain, value="value").query("component == 'back attention' and metric == 'among answers'")
    low = {other: _low(intervals(against(gain, other), value="value")) for other in _CONTROLS}
    first = _mean(intervals(gain), "first choice") / before - 1 if before else None
    return {
        **_toy(composition, "composition"),
        **_toy(sums, "sum"),
        "faster": float(np.median(_steps_needed(composition, BACK) / _steps_needed(composition, TWO))),
        "parameters": counts[BACK] / counts[TWO],
        "frozen_first": untestable("no answer was a first choice before: no ratio") if first is None else first,
        "frozen_answers": _low(intervals(gain, value="value")),
        "over_plain": low["plain attention"],
        "over_shuffled": low["shuffled answers"],
        "singles_unharmed": float(singles[singles["target"] != "two_hop"]["mean"].min()),
        "order": float(orders_table(order).loc["among answers", "low"]),
        "layer_sweep": untestable(
            "not run: each layer needs its own training, and the paper's is of a model of 32 layers"
        ),
        "benchmarks": untestable("needs the paper's language models, which no package ships"),
    }


_CONTROLS = ("plain attention", "shuffled answers")


def _row(table: pd.DataFrame, metric: str) -> pd.Series:
    chosen = table[table["component"].str.startswith("back attention") & (table["metric"] == metric)]
    return chosen[chosen["target"] == "two_hop"].iloc[0]


def _mean(table: pd.DataFrame, metric: str) -> float:
    return float(_row(table, metric)["mean"])


def _low(table: pd.DataFrame, metric: str = "among answers") -> float:
    return float(_row(table, metric)["low"])
