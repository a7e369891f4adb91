"""Mechanistic interpretability: load a transformer, ask it one question, get one table back.

Names are looked up on first use, so `import interp` loads neither torch nor transformer_lens.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp import (
        activations,
        circuits,
        core,
        dynamics,
        flow,
        interventions,
        lenses,
        models,
        patching,
        report,
        tasks,
        weights,
    )
    from interp.core.registry import methods
    from interp.core.result import Result
    from interp.models.load import load
    from interp.models.model import Model
    from interp.tasks.task import Task

_WHERE = {
    "load": "interp.models.load",
    "Model": "interp.models.model",
    "Task": "interp.tasks.task",
    "Result": "interp.core.result",
    "methods": "interp.core.registry",
}
_ROOMS = (
    "activations", "circuits", "core", "dynamics", "flow", "interventions", "lenses", "models", "patching", "report",
    "tasks", "weights",
)  # fmt: skip

__all__ = [
    "Model", "Result", "Task", "activations", "circuits", "core", "dynamics", "flow", "interventions", "lenses", "load",
    "methods", "models", "patching", "report", "tasks", "weights",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name in _ROOMS:
        return import_module(f"interp.{name}")
    if name == "__version__":
        return _version("interp")
    raise AttributeError(f"module 'interp' has no attribute {name!r}; it has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
