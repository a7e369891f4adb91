"""Which numbers do the claims of *Does Circuit Analysis Interpretability Scale?* (arXiv 2307.09458) ask for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from interp.circuits import head_classes, low_rank, output_nodes
from interp.core.result import Result
from interp.dynamics import multiple_choice as trained
from interp.dynamics.train import config, train
from interp.models.load import load
from interp.models.model import Model
from interp.patching import effects, path
from interp.patching.path import Receiver
from interp.report.claims import untestable
from interp.tasks.multiple_choice import multiple_choice
from interp.tasks.task import Task

Head = tuple[int, int]

_OTHERS = ("single letter", "constant", "uniform", "amplification")
_STEPS = 30


def subject(name: str, *, seed: int, fast: bool, device: str, dtype: str, question: str = "first") -> Model:
    """The model that the notebook analyses.

    Args:
        name: "trained" for the small transformer trained on labelled multiple choice, or a name for `interp.load`.
        seed: of the trained model's weights and prompts.
        fast: train for 30 steps only, which teaches it nothing.
        device: where to put it.
        dtype: of the weights.
        question: where it stands in the prompts of the trained one, "first" or "last".

    Returns:
        The Model.
    """
    if name != "trained":
        return load(name, device=device, dtype=dtype)
    if not fast:
        return trained.train_multiple_choice(question=question, seed=seed, device=device, dtype=dtype)[0]
    sizes = config("gpt2", d_vocab=len(trained.VOCABULARY), n_ctx=32, n_layers=3, d_mlp=128)
    draw = partial(trained.batch, question=question)
    module = train(sizes, draw, steps=_STEPS, batch_size=16, every=_STEPS, seed=seed).module
    model = load(module, tokenizer=trained.tokenizer(), device=device, dtype=dtype)
    return replace(model, name=f"multiple-choice-question-{question}")  # by which its prompts are made


def tasks(model: Model, n_prompts: int, *, seed: int) -> dict[str, Task]:
    """The prompts: letters to fit on and to measure on, and their mutations.

    Args:
        model: of `subject`; one with the trained model's vocabulary gets its language, any other English.
        n_prompts: of each.
        seed: of the draws.

    Returns:
        {"fit", "letters", "random letters", "ordered letters", "numbers", "separator": task}.
    """
    draw = trained.multiple_choice_task if model.d_vocab == len(trained.VOCABULARY) else multiple_choice
    fit, letters = draw(model, 2 * n_prompts, seed=seed).split(seed)
    others = {name: draw(model, n_prompts, labels=name.replace(" ", "_"), seed=seed) for name in _MUTATIONS}
    return {"fit": fit, "letters": letters, **others, "separator": draw(model, n_prompts, separator=".", seed=seed)}


_MUTATIONS = ("random letters", "ordered letters", "numbers")


def chosen(attributed: Result) -> pd.DataFrame:
    """Which option the model chooses, for each one that is right.

    Args:
        attributed: of `output_nodes.attribution`.

    Returns:
        Counts of prompts, the right option down and the chosen one across.
    """
    right, logits = attributed.arrays["right"][1], attributed.arrays["logits"][1]
    counts = np.zeros((logits.shape[1], logits.shape[1]), dtype=int)
    np.add.at(counts, (right, logits.argmax(1)), 1)
    return pd.DataFrame(counts).rename_axis("right").rename_axis("chosen", axis=1)


def by_node(found: Result) -> Result:
    """The mean direct and total effect of each node, for a figure.

    Args:
        found: of `output_nodes.effects`.

    Returns:
        Result, one row a node: target (its name), value_direct, value_total.
    """
    nodes = output_nodes.ranked(found)
    names = [_name(row) for row in nodes.to_dict("records")]
    table = pd.DataFrame({"target": names, "value_direct": nodes["direct"], "value_total": nodes["total"]})
    return Result(found.method, table, found.unit, meta=found.meta)


def _name(row: dict[Any, Any]) -> str:
    named = {"embed": "embedding", "mlp_out": f"MLP {row['layer']}"}
    return named.get(row["component"], f"{row['layer']}.{row['head']}")


def on_labels(attributed: Result, head: Head) -> pd.DataFrame:
    """A head's mean net direct effect on each label, for each right option.

    Args:
        attributed: of `output_nodes.attribution`.
        head: (layer, head).

    Returns:
        Logits, the right option down and the label across.
    """
    nodes = attributed.table.drop_duplicates(["component", "layer", "head"]).reset_index(drop=True)
    mine = (nodes["component"] == "z") & (nodes["layer"] == head[0]) & (nodes["head"] == head[1])
    effect, right = attributed.arrays["labels"][1][int(np.flatnonzero(mine)[0])], attributed.arrays["right"][1]
    means = [effect[right == option].mean(0) for option in range(effect.shape[1])]
    return pd.DataFrame(means).rename_axis("right option").rename_axis("label", axis=1)


def letter_heads(classes: Result) -> list[Head]:
    """The correct-letter heads, strongest first; where there are none, the two heads with the largest direct effect.

    Args:
        classes: of `head_classes.classify`.

    Returns:
        (layer, head) of each.
    """
    table = classes.table.sort_values("value_direct", ascending=False)
    found = table[table["component"] == "correct letter"]
    return _pairs(found if len(found) else table.head(2))


def label_readers(classes: Result) -> list[Head]:
    """All output heads, of whatever class, that attend to the labels.

    Args:
        classes: of `head_classes.classify`.

    Returns:
        (layer, head) of each.
    """
    table = classes.table.sort_values("value_direct", ascending=False)
    size = (table["value_size"] >= head_classes.MATERIAL) & (table["value_labels"] >= head_classes.READS)
    return _pairs(table[size])


def strongest(classes: Result) -> pd.DataFrame:
    """The heads with the largest total effects, and what their classes rest on.

    Args:
        classes: of `head_classes.classify`.

    Returns:
        A row a head, twelve at most.
    """
    table = classes.table.sort_values("value_total", key=abs, ascending=False)
    return table.head(12)[["component", "layer", "head", *_MEASURES]].round(2)


_MEASURES = (
    "value_direct", "value_total", "value_labels", "value_right_label", "value_copy", "value_constant", "value_late",
    "value_contents", "value_right_content",
)  # fmt: skip


def without_queries(model: Model, n_prompts: int, *, seed: int) -> pd.DataFrame:
    """Whether the queries at the end carry anything: right answers with all heads' queries there set to their mean.

    Args:
        model: of `subject`.
        n_prompts: of each kind.
        seed: of their draws.

    Returns:
        Shares of prompts, a row a kind of prompt: of the model "as it is", with the mean "in all layers", and "after
        layer 0", whose queries depend on the last token alone. Cost: six forward passes over the prompts.
    """
    prompts = tasks(model, n_prompts, seed=seed)
    fit = prompts.pop("fit")
    columns = {}
    for name, first in (("in all layers", 0), ("after layer 0", 1)):
        heads = [(layer, head) for layer in range(first, model.n_layers) for head in range(model.n_heads)]
        found = low_rank.compress(model, fit, prompts, heads, parts=["q"], ranks=[0])
        for column, component in (("as it is", "unchanged"), (name, "q")):
            of = found.filter(component=component).table
            columns[column] = of.groupby("target", sort=False)["value_right"].mean()
    return pd.DataFrame(columns).rename_axis("prompts")


def gathering(model: Model, task: Task, classes: Result, heads: Sequence[Head]) -> pd.DataFrame:
    """How much of the content gatherers' total effect goes through the queries of some heads.

    Args:
        model: measured.
        task: with corrupted prompts.
        classes: of `head_classes.classify`.
        heads: whose queries.

    Returns:
        One row a gatherer that lies before one of the heads: layer, head, total, through_queries, as fractions of the
        gap between clean and corrupted prompts.
    """
    found = _pairs(classes.table[classes.table["component"] == "content gatherer"])
    before = [at for at in found if any(at[0] < layer for layer, _ in heads)]
    if not before:
        return pd.DataFrame(columns=["layer", "head", "total", "through_queries"])
    nodes = [effects.Node("z", layer, head) for layer, head in before]
    queries = [Receiver("q", layer, head) for layer, head in heads]
    whole = effects.effects(model, task, nodes=nodes).filter(metric="total").summary(["layer", "head"])
    through = path.patch(model, task, receivers=queries, senders=nodes).summary(["layer", "head"])
    both = whole.merge(through, on=["layer", "head"], suffixes=("", "_through"))
    return both[["layer", "head", "mean", "mean_through"]].set_axis(
        ["layer", "head", "total", "through_queries"], axis=1
    )


def measured(
    *,
    attributed: Result,
    found: Result,
    joined: Result,
    classes: Result,
    gathered: pd.DataFrame,
    compressed: Result,
    coded: Result,
    with_numbers: Result,
) -> dict[str, Any]:
    """The measurement of every claim in `data/papers/mcq_at_scale/claims.csv`.

    Args:
        attributed: `output_nodes.attribution` of "letters".
        found: `output_nodes.effects` of all nodes on "letters".
        joined: `output_nodes.joint` of `found`.
        classes: `head_classes.classify` on "letters".
        gathered: of `gathering`.
        compressed: `low_rank.compress` of `letter_heads(classes)`, fitted on "fit", on all other tasks.
        coded: `low_rank.coding` of the same heads, fitted on "fit", read on "random letters".
        with_numbers: `output_nodes.effects` of the same heads on "numbers".

    Returns:
        {claim id: number, or `untestable(why)`}, for `claims.check`.
    """
    count = classes.table["component"].value_counts()
    n = output_nodes.needed(joined)
    top = [component for component, _, _ in joined.meta["order"][:n]]
    strongest = classes.table.loc[classes.table["value_direct"].idxmax()]
    letters = found.filter(metric="direct").table.merge(pd.DataFrame(letter_heads(classes), columns=["layer", "head"]))
    numbers = with_numbers.filter(metric="direct").table
    variance = coded.table.groupby(["component", "metric"])["value"].mean()
    return {
        "can": float(np.diag(chosen(attributed)).sum() / chosen(attributed).to_numpy().sum()),
        "sparse": n / len(joined.meta["order"]),
        "joint": float(output_nodes.shares(joined).loc[n, "total"]),
        "heads_and_mlps": float(min(top.count("z"), top.count("mlp_out"))),
        "correct_letter": float(count.get("correct letter", 0)),
        "argmax": float(strongest["value_right_label"]),
        "other_classes": float(sum(name in count for name in _OTHERS)),
        "gatherers": float(count.get("content gatherer", 0)),
        "gather_indirect": _gathered(gathered),
        **_compression(compressed),
        "index": float(variance["k", "place"]),
        "identity": float(variance["v", "token"]),
        "numbers_effect": _sum(numbers) / _sum(letters),
        "same_heads": untestable("Chinchilla is not public, nor is a list of its 45 nodes that was found"),
    }


def _compression(compressed: Result) -> dict[str, Any]:
    cells = low_rank.recovered(compressed).set_index(["target", "component", "step"])
    unchanged = compressed.filter(component="unchanged", target="letters").table["value_right"].mean()

    def share(target: str, component: str) -> float:
        return float(cells.loc[(target, component, 3), "share"])

    def tested(target: str, component: str, value: float) -> Any:
        if np.isfinite(share(target, component)):
            return value
        return untestable(
            f"with {target}, setting the correct-letter heads' {component} to their mean costs nothing: others give "
            "the answer too (the notebook compresses all of them together)"
        )

    def fall(component: str) -> float:
        return float(unchanged - cells.loc[("letters", component, 3), "right"])

    return {
        "rank3_qk": tested("letters", "qk", fall("qk")),
        "rank3_effect": tested("letters", "qk", share("letters", "qk")),
        "rank3_v": tested("letters", "qkv", fall("qkv")),
        "random_letters": tested("random letters", "qkv", share("random letters", "qkv")),
        "numbers": tested("numbers", "qkv", share("numbers", "qkv")),
    }


def _gathered(gathered: pd.DataFrame) -> Any:
    if not len(gathered):
        return untestable("no content gatherer was found before the correct-letter heads")
    return float(gathered["through_queries"].sum() / gathered["total"].sum())


def _sum(direct: pd.DataFrame) -> float:
    return float(direct.groupby("prompt")["value"].sum().mean())


def _pairs(table: pd.DataFrame) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]
