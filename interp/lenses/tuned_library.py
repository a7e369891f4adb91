"""How does a lens travel to and from the tuned-lens library? In its own files: config.json and params.pt."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.lenses._output import output
from interp.lenses.tuned import TunedLens
from interp.models.model import Model

_CONFIG, _PARAMS = "config.json", "params.pt"
_TYPE = "linear_tuned_lens"
#: What reading files that are damaged, or no lens, raises.
_UNREADABLE = (
    ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


def read(model: Model, folder: str | os.PathLike[str]) -> TunedLens:
    """A lens in the files of the tuned-lens library, such as those its authors published.

    Translator i of the library reads the stream before layer i and adds W h + b to it, as here. Its lenses are of a
    model's original weights.

    `params.pt` is a pickle, the library's only format. It is read with `torch.load(weights_only=True)`, which builds
    tensors and refuses anything else a pickle could do.

    Args:
        model: the same model, of raw weights.
        folder: with `config.json` and `params.pt`.

    Returns:
        The lens, float32, on the model's device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: processed weights, another model (by sizes, or by the library's hash of the unembedding), another
            type of lens, or files that cannot be read.
    """
    _require_raw(model)
    place = Path(folder)
    for name in (_CONFIG, _PARAMS):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{place} has no {name}: give a folder that the tuned-lens library wrote.")
    try:
        config = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        state = torch.load(place / _PARAMS, map_location=model.device, weights_only=True)
        sizes = config["d_model"], config["num_hidden_layers"]
        held = {key: tuple(part.shape) for key, part in state.items()}
    except _UNREADABLE as error:
        raise ValueError(f"the lens in {place} cannot be read ({error}): fetch or save it again.") from None
    if config.get("lens_type", _TYPE) != _TYPE:
        raise ValueError(f"the lens in {place} is a {config['lens_type']!r}; only {_TYPE!r} can be read.")
    if sizes != (model.d_model, model.n_layers):
        raise ValueError(
            f"the lens in {place} is of {config.get('base_model_name_or_path')} (d_model {sizes[0]}, {sizes[1]} "
            f"layers), not of {model.name} (d_model {model.d_model}, {model.n_layers} layers): load that model."
        )
    ours, theirs = unembed_hash(output(model).unembed), config.get("unembed_hash")
    if theirs not in (None, ours):
        raise ValueError(
            f"the lens in {place} was trained with another unembedding than that of {model.name} (hash {theirs[:12]}, "
            f"not {ours[:12]}): load {config.get('base_model_name_or_path')}. The hash is of rounded weights; if you "
            f'know better, set "unembed_hash" to null in {place / _CONFIG}.'
        )
    by_name = {"weight": (model.d_model, model.d_model), "bias": (model.d_model,)}
    shapes = {f"{layer}.{name}": by_name[name] for layer in range(model.n_layers) for name in by_name}
    if wrong := [key for key, shape in shapes.items() if held.get(key) != shape]:
        raise ValueError(f"the lens in {place} has no {wrong[0]} of {shapes[wrong[0]]}: fetch or save it again.")
    weight, bias = (
        torch.stack([state[f"{layer}.{name}"].float() for layer in range(model.n_layers)]) for name in by_name
    )
    meta = {**model.provenance, "text": None, "library_config": config}
    return TunedLens(tuple(range(model.n_layers)), weight, bias, meta)


def write(lens: TunedLens, model: Model, folder: str | os.PathLike[str]) -> Path:
    """Write a lens as the tuned-lens library does, so that `TunedLens.from_model_and_pretrained` reads it.

    Args:
        lens: of the model. A layer without a translator gets one of zeros, which is the logit lens.
        model: of raw weights.
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: processed weights, or another model.
    """
    _require_raw(model)
    lens.require(model)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    for layer in range(model.n_layers):
        known = layer in lens.layers
        index = lens.layers.index(layer) if known else 0
        for name, part in (("weight", lens.weight[index]), ("bias", lens.bias[index])):
            state[f"{layer}.{name}"] = part.cpu().clone() if known else torch.zeros(part.shape)
    config: dict[str, Any] = {
        "base_model_name_or_path": model.name, "d_model": model.d_model, "num_hidden_layers": model.n_layers,
        "bias": True, "base_model_revision": None, "unembed_hash": unembed_hash(output(model).unembed),
        "lens_type": _TYPE,
    }  # fmt: skip
    torch.save(state, place / _PARAMS)
    (place / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return place


def unembed_hash(unembed: Tensor) -> str:
    """The library's hash of an unembedding: SHA-256 of what numpy prints of it, to one decimal.

    Args:
        unembed: `[d_model d_vocab]`.

    Returns:
        The digest in hex. For more than 1,000 weights numpy prints the first and last three rows and columns only, so
        the hash tells models apart, not an altered file.
    """
    printed = np.array_str(unembed.T.detach().cpu().float().numpy(), precision=1)
    return hashlib.sha256(printed.encode()).hexdigest()


def _require_raw(model: Model) -> None:
    if model.weights != "raw":
        raise ValueError(
            f"{model.name} has processed weights, whose stream and unembedding are not those that the tuned-lens "
            'library sees: load it with interp.load(..., weights="raw").'
        )
