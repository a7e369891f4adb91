"""Which tokens does a head answer to, and what does it make of them? Saliency, and the strongest entries of its map.

The part of MAPS (arXiv 2412.11965) that needs no list of relations: a token is salient for a head that writes much for
it, and what the head does is read from the largest entries in the rows of its salient tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.batching import batches, sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.weights._parts import (
    Embedding,
    Head,
    Inputs,
    checked_heads,
    checked_layers,
    output_maps,
    require_mode,
    text_of,
    unembedding,
    value_maps,
)
from interp.weights.maps import PAPER

# Tokens at once where all are asked for: their values of a layer stay in a processor's cache.
_TOKENS = 1024
# A tile of the atlas, sources x targets, is 2 MB; of each `_GROUP` neighbouring targets only the largest is sorted.
_ATLAS_ROWS, _ATLAS_COLUMNS, _GROUP = 256, 2048, 16


@method(name="MAPS: saliency", paper=PAPER, notebook="maps")
def saliency(
    model: Model,
    *,
    embedding: Embedding = "mlp0",
    fold_ln_in: bool = False,
    fold_ln_out: bool = False,
    layers: Sequence[int] | None = None,
) -> Result:
    """How much each head writes for each token of the vocabulary, and how unevenly.

    sigma_t = |e_t W_V W_O| / |e_t| for the effective embedding e_t of token t (see `maps.relation_scores`). The norm
    needs only the Gram matrix of W_O: |z W_O|^2 = z (W_O W_O^T) z^T, with its triangular factor taken by QR, so that
    d_head x d_head numbers do for d_head x d_model. Unevenness of sigma over the tokens: Fisher's skewness
    m3 / m2^1.5; the Gini coefficient; and the effective number of tokens (sum sigma^2)^2 / sum sigma^4.

    Args:
        model: a decoder with raw weights; with processed ones both folds must be asked for.
        embedding: "mlp0" (the paper's), "raw" or "resid".
        fold_ln_in: count the norm before the head in; |e_t| stays that of the input of the norm.
        fold_ln_out: count the final norm in.
        layers: which layers; None for all.

    Returns:
        Result, unit "output per input", a row a head: `layer head value` (mean sigma), `value_largest`,
        `value_skewness`, `value_gini`, `value_tokens`. Array "saliency" `[layer head token]`, float32.

    Raises:
        ValueError: processed weights without both folds, no unembedding, no such layer.

    Cost: the first MLP on the whole vocabulary; d_vocab x (2 d_model d_head a group + 2 d_head^2 a head) FLOPs a layer;
        memory for the effective embedding `[d_vocab d_model]` and the array, 4 x d_vocab bytes a head. Can be resumed.

    Differs from the paper: its published pipeline applies the first MLP for layer 0's heads too, by accident; here
    layer 0 reads the embedding, as in the scores. The three measures are our choice; the paper's code has none.

    Example:
        >>> from interp.models import toy
        >>> found = saliency(toy.random("llama", weights="raw"))
        >>> len(found.table), found.arrays["saliency"][1].shape
        (12, (3, 4, 64))
    """
    require_mode(model, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)
    wanted = checked_layers(model, layers)
    ids = torch.arange(unembedding(model).shape[1], device=model.device)
    inputs = Inputs(model, ids, embedding)
    options = {"embedding": inputs.kind, "fold_ln_in": fold_ln_in, "fold_ln_out": fold_ln_out, "layers": wanted}

    def compute(rows: slice) -> dict[str, np.ndarray]:
        layer = wanted[rows.start]
        w_v, w_o = value_maps(model, layer, fold=fold_ln_in), output_maps(model, layer, fold=fold_ln_out)
        return {"saliency": _saliency(inputs.at(layer), w_v, w_o).cpu().numpy()[None]}

    found = sweep(
        len(wanted), compute, batch_size=1, description="saliency",
        identity={"method": "salient.saliency", **model.provenance, **options},
    )["saliency"]  # fmt: skip
    layer, head = (axis.ravel() for axis in np.indices(found.shape[:2]))
    table = pd.DataFrame({"layer": np.asarray(wanted)[layer], "head": head})
    for name, numbers in unevenness(found.reshape(-1, found.shape[2])).items():
        table[name] = numbers
    arrays = {"saliency": (("layer", "head", "token"), found)}
    return Result("salient.saliency", table, "output per input", arrays, {**model.provenance, **options})


@torch.no_grad()
def _saliency(
    rows: Float[Tensor, "n d_model"], w_v: Float[Tensor, "kv d_model d_head"], w_o: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head n"]:
    n_heads = len(w_o)
    # W_O^T = Q R with orthonormal columns in Q, so |z W_O| = |z R^T|: R^T R is the Gram matrix W_O W_O^T.
    factors = torch.linalg.qr(w_o.transpose(1, 2), mode="r").R.transpose(1, 2)  # [head d_head rank]
    per_group = n_heads // len(w_v)
    shared = factors.unflatten(0, (len(w_v), per_group)).transpose(1, 2).flatten(2)  # [kv d_head (head rank)]
    sizes = torch.empty(n_heads, len(rows), device=rows.device)
    for span in batches(len(rows), _TOKENS):
        part = rows[span]
        out = (part @ w_v) @ shared  # [kv n (head rank)]
        norms = out.unflatten(2, (per_group, -1)).norm(dim=-1)  # [kv n head]
        sizes[:, span] = norms.transpose(1, 2).flatten(0, 1) / part.norm(dim=-1).clamp(min=1e-30)
    return sizes


def unevenness(sizes: np.ndarray) -> dict[str, np.ndarray]:
    """How unevenly numbers of 0 or more are spread, row by row.

    Args:
        sizes: `[row token]`.

    Returns:
        {"value": mean, "value_largest": largest, "value_skewness": m3 / m2^1.5, "value_gini": Gini coefficient, 0 for
        equal ones and near 1 for a single one, "value_tokens": (sum of squares)^2 / sum of fourth powers, from 1 to the
        number of tokens}, each `[row]`; skewness, Gini and tokens are 0 for a row of zeros, skewness also for equal
        numbers.
    """
    measured: dict[str, list[float]] = {
        name: [] for name in ("value", "value_largest", "value_skewness", "value_gini", "value_tokens")
    }
    for row in sizes:  # a row at a time: in float64 all rows would be twice the array
        x = np.sort(row.astype(np.float64))
        n, mean, total = len(x), x.mean(), x.sum()
        gaps = x - mean
        spread = float((gaps**2).mean())
        # Float32 numbers that should be equal differ in their last bits.
        flat = spread <= (1e-6 * mean) ** 2
        gini = float((2 * np.arange(1, n + 1) - n - 1) @ x / (n * total)) if total else 0.0
        tokens = float((x**2).sum() ** 2 / (x**4).sum()) if total else 0.0
        skewness = 0.0 if flat else float((gaps**3).mean() / spread**1.5)
        for name, number in zip(measured, (mean, x[-1], skewness, gini, tokens), strict=True):
            measured[name].append(float(number))
    return {name: np.array(numbers) for name, numbers in measured.items()}


@method(name="MAPS: salient mappings", paper=PAPER, notebook="maps")
def mappings(
    model: Model,
    heads: Sequence[Head],
    *,
    n_tokens: int = 15,
    k: int = 5,
    embedding: Embedding = "mlp0",
    fold_ln_in: bool = False,
    fold_ln_out: bool = False,
) -> Result:
    """What heads make of the tokens they answer to most: the largest entries in their maps' most salient rows.

    Args:
        model: a decoder with raw weights; with processed ones both folds must be asked for.
        heads: (layer, head) pairs.
        n_tokens: salient tokens a head, by `saliency`; the paper's notebook shows 15.
        k: mappings a token; the paper's notebook shows 5.
        embedding: "mlp0" (the paper's), "raw" or "resid".
        fold_ln_in: count the norm before the head in.
        fold_ln_out: count the final norm in.

    Returns:
        Result, unit "logits", heads x n_tokens x k rows: `layer head src dst value`, the source and target token's text
        and the entry of M; `value_saliency`, `value_source` and `value_target` (token ids), `value_rank` (from 0).

    Raises:
        ValueError: processed weights without both folds, no such head, n_tokens or k out of range.

    Cost: the first MLP on the whole vocabulary, `saliency` of the layers asked for, then heads x n_tokens rows of M.

    Example:
        >>> from interp.models import toy
        >>> found = mappings(toy.random("llama", weights="raw"), [(1, 2)], n_tokens=3, k=2)
        >>> found.table[["layer", "head", "value_rank"]].values.tolist()[:2], len(found.table)
        ([[1, 2, 0], [1, 2, 1]], 6)
    """
    require_mode(model, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)
    wanted = checked_heads(model, heads)
    w_u = unembedding(model)
    if not (1 <= n_tokens <= w_u.shape[1] and 1 <= k <= w_u.shape[1]):
        raise ValueError(f"n_tokens={n_tokens} and k={k}: both must be 1 to {w_u.shape[1]}, the tokens there are.")
    inputs = Inputs(model, torch.arange(w_u.shape[1], device=model.device), embedding)
    frames: dict[Head, pd.DataFrame] = {}
    for layer in sorted({at[0] for at in wanted}):
        rows = inputs.at(layer)
        w_v, w_o = value_maps(model, layer, fold=fold_ln_in), output_maps(model, layer, fold=fold_ln_out)
        sizes = _saliency(rows, w_v, w_o)
        for head in sorted({at[1] for at in wanted if at[0] == layer}):
            size, source = sizes[head].topk(n_tokens)
            written = rows[source] @ w_v[head // (len(w_o) // len(w_v))] @ w_o[head]
            value, target = (written @ w_u.float()).topk(k)
            ids, found = source.repeat_interleave(k).tolist(), target.flatten().tolist()
            frames[layer, head] = pd.DataFrame({
                "layer": layer, "head": head, "src": text_of(model, ids), "dst": text_of(model, found),
                "value": value.flatten().tolist(), "value_saliency": size.repeat_interleave(k).tolist(),
                "value_source": ids, "value_target": found, "value_rank": list(range(k)) * n_tokens,
            })  # fmt: skip
    meta = {
        **model.provenance, "embedding": inputs.kind, "fold_ln_in": fold_ln_in, "fold_ln_out": fold_ln_out,
        "n_tokens": n_tokens, "k": k,
    }  # fmt: skip
    table = pd.concat([frames[at] for at in dict.fromkeys(wanted)], ignore_index=True)
    return Result("salient.mappings", table, "logits", meta=meta)


@method(name="MAPS: atlas", paper=PAPER, notebook="maps")
def atlas(
    model: Model,
    heads: Sequence[Head],
    *,
    k: int = 10,
    embedding: Embedding = "mlp0",
    fold_ln_in: bool = False,
    fold_ln_out: bool = False,
) -> Result:
    """The k largest entries of every row of heads' maps: what each token of the vocabulary is mapped to.

    Args:
        model: a decoder with raw weights; with processed ones both folds must be asked for.
        heads: (layer, head) pairs, each once.
        k: targets a token.
        embedding: "mlp0" (the paper's), "raw" or "resid".
        fold_ln_in: count the norm before the head in.
        fold_ln_out: count the final norm in.

    Returns:
        Result, unit "logits", a row a head (`layer head value`, the largest entry of its map). Arrays "target" (token
        ids) and "entry" `[atlas_head token rank]`, largest first.

    Raises:
        ValueError: processed weights without both folds, no such head, a head given twice, k out of range.

    Cost: 2 x d_vocab^2 x d_head FLOPs a head and a look at each entry; never more of the map in memory than a tile.
        Stored head by head: an atlas that was stopped goes on where it was.

    Example:
        >>> from interp.models import toy
        >>> atlas(toy.random("llama", weights="raw"), [(1, 2), (2, 0)], k=3).arrays["target"][1].shape
        (2, 64, 3)
    """
    require_mode(model, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)
    wanted, w_u = checked_heads(model, heads), unembedding(model)
    if len(set(wanted)) < len(wanted) or not 1 <= k <= w_u.shape[1]:
        raise ValueError(f"heads={wanted}, k={k}: give each head once, and k from 1 to {w_u.shape[1]}.")
    inputs = Inputs(model, torch.arange(w_u.shape[1], device=model.device), embedding)
    options = {"embedding": inputs.kind, "fold_ln_in": fold_ln_in, "fold_ln_out": fold_ln_out, "k": k}

    def compute(rows: slice) -> dict[str, np.ndarray]:
        layer, head = wanted[rows.start]
        w_v, w_o = value_maps(model, layer, fold=fold_ln_in), output_maps(model, layer, fold=fold_ln_out)
        z = inputs.at(layer) @ w_v[head // (len(w_o) // len(w_v))]
        entry, target = _largest(z, w_o[head], w_u, k)
        return {"entry": entry.cpu().numpy()[None], "target": target.int().cpu().numpy()[None]}

    found = sweep(
        len(wanted), compute, batch_size=1, description="atlas",
        identity={"method": "salient.atlas", "heads": wanted, **model.provenance, **options},
    )  # fmt: skip
    table = pd.DataFrame(wanted, columns=["layer", "head"]).assign(value=found["entry"].max((1, 2)).astype(float))
    arrays = {name: (("atlas_head", "token", "rank"), found[name]) for name in ("target", "entry")}
    meta = {**model.provenance, **options, "heads": [list(at) for at in wanted]}
    return Result("salient.atlas", table, "logits", arrays, meta)


@torch.no_grad()
def _largest(
    z: Float[Tensor, "n d_head"], w_o: Float[Tensor, "d_head d_model"], w_u: Tensor, k: int
) -> tuple[Float[Tensor, "n k"], Tensor]:
    """The k largest entries of each row of z W_O W_U and their columns, largest first.

    Columns are dealt into groups, and only groups whose largest entry is among the k largest of all groups' are looked
    at: any of the k largest entries is in one of them.
    """
    n_vocab = w_u.shape[1]
    groups = max(k, -(-n_vocab // _GROUP))
    # Column j of group g is token j x groups + g: the largest of each group is then an elementwise maximum.
    c = torch.zeros(w_o.shape[0], _GROUP * groups, device=z.device)
    for columns in batches(n_vocab, _ATLAS_COLUMNS):
        c[:, columns] = w_o @ w_u[:, columns].float()
    by_token = c.T.contiguous()
    entries = torch.empty(len(z), k, device=z.device)
    targets = torch.empty(len(z), k, dtype=torch.long, device=z.device)
    tile = torch.empty(_ATLAS_ROWS, _ATLAS_COLUMNS, device=z.device)
    best = torch.empty(_ATLAS_ROWS, groups, device=z.device)
    offsets = torch.arange(_GROUP, device=z.device) * groups
    for rows in batches(len(z), _ATLAS_ROWS):
        part = z[rows]
        for some in batches(groups, _ATLAS_COLUMNS):
            width = some.stop - some.start
            fill = tile.view(-1)[: len(part) * width].view(len(part), width)
            for j in range(_GROUP):
                start = j * groups + some.start
                if start >= n_vocab:
                    break
                torch.mm(part, c[:, start : start + width], out=fill)
                fill[:, max(0, n_vocab - start) :] = -torch.inf
                if j:
                    torch.maximum(best[: len(part), some], fill, out=best[: len(part), some])
                else:
                    best[: len(part), some] = fill
        near = best[: len(part)].topk(k).indices  # [rows k]
        among = (near[:, :, None] + offsets).flatten(1)  # [rows k*_GROUP]
        picked = by_token[among.clamp(max=n_vocab - 1)]  # [rows k*_GROUP d_head]
        values = torch.einsum("rd,rcd->rc", part, picked).masked_fill(among >= n_vocab, -torch.inf)
        entries[rows], place = values.topk(k)
        targets[rows] = among.gather(1, place)
    return entries, targets
