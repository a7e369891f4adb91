"""Does back attention stand in for a second layer? Three small transformers on tasks of two steps, seed by seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from interp.core.registry import method
from interp.core.result import Result
from interp.dynamics._kept import kept_history
from interp.dynamics.back_attention import Small
from interp.dynamics.composition import Synthetic, double_sum, function_composition
from interp.dynamics.train import config, train

#: What is compared: layers, and whether the only one gets back attention (of d_model, with as many heads).
MODELS = {"1 layer": (1, False), "1 layer + back attention": (1, True), "2 layers": (2, False)}
_SIZES: dict[str, Any] = {"n_heads": 2, "d_model": 48, "d_mlp": 96}
_TRAINING: dict[str, Any] = {"learning_rate": 5e-3, "weight_decay": 0.1, "batch_size": 128, "every": 100}
#: Names of tasks: what makes them, and its options.
TASKS: dict[str, tuple[Callable[..., Synthetic], dict[str, Any]]] = {
    "function_composition": (function_composition, {"n_symbols": 8, "n_functions": 16, "held_out": 0.1}),
    "double_sum": (double_sum, {"modulus": 17, "held_out": 0.2}),
}


@method(name="Back attention in place of a second layer", paper="arXiv:2502.10835", notebook="back_attention")
def compare_depths(
    task: str = "function_composition",
    *,
    seeds: Sequence[int] = (10, 11, 12),
    steps: int = 3000,
    folder: str | os.PathLike[str] | None = None,
) -> Result:
    """One layer, one layer with back attention, and two layers, trained from scratch on a task of two steps.

    The claim of arXiv:2502.10835 is that the second reaches the accuracy of the third. All are Llamas of d_model 48,
    with 2 heads and an MLP of 96, trained alike: AdamW at 5e-3, weight decay 0.1, 128 prompts a step. A seed decides
    the tables, which combinations are held out, the weights and the batches, and is the same for the three.

    Each run is kept; a second call reads it, and a call with more seeds trains only what is new.

    The tasks are those of `interp.dynamics.composition`: "function_composition" (8 symbols, 16 functions, a tenth of
    the triples held out) and "double_sum" (modulus 17, a fifth held out).

    Args:
        task: "function_composition" or "double_sum".
        seeds: one run of each model for each.
        steps: of training.
        folder: where to keep the runs, each in a folder of its own; None for the cache folder.

    Returns:
        A row for each `component` (the model), `value_seed`, `step` and `metric`: "held-out accuracy" and "held-out
        loss" (nats) every 100 steps, and "accuracy", that on the last 100 batches of training prompts. `meta` has the
        numbers of parameters.

    Raises:
        ValueError: an unknown task, or no seeds.
        OSError: the folder cannot be written.

    Cost: about 80 seconds of CPU for 3,000 steps of all three, a seed; nothing once they are kept.

    Differs from the paper: tasks, sizes and training are ours; the paper's own were not at hand.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known; use one of {', '.join(map(repr, TASKS))}.")
    if not seeds:
        raise ValueError("seeds is empty: give at least one, for example seeds=(10, 11, 12).")
    histories = {(model, seed): _history(task, model, int(seed), steps, folder) for seed in seeds for model in MODELS}
    parts = [_measured(history).assign(component=m, value_seed=seed) for (m, seed), history in histories.items()]
    table = pd.concat(parts, ignore_index=True)[["component", "value_seed", "step", "metric", "value"]]
    meta = {
        "task": task, **TASKS[task][1], **_SIZES, **_TRAINING, "steps": steps, "seeds": [int(seed) for seed in seeds],
        "n_parameters": {m: int(history.meta["n_parameters"]) for (m, _), history in histories.items()},
        "units": {"held-out accuracy": "fraction", "accuracy": "fraction", "held-out loss": "nats"},
    }  # fmt: skip
    return Result("Back attention in place of a second layer", table, "by metric: see meta['units']", meta=meta)


def _history(task: str, model: str, seed: int, steps: int, folder: str | os.PathLike[str] | None) -> Result:
    """One run: trained, or read."""
    layers, back = MODELS[model]
    generator, options = TASKS[task]
    recipe = {
        "depth": task, "options": options, "layers": layers, "back": back, "seed": seed, "steps": steps,
        "sizes": _SIZES, "training": _TRAINING,
    }  # fmt: skip

    def run(root: Path) -> Result:
        made = generator(**options, seed=seed)
        start: Any = config("llama", d_vocab=made.d_vocab, n_ctx=made.n_ctx, n_layers=layers, **_SIZES)
        if back:
            start = Small(start, n_heads=_SIZES["n_heads"], seed=seed)
        return train(
            start, made.batch, held_out=made.held_out, steps=steps, seed=seed, folder=root, **_TRAINING
        ).history

    return kept_history(recipe, run, None if folder is None else Path(folder) / f"{task}, {model}, seed {seed}")


def _measured(history: Result) -> pd.DataFrame:
    """What was measured on the way, and the accuracy of the steps between."""
    held_out = history.filter(metric=["held-out accuracy", "held-out loss"]).table
    trained = history.filter(metric="accuracy").table
    every = history.meta["every"]
    steps = ((trained["step"] - 1) // every + 1) * every
    means = trained["value"].groupby(steps.clip(upper=history.meta["steps_done"])).mean()
    return pd.concat([held_out, pd.DataFrame({"step": means.index, "metric": "accuracy", "value": means.to_numpy()})])
