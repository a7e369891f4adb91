"""Where do models trained here stay? In the cache folder, named by their recipe; trained at the first call only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from interp.core.places import cache_folder
from interp.core.result import Result
from interp.dynamics.train import Trained
from interp.models import sources
from interp.models.load import load
from interp.models.model import Model, Weights


def trained_once(
    name: str,
    recipe: Mapping[str, Any],
    train_in: Callable[[Path], Trained],
    tokenizer: Callable[[], Any],
    *,
    weights: Weights | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[Model, Result]:
    """A model trained by a recipe, or the one that an earlier call left.

    Args:
        name: of the model.
        recipe: all that decides its weights, JSON types; "seed" among them.
        train_in: trains, with its checkpoints in the folder given.
        tokenizer: makes the model's.
        weights: see `interp.load`.
        device: where to put the model.
        dtype: of the loaded weights.
        folder: where to keep it; None for one in the cache folder, named by the recipe.

    Returns:
        (model, history).

    Raises:
        ValueError: the folder holds a model of another recipe.
        OSError: the folder cannot be written.
    """
    digest, root = kept_place(recipe, folder)
    place = root / name
    if not (place / "config.json").is_file():
        _train_into(place, digest, train_in, tokenizer)
    history = _read(root, digest, recipe)
    return load(place, weights=weights, device=device, dtype=dtype), history


def kept_history(
    recipe: Mapping[str, Any], run: Callable[[Path], Result], folder: str | os.PathLike[str] | None = None
) -> Result:
    """The history of a training run, or what an earlier call left of it; for runs whose weights nobody needs.

    Args:
        recipe: all that decides it, JSON types; "seed" among them.
        run: trains, with its checkpoints in the folder given.
        folder: where to keep it; None for one in the cache folder, named by the recipe.

    Returns:
        The Result of `run`, with the recipe in its `meta`.

    Raises:
        ValueError: the folder holds the run of another recipe.
        OSError: the folder cannot be written.
    """
    digest, root = kept_place(recipe, folder)
    if not (root / "history").is_dir():
        with _unfinished(root) as work:
            made = run(root)
            replace(made, meta={**made.meta, "recipe": digest}).save(work / "history")
            if not (root / "history").is_dir():  # another process may have been faster, with the same numbers
                os.replace(work / "history", root / "history")
            (root / "checkpoint.safetensors").unlink(missing_ok=True)
    return _read(root, digest, recipe)


def kept_place(recipe: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> tuple[str, Path]:
    """The recipe's digest, and where what it makes is kept.

    Args:
        recipe: all that decides it, JSON types.
        folder: where; None for one in the cache folder, named by the recipe.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return digest, cache_folder() / "trained" / digest if folder is None else Path(folder)


def _read(root: Path, digest: str, recipe: Mapping[str, Any]) -> Result:
    """The history that is kept, if it is the recipe's."""
    history = Result.load(root / "history")
    if history.meta["recipe"] != digest:
        raise ValueError(
            f"{root} holds a model of another recipe (seed {history.meta['seed']}; asked for: {recipe['seed']}): give "
            "another folder, or delete it to train anew."
        )
    return history


@contextlib.contextmanager
def _unfinished(root: Path) -> Iterator[Path]:
    """A folder for what is being made, gone afterwards; in `root`, so that its parts can be moved there at once."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))  # before training: is there a place for it?
    except OSError as error:
        raise OSError(
            f"{root} cannot be written ({error}): give folder=, or set INTERP_CACHE to a folder with free space."
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _train_into(place: Path, digest: str, train_in: Callable[[Path], Trained], tokenizer: Callable[[], Any]) -> None:
    """Train, and leave the model in `place`: all or nothing, and resumed where an earlier call was stopped."""
    root = place.parent
    with _unfinished(root) as work:
        trained = train_in(root)
        history = replace(trained.history, meta={**trained.history.meta, "recipe": digest})
        sources.save_folder(trained.module, tokenizer(), work / "model")
        history.save(root / "history")
        if not place.is_dir():  # another process may have been faster, with the same weights
            os.replace(work / "model", place)
        (root / "checkpoint.safetensors").unlink(missing_ok=True)
