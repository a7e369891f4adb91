"""Which relation does each head implement? Read from its weights alone, as MAPS does.

*Inferring Functionality of Attention Heads from their Parameters* (arXiv 2412.11965): the map of a head from source to
target tokens is M = E W_V W_O W_U `[d_vocab d_vocab]`, and a head implements a relation as far as the right targets are
among the largest entries of their sources' rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from interp.core.batching import sweep
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.tasks.relations import Relation, Relations
from interp.weights._parts import (
    Embedding,
    Inputs,
    checked_layers,
    output_maps,
    require_mode,
    unembedding,
    value_maps,
)
from interp.weights._ranks import COLUMNS, ROWS, Layout, ranks

PAPER = "arXiv:2412.11965"
#: Names of the two scores in the column `metric`.
PROMOTES, SUPPRESSES = "promotes", "suppresses"

# The first MLP takes this many tokens at once (see `_parts`), of which it keeps gate, input and product.
_MLP_ROWS, _MLP_COPIES = 1024, 3


def paper_k(model_name: str, relation: Relation) -> int:
    """The paper's k: 1 for copying and 10 for other relations; 3 and 25 for a model with "Llama-3" in its name.

    Args:
        model_name: name the model was loaded by.
        relation: whose k is asked for.

    Returns:
        How many of the largest entries of a row count.
    """
    wide = "llama-3" in model_name.lower()
    return (3 if wide else 1) if relation.copying else (25 if wide else 10)


@method(name="MAPS: relation scores", paper=PAPER, notebook="maps")
def relation_scores(
    model: Model,
    relations: Relations,
    *,
    k: int | None = None,
    embedding: Embedding = "mlp0",
    fold_ln_in: bool = False,
    fold_ln_out: bool = False,
    layers: Sequence[int] | None = None,
) -> Result:
    """How strongly each head promotes and suppresses each relation, read from the weights alone.

    For a head with W_V `[d_model d_head]` of its key-value group and its own W_O `[d_head d_model]`, entry [s, t] of
    M = E W_V W_O W_U says how much attention to the source token s raises the logit of the target token t. The score is
    the share of the relation's pairs (s, t) whose target is among the k largest entries of row s; the suppression score
    that of -M, so with the k lowest. E is the *effective embedding*: in layer 0 the embedding, above it what the first
    MLP makes of it, MLP_0(LN2_0(E)), without the embedding itself, a position or layer 0's attention. Biases and, by
    default, the norms' gains are left out. A target ranks behind every token with an equal entry, so that a head that
    writes nothing for a source implements nothing.

    Scores do not change with a factor on W_V, W_O, W_U or a row of E, with another basis of d_head, with one vector
    added to all columns of W_U, or when a group's values are copied out for each head.

    Args:
        model: a decoder with raw weights; with processed ones both folds must be asked for.
        relations: from `interp.tasks.relations`, for this model's tokenizer.
        k: how many entries count, for every relation; None for the paper's (see `paper_k`). `rescored` gives others.
        embedding: "mlp0" (the paper's), "raw" for the embedding in all layers, "resid" for embedding plus first MLP.
        fold_ln_in: count the norm before the head in: centring (LayerNorm) and gain of its layer.
        fold_ln_out: count the final norm in, likewise.
        layers: which layers; None for all.

    Returns:
        Result, unit "share of pairs", a row for each relation (`target`), `layer`, `head` and `metric` ("promotes",
        "suppresses"); `value` is the score, `value_mrr` the mean of 1 / (rank + 1), `value_auc` the mean share of the
        other tokens that the target comes before. Arrays "rank" and "rank_suppressed" `[pair layer head]`, from 0;
        "relation" `[pair]` (index into `meta["relations"]`), "source" and "target" `[pair]`, token ids.

    Raises:
        ValueError: processed weights without both folds, no unembedding, no such layer, k below 1.

    Cost: no forward pass but the first MLP's on the sources; 2 x sources x d_vocab x d_head FLOPs a head and a look at
        each of those entries for each of a source's targets; memory as `plan` says, never a row of M. Can be stopped
        and resumed, layer by layer.

    Differs from the paper: its code ranks a tied target first (`topk`), here it comes last; it leaves the first MLP out
    for Llama-3.1-70B, which is embedding="raw" here.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import Relation, Relations
        >>> model = toy.random("llama", weights="raw")
        >>> copying = Relation.from_pairs(model, "copying", [(f"w{i}", f"w{i}") for i in range(2, 62)])
        >>> scores = relation_scores(model, Relations((copying,)), k=10)
        >>> len(scores.table), scores.arrays["rank"][1].shape
        (24, (60, 3, 4))
    """
    require_mode(model, fold_ln_in=fold_ln_in, fold_ln_out=fold_ln_out)
    wanted = checked_layers(model, layers)
    ks = [paper_k(model.name, relation) if k is None else k for relation in relations]
    source, target, which = _pairs(relations)
    unique, back = np.unique(np.stack([source, target], 1), axis=0, return_inverse=True)
    layout = Layout.of(unique[:, 0], unique[:, 1], model.device)
    inputs = Inputs(model, layout.sources, embedding)
    w_u = unembedding(model)
    options = {"embedding": inputs.kind, "fold_ln_in": fold_ln_in, "fold_ln_out": fold_ln_out, "layers": wanted}

    def compute(rows: slice) -> Mapping[str, np.ndarray]:
        layer = wanted[rows.start]
        z = inputs.at(layer) @ value_maps(model, layer, fold=fold_ln_in)
        w_o = output_maps(model, layer, fold=fold_ln_out)
        found = ranks(layout, z, w_o, w_u, w_u[:, layout.targets].float())
        promoted, suppressed = (each.cpu().numpy()[None] for each in found)
        return {"rank": promoted, "rank_suppressed": suppressed}

    found = sweep(
        len(wanted), compute, batch_size=1, description="relation scores",
        identity={"method": "maps.relation_scores", "relations": relations.fingerprint, **model.provenance, **options},
    )  # fmt: skip
    dims = ("pair", "layer", "head")
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (dims, np.ascontiguousarray(found[name].transpose(1, 0, 2)[back])) for name in found
    }
    arrays |= {"relation": (("pair",), which), "source": (("pair",), source), "target": (("pair",), target)}
    meta = {
        **model.provenance, **options, "relations": list(relations.names), "task_fingerprint": relations.fingerprint,
        "n_layers": model.n_layers, "n_heads": model.n_heads, "n_key_value_heads": model.n_key_value_heads,
        "d_vocab": w_u.shape[1],
    }  # fmt: skip
    empty = Result("maps.relation_scores", pd.DataFrame(), "share of pairs", arrays, meta)
    return rescored(empty, k=dict(zip(relations.names, ks, strict=True)))


def rescored(scores: Result, *, k: int | Mapping[str, int]) -> Result:
    """The same scores at another k, from the ranks that were kept.

    Args:
        scores: what `relation_scores` returned.
        k: how many entries of a row count, for every relation or by its name.

    Returns:
        A Result as `relation_scores` returns it.

    Raises:
        ValueError: k below 1, or a relation without one.

    Cost: none; a mean over the stored ranks.
    """
    names = list(scores.meta["relations"])
    ks = {name: k for name in names} if isinstance(k, int) else dict(k)
    if missing := [name for name in names if name not in ks]:
        raise ValueError(f"k has no entry for the relation {missing[0]!r}; give one number for all, or {{name: k}}.")
    if wrong := [name for name in names if ks[name] < 1]:
        raise ValueError(f"k={ks[wrong[0]]} for the relation {wrong[0]!r}: at least the first place must count, k=1.")
    which = scores.arrays["relation"][1]
    frames = []
    for metric, array in ((PROMOTES, "rank"), (SUPPRESSES, "rank_suppressed")):
        ranked = scores.arrays[array][1]
        n_layers, n_heads = ranked.shape[1:]
        layer, head = (axis.ravel() for axis in np.indices((n_layers, n_heads)))
        for index, name in enumerate(names):
            own = ranked[which == index].reshape(-1, n_layers * n_heads)
            frames.append(
                pd.DataFrame({
                    "target": name, "layer": np.asarray(scores.meta["layers"])[layer], "head": head, "metric": metric,
                    "value": (own < ks[name]).mean(0), "value_k": ks[name], "value_mrr": (1 / (own + 1.0)).mean(0),
                    "value_auc": 1 - own.mean(0) / (scores.meta["d_vocab"] - 1),
                })
            )  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    return Result(scores.method, table, scores.unit, scores.arrays, {**scores.meta, "k": ks})


def _pairs(relations: Relations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source and target token and number of the relation, of each pair."""
    source = [pair.source_tokens[0] for relation in relations for pair in relation.pairs]
    target = [pair.target_token for relation in relations for pair in relation.pairs]
    which = np.repeat(np.arange(len(relations)), [len(relation) for relation in relations])
    if min(map(len, relations)) < 1:
        empty = next(relation.name for relation in relations if not len(relation))
        raise ValueError(f"the relation {empty!r} has no pairs of single tokens for this model: leave it out.")
    return np.array(source), np.array(target), which


class Sizes(NamedTuple):
    """The shapes that decide what a method costs; `Sizes.of(model)` reads them, or give those of any model."""

    d_vocab: int
    d_model: int
    d_head: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    bytes_per_weight: int = 4

    @classmethod
    def of(cls, model: Model) -> Sizes:
        """The sizes of a loaded model."""
        return cls(
            model.d_vocab, model.d_model, model.d_head, model.d_mlp, model.n_layers, model.n_heads,
            model.n_key_value_heads, model.dtype.itemsize,
        )  # fmt: skip


def plan(sizes: Model | Sizes, relations: Relations, *, fold_ln_in: bool = False) -> Result:
    """What `relation_scores` will take beside the model itself: peak memory and arithmetic, before it is run.

    Args:
        sizes: a model, or the `Sizes` of one that is not here.
        relations: that will be asked about; for a model that is not here those of any tokenizer, as an estimate.
        fold_ln_in: as it will be asked for.

    Returns:
        Result, unit "bytes", a row a part (`component`), of which "peak" is the sum of all that exist at one time;
        `meta["flops"]` counts the arithmetic.

    Cost: none.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import Relation, Relations
        >>> copying = Relation.from_pairs(toy.random("llama"), "copying", [("w2", "w2"), ("w3", "w3")])
        >>> llama = Sizes(128_256, 4096, 128, 14_336, 32, 32, 8, 2)
        >>> found = plan(llama, Relations((copying,)))
        >>> round(found.filter(component="peak").table["value"].item() / 2**20)
        109
    """
    s = Sizes.of(sizes) if isinstance(sizes, Model) else sizes
    source, target, _ = _pairs(relations)
    unique = np.unique(np.stack([source, target], 1), axis=0)
    sources, counts = np.unique(unique[:, 0], return_counts=True)
    n, n_targets, n_pairs, slots = len(sources), len(np.unique(target)), len(unique), int(counts.max())
    width = s.n_heads * s.d_head
    # A bfloat16 weight is read as float32; a float32 one where it is, unless a norm is folded into it.
    copies = int(s.bytes_per_weight < 4)
    embedding = {
        "embedding of the sources": 2 * 4 * n * s.d_model,
        "first MLP": min(n, _MLP_ROWS) * (_MLP_COPIES * s.d_mlp + 3 * s.d_model) * s.bytes_per_weight,
    }
    ranking = {
        "embedding of the sources": 2 * 4 * n * s.d_model,
        "values": 4 * s.n_key_value_heads * n * s.d_head,
        "value maps": 4 * s.d_model * s.n_key_value_heads * s.d_head * max(copies, 2 * fold_ln_in),
        "output maps": 4 * s.d_model * width * max(copies, 1),
        "unembedding, targets": n_targets * s.d_model * (4 + s.bytes_per_weight * copies),
        "unembedding, a chunk": COLUMNS * (4 * s.d_model * copies + 4 * width),
        "bounds and counts": 4 * s.n_heads * slots * n * 4,
        "one head's pairs": 4 * 4 * n_pairs * s.d_head,
        "tile": 4 * 2 * ROWS * COLUMNS,
        "ranks": 2 * 4 * n_pairs * s.n_heads * (s.n_layers + 4),
    }
    peak = max(sum(embedding.values()), sum(ranking.values()))
    parts = {**embedding, **ranking, "peak": peak}
    per_layer = (
        2 * n * s.d_model * s.n_key_value_heads * s.d_head + 2 * width * s.d_model * s.d_vocab
        + 2 * n * s.d_vocab * width
    )  # fmt: skip
    meta = {
        "n_sources": n, "n_targets": n_targets, "n_pairs": n_pairs, "most_targets_of_a_source": slots,
        "flops": s.n_layers * per_layer + 2 * 3 * n * s.d_model * s.d_mlp, "task_fingerprint": relations.fingerprint,
        "model_bytes": s.bytes_per_weight * _n_weights(s), "dense_map_bytes": 4 * s.d_vocab**2,
        "sizes": {name: int(value) for name, value in s._asdict().items()},
    }  # fmt: skip
    table = pd.DataFrame({"component": list(parts), "value": [float(math.ceil(part)) for part in parts.values()]})
    return Result("maps.plan", table, "bytes", meta=meta)


def _n_weights(s: Sizes) -> int:
    """Weights of a decoder of these sizes, with a gated MLP and an unembedding of its own: an upper estimate."""
    attention = 2 * s.d_model * s.d_head * (s.n_heads + s.n_key_value_heads)
    return 2 * s.d_vocab * s.d_model + s.n_layers * (attention + 3 * s.d_model * s.d_mlp)
