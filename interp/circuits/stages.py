"""Through which heads does a task go? Path patching stage by stage: the top heads of one stage receive in the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from interp.circuits.head_set import Head
from interp.circuits.overlap import count
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.patching import path
from interp.patching._inputs import provenance, require_pairs, where
from interp.tasks.task import Task

Component = Literal["logits", "q", "k", "v"]


@dataclass(frozen=True)
class Step:
    """One stage of path patching.

    Attributes:
        components: what receives: ("logits",), or some of "q", "k", "v" of the heads of an earlier stage.
        position: name of the position at which heads send, and receivers read.
        of: the stage, counted from 1, whose top heads are the receivers; 0 for the logits.
    """

    components: tuple[Component, ...]
    position: str
    of: int = 0

    @property
    def label(self) -> str:
        """For example "k, v of stage 2 at subject2"."""
        of = f" of stage {self.of}" if self.of else ""
        return f"{', '.join(self.components)}{of} at {self.position}"


def four_steps(position: str) -> tuple[Step, ...]:
    """The four stages of Merullo et al., as far as they are known.

    Heads that write the answer (to the logits, at "end"); heads that tell those where to look (to their queries, at
    "end"); heads that write what these read, as their values and as their keys, at `position`.

    Args:
        position: where the heads of stage 2 look: "subject2" for `ioi`, "query_object" for `coloured_objects`.

    Returns:
        The steps.
    """
    return (
        Step(("logits",), "end"), Step(("q",), "end", 1), Step(("v",), position, 2), Step(("k",), position, 2),
    )  # fmt: skip


@method(name="Path patching in stages", paper="arXiv:2310.08744", notebook="circuit_reuse")
def stages(
    model: Model,
    task: Task,
    steps: Sequence[Step],
    *,
    share: float = 0.02,
    freeze_mlps: bool = False,
    min_oriented: float = 0.75,
) -> Result:
    """Every head's effect through the top heads of the stage before, for a chain of stages.

    Each stage is one `patching.path.patch` from all heads, noising. Its top heads, the `share` of all heads with the
    largest |mean effect| (`overlap.count` says how many), are the receivers of the stages that name it.

    Args:
        model: a decoder.
        task: with clean and corrupted prompts and named positions.
        steps: the stages, for example `four_steps("subject2")`.
        share: of the model's heads that count as top heads.
        freeze_mlps: see `patching.path.patch`.
        min_oriented: see `patching.path.patch`.

    Returns:
        Result, unit "fraction of the clean-corrupt gap"; one row for each prompt, stage (`step`, from 1; `component`
        says which) and head that can send there; `value` as of `patching.path.patch`, positive where it helps.
        `meta["top"]` lists each stage's top heads, [layer, head]. Keys and values receive as groups.

    Raises:
        ValueError: a stage that names none before it; a position up to which clean and corrupted prompts are the
            same, where no head can have an effect; a stage without senders; and as `patching.path.patch`.

    Cost: that of a `patching.path.patch` a stage.

    Example:
        >>> from interp.models import planted
        >>> case = planted.ioi_like()
        >>> task = Task("ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong,
        ...             case.positions)
        >>> found = stages(case.model, task, [Step(("logits",), "end"), Step(("q",), "end", 1)], share=0.25)
        >>> found.meta["top"]
        [[[2, 1], [2, 2], [2, 3]], [[1, 0]]]
    """
    _require_chain(task, steps)
    n_heads = model.n_layers * model.n_heads
    size = count(n_heads, share)
    tables: list[pd.DataFrame] = []
    tops: list[list[Head]] = []
    for number, step in enumerate(steps, 1):
        receivers: str | list[path.Receiver] = "logits"
        if step.of:
            receivers = receivers_of(model, tops[step.of - 1], step.components)
            _require_senders(model, number, step, receivers)
        table = path.patch(
            model, task, receivers=receivers, position=step.position, freeze_mlps=freeze_mlps, min_oriented=min_oriented
        ).table
        tables.append(table[["prompt", "layer", "head", "value"]].assign(step=number, component=step.label))
        tops.append(top_heads(table, size))
    table = pd.concat(tables, ignore_index=True)[["prompt", "step", "component", "layer", "head", "value"]]
    meta = provenance(
        model, task, steps=[step.label for step in steps], share=share, freeze_mlps=freeze_mlps,
        top=[[list(head) for head in top] for top in tops], n_heads_in_all=n_heads, n_heads_a_layer=model.n_heads,
    )  # fmt: skip
    return Result("stages.stages", table, "fraction of the clean-corrupt gap", meta=meta)


def receivers_of(model: Model, heads: Sequence[Head], components: Sequence[str]) -> list[path.Receiver]:
    """The query, key or value inputs of some heads; a key-value group once, however many of its heads are there.

    Args:
        model: for its groups.
        heads: (layer, head), query heads.
        components: some of "q", "k", "v".

    Returns:
        The receivers.
    """
    found = {}
    for component in components:
        for layer, head in heads:
            own = head if component == "q" else head * model.n_key_value_heads // model.n_heads
            found[component, layer, own] = path.Receiver(component, layer, own)
    return list(found.values())


def top_heads(table: pd.DataFrame, size: int) -> list[Head]:
    """The heads with the largest magnitude of the mean over prompts, and not 0, strongest first.

    Args:
        table: rows with layer, head and value.
        size: how many at most.

    Returns:
        (layer, head) each.
    """
    means = table.groupby(["layer", "head"])["value"].mean()
    order = np.argsort(-means.abs().to_numpy(), kind="stable")[:size]
    picked = means.iloc[order]
    return [(int(layer), int(head)) for (layer, head), mean in picked.items() if mean != 0]


def _require_chain(task: Task, steps: Sequence[Step]) -> None:
    if not steps:
        raise ValueError('there are no steps: give some, for example four_steps("subject2").')
    differs = task.clean != require_pairs(task)
    for number, step in enumerate(steps, 1):
        if ("logits" in step.components) != (step.of == 0) or not 0 <= step.of < number:
            raise ValueError(
                f"stage {number} is {step}: the logits receive with of=0 and alone; queries, keys and values are those "
                "of an earlier stage's heads, of=1 for the first stage."
            )
        if step.of == 0 and step.components != ("logits",):
            raise ValueError(f"stage {number} is {step}: the logits receive alone; make two stages of it.")
        place = where(task, step.position)
        assert place is not None
        seen = torch.arange(differs.shape[1], device=differs.device) <= place[:, None]
        if not bool((differs & seen).any()):
            raise ValueError(
                f"stage {number} ({step.label}): clean and corrupted prompts of task {task.name!r} are the same up to "
                f"{step.position!r}, so nothing there can have an effect. Give a later position, or prompts that "
                'differ earlier (for example ioi(model, corrupt="abc")).'
            )


def _require_senders(model: Model, number: int, step: Step, receivers: Sequence[path.Receiver]) -> None:
    if not receivers or max(receiver.layer or 0 for receiver in receivers) == 0:
        raise ValueError(
            f"stage {number} ({step.label}): "
            + ("no head of that stage has an effect" if not receivers else "its heads are in layer 0")
            + ", so none can send to them: leave this stage out, or raise share."
        )
