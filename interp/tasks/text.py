"""What text is perplexity measured on? Windows of a file, of a hub data set, or of prose that Python carries."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.models.model import Model
from interp.tasks._prompts import affixes, bare_ids
from interp.tasks.task import Task

#: Characters read from a hub data set for each token asked for: at about 4 characters a token, some ten times what
#: is needed, so that the windows are a choice, and the rest of a large data set is never downloaded.
_CHARACTERS_PER_TOKEN = 40


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
        return _from_hub(dataset, n_tokens * _CHARACTERS_PER_TOKEN)
    if path is None:
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            raise ImportError(
                "this Python was installed without pydoc_data: give a text of your own with path=."
            ) from None
        return _prose(topics), f"prose of pydoc_data.topics, Python {platform.python_version()}"
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"text: {file} is not a file: give the path of a UTF-8 text file.")
    try:
        return file.read_text(encoding="utf-8"), f"file {file.name}"
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {file} is not UTF-8 text ({error}): convert it first.") from None


def _from_hub(name: str, n_characters: int) -> tuple[str, str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ImportError(
            f"text: dataset={name!r} needs the datasets package: pip install datasets, or give a text file with path=."
        ) from None
    *owner, last = name.split("/")
    # "a/b" is an owner's data set, or a data set and its configuration: the hub knows which.
    readings: list[tuple[str, str | None]] = [(name, None)] if len(owner) < 2 else []
    readings += [("/".join(owner), last)] if owner else []
    failure: Exception | None = None
    for where, config in readings:
        try:
            splits = datasets.get_dataset_split_names(where, config)
            split = next((s for s in ("test", "validation", "train") if s in splits), splits[0])
            records = iter(datasets.load_dataset(where, config, split=split, streaming=True))
            head: dict[str, object] = next(records, {})
            break
        # Offline, unknown or gated; or, as a ValueError, a configuration that is missing or that there is none of.
        except (OSError, RuntimeError, ValueError) as error:
            failure = failure or error
    else:
        raise ConnectionError(
            f"text: the data set {name!r} could not be had from the hub ({type(failure).__name__}: {failure}). "
            "Check its name and the network, or leave dataset out: the default text needs no network."
        ) from failure
    if "text" not in head:
        raise ValueError(
            f"text: data set {name!r} has no column 'text', only {', '.join(head) or 'no records'}: save the column "
            "you want as a text file and give its path."
        )
    return _joined(itertools.chain([head], records), n_characters), f"hub data set {name}, {split} split"


def _joined(records: Iterable[Mapping[str, Any]], n_characters: int) -> str:
    """The texts of the records, a line each, from the start and up to about `n_characters`."""
    kept, size = [], 0
    for record in records:
        kept.append(record["text"].rstrip("\n") + "\n")
        size += len(kept[-1])
        if size >= n_characters:
            break
    return "".join(kept)


def _prose(topics: Mapping[str, str]) -> str:
    """The paragraphs of full sentences, each once, without markup."""
    kept: dict[str, None] = {}
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
            lines = block.strip("\n").split("\n")
            indents = {len(line) - len(line.lstrip()) for line in lines}
            joined = re.sub(r"(?<=\w)-\n\s*(?=[a-z])", "-", block)  # "user-" at a line's end, "defined" on the next
            paragraph = re.sub(r"\s+", " ", joined).strip()
            # Footnote marks, then the quote marks, stars and backquotes that Sphinx puts around code and emphasis.
            paragraph = re.sub(r'["*`]', "", re.sub(r" ?\[\d+\]", "", paragraph))
            if len(indents) == 1 and _is_prose(paragraph):
                kept.setdefault(paragraph)
    return "\n\n".join(kept) + "\n"


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences: not a heading, a signature, a grammar rule, a code block or a change note."""
    if not re.match(r"[A-Z]", paragraph) or not paragraph.endswith("."):
        return False
    if re.search(r"::=|>>>|\|| = |; |_\w+_|\(\)\.", paragraph) or re.match(
        r"(Changed|Added|New|See also)\b", paragraph
    ):
        return False
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return len(paragraph.split()) >= 12 and letters >= 0.92 * len(paragraph)
