"""Has a circuit all parts that matter, and only those? Completeness and minimality, by taking parts out of it.

As in *Interpretability in the Wild* (arXiv 2211.00593), with F(X) the metric's mean when only the edges X are in. Parts
are nodes or single edges; a node is taken out with all edges that leave it, so that nothing reads what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.circuits._ablated import Positions, plain
from interp.circuits._judge import Judge, judging, named, require_ends
from interp.circuits.circuit import Circuit
from interp.circuits.graph import INPUT
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.patching._inputs import provenance
from interp.tasks.task import Task

#: A part of a circuit: a node's name, or an edge (source, destination).
Part = str | tuple[str, str]

_UNIT = "fraction of the gap between all edges and none"


@method(name="Completeness of a circuit", paper="arXiv:2211.00593", notebook="circuit_discovery")
def completeness(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    level: str = "node",
    classes: Mapping[str, Sequence[Part]] | None = None,
    n_random: int = 20,
    n_greedy: int = 1,
    steps: int = 5,
    candidates: int = 5,
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    reference: Task | None = None,
    positions: Positions = None,
    min_oriented: float = 0.75,
    seed: int = 0,
) -> Result:
    """Whether the circuit without some parts does what the model without them does.

    For sets K of the circuit's parts, value_i = (F_i(C without K) - F_i(M without K)) / mean gap. A circuit that lacks
    a backup is faithful as it is, and fails here for the K that the backup makes up for.

    Args:
        model: a decoder.
        task: the prompts.
        circuit: C.
        level: "node" or "edge".
        classes: {name: parts}, each a K.
        n_random: sets drawn at random, each part with the chance 1/2.
        n_greedy: greedy searches: from nothing, each step adds the part of a random few with the largest
            |F(C without K) - F(M without K)|; the set with the largest on the way is reported.
        steps: of a greedy search.
        candidates: how many parts a greedy step tries.
        metric: a name or a Readout.
        ablation: see `faithfulness.faithfulness`.
        reference: prompts of means.
        positions: see `faithfulness.faithfulness`.
        min_oriented: see `faithfulness.faithfulness`.
        seed: of the sets, and of "resample".

    Returns:
        Result, unit "fraction of the gap between all edges and none"; a row a prompt and set (`step`; 0 takes nothing
        out, which is faithfulness): `component` ("nothing", "random", "greedy" or the class), `value`,
        `value_circuit` and `value_model` (the two metrics). `meta["sets"]` lists each set, `meta["worst"]` the largest
        |mean value| of each component.

    Raises:
        ValueError: a circuit of another model, an unknown level, a class with a part that the circuit has not.

    Cost: 2 (1 + classes + n_random) + 2 x n_greedy x steps x candidates + 2 forward passes with a weight an edge.
    """
    run, parts, rng = _ready(
        model, task, circuit, level, metric=metric, ablation=ablation, reference=reference, positions=positions,
        seed=seed, min_oriented=min_oriented, what="completeness",
    )  # fmt: skip
    full, empty = run.ends
    gap = float((full - empty).mean())

    def both(sets: Sequence[Sequence[Part]]) -> tuple[np.ndarray, np.ndarray]:
        wholes = circuit.kept, circuit.graph.possible
        cut = np.stack([_without(circuit, whole, each) for whole in wholes for each in sets])
        metrics = run(cut)
        return metrics[:, : len(sets)], metrics[:, len(sets) :]

    sets: list[tuple[str, list[Part]]] = [("nothing", [])]
    sets += [(name, _of_circuit(name, members, parts)) for name, members in (classes or {}).items()]
    sets += [("random", [part for part in parts if rng.random() < 0.5]) for _ in range(n_random)]
    for _ in range(n_greedy):
        taken: list[Part] = []
        best: tuple[float, list[Part]] = (-1.0, [])
        for _ in range(min(steps, len(parts))):
            left = [part for part in parts if part not in taken]
            tried = [[*taken, left[i]] for i in rng.permutation(len(left))[:candidates]]
            ours, theirs = both(tried)
            off = np.abs((ours - theirs).mean(0))
            taken = tried[int(off.argmax())]
            best = max(best, (float(off.max()), taken), key=lambda each: each[0])
        sets.append(("greedy", best[1]))
    ours, theirs = both([members for _, members in sets])
    rows = [
        {"prompt": prompt, "step": step, "component": name, "value": (ours[prompt, step] - theirs[prompt, step]) / gap,
         "value_circuit": ours[prompt, step], "value_model": theirs[prompt, step]}
        for step, (name, _) in enumerate(sets) for prompt in range(len(task))
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    means = table.groupby(["component", "step"])["value"].mean().abs()
    meta = _meta(
        run, reference, level=level, n_random=n_random, n_greedy=n_greedy, steps=steps, candidates=candidates,
        positions=plain(positions), sets=[_plain(members) for _, members in sets],
        worst={str(name): float(value) for name, value in means.groupby("component").max().items()},
    )  # fmt: skip
    return Result("completeness.completeness", table, _UNIT, meta=meta)


@method(name="Minimality of a circuit", paper="arXiv:2211.00593", notebook="circuit_discovery")
def minimality(
    model: Model,
    task: Task,
    circuit: Circuit,
    *,
    level: str = "node",
    classes: Mapping[str, Sequence[Part]] | None = None,
    n_random: int = 5,
    bar: float = 0.01,
    metric: str | Readout = "logit_diff",
    ablation: str = "corrupt",
    reference: Task | None = None,
    positions: Positions = None,
    min_oriented: float = 0.75,
    seed: int = 0,
) -> Result:
    """Whether each part of the circuit makes a difference, with some other parts out.

    For each part v and sets K without it, the effect is |F(C without K) - F(C without K and v)| / mean gap; a part
    passes when its largest effect reaches `bar`. K is nothing, the rest of v's classes, and random sets.

    Args:
        model: a decoder.
        task: the prompts.
        circuit: C.
        level: "node" or "edge".
        classes: {name: parts} of parts that may stand in for each other.
        n_random: random sets K, each part with the chance 1/2; the same ones for all parts.
        bar: the paper's 1%.
        metric: a name or a Readout.
        ablation: see `faithfulness.faithfulness`.
        reference: prompts of means.
        positions: see `faithfulness.faithfulness`.
        min_oriented: see `faithfulness.faithfulness`.
        seed: of the sets, and of "resample".

    Returns:
        Result, unit "fraction of the gap between all edges and none"; a row a prompt and part (`src`, and `dst` for an
        edge): `value`, the effect (F_i without K minus F_i without K and v) with the K of the largest |mean|, and
        `component`, which K that is ("nothing", a class, "random"). `meta["passing"]` is the share of parts that pass,
        `meta["failing"]` lists the others.

    Raises:
        ValueError: as `completeness`.

    Cost: up to (parts + 1)(1 + n_random) + 2 forward passes with a weight an edge, and two for each part and class of
        it; a byte an edge of the model for each. Meant for nodes, or for circuits of up to a few hundred edges.
    """
    run, parts, rng = _ready(
        model, task, circuit, level, metric=metric, ablation=ablation, reference=reference, positions=positions,
        seed=seed, min_oriented=min_oriented, what="minimality",
    )  # fmt: skip
    full, empty = run.ends
    gap = float((full - empty).mean())
    common: list[tuple[str, list[Part]]] = [("nothing", [])]
    common += [("random", [part for part in parts if rng.random() < 0.5]) for _ in range(n_random)]
    groups = {name: _of_circuit(name, members, parts) for name, members in (classes or {}).items()}
    cases: list[tuple[Part, str, list[Part]]] = []
    for part in parts:
        own = [(name, [each for each in out if each != part]) for name, out in groups.items() if part in out]
        cases += [(part, name, out) for name, out in [*common, *own] if part not in out]
    # Many cases share the set they start from.
    cells: dict[frozenset[Part], int] = {}
    pairs = [
        [cells.setdefault(frozenset(out), len(cells)), cells.setdefault(frozenset([*out, part]), len(cells))]
        for part, _, out in cases
    ]
    metrics = run(np.stack([_without(circuit, circuit.kept, list(out)) for out in cells]))
    before, after = np.array(pairs).T
    effects = (metrics[:, before] - metrics[:, after]) / gap
    rows, failing = [], []
    for part in parts:
        own_cases = [i for i, (each, _, _) in enumerate(cases) if each == part]
        best = max(own_cases, key=lambda i: abs(float(effects[:, i].mean())))
        if abs(float(effects[:, best].mean())) < bar:
            failing.append(part)
        names = {"src": part} if isinstance(part, str) else {"src": part[0], "dst": part[1]}
        rows += [
            {"prompt": prompt, **names, "component": cases[best][1], "value": float(effects[prompt, best])}
            for prompt in range(len(task))
        ]
    meta = _meta(
        run, reference, level=level, n_random=n_random, bar=bar, positions=plain(positions),
        passing=1 - len(failing) / len(parts), failing=_plain(failing),
    )  # fmt: skip
    return Result("completeness.minimality", pd.DataFrame(rows), _UNIT, meta=meta)


def _ready(
    model: Model,
    task: Task,
    circuit: Circuit,
    level: str,
    *,
    metric: str | Readout,
    ablation: str,
    reference: Task | None,
    positions: Positions,
    seed: int,
    min_oriented: float,
    what: str,
) -> tuple[Judge, list[Part], np.random.Generator]:
    """The task ready to run, and the circuit's parts."""
    named(model, circuit)
    if level not in ("node", "edge"):
        raise ValueError(f'level={level!r} is not known; use "node" or "edge".')
    table = circuit.edges
    parts: list[Part] = [name for name in circuit.nodes if name != INPUT]
    if level == "edge":
        parts = list(zip(table["src"], table["dst"], strict=True))
    if not parts:
        raise ValueError("the circuit is empty: there is nothing to take out.")
    run = judging(
        model, task, circuit.graph, metric=metric, ablation=ablation, reference=reference, positions=positions,
        seed=seed, what=what,
    )  # fmt: skip
    require_ends(run, *run.ends, min_oriented)
    return run, parts, np.random.default_rng(seed)


def _without(circuit: Circuit, kept: np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """Edges that are in, `[dst src]`, without some nodes or edges."""
    cut = kept.copy()
    for part in parts:
        if isinstance(part, str):
            cut[:, circuit.graph.source_index[part]] = False
        else:
            cut[circuit.graph.edge(*part)] = False
    return cut


def _of_circuit(name: str, members: Sequence[Part], parts: Sequence[Part]) -> list[Part]:
    strange = [part for part in members if part not in parts]
    if strange:
        raise ValueError(
            f"class {name!r} has {strange[0]!r}, which is not among the circuit's {len(parts)} parts, for example "
            f"{parts[0]!r}: name nodes for level='node', (source, destination) for level='edge'."
        )
    return list(members)


def _plain(parts: Sequence[Part]) -> list[str]:
    return [part if isinstance(part, str) else " -> ".join(part) for part in parts]


def _meta(run: Judge, reference: Task | None, **options: Any) -> dict[str, Any]:
    made = run.made
    return provenance(
        made.model, made.task, metric=made.metric if isinstance(made.metric, str) else made.metric.name,
        ablation=made.source.name, seed=run.seed, reference=None if reference is None else reference.fingerprint,
        **options,
    )  # fmt: skip
