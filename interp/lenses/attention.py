"""What does an attention head say in words? Attention lenses: a map from each head to the vocabulary.

Three estimands, which are three questions (arXiv:2310.16270 names one and trains another). With z_h `[d_head]` what
head h of a layer has gathered at a token, p the model's prediction, r its final norm's output and U its unembedding:

- "additive" (what the paper's code trains): the heads of a layer jointly, q = softmax(b + sum_h A_h z_h). A_h z_h is
  the head's contribution to one prediction, beside those of the other heads; there is one bias a layer.
- "independent" (what its prose describes): each head alone, q_h = softmax(b_h + A_h z_h). It says what can be predicted
  from z_h, whatever the head does with it: for a head that suppresses a token, that token may come first.
- "direct" (no training): A_h z_h = ((z_h W_O) * gamma / sigma) U, what the head itself adds to the logits.

Lenses of form "low_rank" read through the model's own unembedding, A_h = U B_h with B_h `[d_head d_model]`; of form
"full", A_h is any `[d_head d_vocab]`. Training minimises KL(p || q) over a text, which is convex in both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._final import written_maps
from interp.lenses._output import output
from interp.lenses._train import Training
from interp.lenses.cached import Cached
from interp.models.model import Model

Estimand = Literal["additive", "independent", "direct"]
Form = Literal["low_rank", "full"]

_WEIGHTS, _ABOUT = "attention_lens.safetensors", "attention_lens.json"


@dataclass(frozen=True, eq=False)
class AttentionLens:
    """Lenses of the attention heads of some layers.

    Attributes:
        estimand: "additive", "independent" or "direct".
        form: "low_rank" or "full".
        maps: layer -> `[head d_head d_model]` (low rank: B_h; U comes after it) or `[head d_head d_vocab]` (full: A_h).
        biases: layer -> `[d_vocab]` (additive: one for the layer; direct: zeros) or `[head d_vocab]` (independent).
        meta: the model, its fingerprint and weight mode, the text's fingerprint and the options; JSON types.
    """

    estimand: Estimand
    form: Form
    maps: Mapping[int, Tensor]
    biases: Mapping[int, Tensor]
    meta: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<AttentionLens: {self.estimand}, {self.form}, layers {self.layers}, of {self.meta['model']}>"

    @property
    def layers(self) -> list[int]:
        """Layers whose heads have a lens."""
        return sorted(self.maps)

    def require(self, model: Model) -> None:
        """Refuse another model than the lens's own.

        Args:
            model: to be read with this lens.

        Raises:
            ValueError: another model or tokenizer, or the same model with other weights ("processed" or "raw").
        """
        theirs = (self.meta["model_fingerprint"], self.meta["weights"])
        if theirs != (model.fingerprint, model.weights):
            raise ValueError(
                f"this attention lens is of {self.meta['model']} ({theirs[1]} weights, fingerprint {theirs[0][:12]}), "
                f"not of {model.name} ({model.weights} weights, {model.fingerprint[:12]}; the tokenizer counts): load "
                "that model, or train the lens anew on this one."
            )

    def written(
        self, layer: int, z: Float[Tensor, "*row head d_head"], *, scale: Float[Tensor, "*row"] | None = None
    ) -> Float[Tensor, "*row head d_model"]:
        """What goes through the unembedding: z_h B_h of each head, for a low-rank lens.

        Args:
            layer: one of `layers`.
            z: what each head has gathered (the hook `attn.hook_z`).
            scale: 1 / sigma of the final norm in the same run, which the direct lens needs; `Cached.scale` has it.

        Returns:
            Float32, in the units of the final norm's output.

        Raises:
            ValueError: a full lens, a layer without a lens, or a direct lens without `scale`.
        """
        if self.form == "full":
            raise ValueError("a full lens has no vectors before the unembedding: ask for its `logits`.")
        found = torch.einsum("...hk,hkd->...hd", z.to(self._map(layer).dtype), self._map(layer))
        return found if self.estimand != "direct" else found * self._scale(scale)[..., None, None]

    def logits(
        self,
        model: Model,
        layer: int,
        z: Float[Tensor, "*row head d_head"],
        *,
        heads: Sequence[int] | None = None,
        scale: Float[Tensor, "*row"] | None = None,
    ) -> Float[Tensor, "*row some_heads d_vocab"]:
        """What each head says: A_h z_h, with b_h for an independent lens.

        Additive and direct ones are contributions to the logits, where b is of no single head: the layer's prediction
        is softmax(biases[layer] + sum over heads). An independent one is a prediction, softmax of what is returned.

        Args:
            model: whose unembedding is used.
            layer: one of `layers`.
            z: what each head of the layer has gathered.
            heads: which heads; None for all.
            scale: see `written`.

        Returns:
            Logits in float32, defined up to a constant for each row and head. Memory: all of it, rows x heads x d_vocab
            numbers; give few rows, or few heads.
        """
        self.require(model)
        chosen = list(range(model.n_heads)) if heads is None else list(heads)
        if self.form == "full":
            found = torch.einsum(
                "...hk,hkv->...hv", z[..., chosen, :].to(self._map(layer).dtype), self._map(layer)[chosen]
            )
        else:
            vectors = self.written(layer, z, scale=scale)[..., chosen, :]
            found = vectors @ output(model).unembed.to(vectors.dtype)
        return found + self.biases[layer][chosen] if self.estimand == "independent" else found

    def _map(self, layer: int) -> Tensor:
        if layer not in self.maps:
            raise ValueError(
                f"there is no lens for layer {layer}, only for {self.layers}: train it with layers=[{layer}]."
            )
        return self.maps[layer]

    def _scale(self, scale: Tensor | None) -> Tensor:
        if scale is None:
            raise ValueError(
                "the direct lens divides by the final norm's sigma of the same run: give scale=, 1 / sigma for each "
                "row, as `interp.lenses.cached.cache` keeps it."
            )
        return scale.to(next(iter(self.maps.values())).dtype)


def direct(model: Model, layers: Sequence[int] | None = None) -> AttentionLens:
    """The lens without training: what each head itself adds to the logits, (z_h W_O) * gamma / sigma, through U.

    A LayerNorm's centring is part of it; its bias and the unembedding's belong to no head.

    Args:
        model: a decoder whose attention writes z W_O into the stream.
        layers: which; None for all.

    Returns:
        An AttentionLens; `written` and `logits` need the run's `scale`.

    Raises:
        ValueError: a model that norms what its attention writes (Gemma 2), so that a head adds no fixed map of its z;
            or a layer that is not there.

    Cost: none but a copy of each W_O.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> direct(model).maps[1].shape
        torch.Size([4, 8, 32])
    """
    chosen = chosen_layers(model, layers)
    if any(hasattr(model.bridge.blocks[layer], "ln1_post") for layer in chosen):
        raise ValueError(
            f"{model.name} norms what its attention writes, so that a head adds no fixed map of its z: train a lens, "
            'train(model, cached, estimand="additive").'
        )
    maps = written_maps(model, chosen)
    zeros = torch.zeros(model.d_vocab, device=model.device)
    meta = {**model.provenance, "estimand": "direct", "form": "low_rank"}
    return AttentionLens("direct", "low_rank", maps, dict.fromkeys(chosen, zeros), meta)


@method(name="Attention lenses: training", paper="arXiv:2310.16270", notebook="attention_lens")
def train(
    model: Model,
    cached: Cached,
    *,
    estimand: Literal["additive", "independent"],
    form: Form = "low_rank",
    layers: Sequence[int] | None = None,
    optimiser: Literal["adam", "lbfgs"] = "adam",
    start: Literal["ridge", "direct"] = "ridge",
    epochs: int | None = None,
    learning_rate: float = 1e-3,
    tokens_per_step: int = 256,
    weight_decay: float = 0.0,
    validation: Cached | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[AttentionLens, Result]:
    """Lenses of every head of some layers, all at once, with the least KL(p || q) to the model's own predictions p.

    The targets never change, so the KL is convex in maps and biases, and its least value does not depend on start or
    seed. Its gradient is known in closed form (`interp.lenses._divergence`); no array of tokens by vocabulary is made,
    and what a step needs of p is made once for all layers and heads.

    The logits of a model that caps them (Gemma 2) are the target; those of the lens are not capped.

    Args:
        model: the decoder that read the text.
        cached: the training text, of site "z".
        estimand: "additive" or "independent"; see the module.
        form: "low_rank" (d_head d_model numbers a head) or "full" (d_head d_vocab).
        layers: which; None for all that are cached.
        optimiser: "adam", whose rate falls linearly to 0; or "lbfgs", for pilots: all tokens at each evaluation, layer
            by layer.
        start: "ridge", the ridge regression of r on z; or "direct", W_O through the final norm with the text's mean
            scale. Either bias starts where the lens, at the mean of its z, gives the model's mean prediction.
        epochs: passes over the text (Adam, default 1), or iterations (L-BFGS, default 100).
        learning_rate: of the maps under Adam; biases, which are logits, have ten times as much.
        tokens_per_step: of Adam; drawn anew in each epoch.
        weight_decay: w of w/2 |maps - start|^2, added to the KL of each layer.
        validation: held-out activations of the same model, whose KL is measured at the start and after each epoch.
        folder: for a checkpoint of Adam, every 4 steps. A run that was stopped goes on from it, and on a CPU equals one
            that was not, bit for bit. It is kept: run again with the same arguments, it gives the lens at once.
        seed: of the order of the tokens.

    Returns:
        (lens, history). The Result has a row a measurement: step, layer, head (independent only), metric ("training
        KL", of the step's tokens before its update, or of all for L-BFGS; "validation KL") and value in nats.

    Raises:
        ValueError: another model than the text's, another site, fewer tokens than a lens reads numbers, or a checkpoint
            of another text or with other options.
        FloatingPointError: a KL that is not finite; the last good checkpoint is kept.

    Cost: 4 d_model d_vocab operations a token and low-rank lens, and 2 for the target of all; full: 4, and 6 n d_vocab
        a lens, with n the numbers it reads. Additive: a layer is one lens. Memory: about 64 MB beside maps and biases
        (4 times: gradients, and Adam's two averages).

    Differs from the paper: its code trains the additive lens with a matrix of d_model d_vocab for each head, of which
        only d_head directions matter, and a bias each, of which only the sum does; on the last position of each
        sentence only. Here all positions count.

    Example:
        >>> import tempfile
        >>> from interp.lenses.cached import cache
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cached = cache(model, toy.random_tokens(model, 20, 30), folder=folder)
        ...     lens, history = train(model, cached, estimand="independent", layers=[1], tokens_per_step=100)
        >>> lens.maps[1].shape, history.table["value"].notna().all()
        (torch.Size([4, 8, 32]), np.True_)
    """
    cached.require(model, site="z")
    if validation is not None:
        validation.require(model, site="z")
    chosen = list(cached.layers) if layers is None else chosen_layers(model, layers)
    n_read = model.d_head * (model.n_heads if estimand == "additive" else 1)
    if len(cached) < n_read:
        n_out = model.d_model if form == "low_rank" else model.d_vocab
        raise ValueError(
            f"the text has {len(cached)} tokens, and each {estimand} lens reads {n_read} numbers ({n_read * n_out:,} "
            f"parameters, and {model.d_vocab:,} of the bias): give at least {n_read} tokens, better ten times as many."
        )
    if epochs is not None and epochs < 1 or tokens_per_step < 1 or learning_rate <= 0 or weight_decay < 0:
        raise ValueError(
            f"epochs={epochs}, tokens_per_step={tokens_per_step}, learning_rate={learning_rate}, weight_decay="
            f"{weight_decay}: the first three must be positive, the last not negative."
        )
    if optimiser == "lbfgs" and folder is not None:
        raise ValueError('L-BFGS is for pilots and leaves no checkpoint: leave folder out, or take optimiser="adam".')
    settings = {
        **model.provenance, "text": cached.meta["text"], "cached": cached.fingerprint, "estimand": estimand,
        "form": form, "layers": chosen, "optimiser": optimiser, "start": start,
        "epochs": epochs or (1 if optimiser == "adam" else 100), "learning_rate": learning_rate,
        "tokens_per_step": min(tokens_per_step, len(cached)), "weight_decay": weight_decay, "seed": seed,
        "n_tokens": len(cached), "validation": None if validation is None else validation.fingerprint,
    }  # fmt: skip
    training = Training(model, cached, chosen, settings, validation, None if folder is None else Path(folder))
    (training.adam if optimiser == "adam" else training.lbfgs)()
    meta = {**settings, "steps": training.step, "torch": torch.__version__}
    maps = {layer: value.detach() for layer, value in training.maps.items()}
    biases = {layer: value.detach() for layer, value in training.biases.items()}
    if estimand == "additive":
        maps = {layer: value.reshape(model.n_heads, model.d_head, -1) for layer, value in maps.items()}
        biases = {layer: value[0] for layer, value in biases.items()}
    return AttentionLens(estimand, form, maps, biases, meta), _history(training.measured, meta)


def _history(measured: np.ndarray, meta: Mapping[str, Any]) -> Result:
    table = pd.DataFrame({name: measured[:, i].astype(int) for i, name in enumerate(("step", "layer", "head"))})
    if (table["head"] < 0).all():
        table = table.drop(columns="head")
    table["metric"] = np.where(measured[:, 3] == 0, "training KL", "validation KL")
    table["value"] = measured[:, 4]
    return Result("Attention lens, training", table, "nats", meta=dict(meta))


def chosen_layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, in order and once each; an error for one that is not there."""
    chosen = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= model.n_layers:
        raise ValueError(f"layers={layers}: {model.name} has layers 0 to {model.n_layers - 1}.")
    return chosen


def save(lens: AttentionLens, model: Model, folder: str | os.PathLike[str]) -> Path:
    """Keep an attention lens, with the model it belongs to.

    Args:
        lens: of this model.
        model: the model.
        folder: where; made if it is not there. An earlier attention lens in it is replaced.

    Returns:
        The folder, with the maps and biases as safetensors and the rest as JSON.

    Raises:
        ValueError: another model's lens.

    Example:
        >>> import tempfile
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(direct(model), model, folder)
        ...     load(model, folder)
        <AttentionLens: direct, low_rank, layers [0, 1, 2], of LlamaForCausalLM>
    """
    lens.require(model)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tensors = {f"map {layer}": lens.maps[layer] for layer in lens.layers}
    tensors |= {f"bias {layer}": lens.biases[layer].clone() for layer in lens.layers}
    about = {"estimand": lens.estimand, "form": lens.form, "layers": lens.layers, "meta": dict(lens.meta)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / _WEIGHTS)
    (place / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return place


def load(model: Model, folder: str | os.PathLike[str]) -> AttentionLens:
    """An attention lens that `save` kept, for the same model.

    Args:
        model: the model whose heads it reads.
        folder: where it was kept.

    Returns:
        The lens, on the model's device.

    Raises:
        FileNotFoundError: no attention lens in the folder.
        ValueError: another model or tokenizer, other weights ("processed" or "raw"), or files that cannot be read.
    """
    place = Path(folder)
    if not ((place / _ABOUT).is_file() and (place / _WEIGHTS).is_file()):
        raise FileNotFoundError(
            f"{place} holds no attention lens ({_ABOUT} and {_WEIGHTS}): give the folder of `save`."
        )
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(place / _WEIGHTS)
        if about["estimand"] not in get_args(Estimand) or about["form"] not in get_args(Form):
            raise ValueError(f"{about['estimand']}, {about['form']}")
        maps, biases = (
            {int(layer): tensors[f"{kind} {layer}"].to(model.device) for layer in about["layers"]}
            for kind in ("map", "bias")
        )
        lens = AttentionLens(about["estimand"], about["form"], maps, biases, about["meta"])
        lens.require(model)
    except (KeyError, TypeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the attention lens in {place} cannot be read ({error!r}): train and save it again."
        ) from None
    return lens
