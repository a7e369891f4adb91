"""Which head does what? One figure of all heads by their strongest relation, and a page to look through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from interp.core.result import Result
from interp.report import _drawing as drawing
from interp.report._drawing import DOUBLE, SINGLE, style
from interp.report._page import Page, page
from interp.report.text import visible
from interp.weights.maps import PROMOTES, SUPPRESSES
from interp.weights.structure import THRESHOLD, per_head

# Six groups have a colour each and the rest is grey; black is left out, which at low opacity is grey too.
_HUES, OTHER = drawing.COLOURS[:6], drawing.COLOURS[-1]
# Opacity of a head at the threshold; the strongest has 1.
_FAINTEST = 0.3


@style()
def atlas_figure(
    scores: Result,
    *,
    threshold: float = THRESHOLD,
    categories: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Layers x heads, each head in the colour of its strongest relation.

    A head that promotes its relation is filled, one that suppresses it has a frame; the stronger of the two is drawn,
    the more opaque the higher the score. Heads without a score of at least the threshold are blank. The six relations
    with the most heads have colours of their own, the others share grey.

    Args:
        scores: what `maps.relation_scores` returned.
        threshold: smallest score that counts.
        categories: {relation: group}, to colour by group, for example
            `{r.name: r.category for r in relations}`; a relation without one is a group of its own. None colours by
            relation.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes, one unit a head across and a layer down, numbered from 0 in the order of the layers scored.

    Raises:
        ValueError: a threshold that is not above 0.
    """
    heads, paint = _strongest(scores, threshold, categories)
    layers = sorted(set(scores.table["layer"]))
    n_heads = int(scores.table["head"].max()) + 1
    width = SINGLE if n_heads <= 12 else DOUBLE
    ax = drawing.canvas(ax, width, float(np.clip(0.1 * len(layers) + 0.6, 1.9, 5.5)))
    cells = np.ones((len(layers), n_heads, 4))
    row = {layer: index for index, layer in enumerate(layers)}
    frames = []
    for head in heads.itertuples():
        at, colour = (row[head.layer], head.head), to_rgba(paint[head.group], head.opacity)
        if head.metric == PROMOTES:
            cells[at] = colour
        else:
            frames.append((at, colour))
    ax.imshow(cells, aspect="auto", interpolation="nearest")
    for (layer, head), colour in frames:
        place = (head - 0.36, layer - 0.34)
        ax.add_patch(Rectangle(place, 0.72, 0.68, facecolor="none", edgecolor=colour, linewidth=1.1))
    for edge in np.arange(1, len(layers)) - 0.5:
        ax.axhline(edge, color="0.9", linewidth=0.3)
    for edge in np.arange(1, n_heads) - 0.5:
        ax.axvline(edge, color="0.9", linewidth=0.3)
    drawing.label_cells(ax, "x", list(range(n_heads)), column="head")
    drawing.label_cells(ax, "y", layers, column="layer")
    drawing.frame(ax)
    drawing.name_axes(ax, "head", "layer")
    if len(heads):
        _legend(ax, heads, paint, threshold, "relation" if categories is None else "group")
    return ax


def _legend(ax: Axes, heads: pd.DataFrame, paint: Mapping[str, str], threshold: float, what: str) -> None:
    named = _named(heads, paint)
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour) for _, colour in named]
    labels = [text for text, _ in named]
    for opacity, score in ((_FAINTEST, threshold), (1.0, heads["value"].max())):
        handles.append(Rectangle((0, 0), 1, 1, facecolor=to_rgba(named[0][1], opacity)))
        labels.append(f"score {score:.2f}")
    handles.append(Rectangle((0, 0), 1, 1, facecolor="none", edgecolor="0.2"))
    labels.append("frame: suppresses")
    legend = ax.legend(
        handles, labels, title=f"{what} (heads)", loc="upper left", bbox_to_anchor=(1, 1), frameon=False,
        fontsize=drawing.TICK_SIZE, title_fontsize=drawing.TICK_SIZE, handlelength=1, handleheight=1,
        alignment="left", borderaxespad=0.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set(**drawing.LITERAL)


def _named(heads: pd.DataFrame, paint: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a legend says: (group and how many heads, colour), the grey ones as one."""
    counts = heads["group"].value_counts()
    named = [(f"{visible(group)} ({counts[group]})", colour) for group, colour in paint.items() if colour != OTHER]
    rest = [group for group, colour in paint.items() if colour == OTHER]
    return [*named, (f"{len(rest)} others ({counts[rest].sum()})", OTHER)] if rest else named


def _strongest(
    scores: Result, threshold: float, categories: Mapping[str, str] | None
) -> tuple[pd.DataFrame, dict[str, str]]:
    """The heads that count, `layer head metric target value group opacity`, and each group's colour, largest first."""
    table = per_head(scores, threshold=threshold).table
    # Of equal scores the promoted relation, which `per_head` gives first, is taken.
    table = table[table["value"] > 0].sort_values("value_strongest", ascending=False, kind="stable")
    heads = table.groupby(["layer", "head"]).head(1).sort_values(["layer", "head"])
    heads = heads[["layer", "head", "metric", "target", "value_strongest"]]
    heads = heads.rename(columns={"value_strongest": "value"}).reset_index(drop=True)
    heads["group"] = [(categories or {}).get(name, name) for name in heads["target"]]
    span = max(float(heads["value"].max() - threshold), 1e-9) if len(heads) else 1.0
    heads["opacity"] = _FAINTEST + (1 - _FAINTEST) * (heads["value"] - threshold) / span
    counts = heads["group"].value_counts()
    groups = sorted(counts.index, key=lambda group: (-counts[group], group))
    return heads, {group: _HUES[i] if i < len(_HUES) else OTHER for i, group in enumerate(groups)}


def atlas_html(
    scores: Result,
    *,
    mappings: Result | None = None,
    descriptors: Result | None = None,
    threshold: float = THRESHOLD,
    categories: Mapping[str, str] | None = None,
) -> Page:
    """A page with all heads to look through: relations, salient tokens and what becomes of them, descriptors.

    Point at a head, or move to it with the arrow keys, to see what it does; click it, or press Enter, to keep it in
    view; Escape lets go. The grid is coloured as `atlas_figure` is, or by the scores of one relation.

    Args:
        scores: what `maps.relation_scores` returned.
        mappings: what `salient.mappings` returned, for any of the heads.
        descriptors: what `describe.descriptors` returned, likewise.
        threshold: smallest score that is coloured.
        categories: {relation: group}, as for `atlas_figure`.

    Returns:
        The page: shown when it is a cell's last line, written by `save`, and `str(page)` is its HTML (about 20 kB, and
        for each head 0.3 kB for 40 relations and 1.3 kB for 15 x 5 mappings).

    Raises:
        ValueError: a threshold that is not above 0.
    """
    heads, paint = _strongest(scores, threshold, categories)
    names = list(dict.fromkeys(scores.table["target"]))
    cells = _cells(scores, names)
    for head in heads.itertuples():
        cells[_name(head.layer, head.head)] |= {
            "best": [names.index(head.target), head.metric == PROMOTES, round(float(head.opacity), 3)],
            "colour": paint[head.group],
        }
    _add_mappings(cells, mappings)
    _add_descriptors(cells, descriptors)
    data = {
        "relations": [visible(name) for name in names],
        "k": [int(scores.meta.get("k", {}).get(name, 0)) for name in names],
        "layers": sorted({int(layer) for layer in scores.table["layer"]}),
        "n_heads": int(scores.table["head"].max()) + 1,
        "threshold": threshold,
        "cells": cells,
    }
    return page(
        "atlas",
        "Atlas of heads",
        data,
        model=str(scores.meta.get("model", "")),
        threshold=f"{threshold:g}",
        n_heads=len(cells),
        n_coloured=len(heads),
        groups=_named(heads, paint),
        relations=sorted((visible(name), index) for index, name in enumerate(names)),
    )


def _name(layer: Any, head: Any) -> str:
    return f"{int(layer)}.{int(head)}"


def _cells(scores: Result, names: list[str]) -> dict[str, dict[str, Any]]:
    """Each head's scores in thousandths, in the order of the names."""
    cells: dict[str, dict[str, Any]] = {}
    for metric in (PROMOTES, SUPPRESSES):
        own = scores.table[scores.table["metric"] == metric]
        grid = own.pivot_table(index=["layer", "head"], columns="target", values="value")[names]
        for (layer, head), row in zip(grid.index, np.rint(1000 * grid.to_numpy()).astype(int).tolist(), strict=True):
            cells.setdefault(_name(layer, head), {})[metric] = row
    return cells


def _add_mappings(cells: dict[str, dict[str, Any]], mappings: Result | None) -> None:
    """[source, its saliency, [targets]] of each head, strongest first."""
    if mappings is None:
        return
    for (layer, head), own in mappings.table.groupby(["layer", "head"], sort=False):
        if cell := cells.get(_name(layer, head)):
            cell["mappings"] = [
                [visible(group["src"].iloc[0]), float(f"{group['value_saliency'].iloc[0]:.3g}"),
                 [visible(text) for text in group["dst"]]]
                for _, group in own.groupby("value_source", sort=False)
            ]  # fmt: skip


def _add_descriptors(cells: dict[str, dict[str, Any]], descriptors: Result | None) -> None:
    """[descriptor, share, share by chance, p] of each head."""
    if descriptors is None:
        return
    for row in descriptors.table.itertuples():
        if cell := cells.get(_name(row.layer, row.head)):
            numbers = [float(f"{number:.3g}") for number in (row.value, row.value_control, row.value_p)]
            cell.setdefault("descriptors", []).append([visible(row.metric), *numbers])
