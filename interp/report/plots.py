"""How is a table drawn for a paper? Six figures; each takes data and axes, and returns the axes.

Zero is white between blue and red when values are signed; otherwise colours run from dark to bright (or, for
attention and tokens, from white at the smallest to dark blue). Without `ax` a figure of one column's width is
made (two columns' where the data need it). For panels, make the figure inside `style()`:

    with plots.style():
        fig, (left, right) = plt.subplots(1, 2, figsize=(plots.DOUBLE, 2.4), layout="constrained")
    plots.lines(result, ax=left)
    plots.heatmap(result, ax=right)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from interp.core.result import Result
from interp.report import _drawing as drawing
from interp.report._drawing import DOUBLE, SINGLE, style
from interp.report.lens import top_tokens
from interp.report.text import visible

__all__ = ["DOUBLE", "RESULT_KINDS", "SINGLE", "bars", "heatmap", "lines", "pattern", "scatter", "style", "tokens"]

#: Groups named one by one up to this many; more groups of a number are coloured by it, with a colour bar.
_NAMED_GROUPS = 8


@style()
def heatmap(
    data: Result | pd.DataFrame,
    *,
    rows: str = "layer",
    columns: str = "head",
    value: str = "value",
    unit: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A matrix of colours, cells averaged over everything but the rows and columns.

    Args:
        data: a Result, a tidy DataFrame with these three columns, or a matrix such as `Result.grid` returns.
        rows: column that becomes the rows, first value on top.
        columns: column that becomes the columns.
        value: column that is coloured.
        unit: what the colour bar says; None for the unit of a Result's `value`, and the name of any other column.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes. Cells without a (finite) value are grey.

    Raises:
        KeyError: for a column that the table lacks.
    """
    grid, row_name, column_name = _grid(data, rows, columns, value)
    n_rows, n_columns = grid.shape
    width = SINGLE if n_columns <= 40 else DOUBLE
    ax = drawing.canvas(ax, width, float(np.clip(0.1 * n_rows + 0.6, 1.6, 5.5)))
    values = np.ma.masked_invalid(grid.to_numpy(dtype=float))
    cmap, norm = drawing.colours(values.compressed())
    image = ax.imshow(
        values, cmap=colormaps[cmap].with_extremes(bad="0.85"), norm=norm, aspect="auto", interpolation="nearest"
    )
    drawing.label_cells(ax, "x", list(grid.columns), column=column_name)
    drawing.label_cells(ax, "y", list(grid.index), column=row_name)
    drawing.frame(ax)
    drawing.name_axes(ax, drawing.column_label(column_name, data), drawing.column_label(row_name, data))
    drawing.colour_bar(ax, image, unit or drawing.column_label(value, data))
    return ax


def _grid(data: Result | pd.DataFrame, rows: str, columns: str, value: str) -> tuple[pd.DataFrame, str, str]:
    table = data.table if isinstance(data, Result) else data
    if table.index.name is not None and table.columns.name is not None:
        return table, str(table.index.name), str(table.columns.name)
    drawing.require(table, rows, columns, value)
    grid = table.pivot_table(index=rows, columns=columns, values=value, aggfunc="mean", dropna=False)
    return grid.reindex(index=_in_order(table[rows]), columns=_in_order(table[columns])), rows, columns


@style()
def lines(
    result: Result,
    *,
    x: str = "layer",
    y: str = "value",
    group: str | None = None,
    band: bool = True,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The mean of a column along another, one line a group.

    Args:
        result: the Result.
        x: column on the horizontal axis.
        y: column whose mean is drawn.
        group: column whose values each get a line; up to 8 are named beside their ends, more numbers by a colour bar.
        band: shade the 95% bootstrap interval over prompts (`Result.summary`), when there is a `prompt` column.
        log: logarithmic vertical axis.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes.

    Raises:
        KeyError: for a column that the table lacks.
        ValueError: when `log` is asked for and a mean is not positive.
    """
    table, low_high = _means(result, x, y, group)
    if log and (table["mean"] <= 0).any():
        raise ValueError(f"log=True needs positive means; the smallest is {table['mean'].min():g}: use log=False.")
    ax = drawing.canvas(ax, SINGLE, 2.2)
    categories = None if pd.api.types.is_numeric_dtype(table[x]) else _in_order(result.table[x])
    at = table[x].to_numpy(dtype=float) if categories is None else pd.Index(categories).get_indexer(table[x])
    table = table.assign(_at=at).sort_values("_at", kind="stable")
    groups = _groups(table, result, group)
    paint, by_number = _group_colours(group, [key for key, _ in groups])
    markers = "o" if table["_at"].nunique() <= 15 and not by_number else ""
    ends = []
    for index, (key, part) in enumerate(groups):
        dash = "-" if by_number else drawing.DASHES[index // len(drawing.COLOURS) % len(drawing.DASHES)]
        ax.plot(part["_at"], part["mean"], color=paint[index], linestyle=dash, marker=markers)
        if band and low_high:
            ax.fill_between(part["_at"], part["low"], part["high"], color=paint[index], alpha=0.2, linewidth=0)
        ends.append((part["_at"].iloc[-1], part["mean"].iloc[-1], _group_name(group, key), paint[index]))
    if log:
        ax.set_yscale("log")
    ax.margins(x=0.02)
    if categories is None:
        drawing.whole_ticks(ax, "x", table[x])
    else:
        drawing.label_cells(ax, "x", categories, column=x)
    drawing.name_axes(ax, drawing.column_label(x, result), drawing.column_label(y, result))
    if by_number:
        numbers = [float(key) for key, _ in groups]
        scale = ScalarMappable(Normalize(min(numbers), max(numbers)), "viridis")
        drawing.colour_bar(ax, scale, drawing.column_label(str(group), result))
    elif group is not None:
        drawing.label_ends(ax, ends)
    return ax


@style()
def bars(
    result: Result,
    *,
    x: str,
    y: str = "value",
    group: str | None = None,
    error: bool = True,
    horizontal: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The mean of a column for each value of another, as bars from zero.

    Args:
        result: the Result.
        x: column with a bar (or a cluster of bars) for each value, numbers ascending, text in order of appearance.
        y: column whose mean is the bar's height.
        group: column whose values stand side by side within a cluster.
        error: draw the 95% bootstrap interval over prompts (`Result.summary`), when there is a `prompt` column.
        horizontal: lay the bars on their side, the first on top: for names that are long.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes.

    Raises:
        KeyError: for a column that the table lacks.
    """
    table, low_high = _means(result, x, y, group)
    categories = _in_order(result.table[x])
    groups = _groups(table, result, group)
    n_bars = len(categories) * len(groups)
    height = max(2.2, 0.16 * n_bars + 0.5) if horizontal else 2.2
    ax = drawing.canvas(ax, SINGLE if n_bars <= 30 or horizontal else DOUBLE, height)
    hues, hatches = drawing.COLOURS, drawing.HATCHES
    fills = [
        {"facecolor": hues[i % len(hues)], "hatch": hatches[i // len(hues) % len(hatches)], "edgecolor": "white"}
        for i in range(len(groups))
    ]
    width = 0.8 / len(groups)
    draw = ax.barh if horizontal else ax.bar
    for index, (_, part) in enumerate(groups):
        at = pd.Index(categories).get_indexer(part[x]) + (index - (len(groups) - 1) / 2) * width
        draw(at, part["mean"], width * 0.94, **fills[index])
        if error and low_high:
            ends = np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy())
            place = (
                {"x": part["mean"], "y": at, "xerr": ends} if horizontal else {"x": at, "y": part["mean"], "yerr": ends}
            )
            ax.errorbar(**place, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=min(2.0, 20 / n_bars))
    (ax.axvline if horizontal else ax.axhline)(0, color="0.2", linewidth=0.6)
    (ax.set_ylim if horizontal else ax.set_xlim)(-0.6, len(categories) - 0.4)
    drawing.label_cells(ax, "y" if horizontal else "x", categories, column=x)
    names = drawing.column_label(x, result), drawing.column_label(y, result)
    drawing.name_axes(ax, *(reversed(names) if horizontal else names))
    if horizontal:
        ax.invert_yaxis()
    if group is not None:
        handles = [Rectangle((0, 0), 1, 1, **fill) for fill in fills]
        legend = ax.legend(
            handles, [_group_name(group, key) for key, _ in groups], frameon=False, fontsize=drawing.TICK_SIZE,
            loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(groups), 3), handlelength=1, borderaxespad=0.2,
            columnspacing=1,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set(**drawing.LITERAL)
    return ax


@style()
def scatter(result: Result, *, x: str, y: str, label: str | None = None, ax: Axes | None = None) -> Axes:
    """One point a row of the table.

    Args:
        result: the Result.
        x: column of numbers on the horizontal axis.
        y: column of numbers on the vertical axis.
        label: column that names the points; the most outlying are named first, and names that would overlap left out.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes.

    Raises:
        KeyError: for a column that the table lacks.
        ValueError: for a column that does not hold numbers.
    """
    table = result.table
    drawing.require(table, x, y, label)
    for column in (x, y):
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise ValueError(f"scatter needs numbers, but column {column!r} is {table[column].dtype}: use bars for it.")
    ax = drawing.canvas(ax, SINGLE, 2.5)
    crowded = len(table) > 300
    ax.scatter(
        table[x],
        table[y],
        s=4 if crowded else 10,
        color=drawing.COLOURS[0],
        alpha=0.4 if crowded else 0.8,
        linewidths=0,
    )
    ax.margins(0.08)
    drawing.whole_ticks(ax, "x", table[x])
    drawing.whole_ticks(ax, "y", table[y])
    drawing.name_axes(ax, drawing.column_label(x, result), drawing.column_label(y, result))
    if label is not None:
        finite = np.isfinite(table[[x, y]].to_numpy(dtype=float)).all(axis=1)
        named = table[finite]
        drawing.label_points(
            ax, named[[x, y]].to_numpy(dtype=float), [drawing.tick_text(t, label) for t in named[label]]
        )
    return ax


@style()
def pattern(attention: Any, *, tokens: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """One head's attention pattern, queries down and keys across.

    Args:
        attention: `[q_pos k_pos]`, an array or a CPU tensor. Where its upper triangle is all zeros (a causal model's)
            that triangle is left blank.
        tokens: the text of each position, for the tick labels; None numbers them.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: when the array is not square, or `tokens` are not as many as positions.
    """
    values = np.asarray(attention, dtype=float)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"pattern needs one head's [q_pos k_pos], a square array; got shape {values.shape}.")
    n = len(values)
    if tokens is not None and len(tokens) != n:
        raise ValueError(f"pattern got {len(tokens)} tokens for {n} positions: give one token a position.")
    upper = np.triu(np.ones_like(values, dtype=bool), k=1)
    blank = upper if not np.any(values[upper]) else np.zeros_like(upper)
    width = SINGLE if n <= 26 else DOUBLE
    ax = drawing.canvas(ax, width, 0.9 * width)
    cmap, norm = drawing.colours(values, sequential="Blues")
    if norm.vmin >= 0:
        norm = Normalize(0, norm.vmax)
    masked = np.ma.masked_array(values, blank | ~np.isfinite(values))
    image = ax.imshow(masked, cmap=colormaps[cmap].with_extremes(bad="white"), norm=norm, interpolation="nearest")
    names = list(range(n)) if tokens is None else list(tokens)
    drawing.label_cells(ax, "x", names)
    drawing.label_cells(ax, "y", names)
    drawing.frame(ax)
    drawing.name_axes(ax, "key position" if tokens is None else "key", "query position" if tokens is None else "query")
    drawing.colour_bar(ax, image, "attention weight")
    return ax


@style()
def tokens(str_tokens: Sequence[str], values: Any, *, unit: str, ax: Axes | None = None) -> Axes:
    """A text with each token shaded by its value.

    Args:
        str_tokens: the text of each token; a line ends after a token with a line break, and where it is full.
        values: `[pos]`, an array or a CPU tensor; a value that is not finite is grey.
        unit: unit of the values, for the colour bar.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes; one unit across is one character, one unit down one line.

    Raises:
        ValueError: when values are not as many as tokens.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(str_tokens),):
        raise ValueError(f"tokens needs one value a token; got {len(str_tokens)} tokens and values of {numbers.shape}.")
    size, advance = drawing.TICK_SIZE, 0.605 * drawing.TICK_SIZE / 72  # inches a character of DejaVu Sans Mono takes
    texts = [visible(token) for token in str_tokens]
    width, edge = SINGLE if sum(map(drawing.columns_of, texts)) <= 220 else DOUBLE, 0.05
    room = int((width - 2 * edge if ax is None else drawing.inches(ax)[0]) / advance)
    placed = drawing.lay_out(str_tokens, texts, room)
    n_lines = 1 + max((line for line, _, _, _ in placed), default=0)
    if ax is None:
        # Placed by hand: a character has one width, which a layout engine would not keep.
        height = 0.18 * n_lines + 0.5
        box = (edge / width, 1 - (edge + 0.18 * n_lines) / height, 1 - 2 * edge / width, 0.18 * n_lines / height)
        ax = plt.figure(figsize=(width, height)).add_axes(box)
    cmap, norm = drawing.colours(numbers, sequential="Blues")
    mappable = ScalarMappable(norm, colormaps[cmap].with_extremes(bad="0.85"))
    for (line, start, length, text), colour in zip(
        placed, mappable.to_rgba(np.ma.masked_invalid(numbers)), strict=True
    ):
        ax.add_patch(Rectangle((start, line - 0.45), length, 0.9, facecolor=colour, edgecolor="white", linewidth=0.5))
        bright = colour[:3] @ [0.299, 0.587, 0.114] > 0.5
        ax.text(
            start + length / 2, line, text, ha="center", va="center_baseline", fontsize=size, family="monospace",
            color="black" if bright else "white", **drawing.LITERAL,
        )  # fmt: skip
    ax.set(xlim=(0, room), ylim=(n_lines - 0.5, -0.5))
    ax.axis("off")
    # Two characters from either edge, where the bar's first and last tick labels need room.
    bar = (2 / room, -0.8 / n_lines, min(1 - 4 / room, 35 / room), 0.45 / n_lines)
    drawing.colour_bar(ax, mappable, unit, below=bar)
    return ax


def _means(result: Result, x: str, y: str, group: str | None) -> tuple[pd.DataFrame, bool]:
    """The mean of y by x and group, with `low` and `high` if there are prompts to resample."""
    drawing.require(result.table, x, y, group)
    by = [x] if group is None else [x, group]
    if "prompt" in result.table.columns and "prompt" not in by:
        return result.summary(by, value=y), True
    means = result.table.groupby(by, sort=True, dropna=False)[y].mean()
    return means.rename("mean").reset_index(), False


def _groups(table: pd.DataFrame, result: Result, group: str | None) -> list[tuple[Any, pd.DataFrame]]:
    """The rows of each group, in the order of `_in_order`."""
    if group is None:
        return [(None, table)]
    keys = _in_order(result.table[group])
    return [(key, table[table[group].isna() if pd.isna(key) else table[group] == key]) for key in keys]


def _in_order(column: pd.Series) -> list[Any]:
    """A column's values once each: numbers in ascending order, anything else in order of first appearance."""
    values = column.drop_duplicates()
    return list(values.sort_values() if pd.api.types.is_numeric_dtype(values) else values)


def _group_colours(group: str | None, keys: Sequence[Any]) -> tuple[list[Any], bool]:
    """A colour a group, and whether they encode a number."""
    many = group is not None and len(keys) > _NAMED_GROUPS
    if many and all(isinstance(key, (int, float, np.number)) for key in keys):
        low, high = float(min(keys)), float(max(keys))
        return [colormaps["viridis"]((float(key) - low) / (high - low)) for key in keys], True
    return [drawing.COLOURS[i % len(drawing.COLOURS)] for i in range(len(keys))], False


def _group_name(group: str | None, key: Any) -> str:
    text = drawing.tick_text(key, group or "token")
    return text if isinstance(key, str) or group is None else f"{drawing.column_label(group, pd.DataFrame())} {text}"


#: What `Result.plot(kind)` can draw.
RESULT_KINDS: dict[str, Callable[..., Axes]] = {
    "heatmap": heatmap, "lines": lines, "bars": bars, "scatter": scatter, "top_tokens": top_tokens,
}  # fmt: skip
