"""Which earlier vectors activated a neuron? One step back from neurons to what they read, with their importance.

A neuron reads the stream at one position through the norm before it: an attention neuron (head h, source position p,
dimension n) through the column n of W_V at p, an MLP neuron through its rows of the gate and the up projection. That
stream is a sum of parts c: the embedding, and what every earlier attention and MLP wrote there. With k the direction
that is read (the weight through the norm's gain, and its centring), the share of c is (c . k) / (sum of c' . k).

Shares times importance are linear in k. So the parents that read one position are first added up to one direction for
each layer below them, and that is all a step needs to know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interp.flow._direct import linear_part, matrix
from interp.flow._neurons import unravel
from interp.models.program import Program

#: A parent whose parts cancel to less than this share of their magnitudes is not followed: its shares mean nothing.
CANCELS = 0.05


class Everything(NamedTuple):
    """All positions of one prompt's pass, in float32 at least.

    `pre`, `mid`, `attn`, `mlp` `[layer pos d_model]`; `pattern` `[layer head q_pos k_pos]`; `values`
    `[layer pos kv_head d_head]`; `post` `[layer pos d_mlp]`.
    """

    steps: Program
    pre: Tensor
    mid: Tensor
    attn: Tensor
    mlp: Tensor
    pattern: Tensor
    values: Tensor
    post: Tensor

    def per_head(self, layer: int) -> Tensor:
        """Values as each query head reads them, `[pos head d_head]`."""
        return self.values[layer].repeat_interleave(self.steps.n_heads // self.steps.n_key_value_heads, 1)


@torch.no_grad()
def everything(steps: Program, tokens: Tensor, mask: Tensor | None) -> Everything:
    """Run one prompt `[1 pos]` and keep what neurons read and write. Cost: one forward pass, and its activations."""
    frame, stream = steps.frame(tokens, mask), steps.embed(tokens, mask)
    sites = {"pre": "resid_pre", "mid": "resid_mid", "attn": "attn_out", "mlp": "mlp_out", "pattern": "pattern",
             "values": "v", "post": "post"}  # fmt: skip
    kept: dict[str, list[Tensor]] = {name: [] for name in sites}
    for layer in range(len(steps.layers)):
        seen = steps.layer(layer, stream, frame)
        for name, site in sites.items():
            kept[name].append(seen[site][0])
        stream = seen["resid_post"]
    wide = torch.promote_types(stream.dtype, torch.float32)
    return Everything(steps, **{name: torch.stack(each).to(wide) for name, each in kept.items()})


class Parents(NamedTuple):
    """Neurons with their importance, `[n]` each.

    `heads` are -1 for MLP neurons. `pos` is the position that the neuron reads: for attention the source.
    """

    layer: Tensor
    pos: Tensor
    heads: Tensor
    neuron: Tensor
    importance: Tensor

    def __len__(self) -> int:
        return len(self.layer)


class Step(NamedTuple):
    """What one step back found.

    `flow` `[2 layer pos]` is the importance of attention (by source position) and MLP; `embed` `[pos]`; `bias`, of
    attention's output biases; `dropped`, of the parents that were not followed. All sum to the parents' importance.
    `attention` `[layer head pos d_head]` and `mlp` `[layer pos d_mlp]` have it neuron by neuron.
    """

    flow: Tensor
    embed: Tensor
    bias: Tensor
    dropped: Tensor
    attention: Tensor
    mlp: Tensor


class Reads(NamedTuple):
    """Directions that parents read, `[n ...]`.

    `key` `[n d_model]`; `pos`; `attn_below`, `mlp_below`: the layers whose attention and MLP are in the stream that is
    read; `importance`, that of the parent, or half of it for each of the gate and the up projection.
    """

    key: Tensor
    pos: Tensor
    attn_below: Tensor
    mlp_below: Tensor
    importance: Tensor


@torch.no_grad()
def reads(seen: Everything, parents: Parents) -> Reads:
    """The directions in the stream that parents read.

    The coefficient of a gated MLP neuron is a product, act(gate . x) times (up . x). Its importance is split half and
    half between the two factors, and that of act(gate . x) is taken to be the share of gate . x. So the share of a part
    is the mean of its shares in what the gate and the up projection read.
    """
    steps, n_layers = seen.steps, len(seen.pre)
    keys: list[Tensor] = []
    rows: list[tuple[int, int, int, int]] = []
    weights: list[Tensor] = []
    group = steps.n_heads // steps.n_key_value_heads
    for layer in range(n_layers):
        modules = steps.layers[layer]
        for attention in (True, False):
            here = ((parents.layer == layer) & ((parents.heads >= 0) == attention)).nonzero()[:, 0]
            if not len(here):
                continue
            gain, _, centres = linear_part(modules.ln1 if attention else modules.ln2, seen.pre[0].to(steps.model.dtype))
            columns = parents.neuron[here]
            if attention:
                columns = columns + steps.d_head * (parents.heads[here] // group)
            projections = [modules.v] if attention else [m for m in (modules.gate, modules.up) if m is not None]
            attn_below = layer if attention or steps.parallel else layer + 1
            for projection in projections:
                key = gain * matrix(projection)[:, columns].T.to(gain.dtype)
                keys.append(key - key.mean(-1, keepdim=True) if centres else key)
                rows += [(int(i), int(parents.pos[i]), attn_below, layer) for i in here]
                weights.append(parents.importance[here] / len(projections))
    _, pos, attn_below, mlp_below = torch.tensor(rows, device=seen.pre.device).T
    return Reads(torch.cat(keys), pos, attn_below, mlp_below, torch.cat(weights).to(seen.pre.dtype))


@torch.no_grad()
def back(seen: Everything, parents: Parents) -> Step:
    """Hand the importance of neurons to what activated them.

    Args:
        seen: of the prompt.
        parents: at least one.

    Returns:
        The Step. Cost: for each layer and position that is read, a product with the output maps of attention and MLP.
    """
    read = reads(seen, parents)
    n_layers, n_pos, d_model = seen.pre.shape
    layers = torch.arange(n_layers, device=seen.pre.device)
    attn_in, mlp_in = (layers < below[:, None] for below in (read.attn_below, read.mlp_below))  # [n layer]
    parts = torch.cat([
        torch.einsum("nd,nd->n", seen.pre[0, read.pos], read.key)[:, None],
        torch.einsum("lnd,nd->nl", seen.attn[:, read.pos], read.key) * attn_in,
        torch.einsum("lnd,nd->nl", seen.mlp[:, read.pos], read.key) * mlp_in,
    ], 1)  # fmt: skip
    whole = parts.sum(1)
    followed = whole.abs() > CANCELS * parts.abs().sum(1)
    factor = torch.where(followed, read.importance / torch.where(followed, whole, 1), 0)
    keys = factor[:, None] * read.key
    into_attn, into_mlp = (_by_layer(keys, read.pos, inside, n_pos) for inside in (attn_in, mlp_in))
    attention = seen.pre.new_zeros(n_layers, seen.steps.n_heads, n_pos, seen.steps.d_head)
    mlp = torch.zeros_like(seen.post)
    used = read.pos.unique()
    for layer in range(n_layers):
        weight = seen.steps.w_o(layer).detach().to(keys.dtype)
        along = torch.einsum("qd,hnd->qhn", into_attn[layer, used], weight)
        weighted = torch.einsum("hqp,qhn->hpn", seen.pattern[layer][:, used], along)
        attention[layer] = weighted * seen.per_head(layer).transpose(0, 1)
        down = matrix(seen.steps.layers[layer].down).to(keys.dtype)
        mlp[layer, used] = seen.post[layer, used] * (into_mlp[layer, used] @ down.T)
    flow = torch.stack([attention.sum((1, 3)), torch.einsum("lpd,lpd->lp", seen.mlp, into_mlp)])
    embed = seen.pre.new_zeros(n_pos).index_add(0, read.pos, parts[:, 0] * factor)
    bias = torch.einsum("lpd,lpd->", seen.attn, into_attn) - flow[0].sum()
    return Step(flow, embed, bias, read.importance[~followed].sum(), attention, mlp)


def _by_layer(keys: Tensor, pos: Tensor, inside: Tensor, n_pos: int) -> Tensor:
    """For each layer and position, the sum of the keys that read it there, `[layer pos d_model]`."""
    found = keys.new_zeros(inside.shape[1], n_pos, keys.shape[1])
    for layer in range(inside.shape[1]):
        found[layer].index_add_(0, pos, keys * inside[:, layer, None])
    return found


def next_parents(step: Step, k: int) -> Parents:
    """The k attention neurons and the k MLP neurons that were handed the most; only what is above 0 is followed."""
    found = []
    for values in (step.attention, step.mlp):
        top = values.flatten().topk(min(k, values.numel()))
        index = top.indices[top.values > 0]
        at = unravel(index, values.shape)
        layer, head, pos, neuron = at if len(at) == 4 else (at[0], torch.full_like(at[0], -1), *at[1:])
        found.append(Parents(layer, pos, head, neuron, top.values[top.values > 0]))
    return joined(*found)


def joined(one: Parents, other: Parents) -> Parents:
    """Both together."""
    return Parents(*(torch.cat(both) for both in zip(one, other, strict=True)))
