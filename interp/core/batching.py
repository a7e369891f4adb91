"""How does long work go on after it was stopped? In batches, each stored when it is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from interp.core.places import cache_folder


def batches(n: int, size: int) -> Iterator[slice]:
    """Cut n rows into consecutive batches.

    Args:
        n: number of rows.
        size: rows a batch; the last may have fewer.

    Returns:
        Slices that cover 0 to n once.
    """
    if size < 1:
        raise ValueError(f"batch_size={size}: a batch needs at least one row.")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def sweep(
    n: int,
    compute: Callable[[slice], Mapping[str, np.ndarray]],
    *,
    batch_size: int,
    identity: Mapping[str, Any],
    description: str,
) -> dict[str, np.ndarray]:
    """Compute over n rows in batches, with a progress bar, going on where an earlier run was stopped.

    Each finished batch is stored in the cache folder under the SHA-256 of `identity` and the version of interp, by
    writing a file and renaming it, so that a kill at any moment leaves whole batches only. A run with the same identity
    reads those instead of computing them; when all are done the folder is removed. Batches do not see each other, so an
    interrupted and resumed sweep equals an uninterrupted one.

    Args:
        n: number of rows.
        compute: from a slice of rows to named arrays; each array's first axis is concatenated over batches.
        batch_size: rows a batch.
        identity: everything that decides the outcome (method, model and task fingerprints, options), JSON types.
        description: label of the progress bar.

    Returns:
        {name: array}, batches concatenated in order.

    Raises:
        ValueError: no rows, or an array that only pickle can store.
    """
    if n < 1:
        raise ValueError(f"{description}: there is nothing to compute (n={n}); give at least one prompt.")
    study = {"identity": dict(identity), "n": n, "batch_size": batch_size, "interp": version("interp")}
    key = json.dumps(study, sort_keys=True)
    folder = cache_folder() / "sweeps" / hashlib.sha256(key.encode()).hexdigest()
    parts = []
    rows = list(batches(n, batch_size))
    for index, span in enumerate(tqdm(rows, desc=description, leave=False, disable=len(rows) < 2)):
        file = folder / f"{index}.npz"
        part = _read(file)
        if part is None:
            part = {name: np.asarray(array) for name, array in compute(span).items()}
            if pickled := [name for name, array in part.items() if array.dtype.hasobject]:
                raise ValueError(f"{description}: array {pickled[0]!r} holds Python objects; give numbers or text.")
            if len(rows) > 1:
                _store(file, part)
        parts.append(part)
    shutil.rmtree(folder, ignore_errors=True)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None  # not there, or damaged since: the batch is computed again


def _store(file: Path, part: Mapping[str, np.ndarray]) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as stream:
            np.savez(stream, **part)
        os.replace(unfinished, file)
    except OSError as error:
        # A full or read-only cache costs the ability to resume, not the result.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        warnings.warn(
            f"the cache {file.parent} cannot be written ({error}): the run goes on, but cannot be resumed if it stops. "
            "Set INTERP_CACHE to a folder with free space.",
            stacklevel=3,
        )
