"""Which numbers do the claims of *Inferring Functionality of Attention Heads* (MAPS, arXiv 2412.11965) ask for?"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from interp.core.result import Result
from interp.report.claims import untestable
from interp.weights.causal import OWN, RANDOM
from interp.weights.dynamic import POOLED, WITH, WITHOUT
from interp.weights.maps import PROMOTES, SUPPRESSES
from interp.weights.structure import THRESHOLD

#: The paper's relations, by the names that they have here; those that a tokenizer has too few pairs of are left out.
RELATIONS = (
    "copying", "name_copying", "first_letter", "last_letter", "country_capital", "country_language",
    "object_superclass", "product_company", "occupation_workplace", "antonym", "comparative", "superlative",
    "noun_pronoun", "past_tense", "synonym", "homophone", "compound",
)  # fmt: skip

# The r without context from which a relation's static scores are said to track: that of 16 of GPT-2 XL's 18.
_TRACKS = 0.79


def measured(
    *, static: Result, raw: Result, agreement: Result, several: Result, link: Result, groups: Result | None
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/maps/claims.csv`.

    Args:
        static: `maps.relation_scores`, of all layers.
        raw: the same with embedding="raw".
        agreement: `dynamic.correlation` of `static`.
        several: `dynamic.correlation` of `static` with scores of `multi_token` sources.
        link: `causal.link`.
        groups: `structure.groups` of `static`; None for a model whose heads have keys and values of their own.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    best = static.table.groupby(["metric", "target"])["value"].max()
    promoted, suppressed = best[PROMOTES], best[SUPPRESSES]
    implemented, hindered = promoted.index[promoted >= THRESHOLD], suppressed.index[suppressed >= THRESHOLD]
    r = _r(agreement, PROMOTES)
    both = r.dropna()
    accuracy = link.table.pivot(index="target", columns="metric", values="value")
    lost = 1 - accuracy["without random heads"] / accuracy["all heads"]
    controls = (1 - accuracy["controls, without its heads"] / accuracy["controls, all heads"]).dropna()
    below = link.table[link.table["metric"] == "difference"].set_index("target")["value_low"]
    heads = static.table[(static.table["metric"] == PROMOTES) & (static.table["value"] >= THRESHOLD)]
    per_head = heads.groupby(["layer", "head"]).size()
    depth = per_head.index.get_level_values("layer") / max(1, static.meta["n_layers"] - 1)
    z = {} if groups is None else groups.table.set_index("metric")["value_z"].dropna().to_dict()
    apart = "heads of this model have keys and values of their own" if groups is None else "permuted heads do not vary"
    simple = raw.table[raw.table["metric"] == PROMOTES].groupby("target")["value"].max()
    return {
        "static_dynamic": _tracking(r[WITHOUT], implemented),
        "context_lowers": float((both[WITH] < both[WITHOUT]).mean()) if len(both) else untestable(_NONE),
        "weak_relations": _rising(promoted, r[WITHOUT].dropna()),
        "suppression_tracks": _tracking(_r(agreement, SUPPRESSES)[WITHOUT], hindered),
        "suppression": len(hindered) / len(suppressed),
        "multi_token": _tracking(_r(several, PROMOTES)[WITHOUT], implemented),
        "destroyed": float((accuracy["without its heads"] <= accuracy["all heads"] / 2).mean()),
        "beats_random": float((below > 0).mean()),
        "random_harmless": float(lost.mean()),
        "controls": float(controls.mean()) if len(controls) else untestable("no relation has a control"),
        "groups_same": z.get("same sign", untestable(apart)),
        "groups_opposite": z.get("opposite sign", untestable(apart)),
        "universality": len(implemented) / len(promoted),
        "many_relations": float((per_head >= 2).mean()) if len(per_head) else untestable(_NONE),
        "depth": float(pd.Series(depth).median()) if len(per_head) else untestable(_NONE),
        "embedding": float((promoted > simple[promoted.index]).mean()),
        "descriptions": untestable("needs a language model that describes; weights.describe writes the prompt for one"),
        "same_heads": untestable("needs GPT-2 XL, which no package ships: run this notebook with model='gpt2-xl'"),
        "pair_counts": untestable("the pairs of words are our own, and the tokenizer is another"),
    }


_NONE = "no head has a relation by the threshold, or scores are the same for all heads"


def _r(agreement: Result, metric: str) -> pd.DataFrame:
    """Correlations of the templates together: a row a relation, a column with and one without context."""
    rows = agreement.filter(metric=metric, component=POOLED).table
    return rows.pivot(index="target", columns="src", values="value")


def _tracking(r: pd.Series, names: pd.Index) -> Any:
    """Share of some relations whose correlation is high; one that cannot be computed is not."""
    own = r[r.index.intersection(names)]
    return float((own >= _TRACKS).mean()) if len(own) else untestable(_NONE)


def _rising(best: pd.Series, r: pd.Series) -> Any:
    rises = float(spearmanr(best[r.index], r).statistic) if len(r) > 2 else float("nan")
    return untestable("needs three relations of different scores") if pd.isna(rises) else rises


def strongest(static: Result, raw: Result) -> pd.DataFrame:
    """The highest score of a head for each relation, through the first MLP and from the embedding.

    Args:
        static: `maps.relation_scores`.
        raw: the same with embedding="raw".

    Returns:
        A row a relation, the strongest last, as a bar chart from below shows it.
    """
    best = {
        name: result.filter(metric=PROMOTES).table.groupby("target")["value"].max()
        for name, result in (("through the first MLP", static), ("as embedded", raw))
    }
    return pd.DataFrame(best).rename_axis("relation").sort_values("through the first MLP")


def correlations(agreement: Result) -> pd.DataFrame:
    """Pearson's r of the promoting scores, all templates together, with its interval and the highest static score.

    Args:
        agreement: `dynamic.correlation`.

    Returns:
        A row a relation, those that some head implements best first.
    """
    rows = agreement.filter(metric=PROMOTES, component=POOLED).table
    wide = rows.pivot(index="target", columns="src", values=["value", "value_low", "value_high"])
    wide = wide.reorder_levels([1, 0], axis=1)[[WITHOUT, WITH]]
    wide["", "value_max"] = rows.groupby("target")["value_max"].first()
    return wide.sort_values(("", "value_max"), ascending=False).round(2)


def losses(link: Result) -> pd.DataFrame:
    """Accuracies with all heads, without a relation's, without random ones, and those of the controls.

    Args:
        link: `causal.link`.

    Returns:
        A row a relation, with how many heads were removed and the interval of the difference.
    """
    table = link.table
    wide = table.pivot(index="target", columns="metric", values="value")
    rows = table[table["metric"] == "difference"].set_index("target")
    wide.insert(0, "heads", rows["step"])
    return wide.assign(difference_low=rows["value_low"], difference_high=rows["value_high"]).round(2)


def strong_heads(static: Result, n: int) -> list[tuple[int, int]]:
    """The heads with the highest promoting scores, each once.

    Args:
        static: `maps.relation_scores`.
        n: how many.

    Returns:
        (layer, head), the strongest first.
    """
    best = static.filter(metric=PROMOTES).table.groupby(["layer", "head"])["value"].max()
    return [(int(layer), int(head)) for layer, head in best.nlargest(n).index]


def patterns(described: Result) -> pd.DataFrame:
    """How many heads have more mappings of a simple kind than shuffled ones do.

    Args:
        described: `describe.descriptors`.

    Returns:
        A row a descriptor: mean share of mappings, its control, and the share of heads with p <= 0.05.
    """
    by_kind = described.table.groupby("metric")
    return pd.DataFrame({
        "mean share": by_kind["value"].mean(), "by chance": by_kind["value_control"].mean(),
        "heads with p <= 0.05": by_kind["value_p"].apply(lambda p: (p <= 0.05).mean()),
    }).sort_values("mean share", ascending=False).round(3)  # fmt: skip


def draw_curves(curves: Result) -> Figure:
    """Accuracy by the number of heads removed: a relation's own beside random ones, a panel a relation.

    Args:
        curves: `causal.ablation_curves`.

    Returns:
        The figure.
    """
    table = curves.table[curves.table["src"] == curves.table["target"]]
    names = list(dict.fromkeys(table["target"]))
    n_rows = -(-len(names) // 4)
    figure, axes = plt.subplots(
        n_rows, 4, figsize=(7, 1.5 * n_rows + 0.4), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names, strict=False):
        own = table[table["target"] == name]
        start = own[own["step"] == 0]
        for component in (OWN, RANDOM):
            part = pd.concat([start, own[(own["component"] == component) & (own["step"] > 0)]])
            part.groupby("step")["value"].mean().plot(ax=ax, marker=".", markersize=3, linewidth=1, label=component)
        ax.set_title(name, fontsize="small")
        ax.set(xlabel="", ylim=(-0.03, 1.03))
    figure.supxlabel("heads removed, by static score", fontsize="small")
    figure.supylabel("accuracy", fontsize="small")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize="x-small")
    return figure
