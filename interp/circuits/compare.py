"""How alike are two circuits, how much of a known one was found, and how stable is one over prompts?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from interp.circuits.circuit import By, Circuit, ranks
from interp.circuits.graph import Graph
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.patching._inputs import provenance
from interp.tasks.task import Task

LEVELS = ("edge", "node")

#: What a shuffle of edges keeps: their number; that of each kind of input (q, k, v, mlp, logits); of each kind and
#: layer; of each input.
WITHIN = ("graph", "kind", "layer", "destination")

#: Mean pairwise Jaccard index over resampled prompts above which a circuit has been called self-consistent.
BAR = 0.8


def jaccard(first: Circuit, second: Circuit, *, level: str = "edge") -> float:
    """Edges (or nodes) in both over those in either.

    Args:
        first: a circuit.
        second: another of the same graph.
        level: "edge" or "node" (the input left out).

    Returns:
        From 0 to 1; 1 for two empty circuits.

    Raises:
        ValueError: circuits of different graphs, or an unknown level.

    Example:
        >>> graph = Graph(1, 2, 2)
        >>> one = Circuit.from_edges(graph, [("input", "m0"), ("m0", "logits")])
        >>> jaccard(one, Circuit.from_edges(graph, [("input", "m0"), ("a0.h1", "m0")]))
        0.3333333333333333
    """
    _require_same(first, second)
    return _jaccard(_members(first, level), _members(second, level))


@method(name="Overlap of circuits", paper="arXiv:2304.14997", notebook="circuit_discovery")
def overlap(
    first: Circuit, second: Circuit, *, within: str = "graph", n_null: int = 1000, level: float = 0.95, seed: int = 0
) -> Result:
    """How many edges and nodes two circuits share, against shuffled edges.

    The null: the second circuit's edges are put at random among all edges there are, `n_null` times, keeping their
    number in each class of `within`. Two methods that both prefer late layers overlap more than by chance without
    having anything of the task in common: within="layer" allows for that.

    Args:
        first: a circuit.
        second: another of the same graph.
        within: one of `WITHIN`.
        n_null: shuffles.
        level: of the null's interval.
        seed: of the shuffles.

    Returns:
        Result, unit "Jaccard index"; one row for edges and one for nodes (`component`; the input is no node):
        `value`, `value_shared`, `value_first`, `value_second` (how many), `value_null`, `value_null_low`,
        `value_null_high` (mean and central interval of the null), `value_p` (share of shuffles, the observed one
        included, with at least this index), `value_p_exact` (for edges, from hypergeometric distributions).

    Raises:
        ValueError: circuits of different graphs, an unknown `within`.

    Cost: no forward pass; about a millisecond a shuffle for 70,000 edges.
    """
    _require_same(first, second)
    classes = _classes(first.graph, within)
    rng = np.random.default_rng(seed)
    shuffled = [second.with_kept(kept) for kept in _shuffles(second, classes, n_null, rng)]
    rows = []
    for name in LEVELS:
        one, other = _members(first, name), _members(second, name)
        shared, value = int((one & other).sum()), _jaccard(one, other)
        index = np.array([_jaccard(one, _members(each, name)) for each in shuffled])
        low, high = np.quantile(index, [(1 - level) / 2, (1 + level) / 2])
        rows.append({
            "component": f"{name}s", "value": value, "value_shared": shared,
            "value_first": int(one.sum()), "value_second": int(other.sum()), "value_null": float(index.mean()),
            "value_null_low": low, "value_null_high": high,
            "value_p": (1 + int((index >= value).sum())) / (1 + n_null),
            "value_p_exact": _exact_p(first, second, classes, shared) if name == "edge" else np.nan,
        })  # fmt: skip
    meta = _origin(first, second) | {"within": within, "n_null": n_null, "seed": seed}
    return Result("compare.overlap", pd.DataFrame(rows), "Jaccard index", meta=meta)


@method(name="Recovery of a known circuit", paper="arXiv:2304.14997", notebook="circuit_discovery")
def recovery(circuits: Circuit | Mapping[str, Circuit], reference: Circuit, *, by: By = "absolute") -> Result:
    """How well circuits find the edges and nodes of a known one.

    AUROC is the chance that an edge of the reference is ranked above one that is not in it, ties counting half. Edges
    that are in are ranked by score; all that are not in (predicted negative) are tied below them. A node is ranked by
    its best edge. Precision, recall and F1 are those of the edges that are in, whatever their scores.

    Args:
        circuits: one, or {name: circuit}, of the reference's graph.
        reference: the known circuit; its scores do not matter.
        by: rank by |score| ("absolute"), the largest ("signed") or the lowest scores ("negative") first.

    Returns:
        Result, unit "AUROC"; a row a circuit (`target`) for edges and one for nodes (`component`; the input is no
        node): `value`, `value_precision` (NaN where nothing is in), `value_recall`, `value_f1`,
        `value_false_positives` (rate), `value_found` (how many are in), `value_true` (how many the reference has).

    Raises:
        ValueError: circuits of another graph; a reference with no edge or with all of them, which leaves nothing to
            tell apart.

    Cost: no forward pass.

    Differs from the paper: MIB's code counts an edge that the hypothesis lacks as predicted positive; here it is
        negative.

    Example:
        >>> graph = Graph(1, 2, 2)
        >>> truth = Circuit.from_edges(graph, [("input", "m0"), ("m0", "logits")])
        >>> found = Circuit.from_edges(graph, [("input", "m0"), ("a0.h1", "m0")])
        >>> recovery(found, truth).table.loc[0, ["value_precision", "value_recall"]].tolist()
        [0.5, 0.5]
    """
    named = {str(circuits.meta.get("method", "circuit")): circuits} if isinstance(circuits, Circuit) else circuits
    rows = []
    for name, circuit in named.items():
        for level in LEVELS:
            truth, rank = _against(circuit, reference, level, by)
            found = _members(circuit, level)
            hits, false = int((found & truth).sum()), int((found & ~truth).sum())
            recall, precision = hits / truth.sum(), hits / found.sum() if found.any() else float("nan")
            rows.append({
                "target": name, "component": f"{level}s", "value": _auroc(truth, rank), "value_precision": precision,
                "value_recall": recall, "value_f1": 2 * hits / (int(found.sum()) + int(truth.sum())),
                "value_false_positives": false / int((~truth).sum()), "value_found": int(found.sum()),
                "value_true": int(truth.sum()),
            })  # fmt: skip
    return Result("compare.recovery", pd.DataFrame(rows), "AUROC", meta={**_origin(reference), "by": by})


def roc(circuit: Circuit, reference: Circuit, *, level: str = "edge", by: By = "absolute") -> Result:
    """The receiver operating characteristic behind `recovery`: rates as more and more edges are called positive.

    Args:
        circuit: a ranking.
        reference: the known circuit.
        level: "edge" or "node".
        by: as in `recovery`.

    Returns:
        Result, unit "true positive rate"; a row a threshold: `step` (how many are called positive), `value`,
        `value_false_positives`, `value_precision`. From the last edge that is in to all there are it is a straight
        line. `meta["auroc"]` is the area below.

    Raises:
        ValueError: as `recovery`.
    """
    truth, rank = _against(circuit, reference, level, by)
    order = np.argsort(-rank, kind="stable")
    hits, steps = np.cumsum(truth[order]), np.arange(1, len(order) + 1)
    ends = np.append(rank[order[1:]] != rank[order[:-1]], True)  # ties cross a threshold together
    hits, steps = np.append(0, hits[ends]), np.append(0, steps[ends])
    table = pd.DataFrame({
        "step": steps,
        "value": hits / truth.sum(),
        "value_false_positives": (steps - hits) / (~truth).sum(),
        "value_precision": np.divide(hits, steps, out=np.full(len(steps), np.nan), where=steps > 0),
    })  # fmt: skip
    meta = {**_origin(reference), "level": level, "by": by, "auroc": _auroc(truth, rank)}
    return Result("compare.roc", table, "true positive rate", meta=meta)


@method(name="Correlation of edge scores", paper="arXiv:2403.17806", notebook="circuit_discovery")
def correlation(first: Circuit, second: Circuit) -> Result:
    """Whether two methods score edges alike.

    Args:
        first: a circuit with scores.
        second: another of the same graph.

    Returns:
        Result, unit "correlation"; for all edges that are in both circuits, and for those into each kind of input
        (`component` "all", "q", "k", "v", "mlp", "logits"), a row for each `metric`, "pearson" and "spearman":
        `value` (NaN where one side does not vary, or below two edges) and `value_edges`.

    Raises:
        ValueError: circuits of different graphs.

    Cost: no forward pass.
    """
    _require_same(first, second)
    both = first.kept & second.kept
    kinds = np.array([each.kind for each in first.graph.destinations])
    rows = []
    for component in ("all", "q", "k", "v", "mlp", "logits"):
        chosen = both if component == "all" else both & (kinds == component)[:, None]
        one, other = first.scores[chosen], second.scores[chosen]
        varies = len(one) > 1 and np.ptp(one) > 0 and np.ptp(other) > 0
        for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            value = float(function(one, other).statistic) if varies else np.nan
            rows.append({"component": component, "metric": name, "value": value, "value_edges": len(one)})
    return Result("compare.correlation", pd.DataFrame(rows), "correlation", meta=_origin(first, second))


@method(name="Stability of a circuit over prompts", paper="arXiv:2606.16920", notebook="circuit_discovery")
def stability(
    model: Model, task: Task, find: Callable[[np.ndarray], Circuit], *, n_boot: int = 20, seed: int = 0
) -> Result:
    """Whether the same circuit is found on resampled prompts.

    Args:
        model: that circuits are found on.
        task: the prompts.
        find: makes a circuit of the wanted size from the numbers of some prompts `[n]`, some of them more than once: by
            a run, `lambda rows: eap.eap(model, task[rows]).top(200)`, or from scores of each prompt that are there
            already, `lambda rows: Circuit.of(graph, scores[rows].mean(0), unit="logits").top(200)`.
        n_boot: resamples of the prompts, with replacement.
        seed: of the resamples.

    Returns:
        Result, unit "Jaccard index"; a row (`step`) for each pair of resamples (`target` "pair") and for each resample
        with the circuit of all prompts ("whole"): `value` (edges) and `value_nodes`. `arrays["frequency"]` is the share
        of resamples in which each edge is in, `[dst src]`. A mean over pairs above `BAR`, 0.8, has been proposed as
        the bar of self-consistency; `meta["mean"]` and `meta["above_bar"]` say where this one is. Resamples share
        prompts, so that fresh prompts would agree less.

    Raises:
        ValueError: fewer than two resamples.

    Cost: n_boot + 1 calls of `find`.
    """
    if n_boot < 2:
        raise ValueError(f"n_boot={n_boot}: pairs of resamples are compared, so it needs 2 or more.")
    rng = np.random.default_rng(seed)
    whole = find(np.arange(len(task)))
    found = [find(rng.integers(len(task), size=len(task))) for _ in range(n_boot)]
    pairs = [("pair", *both) for both in combinations(found, 2)] + [("whole", each, whole) for each in found]
    rows = [
        {"target": target, "step": step, "value": jaccard(a, b), "value_nodes": jaccard(a, b, level="node")}
        for step, (target, a, b) in enumerate(pairs)
    ]
    table = pd.DataFrame(rows)
    mean = float(table.loc[table["target"] == "pair", "value"].mean())
    meta = provenance(model, task, n_boot=n_boot, seed=seed, mean=mean, bar=BAR, above_bar=mean > BAR)
    frequency = np.mean([each.kept for each in found], axis=0)
    return Result("compare.stability", table, "Jaccard index", {"frequency": (("dst", "src"), frequency)}, meta)


def _members(circuit: Circuit, level: str) -> np.ndarray:
    """Which possible edges, or sources but the input, are in."""
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is not known; use one of {', '.join(LEVELS)}.")
    if level == "edge":
        return circuit.kept[circuit.graph.possible]
    return np.isin(circuit.graph.sources[1:], circuit.nodes)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0


def _against(circuit: Circuit, reference: Circuit, level: str, by: By) -> tuple[np.ndarray, np.ndarray]:
    """Which edges or nodes are true, and their ranks: the larger, the more likely; those not in lowest."""
    _require_same(circuit, reference)
    truth = _members(reference, level)
    if not truth.any() or truth.all():
        raise ValueError(
            f"the reference has {int(truth.sum())} of {len(truth)} {level}s: where none or all are true there is "
            "nothing to tell apart. Give a reference that has some and lacks some."
        )
    ranked = np.where(circuit.kept, ranks(circuit.scores, by), -np.inf)
    if level == "edge":
        return truth, ranked[circuit.graph.possible]
    into = np.where(circuit.readers, ranked.max(1)[:, None], -np.inf).max(0)
    return truth, np.maximum(ranked.max(0), into)[1:]


def _auroc(truth: np.ndarray, rank: np.ndarray) -> float:
    ranks, n = stats.rankdata(rank), int(truth.sum())
    return float((ranks[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))


def _classes(graph: Graph, within: str) -> np.ndarray:
    """The class of each possible edge."""
    keys = {
        "graph": lambda row, each: 0,
        "kind": lambda row, each: each.kind,
        "layer": lambda row, each: (each.kind, each.layer),
        "destination": lambda row, each: row,
    }
    if within not in keys:
        raise ValueError(f"within={within!r} is not known; use one of {', '.join(WITHIN)}.")
    numbers: dict[object, int] = {}
    rows = [numbers.setdefault(keys[within](r, each), len(numbers)) for r, each in enumerate(graph.destinations)]
    return np.repeat(rows, graph.possible.sum(1))


def _shuffles(circuit: Circuit, classes: np.ndarray, n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The circuit's edges at random places of the same classes, `[dst src]`."""
    kept = circuit.kept[circuit.graph.possible]
    members = [np.flatnonzero(classes == each) for each in np.unique(classes[kept])]
    counts = [int(kept[where].sum()) for where in members]
    for _ in range(n):
        drawn = np.zeros_like(kept)
        for where, count in zip(members, counts, strict=True):
            drawn[where[rng.choice(len(where), count, replace=False, shuffle=False)]] = True
        whole = np.zeros_like(circuit.kept)
        whole[circuit.graph.possible] = drawn
        yield whole


def _exact_p(first: Circuit, second: Circuit, classes: np.ndarray, shared: int) -> float:
    """Chance that as many edges are shared, from one hypergeometric distribution a class."""
    one, other = _members(first, "edge"), _members(second, "edge")
    whole = np.ones(1)
    for each in np.unique(classes[one]):
        inside = classes == each
        a, b = int(one[inside].sum()), int(other[inside].sum())
        whole = np.convolve(whole, stats.hypergeom(int(inside.sum()), a, b).pmf(np.arange(min(a, b) + 1)))
    return min(1.0, float(whole[shared:].sum()))


def _require_same(first: Circuit, second: Circuit) -> None:
    if first.graph != second.graph:
        raise ValueError(
            f"the circuits are of different graphs, {first.graph} and {second.graph}: compare circuits of one model, "
            "all with a key and value a head, or all with one a group (Graph.of(model, grouped=...))."
        )
    models = {each.meta["model_fingerprint"] for each in (first, second) if each.meta.get("model_fingerprint")}
    if len(models) > 1:
        raise ValueError("the circuits are of two different models: edges can be compared within one model only.")


def _origin(*circuits: Circuit) -> dict[str, object]:
    keys = ("model", "model_fingerprint", "weights", "dtype")
    found = {key: each.meta[key] for each in circuits for key in keys if key in each.meta}
    return found | {"circuits": [str(each.meta.get("method", "")) for each in circuits]}
