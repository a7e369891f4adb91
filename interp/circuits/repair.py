"""Does it work when some heads look where they should? Their attention is overwritten, and the answers are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.circuits.evidence import attention_rows
from interp.circuits.head_set import Head
from interp.core.batching import batches
from interp.core.edits import Edit
from interp.core.metrics import rank
from interp.core.readout import Readout, readout
from interp.core.registry import method
from interp.core.rerun import rerun
from interp.core.result import Result
from interp.models.hooks import HookFn
from interp.models.model import Model
from interp.patching._inputs import numbers, provenance, where
from interp.tasks.task import Task

#: The conditions, as they are called in the column `component`.
CONDITIONS = ("unchanged", "given heads", "random heads")


@method(name="Repair by overwritten attention", paper="arXiv:2310.08744", notebook="circuit_reuse")
def repair(
    model: Model,
    task: Task,
    heads: Sequence[Head],
    *,
    attend_to: Sequence[str],
    position: str = "end",
    movers: Sequence[Head] = (),
    right: Sequence[str] = (),
    n_random: int = 10,
    seed: int = 0,
    batch_size: int = 32,
) -> Result:
    """How many answers change when given heads are made to attend to given positions, and to nothing else.

    The attention row of each of `heads` at `position` is set to 1/n at the n positions of `attend_to` and to 0
    elsewhere; values and output weights stay as they are, and everything later is computed anew. The control does the
    same to as many heads drawn at random from all the others, `n_random` times.

    Args:
        model: a decoder.
        task: with answers and named positions.
        heads: (layer, head), query heads.
        attend_to: names of the positions attended to. Merullo et al. let inhibition heads attend to the wrong answers.
        position: name of the position whose attention is overwritten.
        movers: later heads whose attention at `position` is measured in each condition (the downstream signature).
        right: names of the positions of the right answer, for `movers`; the wrong ones are `attend_to`.
        n_random: how many sets of random heads; 0 for no control.
        seed: seed of their draw.
        batch_size: prompts that are run at once.

    Returns:
        Result, one row for each prompt, condition (`component`: "unchanged", "given heads", "random heads") and, for
        random heads, set (`step`); unit "fraction of prompts".
        `value` is 1 where the answer has the highest logit of the whole vocabulary, a tie counting against it;
        `value_options` the same among the task's options (NaN without); `value_logit_diff` the answer's logit minus
        the wrong one's, in logits (NaN without); `value_mistake` 1 where an answer that was right is wrong now,
        `value_repaired` 1 for the reverse; with movers `value_attention_right` and `value_attention_wrong`, their
        attention summed over positions and averaged over heads. `meta["random_heads"]` lists the sets.

    Raises:
        ValueError: no heads or positions, an unknown one, one that lies after `position`, fewer other heads than
            the control needs, a task without answers.

    Cost: one forward pass, and for each condition the layers from its first head on at the position overwritten and
        after, with logits over the whole vocabulary; with movers, one more forward pass a condition.

    Differs from the paper: its code for this is not public; that attention is split evenly is an assumption.

    Example:
        >>> from interp.models import toy
        >>> model = toy.induction(n_words=12)
        >>> tokens = torch.tensor([[2, 3, 4, 5, 2]])
        >>> task = Task("doc", ("w2 w3 w4 w5 w2",), tokens, "by hand", answers=torch.tensor([4]),
        ...             positions={"end": torch.tensor([4]), "here": torch.tensor([2])})
        >>> repair(model, task, [(1, 0)], attend_to=["here"], n_random=0).table[["component", "value"]].values.tolist()
        [['unchanged', 0.0], ['given heads', 1.0]]
    """
    if task.answers is None:
        raise ValueError(f"task {task.name!r} has no answers, so none can be right: use a task with answers.")
    _require_heads(model, heads, movers)
    if movers and not right:
        raise ValueError(
            'movers were given without right=: name the positions of the answer, right=["correct_colour"].'
        )
    sets = [list(heads), *_random_sets(model, heads, n_random, seed)]
    conditions = [CONDITIONS[0], CONDITIONS[1], *[CONDITIONS[2]] * n_random]
    scored: list[np.ndarray] = []
    watched: list[np.ndarray] = []
    for rows in batches(len(task), batch_size):
        part = task[rows]
        query = _place(part, position)
        row = _even_row(part, query, position, attend_to)
        cells = [[], *([Edit("pattern", layer, head=head, pos=query, value=row) for layer, head in s] for s in sets)]
        scored.append(numbers(rerun(model, part.clean, cells, _answers(model, part), mask=part.mask)))
        if movers:
            changes = [[], *(_force(s, query, row) for s in sets)]
            seen = [attention_rows(model, part, {"at": query}, hooks=hooks)["at"] for hooks in changes]
            watched.append(np.stack([_watch(part, each, movers, (right, attend_to)) for each in seen]))
    table = _table(np.concatenate(scored, 1), np.concatenate(watched, 1) if movers else None, conditions)
    meta = provenance(
        model, task, heads=[list(at) for at in heads], attend_to=list(attend_to), position=position,
        movers=[list(at) for at in movers], right=list(right), n_random=n_random, seed=seed,
        random_heads=[[list(at) for at in s] for s in sets[1:]],
    )  # fmt: skip
    return Result("repair.repair", table, "fraction of prompts", meta=meta)


def _table(scored: np.ndarray, watched: np.ndarray | None, conditions: Sequence[str]) -> pd.DataFrame:
    """One row a condition and prompt, from `[condition prompt number]`."""
    condition, prompt = np.indices(scored.shape[:2]).reshape(2, -1)
    right, before = scored[..., 0], scored[:1, :, 0]
    columns = {
        "prompt": prompt,
        "component": np.array(conditions, dtype=object)[condition],
        "step": np.maximum(condition - 2, 0),
        "value": right.ravel(),
        "value_options": scored[..., 1].ravel(),
        "value_logit_diff": scored[..., 2].ravel(),
        "value_mistake": (before * (1 - right)).ravel(),
        "value_repaired": ((1 - before) * right).ravel(),
    }
    if watched is not None:
        columns |= {f"value_attention_{which}": watched[..., i].ravel() for i, which in enumerate(("right", "wrong"))}
    return pd.DataFrame(columns)


def _answers(model: Model, task: Task) -> Readout:
    """Right over the whole vocabulary, right among the options, and the logit difference: `[rows 3]`."""
    answers, wrong, options = task.answers, task.wrong, task.options
    assert answers is not None

    def score(logits: Tensor, rows: Tensor) -> Tensor:
        logits = logits.float()
        mine = logits.gather(-1, answers[rows][:, None])
        first = (rank(logits, answers[rows]) == 0).float()
        missing = torch.full_like(first, float("nan"))
        chosen = difference = missing
        if options is not None:
            chosen = ((logits.gather(-1, options[rows]) >= mine).sum(-1) == 1).float()
        if wrong is not None:
            difference = (mine - logits.gather(-1, wrong[rows][:, None])).squeeze(-1)
        return torch.stack([first, chosen, difference], -1)

    return Readout("answers", "fraction of prompts", readout(model, task, "log_prob").where, None, score)


def _even_row(task: Task, query: Tensor, position: str, attend_to: Sequence[str]) -> Tensor:
    """The attention row that is forced, `[batch k_pos]`."""
    if not attend_to:
        raise ValueError('attend_to is empty: name at least one position, for example attend_to=["subject2"].')
    row = torch.zeros(task.clean.shape, device=task.clean.device)
    for name in attend_to:
        place = _place(task, name)
        if bool((place > query).any()):
            prompt = int((place > query).nonzero()[0])
            raise ValueError(
                f"prompt {task.prompts[prompt]!r}: {name!r} is at {int(place[prompt])}, after {position!r} at "
                f"{int(query[prompt])}: a position attends to earlier ones only."
            )
        row[torch.arange(len(task), device=row.device), place] = 1.0
    return row / row.sum(1, keepdim=True)


def _force(heads: Sequence[Head], query: Tensor, row: Tensor) -> list[tuple[str, HookFn]]:
    """Hooks that overwrite the attention row of each head."""

    def overwrite(pattern: Tensor, hook: object, chosen: list[int]) -> Tensor:
        changed = pattern.clone()
        for head in chosen:
            changed[torch.arange(len(row), device=row.device), head, query] = row.to(pattern)
        return changed

    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return [
        (f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook, chosen=chosen: overwrite(pattern, hook, chosen))
        for layer, chosen in by_layer.items()
    ]


def _watch(task: Task, rows: Tensor, movers: Sequence[Head], groups: tuple[Sequence[str], ...]) -> np.ndarray:
    """Attention of the movers to each group of positions, `[prompt group]`, from rows `[layer batch head k_pos]`."""
    chosen = torch.stack([rows[layer, :, head] for layer, head in movers]).float().mean(0)
    prompts = torch.arange(len(task), device=chosen.device)
    hit = []
    for names in groups:
        seen = torch.zeros_like(chosen)
        for name in names:
            seen[prompts, _place(task, name)] = 1.0
        hit.append((chosen * seen).sum(1))
    return numbers(torch.stack(hit, 1))


def _require_heads(model: Model, heads: Sequence[Head], movers: Sequence[Head]) -> None:
    if not heads:
        raise ValueError("no heads were given: name at least one, for example heads=[(12, 3)].")
    for label, given in (("heads", heads), ("movers", movers)):
        if len(set(given)) != len(given):
            raise ValueError(f"{label} names a head twice: {sorted(given)}.")
        for layer, head in given:
            if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
                raise ValueError(
                    f"{label} names head {(layer, head)}, but {model.name} has layers 0 to {model.n_layers - 1} and "
                    f"heads 0 to {model.n_heads - 1}."
                )


def _random_sets(model: Model, heads: Sequence[Head], n_random: int, seed: int) -> list[list[Head]]:
    others = [
        (layer, head) for layer in range(model.n_layers) for head in range(model.n_heads) if (layer, head) not in heads
    ]
    if n_random and len(others) < len(heads):
        raise ValueError(
            f"{len(heads)} of {model.name}'s {model.n_layers * model.n_heads} heads were given, which leaves too few "
            "for a random control: give fewer, or n_random=0."
        )
    rng = np.random.default_rng(seed)
    return [[others[int(i)] for i in rng.choice(len(others), size=len(heads), replace=False)] for _ in range(n_random)]


def _place(task: Task, name: str) -> Tensor:
    return cast(Tensor, where(task, name))
