"""How does an information flow route look? One prompt's graph: tokens across, layers up, edges as wide as important."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from interp.core.result import Result
from interp.report import _drawing as drawing

#: Width of an edge that is the whole of its stream, in points.
_WIDTH = 4.0
_BLUE, _ORANGE, _GREY = drawing.COLOURS[0], drawing.COLOURS[1], "0.75"


@drawing.style()
def route(result: Result, *, prompt: int = 0, tokens: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """The route of one prompt.

    A layer is one unit up: from the stream before it, over the stream after attention half a unit higher, to the
    stream after the MLP. Attention edges of a pair of tokens are summed over heads and as wide as important, residual
    edges likewise; an MLP is a square on the stream, as large as important.

    Args:
        result: of `interp.circuits.flow_routes.routes`.
        prompt: which.
        tokens: the text of each position, for the tick labels; None numbers them.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes.

    Raises:
        KeyError: for a Result without the columns of a route.
        ValueError: a prompt without edges, or fewer tokens than positions.
    """
    drawing.require(result.table, "prompt", "layer", "q_pos", "k_pos", "component", "value")
    table = result.table[result.table["prompt"] == prompt]
    if table.empty:
        raise ValueError(f"prompt {prompt} has no edges in {result!r}: choose another, or lower tau.")
    n_pos = int(table["q_pos"].max()) + 1
    if tokens is not None and len(tokens) < n_pos:
        raise ValueError(f"route got {len(tokens)} tokens, and the prompt has edges at position {n_pos - 1}.")
    n_pos = n_pos if tokens is None else len(tokens)
    n_layers = int(result.meta.get("n_layers", table["layer"].max() + 1))
    ax = drawing.canvas(ax, drawing.SINGLE if n_pos <= 16 else drawing.DOUBLE, float(np.clip(0.16 * n_layers, 2, 6)))
    summed = table.groupby(["component", "layer", "q_pos", "k_pos"])["value"].sum().reset_index()
    for component, up, colour, order in (
        ("resid_attn", (0.0, 0.5), _GREY, 1), ("resid_mlp", (0.5, 1.0), _GREY, 1), ("attn", (0.0, 0.5), _BLUE, 2),
    ):  # fmt: skip
        mine = summed[summed["component"] == component]
        ends = [
            [(k, layer + up[0]), (q, layer + up[1])]
            for k, q, layer in zip(mine["k_pos"], mine["q_pos"], mine["layer"], strict=True)
        ]
        widths = (_WIDTH * mine["value"].clip(upper=1)).to_numpy()
        ax.add_collection(
            LineCollection(ends, linewidths=widths, colors=colour, zorder=order, capstyle="round", label=component)
        )
    mlps = summed[summed["component"] == "mlp"]
    ax.scatter(
        mlps["q_pos"], mlps["layer"] + 0.75, s=(30 * mlps["value"]).to_numpy(), marker="s", color=_ORANGE, zorder=3,
        linewidths=0,
    )  # fmt: skip
    ax.set_xlim(-0.7, n_pos - 0.3)
    ax.set_ylim(-0.3, n_layers + 0.3)
    drawing.label_cells(ax, "x", list(range(n_pos)) if tokens is None else list(tokens))
    drawing.name_axes(ax, "position" if tokens is None else "token", "layer")
    handles = [
        Line2D([], [], color=_BLUE, linewidth=2, label="attention"),
        Line2D([], [], color=_GREY, linewidth=2, label="residual"),
        Line2D([], [], color=_ORANGE, marker="s", linestyle="", markersize=4, label="MLP"),
    ]
    ax.legend(
        handles=handles, frameon=False, fontsize=drawing.TICK_SIZE, loc="lower left", bbox_to_anchor=(0, 1), ncols=3,
        borderaxespad=0.2, columnspacing=1,
    )  # fmt: skip
    return ax
