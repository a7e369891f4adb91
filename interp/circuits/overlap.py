"""Do two tasks use the same heads? The top heads of each path-patching stage, compared, with a shuffled null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from interp.core.registry import method
from interp.core.result import Result

#: Level of the intervals.
_LEVEL = 0.95


class _Stage(NamedTuple):
    """Effects of one stage of one task: `effects [prompt head]` of the heads named, as numbers layer * H + head."""

    heads: np.ndarray
    effects: np.ndarray


@method(name="Circuit overlap", paper="arXiv:2310.08744", notebook="circuit_reuse")
def overlap(
    first: Result,
    second: Result,
    *,
    control: Result | None = None,
    share: float = 0.02,
    n_null: int = 10_000,
    n_boot: int = 1000,
    seed: int = 0,
) -> Result:
    """How many of the most important heads of each stage two tasks have in common.

    In each stage, the `share` of heads with the largest |mean effect over prompts| is selected in either task;
    the overlap is the number in both, over the number selected. The number is share x (all heads of the model), rounded
    to the nearest integer, a half up, and at least 1: 2% of 384 heads is 8, of 270 heads 5. (The paper states 2% and 25
    of 32 shared over four stages; that this is 4 x 8 is a reading of it.) Heads whose effect is exactly 0 are never
    selected, so that fewer may be.

    The null: in each task the effects are shuffled over the heads that can send anything in this stage, those that have
    a row in its table, `n_null` times. It does not know that neighbouring layers do alike things: `control`, an
    unrelated task of the same model, does.

    Args:
        first: what `stages` returned for a task.
        second: for another task, with as many stages, of the same model.
        control: for a third, unrelated task, which `first` is compared with too.
        share: of all heads, selected in each stage.
        n_null: shuffles.
        n_boot: resamples of the prompts of each task, for the interval.
        seed: seed of both.

    Returns:
        Result, for each task compared with (`target`, "second" or "control") one row for each stage (`step`, from 1;
        `component` says which) and one for all (`step` 0); unit "fraction of the selected heads".
        `value` is the overlap, `value_shared` and `value_selected` the counts; `value_low`, `value_high` the 95%
        bootstrap interval over prompts (selections from resampled prompts are noisier than the one from all, so it
        tends to lie low); `value_null`, `value_null_low`, `value_null_high` the mean and the central 95% of the null;
        `value_p` the share of shuffles (with the observed one) that overlap at least as much, `value_p_exact` the same
        from the hypergeometric distribution.

    Raises:
        ValueError: tables without stages, of different models or numbers of stages, a share outside 0 to 1.

    Cost: no forward pass; `n_null` and `n_boot` selections a stage.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"prompt": 0, "step": 1, "component": "logits", "layer": [0, 0, 1, 1],
        ...                      "head": [0, 1, 0, 1], "value": [0.9, 0.1, -0.5, 0.2]})
        >>> effects = Result("overlap.stages", rows, "fraction", meta={"n_heads_in_all": 4, "n_heads_a_layer": 2})
        >>> same = overlap(effects, effects, share=0.5, n_null=100).filter(step=0).table
        >>> same[["value", "value_shared", "value_p_exact"]].round(3).values.tolist()
        [[1.0, 2.0, 0.167]]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is not a share: give a number above 0 and at most 1, for example 0.02.")
    compared = {"second": second} if control is None else {"second": second, "control": control}
    tables = [
        _compare(first, other, share, n_null, n_boot, seed).assign(target=label) for label, other in compared.items()
    ]
    meta = {
        key: first.meta[key]
        for key in ("model", "model_fingerprint", "weights", "dtype", "n_heads_in_all") if key in first.meta
    }  # fmt: skip
    meta |= {"share": share, "n_null": n_null, "n_boot": n_boot, "seed": seed, "tasks": _task(first, compared)}
    return Result("overlap.overlap", pd.concat(tables, ignore_index=True), "fraction of the selected heads", meta=meta)


def count(n_heads: int, share: float) -> int:
    """How many heads a share of them is: the nearest integer, a half up, at least 1.

    Args:
        n_heads: all heads of the model.
        share: between 0 and 1.

    Returns:
        For example 8 for 2% of 384, 5 for 2% of 270 (5.4).
    """
    # The small number keeps 0.035 * 100 = 3.5000000000000004 and 0.145 * 100 = 14.499999999999998 on the same side.
    return max(1, math.floor(share * n_heads + 0.5 + 1e-9))


def _compare(first: Result, second: Result, share: float, n_null: int, n_boot: int, seed: int) -> pd.DataFrame:
    here, there = _stages_of(first), _stages_of(second)
    if list(here) != list(there):
        raise ValueError(f"the tables have stages {list(here)} and {list(there)}: compare tasks with the same stages.")
    for key in ("model_fingerprint", "n_heads_in_all"):
        if first.meta.get(key) != second.meta.get(key):
            raise ValueError(
                f"the tables are of different models ({key} {first.meta.get(key)!r} and {second.meta.get(key)!r}): "
                "heads can be compared within one model only."
            )
    size = count(int(first.meta["n_heads_in_all"]), share)
    resampled, shuffled = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    weights = [_resamples(stages, n_boot, resampled) for stages in (here, there)]
    labels = first.table.drop_duplicates("step").set_index("step")["component"]
    rows, boots, nulls, exact = [], [], [], []
    for step in here:
        pair = here[step], there[step]
        chosen = [stage.heads[_select(stage.effects.mean(0)[None], size)[0]] for stage in pair]
        shared, selected = len(np.intersect1d(*chosen)), max(map(len, chosen))
        boots.append(_overlaps(pair, [w @ stage.effects for w, stage in zip(weights, pair, strict=True)], size))
        sizes = [len(each) for each in chosen]
        nulls.append(_shuffled(pair, sizes, n_null, shuffled))
        exact.append(null_distribution(pair[0].heads, pair[1].heads, *sizes))
        rows.append([step, labels[step], shared, selected])
    totals = [0, "all", sum(row[2] for row in rows), sum(row[3] for row in rows)]
    whole = exact[0]
    for probabilities in exact[1:]:
        whole = np.convolve(whole, probabilities)
    filled = [
        _row(row, boot, null, probabilities)
        for row, boot, null, probabilities in zip(
            [*rows, totals], [*boots, sum(boots)], [*nulls, sum(nulls)], [*exact, whole], strict=True
        )
    ]
    return pd.DataFrame(filled)


def _row(row: Sequence[object], boot: np.ndarray, null: np.ndarray, probabilities: np.ndarray) -> dict[str, object]:
    step, component, shared, selected = row
    assert isinstance(shared, int) and isinstance(selected, int)
    of = max(selected, 1)  # a stage without any effect selects nothing and shares nothing
    tails = [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]
    low, high = np.quantile(boot / of, tails)
    null_low, null_high = np.quantile(null / of, tails)
    return {
        "step": step, "component": component, "value": shared / of, "value_shared": shared, "value_selected": selected,
        "value_low": low, "value_high": high, "value_null": float(null.mean()) / of, "value_null_low": null_low,
        "value_null_high": null_high, "value_p": (1 + int((null >= shared).sum())) / (1 + len(null)),
        "value_p_exact": min(1.0, float(probabilities[shared:].sum())),
    }  # fmt: skip


def null_distribution(first: np.ndarray, second: np.ndarray, n_first: int, n_second: int) -> np.ndarray:
    """Probabilities of 0, 1, 2, ... common heads of two random selections.

    Args:
        first: heads that the first selection is drawn from, each once.
        second: those of the second selection.
        n_first: how many are drawn from `first`.
        n_second: how many from `second`.

    Returns:
        `[min(n_first, n_second) + 1]`, which sums to 1. Hypergeometric where both draw from the same heads.
    """
    both = len(np.intersect1d(first, second))
    out = np.zeros(min(n_first, n_second) + 1)
    for inside in range(min(n_first, both) + 1):  # how many of the first selection the second could draw too
        chance = _hypergeometric(len(first), both, n_first, inside)
        for shared in range(min(inside, n_second) + 1):
            out[shared] += chance * _hypergeometric(len(second), inside, n_second, shared)
    return out


def _hypergeometric(total: int, marked: int, drawn: int, hit: int) -> float:
    """Chance that `drawn` of `total` things hold `hit` of the `marked` ones."""
    if drawn - hit > total - marked:
        return 0.0
    return math.comb(marked, hit) * math.comb(total - marked, drawn - hit) / math.comb(total, drawn)


def _select(means: np.ndarray, size: int) -> np.ndarray:
    """The heads among the `size` largest in magnitude, 0 never: boolean `[row head]`; of ties, the earlier head."""
    sizes = np.abs(means)
    order = np.argsort(-sizes, axis=1, kind="stable")[:, :size]
    chosen = np.zeros(means.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & (sizes > 0)


def _overlaps(pair: tuple[_Stage, _Stage], means: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Number of common heads for each row of means."""
    _, mine, theirs = np.intersect1d(pair[0].heads, pair[1].heads, return_indices=True)
    one, other = (_select(each, size) for each in means)
    return (one[:, mine] & other[:, theirs]).sum(1)


def _shuffled(pair: tuple[_Stage, _Stage], sizes: Sequence[int], n_null: int, rng: np.random.Generator) -> np.ndarray:
    """Number of common heads when the heads of each task are drawn at random."""
    means = [rng.random((n_null, len(stage.heads))) for stage in pair]
    _, mine, theirs = np.intersect1d(pair[0].heads, pair[1].heads, return_indices=True)
    one, other = (_select(each, size) for each, size in zip(means, sizes, strict=True))
    return (one[:, mine] & other[:, theirs]).sum(1)


def _resamples(stages: Mapping[int, _Stage], n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """Weights of the prompts in each resample, `[resample prompt]`."""
    n_prompts = len(next(iter(stages.values())).effects)
    return rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_boot) / n_prompts


def _stages_of(result: Result) -> dict[int, _Stage]:
    missing = [c for c in ("prompt", "step", "component", "layer", "head", "value") if c not in result.table]
    if missing or not {"n_heads_in_all", "n_heads_a_layer"} <= set(result.meta):
        what = f"column {missing[0]!r}" if missing else "number of heads in its meta"
        raise ValueError(f"the table of {result.method} has no {what}: give what circuits.stages.stages returned.")
    table = result.table.assign(
        number=result.table["layer"] * int(result.meta["n_heads_a_layer"]) + result.table["head"]
    )
    found = {}
    for step, rows in table.groupby("step", sort=True):
        effects = rows.pivot(index="prompt", columns="number", values="value")
        found[int(step)] = _Stage(effects.columns.to_numpy(), effects.to_numpy(dtype=float))
    return found


def _task(first: Result, compared: Mapping[str, Result]) -> dict[str, str]:
    return {label: str(result.meta.get("task", "")) for label, result in {"first": first, **compared}.items()}
