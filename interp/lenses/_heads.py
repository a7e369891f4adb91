"""What does a lens say of single heads? Its map of each, without the bias, tile by tile of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.batching import batches
from interp.lenses._divergence import _walk
from interp.lenses._final import final_norm
from interp.lenses._output import Output, output
from interp.lenses.attention import AttentionLens
from interp.lenses.cached import Cached
from interp.models.model import Model
from interp.patching._inputs import provenance
from interp.tasks.task import Task

Head = tuple[int, int]

#: Logits of a tile of tokens and heads: 2^24 float32 are 64 MB.
_TILE = 2**24
#: Tokens whose activations are in memory together.
_TOKENS = 4096
#: Tokens of a document at once: what all heads of a layer write of them is n_heads x d_model x 1024 numbers.
_CHUNK = 1024


def layers_of(lens: AttentionLens, layers: Sequence[int] | None) -> list[int]:
    """Layers of a lens.

    Args:
        lens: any.
        layers: None for all.

    Returns:
        Sorted.

    Raises:
        ValueError: one that the lens has not.
    """
    wanted = lens.layers if layers is None else sorted(set(layers))
    if missing := [layer for layer in wanted if layer not in lens.maps]:
        raise ValueError(f"the lens has no layer {missing[0]}: it has {lens.layers}; train it with that layer.")
    return wanted


def heads_of(model: Model, lenses: Mapping[str, AttentionLens], heads: Sequence[Head] | None) -> list[Head]:
    """Heads that several lenses have.

    Args:
        model: the lenses'.
        lenses: by name.
        heads: (layer, head); None for all heads of the layers that all lenses have.

    Returns:
        Each once, in the order given.

    Raises:
        ValueError: no lenses, no heads, a head that one of them has not, or another model's lens.
    """
    if not lenses:
        raise ValueError('no lenses were given: name at least one, for example {"direct": direct(model)}.')
    for lens in lenses.values():
        lens.require(model)
    common = sorted(set.intersection(*(set(lens.layers) for lens in lenses.values())))
    if heads is None:
        heads = [(layer, head) for layer in common for head in range(model.n_heads)]
    found = [(int(layer), int(head)) for layer, head in dict.fromkeys(heads)]
    for layer, head in found:
        if layer not in common or not 0 <= head < model.n_heads:
            raise ValueError(
                f"head ({layer}, {head}): the lenses have layers {common} in common, with heads 0 to "
                f"{model.n_heads - 1}."
            )
    if not found:
        raise ValueError("no heads were given: name some, or leave them out for all that the lenses have in common.")
    return found


def contributions(
    model: Model,
    lens: AttentionLens,
    layer: int,
    z: Float[Tensor, "token head d_head"],
    scale: Float[Tensor, " token"],
    head: int | None = None,
) -> Float[Tensor, "token some_heads d_vocab"]:
    """What each head's map makes of z, without a bias: A_h z_h.

    Args:
        model: the lens's.
        lens: any.
        layer: of the heads.
        z: what they hold.
        scale: see `Cached.scale`; a direct lens reads with it.
        head: that head only; None for all.

    Returns:
        Logits, in float32.
    """
    own = slice(None) if head is None else slice(head, head + 1)
    if lens.form == "full":
        return torch.einsum("thd,hdv->thv", z[:, own], lens.maps[layer][own].to(z))
    return lens.written(layer, z, scale=scale)[:, own] @ output(model).unembed.to(z.dtype)


def token_map(model: Model, lens: AttentionLens, layer: int, head: int, tokens: Sequence[int]) -> Tensor:
    """What raises the logits of some tokens against the mean logit: `[token d_head]`.

    Args:
        model: the lens's.
        lens: any.
        layer: of the head.
        head: which.
        tokens: ids.

    Returns:
        The columns of A_h at these tokens, less their mean over the vocabulary. For a direct lens up to a factor, the
        scale of the final norm.
    """
    if lens.form == "full":
        whole = lens.maps[layer][head]
        return (whole[:, tokens] - whole.mean(-1, keepdim=True)).T
    basis = torch.eye(model.d_head, device=model.device)
    z = basis[:, None].expand(-1, model.n_heads, -1)
    rows = lens.written(layer, z, scale=basis.new_ones(model.d_head))[:, head]
    unembed = output(model).unembed
    return (rows @ (unembed[:, tokens].float() - unembed.float().mean(-1, keepdim=True))).T


def readings(
    model: Model, lens: AttentionLens, cached: Cached, layer: int, *, bias: bool
) -> Iterator[tuple[slice, Tensor]]:
    """The logits of every head and token, tile by tile.

    Args:
        model: the lens's.
        lens: any.
        cached: activations with site "z".
        layer: of the heads.
        bias: add the lens's bias, to every head's.

    Yields:
        Tokens (rows of the activations), and their logits `[token head d_vocab]`.
    """
    for rows in batches(cached.n_tokens, max(1, _TILE // (model.n_heads * model.d_vocab))):
        scale = cached.scale[rows].to(model.device)
        logits = contributions(model, lens, layer, cached.activation(layer, rows), scale)
        yield rows, (logits + lens.biases[layer]) if bias else logits


def mean_z(cached: Cached, layer: int) -> Float[Tensor, "head d_head"]:
    """The mean over all tokens of what each head holds.

    Args:
        cached: activations with site "z".
        layer: of the heads.

    Returns:
        In float32, on the model's device.
    """
    parts = [cached.activation(layer, rows).double().sum(0) for rows in batches(cached.n_tokens, _TOKENS)]
    return (torch.stack(parts).sum(0) / cached.n_tokens).float()


def scale_of(model: Model, final: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
    """1 / sigma of the final norm: `Cached.scale` of other tokens.

    Args:
        model: a decoder.
        final: the last layer's stream.
    """
    norm = final_norm(model)
    return norm.inverse_scale(final.float(), norm.norm(final).float())


def mean_probability(model: Model, r: Float[Tensor, "token d_model"]) -> Float[Tensor, " d_vocab"]:
    """The model's mean prediction over some tokens.

    Args:
        model: a decoder.
        r: of these tokens, see `Cached.r`.

    Returns:
        Probabilities, on the model's device. Cost: 2 d_model d_vocab FLOPs a token.
    """
    way = output(model)
    return torch.stack([summed(way, part.to(model.device)) for part in r.split(_CHUNK)]).sum(0) / len(r)


def summed(way: Output, r: Float[Tensor, "token d_model"]) -> Float[Tensor, " d_vocab"]:
    """The sum of the model's predictions over some tokens, as `Targets.total` has it."""
    return _walk(r, way.unembed, way.bias, cap=way.cap, total=True).total


def chunks(document: Tensor, among: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """Each document with its tokens, some at a time.

    Args:
        document: number of the document of each token, `[token]`.
        among: tokens that count, `[token]`; None for all.

    Yields:
        The document's number, and at most 1,024 rows of the activations.
    """
    for name in document.unique().tolist():
        own = document == name if among is None else (document == name) & among
        for part in own.nonzero()[:, 0].split(_CHUNK):
            if len(part):
                yield name, part


def end_of(task: Task) -> Tensor:
    """The position of each prompt that is read: "end", else the last, `[batch]`."""
    last = torch.full((len(task),), task.clean.shape[1] - 1)
    return task.positions.get("end", last).to(task.clean.device)


def provenance_of(model: Model, task: Task, lenses: Mapping[str, AttentionLens], **options: Any) -> dict[str, Any]:
    """What a Result's `meta` says of a run over prompts.

    Args:
        model: that ran.
        task: the prompts.
        lenses: by name.
        **options: plain values.

    Returns:
        A dictionary of plain values.
    """
    return provenance(model, task, lenses={name: lens.estimand for name, lens in lenses.items()}, **options)


def text_meta(model: Model, cached: Cached, **options: Any) -> dict[str, Any]:
    """What a Result's `meta` says of a run over cached text.

    Args:
        model: that read it.
        cached: the text.
        **options: plain values.

    Returns:
        A dictionary of plain values.
    """
    return {**model.provenance, "text": cached.fingerprint, "n_tokens": cached.n_tokens, **options}
