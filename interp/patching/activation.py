"""Which activations carry the answer? Each is replaced by that of another run, and the answer is looked at again.

Activation patching as in *Towards Best Practices of Activation Patching* (arXiv 2309.16042), with the two directions of
*How to use and interpret activation patching* (arXiv 2404.15255): denoising puts clean activations into the corrupted
run and asks what suffices for the answer; noising puts corrupted ones into the clean run and asks what is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.edits import Edit, checked
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath
from interp.core.result import Result
from interp.models.model import Model
from interp.patching._grid import grid
from interp.patching._inputs import provenance, require_decoder, require_gap
from interp.patching._runs import measure, readout_of
from interp.patching._sets import Component, as_sets, fingerprints
from interp.patching._sources import prepare, require_source
from interp.tasks.task import Task

_PAPER = "arXiv:2309.16042"


@method(name="Activation patching", paper=_PAPER, notebook="ioi_circuit")
def patch(
    model: Model,
    task: Task,
    *,
    site: str = "z",
    by: str | Sequence[str] = ("layer", "head"),
    positions: str | int | Sequence[str | int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    direction: str = "denoising",
    source: str = "corrupt",
    reference: Task | None = None,
    metric: str | Readout = "logit_diff",
    min_oriented: float = 0.75,
    seed: int = 0,
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """How much of the clean answer each activation restores (denoising) or destroys (noising), on its own.

    m is the metric of a run, and gap the mean over prompts of m(clean) - m(corrupt). Of prompt i, for each cell of the
    sweep (a set of activations that are replaced together):

    - denoising: value_i = (m_i(corrupt run with clean values there) - m_i(corrupt)) / gap;
    - noising: value_i = (m_i(clean) - m_i(clean run with other values there)) / gap.

    1 is all of the answer, 0 nothing, in both. The divisor is the mean over prompts, so that the mean of `value` is the
    ratio of the means; ratios per prompt explode where a prompt's own gap is near zero. Replacing one thing at a time
    misses what is redundant (an OR, a backup head: noising) or needs company (an AND: denoising): look at both
    directions, and at sets with `joint`.

    Args:
        model: a decoder.
        task: with answers and, for fractions of the gap, corrupted prompts.
        site: what is replaced: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v",
            "pattern" (whose positions are those of the query) or "post" (the MLP's neurons).
        by: axes that are swept, of "layer", "head", "pos" and "neuron"; along the others everything is replaced
            together (("layer",) with "z": all heads of a layer). `head` of k and v is the key-value group.
        positions: where; names of `task.positions` and indices (padding counts); None for all.
        layers: which; None for all.
        heads: which of each layer; None for all.
        neurons: which of each layer; None for all.
        direction: "denoising" or "noising".
        source: "corrupt", the paired prompt at the same place; for noising also "zero", "mean" (over the clean prompts
            and their positions), "position_mean" (over the clean prompts at the same position, for prompts of one
            length) or "resample" (another clean prompt of the same length, each taken once).
        reference: prompts whose clean activations are averaged by the two means; None for the task's own.
        metric: see `interp.core.readout.readout`.
        min_oriented: share of the prompts whose clean metric must be better than the corrupted one.
        seed: of "resample".
        batch_size: prompts at once; None chooses from the free memory. It does not change the numbers beyond rounding.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, one row a prompt and cell: `prompt`, those of `layer head pos neuron` that are swept (`pos` with
        `token`, the name, if names were given), `value`, `value_metric` (the metric of the changed run). Unit
        "fraction of the mean clean-corrupt gap"; for a task without corrupted prompts that of the metric, and `value`
        is m(clean) - m(changed). Arrays: "value" `[prompt *swept]`; "clean" and "corrupt" `[prompt]`, the metric of the
        two unchanged runs.

    Raises:
        ValueError: an unknown site, axis, direction, source, position, layer, head or neuron; a site that the model has
            not; no corrupted prompts; a gap that is not positive; an encoder or vision model.

    Cost: for each cell the layers from its own on, at the positions from its first on (see `interp.core.rerun`), and
        four forward passes; a fifth over the reference for means. Memory: see there; batches are kept on disk until
        all are done, and an interrupted sweep goes on where it was.

    Differs from the paper: the divisor is the mean gap of the prompts, not each prompt's own.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> result = patch(model, induction(model, 4, 5), direction="noising")
        >>> result.grid("layer", "head").abs().round(2).values.tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    require_decoder(model)
    sweep = grid(model, task, site, by, positions, layers, heads, neurons)
    cells = sweep.cells()
    _require_direction(direction, source)
    require_source(source, cells[0], task, reference)
    options = {
        "method": "activation.patch", "site": site, "by": list(sweep.swept), "layers": sweep.numbers("layer"),
        "heads": sweep.numbers("head"), "neurons": sweep.numbers("neuron"), "positions": sweep.asked,
    }  # fmt: skip
    runs = _Runs(model, task, direction, source, reference, metric, min_oriented, seed, batch_size, exact_path)
    metrics, effects, arrays, unit = runs.of(cells, options)
    arrays["value"] = (("prompt", *sweep.swept), effects.reshape(len(task), *sweep.shape()))
    table = sweep.table(len(task)).assign(value=effects.ravel(), value_metric=metrics.ravel())
    return Result("activation.patch", table, unit, arrays, runs.meta(options))


@method(name="Activation patching of sets", paper=_PAPER, notebook="ioi_circuit")
def joint(
    model: Model,
    task: Task,
    sets: Mapping[str, Sequence[Component]],
    *,
    direction: str = "denoising",
    source: str = "corrupt",
    reference: Task | None = None,
    metric: str | Readout = "logit_diff",
    min_oriented: float = 0.75,
    seed: int = 0,
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """How much of the clean answer sets of components restore (denoising) or destroy (noising), each set as a whole.

    As `patch`, with cells given one by one: it shows what single patches miss, such as two heads that cancel, or a head
    and its backup.

    Args:
        model: a decoder.
        task: as for `patch`.
        sets: {name: components}. A component is (layer, head), that head's z at all positions, or an
            `interp.core.edits.Edit`, whose tensors have a row for each prompt of the task; an Edit with a value of its
            own keeps it. No component gives the unchanged run.
        direction: "denoising" or "noising".
        source: as for `patch`.
        reference: as for `patch`.
        metric: as for `patch`.
        min_oriented: as for `patch`.
        seed: of "resample".
        batch_size: as for `patch`.
        exact_path: as for `patch`.

    Returns:
        Result, one row a prompt and set: `prompt target value value_metric`, `target` being the set's name; unit and
        arrays as of `patch`, "value" `[prompt target]`.

    Raises:
        ValueError: as `patch`; no sets.

    Cost: for each set the layers from its first component on; else as `patch`.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> result = joint(model, induction(model, 4, 5), {"planted": [(0, 0), (1, 0)], "idle": [(0, 1), (1, 1)]})
        >>> result.summary(by=["target"])["mean"].abs().round(2).tolist()
        [0.0, 1.0]
    """
    require_decoder(model)
    named = as_sets(sets)
    _require_direction(direction, source)
    require_source(source, [edit for edits in named.values() for edit in edits], task, reference)
    options = {"method": "activation.joint", "sets": fingerprints(named)}
    runs = _Runs(model, task, direction, source, reference, metric, min_oriented, seed, batch_size, exact_path)
    metrics, effects, arrays, unit = runs.of(list(named.values()), options)
    arrays["value"] = (("prompt", "target"), effects)
    prompt, which = np.indices(effects.shape).reshape(2, -1)
    names = np.array(list(named), dtype=object)[which]
    table = pd.DataFrame(
        {"prompt": prompt, "target": names, "value": effects.ravel(), "value_metric": metrics.ravel()}
    )  # fmt: skip
    return Result("activation.joint", table, unit, arrays, runs.meta(options))


@dataclass(frozen=True, eq=False)
class _Runs:
    """How changed runs are made and compared; the options that `patch` and `joint` have in common."""

    model: Model
    task: Task
    direction: str
    source: str
    reference: Task | None
    metric: str | Readout
    min_oriented: float
    seed: int
    batch_size: int | None
    exact_path: ExactPath | None

    def choices(self) -> dict[str, Any]:
        """The options that decide the changed runs."""
        reference = None if self.reference is None else self.reference.fingerprint
        return {"direction": self.direction, "source": self.source, "reference": reference, "seed": self.seed}

    def meta(self, options: Mapping[str, Any]) -> dict[str, Any]:
        metric = self.metric.name if isinstance(self.metric, Readout) else self.metric
        return provenance(
            self.model, self.task, **options, **self.choices(), metric=metric, min_oriented=self.min_oriented
        )

    def of(
        self, cells: Sequence[Sequence[Edit]], options: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, tuple[tuple[str, ...], np.ndarray]], str]:
        """Metrics and effects `[prompt cell]`, the arrays of the unchanged runs, and the effects' unit."""
        model, task = self.model, self.task
        checked(model, cells, task.clean.shape[1], len(task), sourced=True)
        read = readout_of(model, task, self.metric, slice(0, 1))

        def unchanged(tokens: Tensor, which: str) -> np.ndarray:
            identity = {"method": f"{which} run"}
            return measure(
                model, task, lambda rows: [[]], self.metric, tokens=tokens, identity=identity,
                batch_size=self.batch_size, exact_path=self.exact_path,
            )[:, 0]  # fmt: skip

        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        arrays["clean"] = (("prompt",), unchanged(task.clean, "clean"))
        divisor, unit = 1.0, read.unit
        if task.corrupt is not None:
            arrays["corrupt"] = (("prompt",), unchanged(task.corrupt, "corrupt"))
            clean, corrupt = (torch.as_tensor(arrays[which][1]) for which in ("clean", "corrupt"))
            require_gap(task, read, clean, corrupt, self.min_oriented)
            divisor, unit = float((clean - corrupt).mean()), "fraction of the mean clean-corrupt gap"

        sites = {(edit.site, edit.layer) for cell in cells for edit in cell if edit.value is None}
        origin = prepare(
            model, task, self.source, sites, reference=self.reference, seed=self.seed, exact_path=self.exact_path
        )
        base, other = task.clean, origin.tokens
        if self.direction == "denoising":
            assert task.corrupt is not None
            base, other = task.corrupt, task.clean

        def filled(rows: slice) -> list[list[Edit]]:
            n = len(range(len(task))[rows])
            # The unchanged run comes out of the same batches, so that a cell without effect has the effect 0.
            return [[], *(origin.fill(cell, rows, n) for cell in cells)]

        metrics = measure(
            model, task, filled, self.metric, tokens=base, source=other,
            identity={**options, **self.choices()}, batch_size=self.batch_size, exact_path=self.exact_path,
        )  # fmt: skip
        change = metrics[:, 1:] - metrics[:, :1]
        return metrics[:, 1:], (change if self.direction == "denoising" else -change) / divisor, arrays, unit


def _require_direction(direction: str, source: str) -> None:
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction {direction!r} is not known; use 'denoising' or 'noising'.")
    if direction == "denoising" and source != "corrupt":
        raise ValueError(
            f"source={source!r} takes information away, and denoising puts it back, from the clean prompt only: pass "
            "direction='noising'."
        )
