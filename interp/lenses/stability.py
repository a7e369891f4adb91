"""Does a lens show the same tokens when it is trained on other text? The overlap of two lenses' top tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._heads import layers_of, readings, text_meta
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.models.model import Model


@method(name="Lenses: stability", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def overlap(
    model: Model,
    one: AttentionLens,
    other: AttentionLens,
    cached: Cached,
    *,
    k: int = 10,
    layers: Sequence[int] | None = None,
    bias: bool = False,
    seed: int = 0,
) -> Result:
    """How far two lenses of the same heads agree on the k top tokens of a position.

    With S and T the k top tokens of head h's read-out A_h z_h in the two lenses, the overlap is Jaccard's,
    |S and T| / |S or T|, averaged over the tokens of a document. Lenses trained on disjoint halves of a text should
    agree where they read the head, and no more than by chance elsewhere, so the overlap of one lens with the other's
    reading of the next head, and of another position, stands beside it.

    Args:
        model: the lenses'.
        one: trained on one half of the text.
        other: trained on the other half.
        cached: activations (site "z") of a text that neither was trained on.
        k: top tokens.
        layers: None for all that both have.
        bias: read with the lenses' biases. They list the text's common tokens in both, for every head.
        seed: of the choice of other positions.

    Returns:
        Result, unit "overlap (Jaccard)"; one row a document and head: prompt (number of the document), layer, head,
        value, value_other_head, value_other_position (missing with one head a layer, or one token) and value_tokens.

    Raises:
        ValueError: lenses of other models, of layers that one has not, or k beyond the vocabulary.

    Cost: two read-outs of every head and token, 2 d_model d_vocab FLOPs each, and their top k.
    """
    for lens in (one, other):
        lens.require(model)
    cached.require(model, site="z")
    shared = [layer for layer in one.layers if layer in other.layers]
    wanted = layers_of(one, shared if layers is None else layers)
    layers_of(other, wanted)
    if not 1 <= k <= model.d_vocab:
        raise ValueError(f"k={k}: compare from 1 to {model.d_vocab} top tokens.")
    document = cached.document.cpu().numpy()
    frames = []
    for layer in tqdm(wanted, desc="stability", leave=False, disable=len(wanted) < 2):
        tops = [
            torch.cat(
                [logits.topk(k, -1).indices.cpu() for _, logits in readings(model, lens, cached, layer, bias=bias)]
            )
            for lens in (one, other)
        ]
        n_tokens, n_heads = tops[0].shape[:2]
        # Each token with the one at a random distance, the same for all: no token is its own other.
        away = int(torch.randint(1, max(2, n_tokens), (1,), generator=torch.Generator().manual_seed(seed)))
        found = {
            "value": jaccard(*tops),
            "value_other_head": jaccard(tops[0], tops[1].roll(1, 1)) if n_heads > 1 else None,
            "value_other_position": jaccard(tops[0], tops[1].roll(away, 0)) if n_tokens > 1 else None,
        }
        for head in range(n_heads):
            own = {name: np.nan if each is None else each[:, head].numpy() for name, each in found.items()}
            frame = pd.DataFrame({"prompt": document, **own})
            means = frame.groupby("prompt", as_index=False).mean()
            frames.append(means.assign(layer=layer, head=head, value_tokens=frame.groupby("prompt").size().to_numpy()))
    columns = ["prompt", "layer", "head", "value", "value_other_head", "value_other_position", "value_tokens"]
    table = pd.concat(frames, ignore_index=True)[columns]
    meta = text_meta(model, cached, estimands=[one.estimand, other.estimand], k=k, bias=bias, seed=seed)
    return Result("stability.overlap", table, "overlap (Jaccard)", meta=meta)


def jaccard(one: Int[Tensor, "*row k"], other: Int[Tensor, "*row k"]) -> Float[Tensor, "*row"]:
    """|S and T| / |S or T| of sets given as rows of k different ids.

    Args:
        one: S.
        other: T.

    Returns:
        From 0 to 1.

    Example:
        >>> jaccard(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 4, 1]])).tolist()
        [0.5]
    """
    both = (one[..., :, None] == other[..., None, :]).sum((-1, -2)).float()
    return both / (2 * one.shape[-1] - both)
