"""Does the model need the heads whose weights hold a relation? MAPS's causal experiment: they are removed, best first.

*Inferring Functionality of Attention Heads from their Parameters* (arXiv 2412.11965).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.batching import batches, sweep
from interp.core.edits import Edit
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath, rerun
from interp.core.result import Result
from interp.models.model import Model
from interp.tasks.relations import Relation, Relations
from interp.weights._parts import Head
from interp.weights.maps import PAPER, PROMOTES

#: Names in the column `component`: whose heads are removed.
OWN, RANDOM, CONTROL = "its heads", "random heads", "heads of another"

#: The paper's: a relation with a lower accuracy is left out; a control shares fewer of the heads than this, and its
#: accuracy differs by less than that.
MIN_ACCURACY, MAX_OVERLAP, MAX_DIFFERENCE = 0.1, 0.15, 0.2

# At most so many heads are removed from a model with fewer than so many: the paper's.
_MOST = ((300, 30), (500, 50), (1000, 100), (1500, 150))
_MOST_OF_MORE = 250

# Relations that the paper asks for in plain words; the others with worked examples. They are the first and the last of
# a shipped relation's templates.
_IN_WORDS = ("country_capital", "country_language", "object_superclass")


class _Asked(NamedTuple):
    """The prompts of a relation, one a source, and the tokens that are right, `[prompt any]`, filled up with -1."""

    tokens: Tensor
    mask: Tensor
    right: Tensor


@method(name="MAPS: ablation of relation heads", paper=PAPER, notebook="maps")
def ablation_curves(
    model: Model,
    relations: Relations,
    scores: Result,
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    n_random: int = 5,
    n_controls: int = 5,
    prompts: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    exact_path: ExactPath | None = None,
) -> Result:
    """Whether the model still answers without the first heads of a relation, by static score, or without random ones.

    A head is removed by setting its z to zero at the last position. A prompt asks for one source; it is answered if the
    token with the largest logit is a right target's. The heads of a relation are those with a static score above 0,
    highest first, at most 30, 50, 100, 150 or 250 of models with fewer than 300, 500, 1,000, 1,500 or more heads.
    Baselines: the first of other heads (not among these) in a random order; and control relations, asked without this
    relation's heads, as many as `meta["removed"]` says: the first count that leaves nothing right, or else all.

    Args:
        model: a decoder, with any weights.
        relations: from `interp.tasks.relations`, for this model's tokenizer; those of a single token are asked.
        scores: what `maps.relation_scores` returned for them; raw and processed weights name their heads alike.
        counts: how many heads are removed, clipped to those that a relation has; their number itself is added.
        n_random: random orders.
        n_controls: most control relations of each: those with less than 15% of the heads in common (of as many first
            heads of each) and an accuracy that differs by less than 0.2; the fewest in common first.
        prompts: {relation: a template with "{source}" in it once, the target next}; for the others the relation's
            last template (worked examples), or its first (in words) for capitals, languages and superclasses.
        seed: of the random orders.
        batch_size: prompts at once.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, unit "accuracy", a row for each prompt and run: `target`, the relation that is asked; `src`, the one
        whose heads are removed; `component` ("its heads", "random heads", "heads of another"); `step`, how many; the
        number of the random order in `value_draw` (else 0); `prompt`; `value`, 0 or 1. Step 0 is there once, as
        "its heads". `meta` has "heads", "removed" and "controls" by relation, and "dropped": the accuracy of relations
        that are left out because it is below 0.1, or that no head has a score for. `link` sums it up.

    Raises:
        ValueError: no relation that is left, scores without a relation, a relation without a template, a count below 1.

    Cost: two forward passes over the prompts; a run is the last position only, from the layer of the first removed
        head on: for each prompt counts x (1 + n_random) + n_controls of those. Memory as `interp.core.rerun.rerun`. Can
        be stopped and resumed, relation by relation.

    Differs from the paper: its code removes 1, 2, 3, ... heads; any right target counts where a source has several;
    prompts and pairs are our own, in the paper's forms.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import Relation, Relations
        >>> from interp.weights.maps import relation_scores
        >>> model, words = toy.induction(), [f"w{i}" for i in range(2, 12) if i != 5]
        >>> copying = Relation.from_pairs(model, "copying", [(w, w) for w in words], templates=["w5 {source} w5"])
        >>> own = Relations((copying,))
        >>> curves = ablation_curves(model, own, relation_scores(model, own, embedding="raw"))
        >>> curves.summary(["component", "step"])[["component", "step", "mean"]].values.tolist()
        [['its heads', 0, 1.0], ['its heads', 1, 0.0], ['random heads', 1, 1.0]]
    """
    if n_random < 1 or not counts or min(counts) < 1:
        raise ValueError(f"counts={tuple(counts)}, n_random={n_random}: give counts of at least 1 and a random order.")
    order = {relation.name: _heads(model, relation.name, scores) for relation in relations}
    templates = {relation.name: _template(relation, prompts or {}) for relation in relations}
    asked = {relation.name: _ask(model, relation, templates[relation.name]) for relation in relations}
    runs = {name: _runs(model, name, heads, counts, n_random, seed) for name, heads in order.items()}
    identity = {
        "method": "causal.ablation_curves", "relations": relations.fingerprint, **model.provenance,
        "templates": templates, "exact_path": exact_path,
    }  # fmt: skip
    frames = _sweep(model, asked, runs, identity, batch_size, exact_path)
    base = {name: float(frame.loc[frame["step"] == 0, "value"].mean()) for name, frame in frames.items()}
    kept = [name for name in frames if base[name] >= MIN_ACCURACY and order[name]]
    if not kept:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in base.items())
        raise ValueError(
            f"{model.name} does none of these relations (accuracy {shown}; at least {MIN_ACCURACY} is needed, and a "
            "head with a score above 0): ask for others, or in other words, with prompts={...}."
        )
    removed = {name: _emptied(frames[name]) for name in kept}
    controls = {name: _controls(name, kept, base, order, removed[name], n_controls) for name in kept}
    others: dict[str, list[_Run]] = {name: [] for name in kept}
    for name in kept:
        for other in controls[name]:
            others[other].append(_Run(name, CONTROL, removed[name], 0, tuple(order[name][: removed[name]])))
    others = {name: each for name, each in others.items() if each}
    second = _sweep(model, asked, others, identity, batch_size, exact_path) if others else {}
    table = pd.concat([*(frames[name] for name in kept), *second.values()], ignore_index=True)
    meta = {
        **model.provenance, "task_fingerprint": relations.fingerprint, "relations": kept, "templates": templates,
        "heads": {name: [list(head) for head in order[name]] for name in kept}, "removed": removed,
        "controls": controls, "dropped": {name: base[name] for name in base if name not in kept}, "seed": seed,
        "n_random": n_random,
    }  # fmt: skip
    return Result("causal.ablation_curves", table, "accuracy", meta=meta)


@method(name="MAPS: causal link", paper=PAPER, notebook="maps")
def link(curves: Result, *, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> Result:
    """What a relation loses with its heads, with as many random ones, and what other relations lose with them.

    Accuracies at the number of heads that `meta["removed"]` of the curves says: the first that leaves nothing right, or
    else all. It is chosen on the same prompts, as in the paper, which is in favour of the relation's own heads.

    Args:
        curves: what `ablation_curves` returned.
        n_boot: number of bootstrap resamples.
        level: coverage of the percentile interval.
        seed: of the bootstrap.

    Returns:
        Result, unit "accuracy", a row for each relation (`target`) and `metric`: "all heads", "without its heads",
        "without random heads" (mean over the orders), "difference" (the last less the second), and, with means over the
        control relations, "controls, all heads" and "controls, without its heads". `step` is the number of heads
        removed, `value` with `value_low` and `value_high`, from a bootstrap that resamples prompts, and the random
        orders with them; of controls only the prompts of each. NaN where there is no control, or no random order of as
        many heads.

    Raises:
        ValueError: a table that is not one of `ablation_curves`.

    Cost: none to speak of.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"target": "a", "src": "a", "component": [OWN, OWN, RANDOM], "step": [0, 1, 1],
        ...     "value_draw": 0, "prompt": 0, "value": [1.0, 0.0, 1.0]})
        >>> curves = Result("causal.ablation_curves", rows, "accuracy", meta={"relations": ["a"], "removed": {"a": 1}})
        >>> link(curves).filter(metric="difference").table["value"].tolist()
        [1.0]
    """
    if curves.method != "causal.ablation_curves":
        raise ValueError(f"link sums up what ablation_curves returned; this is a Result of {curves.method}.")
    rows = []
    for name in curves.meta["relations"]:
        step = curves.meta["removed"][name]
        rng = np.random.default_rng(seed)
        own = curves.filter(target=name, src=name)
        full, without = (_matrix(own, OWN, at)[0] for at in (0, step))
        drawn = _matrix(own, RANDOM, step)
        weights = _weights(rng, n_boot, len(full))
        samples = {"all heads": weights @ full, "without its heads": weights @ without}
        samples["without random heads"] = (_weights(rng, n_boot, len(drawn)) @ drawn * weights).sum(1)
        samples["difference"] = samples["without random heads"] - samples["without its heads"]
        others = curves.filter(src=name, component=CONTROL).table["target"].unique()
        pairs = [
            (_matrix(curves.filter(target=other, src=other), OWN, 0)[0],
             _matrix(curves.filter(target=other, src=name), CONTROL, step)[0])
            for other in others
        ]  # fmt: skip
        resampled = [_weights(rng, n_boot, len(before)) for before, _ in pairs]
        for index, metric in enumerate(("controls, all heads", "controls, without its heads")):
            each = [w @ pair[index] for w, pair in zip(resampled, pairs, strict=True)]
            samples[metric] = np.mean(each, 0) if each else np.full(n_boot + 1, np.nan)
        for metric, sample in samples.items():
            low, high = np.quantile(sample[1:], [(1 - level) / 2, (1 + level) / 2])
            rows.append({
                "target": name, "metric": metric, "step": step, "value": sample[0], "value_low": low, "value_high": high
            })  # fmt: skip
    meta = {**curves.meta, "n_boot": n_boot, "level": level, "seed": seed}
    return Result("causal.link", pd.DataFrame(rows), curves.unit, meta=meta)


def _weights(rng: np.random.Generator, n_boot: int, n: int) -> np.ndarray:
    """Weights `[1 + resample n]` of a mean: first of the sample itself, then of resamples."""
    even = np.full(n, 1 / n)
    return np.concatenate([even[None], rng.multinomial(n, even, size=n_boot) / n])


def _matrix(curves: Result, component: str, step: int) -> np.ndarray:
    """Answers `[draw prompt]` of one number of heads; a single NaN where there are none."""
    table = curves.filter(component=component, step=step).table
    wide = table.pivot(index="value_draw", columns="prompt", values="value").to_numpy(dtype=float)
    return wide if len(wide) else np.full((1, 1), np.nan)


class _Run(NamedTuple):
    """One changed run: whose heads are removed, as what, how many, which draw, and which."""

    src: str
    component: str
    step: int
    draw: int
    heads: tuple[Head, ...]


def _heads(model: Model, name: str, scores: Result) -> list[Head]:
    """Heads with a score, highest first, as many as are removed at most."""
    own = scores.table[(scores.table["target"] == name) & (scores.table["metric"] == PROMOTES)]
    if own.empty:
        raise ValueError(
            f"the scores have no relation {name!r}: score the same relations, maps.relation_scores(model, relations)."
        )
    own = own[own["value"] > 0].sort_values(["layer", "head"])
    own = own.iloc[np.argsort(-own["value"].to_numpy(), kind="stable")]
    total = model.n_layers * model.n_heads
    most = next((most for below, most in _MOST if total < below), _MOST_OF_MORE)
    return [(int(layer), int(head)) for layer, head in zip(own["layer"], own["head"], strict=True)][:most]


def _template(relation: Relation, prompts: Mapping[str, str]) -> str:
    if relation.name in prompts:
        template = prompts[relation.name]
    elif relation.templates:
        template = relation.templates[0 if relation.name in _IN_WORDS else -1]
    else:
        raise ValueError(
            f"the relation {relation.name!r} has no templates: give prompts={{{relation.name!r}: "
            '"The word {source} goes with the word"}.'
        )
    if template.count("{source}") != 1 or template != template.rstrip():
        raise ValueError(f"the prompt {template!r} needs {{source}} in it once and no space at its end.")
    return template


def _ask(model: Model, relation: Relation, template: str) -> _Asked:
    sources = list(dict.fromkeys(pair.source for pair in relation.pairs))
    if not sources:
        raise ValueError(f"the relation {relation.name!r} has no pairs of single tokens for this model: leave it out.")
    tokens, mask = model.tokenize([template.replace("{source}", source) for source in sources])
    right = [torch.tensor(relation.targets[source]) for source in sources]
    padded = torch.nn.utils.rnn.pad_sequence(right, batch_first=True, padding_value=-1)
    return _Asked(tokens, mask, padded.to(tokens.device))


def _runs(model: Model, name: str, heads: list[Head], counts: Sequence[int], n_random: int, seed: int) -> list[_Run]:
    """The unchanged run, the relation's first heads removed, and the first of random orders of the other heads."""
    steps = sorted({*(min(count, len(heads)) for count in counts), len(heads)} - {0})
    runs = [_Run(name, OWN, n, 0, tuple(heads[:n])) for n in (0, *steps)]
    own = set(heads)
    others = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    others = [at for at in others if at not in own]
    # A generator for each relation: its orders do not depend on which others are asked.
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for draw in range(n_random):
        shuffled = [others[i] for i in rng.permutation(len(others))]
        runs += [_Run(name, RANDOM, n, draw, tuple(shuffled[:n])) for n in steps if n <= len(others)]
    return runs


def _sweep(
    model: Model,
    asked: Mapping[str, _Asked],
    runs: Mapping[str, Sequence[_Run]],
    identity: Mapping[str, Any],
    batch_size: int,
    exact_path: ExactPath | None,
) -> dict[str, pd.DataFrame]:
    """Whether each prompt of a relation is answered in each of its runs: the rows of the table."""
    names = list(runs)
    # Relations differ in prompts and runs: what a relation has not stays -1.
    shape = (max(len(each) for each in runs.values()), max(len(asked[name].tokens) for name in names))

    def compute(rows: slice) -> Mapping[str, np.ndarray]:
        name = names[rows.start]
        found = np.full((1, *shape), -1, dtype=np.int8)
        for part in batches(len(asked[name].tokens), batch_size):
            answered = _answered(model, asked[name], part, runs[name], exact_path)
            found[0, : len(answered), part] = answered
        return {"correct": found}

    found = sweep(
        len(names), compute, batch_size=1, description="ablation of relation heads",
        identity={**identity, "runs": {name: [list(run) for run in each] for name, each in runs.items()}},
    )["correct"]  # fmt: skip
    return {
        name: _table(name, runs[name], found[i, : len(runs[name]), : len(asked[name].tokens)])
        for i, name in enumerate(names)
    }


def _answered(
    model: Model, asked: _Asked, part: slice, runs: Sequence[_Run], exact_path: ExactPath | None
) -> np.ndarray:
    """0 or 1, `[run prompt]`."""
    tokens, mask, right = (each[part] for each in asked)
    end = tokens.shape[1] - 1
    cells = [[Edit("z", layer, head=head, pos=end, value=0.0) for layer, head in run.heads] for run in runs]

    def correct(logits: Tensor, rows: Tensor) -> Tensor:
        return (logits.argmax(-1)[:, None] == right[rows]).any(1).float()

    where = torch.full((len(tokens),), end, device=tokens.device)
    read = Readout("accuracy", "share of prompts", where, None, correct)
    return rerun(model, tokens, cells, read, mask=mask, exact_path=exact_path).cpu().numpy()


def _table(name: str, runs: Sequence[_Run], correct: np.ndarray) -> pd.DataFrame:
    which, prompt = np.indices(correct.shape).reshape(2, -1)
    columns = {"src": "src", "component": "component", "step": "step", "value_draw": "draw"}
    described = {column: np.array([getattr(run, field) for run in runs])[which] for column, field in columns.items()}
    described["src"], described["component"] = (described[c].astype(object) for c in ("src", "component"))
    return pd.DataFrame({"target": name, **described, "prompt": prompt, "value": correct.ravel().astype(float)})


def _emptied(frame: pd.DataFrame) -> int:
    """The first number of removed heads that leaves nothing right, or else the largest."""
    own = frame[frame["component"] == OWN].groupby("step")["value"].mean()
    nothing = own.index[own == 0]
    return int(nothing.min() if len(nothing) else own.index.max())


def _controls(
    name: str, kept: Sequence[str], base: Mapping[str, float], order: Mapping[str, Sequence[Head]], n: int, most: int
) -> list[str]:
    """Relations that are done about as well, by other heads; those with the fewest heads in common first."""
    found = []
    for other in kept:
        overlap = len(set(order[name][:n]) & set(order[other][:n])) / n
        apart = abs(base[name] - base[other])
        if other != name and overlap < MAX_OVERLAP and apart < MAX_DIFFERENCE:
            found.append((overlap, apart, other))
    return [other for _, _, other in sorted(found)[:most]]
