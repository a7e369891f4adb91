"""How does a figure or a table get into a paper, so that equal data give equal files?

Files hold no clock time and no random names, and are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interp.circuits.circuit import Circuit
from interp.circuits.network import to_networkx
from interp.core.result import Result
from interp.report.text import escape_latex, visible

#: What each kind of file records by default that changes from run to run or from machine to machine.
_NO_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_RC = {"svg.hashsalt": "interp", "svg.fonttype": "path", "pdf.fonttype": 42}
_DPI = 300


def save(
    thing: Axes | Figure | Result | pd.DataFrame | Circuit,
    path: str | os.PathLike[str],
    *,
    formats: Sequence[str] | None = None,
    digits: int = 4,
) -> list[Path]:
    r"""Write a figure as PDF, SVG and PNG, a table as CSV, LaTeX and JSON, or a circuit as GraphML, JSON and CSV.

    CSV and JSON hold every digit; LaTeX is a booktabs table (`\usepackage{booktabs}`) with rounded numbers and all
    text escaped. JSON also holds method, unit and meta. A Result's arrays are kept by `Result.save`.

    A circuit's GraphML and JSON (networkx's node-link form) are those of `circuits.network.to_networkx`; its CSV is the
    table of edges. `Circuit.save` keeps the whole of it.

    Args:
        thing: axes (their whole figure is saved) or a figure; a Result or a DataFrame; a Circuit.
        path: a file name that ends in a format, or a name without ending for all formats that fit the thing.
        formats: the formats to write instead, for example ["pdf", "png"].
        digits: significant digits of the numbers in LaTeX.

    Returns:
        The paths written, one a format. Equal data give byte-identical files (with the same versions and fonts).

    Raises:
        TypeError: for a thing that is none of these.
        ValueError: for a format that is not known or does not fit the thing.
        OSError: when a file cannot be written (no such folder, read-only, disk full); no part of it is left behind,
            and a file that was there before is unchanged.
    """
    writers = _writers(thing, digits)
    path = Path(path)
    stem, wanted = _formats(path, formats, list(writers), thing)
    paths = [stem.with_name(f"{stem.name}.{form}") for form in wanted]
    # Everything is drawn in memory before the first file is touched.
    contents = [writers[form]() for form in wanted]
    for target, content in zip(paths, contents, strict=True):
        _write(target, content)
    return paths


def _writers(thing: Any, digits: int) -> dict[str, Callable[[], bytes]]:
    if isinstance(thing, Axes):
        thing = thing.get_figure(root=True)
    if isinstance(thing, Figure):
        return {form: functools.partial(_figure, thing, form) for form in _NO_METADATA}
    if isinstance(thing, (Result, pd.DataFrame)):
        return {"csv": lambda: _csv(thing), "tex": lambda: _tex(thing, digits), "json": lambda: _json(thing)}
    if isinstance(thing, Circuit):
        return {
            "graphml": lambda: ("\n".join(nx.generate_graphml(to_networkx(thing))) + "\n").encode(),
            "json": lambda: _network_json(thing),
            "csv": lambda: _csv(thing.edges),
        }
    raise TypeError(
        f"save was given a {type(thing).__name__}; it needs matplotlib Axes or a Figure, a Result, a DataFrame, or a "
        "Circuit."
    )


def _formats(path: Path, formats: Sequence[str] | None, fit: list[str], thing: Any) -> tuple[Path, list[str]]:
    """The path without its ending, and the formats to write."""
    suffix = path.suffix.removeprefix(".").lower()
    if formats is None:
        wanted = [suffix] if suffix else fit
        stem = path.with_suffix("")
    else:
        wanted = [form.removeprefix(".").lower() for form in formats]
        stem = path.with_suffix("") if suffix in (*_NO_METADATA, "csv", "tex", "json", "graphml") else path
    for form in wanted:
        if form not in fit:
            raise ValueError(
                f"{form!r} is not a format that a {type(thing).__name__} is saved in, which are {', '.join(fit)}: "
                f"end {str(path)!r} in one of these, or give formats=[{fit[0]!r}]."
            )
    return stem, wanted


def _figure(figure: Figure, form: str) -> bytes:
    with mpl.rc_context(_RC):
        _restart_layout(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=_DPI, metadata=_NO_METADATA[form])
    return buffer.getvalue()


def _restart_layout(figure: Figure) -> None:
    """Put the axes back where they were before the first draw.

    A layout engine starts from where the last draw left the axes and so moves them a little with every draw: the
    second file of one figure would differ from the first.
    """
    if figure.get_layout_engine() is not None:
        for ax in figure.axes:
            place = ax.get_subplotspec()
            if place is not None and ax.get_in_layout():
                ax.set_subplotspec(place)


def _frame(thing: Result | pd.DataFrame) -> pd.DataFrame:
    """The table with a meaningful index (as in a grid or a grouped table) turned into columns."""
    frame = thing.table if isinstance(thing, Result) else thing
    meaningful = any(name is not None for name in frame.index.names) or not isinstance(frame.index, pd.RangeIndex)
    return frame.reset_index() if meaningful else frame


def _csv(thing: Result | pd.DataFrame) -> bytes:
    # All text is quoted, because a bare carriage return in a token would be read as the end of the row.
    text = _frame(thing).to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text.encode("utf-8", errors="backslashreplace")


def _json(thing: Result | pd.DataFrame) -> bytes:
    frame = _frame(thing)
    columns = [str(column) for column in frame.columns]
    rows = [dict(zip(columns, map(_plain, row), strict=True)) for row in frame.itertuples(index=False, name=None)]
    known = {"method": thing.method, "unit": thing.unit, "meta": dict(thing.meta)} if isinstance(thing, Result) else {}
    return (json.dumps({**known, "columns": columns, "rows": rows}, indent=1, allow_nan=False) + "\n").encode()


def _network_json(circuit: Circuit) -> bytes:
    data = nx.node_link_data(to_networkx(circuit), edges="edges")
    data["graph"]["meta"] = dict(circuit.meta)
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """A cell as JSON has it: a missing value is null, an infinity the text "Infinity"."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _tex(thing: Result | pd.DataFrame, digits: int) -> bytes:
    frame = _frame(thing)
    cells = pd.DataFrame({i: [_tex_cell(v, digits, name) for v in frame.iloc[:, i]] for i, name in enumerate(frame)})
    cells.columns = [_tex_header(str(name), thing) for name in frame.columns]
    align = "".join("r" if pd.api.types.is_numeric_dtype(dtype) else "l" for dtype in frame.dtypes)
    return cells.to_latex(index=False, escape=False, column_format=align).encode("utf-8")


def _tex_header(name: str, thing: Result | pd.DataFrame) -> str:
    words = name.removeprefix("value_").replace("_", " ")
    return escape_latex(f"{words} ({thing.unit})" if name == "value" and isinstance(thing, Result) else words)


def _tex_cell(value: Any, digits: int, column: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return _tex_sign(str(value))
    if isinstance(value, (float, np.floating)):
        return _tex_number(float(value), digits)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "{--}"
    return escape_latex(visible(str(value)) if column == "token" else str(value))


def _tex_number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "{--}"
    if math.isinf(value):
        return r"$\infty$" if value > 0 else r"$-\infty$"
    mantissa, _, exponent = f"{value:#.{digits}g}".partition("e")
    number = _tex_sign(mantissa.removesuffix("."))
    return rf"{number} $\times 10^{{{int(exponent)}}}$" if exponent else number


def _tex_sign(number: str) -> str:
    return f"${number}$" if number.startswith("-") else number


def _write(path: Path, content: bytes) -> None:
    # Beside the target, because a rename is atomic only within a file system; named by process, because two may write.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        _discard(part)
        raise OSError(
            error.errno,
            f"{path} was not written ({error.strerror or error}). What it shows is still in memory: save it again to a "
            "folder that exists and has room",
            str(path),
        ) from error
    except BaseException:
        _discard(part)
        raise


def _discard(part: Path) -> None:
    # The error that led here is the one to report.
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
