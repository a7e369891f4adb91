"""What is a set of components? Heads as (layer, head), and anything else as edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interp.core.edits import Edit
from interp.patching._runs import described

#: (layer, head), which is that head's z at all positions, or an Edit.
Component = tuple[int, int] | Edit


def as_sets(sets: Mapping[str, Sequence[Component]]) -> dict[str, list[Edit]]:
    """Sets of components as edits.

    Args:
        sets: {name: components}.

    Returns:
        {name: edits}.

    Raises:
        ValueError: no sets, or a component that is neither.
    """
    if not sets:
        raise ValueError('there are no sets: give at least one, for example {"movers": [(9, 6), (9, 9)]}.')
    return {name: [as_edit(component) for component in components] for name, components in sets.items()}


def as_edit(component: Component) -> Edit:
    """A component as an edit.

    Args:
        component: (layer, head) or an Edit.

    Returns:
        The Edit.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(component, Edit):
        return component
    if len(component) != 2:
        raise ValueError(
            f"{component!r} is no component: give (layer, head), or an Edit, for example Edit('mlp_out', 3)."
        )
    layer, head = component
    return Edit("z", int(layer), head=int(head))


def fingerprints(sets: Mapping[str, Sequence[Edit]]) -> dict[str, list[Any]]:
    """Sets in plain JSON types.

    Args:
        sets: {name: edits}.

    Returns:
        {name: a list of fields for each edit}.
    """
    return {name: [described(edit) for edit in edits] for name, edits in sets.items()}
