"""What does the outcome of a notebook depend on? Its code, the library, the data, the model and the versions."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nbformat

import interp
from interp.core import places
from interp.models import fingerprint, packaged

#: The folder of the `interp` that was imported.
PACKAGE = Path(interp.__file__).resolve().parent
_NUMERIC_LIBRARIES = ("torch", "transformers", "transformer-lens")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers.

    Returns:
        {distribution: version}; "interp" is among them.
    """
    return {name: _version(name) for name in ("interp", *_NUMERIC_LIBRARIES)}


def commit() -> str:
    """The git commit of the checkout that `interp` is imported from, with "+ changes" when files differ from it.

    Returns:
        The commit in hex; "" outside a checkout, or without git.
    """
    root = PACKAGE.parent
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return ""
    head = _git(root, "rev-parse", "HEAD")
    return head and head + (" + changes" if _git(root, "status", "--porcelain", "--", "interp", "data") else "")


def parameters(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """The parameters that a notebook takes, with their defaults.

    Args:
        notebook: a notebook with one cell tagged `parameters`, made of assignments of constants.

    Returns:
        {name: default}; empty without such a cell.

    Raises:
        ValueError: when the cell holds anything but constants.
    """
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    found = {}
    for statement in ast.parse("\n".join(c.source for c in cells)).body:
        try:
            (name,) = statement.targets if isinstance(statement, ast.Assign) else (statement.target,)  # type: ignore[attr-defined]
            found[name.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined, union-attr]
        except (AttributeError, ValueError):
            raise ValueError(
                f"the parameters cell may only set names to constants, one a line; found {ast.unparse(statement)!r}."
            ) from None
    return found


def model_identity(name: str) -> str:
    """What pins a model, as far as it is known without loading it.

    Args:
        name: as for `interp.load`.

    Returns:
        The SHA-256 of a packaged model or of a local file's or folder's content; for a hub name, the name.
        Cost: one read of local files, about 1 GB/s.
    """
    if name in packaged.catalogue():
        return packaged.catalogue()[name].sha256
    path = Path(name).expanduser()
    if path.is_file():
        return fingerprint.of_file(path)
    return fingerprint.of_folder(path) if path.is_dir() else name


def digest(notebook: nbformat.NotebookNode, values: Mapping[str, Any]) -> str:
    """SHA-256 over all that can change what a notebook puts out.

    Args:
        notebook: its cells' sources and tags count, not their outputs.
        values: every parameter with the value it will have.

    Returns:
        The digest in hex. Cost: one read of `interp/`, `data/` and of a local model.
    """
    found = hashlib.sha256()
    cells = [[c.cell_type, c.source, sorted(c.metadata.get("tags", ()))] for c in notebook.cells]
    facts = {"cells": cells, "values": dict(values), "versions": versions()}
    facts["model"] = model_identity(str(values["model"])) if "model" in values else ""
    found.update(json.dumps(facts, sort_keys=True, default=repr).encode())
    for root in (PACKAGE, places.shipped("data")):
        for path in _files(root):
            found.update(f"{path.relative_to(root).as_posix()}:{fingerprint.of_file(path)}\n".encode())
    return found.hexdigest()


def _files(root: Path) -> Iterable[Path]:
    # Not the caches that running writes, and not the copies of data and notebooks inside an installed package.
    skipped = {"__pycache__", "_data", "_notebooks"}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not skipped.intersection(parts) and not any(part.startswith(".") for part in parts):
            yield path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
