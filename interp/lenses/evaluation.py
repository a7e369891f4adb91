"""How much of the model's prediction does a lens explain, on text that it was not trained on?

The divergence of a lens from the model says little by itself: where the next token is easy, any lens is near. So it is
set beside that of the best prediction that looks at nothing: R = 1 - KL / KL(constant) is 0 for a lens that knows the
model's mean distribution only, 1 for one that knows its prediction, and negative for one that misleads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._divergence import Targets, divergence
from interp.lenses._heads import chunks, contributions, layers_of, mean_probability, summed, text_meta
from interp.lenses._output import Output, output
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.lenses.tuned import TunedLens
from interp.models.model import Model
from interp.models.program import program

Lens = AttentionLens | TunedLens

#: The model's mean prediction is taken over about so many tokens of the training text.
_AVERAGED = 8192
#: Logits of a tile, where they are no product with the unembedding: 2^24 float32 are 64 MB.
_TILE = 2**24
#: Whether a lens reads the heads of a layer together, by its estimand.
_TOGETHER = {"additive": (True,), "independent": (False,), "direct": (False, True)}
#: Added to the count of every token, so that one that was not seen is not impossible.
_SMOOTHING = 0.1


@method(name="Lenses on held-out text", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def explained(
    model: Model,
    lenses: Mapping[str, Lens | Sequence[Lens]],
    test: Cached,
    *,
    train: Cached,
    stream: Cached | None = None,
    layers: Sequence[int] | None = None,
    shuffled: int | None = None,
) -> Result:
    """The divergence of each lens from the model, on each held-out document, beside simple predictions.

    KL(p || q) in nats, p the model's next-token distribution and q the lens's, averaged over the document's tokens. For
    an additive lens q = softmax(b + sum over heads of A_h z_h), one number a layer; for an independent one
    q_h = softmax(b_h + A_h z_h), one a head; for a direct one both, without a bias. Beside them:

        "constant": the model's mean distribution over the training text; "unigram": how often each token comes there;
        "logit attn_out": the model's final norm and unembedding of what the layer's attention writes;
        "logit": the same of the stream before the layer (with `stream`).

    Args:
        model: the lenses'.
        lenses: by name; several under one name are draws (seeds) of the same.
        test: activations (site "z") of documents that no lens was trained on.
        train: those of the training text, for the two predictions that look at nothing.
        stream: activations (site "resid") of the test's tokens, which the logit lens and tuned lenses read.
        layers: None for all that the attention lenses have.
        shuffled: a seed, to give every lens what its layer holds at another token of the test, drawn without
            replacement. What is left of R then is no reading.

    Returns:
        Result, unit "nats"; one row a document and reading: prompt (number of the document), layer and head (missing
        where all are meant), component (name), value_draw (number of the draw), value (mean KL) and value_tokens (how
        many tokens the document has). `shares` sums it up as explained shares.

    Raises:
        ValueError: lenses or activations of another model or site, a test that is the training text, a layer that is
            not there, a stream of other tokens, or a tuned lens without a stream.

    Cost: a token and layer costs 2 d_model d_vocab FLOPs for each distribution: one for an additive lens, n_heads for
        an independent one, n_heads + 1 for a direct one. Memory: what the heads of a layer write of 1,024 tokens.
    """
    drawn = [
        (name, draw, lens)
        for name, given in lenses.items()
        for draw, lens in enumerate(given if isinstance(given, Sequence) else [given])
    ]
    _require(model, drawn, test, train, stream)
    own = {layer for _, _, lens in drawn if isinstance(lens, AttentionLens) for layer in lens.maps}
    wanted = sorted(own & set(test.layers) if layers is None else set(layers))
    for _, _, lens in drawn:
        if isinstance(lens, AttentionLens):
            layers_of(lens, wanted)
    constants = _constants(model, train)
    order = torch.arange(test.n_tokens)
    if shuffled is not None:
        order = torch.randperm(test.n_tokens, generator=torch.Generator().manual_seed(shuffled))
    found = []
    parts = list(chunks(test.document))
    for document, rows in tqdm(parts, desc="explained", leave=False, disable=len(parts) < 2):
        for name, draw, layer, head, kl in _read(model, drawn, constants, test, stream, wanted, rows, order[rows]):
            found.append([document, layer, head, name, draw, float(kl.double().sum()), len(kl)])
    columns = ["prompt", "layer", "head", "component", "value_draw", "value", "value_tokens"]
    table = pd.DataFrame(found, columns=columns).astype({"layer": "Int64", "head": "Int64"})
    table = table.groupby(columns[:-2], dropna=False, sort=False, as_index=False)[columns[-2:]].sum()
    table["value"] /= table["value_tokens"]
    meta = text_meta(
        model, test, train=train.fingerprint, layers=wanted, shuffled=shuffled,
        lenses={name: _kind(lens) for name, _, lens in drawn},
    )  # fmt: skip
    return Result("evaluation.explained", table, "nats", meta=meta)


def shares(found: Result, *, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> Result:
    """The share of the divergence that each reading explains, with an interval over documents.

    R = 1 - sum of KL / sum of KL(constant), the sums over the tokens of all documents; documents are resampled, the
    same ones for every reading, and R is averaged over draws.

    Args:
        found: of `explained`.
        n_boot: number of resamples.
        level: coverage of the percentile interval.
        seed: of the bootstrap.

    Returns:
        Result, unit "share of the constant's KL"; one row a reading: layer, head, component, value (R), value_low and
        value_high (missing with one document), value_spread (standard deviation over the draws; missing with one) and
        value_kl (mean KL a token, nats).

    Raises:
        ValueError: a table that is not one of `explained`.

    Cost: none to speak of.

    Example:
        >>> rows = pd.DataFrame({"prompt": [0, 1, 0, 1], "layer": 0, "head": 0, "value_draw": 0, "value_tokens": 10,
        ...     "component": ["constant", "constant", "lens", "lens"], "value": [2.0, 2.0, 0.5, 1.5]})
        >>> share = shares(Result("evaluation.explained", rows, "nats")).filter(component="lens").table
        >>> share[["value", "value_low", "value_high"]].values.tolist()
        [[0.5, 0.25, 0.75]]
    """
    if found.method != "evaluation.explained":
        raise ValueError(f"shares sums up what explained returned; this is a Result of {found.method}.")
    documents = {document: i for i, document in enumerate(sorted(found.table["prompt"].unique()))}
    n = len(documents)
    resampled = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    weights = np.concatenate([np.ones((1, n)), resampled])

    def sums(rows: pd.DataFrame) -> np.ndarray:
        """Of KL over the tokens: of the sample, then of the resamples."""
        total = np.zeros(n)
        total[rows["prompt"].map(documents)] = rows["value"] * rows["value_tokens"]
        return weights @ total

    constant = found.table[found.table["component"] == "constant"]
    least = sums(constant)
    rows = []
    for key, group in found.table.groupby(["layer", "head", "component"], dropna=False, sort=False):
        each = np.stack([sums(draw) for _, draw in group.groupby("value_draw")])
        share = 1 - each / least
        bounds = np.quantile(share[:, 1:].mean(0), [(1 - level) / 2, (1 + level) / 2])
        low, high = bounds if n > 1 else (float("nan"), float("nan"))
        spread = share[:, 0].std(ddof=1) if len(share) > 1 else float("nan")
        kl = each[:, 0].mean() / constant["value_tokens"].sum()
        rows.append([*key, share[:, 0].mean(), low, high, spread, kl])
    columns = ["layer", "head", "component", "value", "value_low", "value_high", "value_spread", "value_kl"]
    table = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64", "head": "Int64"})
    meta = {**found.meta, "n_boot": n_boot, "level": level, "seed": seed}
    return Result("evaluation.shares", table, "share of the constant's KL", meta=meta)


def _require(
    model: Model, drawn: Sequence[tuple[str, int, Lens]], test: Cached, train: Cached, stream: Cached | None
) -> None:
    for each in (test, train):
        each.require(model, site="z")
    if test.fingerprint == train.fingerprint:
        raise ValueError("the test is the training text: cache documents that no lens was trained on (Corpus.split).")
    if stream is not None:
        stream.require(model, site="resid")
        if not torch.equal(stream.tokens, test.tokens):
            raise ValueError("the stream is of other tokens than the test: cache the same windows with the same skip.")
    for name, _, lens in drawn:
        lens.require(model)
        if stream is None and not isinstance(lens, AttentionLens):
            raise ValueError(
                f'the lens {name!r} reads the stream, which was not given: stream=cache(model, windows, site="resid").'
            )


def _kind(lens: Lens) -> str:
    return lens.estimand if isinstance(lens, AttentionLens) else "tuned"


def _constants(model: Model, train: Cached) -> dict[str, Tensor]:
    """The logits of the two predictions that look at nothing, `[d_vocab]`."""
    following = train.next[train.next >= 0]
    counts = torch.bincount(following, minlength=model.d_vocab).float().to(model.device) + _SMOOTHING
    every = max(1, train.n_tokens // _AVERAGED)
    return {"constant": mean_probability(model, train.r[::every]).log(), "unigram": (counts / counts.sum()).log()}


def _read(
    model: Model,
    drawn: Sequence[tuple[str, int, Lens]],
    constants: Mapping[str, Tensor],
    test: Cached,
    stream: Cached | None,
    layers: Sequence[int],
    rows: Tensor,
    seen: Tensor,
) -> Iterator[tuple[str, int, int | None, int | None, Tensor]]:
    """Name, draw, layer and head of each reading, with its divergence `[token]`.

    Args:
        model: the lenses'.
        drawn: name, draw and lens.
        constants: logits of the predictions that look at nothing.
        test: cached z.
        stream: the cached stream, or None.
        layers: that are read.
        rows: the tokens whose prediction is explained.
        seen: those whose activations the lenses get; the same, unless shuffled.
    """
    way, steps = output(model), program(model)
    r, scale = (part[rows].to(model.device) for part in (test.r, test.scale))
    known = test.targets(rows)._replace(total=summed(way, r))
    for name, bias in constants.items():
        yield name, 0, None, None, divergence(torch.zeros_like(r), way.unembed, known, bias=bias)
    for layer in layers:
        z = test.activation(layer, seen)
        yield "logit attn_out", 0, layer, None, _of_stream(way, steps.attn_out(layer, z.to(model.dtype)), r, known)
        h = None if stream is None else stream.activation(layer, seen).to(model.dtype)
        if h is not None:
            yield "logit", 0, layer, None, _of_stream(way, h, r, known)
        for name, draw, lens in drawn:
            if isinstance(lens, AttentionLens):
                for head, kl in _of_heads(model, way, lens, layer, z, scale, r, known):
                    yield name, draw, layer, head, kl
            elif h is not None:
                yield name, draw, layer, None, _of_stream(way, lens.translate(layer, h), r, known)


def _of_heads(
    model: Model, way: Output, lens: AttentionLens, layer: int, z: Tensor, scale: Tensor, r: Tensor, known: Targets
) -> Iterator[tuple[int | None, Tensor]]:
    """The divergence of each token, for each head that the lens reads by itself, and for all of them together."""
    bias = None if lens.estimand == "direct" else lens.biases[layer].to(z)
    for together in _TOGETHER[lens.estimand]:
        if lens.form == "full" or way.cap is not None:

            def logits(rows: slice, together: bool = together) -> Tensor:
                each = contributions(model, lens, layer, z[rows], scale[rows])
                each = each.sum(1, keepdim=True) if together else each
                return each if bias is None else each + bias

            kl = _dense(way, r, z.shape[1], logits)
        else:
            parts = lens.written(layer, z, scale=scale).transpose(0, 1)  # [head token d_model]
            parts = parts.sum(0, keepdim=True) if together else parts
            kl = divergence(parts, way.unembed, known, bias=bias)
        yield from zip([None] if together else range(len(kl)), kl, strict=True)


def _of_stream(way: Output, h: Tensor, r: Tensor, known: Targets) -> Tensor:
    """The divergence of each token, for the model's norm and unembedding of streams `[token d_model]`."""
    if way.cap is not None:
        return _dense(way, r, 1, lambda rows: way.logits(h[rows])[:, None])[0]
    return divergence(way.norm(h).float(), way.unembed, known, bias=way.bias)


def _dense(way: Output, r: Tensor, n: int, logits: Callable[[slice], Tensor]) -> Tensor:
    """`[n token]`, from logits `[token n d_vocab]` of a few tokens at a time: where they are no product with U."""
    parts = []
    for rows in batches(len(r), max(1, _TILE // (n * way.unembed.shape[1]))):
        own = r[rows] @ way.unembed.to(r.dtype)
        own = own if way.bias is None else own + way.bias
        own = own if way.cap is None else way.cap * torch.tanh(own / way.cap)
        log_p = own.log_softmax(-1)[:, None]
        parts.append((log_p.exp() * (log_p - logits(rows).log_softmax(-1))).sum(-1).T)
    return torch.cat(parts, 1)
