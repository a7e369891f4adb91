"""How does a circuit look? A layered figure for a paper, and a page to hover over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from interp.circuits.circuit import Circuit
from interp.circuits.graph import INPUT, LOGITS, at
from interp.core.result import Result
from interp.report import _drawing as drawing
from interp.report import _tidy
from interp.report._layered import Layered, Wire, layered
from interp.report._templates import render
from interp.report.text import visible

#: What an edge carries, in words, and its colour on paper.
_KINDS = {
    "q": ("query", drawing.COLOURS[0]),
    "k": ("key", drawing.COLOURS[2]),
    "v": ("value", drawing.COLOURS[1]),
    "mlp": ("MLP", drawing.COLOURS[3]),
    "logits": ("logits", "#555555"),
}

_THIN, _THICK = 0.35, 3.2  # widths of edges in points


@drawing.style()
def draw(circuit: Circuit, *, ax: Axes | None = None) -> Axes:
    """A circuit's edges from the input at the bottom to the logits on top.

    Heads of a layer stand side by side, ordered so that lines are short, MLPs on the right, half a row higher. An edge
    into a head ends on the left (query), in the middle (key) or on the right (value) of its lower side; its colour says
    which, its width is proportional to |score|, and it is dashed where the score is negative. A key or value that heads
    share has a line to each of them that something reads.

    Args:
        circuit: of 1 to 400 edges; 10 to 150 are easy to read.
        ax: axes to draw on; None for a new figure of a column's or of two columns' width.

    Returns:
        The axes.

    Raises:
        ValueError: no edge, or too many to be read.
    """
    plan = layered(circuit)
    wide = len(plan.wires) > 25 or plan.widest > 5
    width = drawing.DOUBLE if wide else drawing.SINGLE
    height = min(9.0, 0.75 + plan.n_rows * (0.42 if plan.n_rows < 14 else 0.3))
    ax = drawing.canvas(ax, width, height)
    across, up = drawing.inches(ax)
    box = 0.15 * (plan.n_rows + 0.3) / up / 2  # half a node's height, in rows
    half = min(0.16 / across * 1.25, 0.42 / plan.widest)
    sizes = {name: (half * (3 if name in (INPUT, LOGITS) else 1), box) for name in plan.at}
    for wire in plan.wires:
        paint = {"edgecolor": _KINDS[wire.kind][1], "linestyle": "-" if wire.score >= 0 else (0, (3, 1.5))}
        ax.add_patch(PathPatch(
            Curve(_bezier(plan, wire, sizes), [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]),
            facecolor="none", linewidth=_width(wire, plan), alpha=0.8, capstyle="butt", **paint,
        ))  # fmt: skip
    for name, (x, y) in plan.at.items():
        wide_half, tall_half = sizes[name]
        ax.add_patch(FancyBboxPatch(
            (x - wide_half, y - tall_half), 2 * wide_half, 2 * tall_half, boxstyle="round,pad=0,rounding_size=0.006",
            mutation_aspect=tall_half / wide_half, facecolor="#f3e8ee" if name[0] == "m" else "white", edgecolor="0.25",
            linewidth=0.6, zorder=3,
        ))  # fmt: skip
        ax.text(x, y, _short(name), ha="center", va="center_baseline", fontsize=5.5, zorder=4, **drawing.LITERAL)
    for y, layer in plan.layers:
        ax.text(-0.03, y, f"layer {layer}", ha="right", va="center_baseline", fontsize=5.5, color="0.35")
    ax.set(xlim=(-0.14 if wide else -0.24, 1.22), ylim=(-0.5, plan.n_rows - 0.5))
    ax.axis("off")
    _legend(ax, plan)
    return ax


def _legend(ax: Axes, plan: Layered) -> None:
    present = [kind for kind in _KINDS if any(wire.kind == kind for wire in plan.wires)]
    handles = [Line2D([], [], color=_KINDS[kind][1], linewidth=1.6, label=_KINDS[kind][0]) for kind in present]
    if any(wire.score < 0 for wire in plan.wires):
        handles.append(Line2D([], [], color="0.3", linewidth=1.6, linestyle=(0, (3, 1.5)), label="negative"))
    if plan.smallest < plan.largest:
        handles.append(Line2D([], [], color="0.3", linewidth=_THICK, label=f"{plan.largest:.2g} {plan.unit}"))
    columns = len(handles) if drawing.inches(ax)[0] > 4 else 3
    legend = ax.legend(
        handles=handles, frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns,
        handlelength=1.6, columnspacing=1.0, borderaxespad=0.1,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set(**drawing.LITERAL)


def _bezier(plan: Layered, wire: Wire, sizes: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The four points of an edge's curve: it leaves upwards and arrives from below."""
    (x0, y0), (x1, y1) = plan.at[wire.src], plan.at[wire.dst]
    x1 += wire.shift * 0.6 * sizes[wire.dst][0]
    y0, y1 = y0 + sizes[wire.src][1], y1 - sizes[wire.dst][1]
    lift = 0.45 * (y1 - y0)
    return [(x0, y0), (x0 + wire.bulge, y0 + lift), (x1 + wire.bulge, y1 - lift), (x1, y1)]


def _width(wire: Wire, plan: Layered) -> float:
    if plan.smallest == plan.largest:  # nothing to tell apart
        return 1.0
    return max(_THIN, _THICK * abs(wire.score) / plan.largest)


def _short(name: str) -> str:
    """A node's name as the picture has it: "5.3" for a head, "m5" for an MLP."""
    if name in (INPUT, LOGITS):
        return name
    layer, head = at(name)
    return f"m{layer}" if head < 0 else f"{layer}.{head}"


@dataclass(frozen=True)
class View:
    """A circuit as HTML; a notebook shows it when it is a cell's last line.

    Attributes:
        fragment: what stands in the notebook; it names nothing outside itself.
    """

    fragment: str

    def _repr_html_(self) -> str:
        return self.fragment

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as a page of its own.

        Args:
            path: the file.

        Returns:
            The path.
        """
        page = Path(path)
        _tidy.replace_text(page, render("circuit_page.html.j2", fragment=self.fragment))
        return page


def view(circuit: Circuit, *, details: Result | None = None) -> View:
    """A circuit to look through: point at a node or an edge, or go through them with the Tab key.

    A node shows its edges alone, and lists their scores; an edge shows its score. Enter or a click keeps what is shown,
    Escape lets it go. The page loads nothing, follows the reader's dark or light setting, and can be read (names and
    scores as tooltips) without scripts.

    Args:
        circuit: of 1 to 400 edges.
        details: what `circuits.describe.describe_nodes` returned for it: where heads look and what nodes write.

    Returns:
        The View; about half a kilobyte an edge.

    Raises:
        ValueError: no edge, or too many to be read; details of another kind.
    """
    plan = layered(circuit)
    scale_x, pitch, tall, half = 720.0, 58.0, 11.0, min(21.0, 0.42 * 720 / plan.widest)
    height = pitch * plan.n_rows

    def place(x: float, y: float) -> tuple[float, float]:
        return 90 + scale_x * x, height - pitch * (y + 0.5)

    sizes = {name: ((half * (1.6 if name in (INPUT, LOGITS) else 1)) / scale_x, tall / pitch) for name in plan.at}
    numbers = {name: index for index, name in enumerate(plan.at)}
    edges = [
        {
            "path": "M{:.1f} {:.1f} C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(
                *(value for point in _bezier(plan, wire, sizes) for value in place(*point))
            ),
            "width": f"{max(0.8, 1.6 * _width(wire, plan)):.2f}",
            "kind": wire.kind,
            "negative": wire.score < 0,
            "src": numbers[wire.src],
            "dst": numbers[wire.dst],
            "label": f"{wire.src} → {wire.input}: {wire.score:+.4g} {plan.unit}",
        }
        for wire in plan.wires
    ]  # fmt: skip
    notes = _notes(details)
    nodes = [
        {
            "id": numbers[name], "name": name, "short": _short(name), "x": place(*where)[0], "y": place(*where)[1],
            "half": sizes[name][0] * scale_x, "mlp": name[0] == "m",
            "into": _listed(plan, name, "dst"), "out": _listed(plan, name, "src"), "notes": notes.get(name, []),
        }
        for name, where in plan.at.items()
    ]  # fmt: skip
    present = [(kind, words) for kind, (words, _) in _KINDS.items() if any(w.kind == kind for w in plan.wires)]
    fragment = render(
        "circuit.html.j2", edges=edges, nodes=nodes, kinds=present, tall=tall, width=960, height=round(height),
        layers=[(place(0.0, float(y))[1], layer) for y, layer in plan.layers], unit=plan.unit, n_edges=len(circuit),
        text=visible(str(details.meta.get("text", ""))) if details is not None else "",
        method=str(circuit.meta.get("method", "")), model=str(circuit.meta.get("model", "")),
    )  # fmt: skip
    return View(fragment)


def _listed(plan: Layered, name: str, side: str) -> list[tuple[str, str]]:
    """(name, score) of a node's edges on one side, the largest first."""
    own = [wire for wire in reversed(plan.wires) if getattr(wire, side) == name]
    if side == "dst":
        return [(f"{wire.src} ({_KINDS[wire.kind][0]})", f"{wire.score:+.4g}") for wire in own]
    return [(wire.input, f"{wire.score:+.4g}") for wire in _once(own)]


def _once(wires: list[Wire]) -> list[Wire]:
    """A shared key or value once, though it has a line to each head."""
    return list({wire.input: wire for wire in reversed(wires)}.values())[::-1]


def _notes(details: Result | None) -> dict[str, list[tuple[str, list[tuple[str, str]]]]]:
    """By node: (heading, rows of a token and a number)."""
    if details is None:
        return {}
    missing = {"component", "metric", "token", "value"} - set(details.table.columns)
    if missing:
        raise ValueError(
            f"details is a table of {details.method} without {sorted(missing)[0]!r}: give what "
            "circuits.describe.describe_nodes returned."
        )
    headings = {"attention": "attends to", "writes": "raises (logits)"}
    found: dict[str, list[Any]] = {}
    for (node, metric), part in details.table.groupby(["component", "metric"], sort=False):
        found.setdefault(str(node), []).append((headings.get(str(metric), str(metric)), _tokens(part)))
    return found


def _tokens(part: pd.DataFrame) -> list[tuple[str, str]]:
    places = part["k_pos"] if "k_pos" in part else [-1] * len(part)
    return [
        (visible(str(token)) + (f" @{int(place)}" if place >= 0 else ""), f"{value:.3g}")
        for token, value, place in zip(part["token"], part["value"], places, strict=True)
    ]
