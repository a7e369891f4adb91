"""What arrives at a receiver when one sender changes and no attention responds? By arithmetic, at one position.

With every other head held, the only thing that a change at a position can do on its way up is to go through the MLPs at
that position. So the run in which the receivers are read needs no attention and no other position: it is the unchanged
stream plus a change that grows layer by layer, for all senders at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from interp.core.batching import batches
from interp.core.edits import Activations, Edit
from interp.core.readout import Readout
from interp.core.rerun import rerun
from interp.models.program import Program
from interp.patching._nodes import LOGITS, Node, Receiver, reaches

#: Senders that are changed together in one run.
Group = Sequence[Node]

#: Rows (a group and a prompt) at once: more make no matrix multiplication faster on a CPU, and memory is rows x d_mlp.
_ROWS = 4096


def seen_at(steps: Program, tokens: Tensor, mask: Tensor | None, where: Tensor) -> Activations:
    """What an unchanged run has at one position of each prompt.

    Args:
        steps: of a model.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.
        where: `[batch]`.

    Returns:
        {(site, layer): `[batch ...]`} for the stream, z and mlp_out of all layers. Cost: one forward pass; memory
        `layer x batch x 5 d_model`.
    """
    frame, stream = steps.frame(tokens, mask), steps.embed(tokens, mask)
    rows = torch.arange(len(tokens), device=tokens.device)
    kept = {}
    for layer in range(len(steps.layers)):
        seen = steps.layer(layer, stream, frame)
        stream = seen["resid_post"]
        for site in ("resid_pre", "z", "resid_mid", "mlp_out", "resid_post"):
            kept[site, layer] = seen[site][rows, where]
    return kept


def patched(
    steps: Program,
    tokens: Tensor,
    mask: Tensor | None,
    where: Tensor,
    source: Activations,
    groups: Sequence[Group],
    targets: Sequence[Receiver],
    read: Readout,
    *,
    freeze_mlps: bool,
    frozen_norm: bool = False,
    unchanged: Tensor,
) -> Tensor:
    """The metric of the run in which the receivers alone get what they would read of changed senders.

    Args:
        steps: of a model.
        tokens: prompts of the run that is changed, `[batch pos]`.
        mask: `[batch pos]`, or None.
        where: position of senders and receivers, `[batch]`.
        source: the senders' other values at that position, as from `seen_at`.
        groups: senders, each set changed together.
        targets: receivers, overwritten together.
        read: the metric; for the logits, read at `where`.
        freeze_mlps: whether MLPs between sender and receiver stay as they are.
        frozen_norm: whether the final norm divides by the unchanged run's scale; for the logits only.
        unchanged: the metric of the unchanged run `[batch]`, which is that of every prompt in which no sender differs.

    Returns:
        `[group batch]`.
    """
    base = seen_at(steps, tokens, mask, where)
    final = base["resid_post", len(steps.layers) - 1]
    metric = unchanged.to(torch.float32).expand(len(groups), -1).clone()
    cells: list[list[Edit]] = []
    differs = []
    for some in batches(len(groups), max(1, _ROWS // len(tokens))):
        change, moved, inputs = _arrivals(steps, groups[some], targets, base, source, freeze_mlps=freeze_mlps)
        differs.append(moved)
        if LOGITS not in targets:
            cells += [_overwrite(row, where, moved, inputs) for row in range(len(moved))]
        elif bool(moved.any()):
            _, prompts = moved.nonzero(as_tuple=True)
            streams = (final[prompts] + change[moved]).to(final.dtype)
            metric[some][moved] = _score(steps, read, streams, prompts, final[prompts] if frozen_norm else None)
    if LOGITS in targets:
        return metric
    again = rerun(steps.model, tokens, cells, read, mask=mask, exact_path="rerun")
    return torch.where(torch.cat(differs), again, metric)


def _overwrite(row: int, where: Tensor, moved: Tensor, inputs: dict[Receiver, tuple[list[int], Tensor]]) -> list[Edit]:
    """The edits that give one row's receivers what they read; none where nothing moved in any prompt."""
    if not bool(moved[row].any()):
        return []
    edits = []
    for receiver, (rows, values) in inputs.items():
        if row in rows:
            site = "mlp_out" if receiver.component == "mlp" else receiver.component
            assert receiver.layer is not None
            edits.append(Edit(site, receiver.layer, head=receiver.head, pos=where, value=values[rows.index(row)]))
    return edits


def _arrivals(
    steps: Program,
    groups: Sequence[Group],
    targets: Sequence[Receiver],
    base: Activations,
    source: Activations,
    *,
    freeze_mlps: bool,
) -> tuple[Tensor, Tensor, dict[Receiver, tuple[list[int], Tensor]]]:
    """How the stream changes at the position when each group's senders do, and what the receivers then read.

    Returns:
        The change of the stream after the last layer that matters, `[group batch d_model]`; whether any sender
        differs, `[group batch]`; and for each receiver the groups that reach it and its value in them
        (`[group batch d_head]`, for an MLP its output).
    """
    like = base["resid_pre", 0]
    # A change is small beside the stream, so it is summed up in float32 also where the model is in bfloat16.
    change = torch.zeros(
        len(groups), *like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )
    moved = torch.zeros(len(groups), len(like), dtype=torch.bool, device=like.device)
    senders: dict[tuple[str, int | None], list[tuple[int, Node]]] = {}
    for row, group in enumerate(groups):
        for node in group:
            senders.setdefault((node.component, node.layer), []).append((row, node))

    def join(joining: list[tuple[int, Node]], deltas: Tensor) -> None:
        rows = torch.tensor([row for row, _ in joining], device=like.device)
        change.index_add_(0, rows, deltas.to(change.dtype))
        differs = deltas.ne(0).any(-1)
        moved.logical_or_(torch.zeros_like(moved, dtype=torch.long).index_add_(0, rows, differs.long()) > 0)

    inputs: dict[Receiver, tuple[list[int], Tensor]] = {}

    def receive(receiver: Receiver, stream: Tensor, of_read: Tensor) -> None:
        rows = [
            i for i, group in enumerate(groups) if any(reaches(n, receiver, parallel=steps.parallel) for n in group)
        ]
        inputs[receiver] = (rows, _input(steps, receiver, (stream + of_read[rows]).to(stream.dtype)))

    if embedded := senders.get(("embed", None)):
        join(embedded, (source["resid_pre", 0] - like).expand(len(embedded), -1, -1))
    to_logits = LOGITS in targets
    last = len(steps.layers) - 1 if to_logits else max(r.layer for r in targets if r.layer is not None)
    for layer in range(last + 1):
        here = [receiver for receiver in targets if receiver.layer == layer]
        for receiver in here:
            if receiver.component != "mlp":
                receive(receiver, base["resid_pre", layer], change)
        before = change.clone() if steps.parallel else change
        if heads := senders.get(("z", layer)):
            join(heads, _written(steps, layer, [node.head for _, node in heads], base, source))
        read = before if steps.parallel else change
        stream = base["resid_pre" if steps.parallel else "resid_mid", layer]
        for receiver in here:
            if receiver.component == "mlp":
                receive(receiver, stream, read)
        if layer == last and not to_logits:
            break
        own = senders.get(("mlp_out", layer), [])
        if not freeze_mlps:
            respond = moved.clone()
            respond[[row for row, _ in own]] = False
            rows, prompts = respond.nonzero(as_tuple=True)
            if len(rows):
                reading = (stream[prompts] + read[rows, prompts]).to(stream.dtype)
                written = steps.mlp_out(layer, steps.post(layer, reading))
                change[rows, prompts] += written - base["mlp_out", layer][prompts]
        if own:
            join(own, (source["mlp_out", layer] - base["mlp_out", layer]).expand(len(own), -1, -1))
    return change, moved, inputs


def _written(steps: Program, layer: int, heads: Sequence[int | None], base: Activations, source: Activations) -> Tensor:
    """What some heads of a layer write into the stream more than in the unchanged run, `[head batch d_model]`."""
    index = torch.tensor(heads, device=base["z", layer].device)
    differences = (source["z", layer] - base["z", layer])[:, index]
    return torch.einsum("bhd,hdm->hbm", differences, steps.w_o(layer)[index])


def _input(steps: Program, receiver: Receiver, stream: Tensor) -> Tensor:
    """What a receiver makes of the stream that it reads, `[group batch d_head]`; an MLP's output."""
    layer = receiver.layer
    assert layer is not None
    if receiver.component == "mlp":
        return steps.mlp_out(layer, steps.post(layer, stream))
    project = {"q": steps.queries, "k": steps.keys, "v": steps.values}[receiver.component]
    return project(layer, steps.layers[layer].ln1(stream))[..., receiver.head, :]


def _score(steps: Program, read: Readout, streams: Tensor, owner: Tensor, norm_of: Tensor | None) -> Tensor:
    """The metric `[row]` of final streams `[row d_model]` of prompts `owner`; the norm's scale may be another's."""
    some = batches(len(streams), max(1, 2**25 // steps.model.d_vocab) if read.tokens is None else len(streams))
    scores = []
    for rows in some:
        held = steps
        if norm_of is not None:
            held = replace(steps, final_norm=partial(scaled_as, steps.final_norm, others=norm_of[rows]))
        if read.tokens is None:
            logits = held.logits(streams[rows])
        else:
            logits = held.logits_of(streams[rows][None], read.tokens.to(streams.device)[owner[rows]])[0]
        scores.append(read.score(logits, owner[rows]))
    return torch.cat(scores).float()


def scaled_as(norm: object, streams: Tensor, others: Tensor) -> Tensor:
    """A LayerNorm or RMSNorm of streams that divides by the scale of others: linear in the streams.

    Args:
        norm: the module.
        streams: `[... d_model]`.
        others: `[... d_model]`, whose scale it is.

    Returns:
        `[... d_model]`; equal to norm(others) where the two are.

    Raises:
        ValueError: a norm that does not come out linear so.
    """
    assert isinstance(norm, nn.Module)
    bias = norm(torch.zeros_like(others))
    factor = _scale(norm, streams) / _scale(norm, others)
    held = bias + (norm(streams) - bias) * factor.to(streams.dtype)
    # Twice the stream has to come out as twice the value, whatever the module is.
    doubled = (norm(2 * streams) - bias) * (_scale(norm, 2 * streams) / _scale(norm, others)).to(streams.dtype)
    off = (doubled - 2 * (held - bias)).abs().amax() / (1e-30 + doubled.abs().amax())
    if not float(off) < (1e-3 if streams.dtype == torch.float32 else 0.05):
        raise ValueError(f"the scale of a {type(norm).__name__} is not known: leave frozen_norm out.")
    return held


def _scale(norm: nn.Module, streams: Tensor) -> Tensor:
    wide = streams.to(torch.promote_types(streams.dtype, torch.float32))
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
    return (wide.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
