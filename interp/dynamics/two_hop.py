"""Does a look at higher layers help a frozen model with a second fact? Back attention beside controls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.batching import batches
from interp.core.metrics import log_prob
from interp.core.registry import method
from interp.core.result import Result
from interp.dynamics._kept import kept_history
from interp.dynamics.back_attention import Upper, examples, train_back_attention
from interp.dynamics.train import IGNORED
from interp.models.back_attention import BackAttention
from interp.models.model import Model
from interp.tasks.task import Task
from interp.tasks.two_hop import two_hop_facts, two_hop_split

#: What is trained: back attention; attention at the same place that reads the stream after the same layer; and back
#: attention on prompts whose answers changed places with those of other prompts with the same relation.
VARIANTS = ("back attention", "plain attention", "shuffled answers")
#: How it is trained unless options say otherwise.
TRAINING: dict[str, Any] = {
    "steps": 20, "learning_rate": 1e-2, "warmup": 5, "weight_decay": 0.01, "batch_size": 12, "every": 20,
}  # fmt: skip
_AT_ONCE = 16
#: Held-out prompts that are looked at during training.
_WATCHED = 8
_UNIT = "by metric: see meta['units']"
_UNITS = {
    "first choice": "1 where the answer has the largest logit of all tokens, else 0",
    "among answers": "1 where it has the largest of all answers to its relation, else 0",
    "log-probability": "nats, of the answer",
}


@method(name="Back attention on a frozen model", paper="arXiv:2502.10835", notebook="back_attention")
def two_hop_gain(
    model: Model,
    task: Task,
    *,
    source: int,
    target: int,
    singles: Sequence[Task] = (),
    seeds: Sequence[int] = (10, 11, 12),
    variants: Sequence[str] = VARIANTS,
    by: str = "country",
    held_out: float = 0.3,
    d_inner: int = 16,
    n_heads: int = 1,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Result:
    """What back attention trained on a frozen model does to facts that it was not trained on (arXiv:2502.10835).

    For each seed the countries are divided anew (`interp.tasks.two_hop_split`), a module of each variant is trained on
    the one part, and both the plain model and the changed one answer the other part, and the single hops there:

    - "back attention": from layer `source` to the stream after layer `target`.
    - "plain attention": the same module at the same place, which reads the stream after layer `source` itself. What it
      gains too is not owed to higher layers.
    - "shuffled answers": back attention trained with answers that changed places among the prompts of one relation.
      What it gains too is not owed to facts; it is the form of the answers, and how often each is given.

    What is measured is kept for each seed and variant: a second call reads it, one with more seeds trains what is new,
    and a run that was stopped goes on.

    Args:
        model: a decoder with a `program`.
        task: prompts of `interp.tasks.two_hop`.
        source: the lower layer, whose input is changed.
        target: the higher layer, whose output is read.
        singles: tasks of single hops, to see whether they are harmed; nothing is trained on them.
        seeds: of splits, weights and batches.
        variants: some of the three.
        by: "country" or "entity", see `two_hop_split`.
        held_out: share of the countries (entities) that are not trained on.
        d_inner: see `BackAttention`.
        n_heads: see `BackAttention`.
        folder: where to keep what is measured; None for the cache folder.
        **options: of `train_back_attention`; 20 steps of 12 prompts at 1e-2 unless they say otherwise.

    Returns:
        A row for each held-out prompt, seed, variant and metric (`meta["units"]`): columns `component` (the variant),
        `value_seed`, `target` (name of the task), `prompt` (its number in the part that is held out), `src` (the
        entity), `token` (the relation), `dst` (the country), `metric`, `value_before`, `value_after`, `value` (the
        difference) and `value_seen` (1 where the answer was one in training). Prompts of an entity (a country) are not
        independent: `interp.report.papers.back_attention` has intervals that resample those.

    Raises:
        ValueError: an unknown variant, or what `two_hop_split` and `train_back_attention` refuse.

    Cost: a seed and variant cost a forward pass up to `target` for each prompt, steps x batch_size forward and backward
        passes from `source` on, and a forward pass from there for each held-out prompt. On the default model, half a
        minute of CPU each.
    """
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown or not variants:
        raise ValueError(f"variants={tuple(variants)!r}: give some of {', '.join(map(repr, VARIANTS))}.")
    training = TRAINING | options
    sizes = {"source": source, "target": target, "d_inner": d_inner, "n_heads": n_heads}
    answers = _answers((task, *singles))
    parts, losses, before = [], {}, {}

    def run(root: Path, seed: int, variant: str) -> Result:
        train, *tests = two_hop_split(task, by=by, held_out=held_out, seed=seed)
        tests += [two_hop_split(single, by=by, held_out=held_out, seed=seed)[1] for single in singles]
        if seed not in before:
            before[seed] = _asked(model, _idle(model), tests, answers)
        back, history = train_back_attention(
            model,
            _shuffled(train, seed) if variant == "shuffled answers" else train,
            held_out=tests[0][:_WATCHED],
            seed=seed,
            folder=None if folder is None else root,
            **sizes | ({"target": source} if variant == "plain attention" else {}),
            **training,
        )
        old, new = before[seed], _asked(model, back, tests, answers)
        assert train.answers is not None
        table = old.drop(columns="answer").assign(
            value_before=old["value"], value_after=new["value"], value=new["value"] - old["value"],
            value_seen=old["answer"].isin(set(train.answers.tolist())).astype(float),
            component=variant, value_seed=seed,
        )  # fmt: skip
        meta = {"seed": seed, "losses": history.filter(metric="loss").table["value"].tolist()}
        return Result("Back attention on a frozen model", table, _UNIT, meta=meta)

    for seed in map(int, seeds):
        for variant in variants:
            recipe = {
                "two hops": model.provenance, "tasks": [each.fingerprint for each in (task, *singles)], "seed": seed,
                "variant": variant, "by": by, "held_out": held_out, **sizes, "training": training,
            }  # fmt: skip
            place = None if folder is None else Path(folder) / f"{variant}, seed {seed}"
            part = kept_history(recipe, partial(run, seed=seed, variant=variant), place)
            parts.append(part.table)
            losses[f"{variant}, seed {seed}"] = part.meta["losses"]
    meta = {
        **model.provenance, "task": task.name, "task_fingerprint": task.fingerprint, **sizes, "by": by,
        "held_out": held_out, "seeds": list(map(int, seeds)), "losses": losses,
        "n_parameters": 4 * model.d_model * d_inner, "units": _UNITS, **training,
    }  # fmt: skip
    return Result("Back attention on a frozen model", pd.concat(parts, ignore_index=True), _UNIT, meta=meta)


def two_hop_answers(model: Model, *tasks: Task) -> Result:
    """How a model answers tasks of `interp.tasks.two_hop` as it is.

    Args:
        model: a decoder with a `program`.
        *tasks: with any hops and in any order.

    Returns:
        A row for each prompt and metric (`meta["units"]`): columns `prompt`, `src` (entity), `token` (relation),
        `dst` (country), `target` (name of the task), `metric` and `value`. The answers among which "among answers"
        chooses are those of all tasks given.

    Raises:
        ValueError: no tasks, or prompts that `two_hop` does not make.

    Cost: a forward pass over the prompts.
    """
    if not tasks:
        raise ValueError("two_hop_answers needs a task: give interp.tasks.two_hop(model).")
    table = _asked(model, _idle(model), tasks, _answers(tasks)).drop(columns="answer")
    meta = {**model.provenance, "tasks": [task.fingerprint for task in tasks], "units": _UNITS}
    return Result("Answers to two hops", table, _UNIT, meta=meta)


def _idle(model: Model) -> BackAttention:
    """A module that writes nothing; at the last layer, below which everything is then computed once."""
    last = model.n_layers - 1
    return BackAttention(model.d_model, source=last, target=last, d_inner=1)


def _answers(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """All answers to each kind of question, as token ids."""
    found: dict[str, set[int]] = {}
    for task in tasks:
        assert task.answers is not None
        for kind, answer in zip(two_hop_facts(task)["kind"], task.answers.tolist(), strict=True):
            found.setdefault(kind, set()).add(answer)
    return {kind: torch.tensor(sorted(answers)) for kind, answers in found.items()}


def _shuffled(task: Task, seed: int) -> Task:
    """Answers in other places, each among the prompts of its relation."""
    assert task.answers is not None
    answers = task.answers.clone()
    generator = np.random.default_rng(seed)
    for rows in two_hop_facts(task).groupby("relation").indices.values():
        answers[rows] = answers[generator.permutation(rows)]
    return replace(task, answers=answers)


@torch.no_grad()
def _asked(model: Model, back: BackAttention, tasks: Sequence[Task], answers: Mapping[str, Tensor]) -> pd.DataFrame:
    """What the model with back attention answers, a row for each prompt and metric."""
    upper = Upper(model, back, *tasks)
    tables = []
    for task in tasks:
        assert task.answers is not None
        tokens, targets = (each.to(model.device) for each in examples(task))
        facts = two_hop_facts(task)
        found: dict[str, list[float]] = {metric: [] for metric in _UNITS}
        for rows in batches(len(task), _AT_ONCE):
            logits = upper(tokens[rows])[targets[rows] != IGNORED]
            found["first choice"] += (logits.argmax(-1) == task.answers[rows]).double().tolist()
            found["log-probability"] += log_prob(logits, task.answers[rows]).double().tolist()
            for each, kind, answer in zip(logits, facts["kind"][rows], task.answers[rows], strict=True):
                options = answers[kind].to(model.device)
                found["among answers"].append(float(options[each[options].argmax()] == answer))
        about = facts.rename(columns={"entity": "src", "relation": "token", "country": "dst"}).drop(columns="kind")
        about["target"], about["answer"] = task.name, task.answers.tolist()
        tables += [about.assign(metric=metric, value=values) for metric, values in found.items()]
    return pd.concat(tables, ignore_index=True)
