"""What do heads see of a word in a prompt? The values at its place and what they mix at the prompt's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.batching import batches
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.tasks._prompts import last_tokens
from interp.tasks.relations import Pair

# Prompts of one forward pass, of which each layer's z at one position is kept.
_FORWARD = 64


class Prompts(NamedTuple):
    """Different prompts, and which of them each pair has with each template.

    Attributes:
        texts: `[n]`.
        position: of the source's last token in each, from the first token (special ones count), `[n]`.
        index: `[pair template]`.
    """

    texts: list[str]
    position: np.ndarray
    index: np.ndarray


def prompts_of(model: Model, pairs: Sequence[Pair], templates: Sequence[str]) -> Prompts:
    """The different prompts, and where the source ends in each: counted on the text before its end."""
    _check(templates)
    number: dict[tuple[int, str], int] = {}
    index = np.array([
        [number.setdefault((j, pair.source), len(number)) for j in range(len(templates))] for pair in pairs
    ])  # fmt: skip
    texts, position = [], np.empty(len(number), dtype=np.int64)
    for (j, source), i in number.items():
        before, after = templates[j].split("{source}")
        texts.append(before + source + after)
        position[i] = last_tokens(model, [before + source, after], None)[0]
    return Prompts(texts, position, index)


def read(
    model: Model, texts: Sequence[str], position: np.ndarray, layers: Sequence[int]
) -> tuple[Float[Tensor, "layer prompt head d_head"], Float[Tensor, "layer prompt kv d_head"]]:
    """What heads mix at the last position, and the values at another, from one forward pass.

    Args:
        model: a decoder.
        texts: the prompts.
        position: of the values in each prompt, from its first token (special ones count), `[prompt]`.
        layers: which.

    Returns:
        (z at the last position, v at the position given), in the model's type.

    Cost: one forward pass up to the last layer asked for; memory for what is returned.
    """
    parts = [_read(model, texts[rows], position[rows], layers) for rows in batches(len(texts), _FORWARD)]
    return torch.cat([z for z, _ in parts], 1), torch.cat([v for _, v in parts], 1)


def _read(model: Model, texts: Sequence[str], position: np.ndarray, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    ids, mask = model.tokenize(texts)
    at: Int[Tensor, " prompt"] = torch.as_tensor(position, device=ids.device) + (mask == 0).sum(1)  # padding is left
    row = torch.arange(len(ids), device=ids.device)
    kept: dict[str, Tensor] = {}

    def keep(name: str, where: Tensor | int) -> tuple[str, HookFn]:
        def note(activation: Tensor, hook: object) -> None:
            kept[name] = activation[row, where].detach()

        return name, note

    hooks = [keep(hook_name("z", layer), -1) for layer in layers]
    hooks += [keep(hook_name("v", layer), at) for layer in layers]
    run(model, ids, hooks=hooks, mask=mask, stop_after=max(layers))
    z, v = (torch.stack([kept[hook_name(site, layer)] for layer in layers]) for site in ("z", "v"))
    # Some wrappers show a group's values once for each of its heads.
    return z, v[:, :, :: v.shape[2] // model.n_key_value_heads]


def _check(templates: Sequence[str]) -> None:
    if not templates:
        raise ValueError(
            "these relations have no templates that fit each of them (those of interp.tasks.relations have): give "
            'templates=["This is a document about {source}"].'
        )
    for template in templates:
        if template.count("{source}") != 1 or template != template.rstrip():
            raise ValueError(f"the template {template!r} needs {{source}} in it once and no space at its end.")
    if len(set(templates)) < len(templates):
        raise ValueError(f"a template is given twice in {list(templates)}; give each once.")
