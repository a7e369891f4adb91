"""What does a model write by itself? Text sampled token by token; its randomness belongs to documents, not batches."""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.models.model import Model


def sample(
    model: Model,
    start: Sequence[int],
    n_documents: int,
    length: int,
    *,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[list[int]]:
    """Documents sampled after `start`, each until a special token ends it, or its `length`.

    A token is the argmax over the vocabulary of logits / temperature - log e, with e from an exponential distribution,
    which draws from the softmax. The numbers e of a document come from the seed and its number alone, so that it does
    not depend on the batch that it was sampled in. Rounding of the logits changes a token only where the two largest
    sums are that close. (Inverting the cumulated distribution would be cheaper, but rounding moves each of its 49,152
    borders: raw and processed weights then disagree on one token in 180, measured on SmolLM2, which end in other text.)

    Args:
        model: a decoder.
        start: token ids that every document begins after; they are not part of it.
        n_documents: how many.
        length: tokens a document has at most.
        temperature: the logits are divided by it.
        seed: seed of the random numbers.
        batch_size: documents at once.

    Returns:
        Token ids of each document, without special tokens; none is empty.
    """
    special = torch.tensor(sorted({i for i in model.tokenizer.all_special_ids if i < model.d_vocab}), dtype=torch.long)

    rows: list[list[int]] = []
    starts = range(0, n_documents, batch_size)
    for first in tqdm(starts, desc=f"text of {model.name}", leave=False, disable=len(starts) < 2):
        generators = [
            np.random.default_rng([seed, document]) for document in range(first, min(first + batch_size, n_documents))
        ]
        tokens = _batch(model, start, generators, length, special, temperature)
        rows += [[int(i) for i in row[row >= 0]] for row in tokens]
    return rows


def load(file: Path) -> list[list[int]] | None:
    """The documents that `store` wrote; None if there are none, or they cannot be read."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            return [ids.tolist() for ids in np.split(kept["tokens"], np.cumsum(kept["lengths"])[:-1])]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None  # not there, or damaged since: it is sampled again


def store(file: Path, rows: Sequence[Sequence[int]]) -> None:
    """Keep documents in a file, whole or not at all; without room for it they are sampled again at the next call."""
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as stream:
            np.savez(stream, tokens=np.concatenate(rows), lengths=np.asarray([len(row) for row in rows]))
        os.replace(unfinished, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        warnings.warn(
            f"{file.parent} cannot be written ({error}): the text is not kept. Set INTERP_CACHE to a folder with room.",
            stacklevel=3,
        )


def _batch(
    model: Model,
    start: Sequence[int],
    generators: Sequence[np.random.Generator],
    length: int,
    special: Tensor,
    temperature: float,
) -> Tensor:
    """Token ids `[document pos]`, -1 after a document's end."""
    found = torch.full((len(generators), length), -1, dtype=torch.long)
    alive = torch.ones(len(generators), dtype=torch.bool)
    after = _reader(model)
    new = torch.tensor(list(start), dtype=torch.long).expand(len(generators), -1)
    for position in range(length):
        logits = after(new.to(model.device)).cpu().double() / temperature
        logits[:, len(model.tokenizer) :] = -torch.inf  # rows that pad the vocabulary stand for nothing
        if position == 0:
            logits[:, special] = -torch.inf  # a document has at least one token
        waits = np.stack([own.standard_exponential(model.d_vocab) for own in generators])
        drawn = (logits - torch.from_numpy(waits).log()).argmax(-1)
        alive &= ~torch.isin(drawn, special)
        if not bool(alive.any()):
            break
        found[alive, position] = drawn[alive]
        new = drawn[:, None]
    return found


def _reader(model: Model) -> Callable[[Tensor], Tensor]:
    """A function from the next tokens of each row `[row new]` to the logits after them `[row d_vocab]`."""
    module = getattr(model.bridge, "original_model", None)
    if module is None:  # not a bridge: whole passes, without a cache of keys and values
        read = torch.empty((0, 0), dtype=torch.long)

        def whole(new: Tensor) -> Tensor:
            nonlocal read
            read = new if not read.numel() else torch.cat([read, new], dim=1)
            return model(read)[:, -1]

        return whole
    past = None

    def cached(new: Tensor) -> Tensor:
        nonlocal past
        with torch.no_grad():
            step = module(new, past_key_values=past, use_cache=True)
        past = step.past_key_values
        return step.logits[:, -1]

    return cached
