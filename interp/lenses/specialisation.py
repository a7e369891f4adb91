"""Do the heads of a layer say different things? Their average read-outs and top tokens, against exchanged heads.

A number for "specialised" needs one for heads that are not. Here it is the same statistic with the heads' labels
exchanged within each document: what heads of one distribution would give on this much text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._heads import layers_of, readings, text_meta
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.models.model import Model

#: Documents are joined to at most this many groups, in which labels are exchanged together.
_GROUPS = 32
#: Numbers of a tile of permutations: 2^21 float64 are 16 MB.
_TILE = 2**21


@method(name="Specialisation of heads", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def scores(
    model: Model,
    lens: AttentionLens,
    cached: Cached,
    *,
    layers: Sequence[int] | None = None,
    bias: bool = False,
    n_permutations: int = 199,
    seed: int = 0,
) -> Result:
    """How much the heads of a layer differ in what a lens shows of them, and how much they would by chance.

    With q_h the softmax of head h's read-out averaged over all tokens (H heads):

        divergence = mean over pairs of heads (i, j) of JS(q_i, q_j),  at most ln 2
        information = I(head; top token) = sum over h, v of P(h, v) ln(P(h, v) / (P(h) P(v))),  at most ln H

    where P counts how often v is the top token of h's read-out. Both are compared with their values when the heads'
    labels are permuted within each document, independently between documents: then no head has a distribution of its
    own, while tokens of one document, which resemble each other, stay together.

    Args:
        model: the lens's.
        lens: of any estimand.
        cached: held-out activations of at least two documents, with site "z".
        layers: None for all of the lens's.
        bias: read heads with the lens's bias. Without (default) a read-out is the head's own map alone. An independent
            lens fitted with its bias predicts the model's mean distribution with every head, so on the text that it was
            trained on the divergence is 0 whatever the heads hold.
        n_permutations: of the labels.
        seed: of the permutations.

    Returns:
        Result, unit "nats"; two rows a layer: layer, metric ("divergence", "information"), value, value_null (mean of
        the permuted), value_null_high (their 99th percentile) and value_p, (1 + number of permuted values at least as
        large) / (1 + n_permutations). Array "null" `[layer metric permutation]`.

    Raises:
        ValueError: a lens with one head a layer, a single document, or a lens of another model.

    Cost: one read-out of every head and token, 2 d_model d_vocab FLOPs each; a table `[group head d_vocab]` of at most
        32 groups of documents, and n_permutations sums over it.

    Example:
        >>> counts = torch.eye(3)[None].expand(4, -1, -1)  # four documents, three heads with a token each
        >>> exact = np.log([2, 3])
        >>> bool(np.allclose([divergence(counts[0]), information(counts[0])], exact))
        True
    """
    lens.require(model)
    cached.require(model, site="z")
    wanted = layers_of(lens, layers)
    if n_permutations < 1:
        raise ValueError(f"n_permutations={n_permutations}: a null needs at least one permutation; 199 give p = .005.")
    groups = _grouped(cached)
    rows, nulls = [], []
    for layer in tqdm(wanted, desc="specialisation", leave=False, disable=len(wanted) < 2):
        sums, tops = _gathered(model, lens, cached, layer, groups, bias)
        n_heads = sums.shape[1]
        if n_heads < 2:
            raise ValueError(f"layer {layer} of the lens has one head: there is nothing to compare it with.")
        orders = _orders(len(sums), n_heads, n_permutations, seed)
        both = torch.stack([_under(sums, orders, _pairs), _under(_counts(tops, groups, len(sums)), orders, _shared)])
        nulls.append(both[:, 1:].numpy())
        for metric, (value, null) in zip(("divergence", "information"), _split(both), strict=True):
            # Equal values come out unequal by rounding: those count as equal.
            above = int((null >= value - 1e-9).sum())
            rows.append({
                "layer": layer, "metric": metric, "value": value, "value_null": float(null.mean()),
                "value_null_high": float(np.quantile(null, 0.99)), "value_p": (1 + above) / (1 + n_permutations),
            })  # fmt: skip
    meta = text_meta(
        model, cached, estimand=lens.estimand, layers=wanted, bias=bias, n_permutations=n_permutations, seed=seed
    )
    arrays = {"null": (("layer", "metric", "permutation"), np.stack(nulls))}
    return Result("specialisation.scores", pd.DataFrame(rows), "nats", arrays, meta)


def divergence(sums: Float[Tensor, "head d_vocab"]) -> float:
    """Mean Jensen-Shannon divergence of the pairs of heads, in nats.

    Args:
        sums: of each head's distributions; normalised here.

    Returns:
        From 0 (all equal) to ln 2 (no token in common).
    """
    return float(_under(sums[None], _orders(1, len(sums), 0, 0), _pairs)[0])


def information(counts: Float[Tensor, "head d_vocab"] | Int[Tensor, "head d_vocab"]) -> float:
    """Mutual information of the head and the token, in nats, by the counts' plug-in estimate.

    Args:
        counts: how often each head had each token; every head as often.

    Returns:
        From 0 to ln(number of heads).
    """
    return float(_under(counts[None], _orders(1, len(counts), 0, 0), _shared)[0])


def _grouped(cached: Cached) -> Tensor:
    """The number of the group of documents of each token `[token]`, whole documents each."""
    names, number = torch.unique(torch.as_tensor(cached.document), return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            "the activations are of one document, within which heads are exchanged together: that is no permutation. "
            "Cache two documents or more."
        )
    return number * min(_GROUPS, len(names)) // len(names)


def _gathered(
    model: Model, lens: AttentionLens, cached: Cached, layer: int, groups: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """Sums of the heads' distributions `[group head d_vocab]`, and their top tokens `[token head]`."""
    sums: Tensor | None = None
    tops = []
    for rows, logits in readings(model, lens, cached, layer, bias=bias):
        if sums is None:
            sums = logits.new_zeros(int(groups.max()) + 1, *logits.shape[1:])
        tops.append(logits.argmax(-1).cpu())
        own = groups[rows].to(logits.device)
        found = logits.softmax(-1)
        for group in own.unique().tolist():
            sums[group] += found[own == group].sum(0)
    assert sums is not None
    return sums, torch.cat(tops)


def _counts(tops: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """How often each head had each of the tokens seen, `[group head seen]`."""
    seen, number = torch.unique(tops, return_inverse=True)
    n_heads = tops.shape[1]
    place = (groups[:, None] * n_heads + torch.arange(n_heads)) * len(seen) + number
    flat = torch.bincount(place.flatten(), minlength=n_groups * n_heads * len(seen))
    return flat.view(n_groups, n_heads, len(seen)).float()


def _orders(n_groups: int, n_heads: int, n: int, seed: int) -> Tensor:
    """Labels of the heads `[1 + n group head]`: first as they are, then permuted in each group."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n, n_groups, n_heads, generator=generator).argsort(-1)
    return torch.cat([torch.arange(n_heads).expand(1, n_groups, -1), drawn])


def _under(sums: Tensor, orders: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic of the heads' distributions under each order, `[order]`, tile by tile of the vocabulary."""
    n_orders, n_groups, n_heads = orders.shape
    # As a matrix of zeros and ones [order head, group head] the exchange of heads is one product.
    chosen = torch.nn.functional.one_hot(orders, n_heads).transpose(1, 2).reshape(n_orders * n_heads, -1)
    chosen = chosen.to(sums.device, torch.float64)
    flat = sums.flatten(0, 1)
    totals = chosen @ flat.sum(-1, keepdim=True, dtype=torch.float64)
    found = torch.zeros(n_orders, dtype=torch.float64, device=sums.device)
    for tile in batches(flat.shape[-1], max(1, _TILE // len(chosen))):
        found += statistic((chosen @ flat[:, tile].double() / totals).unflatten(0, (n_orders, n_heads)))
    return found.cpu()


def _pairs(p: Tensor) -> Tensor:
    """A tile's part of the mean divergence of all pairs: `[order]` of distributions `[order head token]`."""
    n_heads = p.shape[1]
    mixed = sum(_plogp((p[:, i] + p[:, j]) / 2) for i, j in combinations(range(n_heads), 2))
    return _plogp(p).sum(1) / n_heads - mixed / (n_heads * (n_heads - 1) / 2)


def _shared(p: Tensor) -> Tensor:
    """A tile's part of the mutual information of a uniform head and its token."""
    return _plogp(p).sum(1) / p.shape[1] - _plogp(p.mean(1))


def _plogp(p: Tensor) -> Tensor:
    return (p * p.clamp(min=1e-300).log()).sum(-1)  # half the time of xlogy


def _split(both: Tensor) -> list[tuple[float, np.ndarray]]:
    return [(float(row[0]), row[1:].numpy()) for row in both]
