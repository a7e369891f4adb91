"""Which methods does the library have, from which paper, and where are they shown?

`@method` marks a public analysis function; the README's table, `interp methods` and the claims
report are all made from what it records.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)

#: Rooms that hold methods. A room listed here is a folder of `interp`.
ROOMS = ("activations", "circuits", "dynamics", "flow", "interventions", "lenses", "patching", "weights")


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of one method."""

    name: str
    paper: str
    notebook: str
    function: Callable

    @property
    def path(self) -> str:
        """Import path without the leading `interp.`, for example `activations.massive.detect`."""
        module = self.function.__module__.removeprefix("interp.")
        return f"{module}.{self.function.__name__}"

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    @property
    def cost(self) -> str:
        """The `Cost:` entry of the docstring, on one line; empty when there is none."""
        lines = (self.function.__doc__ or "").split("\n")
        taken: list[str] = []
        for line in lines:
            if line.strip().startswith("Cost:"):
                taken.append(line.strip().removeprefix("Cost:").strip())
            elif taken:
                if not line.strip() or line.strip().split(" ")[0].endswith(":"):
                    break
                taken.append(line.strip())
        return " ".join(taken)


_METHODS: dict[str, MethodInfo] = {}


def method(*, name: str, paper: str, notebook: str) -> Callable[[Function], Function]:
    """Register a public analysis function.

    Args:
        name: what a reader would call it, in the paper's words.
        paper: `arXiv:NNNN.NNNNN`.
        notebook: stem of the notebook in `notebooks/` that shows it.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(function: Function) -> Function:
        info = MethodInfo(name, paper, notebook, function)
        _METHODS[info.path] = info
        return function

    return register


def methods() -> list[MethodInfo]:
    """Every registered method, sorted by import path.

    Returns:
        One `MethodInfo` a method. Imports every method room, and with them torch.
    """
    for room in ROOMS:
        package = importlib.import_module(f"interp.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"interp.{room}.{module.name}")
    return sorted(_METHODS.values(), key=lambda info: info.path)
