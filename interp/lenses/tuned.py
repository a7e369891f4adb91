"""What has each layer got ready for the output? The tuned lens: a trained affine map from its stream to the last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._final import final_norm
from interp.lenses._output import output
from interp.lenses._reading import Positions, Target, read, where_read
from interp.lenses._streams import Text, streams
from interp.lenses._translators import CHECKPOINT, Run, divergences, ridge, trained, translated
from interp.models.model import Model
from interp.tasks.task import Task

_WEIGHTS, _ABOUT = "tuned_lens.safetensors", "tuned_lens.json"
#: Effective learning rates: of the paper's SGD, and of Adam from the ridge start as measured on SmolLM2-135M.
_RATES = {"sgd": 1.0, "adam": 3e-4}


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of the stream before some layers: h becomes h + W h + b, which the model's output map then reads.

    Attributes:
        layers: which, from 0.
        weight: W of each, `[layer d_model d_model]`, float32; all zero is the logit lens.
        bias: b of each, `[layer d_model]`.
        meta: model, its fingerprint and weight mode, the text and the options of the training; JSON types.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    layers: tuple[int, ...]
    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, d_model = self.bias.shape
        if len(self.layers) != n or self.weight.shape != (n, d_model, d_model):
            raise ValueError(
                f"{len(self.layers)} layers, weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)} do "
                "not fit: they are [layer d_model d_model] and [layer d_model]."
            )

    def __repr__(self) -> str:
        return f"<TunedLens of {self.meta.get('model')}: layers {list(self.layers)}>"

    def translate(self, layer: int, h: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The translator's h + W h + b, in the type of h.

        Args:
            layer: one of `layers`.
            h: the stream before it.

        Returns:
            What stands in for the last stream.

        Raises:
            ValueError: a layer without a translator.
        """
        if layer not in self.layers:
            raise ValueError(f"this tuned lens has layers {list(self.layers)}, not {layer}: train that one too.")
        index = self.layers.index(layer)
        return translated(h, self.weight[index], self.bias[index]).to(h.dtype)

    def require(self, model: Model) -> None:
        """Refuse another model than the one that the lens is of.

        Args:
            model: that it is to be used with.

        Raises:
            ValueError: another model, or the same with other weights ("processed" or "raw": their streams differ).
        """
        theirs = tuple(self.meta.get(name) for name in ("model_fingerprint", "weights"))
        if theirs != (model.fingerprint, model.weights):
            raise ValueError(
                f"this tuned lens is of {self.meta.get('model')} ({theirs[1]} weights, fingerprint "
                f"{str(theirs[0])[:12]}), not of {model.name} ({model.weights} weights, {model.fingerprint[:12]}): "
                "load that model, or train a lens on this one."
            )


def identity(model: Model, layers: Sequence[int] | None = None) -> TunedLens:
    """The tuned lens before any training, which is the logit lens.

    Args:
        model: a decoder.
        layers: which; None for all.

    Returns:
        A TunedLens of zeros.
    """
    chosen = _layers(model, layers)
    zeros = torch.zeros(len(chosen), model.d_model, model.d_model, device=model.device)
    return TunedLens(tuple(chosen), zeros, zeros[:, 0].clone(), model.provenance)


@method(name="Tuned lens", paper="arXiv:2303.08112", notebook="attention_lens")
def tuned_lens(
    model: Model,
    lens: TunedLens,
    task: Task | Tensor,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    target: Target = "next",
    k: int = 10,
) -> Result:
    """What each layer's stream says about the next token, through a translator trained for that layer.

    At the stream h before layer l: q = softmax(W_U^T norm(h + W_l h + b_l) + b_U). Where the logit lens asks what the
    model would say if it stopped there, this asks how much of the model's output an affine map can read off already.

    Args:
        model: the one that the lens is of.
        lens: of `train`, `load` or `from_library`.
        task: prompts, or token ids `[batch pos]`.
        layers: None for those of the lens and the output (the layer after the last).
        positions: see `logit_lens`.
        target: see `logit_lens`.
        k: top tokens kept.

    Returns:
        Result with the rows, columns and arrays of `interp.lenses.logit.logit_lens`; component is "tuned".

    Raises:
        ValueError: a lens of another model or without a layer asked for; and as `logit_lens`.

    Cost: that of `logit_lens`, and 2 d_model^2 FLOPs a row.

    Example:
        >>> from interp.lenses.logit import logit_lens
        >>> from interp.models import toy
        >>> model, tokens = toy.random("llama"), torch.tensor([[2, 3, 4]])
        >>> one, other = tuned_lens(model, identity(model), tokens), logit_lens(model, tokens)
        >>> bool((one.table["value_entropy"] == other.table["value_entropy"]).all())
        True
    """
    lens.require(model)
    where = where_read(model, "resid_pre", [*lens.layers, model.n_layers] if layers is None else layers)
    for place in where:
        if place.layer < model.n_layers and place.layer not in lens.layers:
            raise ValueError(f"this tuned lens has layers {list(lens.layers)}, not {place.layer}: train that one too.")
    return read(
        model, task, "tuned", lens.translate, where=where, positions=positions, target=target, k=k,
        method="tuned.tuned_lens", sites=["resid_pre"], layers=list(layers or []), lens_meta=dict(lens.meta),
    )  # fmt: skip


@method(name="Tuned lens: training", paper="arXiv:2303.08112", notebook="attention_lens")
def train(
    model: Model,
    text: Text,
    *,
    layers: Sequence[int] | None = None,
    start: Literal["ridge", "identity"] = "ridge",
    optimiser: Literal["adam", "sgd"] = "adam",
    epochs: int = 1,
    tokens_per_step: int = 512,
    learning_rate: float | None = None,
    weight_decay: float = 1e-3,
    validation: Text | None = None,
    every: int = 25,
    skip: int = 8,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[TunedLens, Result]:
    """Train the translators of all layers at once (arXiv:2303.08112).

    Each minimises the mean over tokens of KL(p || q) from the lens q to the model's own p. Its gradient needs of p only
    E_p[W_U] and its entropy, which are computed once a token and serve all layers; the vocabulary is walked in tiles.
    Layers do not see each other: training some gives the same translators as training all.

    "ridge" starts from the least-squares map of the layer's stream to the last one, in closed form; `epochs=0` keeps
    that. The learning rate falls to 0 linearly; a translator's gradient is scaled down to norm 1; weight decay pulls
    towards the identity.

    Args:
        model: a decoder, frozen.
        text: windows of a corpus, a task without padding, or token ids `[window pos]`, of which one pass a batch serves
            all layers; or cached activations of site "resid", whose tokens are drawn one by one.
        layers: which; None for all.
        start: "ridge", or "identity" as in the paper: the logit lens.
        optimiser: "adam" (with AMSGrad), or the paper's "sgd" with Nesterov momentum 0.9.
        epochs: passes over the text, each in an order of its own; what does not fill a step is left out.
        tokens_per_step: in whole windows, at least one.
        learning_rate: None for 3e-4 (Adam) or 1 (SGD, times 1 - momentum: effective 1, as in the paper).
        weight_decay: of the squared entries of W and b.
        validation: text whose mean KL is measured at the start, at each checkpoint and at the end.
        every: steps between checkpoints and rows of the history.
        skip: first positions of each window that are left out (cached activations have their own).
        folder: where the state is kept, so that a stopped run goes on, to the same numbers on a CPU; None for nowhere.
        seed: of the order.

    Returns:
        The lens, and a Result, unit "nats": step, layer, metric ("training": mean over the steps since the last row,
        each before its update; "held-out"), value.

    Raises:
        ValueError: a text of fewer tokens than a translator has inputs, of another tokenizer or model; a checkpoint of
            another text, model or options; a loss that is not finite (the last good checkpoint is kept).

    Cost: a token takes, each epoch, a forward pass without the unembedding and 4 d_model d_vocab FLOPs for its targets
        (both once if cached), and 4 d_model d_vocab + 6 d_model^2 for each layer. Memory: the translators, their
        gradients and two (SGD: one) arrays of that size; the streams of all layers of 512 tokens; tiles.

    Differs from the paper: the ridge start; Adam by default; the gradient is clipped a translator, not all together.
        The paper's own run (250 steps of 262,144 tokens) is start="identity", optimiser="sgd" on as much text.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> lens, history = train(model, toy.random_tokens(model, 8, 24), validation=toy.random_tokens(model, 4, 24))
        >>> lens.weight.shape, sorted(set(history.table["metric"]))
        (torch.Size([3, 32, 32]), ['held-out', 'training'])
    """
    chosen = _layers(model, layers)
    if optimiser not in _RATES or start not in ("ridge", "identity"):
        raise ValueError(f"optimiser={optimiser!r}, start={start!r}: use adam or sgd; ridge or identity.")
    if epochs < 0 or tokens_per_step < 1 or every < 1:
        raise ValueError(f"epochs={epochs}, tokens_per_step={tokens_per_step}, every={every}: give positive numbers.")
    own = streams(model, text, chosen, skip)
    held_out = None if validation is None else streams(model, validation, chosen, skip)
    if own.n_tokens <= model.d_model:
        raise ValueError(
            f"the text has {own.n_tokens} tokens to learn from, but a translator has {model.d_model + 1} parameters "
            f"for each output ({model.d_model} inputs and a bias): give more text, several times as many tokens."
        )
    size = min(own.units, max(1, tokens_per_step // own.per_unit))
    settings = {
        **model.provenance, "text": own.fingerprint, "validation": None if held_out is None else held_out.fingerprint,
        "layers": chosen, "start": start, "optimiser": optimiser, "epochs": epochs, "units_a_step": size,
        "steps": epochs * (own.units // size), "n_tokens": own.n_tokens,
        "learning_rate": _RATES[optimiser] if learning_rate is None else learning_rate, "weight_decay": weight_decay,
        "every": every, "seed": seed, "interp": version("interp"),
    }  # fmt: skip
    way, file = output(model), None if folder is None else Path(folder) / CHECKPOINT
    zeros = identity(model, chosen)
    there = file is not None and file.is_file()
    begin = ridge(final_norm(model), own, chosen) if start == "ridge" and not there else (zeros.weight, zeros.bias)
    run = Run(way, own, held_out, settings, file, begin)
    if there:
        run.restore()
    trained(run)
    lens = TunedLens(tuple(chosen), run.weight.detach(), run.bias.detach(), settings)
    return lens, run.history(settings)


def held_out(model: Model, lens: TunedLens, text: Text, *, skip: int = 8) -> Float[Tensor, " layer"]:
    """Mean KL(p || q) of each of the lens's layers over a text.

    Args:
        model: the one that the lens is of.
        lens: the lens; `identity(model)` for the logit lens.
        text: see `train`.
        skip: see `train`.

    Returns:
        Nats, in the order of `lens.layers`, float64. Cost: half of an epoch of `train`.
    """
    lens.require(model)
    own = streams(model, text, lens.layers, skip)
    return torch.from_numpy(divergences(output(model), own, lens.layers, lens.weight, lens.bias))


def save(lens: TunedLens, model: Model, folder: str | os.PathLike[str]) -> Path:
    """Keep a tuned lens, with the model it belongs to.

    Args:
        lens: the lens.
        model: the one that it is of.
        folder: where; made if it is not there. An earlier lens in it is replaced.

    Returns:
        The folder, with the weights as safetensors and the rest as JSON.
    """
    lens.require(model)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    save_file({"weight": lens.weight.contiguous(), "bias": lens.bias.contiguous()}, place / _WEIGHTS)
    about = {"layers": list(lens.layers), "meta": dict(lens.meta)}
    (place / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return place


def load(model: Model, folder: str | os.PathLike[str]) -> TunedLens:
    """A tuned lens that `save` kept, for the same model.

    Args:
        model: the one that it was trained on.
        folder: where it was kept.

    Returns:
        The lens, on the model's device.

    Raises:
        FileNotFoundError: no lens in the folder.
        ValueError: a lens of another model or weight mode, or files that cannot be read.
    """
    place = Path(folder)
    if not ((place / _ABOUT).is_file() and (place / _WEIGHTS).is_file()):
        raise FileNotFoundError(f"{place} holds no tuned lens ({_ABOUT} and {_WEIGHTS}): give the folder of `save`.")
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(place / _WEIGHTS)
        weight, bias = (tensors[name].to(model.device) for name in ("weight", "bias"))
        lens = TunedLens(tuple(about["layers"]), weight, bias, about["meta"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the tuned lens in {place} cannot be read ({error}): train and save it again.") from None
    lens.require(model)
    return lens


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    found = sorted(set(range(model.n_layers) if layers is None else layers))
    if not found or found[0] < 0 or found[-1] >= model.n_layers:
        raise ValueError(f"layers={layers}: {model.name} has layers 0 to {model.n_layers - 1}; name at least one.")
    return found
