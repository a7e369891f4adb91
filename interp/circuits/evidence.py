"""What does a head attend to, and what does it copy? Measurements that confirm, or refute, a role."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.circuits.head_set import Head
from interp.core.batching import batches
from interp.core.metrics import rank
from interp.core.registry import method
from interp.core.result import Result
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._inputs import numbers, provenance, where
from interp.tasks.induction import induction
from interp.tasks.task import Task

_PAPER = "arXiv:2211.00593"

#: Logits that are in memory at once while the copied token is ranked.
_LOGITS_AT_ONCE = 2**25


@method(name="Attention between named positions", paper=_PAPER, notebook="ioi_circuit")
def attention(model: Model, task: Task, pairs: Sequence[tuple[str, str]]) -> Result:
    """How much each head attends from one named position to another.

    The value is the attention probability pattern[head, q, k] with q and k the prompt's own positions.

    Args:
        model: a decoder.
        task: with named positions.
        pairs: (from, to) names of its positions, for example ("end", "indirect_object").

    Returns:
        Result, one row for each prompt, pair (columns `src` and `dst`), layer and head; unit "probability". Heads are
        query heads, whatever the number of key-value groups.

    Raises:
        ValueError: for a name that the task has not.

    Cost: one forward pass without the unembedding.

    Example:
        >>> import torch
        >>> from interp.models import toy
        >>> model = toy.induction()
        >>> tokens = torch.tensor([[2, 3, 4, 5, 2]])
        >>> task = Task("doc", ("w2 w3 w4 w5 w2",), tokens, "by hand",
        ...             positions={"end": torch.tensor([4]), "next": torch.tensor([1])})
        >>> attention(model, task, [("end", "next")]).top(1)[["layer", "head"]].values.tolist()
        [[1, 0]]
    """
    if not pairs:
        raise ValueError('no pairs were given: name at least one, for example [("end", "subject2")].')
    places = {name: _place(task, name) for pair in pairs for name in pair}
    rows = attention_rows(model, task, {src: places[src] for src, _ in pairs})
    prompts = torch.arange(len(task), device=task.clean.device)
    # [pair layer prompt head]
    values = np.stack([numbers(rows[src][:, prompts, :, places[dst]]).transpose(1, 0, 2) for src, dst in pairs])
    pair, layer, prompt, head = np.indices(values.shape).reshape(4, -1)
    names = np.array([list(each) for each in pairs], dtype=object)
    table = pd.DataFrame(
        {"prompt": prompt, "src": names[pair, 0], "dst": names[pair, 1], "layer": layer, "head": head,
         "value": values.ravel()}
    )  # fmt: skip
    meta = provenance(model, task, pairs=[list(each) for each in pairs])
    return Result("evidence.attention", table, "probability", meta=meta)


def attention_rows(
    model: Model, task: Task, queries: dict[str, Tensor], *, hooks: Sequence[tuple[str, HookFn]] = ()
) -> dict[str, Tensor]:
    """The rows of all attention patterns at some query positions.

    Args:
        model: a decoder.
        task: whose clean prompts are run.
        queries: {name: position of each prompt `[batch]`}.
        hooks: changes to the run.

    Returns:
        {name: `[layer batch head k_pos]`}.

    Cost: one forward pass without the unembedding; the rows are kept, not the patterns.
    """
    prompts = torch.arange(len(task), device=task.clean.device)
    rows: dict[str, list[Tensor]] = {name: [] for name in queries}

    def keep(pattern: Tensor, hook: object) -> None:
        for name, position in queries.items():
            rows[name].append(pattern[prompts, :, position])

    taps: list[tuple[str, HookFn]] = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(model.n_layers)]
    run(model, task.clean, hooks=[*hooks, *taps], mask=task.mask, stop_after=model.n_layers - 1)
    return {name: torch.stack(layers) for name, layers in rows.items()}


@method(name="Attention on repeated random tokens", paper=_PAPER, notebook="ioi_circuit")
def repeated_tokens(model: Model, *, n_prompts: int = 16, length: int = 25, seed: int = 0) -> Result:
    """Which heads find an earlier copy, what followed it, or the token before, on random tokens said twice.

    On r[0] ... r[L-1] r[0] ... r[L-2] with different tokens, the mean attention probability of a head
    "duplicate token": from position p of the second block to its copy, p - L;
    "induction": from position p of the second block to what followed its copy, p - L + 1 (the prefix-matching score);
    "previous token": from position p of the first block to p - 1.

    Args:
        model: a decoder.
        n_prompts: number of sequences.
        length: L, see `interp.tasks.induction`, which draws them.
        seed: seed of the draw.

    Returns:
        Result, one row for each sequence (column `prompt`), `metric`, layer and head; unit "probability".

    Raises:
        ValueError: a length that the model's context or vocabulary is too small for.

    Cost: one forward pass of n_prompts x (2 L - 1) tokens without the unembedding.

    Example:
        >>> from interp.models import toy
        >>> scores = repeated_tokens(toy.induction(), n_prompts=2, length=5)
        >>> scores.filter(metric="induction").top(1)[["layer", "head"]].values.tolist()
        [[1, 0]]
    """
    task = induction(model, n_prompts, length, seed=seed)
    start = int(task.positions["repeat"][0])
    second = torch.arange(start, task.clean.shape[1], device=task.clean.device)
    first = torch.arange(start - length + 1, start, device=task.clean.device)
    routes = {
        "duplicate token": (second, second - length),
        "induction": (second, second - length + 1),
        "previous token": (first, first - 1),
    }
    layers: list[Tensor] = []

    def keep(pattern: Tensor, hook: object) -> None:
        layers.append(torch.stack([pattern[:, :, q, k].float().mean(-1) for q, k in routes.values()]))

    taps: list[tuple[str, HookFn]] = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(model.n_layers)]
    run(model, task.clean, hooks=taps, mask=task.mask, stop_after=model.n_layers - 1)
    values = numbers(torch.stack(layers))  # [layer metric prompt head]
    layer, kind, prompt, head = np.indices(values.shape).reshape(4, -1)
    metrics = np.array(list(routes), dtype=object)[kind]
    table = pd.DataFrame({"prompt": prompt, "metric": metrics, "layer": layer, "head": head, "value": values.ravel()})
    meta = provenance(model, task, n_prompts=n_prompts, length=length, seed=seed)
    return Result("evidence.repeated_tokens", table, "probability", meta=meta)


@method(name="Copy score", paper=_PAPER, notebook="ioi_circuit")
@torch.no_grad()
def copying(model: Model, task: Task, heads: Sequence[Head], *, names: Sequence[str], top: int = 5) -> Result:
    """Whether what a head writes about a token, where it attends to nothing else, predicts that token.

    For a token t at a named position: x = the stream there after layer 0 (embedding, first attention and first MLP), as
    the model computes it; o = (norm_l(x) W_V + b_V) W_O of head (l, h) with its layer's norm; logits = the final norm
    of o, alone, unembedded. "copy" is 1 when fewer than `top` of all tokens have a logit at or above that of t,
    "anti-copy" the same with -o for o. Wang et al. found above 0.95 for the name movers of GPT-2 small, below 0.2 for
    the average head.

    Args:
        model: a decoder.
        task: with named positions.
        heads: (layer, head), query heads; each reads the values of its own key-value group.
        names: positions whose tokens are looked at, for example ["indirect_object", "subject1", "subject2"].
        top: t must be among this many.

    Returns:
        Result, one row for each head, prompt, position (`src`, a name) and `metric` ("copy", "anti-copy"); `value` is 1
        or 0, `value_rank` the number of other tokens with a logit at least as high; unit "fraction".

    Raises:
        ValueError: an unknown position or head, or none.
        NoProgramError: a model whose layers are not of the common form, or with a norm after attention (Gemma 2), where
            no head writes a part of its own.

    Cost: one forward pass up to layer 0, and 4 d_model d_vocab FLOPs for each head, prompt and position.

    Differs from the paper: the first attention is part of x, as in the paper's code.

    Example:
        >>> import torch
        >>> from interp.models import toy
        >>> task = Task("doc", ("w2 w3",), torch.tensor([[2, 3]]), "by hand", positions={"end": torch.tensor([1])})
        >>> copying(toy.induction(), task, [(1, 0)], names=["end"], top=1).grid("metric", "head")[0].to_dict()
        {'anti-copy': 0.0, 'copy': 1.0}
    """
    if not heads or not names:
        raise ValueError("copying needs at least one head and one named position.")
    unknown = [at for at in heads if not (0 <= at[0] < model.n_layers and 0 <= at[1] < model.n_heads)]
    if unknown:
        raise ValueError(
            f"head {unknown[0]} is not one of {model.name}'s: layers 0 to {model.n_layers - 1}, heads 0 to "
            f"{model.n_heads - 1}."
        )
    steps = program(model)
    prompts = torch.arange(len(task), device=task.clean.device)
    places = torch.stack([_place(task, name) for name in names])  # [name prompt]
    name = "blocks.0.hook_resid_post"
    stream = run(model, task.clean, capture=[name], mask=task.mask, stop_after=0).cache[name]
    states = stream[prompts, places].flatten(0, 1)
    tokens = task.clean[prompts, places].flatten()
    found = []
    for layer, head in heads:
        written = _written_alone(steps, layer, head, states)
        for sign in (1, -1):
            ranks = [
                rank(steps.logits(sign * written[rows]), tokens[rows])
                for rows in batches(len(states), max(1, _LOGITS_AT_ONCE // model.d_vocab))
            ]
            found.append(numbers(torch.cat(ranks)).reshape(len(names), len(task)))
    ranks_of = np.stack(found).reshape(len(heads), 2, len(names), len(task))
    at, sign_of, place, prompt = np.indices(ranks_of.shape).reshape(4, -1)
    which = np.array(heads)
    table = pd.DataFrame(
        {"prompt": prompt, "src": np.array(names, dtype=object)[place], "layer": which[at, 0], "head": which[at, 1],
         "metric": np.array(["copy", "anti-copy"], dtype=object)[sign_of],
         "value": (ranks_of < top).astype(float).ravel(), "value_rank": ranks_of.ravel()}
    )  # fmt: skip
    meta = provenance(model, task, heads=[list(each) for each in heads], names=list(names), top=top)
    return Result("evidence.copying", table, "fraction", meta=meta)


def _written_alone(steps: Program, layer: int, head: int, states: Tensor) -> Tensor:
    """What a head writes `[batch d_model]` where all its attention is on a token with this stream `[batch d_model]`."""
    group = head * steps.n_key_value_heads // steps.n_heads
    return steps.values(layer, steps.layers[layer].ln1(states))[:, group] @ steps.w_o(layer)[head]


def _place(task: Task, name: str) -> Tensor:
    place = where(task, name)
    assert place is not None
    return place
