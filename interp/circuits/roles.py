"""Which head does what in indirect object identification? Path patching finds it; attention and copying confirm it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.circuits import evidence
from interp.circuits.head_set import Head
from interp.circuits.stages import receivers_of
from interp.core.readout import readout
from interp.core.registry import method
from interp.core.result import Result
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.models.program import program
from interp.patching import path
from interp.patching._inputs import gap, numbers, provenance, require_pairs, where
from interp.tasks.task import Task

_IO, _S1, _AFTER, _S2, _END = "indirect_object", "subject1", "after_subject1", "subject2", "end"
_UNIT = "fraction of the clean-corrupt gap"

#: The roles, in the order of the stages that find them.
ROLES = (
    "name mover", "negative name mover", "S-inhibition", "duplicate token", "induction", "previous token", "backup",
)  # fmt: skip

#: Bars of the criteria: a head has its target when its mean attention probability there is at least this, ...
MIN_ATTENTION = 0.2
#: ... and it copies when its copy score is at least this (Wang et al.: movers above 0.95, the average head below 0.2).
MIN_COPY = 0.5

#: Table columns and the attention they hold.
_ATTENTION = {
    "value_end_to_io": (_END, _IO), "value_end_to_s1": (_END, _S1), "value_end_to_s2": (_END, _S2),
    "value_s2_to_s1": (_S2, _S1), "value_s2_to_after_s1": (_S2, _AFTER), "value_after_s1_to_s1": (_AFTER, _S1),
}  # fmt: skip
_RANDOM = {"value_duplicate": "duplicate token", "value_induction": "induction", "value_previous": "previous token"}
_COPY = {"value_copy": "copy", "value_anti_copy": "anti-copy"}

Measures = Mapping[str, float]


@method(name="IOI head roles", paper="arXiv:2211.00593", notebook="ioi_circuit")
def ioi_roles(
    model: Model,
    task: Task,
    *,
    top: int = 5,
    min_effect: float = 0.01,
    copy_top: int = 5,
    random_length: int = 25,
    freeze_mlps: bool = False,
    min_oriented: float = 0.75,
    seed: int = 0,
) -> Result:
    """The heads of the IOI circuit by role: each stage's candidates by path patching, and whether each is confirmed.

    Stages, all noising (see `patching.path.patch`), from all heads:
    1. to the logits, at "end": hurting heads are candidates for "negative name mover"; helping ones too, where they
       anti-copy names oftener than they copy (they attend to S, as head 19.1 of GPT-2 Medium), else for "name mover";
    2. to the queries of the helping heads of stage 1, at "end": "S-inhibition";
    3. to the keys and values of the S-inhibition heads, at "subject2": "induction" where a head attends from S2 more to
       the token after S1 than to S1, else "duplicate token";
    4. to the keys of the induction heads, at "after_subject1": "previous token". Where clean and corrupted prompts
       are the same up to there (corrupt="swap"), this stage's corrupted prompts have other names in all three places.
    5. "backup": the name movers' z at "end" is set to its mean over the corrupted prompts; for each other head, the
       change of the logit difference when the change of its own output is added to the unchanged final stream.
    A stage's candidates are its `top` heads, of those with a mean effect of at least `min_effect` (of the clean-corrupt
    gap) whose 95% bootstrap interval over prompts excludes 0. All candidates, confirmed or not, receive in the next.

    A candidate is confirmed (`value_confirmed` is 1) by what it attends to and copies, by bars fixed here:
    "name mover": end to IO at least 0.2, and more than to S1 and than to S2; copy score at least 0.5.
    "negative name mover": end to IO, S1 and S2 together at least 0.2; anti-copy score at least 0.5.
    "S-inhibition": end to S2 at least 0.2.
    "duplicate token": S2 to S1, and second to first copy on repeated random tokens, each at least 0.2.
    "induction": S2 to the token after S1, and to what followed the first copy on random tokens, each at least 0.2.
    "previous token": the token after S1 to S1, and position p to p - 1 on random tokens, each at least 0.2.
    "backup": as a name mover, in the run without the name movers.

    Args:
        model: a decoder.
        task: `interp.tasks.ioi` with corrupt="abc" (Wang et al.) or "swap" (Merullo et al.), or a task with the same
            named positions.
        top: most candidates a role.
        min_effect: least effect of a candidate.
        copy_top: the copied name must be among this many tokens, see `evidence.copying`.
        random_length: tokens of a random block, see `evidence.repeated_tokens`.
        freeze_mlps: see `patching.path.patch`.
        min_oriented: see `patching.path.patch`.
        seed: seed of the random tokens, the names of stage 4 and the bootstrap.

    Returns:
        Result, one row for each role (`component`) and candidate (layer, head), strongest first; `value` its mean
        effect, positive where it helps, with `value_low` and `value_high`; unit "fraction of the clean-corrupt gap".
        Means of what confirms: attention `value_end_to_io`, `value_end_to_s1`, `value_end_to_s2`, `value_s2_to_s1`,
        `value_s2_to_after_s1`, `value_after_s1_to_s1` (for "backup" without the name movers), on random tokens
        `value_duplicate`, `value_induction`, `value_previous`, and `value_copy`, `value_anti_copy` over IO, S1 and S2.
        The array "effects" `[stage layer head]` holds the mean effects of all heads, NaN where a head cannot send, its
        stages named by `meta["stages"]`. `HeadSet.of(result)` has the heads by role. A chain that ends early has no
        rows for the later roles.

    Raises:
        ValueError: a task without these positions or without corrupted prompts, too few names for stage 4, and as
            `patching.path.patch` and `evidence.repeated_tokens`.
        NoProgramError: as `evidence.copying`.

    Cost: four `patching.path.patch` of all heads, and about ten forward passes.

    Example:
        >>> from interp.circuits.head_set import HeadSet
        >>> from interp.models import planted
        >>> case = planted.ioi_like()
        >>> at = case.positions
        >>> task = Task("ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, {
        ...     "indirect_object": at["io"], "subject1": at["s1"], "after_subject1": at["s1"] + 1,
        ...     "subject2": at["s2"], "end": at["end"]})
        >>> found = HeadSet.of(ioi_roles(case.model, task, copy_top=1, random_length=3), confirmed=True)
        >>> found["name mover"], found["S-inhibition"]
        (((2, 1), (2, 2)), ((1, 0),))
    """
    _require_ioi(task)
    program(model).w_o(0)  # refuses now a model whose heads do not add up, and not after the stages
    measures = _measures(model, task, random_length, seed)
    found: dict[str, list[tuple[Head, list[float]]]] = {}
    effects: dict[str, np.ndarray] = {}

    def stage(
        label: str, of: Task, position: str, heads: Sequence[Head] = (), components: Sequence[str] = ()
    ) -> Result:
        result = path.patch(
            model, of, receivers=receivers_of(model, heads, components) if heads else "logits", position=position,
            freeze_mlps=freeze_mlps, min_oriented=min_oriented,
        )  # fmt: skip
        effects[label] = _map(model, result.table)
        return result

    def choose(result: Result, sign: int = 1) -> list[tuple[Head, list[float]]]:
        return _candidates(result, sign, top, min_effect, seed)

    direct = stage("to the logits", task, _END)
    helping, hurting = choose(direct), choose(direct, -1)
    copies = _copies(model, task, _heads([*helping, *hurting]), copy_top)
    reverse = [head for head, scores in copies.items() if scores["value_anti_copy"] > scores["value_copy"]]
    found["name mover"] = [each for each in helping if each[0] not in reverse]
    found["negative name mover"] = [*(each for each in helping if each[0] in reverse), *hurting]
    if _can_receive(_heads(helping)):
        found["S-inhibition"] = choose(stage("to the movers' queries", task, _END, _heads(helping), ["q"]))
    inhibition = _heads(found.get("S-inhibition", []))
    if _can_receive(inhibition):
        senders = choose(stage("to the inhibition heads' keys and values", task, _S2, inhibition, ["k", "v"]))
        follows = {
            head: measures[head]["value_s2_to_after_s1"] > measures[head]["value_s2_to_s1"] for head, _ in senders
        }
        found["duplicate token"] = [each for each in senders if not follows[each[0]]]
        found["induction"] = [each for each in senders if follows[each[0]]]
    inducers = _heads(found.get("induction", []))
    renamed = False
    if _can_receive(inducers):
        renamed = _same_until(task, _AFTER)
        contrast = _renamed(task, seed) if renamed else task
        found["previous token"] = choose(stage("to the induction heads' keys", contrast, _AFTER, inducers, ["k"]))
    without: Mapping[Head, Measures] = {}
    if movers := _heads(found["name mover"]):
        hooks = _mean_ablation(model, task, movers)
        growth = _compensation(model, task, movers, hooks, min_oriented)
        effects["compensation for the movers"] = _map(model, growth.table)
        found["backup"] = choose(growth)
        without = _attention(model, task, hooks)
    missing = {head for heads in found.values() for head, _ in heads} - set(copies)
    copies |= _copies(model, task, sorted(missing), copy_top)
    table = _table(found, measures, without, copies)
    meta = provenance(
        model, task, top=top, min_effect=min_effect, copy_top=copy_top, random_length=random_length,
        freeze_mlps=freeze_mlps, min_oriented=min_oriented, seed=seed, stages=list(effects),
        other_names_in_stage_4=renamed, min_attention=MIN_ATTENTION, min_copy=MIN_COPY,
    )  # fmt: skip
    arrays = {"effects": (("stage", "layer", "head"), np.stack(list(effects.values())))}
    return Result("roles.ioi_roles", table, _UNIT, arrays=arrays, meta=meta)


def is_confirmed(role: str, m: Measures) -> bool:
    """Whether what a head attends to and copies is what its role needs; the criteria are those of `ioi_roles`.

    Args:
        role: one of `ROLES`.
        m: the measures, by the names of the columns of `ioi_roles`.

    Returns:
        True or False.
    """
    to_io, to_s1, to_s2 = (m[f"value_end_to_{name}"] for name in ("io", "s1", "s2"))
    criteria: dict[str, Callable[[], bool]] = {
        "name mover": lambda: to_io >= MIN_ATTENTION and to_io > max(to_s1, to_s2) and m["value_copy"] >= MIN_COPY,
        "negative name mover": lambda: to_io + to_s1 + to_s2 >= MIN_ATTENTION and m["value_anti_copy"] >= MIN_COPY,
        "S-inhibition": lambda: to_s2 >= MIN_ATTENTION,
        "duplicate token": lambda: min(m["value_s2_to_s1"], m["value_duplicate"]) >= MIN_ATTENTION,
        "induction": lambda: min(m["value_s2_to_after_s1"], m["value_induction"]) >= MIN_ATTENTION,
        "previous token": lambda: min(m["value_after_s1_to_s1"], m["value_previous"]) >= MIN_ATTENTION,
    }
    return criteria["name mover" if role == "backup" else role]()


def _table(
    found: Mapping[str, list[tuple[Head, list[float]]]],
    measures: Mapping[Head, Measures],
    without: Mapping[Head, Measures],
    copies: Mapping[Head, Measures],
) -> pd.DataFrame:
    """One row a role and head, with all measures."""
    rows = []
    for role in ROLES:
        for head, (mean, low, high) in sorted(found.get(role, []), key=lambda each: -abs(each[1][0])):
            seen = {**measures[head], **(without[head] if role == "backup" else {}), **copies[head]}
            row: dict[str, Any] = {"component": role, "layer": head[0], "head": head[1], "value": mean}
            row |= {"value_low": low, "value_high": high, **seen, "value_confirmed": float(is_confirmed(role, seen))}
            rows.append(row)
    columns = ["component", "layer", "head", "value", "value_low", "value_high", *_ATTENTION, *_RANDOM, *_COPY]
    return pd.DataFrame(rows, columns=[*columns, "value_confirmed"])


def _copies(model: Model, task: Task, heads: Sequence[Head], top: int) -> dict[Head, Measures]:
    """Copy and anti-copy scores over IO, S1 and S2."""
    if not heads:
        return {}
    table = evidence.copying(model, task, heads, names=[_IO, _S1, _S2], top=top).table
    means = table.groupby(["metric", "layer", "head"])["value"].mean()
    return {head: {column: float(means[kind][head]) for column, kind in _COPY.items()} for head in heads}


def _measures(model: Model, task: Task, random_length: int, seed: int) -> dict[Head, Measures]:
    """What every head attends to, in the task and on random tokens."""
    table = evidence.repeated_tokens(model, length=random_length, seed=seed).table
    means = table.groupby(["metric", "layer", "head"])["value"].mean()
    return {
        head: {**seen, **{column: float(means[kind][head]) for column, kind in _RANDOM.items()}}
        for head, seen in _attention(model, task, []).items()
    }


def _attention(model: Model, task: Task, hooks: Sequence[tuple[str, HookFn]]) -> dict[Head, dict[str, float]]:
    """Mean attention of every head between the named positions, in a run with hooks."""
    places = {name: _place(task, name) for name in (_IO, _S1, _AFTER, _S2, _END)}
    rows = evidence.attention_rows(model, task, {src: places[src] for src, _ in _ATTENTION.values()}, hooks=hooks)
    prompts = torch.arange(len(task), device=task.clean.device)
    means = {
        column: numbers(rows[src][:, prompts, :, places[dst]].float().mean(0))  # [layer head]
        for column, (src, dst) in _ATTENTION.items()
    }
    return {
        (layer, head): {column: float(mean[layer, head]) for column, mean in means.items()}
        for layer in range(model.n_layers)
        for head in range(model.n_heads)
    }


def _candidates(result: Result, sign: int, top: int, min_effect: float, seed: int) -> list[tuple[Head, list[float]]]:
    """The strongest heads of one sign: (head, [mean, low, high])."""
    summary = result.summary(by=["layer", "head"], seed=seed)
    near = summary["low"] if sign > 0 else -summary["high"]  # the end of the interval that is nearer to 0
    kept = summary[(sign * summary["mean"] >= min_effect) & (near > 0)]
    kept = kept.iloc[np.argsort(-sign * kept["mean"].to_numpy(), kind="stable")[:top]]
    return [
        ((int(row["layer"]), int(row["head"])), [float(row[key]) for key in ("mean", "low", "high")])
        for row in kept.to_dict("records")
    ]


def _mean_ablation(model: Model, task: Task, heads: Sequence[Head]) -> list[tuple[str, HookFn]]:
    """Hooks that set what heads write at the end to its mean over the corrupted prompts."""
    end = _place(task, _END)
    prompts = torch.arange(len(end), device=end.device)
    names = {layer: f"blocks.{layer}.attn.hook_z" for layer in sorted({layer for layer, _ in heads})}
    last = max(names)
    cache = run(model, require_pairs(task), capture=list(names.values()), mask=task.mask, stop_after=last).cache
    means = {layer: cache[name][prompts, end].mean(0) for layer, name in names.items()}

    def ablate(z: Tensor, hook: object, layer: int) -> Tensor:
        changed = z.clone()
        for head in (head for at, head in heads if at == layer):
            changed[prompts, end, head] = means[layer][head]
        return changed

    return [(name, lambda z, hook, layer=layer: ablate(z, hook, layer)) for layer, name in names.items()]


@torch.no_grad()
def _compensation(
    model: Model, task: Task, removed: Sequence[Head], hooks: Sequence[tuple[str, HookFn]], min_oriented: float
) -> Result:
    """How much the change of each other head's output makes up for the heads removed, on each prompt.

    The change is added to the unchanged final stream, so that a smaller scale of the final norm, which raises what
    every head writes, does not count.
    """
    clean, corrupt = gap(model, task, readout(model, task), min_oriented=min_oriented)
    end = _place(task, _END)
    prompts = torch.arange(len(end), device=end.device)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    stream = f"blocks.{model.n_layers - 1}.hook_resid_post"

    def seen(hooks: Sequence[tuple[str, HookFn]]) -> tuple[list[Tensor], Tensor]:
        z: list[Tensor] = []
        final: list[Tensor] = []
        taps: list[tuple[str, HookFn]] = [(name, lambda a, hook: z.append(a[prompts, end])) for name in names]
        taps.append((stream, lambda a, hook: final.append(a[prompts, end])))
        run(model, task.clean, hooks=[*hooks, *taps], mask=task.mask, stop_after=model.n_layers - 1)
        return z, final[0]

    (before, final), (after, _) = seen([]), seen(hooks)
    assert task.answers is not None and task.wrong is not None
    steps = program(model)
    direction = steps.directions(task.answers)[0] - steps.directions(task.wrong)[0]  # [batch d_model]

    def score(streams: Tensor) -> Tensor:
        return (steps.final_norm(streams) * direction).sum(-1, dtype=torch.float32)

    unchanged = score(final[None])[0]
    rows = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        written = torch.einsum("bhe,hed->hbd", new - old, steps.w_o(layer))
        grown = (score(final + written) - unchanged) / (clean - corrupt).mean()
        rows += [
            {"prompt": prompt, "layer": layer, "head": head, "value": float(value)}
            for head, values in enumerate(numbers(grown)) if (layer, head) not in removed
            for prompt, value in enumerate(values)
        ]  # fmt: skip
    return Result("roles.compensation", pd.DataFrame(rows), _UNIT)


def _renamed(task: Task, seed: int) -> Task:
    """The task with other corrupted prompts: three other names in the places of the three."""
    prompts = torch.arange(len(task), device=task.clean.device)
    places = [_place(task, name) for name in (_IO, _S1, _S2)]
    own = torch.stack([task.clean[prompts, place] for place in places], 1).tolist()
    names = sorted({name for row in own for name in row})
    if len(names) < 5:
        raise ValueError(
            f"task {task.name!r} has {len(names)} different names; stage 4 puts three others in the places of a "
            'prompt\'s two, so it needs five: give more prompts, or a task that has them, ioi(model, corrupt="abc").'
        )
    rng = np.random.default_rng(seed)
    corrupt = task.clean.clone()
    for prompt, used in enumerate(own):
        others = rng.choice([name for name in names if name not in used], size=3, replace=False)
        for place, name in zip(places, others, strict=True):
            corrupt[prompt, place[prompt]] = int(name)
    return replace(task, corrupt=corrupt)


def _same_until(task: Task, name: str) -> bool:
    """Whether clean and corrupted prompts are the same up to a position, on all prompts."""
    upto = torch.arange(task.clean.shape[1], device=task.clean.device) <= _place(task, name)[:, None]
    return not bool(((task.clean != require_pairs(task)) & upto).any())


def _map(model: Model, table: pd.DataFrame) -> np.ndarray:
    """Mean effects `[layer head]`, NaN for heads without a row."""
    filled = np.full((model.n_layers, model.n_heads), np.nan)
    means = table.groupby(["layer", "head"])["value"].mean().reset_index()
    filled[means["layer"].astype(int), means["head"].astype(int)] = means["value"]
    return filled


def _heads(candidates: Sequence[tuple[Head, list[float]]]) -> list[Head]:
    return [head for head, _ in candidates]


def _can_receive(heads: Sequence[Head]) -> bool:
    """Whether any head is in a layer that others come before."""
    return any(layer > 0 for layer, _ in heads)


def _place(task: Task, name: str) -> Tensor:
    place = where(task, name)
    assert place is not None
    return place


def _require_ioi(task: Task) -> None:
    missing = [name for name in (_IO, _S1, _AFTER, _S2, _END) if name not in task.positions]
    if missing:
        raise ValueError(
            f"task {task.name!r} has no position {missing[0]!r}: the roles are those of indirect object "
            "identification; give interp.tasks.ioi(model), or a task with its positions."
        )
    if task.answers is None or task.wrong is None:
        raise ValueError(f"task {task.name!r} has no answers or wrong answers: give interp.tasks.ioi(model).")
    require_pairs(task)
