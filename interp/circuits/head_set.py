"""Which heads have which role? A small frozen table of heads by role, with the score that put each there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from interp.core.result import Result

#: (layer, head), both counted from 0.
Head = tuple[int, int]


@dataclass(frozen=True)
class HeadSet:
    """Heads by role.

    Attributes:
        roles: {role: {(layer, head): score}}, the strongest head of each role first.

    Example:
        >>> found = HeadSet({"mover": {(9, 6): 0.4, (9, 9): 0.7}, "negative": {(10, 7): -0.5}})
        >>> found["mover"], found.names("mover"), found.role_of((10, 7))
        (((9, 9), (9, 6)), ('9.9', '9.6'), ('negative',))
    """

    roles: Mapping[str, Mapping[Head, float]]

    def __post_init__(self) -> None:
        ordered = {
            role: dict(sorted(heads.items(), key=lambda item: (-abs(item[1]), item[0])))
            for role, heads in self.roles.items()
        }
        object.__setattr__(self, "roles", ordered)

    @classmethod
    def of(cls, result: Result, *, confirmed: bool = False) -> HeadSet:
        """The heads of a table with one row a head and its role in `component`, as `roles.ioi_roles` returns.

        Args:
            result: with the columns component, layer, head and value.
            confirmed: keep only those whose `value_confirmed` is 1.

        Returns:
            The HeadSet; a role of which no head was confirmed is there, and empty.
        """
        roles: dict[str, dict[Head, float]] = {}
        for row in result.table.to_dict("records"):
            heads = roles.setdefault(row["component"], {})
            if not confirmed or row["value_confirmed"] == 1:
                heads[int(row["layer"]), int(row["head"])] = float(row["value"])
        return cls(roles)

    def __getitem__(self, role: str) -> tuple[Head, ...]:
        if role not in self.roles:
            raise KeyError(f"no role {role!r}; this HeadSet has {', '.join(map(repr, self.roles)) or 'no roles'}.")
        return tuple(self.roles[role])

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        """Number of different heads."""
        return len(self.heads)

    @property
    def heads(self) -> frozenset[Head]:
        """The heads of all roles."""
        return frozenset(head for heads in self.roles.values() for head in heads)

    def names(self, role: str) -> tuple[str, ...]:
        """The heads of a role as the papers write them, layer.head: "9.6"."""
        return tuple(f"{layer}.{head}" for layer, head in self[role])

    def role_of(self, head: Head) -> tuple[str, ...]:
        """The roles of a head, none if it is not in the set."""
        return tuple(role for role, heads in self.roles.items() if head in heads)
