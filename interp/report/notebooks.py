"""How is a paper's notebook run: with which parameters, on which model, and only when something has changed?"""

from __future__ import annotations

import base64
import contextlib
import difflib
import html
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

from interp.core import places
from interp.models import packaged
from interp.report import _inputs, _tidy
from interp.report._templates import render
from interp.report.claims import MIME, Claims

_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)

# What `report.atlas`, `report.lens` and `report.circuit` show in a notebook: pages in a frame, and a piece of a page.
_FRAME = re.compile(r'<iframe title="[^"]*" sandbox="allow-scripts" [^<>]*srcdoc="([^"]*)"></iframe>')
_CIRCUIT = '<div class="interp-circuit">'


class NotebookError(RuntimeError):
    """A notebook stopped before its end."""


class Figure(NamedTuple):
    """A figure of an executed notebook: the heading above it, and its PNG bytes."""

    caption: str
    png: bytes


class Page(NamedTuple):
    """A page to look through that an executed notebook shows: the heading above it, and the page's HTML, whole."""

    caption: str
    html: str


@dataclass(frozen=True)
class NotebookRun:
    """An executed notebook.

    Attributes:
        key: stem of the notebook's file name.
        path: where the executed notebook lies.
        reused: True when nothing had changed since an earlier run, so that it was not run again.
        parameters: every parameter with the value it had.
    """

    key: str
    path: Path
    reused: bool
    parameters: Mapping[str, Any]


def available() -> list[str]:
    """Keys of the notebooks that ship with the project.

    Returns:
        File names without `.ipynb`, sorted.
    """
    return sorted(path.stem for path in places.shipped("notebooks").glob("*.ipynb"))


def defaults_of(key: str) -> dict[str, Any]:
    """The parameters of a notebook.

    Args:
        key: its file name without `.ipynb`.

    Returns:
        {name: default}.

    Raises:
        ValueError: for an unknown key, or a parameters cell with more in it than constants.
    """
    return _defaults(key, nbformat.read(_find(key), as_version=4))


def run(
    key: str,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    fast: bool | None = None,
    out: str | os.PathLike[str] = "results",
    n_prompts: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> NotebookRun:
    """Run one of the project's notebooks, unless an equal run is already there.

    Two runs are equal when the notebook's sources, its parameters, the files of `interp/` and `data/`, the model's
    content (for a hub model: its name) and the versions of torch, transformers and transformer-lens are.

    Args:
        key: its file name without `.ipynb`.
        model: as for `interp.load`; here and below, None leaves the notebook's own default.
        device: for example "cuda".
        dtype: for example "bfloat16".
        fast: True for a small sample, to see that it runs.
        out: results folder; the executed notebook becomes `<out>/notebooks/<key>.ipynb`, which is also the working
            directory of its kernel.
        n_prompts: number of prompts.
        seed: seed of the notebook's random choices.
        progress: show a progress bar over the cells.

    Returns:
        The `NotebookRun`.

    Raises:
        ValueError: for an unknown key (the nearest are named), or an option that the notebook has no parameter for.
        NotebookError: when a cell failed or the kernel died. What was executed until then is kept.
        OSError: when `out` cannot be written.

    Cost: that of the notebook, which says so at its top, and about 3 s to start a kernel; nothing but reading the
    library's files when an equal run is there.
    """
    source = _find(key)
    notebook = nbformat.read(source, as_version=4)
    given = {"model": model, "device": device, "dtype": dtype, "fast": fast, "n_prompts": n_prompts, "seed": seed}
    defaults = _defaults(key, notebook)
    values = _values(key, defaults, {name: value for name, value in given.items() if value is not None})
    target = Path(out).expanduser().resolve() / "notebooks" / f"{key}.ipynb"
    digest = _inputs.digest(notebook, values)
    if target.is_file() and record_of(target).get("digest") == digest:
        return NotebookRun(key, target, True, values)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _record_path(target).unlink(missing_ok=True)  # from here on, and until success, the output is not a result
    except OSError as error:
        raise OSError(
            f"the results folder {out} cannot be written ({error}): choose another with out= or --out."
        ) from error
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    _execute(key, notebook, changed, target, progress)
    _tidy.write(nbformat.read(target, as_version=4), target)
    record = {"digest": digest, "parameters": values, "versions": _inputs.versions(), "commit": _inputs.commit()}
    _tidy.replace_text(_record_path(target), json.dumps(record, indent=1, sort_keys=True) + "\n")
    return NotebookRun(key, target, False, values)


def store(done: NotebookRun) -> Path:
    """Put an executed notebook's outputs into the project's `notebooks/`, for maintainers.

    What differs from run to run (timings, progress bars, paths of this machine) is left out.

    Args:
        done: a run of the current notebook with its default parameters.

    Returns:
        The path written.

    Raises:
        ValueError: when the run had other parameters, or the notebook was edited since.
    """
    source = _find(done.key)
    shipped = nbformat.read(source, as_version=4)
    if dict(done.parameters) != _inputs.parameters(shipped):
        raise ValueError(
            f"only a run with the notebook's own defaults is stored; {done.key} was run with {dict(done.parameters)}."
        )
    executed = nbformat.read(done.path, as_version=4)
    cells = _tidy.own_cells(executed)
    if [c.source for c in cells] != [c.source for c in shipped.cells]:
        raise ValueError(f"{source} was edited after it was run: run it again before storing.")
    for cell, original in zip(cells, shipped.cells, strict=True):
        cell["id"] = original.get("id", cell["id"])
    executed.cells = cells
    _tidy.write(executed, source)
    return source


def record_of(path: Path) -> dict[str, Any]:
    """What was written beside an executed notebook when it had run to its end.

    Args:
        path: the executed notebook.

    Returns:
        Its digest, parameters, versions and commit; an empty dict when it did not run to its end.
    """
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(_record_path(path).read_text(encoding="utf-8"))
        return stored if isinstance(stored, dict) else {}
    return {}


def claims_of(path: str | os.PathLike[str]) -> list[Claims]:
    """The claims that an executed notebook checked.

    Args:
        path: the executed notebook.

    Returns:
        One `Claims` for each output that carries them, in order.
    """
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", ())]
    return [Claims.from_json(output.data[MIME]) for output in outputs if MIME in output.get("data", ())]


def figures_of(path: str | os.PathLike[str]) -> list[Figure]:
    """The figures of an executed notebook.

    Args:
        path: the executed notebook.

    Returns:
        One `Figure` for each PNG output, in order, captioned with the nearest markdown heading above it.
    """
    figures, heading = [], ""
    for cell in _tidy.own_cells(nbformat.read(path, as_version=4)):
        if cell.cell_type == "markdown" and (headings := _HEADING.findall(cell.source)):
            heading = headings[-1]
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                figures.append(Figure(heading, base64.b64decode(output.data["image/png"])))
    return figures


def pages_of(path: str | os.PathLike[str]) -> list[Page]:
    """The pages to look through that an executed notebook shows in frames of their own, and its circuits.

    Args:
        path: the executed notebook.

    Returns:
        One `Page` for each of `report.atlas.atlas_html`, `report.lens.lens_html` and `report.circuit.view`, in order,
        captioned as figures are.
    """
    pages, heading = [], ""
    for cell in _tidy.own_cells(nbformat.read(path, as_version=4)):
        if cell.cell_type == "markdown" and (headings := _HEADING.findall(cell.source)):
            heading = headings[-1]
        for output in cell.get("outputs", ()):
            shown = output.get("data", {}).get("text/html", "")
            if framed := _FRAME.fullmatch(shown):
                pages.append(Page(heading, html.unescape(framed[1])))
            elif shown.startswith(_CIRCUIT):
                pages.append(Page(heading, render("circuit_page.html.j2", fragment=shown)))
    return pages


def title_of(path: str | os.PathLike[str]) -> str:
    """Title of a notebook.

    Args:
        path: the notebook.

    Returns:
        Its first markdown heading; without one, the stem of its file name.
    """
    for cell in _tidy.own_cells(nbformat.read(path, as_version=4)):
        if cell.cell_type == "markdown" and (headings := _HEADING.findall(cell.source)):
            return headings[0]
    return Path(path).stem


def error_of(path: str | os.PathLike[str]) -> str:
    """Where and how an executed notebook failed.

    Args:
        path: the executed notebook.

    Returns:
        "cell 4 (In [3]): ValueError: ..." with cells counted from 1 as in the shipped notebook; "" without a failure.
    """
    for number, cell in enumerate(_tidy.own_cells(nbformat.read(path, as_version=4)), start=1):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                line = f"{output.ename}: {output.evalue}".strip().splitlines()[0]
                return f"cell {number} (In [{cell.execution_count}]): {line}"
    return ""


def _find(key: str) -> Path:
    known = available()
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        raise ValueError(f"no notebook {key!r}. Nearest: {', '.join(near) or 'none, the notebooks folder is empty'}.")
    return places.shipped("notebooks") / f"{key}.ipynb"


def _defaults(key: str, notebook: nbformat.NotebookNode) -> dict[str, Any]:
    try:
        return _inputs.parameters(notebook)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"notebook {key!r}: {error}") from None


def _values(key: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in defaults:
            raise ValueError(f"notebook {key!r} has no parameter {name!r}; it has {', '.join(defaults) or 'none'}.")
    model = given.get("model")
    if model is not None and model not in packaged.catalogue() and Path(model).expanduser().exists():
        # The kernel works in the results folder: a path relative to the caller's would not be found there.
        given["model"] = str(Path(model).expanduser().resolve())
    return defaults | given


def _execute(key: str, notebook: nbformat.NotebookNode, changed: dict[str, Any], target: Path, progress: bool) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        papermill.execute_notebook(
            notebook,
            str(target).replace("{", "{{").replace("}", "}}"),  # papermill takes it for a format string
            changed,
            kernel_manager_class=_this_interpreter(),
            kernel_name="python3",
            language="python",
            cwd=str(target.parent),
            progress_bar=progress,
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"notebook {key!r} stopped in {error_of(target)}\nWhat was executed until then is in {target}"
        ) from error
    except DeadKernelError as error:
        raise NotebookError(
            f"notebook {key!r}: its kernel died, most often for lack of memory; try a smaller model, fewer prompts or "
            f"fast mode.\nWhat was executed until then is in {target}"
        ) from error


def _this_interpreter() -> type:
    """A manager of kernels of this interpreter with this `interp`, whatever kernels the user has installed."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    search = [str(_inputs.PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    spec = KernelSpec(
        # Level 40, errors: the kernel's warnings about its own transport would stand in the middle of the progress bar.
        argv=[sys.executable, "-m", "ipykernel_launcher", "--log-level=40", "-f", "{connection_file}"],
        env={"PYTHONPATH": os.pathsep.join(filter(None, search))},
        display_name="Python 3",
        language="python",
    )

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = property(lambda self: spec)  # pyright: ignore[reportIncompatibleMethodOverride]

    return ThisInterpreter


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")
