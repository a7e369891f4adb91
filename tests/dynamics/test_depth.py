from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp.dynamics import depth
from interp.dynamics.back_attention import Small
from interp.dynamics.composition import function_composition
from interp.dynamics.depth import MODELS, compare_depths
from interp.dynamics.train import config, train


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and measurements every second step."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(depth, "_TRAINING", depth._TRAINING | {"every": 2, "batch_size": 16})
    return tmp_path / "trained"


def test_each_run_is_the_training_that_it_says() -> None:
    found = compare_depths(seeds=(3,), steps=5)
    made = function_composition(8, 16, held_out=0.1, seed=3)
    assert found.meta["n_parameters"].keys() == MODELS.keys()
    for model, (layers, back) in (("2 layers", (2, False)), ("1 layer + back attention", (1, True))):
        sizes = config("llama", d_vocab=made.d_vocab, n_ctx=4, n_layers=layers, n_heads=2, d_model=48, d_mlp=96)
        start: Any = Small(sizes, n_heads=2, seed=3) if back else sizes
        by_hand = train(
            start, made.batch, held_out=made.held_out, steps=5, learning_rate=5e-3, weight_decay=0.1, batch_size=16,
            every=2, seed=3,
        )  # fmt: skip
        table = found.filter(component=model, value_seed=3).table
        for metric in ("held-out accuracy", "held-out loss"):
            mine = table[table["metric"] == metric]
            theirs = by_hand.history.filter(metric=metric).table
            assert mine["step"].tolist() == theirs["step"].tolist() == [0, 2, 4, 5]
            assert mine["value"].tolist() == theirs["value"].tolist()
        batches = by_hand.history.filter(metric="accuracy").table["value"].to_numpy()
        means = table[table["metric"] == "accuracy"]
        assert means["step"].tolist() == [2, 4, 5]
        np.testing.assert_allclose(means["value"], [batches[:2].mean(), batches[2:4].mean(), batches[4]], rtol=1e-12)
        parameters = sum(weight.numel() for weight in by_hand.module.parameters())
        assert found.meta["n_parameters"][model] == parameters
    one, back, _ = (found.meta["n_parameters"][model] for model in MODELS)
    assert back - one == 4 * 48 * 48


def test_a_second_call_reads_and_more_seeds_train_only_what_is_new(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare_depths("double_sum", seeds=(1,), steps=3)
    assert len(list(cache.iterdir())) == 3
    assert all([path.name for path in run.iterdir()] == ["history"] for run in cache.iterdir())
    trained: list[int] = []
    real = depth.train

    def counted(*given: Any, **named: Any) -> Any:
        trained.append(named["seed"])
        return real(*given, **named)

    monkeypatch.setattr(depth, "train", counted)
    assert compare_depths("double_sum", seeds=(1,), steps=3).table.equals(first.table)
    both = compare_depths("double_sum", seeds=(1, 2), steps=3)
    assert trained == [2, 2, 2]
    assert both.filter(value_seed=1).table.equals(first.table)
    # Another seed has other weights and other prompts.
    losses = both.filter(metric="held-out loss", step=0, component="2 layers").table["value"]
    assert losses.nunique() == 2


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = compare_depths(seeds=(1,), steps=6, folder=tmp_path / "whole")
    real, left = torch.optim.AdamW.step, iter(range(4))

    def stops(*given: Any, **named: Any) -> Any:
        next(left)
        return real(*given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", stops)
    with pytest.raises((StopIteration, RuntimeError)):
        compare_depths(seeds=(1,), steps=6, folder=tmp_path / "mine")
    monkeypatch.undo()
    monkeypatch.setattr(depth, "_TRAINING", depth._TRAINING | {"every": 2, "batch_size": 16})
    (unfinished,) = (tmp_path / "mine").iterdir()
    assert [path.name for path in unfinished.iterdir()] == ["checkpoint.safetensors"]
    assert compare_depths(seeds=(1,), steps=6, folder=tmp_path / "mine").table.equals(whole.table)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task='sums' is not known; use one of 'function_composition', 'double_sum'"):
        compare_depths("sums")
    with pytest.raises(ValueError, match="seeds is empty"):
        compare_depths(seeds=())
    compare_depths(seeds=(1,), steps=1, folder=tmp_path)
    with pytest.raises(ValueError, match="holds a model of another recipe"):
        compare_depths(seeds=(1,), steps=2, folder=tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="give folder=, or set INTERP_CACHE"):
        compare_depths(seeds=(1,), steps=1, folder=tmp_path / "file")
