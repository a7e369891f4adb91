"""What do lenses learn from? Activations and the model's own predictions, cached in one pass over a text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.places import cache_folder
from interp.lenses._divergence import Targets, targets
from interp.lenses._final import final_norm
from interp.lenses._output import output
from interp.models.hooks import run
from interp.models.model import Model
from interp.tasks.corpus import Windows
from interp.tasks.task import Task

#: "z": what each head has gathered, before W_O. "resid": the stream before each layer.
Site = Literal["z", "resid"]

_HOOKS = {"z": "blocks.{}.attn.hook_z", "resid": "blocks.{}.hook_resid_pre"}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ABOUT, _ROWS = "cached.json", "rows.npz"
#: Tokens of a batch, unless told.
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Cached:
    """A text as a model saw it: for each token, in the order of the text, what a lens reads and should predict.

    Attributes:
        site: "z" or "resid".
        layers: whose activations are there.
        tokens: the token itself `[token]`, on the CPU as all of these.
        next: the token after it; -1 where its window ends.
        document: number of its document, window or prompt.
        position: its place in its window.
        r: the final norm's output `[token d_model]`; the model's logits are r U + b_U (capped, where it caps them).
        mean: E_p[U] under the model's prediction p, `[token d_model]`.
        entropy: H(p), nats.
        scale: 1 / sigma of the final norm.
        total: the sum of p over the tokens `[d_vocab]`; divided by their number, the best prediction that is constant.
        meta: model, weights, text fingerprint and options, JSON types.
        folder: where the files are; `r`, `mean` and the activations are mapped from there, not held in memory.
        device: the model's.
    """

    site: Site
    layers: tuple[int, ...]
    tokens: Int[Tensor, " token"]
    next: Int[Tensor, " token"]
    document: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    r: Float[Tensor, "token d_model"]
    mean: Float[Tensor, "token d_model"]
    entropy: Float[Tensor, " token"]
    scale: Float[Tensor, " token"]
    total: Float[Tensor, " d_vocab"]
    meta: dict[str, Any]
    folder: Path
    device: torch.device
    _stored: dict[int, Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over model, text and options: equal for equal content."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()

    @property
    def model_fingerprint(self) -> str:
        """That of the model which read the text."""
        return str(self.meta["model_fingerprint"])

    @property
    def weights(self) -> str:
        """How the model was loaded: "processed" or "raw"."""
        return str(self.meta["weights"])

    def activation(self, layer: int, rows: Tensor | slice | None = None) -> Float[Tensor, "token *head width"]:
        """The activations of a layer.

        Args:
            layer: one of `layers`.
            rows: which tokens; None for all.

        Returns:
            Float32 on the model's device: `[token head d_head]` of "z", `[token d_model]` of "resid".

        Raises:
            ValueError: a layer that was not cached.
        """
        if layer not in self._stored:
            raise ValueError(f"layer {layer} was not cached, only {list(self.layers)}: cache(..., layers=[{layer}]).")
        stored = self._stored[layer]
        return (stored if rows is None else stored[rows]).to(self.device, torch.float32)

    def targets(self, rows: Tensor | slice | None = None) -> Targets:
        """What a lens without a bias of its own needs of the predictions, on the model's device.

        Args:
            rows: which tokens; None for all.

        Returns:
            `Targets` with `mean` and `entropy`; its `total` and `extra` are empty (`_divergence.targets` makes those).
        """
        mean, entropy = (x if rows is None else x[rows] for x in (self.mean, self.entropy))
        empty = torch.zeros(0, device=self.device)
        return Targets(mean.to(self.device), entropy.to(self.device), empty, empty.expand(len(entropy), 0))

    def require(self, model: Model, *, site: Site | None = None) -> None:
        """Refuse another model than the one that read the text, or another site.

        Args:
            model: that is to be used with it.
            site: that is needed; None for any.

        Raises:
            ValueError: another model, the same with other weights, or another site.
        """
        if (self.model_fingerprint, self.weights) != (model.fingerprint, model.weights):
            raise ValueError(
                f"these activations are of {self.meta['model']} ({self.weights} weights, fingerprint "
                f"{self.model_fingerprint[:12]}), not of {model.name} ({model.weights}, {model.fingerprint[:12]}): "
                "cache the text with this model."
            )
        if site is not None and self.site != site:
            raise ValueError(f'these activations are of site="{self.site}": cache the text with site="{site}".')


def cache(
    model: Model,
    windows: Windows | Task | Tensor,
    *,
    site: Site = "z",
    layers: Sequence[int] | None = None,
    skip: int = 8,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    folder: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
) -> Cached:
    """Run a model over a text once and keep what lenses of all layers are trained and judged on.

    Of each token: the activations of every layer in `dtype`, and in float32 the final norm's output r, E_p[U] and H(p)
    of the model's prediction p, and the final norm's scale.

    Args:
        model: a decoder.
        windows: of `interp.tasks.corpus`; a task (its clean prompts, each a document); or token ids `[window pos]`.
        site: "z", or "resid", the stream before each layer.
        layers: whose activations; None for all.
        skip: positions at the start of each window (or prompt) that are left out: their context is too short to be
            typical, and the first has no context at all. A BOS is left out in any case.
        dtype: of the activations. Float16 keeps 11 bits up to 65,504; bfloat16 8 bits, of any size.
        folder: where the files go; None for one in the cache folder, named by model, text and options. Files of an
            earlier call with the same model, text and options are used again.
        batch_size: windows at a time; None for about 1,024 tokens.

    Returns:
        The Cached.

    Raises:
        ValueError: a tokenizer other than the text's, no token left after `skip`, a layer that is not there, values
            that `dtype` cannot hold, or a folder that holds another text, model or options.
        OSError: no room on the disk; what was written is removed.

    Cost: a forward pass without its unembedding, and 4 d_model d_vocab operations a token for E_p[U]. On disk, a token
        takes n_layers d_model + 4 d_model numbers of 2 bytes (SmolLM2-135M: 39.2 kB).

    Example:
        >>> import tempfile
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = cache(model, toy.random_tokens(model, 3, 20), folder=folder)
        ...     found.n_tokens, found.activation(2).shape
        (36, torch.Size([36, 4, 8]))
    """
    tokens, mask, document, text = _text(model, windows)
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(dict.fromkeys(layers))
    if not chosen or min(chosen) < 0 or max(chosen) >= model.n_layers:
        raise ValueError(f"layers={list(chosen)}: {model.name} has layers 0 to {model.n_layers - 1}.")
    if skip < 0:
        raise ValueError(f"skip={skip}: give the number of positions to leave out, 0 or more.")
    position = mask.long().cumsum(1) - 1
    bos = getattr(model.tokenizer, "bos_token_id", None)
    keep = mask.bool() & (position >= skip) & ~((position == 0) & (tokens == (-1 if bos is None else bos)))
    if not bool(keep.any()):
        raise ValueError(f"no token is left of windows of {tokens.shape[1]} with skip={skip}: give longer windows.")
    meta = {
        **model.provenance, "text": text, "site": site, "layers": list(chosen), "skip": skip, "stored": dtype,
        "n_tokens": int(keep.sum()), "interp": version("interp"),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    place = cache_folder() / "activations" / digest[:32] if folder is None else Path(folder)
    if not _is_there(place, meta):
        following = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), -1)], 1)
        rows = {"tokens": tokens, "next": following, "document": document, "position": position}
        kept = {name: array[keep].numpy() for name, array in rows.items()}
        size = batch_size or max(1, _BATCH // tokens.shape[1])
        with _written(place, meta, _bytes(model, meta)) as unfinished:
            np.savez(unfinished / _ROWS, **kept)
            _fill(model, tokens, mask, keep, unfinished, meta, size)
            (unfinished / _ABOUT).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return _open(model, place, meta)


def _text(model: Model, windows: Windows | Task | Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
    """Tokens, mask and document of each, `[window pos]` on the CPU, and the text's fingerprint."""
    if isinstance(windows, Windows):
        windows.check(model)
        return windows.tokens, torch.ones_like(windows.tokens), windows.document, windows.fingerprint
    if isinstance(windows, Task):
        tokens, given = windows.clean.cpu(), windows.mask
        mask = torch.ones_like(tokens) if given is None else given.cpu().long()
        text = windows.fingerprint
    else:
        if windows.ndim != 2 or not windows.numel():
            raise ValueError(f"tokens have shape {tuple(windows.shape)}: give ids [window pos], with at least one.")
        tokens = windows.cpu().long()
        mask = torch.ones_like(tokens)
        text = hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().tobytes()).hexdigest()
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.d_vocab:
        raise ValueError(
            f"token ids run from {int(tokens.min())} to {int(tokens.max())}, but {model.name} has 0 to "
            f"{model.d_vocab - 1}: was the text made with another tokenizer?"
        )
    return tokens, mask, torch.arange(len(tokens))[:, None].expand_as(tokens), text


@torch.no_grad()
def _fill(
    model: Model, tokens: Tensor, mask: Tensor, keep: Tensor, place: Path, meta: dict[str, Any], size: int
) -> None:
    out, norm, layers = output(model), final_norm(model), meta["layers"]
    hooks = {layer: _HOOKS[meta["site"]].format(layer) for layer in layers}
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    total = torch.zeros(model.d_vocab, device=model.device)
    with contextlib.ExitStack() as files:
        to: dict[str, BinaryIO] = {
            name: files.enter_context((place / f"{name}.bin").open("wb"))
            for name in ("r", "mean", "entropy", "scale", *(f"layer_{layer}" for layer in layers))
        }
        for part in tqdm(list(batches(len(tokens), size)), desc="Activations for lenses", leave=False, disable=None):
            own = keep[part].to(model.device)
            if not bool(own.any()):
                continue
            seen = run(
                model, tokens[part].to(model.device), mask=mask[part].to(model.device),
                capture=[*hooks.values(), last], stop_after=model.n_layers - 1,
            ).cache  # fmt: skip
            stream = seen[last][own]
            r = norm.norm(stream).float()
            known = targets(out.unembed, out.bias, r, cap=out.cap)
            total += known.total
            for name, values in (
                ("r", r), ("mean", known.mean), ("entropy", known.entropy),
                ("scale", norm.inverse_scale(stream.float(), r)),
            ):  # fmt: skip
                _append(to[name], values, "float32", name)
            for layer, hook in hooks.items():
                _append(to[f"layer_{layer}"], seen[hook][own], meta["stored"], hook)
        _append(files.enter_context((place / "total.bin").open("wb")), total, "float32", "total")


def _append(file: BinaryIO, values: Tensor, dtype: str, what: str) -> None:
    stored = values.to(_DTYPES[dtype])
    if not bool(stored.isfinite().all()):
        if bool(values.isfinite().all()):
            raise ValueError(
                f"{what} has values up to {float(values.abs().max()):.3g}, which {dtype} cannot hold: "
                'cache(..., dtype="bfloat16") holds them with 8 bits, "float32" with 24.'
            )
        raise ValueError(f"{what} has values that are not finite: run the model in float32 or bfloat16.")
    file.write(stored.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())


def _bytes(model: Model, meta: dict[str, Any]) -> int:
    width = model.n_heads * model.d_head if meta["site"] == "z" else model.d_model
    return meta["n_tokens"] * (
        len(meta["layers"]) * width * _DTYPES[meta["stored"]].itemsize + 8 * model.d_model + 2 * 4 + 4 * 8
    )


def _is_there(place: Path, meta: dict[str, Any]) -> bool:
    """Whether the folder holds this very text; an error if it holds another one, or something else."""
    about = place / _ABOUT
    if not about.is_file():
        if place.is_dir() and any(place.iterdir()):
            raise ValueError(f"{place} holds other files and no cached text: give an empty folder, or a new one.")
        return False
    try:
        theirs = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about} cannot be read ({error}): delete the folder.") from None
    for name, value in meta.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{place} holds a text cached with {name}={theirs.get(name)!r}, not {value!r}: give another folder, or "
                "delete this one."
            )
    return True


@contextlib.contextmanager
def _written(place: Path, meta: dict[str, Any], need: int) -> Any:
    """A folder to write in, which takes its place when all is there, and is removed if anything goes wrong."""
    advice = "give folder= on a larger disk, set INTERP_CACHE, or cache less text or fewer layers"
    numbers = f"{meta['n_tokens']} tokens of {len(meta['layers'])} layers take {need / 2**20:,.0f} MB"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=place.parent))
    except OSError as error:
        raise OSError(f"{place.parent} cannot be written ({error}): {advice}.") from error
    try:
        if free < need:
            raise OSError(f"{place.parent} has {free / 2**20:,.0f} MB free, and {numbers}: {advice}.")
        try:
            yield unfinished
        except OSError as error:
            raise OSError(f"{place} cannot be written ({error}); {numbers}: {advice}. Nothing is left.") from error
        try:
            os.replace(unfinished, place)
        except OSError:
            if not _is_there(place, meta):  # another process may have been faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open(model: Model, place: Path, meta: dict[str, Any]) -> Cached:
    n = meta["n_tokens"]
    shape = (model.n_heads, model.d_head) if meta["site"] == "z" else (model.d_model,)

    def mapped(name: str, dtype: torch.dtype, *sizes: int) -> Tensor:
        file, size = place / f"{name}.bin", int(np.prod(sizes, dtype=int))
        if not file.is_file() or file.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{file} is missing or not whole: delete {place} and cache the text again.")
        # Mapped privately: a page is read when it is needed, and nothing can be written back.
        return torch.from_file(str(file), shared=False, size=size, dtype=dtype).reshape(sizes)

    with np.load(place / _ROWS, allow_pickle=False) as stored:
        rows = {name: torch.from_numpy(stored[name]) for name in ("tokens", "next", "document", "position")}
    sizes = {
        "r": (n, model.d_model),
        "mean": (n, model.d_model),
        "entropy": (n,),
        "scale": (n,),
        "total": (model.d_vocab,),
    }
    floats = {name: mapped(name, torch.float32, *size) for name, size in sizes.items()}
    layers = {layer: mapped(f"layer_{layer}", _DTYPES[meta["stored"]], n, *shape) for layer in meta["layers"]}
    return Cached(
        site=meta["site"], layers=tuple(meta["layers"]), **rows, **floats, meta=meta, folder=place,
        device=model.device, _stored=layers,
    )  # fmt: skip
