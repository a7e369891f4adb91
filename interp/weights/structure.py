"""How are relations spread over heads? Which heads implement which, across models, and within key-value groups.

Read from the scores of `maps.relation_scores` alone (arXiv 2412.11965, its sections on many-relation heads,
universality and grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from interp.core.registry import method
from interp.core.result import Result
from interp.weights.maps import PAPER, PROMOTES, SUPPRESSES

#: The paper's threshold: a head implements a relation from this score on.
THRESHOLD = 0.15


@method(name="MAPS: heads that implement a relation", paper=PAPER, notebook="maps")
def implementing(scores: Result, *, threshold: float = THRESHOLD) -> Result:
    """Which heads promote or suppress which relation, by a threshold on their score.

    Args:
        scores: what `maps.relation_scores` returned.
        threshold: smallest score that counts; the paper's is 0.15.

    Returns:
        Result, unit "share of pairs", the rows of `scores` with a `value` of at least the threshold, strongest first,
        with `value_depth`, the layer over the last layer's number (0 for a model of one layer).

    Raises:
        ValueError: a threshold that is not above 0.

    Cost: none.

    Differs from the paper: none known; its published code has no threshold and counts every score above 0.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"target": "capital", "layer": [0, 1], "head": 0, "metric": "promotes",
        ...     "value": [0.1, 0.2]})
        >>> scores = Result("maps.relation_scores", table, "share of pairs", meta={"n_layers": 2, "n_heads": 1})
        >>> implementing(scores).table[["layer", "value", "value_depth"]].values.tolist()
        [[1.0, 0.2, 1.0]]
    """
    _require(threshold)
    table = scores.table[scores.table["value"] >= threshold]
    table = table.iloc[np.argsort(-table["value"].to_numpy(), kind="stable")].reset_index(drop=True)
    table["value_depth"] = table["layer"] / max(1, scores.meta["n_layers"] - 1)
    return Result("structure.implementing", table, scores.unit, meta={**scores.meta, "threshold": threshold})


@method(name="MAPS: relations per head", paper=PAPER, notebook="maps")
def per_head(scores: Result, *, threshold: float = THRESHOLD) -> Result:
    """How many relations each head promotes and suppresses, and which one most.

    Args:
        scores: what `maps.relation_scores` returned.
        threshold: smallest score that counts.

    Returns:
        Result, unit "relations", a row for each `layer`, `head` and `metric` ("promotes", "suppresses"): `value` is the
        number of relations, `target` the one with the highest score (empty where none counts) and `value_strongest`
        that score.

    Raises:
        ValueError: a threshold that is not above 0.

    Cost: none.
    """
    _require(threshold)
    rows = []
    for (layer, head, metric), own in scores.table.groupby(["layer", "head", "metric"], sort=True):
        strongest = own.loc[own["value"].idxmax()]
        n = int((own["value"] >= threshold).sum())
        rows.append({
            "layer": layer, "head": head, "metric": metric, "target": strongest["target"] if n else "", "value": n,
            "value_strongest": strongest["value"],
        })  # fmt: skip
    meta = {**scores.meta, "threshold": threshold}
    return Result("structure.per_head", pd.DataFrame(rows), "relations", meta=meta)


@method(name="MAPS: universality", paper=PAPER, notebook="maps")
def universality(scores: Mapping[str, Result], *, threshold: float = THRESHOLD) -> Result:
    """Which relations are implemented in which models, by how many heads, and how deep.

    Args:
        scores: {a name for each model: what `maps.relation_scores` returned for it}.
        threshold: smallest score that counts.

    Returns:
        Result, unit "share of heads", a row for each relation (`target`) that all models were asked about, model
        (`component`) and `metric`: `value` is the share of the model's heads that implement it, `value_strongest` the
        highest score, `value_heads` the number of heads, `value_depth` their median relative depth (NaN without any),
        `value_models` the share of the models with any.

    Raises:
        ValueError: no relation in common, or a threshold that is not above 0.

    Cost: none.
    """
    _require(threshold)
    asked = [set(each.table["target"]) for each in scores.values()]
    common = sorted(set.intersection(*asked)) if asked else []
    if not common:
        raise ValueError(
            f"the scores of {', '.join(scores) or 'no models'} have no relation in common: ask each model about the "
            "same ones, relations(model, names=[...])."
        )
    rows = []
    for relation in common:
        for metric in (PROMOTES, SUPPRESSES):
            found = []
            for name, each in scores.items():
                own = each.table[(each.table["target"] == relation) & (each.table["metric"] == metric)]
                strong = own[own["value"] >= threshold]
                depth = float((strong["layer"] / max(1, each.meta["n_layers"] - 1)).median())
                found.append({
                    "target": relation, "component": name, "metric": metric, "value": len(strong) / len(own),
                    "value_strongest": float(own["value"].max()), "value_heads": len(strong), "value_depth": depth,
                })  # fmt: skip
            share = float(np.mean([row["value_heads"] > 0 for row in found]))
            rows += [{**row, "value_models": share} for row in found]
    models = {name: each.meta.get("model_fingerprint", "") for name, each in scores.items()}
    meta = {"threshold": threshold, "models": models}
    return Result("structure.universality", pd.DataFrame(rows), "share of heads", meta=meta)


@method(name="MAPS: key-value groups", paper=PAPER, notebook="maps")
def groups(scores: Result, *, threshold: float = THRESHOLD, n_permutations: int = 1000, seed: int = 0) -> Result:
    """Whether query heads that share keys and values share relations, with the same or with the opposite sign.

    Counted over all pairs of different heads of one key-value group and all relations: "same sign", both promote or
    both suppress the relation (a pair that does both counts twice); "opposite sign", one promotes and the other
    suppresses it. The null permutes the heads within each layer, with all their scores, so that what is
    left is chance among heads of one layer. "profile" is the mean absolute correlation, between the heads of a pair, of
    their signed profiles (promotion minus suppression, over relations), over pairs of which both heads have any
    score of at least the threshold.

    Args:
        scores: what `maps.relation_scores` returned for a model with grouped-query attention.
        threshold: smallest score that counts.
        n_permutations: of the null.
        seed: of the null.

    Returns:
        Result, unit "pairs of heads and relations", a row for each `metric`: "same sign", "opposite sign", "profile"
        (whose values are correlations); `value` is what was observed, `value_null` and `value_null_sd` mean and
        standard deviation under the null, `value_z` the difference in those, `value_p` the one-sided share of the
        permutations with as much, the observed one included. NaN for a profile without pairs.

    Raises:
        ValueError: a model whose heads each have their own keys and values, one relation only, a bad threshold.

    Cost: none to speak of; n_permutations passes over the scores.
    """
    _require(threshold)
    n_heads, n_groups = scores.meta["n_heads"], scores.meta["n_key_value_heads"]
    if n_groups == n_heads:
        raise ValueError(
            f"{scores.meta.get('model', 'this model')} has keys and values of its own for each of its {n_heads} heads: "
            "groups are a question about a model with fewer, such as SmolLM2 or Llama 3."
        )
    promotes, suppresses = (_cube(scores.table, metric) for metric in (PROMOTES, SUPPRESSES))  # [relation layer head]
    if len(promotes) < 2:
        raise ValueError("groups: profiles need at least two relations; score more of them.")
    strong = np.stack([promotes >= threshold, suppresses >= threshold]).astype(np.float64)
    profile = _standardised(promotes - suppresses, strong.any((0, 1)))
    group = np.arange(n_heads) // (n_heads // n_groups)
    mates = np.triu(group[:, None] == group[None, :], 1)
    order = np.tile(np.arange(n_heads), (promotes.shape[1], 1))
    same = np.einsum("srlh,srlg->lhg", strong, strong)
    opposite = np.einsum("rlh,rlg->lhg", strong[0], strong[1])
    opposite = opposite + opposite.transpose(0, 2, 1)
    alike = np.abs(np.einsum("rlh,rlg->lhg", profile, profile))
    active = np.abs(profile).sum(0) > 0
    both = (active[:, :, None] & active[:, None, :]).astype(np.float64)

    def measured(order: np.ndarray) -> tuple[float, float, float]:
        layer = np.arange(len(order))[:, None, None]
        at = (layer, order[:, :, None], order[:, None, :])
        pairs = (both[at] * mates).sum()
        correlation = (alike[at] * both[at] * mates).sum() / pairs if pairs else float("nan")
        return float((same[at] * mates).sum()), float((opposite[at] * mates).sum()), float(correlation)

    rng = np.random.default_rng(seed)
    observed = np.array(measured(order))
    null = np.array([measured(rng.permuted(order, axis=1)) for _ in range(n_permutations)])
    sd = null.std(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (observed - null.mean(0)) / sd
    # Sums in another order differ in the last bits.
    share = (1 + (null >= observed - 1e-9).sum(0)) / (1 + n_permutations)
    share = np.where(np.isnan(observed), np.nan, share)
    table = pd.DataFrame({
        "metric": ["same sign", "opposite sign", "profile"], "value": observed, "value_null": null.mean(0),
        "value_null_sd": sd, "value_z": np.where(sd > 0, z, np.nan), "value_p": share,
    })  # fmt: skip
    meta = {**scores.meta, "threshold": threshold, "n_permutations": n_permutations, "seed": seed}
    return Result("structure.groups", table, "pairs of heads and relations", meta=meta)


def _cube(table: pd.DataFrame, metric: str) -> np.ndarray:
    """Scores `[relation layer head]`, in sorted order of each."""
    own = table[table["metric"] == metric]
    wide = own.pivot_table(index="target", columns=["layer", "head"], values="value").sort_index(axis=1)
    n_layers = wide.columns.get_level_values("layer").nunique()
    return wide.to_numpy().reshape(len(wide), n_layers, -1)


def _standardised(profile: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Profiles whose products over relations are correlations; zeros for heads that are not active or constant."""
    centred = profile - profile.mean(0)
    size = np.linalg.norm(centred, axis=0)
    keep = active & (size > 0)
    return np.where(keep, centred / np.where(keep, size, 1.0), 0.0)


def _require(threshold: float) -> None:
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: every head has a score of at least 0; give a number above, 0.15.")
