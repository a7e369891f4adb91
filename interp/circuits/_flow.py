"""How large a share of a vector is each of its parts? Proximities in L1 and L2, and the shares of one layer.

The slow part is one sum for each head, query and key: || y_i - a_ij u_j ||, with a the attention and u_j what the head
writes of the value at j. The vectors a_ij u_j are never all there: tiles of a few queries and keys stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.batching import batches
from interp.models.program import Program

#: Numbers in a tile: about 1 MB, which a core keeps in its cache; a GPU rather wants few launches.
_TILE = {"cpu": 2**18}
_TILE_ELSEWHERE = 2**24
_QUERIES = 16


class Flow(NamedTuple):
    """Importances in one layer for one prompt, each from 0 to 1.

    At each position `attn` (over heads and keys) and `resid_attn` sum to 1, and `mlp` and `resid_mlp` do; or all are 0,
    where no part points along the sum.

    Attributes:
        attn: `[head q_pos k_pos]`, in the stream after attention.
        resid_attn: `[pos]`, of the stream before attention in that after it.
        mlp: `[pos]`, in the stream after the MLP.
        resid_mlp: `[pos]`, of the stream before the MLP in that after it.
        pattern: `[head q_pos k_pos]`, the attention.
    """

    attn: Float[Tensor, "head q_pos k_pos"]
    resid_attn: Float[Tensor, " pos"]
    mlp: Float[Tensor, " pos"]
    resid_mlp: Float[Tensor, " pos"]
    pattern: Float[Tensor, "head q_pos k_pos"]


def proximity(
    parts: Float[Tensor, "... part d_model"], whole: Float[Tensor, "... d_model"], norm: int
) -> Float[Tensor, "... part"]:
    """||y|| - ||y - z|| of each part z of y, before anything is cut off."""
    apart = torch.linalg.vector_norm(whole[..., None, :] - parts, norm, dim=-1)
    return torch.linalg.vector_norm(whole, norm, dim=-1)[..., None] - apart


def head_proximity(
    whole: Float[Tensor, "q_pos d_model"],
    pattern: Float[Tensor, "head q_pos k_pos"],
    written: Float[Tensor, "head k_pos d_model"],
    norm: int,
) -> Float[Tensor, "head q_pos k_pos"]:
    """||y_i|| - ||y_i - a_ij u_j|| of every head, query i and key j <= i; what stands at other keys has no meaning.

    Args:
        whole: y.
        pattern: a.
        written: u, what each head writes of the value at each key.
        norm: 1 or 2.
    """
    if norm == 2:
        size = torch.linalg.vector_norm(whole, dim=-1)[None, :, None]
        # From |y - z|^2 = |y|^2 - 2 y z + |z|^2; as a quotient, because the difference of two norms would be rounding.
        dots = torch.einsum("qd,hkd->hqk", whole, written) * pattern
        gain = 2 * dots - pattern.square() * written.square().sum(-1)[:, None]
        return gain / (size + (size.square() - gain).clamp(min=0).sqrt()).clamp(min=torch.finfo(whole.dtype).tiny)
    # Both norms by the same sum: many parts are next to nothing, and two roundings of ||y|| would add up over them.
    return whole.abs().sum(-1)[None, :, None] - _l1(whole, pattern, written)


def _l1(whole: Tensor, pattern: Tensor, written: Tensor) -> Tensor:
    """|| y_i - a_ij u_j ||_1 for j <= i, and for some j after i."""
    (n_heads, n_q, n_k), d_model = pattern.shape, whole.shape[-1]
    n_keys = max(1, _TILE.get(whole.device.type, _TILE_ELSEWHERE) // (_QUERIES * d_model))
    found = whole.new_zeros(n_heads, n_q, n_k)
    memory = whole.new_empty(_QUERIES * min(n_keys, n_k) * d_model)
    for queries in batches(n_q, _QUERIES):
        for keys in batches(min(n_k, queries.stop), n_keys):
            shape = (queries.stop - queries.start, keys.stop - keys.start, d_model)
            tile = memory[: shape[0] * shape[1] * shape[2]].view(shape)
            for head in range(n_heads):
                torch.addcmul(
                    whole[queries, None], pattern[head, queries, keys, None], written[head, None, keys], value=-1,
                    out=tile,
                )  # fmt: skip
                torch.sum(tile.abs_(), -1, out=found[head, queries, keys])
    return found


def layer_flow(steps: Program, layer: int, seen: dict[str, Tensor], row: int, norm: int, floor: float) -> Flow:
    """The importances of one layer for one prompt of a batch.

    Args:
        steps: of the model.
        layer: counted from 0.
        seen: what `Program.layer` returned, and "allowed" `[batch q_pos k_pos]`.
        row: which prompt.
        norm: 1 or 2.
        floor: the smallest proximity of a part.
    """
    before, middle, after, written_by_mlp = (
        seen[site][row].float() for site in ("resid_pre", "resid_mid", "resid_post", "mlp_out")
    )
    pattern = seen["pattern"][row].float()
    groups = steps.n_heads // steps.n_key_value_heads
    values = seen["v"][row].float().repeat_interleave(groups, 1)
    written = torch.einsum("khe,hed->hkd", values, steps.w_o(layer).float()).contiguous()
    heads = head_proximity(middle, pattern, written, norm).clamp(min=floor)
    heads = torch.where(seen["allowed"][row], heads, 0)
    stream = proximity(before[:, None], middle, norm)[:, 0].clamp(min=floor)
    pair = proximity(torch.stack([written_by_mlp, middle], 1), after, norm).clamp(min=floor)
    attn_share = _one_over(heads.sum((0, 2)) + stream)
    mlp_share = _one_over(pair.sum(1))
    return Flow(
        heads.mul_(attn_share[:, None]), stream * attn_share, pair[:, 0] * mlp_share, pair[:, 1] * mlp_share, pattern
    )


def _one_over(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, torch.inf).reciprocal()


def flows(
    steps: Program, tokens: Tensor, mask: Tensor | None, *, norm: int, floor: float
) -> Iterator[tuple[int, int, Flow]]:
    """(layer, prompt, importances) of a batch of prompts, layer by layer from the first.

    Args:
        steps: of the model.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None. What is given for padding has no meaning.
        norm: 1 or 2.
        floor: the smallest proximity of a part.
    """
    frame = steps.frame(tokens, mask)
    stream = steps.embed(tokens, mask)
    for layer in range(len(steps.layers)):
        seen = steps.layer(layer, stream, frame)
        seen["allowed"] = steps.allowed(layer, frame)
        stream = seen["resid_post"]
        for row in range(len(tokens)):
            yield layer, row, layer_flow(steps, layer, seen, row, norm, floor)


class Edges(NamedTuple):
    """The edges of one layer of one prompt that are larger than tau; the values of the others are 0.

    Attributes:
        head, query, key: `[edge]` each, of the attention edges.
        value: `[edge]`, their importance.
        resid_attn, mlp, resid_mlp: `[pos]`, as of `Flow`.
    """

    head: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    resid_attn: Tensor
    mlp: Tensor
    resid_mlp: Tensor


def cut(flow: Flow, tau: float, *, renormalise: bool) -> Edges:
    """Drop what is not larger than tau.

    Args:
        flow: of a layer.
        tau: from 0 to 1.
        renormalise: whether what is left at each position is divided by its sum.
    """
    head, query, key = (flow.attn > tau).nonzero(as_tuple=True)
    value = flow.attn[head, query, key]
    resid_attn, mlp, resid_mlp = (
        torch.where(share > tau, share, 0) for share in (flow.resid_attn, flow.mlp, flow.resid_mlp)
    )
    if renormalise:
        at_attn = _one_over(resid_attn.index_add(0, query, value))
        at_mlp = _one_over(mlp + resid_mlp)
        value, resid_attn, mlp, resid_mlp = (
            value * at_attn[query], resid_attn * at_attn, mlp * at_mlp, resid_mlp * at_mlp,
        )  # fmt: skip
    return Edges(head, query, key, value, resid_attn, mlp, resid_mlp)


class Reached(NamedTuple):
    """The nodes of one layer that are in the graph of each start, `[start pos]` each."""

    middle: Bool[Tensor, "start pos"]
    after: Bool[Tensor, "start pos"]


def walk(layers: list[Edges], starts: Tensor, *, parallel: bool) -> list[Reached]:
    """Follow the edges down from the stream after the last layer.

    Args:
        layers: the edges of each layer.
        starts: `[start]`, the position at which each graph starts.
        parallel: whether MLPs read the stream before attention.

    Returns:
        The nodes reached, by layer: the streams after attention ("middle") and after the MLP.
    """
    n_pos = len(layers[0].mlp)
    after = torch.arange(n_pos, device=starts.device) == starts[:, None]
    reached = []
    for edges in reversed(layers):
        by_mlp = after & (edges.mlp > 0)
        middle = after & (edges.resid_mlp > 0)
        if not parallel:
            middle = middle | by_mlp
        reached.append(Reached(middle, after))
        looks = torch.zeros(n_pos, n_pos, device=starts.device)
        looks[edges.query, edges.key] = 1
        after = (middle.float() @ looks > 0) | (middle & (edges.resid_attn > 0))
        if parallel:
            after = after | by_mlp
    return reached[::-1]
