"""Which numbers do the claims of *Massive Activations in Large Language Models* (arXiv 2402.17762) ask for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.activations.implicit_bias import agreement
from interp.activations.massive import constancy, first_layer
from interp.core.places import shipped
from interp.core.result import Result
from interp.report.claims import untestable


def measured(
    *, detected: Result, losses: Result, accuracies: Sequence[Result], decomposed: Result, arms: Result
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/massive_activations/claims.csv`.

    Args:
        detected: `massive.detect` on the evaluation text.
        losses: `massive_intervention.intervene` on it.
        accuracies: `massive_intervention.intervene` on tasks with answers.
        decomposed: `implicit_bias.decompose` on the evaluation text.
        arms: `attention_bias.train_arms`.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    return {
        **_where(detected),
        **_interventions(losses, accuracies),
        **_attention(detected, decomposed),
        **_arms(arms),
        "published_dimensions": _published(detected),
        "vision": untestable(
            "needs a pretrained DINOv2 with registers, which no package ships: "
            "load it from the hub and run massive.detect on images"
        ),
    }


def perplexities(losses: Result) -> pd.DataFrame:
    """Perplexity of each intervention: the exponential of the mean loss.

    Args:
        losses: `massive_intervention.intervene` on text.

    Returns:
        One row per intervention and metric: `n`, `perplexity`, and its 95% interval `low`, `high`.
    """
    table = losses.summary(["component", "metric"])
    table["perplexity"], table["low"], table["high"] = (np.exp(table[column]) for column in ("mean", "low", "high"))
    return table[["component", "metric", "n", "perplexity", "low", "high"]]


def _where(detected: Result) -> dict[str, float]:
    table, profile = detected.table, detected.arrays["profile"][1].astype(float)
    largest, median = profile[..., 0], profile[..., 3]
    first = first_layer(detected)
    last = int(table["layer"].max())
    counts = table.groupby(["layer", "prompt"]).size().groupby("layer").sum() / detected.meta["n_prompts"]
    dimensions = table["feature"].value_counts(normalize=True)
    at_first = table[table["component"] == "first token"]
    stable = constancy(detected).filter(component="first token", layer=first).table
    plateau = largest[:, first : last + 1]
    return {
        "exist": float((largest / median).max(1).mean()),
        "few": float(counts.max()),
        "fixed_dimensions": float(dimensions.head(2).sum()),
        "tokens": float((table["component"] != "other token").mean()),
        "every_prompt": at_first["prompt"].nunique() / detected.meta["n_prompts"],
        "emerge": float(np.median(largest[:, first] / largest[:, max(first - 1, 0)])),
        "stay": float(np.median(plateau.max(1) / plateau.min(1))),
        "vanish": float(np.median(largest[:, -1] / largest.max(1))),
        "constant": float(stable.loc[stable["value_mean"].abs().idxmax(), "value"]),
    }


def _interventions(losses: Result, accuracies: Sequence[Result]) -> dict[str, float]:
    loss = losses.filter(metric="loss").summary(["component"]).set_index("component")["mean"]
    right = pd.concat(
        [r.filter(metric="answer first").summary(["component"]).set_index("component")["mean"] for r in accuracies],
        axis=1,
    )
    mean = right.mean(axis=1)
    return {
        "zero_perplexity": float(np.exp(loss["set to zero"] - loss["unchanged"])),
        "mean_perplexity": float(np.exp(loss["set to mean"] - loss["unchanged"])),
        "zero_accuracy": float(mean["unchanged"] - mean["set to zero"]),
        "mean_accuracy": float(abs(mean["unchanged"] - mean["set to mean"])),
    }


def _attention(detected: Result, decomposed: Result) -> dict[str, float]:
    first = first_layer(detected)
    later = range(first + 1, int(detected.meta["n_layers"]))

    def mean(metric: str, layers: range) -> float:
        return float(decomposed.filter(metric=metric, layer=layers).table["value"].mean())

    share = "attention on massive tokens"
    return {
        "attention": mean(share, later),
        "attention_after": mean(share, later) / mean(share, range(first + 1)),
        "bias": float(agreement(decomposed).filter(layer=later).table["value"].mean()),
        "bias_queries": mean("variation of bias over queries", later) / mean("variation of rest over queries", later),
    }


def _arms(arms: Result) -> dict[str, Any]:
    end = arms.filter(step=int(arms.table["step"].max())).table
    loss = end[end["metric"] == "validation loss"].groupby("component")["value"].mean()
    entries = end[end["metric"] == "massive entries"].groupby("component")["value"].sum()
    none = untestable(
        "no massive activations in the default arm at this size, so there is nothing for a bias to remove"
    )
    return {
        "arms_loss": float(loss.max() - loss.min()),
        "arms_default": float(entries["default"]),
        "arms_bias": float(entries["attn_bias"]) if entries["default"] > 0 else none,
    }


def _published(detected: Result) -> Any:
    table = pd.read_csv(shipped("data") / "papers" / "massive_activations" / "published.csv", comment="#")
    wanted = table.loc[table["model"] == detected.meta["model"], "dimension"]
    if wanted.empty:
        return untestable(f"no dimensions are published for {detected.meta['model']}")
    return float(wanted.isin(detected.table["feature"]).mean())
