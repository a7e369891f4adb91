"""What does each head speak of? A figure of tokens, head by head and lens by lens, and a page to look through.

Both show what `interp.lenses.reading.top_tokens` returned, at one position of one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from interp.core.result import Result
from interp.report import _drawing as drawing
from interp.report._drawing import DOUBLE, style
from interp.report._page import Page, page
from interp.report.text import visible

_COLUMNS = ("prompt", "pos", "layer", "head", "component", "metric", "token", "value", "value_rank")
#: Promoted tokens are blue and above, suppressed ones orange and below.
_HUES = {"promotes": drawing.COLOURS[0], "suppresses": drawing.COLOURS[1]}
_MOST = 25  # heads in a figure: more do not fit a page

_MEANINGS = {
    "additive": "the head's part of the prediction that the heads of its layer explain together",
    "independent": "what this head's value alone lets one guess: a token that the head suppresses may come first",
    "direct": "what the head itself adds to the model's logits",
    "logit": "what the model would predict if it stopped before the layer",
    "tuned": "what the stream before the layer is known to lead to",
}


@style()
def top_tokens(
    result: Result,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    n: int = 5,
    prompt: int | None = None,
    pos: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heads down and lenses across: the tokens each promotes, and below them those it suppresses.

    The fuller a token's colour, the larger its logit beside the largest of that lens in the figure, which stands in the
    lens's heading: colours compare heads, not lenses. A long token is cut, and tokens that do not fit are left out. The
    column of a lens of the stream holds what it says before the head's layer.

    Args:
        result: what `lenses.reading.top_tokens` returned.
        heads: (layer, head) of each row; None for the 10 with the largest logit by the first lens, in the model's
            order. (Of lenses of the stream alone, a head is -1.)
        n: tokens of either side, if they fit.
        prompt: which; None for the first.
        pos: which position of it; None for its last.
        ax: axes to draw on; None for a new figure of two columns' width.

    Returns:
        The axes; one unit across is one character, one down a line.

    Raises:
        KeyError: a table of another method.
        ValueError: a prompt, position or head that the table has not, or more than 25 heads.
    """
    table, prompt, pos = _at(result, prompt, pos)
    lenses = _lenses(table)
    rows = _heads(table, heads, lenses[0])
    cells = {(row, lens): _cell(table, row, lens) for row in rows for lens in lenses}
    largest = {
        lens: max((float(cells[row, lens]["value"].abs().max()) for row in rows), default=0.0) for lens in lenses
    }
    n_lines = 2 * len(rows) + 3
    size, advance = drawing.TICK_SIZE - 1, 0.605 * (drawing.TICK_SIZE - 1) / 72
    if ax is None:
        edge = 0.05
        # Placed by hand: a character has one width, which a layout engine would not keep.
        ax = plt.figure(figsize=(DOUBLE, 0.135 * n_lines + 2 * edge)).add_axes(
            (edge / DOUBLE, 0.02, 1 - 2 * edge / DOUBLE, 0.96)
        )
    room = int(drawing.inches(ax)[0] / advance)
    first = max(len(_name(row)) for row in rows) + 2
    width = (room - first) // len(lenses)
    words: dict[str, Any] = {"fontsize": size, "family": "monospace", "va": "center_baseline", **drawing.LITERAL}
    for column, side in enumerate(reversed(_HUES)):
        ax.text(room - 12 * column, 0, side, color=_HUES[side], ha="right", **words)
    ax.text(0, 0, _context(result, prompt, pos, room - 26), color="0.35", **words)
    for column, lens in enumerate(lenses):
        at = first + column * width
        ax.text(at, 1, _cut(drawing.tick_text(lens, "component"), width - 1), weight="bold", **words)
        ax.text(at, 2, _cut(f"full colour: {largest[lens]:.2g} {result.unit}", width - 1), color="0.35", **words)
    for index, row in enumerate(rows):
        line = 3 + 2 * index
        ax.axhline(line - 0.5, color="0.85", linewidth=0.4)
        ax.text(0, line + 0.5, _name(row), **words)
        for column, lens in enumerate(lenses):
            own = cells[row, lens]
            for below, side in enumerate(_HUES):
                part = own[own["metric"] == side].nsmallest(n, "value_rank")
                _chips(ax, part, first + column * width, line + below, width - 1, largest[lens], words)
    ax.set(xlim=(0, room), ylim=(n_lines - 0.5, -0.6))
    ax.axis("off")
    return ax


def _chips(
    ax: Axes, part: pd.DataFrame, start: int, line: int, width: int, largest: float, words: dict[str, Any]
) -> None:
    """The tokens of one head, lens and side, as far as they fit."""
    at = start
    for token, value, side in zip(part["token"], part["value"], part["metric"], strict=True):
        text = _cut(visible(token), width)
        length = max(1, drawing.columns_of(text))
        if at + length > start + width:
            return
        colour = to_rgba(_HUES[side], 0.05 + 0.6 * abs(value) / largest if largest else 0.05)
        ax.add_patch(Rectangle((at, line - 0.42), length, 0.84, facecolor=colour, edgecolor="none"))
        ax.text(at + length / 2, line, text, ha="center", **words)
        at += length + 1


def _at(result: Result, prompt: int | None, pos: int | None) -> tuple[pd.DataFrame, int, int]:
    """The rows of one position of one prompt."""
    drawing.require(result.table, *_COLUMNS)
    table = result.table
    for column, asked in (("prompt", prompt), ("pos", pos)):
        there = sorted(set(table[column]))
        chosen = (there[0] if column == "prompt" else there[-1]) if asked is None else asked
        if chosen not in there:
            raise ValueError(
                f"{column} {asked} was not read, only {', '.join(map(str, there[:20]))}: choose from these."
            )
        table = table[table[column] == chosen]
    return table, int(table["prompt"].iloc[0]), int(table["pos"].iloc[0])


def _lenses(table: pd.DataFrame) -> list[str]:
    """The names of the lenses, those of heads before those of the stream."""
    ordered = table[["component", "head"]].drop_duplicates("component")
    return [*ordered["component"][ordered["head"] >= 0], *ordered["component"][ordered["head"] < 0]]


def _cell(table: pd.DataFrame, row: tuple[int, int], lens: str) -> pd.DataFrame:
    """What a lens says of a head; a lens of the stream, of the head's layer."""
    own = table[(table["component"] == lens) & (table["layer"] == row[0])]
    return own[own["head"].isin([row[1], -1])]


def _heads(table: pd.DataFrame, heads: Sequence[tuple[int, int]] | None, lens: str) -> list[tuple[int, int]]:
    """The rows of the figure."""
    there = set(zip(table["layer"].astype(int), table["head"].astype(int), strict=True))
    if heads is None:
        own = table[(table["component"] == lens)]
        largest = own["value"].abs().groupby([own["layer"], own["head"]]).max()
        chosen = largest.sort_values(ascending=False, kind="stable").index[:10]
        return sorted((int(layer), int(head)) for layer, head in chosen)
    rows = [(int(layer), int(head)) for layer, head in heads]
    if missing := [row for row in rows if row not in there]:
        raise ValueError(f"head {missing[0]} was not read: the table has {len(there)} heads, such as {min(there)}.")
    if not 1 <= len(rows) <= _MOST:
        raise ValueError(f"{len(rows)} heads were asked for: a figure can be read with 1 to {_MOST}; use lens_html.")
    return rows


def _name(row: tuple[int, int]) -> str:
    return f"{row[0]}.{row[1]}" if row[1] >= 0 else f"{row[0]} stream"


def _cut(text: str, width: int) -> str:
    if drawing.columns_of(text) <= width:
        return text
    while text and drawing.columns_of(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _context(result: Result, prompt: int, pos: int, room: int) -> str:
    """The text up to the position that was read, the start left out where it is too long."""
    tokens = [token for token in result.meta["prompts"][prompt][: pos + 1] if token is not None]
    text = visible("".join(tokens))
    start = f"position {pos}, after "
    while drawing.columns_of(text) > room - len(start) - 1:
        text = text[1:]
        start = start if start.endswith("…") else start + "…"
    return start + text


def lens_html(result: Result) -> Page:
    """A page with all heads to look through: choose a position, a head and a lens, and see the tokens of both ends.

    Each cell of the grid shows the first token of one lens; the panel beside it all tokens of all lenses, with their
    values. It is used with the pointer or the keyboard, loads nothing, and shows tokens as text only, with their spaces
    visible.

    Args:
        result: what `lenses.reading.top_tokens` returned.

    Returns:
        The page: shown when it is a cell's last line, written by `save`, and `str(page)` is its HTML (about 12 kB, and
        for each position and head about 0.2 kB a lens with k=10).

    Raises:
        KeyError: a table of another method.
        ValueError: a table without rows.
    """
    table = result.table
    drawing.require(table, *_COLUMNS, "value_token")
    lenses = _lenses(table)
    of_stream = {lens: bool((part["head"] < 0).all()) for lens, part in table.groupby("component")}
    named = [(drawing.tick_text(lens, "component"), lens) for lens in lenses]
    words, places = _places(table, lenses)
    prompts = [[None if token is None else visible(token) for token in tokens] for tokens in result.meta["prompts"]]
    data = {
        "lenses": [{"name": name, "stream": of_stream[lens]} for name, lens in named],
        "prompts": prompts,
        "words": words,
        "layers": sorted({int(layer) for layer in table["layer"]}),
        "heads": sorted({int(head) for head in table["head"] if head >= 0}),
        "places": places,
    }
    estimands = result.meta.get("estimands", {})
    return page(
        "lens", "What heads speak of", data, model=str(result.meta.get("model", "")), unit=result.unit,
        lenses=[(name, _MEANINGS.get(estimands.get(lens), "")) for name, lens in named],
        prompts=[(i, _cut("".join(token or "" for token in prompts[i]), 60)) for i in sorted(set(table["prompt"]))],
    )  # fmt: skip


def _places(table: pd.DataFrame, lenses: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The words; and of each position {"layer.head": {lens: [promoted, values, suppressed, values]}}, by number."""
    number = {lens: index for index, lens in enumerate(lenses)}
    words: dict[str, int] = {}
    places: dict[tuple[int, int], dict[str, dict[int, list[list[Any]]]]] = {}
    for row in table.sort_values("value_rank", kind="stable").itertuples():
        cells = places.setdefault((int(row.prompt), int(row.pos)), {})
        cell = cells.setdefault(f"{int(row.layer)}.{int(row.head)}", {})
        lists = cell.setdefault(number[row.component], [[], [], [], []])
        side = 2 * list(_HUES).index(row.metric)
        lists[side].append(words.setdefault(visible(row.token), len(words)))
        lists[side + 1].append(float(f"{row.value:.3g}"))
    return list(words), [
        {"prompt": prompt, "pos": pos, "cells": cells} for (prompt, pos), cells in sorted(places.items())
    ]
