"""Which heads lean towards some words? A lens's logits of one set of words against another, head by head."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._final import final_norm
from interp.lenses._output import output
from interp.lenses._reading import as_task
from interp.lenses.attention import AttentionLens
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.patching._inputs import provenance
from interp.tasks.task import Task

#: Positions whose activations are in memory together.
_TOKENS = 4096


@method(name="Contrast of words in a lens", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def contrast(
    model: Model,
    lens: AttentionLens,
    task: Task,
    first: Int[Tensor, "*own word"],
    second: Int[Tensor, "*others other_word"] | None = None,
    *,
    position: str = "end",
) -> Result:
    """How much each head, through its lens, prefers some words to others at one position.

    value = mean over `first` of A_h z_h less its mean over `second`, in logits. Biases are left out: they lean alike in
    every prompt. Between prompts that differ in one respect, the difference of values is what the head makes of that.

    Args:
        model: the lens's own.
        lens: of attention heads; all its layers are read.
        task: prompts.
        first: ids of words, `[word]`, or `[batch word]` for words of each prompt.
        second: likewise; None for the whole vocabulary.
        position: named position of the task that is read; "end" is the last token where it has none of that name.

    Returns:
        Result, one row a prompt, layer and head: `prompt layer head value`; unit "logits". Array "value"
        `[prompt layer head]`, layers in the order of `lens.layers`.

    Raises:
        ValueError: a lens of another model, a position that the task has not, ids that the model has not, or no words.

    Cost: one forward pass without the unembedding.

    Example:
        >>> from interp.lenses.attention import direct
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> task = induction(model, 4, 5)
        >>> found = contrast(model, direct(model), task, task.answers[:, None], task.wrong[:, None])
        >>> found.grid("layer", "head").to_numpy().argmax().item()
        2
    """
    lens.require(model)
    task = as_task(model, task)
    where = _where(task, position)
    for words in (first, second):
        if words is not None and words.ndim == 2 and len(words) != len(task):
            raise ValueError(f"words of {len(words)} prompts were given for {len(task)}: give [word], or [batch word].")
    direction = None
    if lens.form == "low_rank":
        direction = _difference(output(model).unembed.T, first, second, slice(0, len(task)), model)
    norm, last = final_norm(model), hook_name("resid_post", model.n_layers - 1)
    hooks = {layer: hook_name("z", layer) for layer in lens.layers}
    parts: list[Tensor] = []
    spans = list(batches(len(task), max(1, _TOKENS // task.clean.shape[1])))
    for span in tqdm(spans, desc="Contrast", leave=False, disable=len(spans) < 2):
        part = task[span]
        cache = run(
            model, part.clean, capture=[*hooks.values(), last], mask=part.mask, stop_after=model.n_layers - 1
        ).cache
        at = torch.arange(len(part), device=model.device), where[span].to(model.device)
        stream = cache[last][at]
        scale = norm.inverse_scale(stream.float(), norm.norm(stream).float())
        found = []
        for layer, hook in hooks.items():
            z = cache[hook][at].float()
            if direction is not None:
                written = lens.written(layer, z, scale=scale)
                own = direction if direction.ndim == 1 else direction[span, None]
                found.append((written * own).sum(-1))
            else:
                maps = lens.maps[layer].to(z)  # [head d_head d_vocab]
                towards = _difference(maps.permute(2, 0, 1), first, second, span, model)
                found.append((z * towards).sum(-1))
        parts.append(torch.stack(found, 1))
    value = torch.cat(parts).double().cpu().numpy()
    prompts, layers, heads = (index.ravel() for index in torch.meshgrid(
        *(torch.arange(n) for n in value.shape), indexing="ij"
    ))  # fmt: skip
    table = pd.DataFrame({
        "prompt": prompts.numpy(), "layer": torch.tensor(lens.layers)[layers].numpy(), "head": heads.numpy(),
        "value": value.ravel(),
    })  # fmt: skip
    meta = provenance(model, task, position=position, estimand=lens.estimand, form=lens.form, lens=dict(lens.meta))
    return Result(
        "contrast.contrast", table, "logits", arrays={"value": (("prompt", "layer", "head"), value)}, meta=meta
    )


def _where(task: Task, position: str) -> Tensor:
    if position in task.positions:
        return task.positions[position]
    if position != "end":
        raise ValueError(
            f"task {task.name!r} has no position {position!r}, only {', '.join(task.positions) or 'none'}."
        )
    return torch.full((len(task),), task.clean.shape[1] - 1)


def _difference(vectors: Tensor, first: Tensor, second: Tensor | None, span: slice, model: Model) -> Tensor:
    """Mean vector `[d_vocab ...]` of some words less that of others, for the prompts of a span."""
    other = vectors.float().mean(0) if second is None else _mean(vectors, second, span, model)
    return _mean(vectors, first, span, model) - other


def _mean(vectors: Tensor, words: Tensor, span: slice, model: Model) -> Tensor:
    """Mean of the vectors `[d_vocab ...]` of some words, `[...]`, or `[batch ...]` for words of each prompt."""
    if not words.numel():
        raise ValueError("no words were given: name at least one token id on each side.")
    if int(words.min()) < 0 or int(words.max()) >= model.d_vocab:
        raise ValueError(
            f"token ids run from {int(words.min())} to {int(words.max())}, but {model.name} has 0 to "
            f"{model.d_vocab - 1}: was the task made with another tokenizer?"
        )
    own = words if words.ndim == 1 else words[span]
    return vectors[own.to(vectors.device)].float().mean(own.ndim - 1)
