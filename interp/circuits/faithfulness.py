"""How much of the model's behaviour does a circuit keep? Faithfulness, its curve over sizes, and random circuits.

f(C) = (m(C) - m(empty)) / (m(full) - m(empty)), with m the metric's mean over prompts: 1 when the edges of the circuit
do what all edges do, 0 when they do nothing, above 1 when what was left out hurts. Edges that are not in carry what the
ablation says; the number depends on it, so each Result names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from interp.circuits._ablated import Positions, plain
from interp.circuits._judge import Judged, judge, named, of_size, require_all
from interp.circuits.circuit import By, Circuit
from interp.circuits.graph import Graph
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.patching._inputs import provenance
from interp.tasks.task import Task

#: Shares of all edges at which MIB measures circuits.
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

_UNIT = "fraction of the gap between all edges and none"


@method(name="Faithfulness of circuits", paper="arXiv:2504.13151", notebook="circuit_discovery")
def faithfulness(
    model: Model,
    task: Task,
    circuits: Circuit | Mapping[str, Circuit],
    *,
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    reference: Task | None = None,
    positions: Positions = None,
    min_oriented: float = 0.75,
    seed: int = 0,
) -> Result:
    """How much of the metric, and of the whole prediction, each circuit keeps.

    value_i = (m_i(C) - m_i(empty)) / mean over prompts of (m(full) - m(empty)), so that the mean of `value` is the
    ratio of means, which is f(C). The mean of `value_own`, each prompt over its own gap, is the mean of ratios: the two
    differ as soon as gaps do, and a prompt with a gap near 0 can decide the second one.

    Args:
        model: a decoder.
        task: the prompts; with corrupted ones for `ablation="corrupt"`.
        circuits: one, or {name: circuit} of one graph. Evaluated as they are: cut and prune them before.
        metric: a name or a Readout.
        ablation: what edges that are not in carry: "corrupt" (the paired prompt's value), "zero", "mean" (over prompts
            and positions), "position_mean" (over prompts at the same position), "resample" (another prompt's). With
            any but "corrupt" and "resample" a component with no edge into it still computes something of what it then
            reads, so that pruning can change the number.
        reference: prompts of the means; None for the task's clean ones.
        positions: of destinations at which edges that are not in are cut: names of the task or indices; None for all.
            At other positions every input is whole; "empty" then has all edges cut at these positions alone.
        min_oriented: share of the prompts whose metric must be higher with all edges than with none.
        seed: of "resample".

    Returns:
        Result, unit "fraction of the gap between all edges and none"; one row a prompt and circuit (`target`), with
        `value`, `value_own` (NaN for a prompt without a gap), `value_metric`, `value_full`, `value_empty` (the metric
        with the circuit, all edges and none) and `value_kl`, KL(full model || circuit) of the next token in nats.
        `meta["edges"]` counts edges. For intervals that also resample the gap see `intervals`.

    Raises:
        ValueError: circuits of another model or of different graphs; a task in which the metric is not higher with all
            edges than with none.

    Cost: circuits + 2 forward passes with a weight an edge (2.3 plain ones each), and as many again for the KL.

    Example:
        >>> from interp.models import planted
        >>> case = planted.or_gate()
        >>> task = Task("or", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong,
        ...             case.positions)
        >>> circuit = Circuit.from_edges(Graph.of(case.model), case.edges)
        >>> faithfulness(case.model, task, circuit).table["value"].round(3).unique().tolist()
        [1.0]
    """
    every = named(model, circuits)
    sets = np.stack([circuit.kept for circuit in every.values()])
    found = judge(
        model, task, _graph(every), sets, metric=metric, ablation=ablation, reference=reference,
        positions=positions, seed=seed, min_oriented=min_oriented, what="faithfulness", kl=True,
    )  # fmt: skip
    table = pd.concat([_rows(found, cell).assign(target=name) for cell, name in enumerate(every)], ignore_index=True)[
        ["prompt", "target", *_COLUMNS, "value_kl"]
    ]
    edges = {name: len(circuit) for name, circuit in every.items()}
    meta = _meta(model, task, found, seed, reference, edges=edges, positions=plain(positions))
    return Result("faithfulness.faithfulness", table, _UNIT, meta=meta)


@method(name="Faithfulness over circuit size", paper="arXiv:2504.13151", notebook="circuit_discovery")
def curve(
    model: Model,
    task: Task,
    circuits: Circuit | Mapping[str, Circuit],
    *,
    sizes: Sequence[float] = MIB_SIZES,
    selection: str = "top",
    by: By = "absolute",
    prune: bool = True,
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    reference: Task | None = None,
    positions: Positions = None,
    min_oriented: float = 0.75,
    seed: int = 0,
) -> Result:
    """Faithfulness of the best edges of a ranking, for growing numbers of them.

    Args:
        model: a decoder.
        task: the prompts.
        circuits: one, or {name: circuit} of one graph, each with a score for every edge (all in).
        sizes: shares of all edges, growing; floor(share x edges) are taken.
        selection: "top", the best of all, or "greedy", from the logits backwards (`Circuit.greedy`).
        by: MIB takes signed scores for CPR and |score| for CMD. Where a score is the change of the metric when the edge
            is cut (`eap`, `exact`), the edges that help most have the lowest: by="negative"; else "signed".
        prune: take out edges on no path from the input to the logits, after selection, as MIB does.
        metric: a name or a Readout.
        ablation: see `faithfulness`.
        reference: prompts of means.
        positions: see `faithfulness`.
        min_oriented: see `faithfulness`.
        seed: of "resample".

    Returns:
        Result, unit "fraction of the gap between all edges and none"; one row a prompt, circuit (`target`) and size,
        `step` being the number of edges taken: `value` and the other columns as in `faithfulness` without the KL,
        `value_share` (as asked) and `value_edges` (after pruning). `areas` turns it into CPR and CMD.

    Raises:
        ValueError: as `faithfulness`; shares that do not grow from above 0 to at most 1; fewer edges than asked for.

    Cost: circuits x sizes + 2 forward passes with a weight an edge; equal sets are run once.
    """
    every = named(model, circuits)
    graph = _graph(every)
    shares = np.asarray(sizes, dtype=float)
    if not len(shares) or shares[0] <= 0 or shares[-1] > 1 or (np.diff(shares) <= 0).any():
        raise ValueError(f"sizes={list(sizes)}: give shares of all edges that grow, above 0 and at most 1.")
    counts = [int(share * graph.n_edges + 1e-9) for share in shares]
    cut = {}
    for name, circuit in every.items():
        require_all(name, circuit, counts[-1])
        for share, n in zip(shares, counts, strict=True):
            cut[name, float(share), n] = of_size(circuit, n, selection, by, prune)
    found = judge(
        model, task, graph, np.stack([circuit.kept for circuit in cut.values()]), metric=metric, ablation=ablation,
        reference=reference, positions=positions, seed=seed, min_oriented=min_oriented, what="curve",
    )  # fmt: skip
    parts = [
        _rows(found, cell).assign(target=name, step=n, value_share=share, value_edges=len(circuit))
        for cell, ((name, share, n), circuit) in enumerate(cut.items())
    ]
    table = pd.concat(parts, ignore_index=True)[["prompt", "target", "step", "value_share", "value_edges", *_COLUMNS]]
    meta = _meta(
        model, task, found, seed, reference, sizes=shares.tolist(), selection=selection, by=by, prune=prune,
        n_edges=graph.n_edges, positions=plain(positions),
    )  # fmt: skip
    return Result("faithfulness.curve", table, _UNIT, meta=meta)


@method(name="CPR and CMD", paper="arXiv:2504.13151", notebook="circuit_discovery")
def areas(curves: Result, *, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> Result:
    """MIB's two areas: under the faithfulness curve (CPR), and between it and 1 (CMD).

    With f the ratio of means at each size and x the share of edges (linear), CPR is the trapezoid integral of f, signed
    (higher is better), and CMD that of |1 - f| (lower is better). From .001 to 1 the circuit that is perfect at every
    size has CPR .999 and CMD 0; CPR above that means that edges were left out which hurt.

    Args:
        curves: what `curve` returned.
        n_boot: resamples of the prompts (of circuit, full and empty runs together).
        level: of the intervals.
        seed: of the resamples.

    Returns:
        Result, unit "faithfulness x share of edges"; a row a circuit (`target`) and `metric` ("cpr", "cmd"): `value`,
        `value_low`, `value_high`, `value_ideal`.

    Raises:
        ValueError: a table without sizes, or with one only.

    Cost: no forward pass.

    Differs from the paper: MIB takes the curve of signed scores for CPR and of absolute ones for CMD: make both curves,
        and read one number of each.
    """
    rows = []
    for target, part in _curves(curves):
        share, own, full, empty = (
            part.pivot(index="prompt", columns="value_share", values=column).to_numpy(dtype=float)
            for column in ("value_share", "value_metric", "value_full", "value_empty")
        )
        x = share[0]
        weights = np.concatenate([np.full((1, len(own)), 1 / len(own)), _resamples(len(own), n_boot, seed)])
        f = (weights @ (own - empty)) / (weights @ (full - empty))
        for name, heights, ideal in (("cpr", f, x[-1] - x[0]), ("cmd", np.abs(1 - f), 0.0)):
            area = trapezoid(heights, x, axis=1)
            low, high = np.quantile(area[1:], [(1 - level) / 2, (1 + level) / 2])
            rows.append([target, name, area[0], low, high, ideal])
    table = pd.DataFrame(rows, columns=["target", "metric", "value", "value_low", "value_high", "value_ideal"])
    meta = {**curves.meta, "n_boot": n_boot, "level": level}
    return Result("faithfulness.areas", table, "faithfulness x share of edges", meta=meta)


def intervals(found: Result, *, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> Result:
    """Faithfulness of each circuit (and size) with bootstrap intervals; the prompts are resampled gap and all.

    Args:
        found: what `faithfulness`, `curve` or `random_null` returned.
        n_boot: resamples of the prompts, the same for every circuit.
        level: of the intervals.
        seed: of the resamples.

    Returns:
        Result, the same unit; a row a circuit (`target`) and size or draw (`step`): `value` (ratio of means), with
        `value_low` and `value_high`; `value_own` (mean of ratios) likewise, and `value_kl` where there is one.
    """
    by = [column for column in ("target", "step", "value_share", "value_edges") if column in found.table]
    rows = []
    for key, part in found.table.groupby(by, sort=False):
        weights = _resamples(len(part), n_boot, seed)
        own, full, empty = (part[c].to_numpy(dtype=float) for c in ("value_metric", "value_full", "value_empty"))
        boots = {"value": (weights @ (own - empty)) / (weights @ (full - empty))}
        row = dict(zip(by, key, strict=True)) | {"value": float(part["value"].mean())}
        for column in [c for c in ("value_own", "value_kl") if c in part]:
            there = part[column].notna().to_numpy(dtype=float)
            row[column] = float(part[column].mean())
            with np.errstate(invalid="ignore"):  # a resample may hold none of the prompts that have a number
                boots[column] = (weights @ part[column].fillna(0.0).to_numpy()) / (weights @ there)
        for column, values in boots.items():
            low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
            row |= {f"{column}_low": float(low), f"{column}_high": float(high)}
        rows.append(row)
    meta = {**found.meta, "n_boot": n_boot, "level": level}
    return Result("faithfulness.intervals", pd.DataFrame(rows), found.unit, meta=meta)


@method(name="Faithfulness of random circuits", paper="arXiv:2504.13151", notebook="circuit_discovery")
def random_null(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    n: int = 20,
    draw: str = "uniform",
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    reference: Task | None = None,
    positions: Positions = None,
    min_oriented: float = 0.75,
    seed: int = 0,
) -> Result:
    """Faithfulness of random circuits with as many edges as one.

    Args:
        model: a decoder.
        task: the prompts.
        circuit: that it is compared with.
        n: random circuits.
        draw: "uniform", any edges with the same chance (few of which hang together, so this null is easy to beat), or
            "connected", random scores taken greedily from the logits backwards, so that each edge leads to the logits.
        metric: a name or a Readout.
        ablation: see `faithfulness`.
        reference: prompts of means.
        positions: see `faithfulness`.
        min_oriented: see `faithfulness`.
        seed: of the draws, and of "resample".

    Returns:
        Result, unit "fraction of the gap between all edges and none"; a row a prompt and circuit: `target` "circuit"
        (`step` 0) or "random" (`step` 1 to n), and the columns of `faithfulness` without the KL. `meta["p"]` is the
        share of circuits, the given one included, that are at least as faithful as the given one.

    Raises:
        ValueError: as `faithfulness`; n below 1.

    Cost: n + 3 forward passes with a weight an edge.
    """
    circuit.require(model)
    if n < 1:
        raise ValueError(f"n={n}: give the number of random circuits, at least 1.")
    if draw not in ("uniform", "connected"):
        raise ValueError(f'draw={draw!r} is not known; use "uniform" or "connected".')
    seeds = np.random.SeedSequence(seed).generate_state(n)
    drawn = [random_scores(circuit.graph, seed=int(each)) for each in seeds]
    size = len(circuit)
    sets = [circuit.kept] + [
        (each.top(size) if draw == "uniform" else each.greedy(size, by="signed")).kept for each in drawn
    ]
    found = judge(
        model, task, circuit.graph, np.stack(sets), metric=metric, ablation=ablation, reference=reference,
        positions=positions, seed=seed, min_oriented=min_oriented, what="random_null",
    )  # fmt: skip
    parts = [_rows(found, cell).assign(target="random" if cell else "circuit", step=cell) for cell in range(n + 1)]
    table = pd.concat(parts, ignore_index=True)[["prompt", "target", "step", *_COLUMNS]]
    f = table.groupby("step")["value"].mean()
    # Equal circuits may differ in the last bits when they are run in another batch.
    p = (1 + int((f[1:] >= f[0] - 1e-6).sum())) / (1 + n)
    meta = _meta(model, task, found, seed, reference, draw=draw, n=n, edges=size, p=p, positions=plain(positions))
    return Result("faithfulness.random_null", table, _UNIT, meta=meta)


def random_scores(graph: Graph, *, seed: int = 0) -> Circuit:
    """A circuit of all edges with random scores: its `curve` is MIB's baseline "Random".

    Args:
        graph: of the model.
        seed: of the scores.

    Returns:
        A Circuit with scores drawn from a standard normal distribution.
    """
    scores = np.random.default_rng(seed).standard_normal(graph.possible.shape)
    return Circuit.of(graph, scores, unit="none", meta={"method": "random", "seed": seed})


_COLUMNS = ["value", "value_own", "value_metric", "value_full", "value_empty"]


def _rows(found: Judged, cell: int) -> pd.DataFrame:
    columns: dict[str, Any] = {
        "prompt": np.arange(len(found.full)),
        "value": found.fractions[:, cell],
        "value_own": found.own_fractions[:, cell],
        "value_metric": found.values[:, cell],
        "value_full": found.full,
        "value_empty": found.empty,
    }
    if found.kl is not None:
        columns["value_kl"] = found.kl[:, cell]
    return pd.DataFrame(columns)


def _meta(model: Model, task: Task, found: Judged, seed: int, reference: Task | None, **options: Any) -> dict[str, Any]:
    return provenance(
        model, task, metric=found.metric, ablation=found.ablation, seed=seed,
        reference=None if reference is None else reference.fingerprint, **options,
    )  # fmt: skip


def _graph(circuits: Mapping[str, Circuit]) -> Graph:
    return next(iter(circuits.values())).graph


def _curves(curves: Result) -> list[tuple[str, pd.DataFrame]]:
    if "value_share" not in curves.table or curves.table["value_share"].nunique() < 2:
        raise ValueError(
            f"an area needs the table of `curve` with two sizes or more; that of {curves.method} has none: "
            "areas(curve(model, task, circuit))."
        )
    return [(str(target), part) for target, part in curves.table.groupby("target", sort=False)]


def _resamples(n: int, n_boot: int, seed: int) -> np.ndarray:
    """Weights of the prompts in each resample, `[resample prompt]`."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot) / n
