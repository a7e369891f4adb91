"""What text is perplexity measured on? Windows of a file, of a hub data set, or of prose that Python carries."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from interp.models.model import Model
from interp.tasks import _texts
from interp.tasks._prompts import affixes, bare_ids
from interp.tasks.task import Task


def text(
    model: Model,
    *,
    n_prompts: int = 64,
    length: int = 128,
    path: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """Windows of running text, all equally long, that do not overlap.

    The text is tokenized once and cut into consecutive windows; `n_prompts` of them are chosen by the seed and kept in
    the order of the document. `task.split(seed)` gives two parts without a common window, for calibration
    and for evaluation.

    Without `path` or `dataset` the text is the English prose of CPython's own language reference, which
    `pydoc_data.topics` carries: paragraphs of full sentences, without headings, grammar, code or markup. It is
    at hand everywhere and the same on every machine with the same Python, but not from one Python to the next: `source`
    holds Python's version and the SHA-256 of the text, and numbers are comparable only where both agree.

    Args:
        model: whose tokenizer is used; any model of text.
        n_prompts: number of windows.
        length: tokens in a window, special tokens included.
        path: a UTF-8 text file of the user's.
        dataset: a data set on the Hugging Face hub that has a column "text": "NAME", "OWNER/NAME", "NAME/CONFIG" or
            "OWNER/NAME/CONFIG", for example "Salesforce/wikitext/wikitext-2-raw-v1". Its test split is read, or else
            its validation or train split, from the start and only as far as needed.
        seed: seed of the choice of windows.
        prepend_bos: see `Model.tokenize`; a BOS takes one of the `length` places of each window.

    Returns:
        The Task: `clean` and the position "end"; no corrupted prompts and no answers. Its `prompts` are the
        decoded windows, for reading.

    Raises:
        ValueError: for a text with too few windows (with the numbers), a length beyond the context, or a file that is
            not UTF-8 text.
        FileNotFoundError: when `path` is not a file.
        ImportError: when `dataset` needs the `datasets` package.
        ConnectionError: when `dataset` cannot be had.

    Cost: one tokenization of the whole text (about a second for a megabyte).
    """
    if model.tokenizer is None:
        raise ValueError(f"the text task needs a tokenizer, and {model.name} is a {model.kind} model without one.")
    if path is not None and dataset is not None:
        raise ValueError(f"text: path={os.fspath(path)!r} and dataset={dataset!r} were both given: give one of them.")
    if n_prompts < 1:
        raise ValueError(f"text: n_prompts={n_prompts}, but a task needs at least one prompt.")
    before, after = affixes(model, prepend_bos)
    body = length - len(before) - len(after)
    if length > model.n_ctx or body < 2:
        raise ValueError(
            f"text: length={length}, but {model.name} has a context of {model.n_ctx} and a window needs two tokens "
            f"beside its {len(before) + len(after)} special ones: use a length from "
            f"{len(before) + len(after) + 2} to {model.n_ctx}."
        )
    content, origin = _read(path, dataset, n_prompts * length)
    ids = bare_ids(model, content)
    total = len(ids) // body
    if n_prompts > total:
        raise ValueError(
            f"text: {origin} has {len(ids)} tokens, which is {total} windows of {body}; n_prompts={n_prompts} needs "
            f"{n_prompts * body} tokens. Ask for fewer or shorter windows, or give a longer text with path=."
        )
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=n_prompts, replace=False))
    windows = [before + ids[i * body : (i + 1) * body] + after for i in chosen]
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Task(
        name="text",
        prompts=tuple(model.tokenizer.decode(window) for window in windows),
        clean=torch.tensor(windows, device=model.device),
        positions={"end": torch.full((n_prompts,), length - 1, device=model.device)},
        source=f"{origin}, sha256 {digest[:16]}; {n_prompts} of {total} windows of {length} tokens",
    )


def _read(path: str | os.PathLike[str] | None, dataset: str | None, n_tokens: int) -> tuple[str, str]:
    """The text, and what to call it in `source`."""
    if dataset is not None:
        records, origin = _texts.from_hub(dataset, n_tokens * _texts.CHARACTERS_PER_TOKEN, "text")
        return "".join(records), origin
    if path is None:
        topics, origin = _texts.from_python()
        return "\n\n".join(topics.values()) + "\n", origin
    return _texts.from_file(path, "text"), f"file {Path(path).name}"
