"""What do all figures share? Sizes, colours that mean something, labels with units, and tick labels that fit."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from interp.core.result import Result
from interp.report.text import visible

#: Widths in inches of one and of two columns of a paper.
SINGLE, DOUBLE = 3.3, 6.9

#: Okabe and Ito's colours with grey for the yellow, which is too pale for a thin line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
HATCHES = (None, "////", "....")
DASHES = ("-", "--", ":", "-.")

STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "figure.dpi": 200,
    # A token is drawn as it is, never compiled.
    "text.usetex": False,
}
TICK_SIZE = 7
#: Text that may hold a token: matplotlib would read what stands between two dollar signs as mathematics.
LITERAL = {"parse_math": False, "usetex": False}

_NAMES = {"pos": "position", "q_pos": "query position", "k_pos": "key position", "src": "source", "dst": "destination"}


@contextmanager
def style() -> Iterator[None]:
    """The look of this library's figures, as a `with` block to make a figure of your own in.

    Yields:
        Nothing; matplotlib's global settings are as before when the block ends.
    """
    try:
        with mpl.rc_context(STYLE):
            try:
                yield
            finally:
                interactive = mpl.is_interactive()
    finally:
        # A notebook's backend turns this on when the first figure is made, which may be in here: were it put back,
        # every later figure would stay invisible.
        mpl.interactive(interactive)


def canvas(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure of that size in inches, with small ticks."""
    if ax is None:
        # "compressed" is "constrained" for axes that keep their cells square.
        _, ax = plt.subplots(figsize=(width, height), layout="compressed")
    # Ticks are made when the figure is drawn, outside `style`, so their size is set on the axes.
    ax.tick_params(labelsize=TICK_SIZE, width=0.6, length=2.5, pad=2)
    return ax


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes, before a layout engine makes room for labels."""
    box = ax.get_position()
    figure = ax.get_figure(root=True)
    return box.width * figure.get_figwidth(), box.height * figure.get_figheight()


def require(table: pd.DataFrame, *columns: str | None) -> None:
    """Raise an error for a table without rows, or one that names the first column that the table lacks."""
    for column in columns:
        if column is not None and column not in table.columns:
            raise KeyError(f"no column {column!r} to draw; the table has {', '.join(map(str, table.columns))}.")
    if table.empty:
        raise ValueError("nothing to draw: the table has no rows. Look at the filter that made it.")


def column_label(column: str, data: Result | pd.DataFrame) -> str:
    """What an axis says: a column's name in words, and for `value` the metric, if there is one, and the unit."""
    if column == "value" and isinstance(data, Result):
        metrics = data.table["metric"].unique() if "metric" in data.table.columns else []
        return f"{str(metrics[0]).replace('_', ' ')} ({data.unit})" if len(metrics) == 1 else data.unit
    name = str(column)
    return _NAMES.get(name, name.removeprefix("value_").replace("_", " "))


def wrapped(label: str, length: float) -> str:
    """A label broken into lines that fit a length in inches at the labels' size."""
    return textwrap.fill(label, max(12, int(length / 0.058)))


def name_axes(ax: Axes, x: str, y: str) -> None:
    """Label both axes, in as many lines as it takes."""
    width, height = inches(ax)
    ax.set_xlabel(wrapped(x, width), labelpad=2)
    ax.set_ylabel(wrapped(y, height), labelpad=2)


def colours(values: np.ndarray, *, sequential: str = "viridis") -> tuple[str, Normalize]:
    """A colour map and its range: white at zero between blue and red for signed values, else from pale to dark.

    Values below zero by no more than rounding (1e-6 of the largest) do not make the data signed.
    """
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if min(-low, high) > 1e-6 * largest:
        return "RdBu_r", Normalize(-largest, largest)
    return sequential, Normalize(low, high)


def colour_bar(ax: Axes, mappable: ScalarMappable, label: str, *, below: tuple[float, ...] | None = None) -> None:
    """A thin labelled colour bar, to the right of the axes or in a box below them (in fractions of the axes)."""
    width, height = inches(ax)
    # Inside the axes' own coordinates, so that it is as tall as the axes when these keep their cells square.
    place = ax.inset_axes(below or (1 + 0.06 / width, 0, 0.09 / width, 1))
    orientation = "horizontal" if below else "vertical"
    bar = ax.get_figure(root=True).colorbar(mappable, cax=place, orientation=orientation)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=TICK_SIZE, width=0.6, length=2, pad=2)
    bar.set_label(wrapped(label, width if below else height), labelpad=3)


#: Columns that hold tokens; text in any other is the library's own words, whose spaces need no showing.
TOKEN_COLUMNS = ("token", "src", "dst")


def tick_text(value: Any, column: str = "token") -> str:
    """A number, a token or a word as a tick says it."""
    if isinstance(value, str):
        return visible(value) if column in TOKEN_COLUMNS else value
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value)


def label_cells(ax: Axes, axis: str, values: Sequence[Any], *, column: str = "token", pitch: float = 0.11) -> None:
    """Tick labels at cells 0, 1, 2, ...: all of them, or every 2nd, 5th, 10th, ... where they would touch.

    Args:
        ax: the axes.
        axis: "x" or "y".
        values: what each cell stands for.
        column: the table's column they are from.
        pitch: inches a label needs.
    """
    texts = [tick_text(value, column) for value in values]
    length = inches(ax)[0 if axis == "x" else 1]
    widest = max(map(len, texts), default=1)
    turned = axis == "x" and len(texts) * max(pitch, 0.06 * widest + 0.07) > length and widest > 3
    needed = pitch if axis == "y" or turned else max(pitch, 0.06 * widest + 0.07)
    steps = [factor * 10**power for power in range(6) for factor in (1, 2, 5)]
    step = next((s for s in steps if len(texts) / s * needed <= length), steps[-1])
    shown = range(0, len(texts), step)
    set_ticks = ax.set_xticks if axis == "x" else ax.set_yticks
    set_ticks(list(shown), [texts[i] for i in shown], rotation=90 if turned else 0, **LITERAL)


def whole_ticks(ax: Axes, axis: str, values: pd.Series) -> None:
    """Integer ticks for a column of integers such as a layer, a head or a position."""
    if pd.api.types.is_integer_dtype(values):
        (ax.xaxis if axis == "x" else ax.yaxis).set_major_locator(MaxNLocator("auto", integer=True))


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each line at its right end, in its colour, moved apart where the names would touch.

    Args:
        ax: the axes, with their final limits.
        ends: (x, y, text, colour) of each line's last point.
    """
    heights = np.clip(_in_axes(ax, np.array([(x, y) for x, y, _, _ in ends]))[:, 1], 0, 1)
    gap = 0.125 / inches(ax)[1]
    order = np.argsort(heights, kind="stable")
    spread = _apart(heights[order], gap)
    for at, index in zip(spread, order, strict=True):
        x, y, text, colour = ends[index]
        ax.annotate(
            text, (x, y), xytext=(1.02, at), textcoords="axes fraction", color=colour, fontsize=TICK_SIZE, va="center",
            annotation_clip=False, **LITERAL,
        )  # fmt: skip


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Sorted heights moved as little as needed to stand at least `gap` apart: blocks that touch share their centre."""
    blocks: list[tuple[float, int]] = []  # (centre, how many)
    for height in heights:
        centre, count = float(height), 1
        while blocks and centre - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            below, fewer = blocks.pop()
            centre, count = (centre * count + below * fewer) / (count + fewer), count + fewer
        blocks.append((centre, count))
    return np.concatenate([centre + gap * (np.arange(count) - (count - 1) / 2) for centre, count in blocks])


def label_points(ax: Axes, points: np.ndarray, texts: Sequence[str]) -> None:
    """Name points, the most outlying first; a name that finds no free place beside its point is left out.

    Args:
        ax: the axes, with their final limits.
        points: `[n 2]`, in data coordinates.
        texts: n names.
    """
    width, height = inches(ax)
    at = _in_axes(ax, points) * [width, height]
    distance = np.linalg.norm((at - np.median(at, axis=0)) / (at.std(axis=0) + 1e-12), axis=1)
    taken = [(x - 0.02, y - 0.02, x + 0.02, y + 0.02) for x, y in at]
    for index in np.argsort(-distance, kind="stable"):
        (x, y), text = at[index], texts[index]
        wide, tall = 0.056 * len(text) + 0.02, 0.1
        for right, up in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
            x0, y0 = (x + 0.03 if right > 0 else x - 0.03 - wide), (y + 0.02 if up > 0 else y - 0.02 - tall)
            box = (x0, y0, x0 + wide, y0 + tall)
            inside = box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                ax.annotate(
                    text, points[index], xytext=(2.2 * right, 1.5 * up), textcoords="offset points", fontsize=6.5,
                    ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top", **LITERAL,
                )  # fmt: skip
                break


def _in_axes(ax: Axes, points: np.ndarray) -> np.ndarray:
    """Points `[n 2]` in data coordinates as fractions of the axes."""
    ax.get_xlim(), ax.get_ylim()  # matplotlib sets automatic limits only when they are asked for
    return (ax.transData + ax.transAxes.inverted()).transform(points)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return bool(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def lay_out(str_tokens: Sequence[str], texts: Sequence[str], room: int) -> list[tuple[int, int, int, str]]:
    """(line, first column, columns, text) of each token; a token longer than a line is cut."""
    placed, line, column = [], 0, 0
    for token, text in zip(str_tokens, texts, strict=True):
        shown = text if columns_of(text) <= room else text[: room // 2 - 1] + "…"
        length = max(1, columns_of(shown))
        if column and column + length > room:
            line, column = line + 1, 0
        placed.append((line, column, length, shown))
        column += length
        if "\n" in token:
            line, column = line + 1, 0
    return placed


def columns_of(text: str) -> int:
    """Character cells a text takes: two for a wide (Chinese, Japanese, Korean) character, none for an accent."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def frame(ax: Axes) -> None:
    """All four edges, thin: a matrix has no open side."""
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.6)
