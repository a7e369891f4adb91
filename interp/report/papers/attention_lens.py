"""Which numbers do the claims of *Attention Lens* (arXiv 2310.16270) ask for?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from interp.core.readout import Readout
from interp.core.result import Result
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.lenses.contrast import contrast
from interp.models.model import Model
from interp.patching import activation
from interp.report import plots
from interp.report.claims import untestable
from interp.tasks.injection import Injections
from interp.tasks.occupations import Occupations
from interp.tasks.task import Task

#: Tokens whose joint and separate read-outs are compared.
_TOKENS = 64
#: English words of four letters or more that carry grammar rather than content.
_FUNCTION_WORDS = frozenset(
    """about above across after again against almost along already also although always among another anything around
    because been before behind being below beside between both cannot could does doing done down during each either else
    even ever every from have having hence here hers herself himself however into itself just less like made make many
    might more most much must myself neither never nevertheless next nothing once only onto other others otherwise ours
    over perhaps quite rather same several shall should since some something still such than that their theirs them
    themselves then there therefore these they thing this those though through throughout thus together toward towards
    under unless until upon very were what whatever when where whereas whether which while whom whose will with within
    without would your yours yourself""".split()  # noqa: SIM905
)


@torch.no_grad()
def joint_error(model: Model, lens: AttentionLens, cached: Cached) -> float:
    """How far the sum of the heads' read-outs is from one linear map of all that the heads of a layer hold.

    Args:
        model: the lens's.
        lens: of form "low_rank".
        cached: activations of site "z".

    Returns:
        The largest difference over layers, tokens and vocabulary, as a share of the largest logit of its layer.
    """
    errors = []
    for layer in lens.layers:
        z = cached.activation(layer, slice(0, _TOKENS))
        apart = lens.logits(model, layer, z, scale=cached.scale[:_TOKENS].to(z.device)).sum(1)
        joint = z.flatten(1) @ lens.maps[layer].flatten(0, 1) @ model.bridge.W_U.to(z)
        errors.append(float((apart - joint).abs().max() / joint.abs().max()))
    return max(errors)


def by_layer(shares: Result) -> Axes:
    """What each reading of a whole layer explains, over the layers.

    Args:
        shares: of `evaluation.shares`.

    Returns:
        The axes.
    """
    rows = shares.table[shares.table["head"].isna() & shares.table["layer"].notna()]
    return plots.lines(replace(shares, table=rows.reset_index(drop=True)), x="layer", group="component")


def strongest_heads(shares: Result, n: int) -> list[tuple[int, int]]:
    """The heads whose independent lenses explain most.

    Args:
        shares: of `evaluation.shares`.
        n: how many.

    Returns:
        (layer, head), the strongest first.
    """
    rows = shares.table[shares.table["head"].notna() & (shares.table["component"] == "independent")]
    best = rows.nlargest(n, "value")
    return [(int(layer), int(head)) for layer, head in zip(best["layer"], best["head"], strict=True)]


def together(*shares: Result) -> Result:
    """Explained shares of several calls in one table.

    Args:
        shares: of `evaluation.shares`, of the same texts.

    Returns:
        The first, with the rows of all; those that stand in several, once.
    """
    table = pd.concat([each.table for each in shares], ignore_index=True)
    return replace(shares[0], table=table.drop_duplicates(["layer", "head", "component"], ignore_index=True))


def content_words(found: Result) -> pd.Series:
    """How many of the tokens that a lens shows are content words.

    A content word is a whole word (a space before it) of four letters or more that is no function word.

    Args:
        found: of `reading.top_tokens`.

    Returns:
        For each lens its share among the tokens that heads promote.
    """
    rows = found.table[(found.table["metric"] == "promotes") & (found.table["head"] >= 0)]
    shown = rows["token"].str
    text = shown.strip().str.lower()
    is_word = (shown[:1] == " ") & text.str.isalpha() & (text.str.len() >= 4) & ~text.isin(_FUNCTION_WORDS)
    return is_word.groupby(rows["component"].astype(str), sort=False).mean()


def side_by_side(*read: Result) -> pd.DataFrame:
    """Lenses of the stream beside each other, layer by layer.

    Args:
        read: of `logit_lens` and `tuned_lens`, at one position of one prompt.

    Returns:
        Layers down that all have; for each lens its top token and its KL divergence from the output (nats).
    """
    table = pd.concat([each.table for each in read], ignore_index=True)
    shown = table.rename(columns={"token": "top token"}).assign(**{"KL (nats)": table["value_forward_kl"].round(2)})
    wide = shown.pivot(index="layer", columns="component", values=["top token", "KL (nats)"])
    return wide.swaplevel(axis=1).sort_index(axis=1).dropna()


def leaning(model: Model, lens: AttentionLens, prompts: Occupations) -> Result:
    """Through a lens, which heads expect other occupations of a woman than of a man?

    Args:
        model: the lens's.
        lens: additive or direct, whose read-outs are contributions.
        prompts: of `tasks.occupations`.

    Returns:
        Result, one row a pair, layer and head: `prompt layer head value`: the head's mean logit of the occupations
        expected of women less that of those expected of men, after the woman less after the man.
    """
    women = contrast(model, lens, prompts.task, prompts.women, prompts.men)
    men = contrast(model, lens, _alone(prompts.task, _other(prompts.task)), prompts.women, prompts.men)
    table = women.table.assign(value=women.table["value"] - men.table["value"])
    return Result("attention_lens.leaning", table, "logits", meta=women.meta)


def lost_lean(model: Model, prompts: Occupations, *, layers: list[int]) -> Result:
    """How much of the model's own lean goes when a head is set to its mean.

    Args:
        model: a decoder.
        prompts: of `tasks.occupations`.
        layers: whose heads.

    Returns:
        Result, one row a pair, layer and head: `prompt layer head value`, in logits; positive where the head carries
        the lean.
    """
    words = torch.cat([prompts.women, prompts.men])
    n = len(prompts.women)

    def score(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return logits[:, :n].mean(1) - logits[:, n:].mean(1)

    both = _alone(prompts.task, torch.cat([prompts.task.clean, _other(prompts.task)]))

    def without(tokens: torch.Tensor) -> Result:
        task = _alone(prompts.task, tokens)
        read = Readout("lean", "logits", task.positions["end"], words.expand(len(task), -1), score)
        return activation.patch(
            model, task, layers=layers, positions="end", direction="noising", source="mean", metric=read,
            reference=both,
        )  # fmt: skip

    women, men = without(prompts.task.clean), without(_other(prompts.task))
    table = women.table[["prompt", "layer", "head"]].copy()
    table["value"] = women.table["value"] - men.table["value"]
    return Result("attention_lens.lost_lean", table, "logits", meta=women.meta)


def injected_logits(model: Model, lens: AttentionLens, prompts: Injections) -> dict[str, Result]:
    """Through a lens, what each head says of the injected word at the end of the prompt.

    Args:
        model: the lens's.
        lens: additive or direct.
        prompts: of `tasks.injections`.

    Returns:
        {"plain", "injected", "mentioned": Result of `contrast`}: the word's logit less the mean over the vocabulary.
    """
    return {
        name: contrast(model, lens, task, task.answers[:, None])
        for name, task in prompts._asdict().items()
    }  # fmt: skip


def injection_curves(found: dict[str, Result]) -> pd.DataFrame:
    """How well one head tells injected prompts from others: chosen on the even prompts, measured on the odd ones.

    Args:
        found: of `injected_logits`.

    Returns:
        A row for each kind of other prompt ("plain", "mentioned"): the head chosen by "plain" on the even prompts, and
        the area under its curve on them and on the odd ones.
    """
    values = {name: each.arrays["value"][1] for name, each in found.items()}
    first = found["plain"].table["layer"].drop_duplicates().tolist()
    areas = _areas(values["injected"][::2], values["plain"][::2])
    layer, head = (int(i) for i in np.unravel_index(int(areas.argmax()), areas.shape))
    rows = []
    for name in ("plain", "mentioned"):
        chosen, held_out = (
            float(_areas(values["injected"][part], values[name][part])[layer, head])
            for part in (slice(0, None, 2), slice(1, None, 2))
        )
        rows.append({
            "against": name, "layer": first[layer], "head": head, "chosen on": chosen, "held out": held_out,
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("against")


def bias_head(found: Result) -> dict[str, Any]:
    """One head that leans as the stereotype expects: chosen on the even pairs, measured on the odd ones.

    Args:
        found: of `leaning`.

    Returns:
        {"layer", "head", "share"}: the head with the largest mean over its standard deviation on the even pairs, and
        the share of the odd pairs in which it leans to the expected occupations.
    """
    wide = found.table.pivot_table(index="prompt", columns=["layer", "head"], values="value")
    even, odd = wide.iloc[::2], wide.iloc[1::2]
    layer, head = (even.mean() / even.std()).idxmax()
    return {"layer": int(layer), "head": int(head), "share": float((odd[(layer, head)] > 0).mean())}


def compared_heads(*found: Result) -> pd.DataFrame:
    """Results side by side, mean over prompts of each head.

    Args:
        found: with one value a prompt, layer and head.

    Returns:
        A row a head, a column a Result.
    """
    means = [each.table.groupby(["layer", "head"])["value"].mean() for each in found]
    return pd.concat(means, axis=1, keys=range(len(means)), join="inner")


def measured(
    *,
    joint: float,
    explained: Result,
    audited: Result,
    overlap: Result,
    seeds: Result,
    special: Result,
    tokens: Result,
    faithful: Result,
    steered: Result,
    ends: Result,
    leaning: Result,
    lost: Result,
    injected: dict[str, Result],
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/attention_lens/claims.csv`.

    Args:
        joint: of `joint_error`.
        explained: `evaluation.shares` of the lenses "additive", "independent", "direct" and "tuned".
        audited: `evaluation.shares` of `controls.controls` of the independent lenses.
        overlap: `stability.overlap` of independent lenses.
        seeds: `evaluation.explained` of several draws of the additive lenses.
        special: `specialisation.scores` of the independent lenses.
        tokens: `reading.top_tokens` of the lenses "independent" and "direct".
        faithful: `faithfulness.ablation` of the lenses "additive", "independent" and "direct".
        steered: `steering.steer` of the additive lenses.
        ends: `controls.position_audit`.
        leaning: of `leaning`.
        lost: of `lost_lean`.
        injected: of `injected_logits`.

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    whole = explained.table[explained.table["head"].isna()].pivot_table(
        index="layer", columns="component", values="value"
    )
    heads = explained.table[(explained.table["component"] == "independent") & explained.table["head"].notna()]
    compared = whole[["additive", "direct", "tuned"]].dropna()
    best_head = heads.groupby("layer")["value"].max()
    both = whole["additive"].reindex(best_head.index)
    control = audited.table[audited.table["head"].notna()].groupby("component")["value"]
    draws = seeds.table[seeds.table["component"] == "additive"].groupby(["layer", "value_draw"])
    kl = draws.apply(lambda rows: float(np.average(rows["value"], weights=rows["value_tokens"])), include_groups=False)
    kl = kl.unstack()
    information = special.table[special.table["metric"] == "information"]
    divergence = special.table[special.table["metric"] == "divergence"]
    n_heads = heads["head"].nunique()
    words = content_words(tokens)
    rank = faithful.table[(faithful.table["metric"] == "spearman") & (faithful.table["target"] == "total")]
    by_head = rank.pivot_table(index=["layer", "head"], columns="component", values="value")
    raised = steered.table[steered.table["metric"] == "logit"]
    above = (raised["value"] > raised["value_random_high"]).groupby([raised["layer"], raised["head"], raised["token"]])
    level = ends.table.groupby("component")[["value", "value_tokens"]].apply(
        lambda rows: float(np.average(rows["value"], weights=rows["value_tokens"]))
    )
    lean = compared_heads(leaning, lost)
    curves = injection_curves(injected)["held out"]
    return {
        "one_map": joint,
        "sum_predicts": float(whole["additive"].median()),
        "beats_direct": float((compared["additive"] > compared["direct"]).mean()),
        "below_tuned": float((compared["tuned"] > compared["additive"]).mean()),
        "sum_over_head": float((both > best_head).mean()),
        "one_head": float(heads["value"].median()),
        "shuffled": float(control.get_group("shuffled").max()),
        "own_lens": float(control.get_group("another head").mean() / control.get_group("own").mean()),
        "stable": float(overlap.table["value"].mean()),
        "convex": float(((kl.max(axis=1) - kl.min(axis=1)) / kl.mean(axis=1)).max()),
        "specialised": float(((information["value"] - information["value_null"]) / math.log(n_heads)).median()),
        "specialised_p": float((divergence["value"] > divergence["value_null_high"]).mean()),
        "content_words": float(words["independent"] - words["direct"]),
        "faithful": float(rank.loc[rank["component"] == "additive", "value"].median()),
        "faithful_direct": float((by_head["additive"] > by_head["direct"]).mean()),
        "sign": float((by_head["independent"] < by_head["additive"]).mean()),
        "steers": float(above.mean().mean()),
        "sentence_end": float(level["sentence end"] / level["elsewhere"]),
        "bias_head": bias_head(leaning)["share"],
        "bias_causal": float(spearmanr(lean[0], lean[1]).statistic),
        "injection_head": float(curves["plain"]),
        "injection_mention": float(curves["mentioned"]),
        "head_9_8": untestable("a claim on one head of GPT-2 small, which is another model"),
    }


def _areas(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Area under the curve of each layer and head, of `[prompt layer head]`."""
    above = (positive[:, None] > negative[None]).mean((0, 1))
    return above + (positive[:, None] == negative[None]).mean((0, 1)) / 2


def _other(task: Task) -> torch.Tensor:
    assert task.corrupt is not None
    return task.corrupt


def _alone(task: Task, tokens: torch.Tensor) -> Task:
    """Some token ids of a task's length as a task of their own."""
    n = len(tokens)
    mask = None if task.mask is None else task.mask.repeat(n // len(task), 1)
    end = torch.full((n,), tokens.shape[1] - 1, device=tokens.device)
    return Task(f"{task.name}, alone", tuple(f"prompt {i}" for i in range(n)), tokens, task.source,
                positions={"end": end}, mask=mask)  # fmt: skip
