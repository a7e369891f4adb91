"""Which vectors do single neurons write at the position that predicts, and which of them raise the prediction most?

An attention neuron (head h, source position p, dimension n) writes pattern[h, p] value[h, p, n] W_O[h, n]; an MLP
neuron n writes post[n] W_down[n]. Heads that share keys and values read the same ones; no weights are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interp.flow._direct import Asked, Frozen, Seen, frozen, matrix, seen_at
from interp.flow._increase import Strongest, bases, increases
from interp.models.program import Program


class View(NamedTuple):
    """Some prompts of a question: what they were asked, their pass, and the way to the logits.

    `row`, `bias`: of the unembedding, for the target (less the wrong answer), `[batch d_model]` and `[batch]`.
    `real` `[batch k_pos]`: the positions that attention may read.
    """

    steps: Program
    target: Tensor
    seen: Seen
    head: Frozen
    row: Tensor
    bias: Tensor
    real: Tensor

    def each(self) -> Iterator[View]:
        """The prompts one by one."""
        for i in range(len(self.target)):
            one = slice(i, i + 1)
            seen = Seen(*(part[one] if name == "final" else part[:, one] for name, part in self.seen._asdict().items()))
            parts = (part[one] for part in (self.row, self.bias, self.real))
            yield View(self.steps, self.target[one], seen, self.head.some(one), *parts)


def view_of(steps: Program, question: Asked, rows: slice) -> View:
    """Run some prompts of a question. Cost: one forward pass."""
    task, at, target = question.task, question.at[rows], question.target[rows]
    tokens, mask = task.clean[rows], None if task.mask is None else task.mask[rows]
    seen = seen_at(steps, tokens, mask, at)
    head = frozen(steps, seen.final)
    row, bias = (part.to(head.gain.dtype) for part in steps.directions(target))
    if question.wrong is not None:
        other, its_bias = steps.directions(question.wrong[rows])
        row, bias = row - other, bias - its_bias
    real = torch.arange(tokens.shape[1], device=tokens.device) <= at[:, None]
    return View(steps, target, seen, head, row, bias, real if mask is None else real & mask.bool())


def neuron_values(view: View, layer: int, kind: str, direction: Tensor) -> Tensor:
    """The product of every neuron's vector in a layer with a direction `[batch d_model]`.

    Args:
        view: of some prompts.
        layer: whose neurons.
        kind: "neuron", "attention_neuron", or "source" for the sum over the dimensions of a head.
        direction: one a prompt.

    Returns:
        `[batch d_mlp]`, `[batch head k_pos d_head]` or `[batch head k_pos]`.
    """
    if kind == "neuron":
        weight = matrix(view.steps.layers[layer].down).to(direction.dtype)
        return view.seen.post[layer].to(direction.dtype) * (direction @ weight.T)
    weight = view.steps.w_o(layer).detach().to(direction.dtype)
    along = torch.einsum("hnd,bd->bhn", weight, direction)
    weighted = view.seen.weighted(layer).to(direction.dtype)
    return torch.einsum("bhpn,bhn->bhp" if kind == "source" else "bhpn,bhn->bhpn", weighted, along)


def neuron_vectors(one: View, layer: int, kind: str, index: Tensor) -> Tensor:
    """The vectors `[n d_model]` of some neurons (or sources) of a layer of one prompt, by their numbers `[n]`."""
    if kind == "neuron":
        weight = matrix(one.steps.layers[layer].down)
        return one.seen.post[layer, 0, index, None].to(one.head.gain.dtype) * weight[index]
    weighted = one.seen.weighted(layer)[0].to(one.head.gain.dtype)
    weight = one.steps.w_o(layer).detach()
    at = unravel(index, part_shape(one, kind))
    if kind == "source":
        return torch.einsum("ne,ned->nd", weighted[at[0], at[1]], weight[at[0]].to(weighted.dtype))
    return weighted[at[0], at[1], at[2], None] * weight[at[0], at[2]]


def part_shape(view: View, kind: str) -> tuple[int, ...]:
    """How the neurons (or sources) of a layer are arranged: `[d_mlp]`, `[head k_pos]` or `[head k_pos d_head]`."""
    if kind == "neuron":
        return tuple(view.seen.post.shape[-1:])
    heads = (view.steps.n_heads, view.real.shape[1])
    return heads if kind == "source" else (*heads, view.steps.d_head)


def unravel(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """The coordinates of flat numbers in an array of a shape."""
    found = []
    for size in reversed(list(shape)):
        found.append(index % size)
        index = index // size
    return found[::-1]


def strongest(one: View, kind: str, k: int) -> Strongest:
    """The k neurons (or sources) of one prompt that raise its target's log-probability most, found exactly.

    Args:
        one: of one prompt.
        kind: as in `neuron_values`.
        k: how many.

    Returns:
        The Strongest. Layers are offered from the last, where the largest are likely, so that the bar is high early.
    """
    target = int(one.target[0])
    base = bases(one.head, (one.seen.mid if kind == "neuron" else one.seen.pre)[:, 0], target)
    best = Strongest(k, base.bound)
    for layer in reversed(range(len(base.log_p))):
        bounds = neuron_values(one, layer, kind, base.bound[layer, None])[0]
        if kind != "neuron":
            unread = ~one.real[0] if kind == "source" else ~one.real[0, :, None]
            bounds = bounds.masked_fill(unread, -float("inf"))

        def exact(index: Tensor, layer: int = layer) -> Tensor:
            return increases(one.head, base, layer, neuron_vectors(one, layer, kind, index), target)

        best.offer(layer, bounds.flatten(), exact)
    return best
