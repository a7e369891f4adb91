"""Where does running text come from? Python's own prose, the user's files, or a hub data set."""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Characters read from a hub data set for each token asked for: at about 4 characters a token, some ten times what
#: is needed, so that what is taken is a choice, and the rest of a large data set is never downloaded.
CHARACTERS_PER_TOKEN = 40


def from_python() -> tuple[dict[str, str], str]:
    """The prose of CPython's language reference, {topic: text}, and what to call it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ImportError("this Python was installed without pydoc_data: give a text of your own with path=.") from None
    return prose(topics), f"prose of pydoc_data.topics, Python {platform.python_version()}"


def from_file(path: str | os.PathLike[str], caller: str) -> str:
    """The text of a file, refused when it is not UTF-8; `caller` begins the error messages."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{caller}: {file} is not a file: give the path of a UTF-8 text file.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{caller}: {file} is not UTF-8 text ({error}): convert it first.") from None


def from_hub(name: str, n_characters: int, caller: str) -> tuple[list[str], str]:
    """The texts of a data set's first records, up to about `n_characters`, and what to call them."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ImportError(
            f"{caller}: dataset={name!r} needs the datasets package: pip install datasets, or give a text file with "
            "path=."
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
            f"{caller}: the data set {name!r} could not be had from the hub ({type(failure).__name__}: {failure}). "
            "Check its name and the network, or leave dataset out: the default text needs no network."
        ) from failure
    if "text" not in head:
        raise ValueError(
            f"{caller}: data set {name!r} has no column 'text', only {', '.join(head) or 'no records'}: save the "
            "column you want as a text file and give its path."
        )
    return _first(itertools.chain([head], records), n_characters), f"hub data set {name}, {split} split"


def _first(records: Iterable[Mapping[str, Any]], n_characters: int) -> list[str]:
    kept, size = [], 0
    for record in records:
        kept.append(record["text"].rstrip("\n") + "\n")
        size += len(kept[-1])
        if size >= n_characters:
            break
    return kept


def prose(topics: Mapping[str, str]) -> dict[str, str]:
    """The paragraphs of full sentences of each topic, without markup; a paragraph stands in its first topic only.

    Args:
        topics: {topic: text}, as in `pydoc_data.topics`.

    Returns:
        {topic: paragraphs, an empty line between them}, sorted; topics without a paragraph are left out.
    """
    kept: dict[str, list[str]] = {}
    seen: set[str] = set()
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
            lines = block.strip("\n").split("\n")
            indents = {len(line) - len(line.lstrip()) for line in lines}
            joined = re.sub(r"(?<=\w)-\n\s*(?=[a-z])", "-", block)  # "user-" at a line's end, "defined" on the next
            paragraph = re.sub(r"\s+", " ", joined).strip()
            # Footnote marks, then the quote marks, stars and backquotes that Sphinx puts around code and emphasis.
            paragraph = re.sub(r'["*`]', "", re.sub(r" ?\[\d+\]", "", paragraph))
            if len(indents) == 1 and _is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                kept.setdefault(topic, []).append(paragraph)
    return {topic: "\n\n".join(paragraphs) for topic, paragraphs in kept.items()}


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
