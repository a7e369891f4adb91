"""Models and tasks of this room's tests: random pairs that a random model is oriented on, and planted cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from interp.core.readout import readout
from interp.core.rerun import rerun
from interp.models import Model, planted, toy
from interp.tasks import Task

N_PROMPTS, N_POS, SHARED = 3, 9, 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps are stored in the cache folder: a test must not go on where another one was killed."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def random_model() -> Callable[[str], Model]:
    """A random model of an architecture; each is loaded once."""
    return cache(toy.random)


@pytest.fixture(scope="session")
def random_task() -> Callable[..., Task]:
    """Random pairs that share their first tokens, the first one padded, with answers that the model is oriented on."""
    return _random_task


def _random_task(model: Model, *, n: int = N_PROMPTS, padded: bool = True) -> Task:
    clean = toy.random_tokens(model, n, N_POS)
    corrupt = clean.clone()
    corrupt[:, SHARED:] = toy.random_tokens(model, n, N_POS, seed=1)[:, SHARED:]
    pair = toy.random_tokens(model, n, 2, seed=5)
    mask = torch.ones_like(clean)
    if padded:
        mask[0, :2] = 0
    positions = {"early": torch.tensor([4, 5, 3] * n)[:n], "end": torch.full((n,), N_POS - 1)}
    task = Task(
        "random", tuple(f"prompt {i}" for i in range(n)), clean, "drawn", corrupt, pair[:, 0], pair[:, 1], positions,
        mask if padded else None,
    )  # fmt: skip
    read = readout(model, task)
    gap = rerun(model, clean, [[]], read, mask=task.mask) - rerun(model, corrupt, [[]], read, mask=task.mask)
    swap = gap[0] < 0
    answers, wrong = torch.where(swap, pair[:, 1], pair[:, 0]), torch.where(swap, pair[:, 0], pair[:, 1])
    return dataclasses.replace(task, answers=answers, wrong=wrong)


@pytest.fixture(scope="session")
def planted_case() -> Callable[[str], tuple[planted.Planted, Task]]:
    """A planted case of that name, and its task; each is built once."""

    @cache
    def build(name: str) -> tuple[planted.Planted, Task]:
        case = getattr(planted, name)()
        task = Task(
            case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions
        )
        return case, task

    return build
