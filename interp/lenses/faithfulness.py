"""Does a lens tell what the model loses without the head? Its prediction beside the true change of the output.

A lens of a head says what the head's activation z means in terms of tokens: A z. If that is what the head *does*, then
setting z to its mean must change the model's output by A (mean - z). A lens that predicts well can fail here: the lens
of a head that suppresses a token, trained alone, shows that token, since the head's activity announces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.edits import Cell, Edit
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import rerun, trace
from interp.core.result import Result
from interp.lenses._heads import Head, contributions, end_of, heads_of, mean_z, provenance_of, scale_of
from interp.lenses._reading import as_task
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._paths import scaled_as
from interp.tasks.task import Task

#: Logits of changed runs that are in memory together: 2^26 float32 are 256 MB.
_ROOM = 2**26

METRICS = ("spearman", "sign agreement")


@method(name="Lenses against ablation", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def ablation(
    model: Model,
    task: Task | Tensor,
    lenses: Mapping[str, AttentionLens],
    *,
    reference: Cached,
    heads: Sequence[Head] | None = None,
    top: int = 10,
    frozen_norm: bool = False,
) -> Result:
    """What lenses predict of setting a head to its mean, beside what it does to the model.

    The head's z at the end of the prompt is set to its mean over a reference text. The true change of the
    log-probabilities over the vocabulary is taken twice: "total", with everything after the head computed again, and
    "direct", with all later heads and MLPs held, so that only the head's own part of the last stream changes. With A
    the lens's map and p the clean prediction, the lens predicts

        s = A (mean - z),  change of log-probabilities = s - ln sum_v p_v exp(s_v).

    They are compared over the vocabulary by Spearman's rank correlation, and over the `top` most probable tokens of the
    clean run by the share whose change has the predicted sign. A lens's bias plays no part. The change of other
    positions' predictions is not looked at.

    Args:
        model: a decoder, the lenses'.
        task: prompts or token ids `[batch pos]`; read at the position "end", else the last.
        lenses: by name, for example {"additive": trained, "direct": direct(model), "random":
            controls.randomised(trained)}. A random lens is what the numbers must be compared with: the sign agrees by
            chance half of the time.
        reference: activations (site "z") whose mean is put in place of z.
        heads: (layer, head); None for all that all lenses have.
        top: tokens whose sign is compared.
        frozen_norm: let the final norm divide by the clean run's scale in direct effects. They are then exactly what a
            direct lens says, so that this checks the code and not the lens.

    Returns:
        Result, unit "correlation, or share of tokens"; four rows a prompt, head and lens: prompt, layer, head,
        component (the lens), target ("total" or "direct"), metric ("spearman" or "sign agreement"), value, and
        value_kl, the KL divergence of the clean prediction from that without the head (nats): where it is next to 0
        there is nothing to predict. NaN where nothing changes at all.

    Raises:
        ValueError: no lenses, a head that one has not, a lens or a text of another model.
        NoProgramError: a model whose layers are not of the common form, or whose heads do not add up.

    Cost: two forward passes, then for each head the layers after it at one position, and two sorts of the vocabulary
        for each head, prompt and lens. Memory: 512 MB of logits.

    Example: see `interp.lenses.steering` for the other direction: from a lens to the model.
    """
    steps = program(model)
    task = as_task(model, task)
    wanted = heads_of(model, lenses, heads)
    reference.require(model, site="z")
    if not 1 <= top <= model.d_vocab:
        raise ValueError(f"top={top}: compare the signs of 1 to {model.d_vocab} tokens.")
    means = {layer: mean_z(reference, layer) for layer in sorted({layer for layer, _ in wanted})}
    at_once = max(1, _ROOM // model.d_vocab)
    size = max(1, at_once // len(wanted))
    tables = []
    for rows in tqdm(list(batches(len(task), size)), desc="faithfulness", leave=False, disable=len(task) <= size):
        some = task[rows]
        run = _Clean.of(steps, some, wanted)
        for part in batches(len(wanted), max(1, at_once // len(some))):
            for (layer, head), total, direct in _changed(run, wanted[part], means, frozen_norm):
                less = means[layer] - run.z[layer]
                predicted = {
                    name: _normalised(contributions(model, lens, layer, less, run.scale, head)[:, 0], run.clean)
                    for name, lens in lenses.items()
                }
                for target, true in (("total", total), ("direct", direct)):
                    frame = _compared(predicted, true, run.clean, top)
                    frame["prompt"] += rows.start
                    tables.append(frame.assign(layer=layer, head=head, target=target))
    columns = ["prompt", "layer", "head", "component", "target", "metric", "value", "value_kl"]
    table = pd.concat(tables, ignore_index=True)[columns]
    table = table.sort_values(["prompt", "layer", "head"], kind="stable", ignore_index=True)
    meta = provenance_of(model, task, lenses, reference=reference.fingerprint, top=top, frozen_norm=frozen_norm)
    return Result("faithfulness.ablation", table, "correlation, or share of tokens", meta=meta)


class _Clean(NamedTuple):
    """What the unchanged run has at the position that is read.

    `task` and `where` `[batch]`; `z` {layer: `[batch head d_head]`}; `final` `[batch d_model]`, the last stream;
    `clean` `[batch d_vocab]`, log-probabilities; `scale` `[batch]`, see `Cached.scale`.
    """

    steps: Program
    task: Task
    where: Tensor
    z: Mapping[int, Tensor]
    final: Tensor
    clean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, steps: Program, task: Task, heads: Sequence[Head]) -> _Clean:
        tokens, rows = task.clean, torch.arange(len(task), device=task.clean.device)
        where = end_of(task)
        last = ("resid_post", len(steps.layers) - 1)
        seen = trace(steps, tokens, task.mask, {last} | {("z", layer) for layer, _ in heads})
        at = {place: activation[rows, where] for place, activation in seen.items()}
        final = at.pop(last)
        z = {layer: activation.float() for (_, layer), activation in at.items()}
        return cls(steps, task, where, z, final, _log_probs(steps.logits(final)), scale_of(steps.model, final))


def _changed(
    run: _Clean, heads: Sequence[Head], means: Mapping[int, Tensor], frozen_norm: bool
) -> Iterator[tuple[Head, Tensor, Tensor]]:
    """Each head with the true changes of the log-probabilities `[batch d_vocab]`: total and direct."""
    steps, n = run.steps, len(run.task)
    cells: list[Cell] = [
        [Edit("z", layer, head=head, pos=run.where, value=means[layer][head].expand(n, -1))] for layer, head in heads
    ]
    whole = Readout("logits", "logits", run.where, None, lambda logits, rows: logits)
    ablated = rerun(steps.model, run.task.clean, cells, whole, mask=run.task.mask, exact_path="rerun")
    for (layer, head), logits in zip(heads, ablated, strict=True):
        less = (means[layer][head] - run.z[layer][:, head]).to(run.final.dtype) @ steps.w_o(layer)[head]
        held = steps
        if frozen_norm:
            held = replace(steps, final_norm=partial(scaled_as, steps.final_norm, others=run.final))
        direct = _log_probs(held.logits(run.final + less))
        yield (layer, head), _log_probs(logits) - run.clean, direct - run.clean


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _normalised(change: Tensor, clean: Tensor) -> Tensor:
    """A change of logits as one of log-probabilities."""
    return change - (clean + change).logsumexp(-1, keepdim=True)


def _compared(predicted: Mapping[str, Tensor], true: Tensor, clean: Tensor, top: int) -> pd.DataFrame:
    """The rows of one head and kind of effect; all `[batch d_vocab]`."""
    likely = clean.topk(top, -1).indices
    ranks = _ranks(true)
    kl = -(clean.exp() * true).sum(-1).clamp(max=0.0)
    frames = []
    for name, change in predicted.items():
        agreed = (change.gather(-1, likely).sign() == true.gather(-1, likely).sign()).float().mean(-1)
        for metric, values in zip(METRICS, (_correlation(_ranks(change), ranks), agreed), strict=True):
            frames.append(
                pd.DataFrame({
                    "prompt": range(len(true)), "component": name, "metric": metric,
                    "value": values.double().cpu().numpy(), "value_kl": kl.double().cpu().numpy(),
                })
            )  # fmt: skip
    return pd.concat(frames)


def _ranks(values: Float[Tensor, "*row token"]) -> Float[Tensor, "*row token"]:
    """Ranks from 0, equal values at the mean of theirs. Half the time of scipy's, on any device."""
    ordered, order = values.sort(-1)
    n = values.shape[-1]
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = torch.ones_like(starts)
    ends[..., :-1] = starts[..., 1:]
    place = torch.arange(n, device=values.device).expand_as(order)
    first = torch.where(starts, place, 0).cummax(-1).values
    last = torch.where(ends, place, n).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(values).scatter_(-1, order, (first + last).to(values.dtype) / 2)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of rows, NaN where one is constant."""
    one, other = ((part - part.mean(-1, keepdim=True)).double() for part in (one, other))
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
