"""What do the methods of this room read from a model? Each layer's maps, its norms and its embedding, in float32.

The weights of raw and of processed models differ by what a norm does to its input, which processing moves into the
maps beside it. `Norm` does the same to one map at a time, so that a raw model with both foldings is the processed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.batching import batches
from interp.models.model import Model
from interp.models.program import NoProgramError, program

#: What stands for a token at the input of a head in layer 1 or later; layer 0 reads the embedding itself.
Embedding = Literal["mlp0", "raw", "resid"]
#: (layer, head), both counted from 0.
Head = tuple[int, int]

# Rows that go through the first MLP at once.
_MLP_ROWS = 1024


class Norm(NamedTuple):
    """The linear part of a norm: centring (LayerNorm only), then a gain a dimension. Its scale and bias are left out.

    Attributes:
        gain: `[d_model]`.
        centres: whether the mean over d_model is taken off first.
    """

    gain: Tensor
    centres: bool

    def into_reader(self, weight: Float[Tensor, "... d_model out"]) -> Float[Tensor, "... d_model out"]:
        """The map from the norm's input, of a map that reads its output."""
        scaled = self.gain[:, None] * weight
        return scaled - scaled.mean(-2, keepdim=True) if self.centres else scaled

    def into_writer(self, weight: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What the norm makes of each row that is written into its input."""
        centred = weight - weight.mean(-1, keepdim=True) if self.centres else weight
        return centred * self.gain


def input_norm(model: Model, layer: int) -> Norm:
    """The norm before the attention of a layer; of a processed model nothing is left of it."""
    return _norm(model, model.bridge.blocks[layer].ln1)


def output_norm(model: Model) -> Norm:
    """The norm before the unembedding; of a processed model nothing is left of it."""
    return _norm(model, model.bridge.ln_final)


@torch.no_grad()
def _norm(model: Model, module: Any) -> Norm:
    if model.weights == "processed":
        return Norm(torch.ones(model.d_model, device=model.device), False)
    # Asked rather than read: norms differ in the name of their gain and in what it is relative to (Gemma's to 1). An
    # input with mean 0 and entries of one size comes out as its gain, and the bias drops out of the difference.
    inner: Callable[[Tensor], Tensor] = getattr(module, "original_component", module)
    probe = torch.ones(model.d_model, device=model.device, dtype=model.dtype)
    probe[1::2] = -1
    if model.d_model % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    there, back = (inner(sign * probe[None, None])[0, 0].float() for sign in (1, -1))
    moved = inner((probe + 0.5)[None, None])[0, 0].float()
    # Bfloat16 keeps 8 bits; without centring the outputs differ by a tenth at least.
    centres = bool((moved - there).abs().max() < 0.02 * there.abs().max())
    return Norm((there - back) / (2 * probe.float()), centres)


def value_maps(model: Model, layer: int, *, fold: bool = False) -> Float[Tensor, "kv d_model d_head"]:
    """W_V of each key-value group; with `fold` the layer's norm is part of it."""
    return _read(model, layer, "W_V", model.n_key_value_heads, fold)


def key_maps(model: Model, layer: int, *, fold: bool = False) -> Float[Tensor, "kv d_model d_head"]:
    """W_K of each key-value group; with `fold` the layer's norm is part of it."""
    return _read(model, layer, "W_K", model.n_key_value_heads, fold)


def query_maps(model: Model, layer: int, *, fold: bool = False) -> Float[Tensor, "head d_model d_head"]:
    """W_Q of each head; with `fold` the layer's norm is part of it."""
    return _read(model, layer, "W_Q", model.n_heads, fold)


def _read(model: Model, layer: int, name: str, n: int, fold: bool) -> Tensor:
    weight = getattr(model.bridge.blocks[layer].attn, name).detach()
    # Some wrappers show a group's weights once for each of its heads.
    weight = weight[:: len(weight) // n].float()
    return input_norm(model, layer).into_reader(weight) if fold else weight


def output_maps(model: Model, layer: int, *, fold: bool = False) -> Float[Tensor, "head d_head d_model"]:
    """W_O of each head; with `fold` the final norm is part of it."""
    weight = model.bridge.blocks[layer].attn.W_O.detach().float()
    return output_norm(model).into_writer(weight) if fold else weight


def unembedding(model: Model) -> Tensor:
    """W_U `[d_model d_vocab]` as it is stored, in the model's own type."""
    return model.bridge.unembed.W_U.detach()


@torch.no_grad()
def embedded(model: Model, ids: Tensor) -> Float[Tensor, "n d_model"]:
    """What the model puts into its stream for each token, without a position."""
    module = getattr(model.bridge.embed, "original_component", model.bridge.embed)
    return module(ids[None])[0].float()


class Inputs:
    """What stands for each token at the input of a layer's heads.

    Attributes:
        ids: tokens, `[n]`.
        kind: "mlp0" is MLP_0(LN2_0(E)), "resid" E + MLP_0(LN2_0(E)), "raw" E, the embedding; "raw" also where the model
            has no MLP, whatever was asked for.
    """

    def __init__(self, model: Model, ids: Tensor, kind: Embedding) -> None:
        if kind not in ("mlp0", "raw", "resid"):
            raise ValueError(f'embedding={kind!r}: use "mlp0" (the paper\'s), "raw" or "resid".')
        self.model, self.ids = model, ids
        self.kind: Embedding = kind if model.d_mlp else "raw"

    def at(self, layer: int) -> Float[Tensor, "n d_model"]:
        """At the heads of a layer; layer 0 reads the embedding itself."""
        return embedded(self.model, self.ids) if layer == 0 or self.kind == "raw" else self._effective

    @cached_property
    def _effective(self) -> Tensor:
        rows = torch.empty(len(self.ids), self.model.d_model, device=self.ids.device)
        for span in batches(len(self.ids), _MLP_ROWS):
            raw = embedded(self.model, self.ids[span])
            rows[span] = _first_mlp(self.model, raw)
            if self.kind == "resid":
                rows[span] += raw
        return rows


@torch.no_grad()
def _first_mlp(model: Model, rows: Tensor) -> Tensor:
    rows = rows.to(model.dtype)
    try:
        steps = program(model)
    except NoProgramError:  # a decoder of another form: its own modules, under the bridge's names
        block = model.bridge.blocks[0]
        return block.mlp(block.ln2(rows[None]))[0].float()
    return steps.mlp_out(0, steps.post(0, rows)).float()


def require_vocabulary(model: Model) -> None:
    """Refuse a model whose heads cannot be read in tokens."""
    if model.kind == "vision" or not model.d_vocab:
        raise ValueError(
            f"{model.name} is a {model.kind} model without an unembedding, in which heads could be read: load a "
            'language model, for example interp.load("smollm2-135m", weights="raw").'
        )


def require_mode(model: Model, *, fold_ln_in: bool, fold_ln_out: bool) -> None:
    """Refuse a question that the weights at hand cannot answer: processed ones have both norms in them."""
    require_vocabulary(model)
    if model.weights == "processed" and not (fold_ln_in and fold_ln_out):
        raise ValueError(
            f"{model.name} has processed weights: the gains of its norms are inside W_V and W_U, which the paper's "
            f'scores leave out. Load it with interp.load({model.name!r}, weights="raw"), or ask for the other scores '
            "with fold_ln_in=True, fold_ln_out=True (then raw and processed weights give the same)."
        )


def checked_layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, all for None, refused where there is none of that number."""
    wanted = list(range(model.n_layers)) if layers is None else list(layers)
    wrong = [layer for layer in wanted if not 0 <= layer < model.n_layers]
    if wrong or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"layers={wanted}: give each layer once, of {model.name}'s 0 to {model.n_layers - 1}, or None for all."
        )
    return wanted


def checked_heads(model: Model, heads: Sequence[Head]) -> list[Head]:
    """The heads asked for, refused where there is none of that number."""
    wanted = [(int(layer), int(head)) for layer, head in heads]
    wrong = [at for at in wanted if not (0 <= at[0] < model.n_layers and 0 <= at[1] < model.n_heads)]
    if wrong or not wanted:
        raise ValueError(
            f"heads={wanted}: give (layer, head) pairs, with layers 0 to {model.n_layers - 1} and heads 0 to "
            f"{model.n_heads - 1} for {model.name}, for example heads=[({model.n_layers - 1}, 0)]."
        )
    return wanted


def text_of(model: Model, ids: Sequence[int]) -> list[str]:
    """Each token's text."""
    return model.to_str_tokens(ids)
