"""What of an executed notebook is kept? Not what differs from run to run or from machine to machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat

from interp.report import _inputs

#: Tags of the cells that papermill adds to an executed notebook.
_ADDED = {"injected-parameters", "papermill-error-cell-tag"}
#: What differs between machines and runs in an output that is otherwise the same.
_PRIVATE = [
    *(
        (re.compile(rf"(?<![\w.-]){re.escape(str(folder))}(?![\w.-])"), shown)
        for folder, shown in ((_inputs.PACKAGE.parent, "<interp>"), (Path.home(), "~"))
        if len(folder.parts) > 1
    ),
    (re.compile(r"[^\s\"'(]*/ipykernel_\d+/\d+\.py"), "<cell>"),
    (re.compile(r" at 0x[0-9a-f]{8,16}(?=>)"), ""),  # <Axes at 0x7f...>
]


def own_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells of an executed notebook that it had before papermill added its own.

    Args:
        notebook: the executed notebook.

    Returns:
        The cells, in order.
    """
    return [cell for cell in notebook.cells if not _ADDED.intersection(cell.metadata.get("tags", ()))]


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook without timings, progress bars, widget states, local paths and memory addresses.

    Args:
        notebook: an executed notebook; changed in place.
        path: file to write or replace.
    """
    notebook.metadata.clear()
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata.clear()
        if tags:
            cell.metadata["tags"] = tags
        if "injected-parameters" in tags:
            cell["id"] = "injected-parameters"
        if cell.cell_type == "code":
            cell["outputs"] = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.get("outputs", ()):
            output.update(_scrub(dict(output)))
    replace_text(path, nbformat.writes(notebook) + "\n")


def _scrub(value: Any) -> Any:
    """An output without paths of this machine and memory addresses."""
    if isinstance(value, dict):
        # An image is base64, where the letters of a path can stand by chance.
        return {k: v if str(k).startswith("image/") else _scrub(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    for pattern, shown in _PRIVATE:
        value = pattern.sub(shown, value)
    return value


def _is_progress(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr" and "\r" in output.text
    return "application/vnd.jupyter.widget-view+json" in output.get("data", ())


def replace_text(path: Path, text: str) -> None:
    """Write a text file all or nothing: a full disk or a kill leaves the old one.

    Args:
        path: file to write or replace.
        text: its new content.
    """
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
