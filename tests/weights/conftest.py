"""Models of this room's tests, the definitions written out, and a cache of its own for each test."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.models import Model, toy
from interp.models.program import program
from interp.tasks import Relation, Relations


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps are stored in the cache folder: a test must not go on where another one was killed."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def toys() -> Callable[..., Model]:
    """A random model of an architecture; each is loaded once and must stay as it is."""
    return cache(toy.random)


@pytest.fixture(scope="session")
def dense() -> Callable[..., Tensor]:
    """The definition, a matrix product at a time, in float64."""
    return _dense


def _dense(model: Model, layer: int, head: int, embedding: str = "mlp0") -> Tensor:
    """M `[d_vocab d_vocab]` of a raw model, from the Hugging Face modules' own weights."""
    with torch.no_grad():
        e = model.bridge.embed.original_component(torch.arange(model.d_vocab))
        steps = program(model)
        if layer > 0 and embedding != "raw":
            mlp = steps.mlp_out(0, steps.post(0, e))
            e = mlp + e if embedding == "resid" else mlp
        eye = torch.eye(model.d_model)
        # The value map by what its module does to unit vectors, without its bias.
        values = steps.values(layer, eye) - steps.values(layer, torch.zeros(1, model.d_model))
        w_v = values[:, head * model.n_key_value_heads // model.n_heads].double()
        w_u = (steps.unembed(eye) - steps.unembed(torch.zeros(1, model.d_model))).double()
        return e.double() @ w_v @ steps.w_o(layer)[head].double() @ w_u


@pytest.fixture(scope="session")
def pairs() -> Callable[..., Relations]:
    """Relations of numbers of tokens: {name: [(source, target), ...]}."""
    return _pairs


def _pairs(model: Model, **lists: list[tuple[int, int]]) -> Relations:
    made: list[Any] = [
        Relation.from_pairs(model, name, [(f"w{a}", f"w{b}") for a, b in ids]) for name, ids in lists.items()
    ]
    return Relations(tuple(made))
