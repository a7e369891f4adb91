"""What does a head read and write, direction by direction? Singular vectors of its two maps, read in tokens.

The value map W_V W_O says what is moved, the query-key map W_Q W_K^T what is looked for. Both have rank d_head at most:
their singular value decompositions are taken in d_head dimensions and never form a d_model x d_model matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.weights._parts import (
    Embedding,
    Head,
    Inputs,
    checked_heads,
    key_maps,
    output_maps,
    query_maps,
    require_mode,
    require_vocabulary,
    text_of,
    unembedding,
    value_maps,
)
from interp.weights.maps import PAPER

#: "ov" is the value map W_V W_O, "qk" the query-key map W_Q W_K^T.
Which = Literal["ov", "qk"]


@torch.no_grad()
def decompose(
    model: Model, head: Head, which: Which = "ov", *, fold_ln_in: bool = False, fold_ln_out: bool = False
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, " rank"], Float[Tensor, "d_model rank"]]:
    """Singular value decomposition of a head's map, left @ diag(values) @ right.T.

    Args:
        model: any model with attention.
        head: (layer, head).
        which: "ov" for W_V W_O (left is read, right is written), "qk" for W_Q W_K^T (left is of the query, right of
            the key). Keys and values are those of the head's group. Rotation is left out of "qk": it is the map at
            equal positions.
        fold_ln_in: count the norm before the head in.
        fold_ln_out: count the final norm in, for "ov".

    Returns:
        (left, values, right), float32, largest value first.

    Raises:
        ValueError: no such head, or `which` is neither.

    Cost: two QR decompositions of `[d_model d_head]` and an SVD of `[d_head d_head]`.

    Example:
        >>> from interp.models import toy
        >>> left, values, right = decompose(toy.random("llama", weights="raw"), (1, 2))
        >>> left.shape, values.shape
        (torch.Size([32, 8]), torch.Size([8]))
    """
    ((layer, at),) = checked_heads(model, [head])
    if which not in ("ov", "qk"):
        raise ValueError(f'which={which!r}: use "ov" for the value map or "qk" for the query-key map.')
    group = at * model.n_key_value_heads // model.n_heads
    if which == "ov":
        first = value_maps(model, layer, fold=fold_ln_in)[group]
        second = output_maps(model, layer, fold=fold_ln_out)[at].T
    else:
        first = query_maps(model, layer, fold=fold_ln_in)[at]
        second = key_maps(model, layer, fold=fold_ln_in)[group]
    (q_first, r_first), (q_second, r_second) = torch.linalg.qr(first), torch.linalg.qr(second)
    u, values, v = torch.linalg.svd(r_first @ r_second.T)
    return q_first @ u, values, q_second @ v.T


@method(name="Singular values of heads", paper=PAPER, notebook="maps")
def spectrum(model: Model, which: Which = "ov", *, fold_ln_in: bool = False, fold_ln_out: bool = False) -> Result:
    """How many directions each head's map really has: its singular values, and their effective number.

    The effective number is (sum s^2)^2 / sum s^4: d_head for equal values, 1 for a single one.

    Args:
        model: any model with attention.
        which: "ov" or "qk" (see `decompose`).
        fold_ln_in: count the norm before the head in.
        fold_ln_out: count the final norm in, for "ov".

    Returns:
        Result, unit "directions", a row a head: `layer head value` (effective number), `value_largest`, `value_norm`
        (Frobenius). Array "values" `[layer head rank]`.

    Raises:
        ValueError: `which` is neither.

    Cost: an SVD of `[d_head d_head]` a head.

    Differs from the paper: not part of MAPS, which it stands beside.

    Example:
        >>> from interp.models import toy
        >>> spectrum(toy.random("llama", weights="raw")).arrays["values"][1].shape
        (3, 4, 8)
    """
    found = np.stack([
        np.stack([
            decompose(model, (layer, head), which, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)[1].cpu().numpy()
            for head in range(model.n_heads)
        ])
        for layer in range(model.n_layers)
    ])  # fmt: skip
    layer, head = (axis.ravel() for axis in np.indices(found.shape[:2]))
    squares = found.reshape(-1, found.shape[2]).astype(np.float64) ** 2
    total = squares.sum(1)
    effective = np.divide(total**2, (squares**2).sum(1), out=np.zeros_like(total), where=total > 0)
    table = pd.DataFrame({
        "layer": layer, "head": head, "value": effective, "value_largest": np.sqrt(squares[:, 0]),
        "value_norm": np.sqrt(total),
    })  # fmt: skip
    meta = {**model.provenance, "which": which, "fold_ln_in": fold_ln_in, "fold_ln_out": fold_ln_out}
    return Result("svd.spectrum", table, "directions", {"values": (("layer", "head", "rank"), found)}, meta)


@method(name="Singular directions of heads, in tokens", paper=PAPER, notebook="maps")
def directions(
    model: Model,
    heads: Sequence[Head],
    which: Which = "ov",
    *,
    n_directions: int = 5,
    k: int = 10,
    embedding: Embedding = "mlp0",
    fold_ln_in: bool = False,
    fold_ln_out: bool = False,
) -> Result:
    """The tokens at both ends of the strongest singular directions of heads' maps.

    Tokens are read from input directions by e_t . u, with the effective embedding e_t of `maps.relation_scores`, and
    from output directions by v W_U. A direction and its negative are the same: both ends are given, and the "+" of
    one side belongs to the "+" of the other.

    Args:
        model: a decoder with raw weights; with processed ones both folds must be asked for.
        heads: (layer, head) pairs.
        which: "ov" (sides "reads" and "writes") or "qk" (sides "query" and "key"; without rotation).
        n_directions: directions a head, strongest first.
        k: tokens at each end.
        embedding: "mlp0" (the paper's), "raw" or "resid".
        fold_ln_in: count the norm before the head in.
        fold_ln_out: count the final norm in, for "ov".

    Returns:
        Result, unit "projection on a unit vector", heads x directions x 2 sides x 2 ends x k rows: `layer head feature`
        (number of the direction), `component` (side), `metric` ("+" or "-"), `token`, `value`, `value_singular`,
        `value_token` (its id), `value_rank`.

    Raises:
        ValueError: processed weights without both folds, no such head, more directions than d_head, k out of range.

    Cost: the first MLP on the whole vocabulary, and two `[d_vocab d_model]` x `[d_model n_directions]` a head.

    Differs from the paper: not part of MAPS, which it stands beside and whose effective embedding it takes.

    Example:
        >>> from interp.models import toy
        >>> found = directions(toy.random("llama", weights="raw"), [(1, 2)], n_directions=2, k=3)
        >>> len(found.table), sorted(set(found.table["component"]))
        (24, ['reads', 'writes'])
    """
    require_mode(model, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)
    require_vocabulary(model)
    wanted, w_u = checked_heads(model, heads), unembedding(model)
    if not (1 <= n_directions <= min(model.d_head, model.d_model) and 1 <= k <= w_u.shape[1]):
        raise ValueError(
            f"n_directions={n_directions}, k={k}: give 1 to {min(model.d_head, model.d_model)} directions, and 1 to "
            f"{w_u.shape[1]} tokens."
        )
    inputs = Inputs(model, torch.arange(w_u.shape[1], device=model.device), embedding)
    sides = ("reads", "writes") if which == "ov" else ("query", "key")
    rows: list[dict] = []
    for layer, head in dict.fromkeys(wanted):
        left, values, right = decompose(model, (layer, head), which, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)
        rowed = inputs.at(layer)
        ends = {
            sides[0]: rowed @ left[:, :n_directions],
            sides[1]: (right[:, :n_directions].T @ w_u.float()).T if which == "ov" else rowed @ right[:, :n_directions],
        }
        for side, projected in ends.items():
            for feature in range(n_directions):
                for sign, factor in (("+", 1), ("-", -1)):
                    top = (factor * projected[:, feature]).topk(k)
                    ids = top.indices.tolist()
                    rows += [
                        {
                            "layer": layer, "head": head, "feature": feature, "component": side, "metric": sign,
                            "token": token, "value": factor * value, "value_singular": float(values[feature]),
                            "value_token": index, "value_rank": rank,
                        }
                        for rank, (token, index, value) in enumerate(
                            zip(text_of(model, ids), ids, top.values.tolist(), strict=True)
                        )
                    ]  # fmt: skip
    meta = {
        **model.provenance, "which": which, "embedding": inputs.kind, "fold_ln_in": fold_ln_in,
        "fold_ln_out": fold_ln_out, "n_directions": n_directions, "k": k,
    }  # fmt: skip
    return Result("svd.directions", pd.DataFrame(rows), "projection on a unit vector", meta=meta)
