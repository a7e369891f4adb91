"""Which heads can work together? How much of what one head writes another one reads, by its weights.

*A Mathematical Framework for Transformer Circuits* (Elhage et al., 2021): composition scores of pairs of heads, of the
later one's queries, keys and values with the earlier one's output.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.weights._parts import key_maps, output_maps, query_maps, value_maps
from interp.weights.maps import PAPER

#: What of the later head reads what the earlier one writes.
Part = Literal["q", "k", "v"]


@method(name="Composition scores", paper=PAPER, notebook="maps")
def composition(model: Model, part: Part, *, fold_ln: bool = False) -> Result:
    """How much of what each head writes is in the subspace that the queries, keys or values of later heads read.

    With OV = W_V W_O of the earlier and QK = W_Q W_K^T of the later head (rows are inputs): |OV QK| / (|OV| |QK|) for
    queries, |OV QK^T| / (|OV| |QK|) for keys, |OV OV'| / (|OV| |OV'|) for values; | | is the Frobenius norm. Keys
    and values are those of the head's group, so a group's heads share what they read through them. Between unrelated
    directions the score is about 1 / sqrt(d_model), which is given as `meta["baseline"]`. Rotation is left out.

    Args:
        model: any model with attention. The scores of processed and of raw weights differ by the norms' gains.
        part: "q", "k" or "v" of the later head.
        fold_ln: count the norm before the later head in, on both sides, and the one before the earlier head.

    Returns:
        Result, unit "share of the product of norms", a row for each pair of heads of different layers: `src` and `dst`
        ("layer.head"), `layer` and `head` of the later one, `value`. Array "composition"
        `[src_layer src_head dst_layer dst_head]`, 0 where the source is not earlier.

    Raises:
        ValueError: `part` is none of the three.

    Cost: (layers x heads x d_head)^2 x d_model FLOPs, by factors of width d_head; the array, and twice
        layers x heads x d_head x d_model numbers.

    Differs from the paper: not part of MAPS, which it stands beside; the scores are those of Elhage et al. (2021), a
    paper without an arXiv number, and no random baseline is taken off.

    Example:
        >>> from interp.models import toy
        >>> composition(toy.random("llama", weights="raw"), "k").arrays["composition"][1].shape
        (3, 4, 3, 4)
    """
    if part not in ("q", "k", "v"):
        raise ValueError(f'part={part!r}: use "q", "k" or "v", for what of the later head reads.')
    n_layers, n_heads = model.n_layers, model.n_heads
    found = np.zeros((n_layers, n_heads, n_layers, n_heads), dtype=np.float32)
    written: list[Tensor] = []  # of each layer, [head rank d_model], of norm 1: the rows of OV, in another basis
    for layer in range(n_layers):
        read = _read(model, layer, part, fold_ln)  # [head d_model rank], of norm 1
        for source, rows in enumerate(written):
            both = torch.einsum("srd,hdk->shrk", rows, read)
            found[source, :, layer] = both.square().sum((2, 3)).sqrt().cpu().numpy()
        written.append(_written(model, layer, fold_ln))
    src_layer, src_head, dst_layer, dst_head = np.nonzero(
        np.tri(n_layers, k=-1, dtype=bool).T[:, None, :, None] & np.ones((1, n_heads, 1, n_heads), dtype=bool)
    )
    table = pd.DataFrame({
        "src": [f"{layer}.{head}" for layer, head in zip(src_layer, src_head, strict=True)],
        "dst": [f"{layer}.{head}" for layer, head in zip(dst_layer, dst_head, strict=True)],
        "layer": dst_layer, "head": dst_head, "value": found[src_layer, src_head, dst_layer, dst_head].astype(float),
    })  # fmt: skip
    arrays = {"composition": (("src_layer", "src_head", "dst_layer", "dst_head"), found)}
    meta = {**model.provenance, "part": part, "fold_ln": fold_ln, "baseline": model.d_model**-0.5}
    return Result("composition.composition", table, "share of the product of norms", arrays, meta)


def _written(model: Model, layer: int, fold: bool) -> Tensor:
    """R W_O of each head, where W_V = Q R: |OV X| = |R W_O X| for any X."""
    factors = torch.linalg.qr(value_maps(model, layer, fold=fold), mode="r").R  # [kv rank d_head]
    return _unit(_per_head(model, factors) @ output_maps(model, layer))


def _read(model: Model, layer: int, part: Part, fold: bool) -> Tensor:
    """W R^T of each head, for what it reads with and the triangle R of the other side: |X W Y^T| = |X W R^T|."""
    if part == "v":
        reads = _per_head(model, value_maps(model, layer, fold=fold))
        other = output_maps(model, layer).transpose(1, 2)
    else:
        queries, keys = query_maps(model, layer, fold=fold), _per_head(model, key_maps(model, layer, fold=fold))
        reads, other = (queries, keys) if part == "q" else (keys, queries)
    return _unit(reads @ torch.linalg.qr(other, mode="r").R.transpose(1, 2))


def _per_head(model: Model, groups: Tensor) -> Tensor:
    return groups.repeat_interleave(model.n_heads // len(groups), 0)


def _unit(maps: Tensor) -> Tensor:
    """Each head's map over its Frobenius norm; a map of zeros stays so."""
    return maps / maps.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]
