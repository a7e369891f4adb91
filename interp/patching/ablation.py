"""What does the model do without some of its components, or with nothing else?

A component is ablated when its activation no longer depends on the prompt: it is set to zero, to its mean, or to what
it is in another prompt. How much that hurts depends on the choice (the mean by position, as in *Interpretability in the
Wild*, arXiv 2211.00593, keeps what all prompts have in common), so say which one a number is about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

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
from interp.patching._inputs import provenance, require_decoder
from interp.patching._runs import measure, readout_of
from interp.patching._sets import Component, as_sets, fingerprints
from interp.patching._sources import prepare, require_source
from interp.tasks.task import Task

#: Sites whose components `ablate(keep=True)` can ablate.
_AMONG = ("z", "mlp_out")


@method(name="Ablation of sets", paper="arXiv:2211.00593", notebook="ioi_circuit")
def ablate(
    model: Model,
    task: Task,
    sets: Mapping[str, Sequence[Component]],
    *,
    source: str = "mean",
    keep: bool = False,
    among: Sequence[str] = ("z",),
    reference: Task | None = None,
    metric: str | Readout = "logit_diff",
    seed: int = 0,
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """The metric with each set of components ablated, or with everything but the set ablated.

    value_i = m_i(the clean run of prompt i with the components set to the source's values), in the metric's own unit. A
    sweep of ablations of single components is `activation.patch(direction="noising", source=...)`.

    Args:
        model: a decoder.
        task: with answers.
        sets: {name: components}. A component is (layer, head), that head at all positions, or an
            `interp.core.edits.Edit` (for example `Edit("mlp_out", 3)`), whose tensors have a row for each prompt. No
            component: nothing is ablated (keep: everything is).
        source: "mean" (over prompts and positions), "position_mean" (over prompts at each position, of equally long
            prompts), "zero", "resample" (another prompt of the same length) or "corrupt" (the paired prompt).
        keep: ablate all components but those of the set, wherever in the prompt the set does not name them.
        among: the components that `keep` ablates: "z", all heads, and "mlp_out", all MLPs. Without "mlp_out", as in the
            paper, MLPs work on.
        reference: prompts whose clean activations are averaged by the means; None for the task's own. The paper takes
            prompts without the information that the task needs.
        metric: see `interp.core.readout.readout`.
        seed: of "resample".
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, one row a prompt and set: `prompt target value value_drop`, `target` being the set's name and
        `value_drop` the clean metric minus `value`; unit that of the metric. Arrays: "value" `[prompt target]`, "clean"
        `[prompt]`.

    Raises:
        ValueError: as `activation.joint`; with `keep`, a component that is not among those ablated.

    Cost: for each set the layers from its first component on, and one forward pass; one more over the reference for
        means.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> task, planted = induction(model, 4, 5), {"planted": [(0, 0), (1, 0)]}
        >>> without = ablate(model, task, planted, source="zero")
        >>> alone = ablate(model, task, planted, source="zero", keep=True)
        >>> [round(float(result.table["value"].mean())) for result in (without, alone)]
        [0, 36]
    """
    require_decoder(model)
    named = as_sets(sets)
    n_pos, n_prompts = task.clean.shape[1], len(task)
    checked(model, list(named.values()), n_pos, n_prompts, sourced=True)
    if keep:
        named = {name: _complement(model, name, edits, among, n_pos, task) for name, edits in named.items()}
    cells = list(named.values())
    edits = [edit for cell in cells for edit in cell]
    require_source(source, edits, task, reference)
    sites = {(edit.site, edit.layer) for edit in edits if edit.value is None}
    origin = prepare(model, task, source, sites, reference=reference, seed=seed, exact_path=exact_path)
    options = {
        "method": "ablation.ablate", "sets": fingerprints(as_sets(sets)), "source": source, "keep": keep,
        "among": list(among) if keep else None, "seed": seed,
        "reference": None if reference is None else reference.fingerprint,
    }  # fmt: skip

    def filled(rows: slice) -> list[list[Edit]]:
        n = len(range(n_prompts)[rows])
        return [[], *(origin.fill(cell, rows, n) for cell in cells)]

    metrics = measure(
        model, task, filled, metric, tokens=task.clean, source=origin.tokens, identity=options, batch_size=batch_size,
        exact_path=exact_path,
    )  # fmt: skip
    clean, values = metrics[:, 0], metrics[:, 1:]
    prompt, which = np.indices(values.shape).reshape(2, -1)
    names = np.array(list(named), dtype=object)[which]
    drop = (clean[:, None] - values).ravel()
    table = pd.DataFrame({"prompt": prompt, "target": names, "value": values.ravel(), "value_drop": drop})
    read = readout_of(model, task, metric, slice(0, 1))
    arrays = {"value": (("prompt", "target"), values), "clean": (("prompt",), clean)}
    return Result("ablation.ablate", table, read.unit, arrays, provenance(model, task, **options, metric=read.name))


def _complement(
    model: Model, name: str, edits: Sequence[Edit], among: Sequence[str], n_pos: int, task: Task
) -> list[Edit]:
    """Edits of all components among some sites, but for those given, where they are given."""
    if unknown := [site for site in among if site not in _AMONG]:
        raise ValueError(f"among={unknown[0]!r} is not known; use any of {', '.join(_AMONG)}.")
    if not among:
        raise ValueError(f"among=() leaves nothing to ablate: use any of {', '.join(_AMONG)}.")
    kept: dict[tuple[str, int, int | None], list[int | Tensor | None]] = defaultdict(list)
    for edit in edits:
        if edit.site not in among or edit.value is not None:
            raise ValueError(
                f"set {name!r} keeps an edit of {edit.site!r}"
                f"{' with a value' if edit.value is not None else ''}, but keep=True ablates all of "
                f"{', '.join(among)} except the set: name such components only, without values, or extend among=."
            )
        heads = range(model.n_heads) if edit.site == "z" and edit.head is None else [edit.head]
        for head in heads:
            kept[edit.site, edit.layer, head].append(edit.pos)
    everything = [
        (site, layer, head)
        for layer in range(model.n_layers)
        for site in among
        for head in (range(model.n_heads) if site == "z" else [None])
    ]
    rest = []
    for site, layer, head in everything:
        where = kept.get((site, layer, head))
        if where is None:
            rest.append(Edit(site, layer, head=head))
        elif not any(pos is None for pos in where):
            rest += [Edit(site, layer, head=head, pos=pos) for pos in _elsewhere(where, n_pos, task)]
    return rest


def _elsewhere(where: Sequence[int | Tensor | None], n_pos: int, task: Task) -> list[Tensor]:
    """Every position, -1 in the prompts in which it is one of those given."""
    device = task.clean.device
    taken = torch.stack([torch.as_tensor(pos, device=device).expand(len(task)) for pos in where])
    return [
        torch.where((taken == pos).any(0), -1, pos) for pos in range(n_pos) if not bool((taken == pos).any(0).all())
    ]
