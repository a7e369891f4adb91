"""What would a lens explain if it had learned nothing of its head? Changed lenses, mixed-up positions, easy positions.

Each control keeps something of a lens and destroys the rest. With z of other positions, or rotated, the lens's map no
longer meets what it was trained on; another head's lens knows the layer and the text, and not this head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._divergence import divergence
from interp.lenses._heads import chunks, mean_probability, summed, text_meta
from interp.lenses._output import output
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.lenses.evaluation import explained
from interp.models.model import Model

_END, _ELSEWHERE = "sentence end", "elsewhere"
#: What may follow the mark that ends a sentence.
_CLOSING = " \t\n\"'”’)]*"


def exchanged(lens: AttentionLens) -> AttentionLens:
    """Every head with the lens of the head before it in its layer (the first with the last's), bias included.

    Args:
        lens: with two heads a layer or more.

    Returns:
        A lens of the same kind.

    Raises:
        ValueError: a lens of one head a layer.
    """
    if any(len(maps) < 2 for maps in lens.maps.values()):
        raise ValueError("the lens has one head a layer: there is no other head's lens to read it with.")
    own = lens.estimand == "independent"
    return _changed(
        lens, "another head", {layer: maps.roll(1, 0) for layer, maps in lens.maps.items()},
        {layer: bias.roll(1, 0) if own else bias for layer, bias in lens.biases.items()},
    )  # fmt: skip


def rotated(lens: AttentionLens, *, seed: int = 0) -> AttentionLens:
    """Every head's map after a random rotation of what the head holds: A_h Q_h z with Q_h orthogonal.

    Args:
        lens: any.
        seed: of the rotations, one a head.

    Returns:
        A lens of the same kind; its maps have the same singular values.
    """
    generator = torch.Generator().manual_seed(seed)

    def turned(maps: Tensor) -> Tensor:
        noise = torch.randn(maps.shape[0], maps.shape[1], maps.shape[1], generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise).Q.to(maps) @ maps

    return _changed(lens, "rotated", {layer: turned(maps) for layer, maps in sorted(lens.maps.items())})


def randomised(lens: AttentionLens, *, seed: int = 0) -> AttentionLens:
    """Every head with a map of independent normal entries, as large (Frobenius) as its own.

    Args:
        lens: any.
        seed: of the maps.

    Returns:
        A lens of the same kind. In the low-rank form the random map is read through the model's unembedding.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(maps: Tensor) -> Tensor:
        noise = torch.randn(maps.shape, generator=generator).to(maps)
        sizes = [part.flatten(1).norm(dim=1)[:, None, None] for part in (maps, noise)]
        return noise * sizes[0] / sizes[1]

    return _changed(lens, "random", {layer: drawn(maps) for layer, maps in sorted(lens.maps.items())})


@method(name="Lenses beside their controls", paper="arXiv:2310.16270", notebook="attention_lens")
def controls(
    model: Model,
    lens: AttentionLens,
    test: Cached,
    *,
    train: Cached,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Result:
    """A lens beside its controls, on held-out text.

    Args:
        model: the lens's.
        lens: of any estimand.
        test: activations of documents that it was not trained on.
        train: those of the training text.
        layers: None for all of the lens's.
        seed: of the shuffle and the rotations.

    Returns:
        As `evaluation.explained`, and for `evaluation.shares` likewise. Components: "own" (the lens), "another head"
        (`exchanged`), "rotated" (`rotated`), "shuffled" (the lens, with z of another token of the test), and the
        predictions that look at nothing.

    Raises:
        ValueError: as `explained` and `exchanged`.

    Cost: four times that of `explained` for the lens.
    """
    lenses = {"own": lens, "another head": exchanged(lens), "rotated": rotated(lens, seed=seed)}
    found = explained(model, lenses, test, train=train, layers=layers)
    mixed = explained(model, {"shuffled": lens}, test, train=train, layers=layers, shuffled=seed)
    table = pd.concat([found.table, mixed.filter(component="shuffled").table], ignore_index=True)
    return replace(found, table=table, meta={**found.meta, "shuffled": seed, "control_of": lens.estimand})


@method(name="Lenses: which positions are easy", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def position_audit(model: Model, test: Cached, *, train: Cached, seed: int = 0) -> Result:
    """How easy the next token is at the ends of sentences, where the published lenses were trained, and elsewhere.

    The KL divergence from the model of the best prediction that looks at nothing: its mean distribution over training
    positions of the same kind. Where that is small, a small training loss says little of the lens.

    Args:
        model: that the activations are of.
        test: held-out activations.
        train: those of other text. As many positions of both kinds are averaged, so that the means are as good.
        seed: of the choice of the positions elsewhere.

    Returns:
        Result, unit "nats"; a row for each document and kind of position that it has: prompt (number of the document),
        component ("sentence end": the token ends in ".", "!" or "?", closing quotes and brackets aside; "elsewhere"),
        value (mean KL), value_entropy (mean entropy of the model's prediction) and value_tokens.

    Raises:
        ValueError: a text without a sentence's end, or nothing else.

    Cost: 4 d_model d_vocab FLOPs for each token of the test, and for twice the sentence ends of the training text.

    Differs from the paper's code: there each sentence is a prompt of its own, and its last position, or padding behind
        it, is the target; here sentences stand in their text.
    """
    for each in (test, train):
        each.require(model)
    way = output(model)
    ends = {name: _sentence_ends(model, cached.tokens) for name, cached in (("test", test), ("train", train))}
    if not all(bool(each.any()) and not bool(each.all()) for each in ends.values()):
        raise ValueError(
            "the test or the training text has no sentence's end among its tokens, or nothing else: give running text "
            "with its full stops."
        )
    final, rest = ends["train"].nonzero()[:, 0], (~ends["train"]).nonzero()[:, 0]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: len(final)]
    rows = []
    for kind, at, own in ((_END, final, ends["test"]), (_ELSEWHERE, rest[drawn], ~ends["test"])):
        mean = mean_probability(model, train.r[at]).log()
        for document, some in tqdm(list(chunks(test.document, own)), desc=kind, leave=False):
            known = test.targets(some)._replace(total=summed(way, test.r[some].to(model.device)))
            kl = divergence(torch.zeros_like(known.mean), way.unembed, known, bias=mean)
            rows.append([document, kind, float(kl.sum()), float(known.entropy.sum()), len(some)])
    columns = ["prompt", "component", "value", "value_entropy", "value_tokens"]
    table = pd.DataFrame(rows, columns=columns).groupby(columns[:2], as_index=False).sum()
    for name in ("value", "value_entropy"):
        table[name] /= table["value_tokens"]
    meta = text_meta(model, test, train=train.fingerprint, seed=seed, positions_averaged=len(final))
    return Result("controls.position_audit", table, "nats", meta=meta)


def _sentence_ends(model: Model, tokens: Tensor) -> Tensor:
    """Whether each token ends a sentence, `[token]`."""
    seen, number = tokens.cpu().unique(return_inverse=True)
    ends = [text.rstrip(_CLOSING).endswith((".", "!", "?")) for text in model.to_str_tokens(seen)]
    return torch.tensor(ends)[number]


def _changed(
    lens: AttentionLens, control: str, maps: dict[int, Tensor], biases: dict[int, Tensor] | None = None
) -> AttentionLens:
    return replace(lens, maps=maps, biases=biases or lens.biases, meta={**lens.meta, "control": control})
