"""Which cells does a sweep have? Every combination of some axes; along the other axes all is replaced together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from interp.core.edits import Edit
from interp.models.model import Model
from interp.patching._inputs import places
from interp.patching._runs import positions_of
from interp.tasks.task import Task

#: Sites that `patch` sweeps, and the axes that each has beside layer and pos.
AXES: Mapping[str, tuple[str, ...]] = {
    "resid_pre": (), "resid_mid": (), "resid_post": (), "attn_out": (), "mlp_out": (), "z": ("head",), "q": ("head",),
    "k": ("head",), "v": ("head",), "pattern": ("head",), "post": ("neuron",),
}  # fmt: skip

_ORDER = ("layer", "head", "pos", "neuron")


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of a sweep: for each axis, groups of places that are replaced together.

    Attributes:
        site: of all edits.
        swept: axes with a group a place, in the order of the cells.
        groups: for each axis its groups.
        places: of the axis pos: (name, index).
        asked: the positions as they were asked for; None for all.
    """

    site: str
    swept: tuple[str, ...]
    groups: Mapping[str, list[list[Any]]]
    places: list[tuple[str | None, int | Tensor]]
    asked: list[str] | None

    def cells(self) -> list[list[Edit]]:
        """Edits without values, a list for each cell."""
        return [
            [Edit(self.site, layer, head=head, pos=pos, neuron=neuron) for layer, head, pos, neuron in product(*chosen)]
            for chosen in product(*(self.groups[axis] for axis in _ORDER))
        ]

    def numbers(self, axis: str) -> list[int] | None:
        """What an axis was restricted to; None where all are meant."""
        found = [place for group in self.groups[axis] for place in group]
        return None if found == [None] else found

    def shape(self) -> tuple[int, ...]:
        """How many cells along each swept axis."""
        return tuple(len(self.groups[axis]) for axis in self.swept)

    def table(self, n_prompts: int) -> pd.DataFrame:
        """The columns that name a cell, a row for each prompt and cell."""
        prompt, *index = np.indices((n_prompts, *self.shape())).reshape(1 + len(self.swept), -1)
        columns: dict[str, np.ndarray] = {"prompt": prompt}
        for axis, which in zip(self.swept, index, strict=True):
            if axis == "pos":
                columns["pos"] = positions_of(self.places, n_prompts)[which, prompt]
                if any(name is not None for name, _ in self.places):
                    names = [name if name is not None else str(at) for name, at in self.places]
                    columns["token"] = np.array(names, dtype=object)[which]
            else:
                columns[axis] = np.array([group[0] for group in self.groups[axis]])[which]
        return pd.DataFrame(columns)


def grid(
    model: Model,
    task: Task,
    site: str,
    by: str | Sequence[str],
    positions: str | int | Sequence[str | int] | None,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    neurons: Sequence[int] | None,
) -> Grid:
    """The cells that are asked for.

    Args:
        model: for its sizes.
        task: for its positions.
        site: one of `AXES`.
        by: axes that are swept.
        positions: names and indices, or None for all.
        layers: which, or None for all.
        heads: which, or None for all.
        neurons: which, or None for all.

    Returns:
        A Grid.

    Raises:
        ValueError: an unknown site or axis, an axis that the site has not, or nothing left.
    """
    if site not in AXES:
        raise ValueError(f"site {site!r} is not known; use one of {', '.join(AXES)}.")
    axes = {by} if isinstance(by, str) else set(by)
    if unknown := sorted(axes - set(_ORDER)):
        raise ValueError(f"by={unknown[0]!r} is not known; use any of {', '.join(_ORDER)}.")
    given = {"head": heads, "neuron": neurons}
    for axis in ("head", "neuron"):
        if axis not in AXES[site] and (axis in axes or given[axis] is not None):
            having = ", ".join(name for name, own in AXES.items() if axis in own)
            raise ValueError(f"site {site!r} has no {axis}s: leave {axis} out, or take site {having}.")
    sizes = {
        "layer": model.n_layers,
        "head": model.n_key_value_heads if site in ("k", "v") else model.n_heads,
        "neuron": model.d_mlp,
    }

    def groups(axis: str, chosen: Sequence[int] | None) -> list[list[Any]]:
        if chosen is not None and not len(chosen):
            raise ValueError(f"{axis}s=[] leaves nothing: name some of 0 to {sizes[axis] - 1}, or leave {axis}s out.")
        if chosen is None and axis not in axes and axis != "layer":
            return [[None]]  # one edit of them all
        numbers = [int(i) for i in (range(sizes[axis]) if chosen is None else chosen)]
        return [[i] for i in numbers] if axis in axes else [numbers]

    named = places(task, positions) if positions is not None or "pos" in axes else []
    at: list[list[Any]] = [[where] for _, where in named]
    if "pos" not in axes:
        at = [[where for _, where in named] or [None]]
    return Grid(
        site,
        tuple(axis for axis in _ORDER if axis in axes),
        {
            "layer": groups("layer", layers),
            "head": groups("head", heads),
            "pos": at,
            "neuron": groups("neuron", neurons),
        },
        named,
        None if positions is None else [str(at) if name is None else name for name, at in named],
    )


def window_of(model: Model, layer: int, size: int) -> range:
    """The layers around one: `size` of them, from layer - size // 2 on, cut off at both ends of the model.

    Args:
        model: for its layers.
        layer: the centre.
        size: how many, 1 for that layer alone.

    Returns:
        A range of layers.

    Raises:
        ValueError: a size below 1, or a layer that the model has not.
    """
    if size < 1:
        raise ValueError(f"window={size}: give 1 for single layers, or the number of layers that are treated together.")
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer {layer}: {model.name} has layers 0 to {model.n_layers - 1}.")
    start = layer - size // 2
    return range(max(0, start), min(model.n_layers, start + size))
