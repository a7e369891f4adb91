"""Does the registry list what there is, and can each entry be found, read and run?"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import interp
from interp.core import registry
from interp.core.registry import ROOMS, MethodInfo, method, methods

PACKAGE = Path(interp.__file__).parent
#: Rooms that are the house, not methods.
HOUSE = {"core", "models", "tasks", "report"}


def test_rooms_are_the_folders_that_hold_methods() -> None:
    folders = {folder.parent.name for folder in PACKAGE.glob("[a-z]*/__init__.py")}
    assert set(ROOMS) == folders - HOUSE
    assert len(ROOMS) == len(set(ROOMS))


def decorated(file: Path) -> list[str]:
    """Functions of a file that are decorated with @method."""
    return [
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        for call in node.decorator_list
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "method"
    ]


def test_every_decorated_function_is_listed_once() -> None:
    written = {
        f"{room}.{file.stem}.{name}"
        for room in ROOMS
        for file in (PACKAGE / room).glob("[a-z]*.py")
        for name in decorated(file)
    }
    assert [info.path for info in methods()] == sorted(written)
    assert len(written) >= 5


def test_every_method_can_be_imported_and_says_what_it_does_and_costs() -> None:
    for info in methods():
        module, name = info.path.rsplit(".", 1)
        assert getattr(importlib.import_module(f"interp.{module}"), name) is info.function
        assert len(info.summary) > 15 and info.summary.endswith((".", "?")), info.path
        assert info.cost, f"{info.path} has no Cost: in its docstring"
        assert info.name and len(info.name) < 60
        assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", info.paper), info.path
        assert (PACKAGE.parent / "notebooks" / f"{info.notebook}.ipynb").is_file(), info.path


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> dict[str, MethodInfo]:
    found: dict[str, MethodInfo] = {}
    monkeypatch.setattr(registry, "_METHODS", found)
    return found


def registered(function: Callable) -> MethodInfo:
    assert method(name="A thing", paper="arXiv:2401.00001", notebook="thing")(function) is function
    (info,) = registry._METHODS.values()
    return info


def test_what_is_read_off_a_function(empty: dict[str, MethodInfo]) -> None:
    def measure() -> None:
        """What a thing weighs.

        Cost: two forward passes, and memory for
            one layer.

        Much else.

        Example: none.
        """

    measure.__module__ = "interp.heads.scales"
    info = registered(measure)
    assert info.path == "heads.scales.measure"
    assert info.summary == "What a thing weighs."
    assert info.cost == "two forward passes, and memory for one layer."
    assert (info.name, info.paper, info.notebook) == ("A thing", "arXiv:2401.00001", "thing")
    assert empty == {"heads.scales.measure": info}


def test_a_docstring_without_cost_has_none(empty: dict[str, MethodInfo]) -> None:
    def bare() -> None:
        pass

    info = registered(bare)
    assert (info.summary, info.cost) == ("", "")
