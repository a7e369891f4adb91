"""Where does the model recall what it knows of the subject? The subject is drowned in noise, and states are restored.

Causal tracing as in *Locating and Editing Factual Associations in GPT* (ROME, arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from interp.core.batching import batches
from interp.core.edits import Edit, checked
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath
from interp.core.result import Result
from interp.models.hooks import run
from interp.models.model import Model
from interp.patching._grid import grid, window_of
from interp.patching._inputs import Position, provenance, require_decoder, span
from interp.patching._runs import measure, prompts_at_once, readout_of, rows_of
from interp.tasks.task import Task

#: Sites that can be restored.
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")

_EMBEDDING, _INPUT = "hook_embed", "blocks.0.hook_resid_pre"


@method(name="Causal tracing", paper="arXiv:2202.05262", notebook="ioi_circuit")
def trace(
    model: Model,
    task: Task,
    *,
    subject: Position | list[Position],
    noise: float = 3.0,
    n_draws: int = 10,
    seed: int = 0,
    site: str = "resid_post",
    window: int = 1,
    positions: str | int | Sequence[str | int] | None = None,
    layers: Sequence[int] | None = None,
    metric: str | Readout = "prob",
    batch_size: int | None = None,
    exact_path: ExactPath | None = None,
) -> Result:
    """How much of the answer comes back when one state of the clean run is restored in a run with a noisy subject.

    p, p* and p*(h) are the metric (by default the probability of the answer) in the clean run, in the corrupted run,
    whose subject tokens enter layer 0 with Gaussian noise of standard deviation `noise` x s, and in the corrupted run
    with the clean state h restored. s is the standard deviation of the token embeddings of all subject tokens of the
    task. Per prompt, averaged over `n_draws` draws of the noise:

    - total effect TE = p - p*;
    - indirect effect IE(h) = p*(h) - p*, for each layer and position of `site`.

    Their means over prompts are the paper's ATE and AIE.

    Args:
        model: a decoder.
        task: with answers; corrupted prompts are not needed.
        subject: what is drowned: a position, (first, last) for all tokens from one to the other, or a list of these.
            Positions are names of `task.positions` or indices.
        noise: its standard deviation, in those of the embeddings.
        n_draws: draws of the noise, each prompt's own.
        seed: of the noise. A prompt's noise depends on its place in the task, not on the batch.
        site: what is restored: "resid_pre", "resid_mid", "resid_post", "attn_out" or "mlp_out".
        window: layers that are restored together around each layer l, from l - window // 2 on; 1 for that layer only.
            The paper takes 10 for "mlp_out" and "attn_out".
        positions: where; names and indices; None for every position (padding counts).
        layers: which (centres of the window); None for all.
        metric: see `interp.core.readout.readout`.
        batch_size: prompts at once; None chooses from the free memory.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, one row a prompt, layer and position: `prompt layer pos` (`token`, the name, if names were given),
        `value` (IE), `value_metric` (p*(h)) and `value_total` (TE, the same for all rows of a prompt); unit that of the
        metric. Arrays: "value" `[prompt layer pos]`, "clean" `[prompt]` (p), "corrupt" `[prompt draw]` (p*).

    Raises:
        ValueError: an unknown site or position, a span that ends before it starts, no draws or layers, a window below
            1; a site that the model has not; an encoder or vision model.

    Cost: for each draw, layer and position all layers, from the subject's first position on (the noise enters at the
        first layer), and three forward passes.

    Differs from the paper: its s is over the subjects of its own thousand facts. In processed weights embeddings are
        centred, which lowers s a little.

    Example:
        >>> from interp.models import toy
        >>> from interp.tasks import induction
        >>> model = toy.induction()
        >>> result = trace(model, induction(model, 4, 5), subject="source", n_draws=2)
        >>> result.summary(by=["pos"]).set_index("pos")["mean"].gt(0.1).loc[[4, 8]].tolist()  # the source, and the end
        [True, True]
    """
    require_decoder(model)
    if site not in SITES:
        raise ValueError(f"site {site!r} is not known; use one of {', '.join(SITES)}.")
    if n_draws < 1 or noise < 0:
        raise ValueError(f"n_draws={n_draws} and noise={noise}: take at least one draw, and a noise of 0 or more.")
    sweep = grid(model, task, site, ("layer", "pos"), positions, layers, None, None)
    drowned = [at for part in (subject if isinstance(subject, list) else [subject]) for at in span(task, part)]
    if not drowned:
        raise ValueError("subject=[] names no position: give one, (first, last), or a list.")
    centres, places = (sweep.groups[axis] for axis in ("layer", "pos"))
    restored = [
        [Edit(site, layer, pos=pos) for layer in window_of(model, centre, window)]
        for (centre,) in centres
        for (pos,) in places
    ]
    checked(model, restored, task.clean.shape[1], len(task), sourced=True)
    scale = noise * _spread(model, task, drowned)

    def cells(rows: slice) -> list[list[Edit]]:
        own = [[rows_of(edit, rows) for edit in cell] for cell in restored]
        found: list[list[Edit]] = [[]]
        for noisy in _noisy(model, task, drowned, rows, scale, n_draws, seed):
            found += [noisy, *([*noisy, *cell] for cell in own)]
        return found

    options = {
        "method": "causal_tracing.trace", "subject": _plain(subject), "noise": noise, "n_draws": n_draws, "seed": seed,
        "site": site, "window": window, "positions": sweep.asked, "layers": [centre for (centre,) in centres],
    }  # fmt: skip
    metrics = measure(
        model, task, cells, metric, tokens=task.clean, source=task.clean, identity=options, batch_size=batch_size,
        exact_path=exact_path,
    )  # fmt: skip
    clean = metrics[:, 0]
    draws = metrics[:, 1:].reshape(len(task), n_draws, 1 + len(restored))
    corrupt, back = draws[..., 0], draws[..., 1:].mean(1)
    effects = back - corrupt.mean(1, keepdims=True)
    total = np.repeat(clean - corrupt.mean(1), len(restored))
    table = sweep.table(len(task)).assign(value=effects.ravel(), value_metric=back.ravel(), value_total=total)
    arrays = {
        "value": (("prompt", "layer", "pos"), effects.reshape(len(task), *sweep.shape())),
        "clean": (("prompt",), clean),
        "corrupt": (("prompt", "draw"), corrupt),
    }
    read = readout_of(model, task, metric, slice(0, 1))
    meta = provenance(model, task, **options, metric=read.name, noise_std=scale)
    return Result("causal_tracing.trace", table, read.unit, arrays, meta)


def _spread(model: Model, task: Task, drowned: Sequence[Tensor]) -> float:
    """Standard deviation of the token embeddings at the drowned positions."""
    found = []
    for rows in batches(len(task), prompts_at_once(model, task.clean.shape[1], 1)):
        embedded = _first(model, task, rows, _EMBEDDING)
        for at in drowned:
            there = (at[rows] >= 0).nonzero()[:, 0]
            found.append(embedded[there, at[rows][there]].float())
    return float(torch.cat(found).std())


def _noisy(
    model: Model, task: Task, drowned: Sequence[Tensor], rows: slice, scale: float, n_draws: int, seed: int
) -> list[list[Edit]]:
    """For each draw the edits that put noise on the subject."""
    stream = _first(model, task, rows, _INPUT)
    prompts = range(len(task))[rows]
    shape = (n_draws, len(drowned), model.d_model)
    # A generator a prompt: its noise does not depend on the other prompts of the batch.
    drawn = np.stack([np.random.default_rng([seed, prompt]).standard_normal(shape, np.float32) for prompt in prompts])
    noise = scale * torch.as_tensor(drawn, device=stream.device)  # [batch draw token d_model]
    index = torch.arange(len(stream), device=stream.device)
    clean = [stream[index, at[rows].clamp(min=0)].float() for at in drowned]
    return [
        [
            Edit("resid_pre", 0, pos=at[rows], value=clean[token] + noise[:, draw, token])
            for token, at in enumerate(drowned)
        ]
        for draw in range(n_draws)
    ]


def _first(model: Model, task: Task, rows: slice, name: str) -> Tensor:
    """What enters the first layer, `[batch pos d_model]`."""
    mask = None if task.mask is None else task.mask[rows]
    return run(model, task.clean[rows], capture=[name], mask=mask, stop_after=0).cache[name]


def _plain(subject: Position | list[Position]) -> list[str]:
    return [str(part) for part in (subject if isinstance(subject, list) else [subject])]
