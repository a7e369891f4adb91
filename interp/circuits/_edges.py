"""What does a model answer when only some edges carry what this run computes? Forward passes with a weight an edge.

Every input of a component is the sum of what the sources wrote. Here each input gets a sum of its own: what the sources
wrote in another run ("off": the corrupt prompt, zeros, means), plus, for each edge that is in, the difference between
what its source writes in this run and in that. The differences are kept as attention heads hold them, before the output
map (`z`), and MLPs write them: layers x tokens x 2 d_model numbers, where one vector a node would take n_heads times
as many. What heads write into the stream is made of them again for a few layers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.graph import Graph
from interp.core.readout import Readout
from interp.models.program import Frame, Program

# Inputs of this many layers are summed up at once: the sources are read once for each such block, and memory is
# block x inputs a layer x tokens x d_model.
_LAYERS = 5


class Written(NamedTuple):
    """What every source writes in one run, heads before their output map.

    Attributes:
        embed: `[batch pos d_model]`.
        z: a layer each, `[batch pos head d_head]`.
        mlp: a layer each, `[batch pos d_model]`.
    """

    embed: Tensor
    z: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Written:
        """The same with a function applied to each tensor."""
        return Written(
            function(self.embed), tuple(function(each) for each in self.z), tuple(function(each) for each in self.mlp)
        )


class Change(NamedTuple):
    """What one layer writes beyond the off run: z `[cell token head d_head]` and mlp `[cell token d_model]`."""

    z: Tensor
    mlp: Tensor


@torch.no_grad()
def written(steps: Program, tokens: Tensor, mask: Tensor | None) -> Written:
    """What every source writes in an unchanged run.

    Args:
        steps: of a model.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.

    Returns:
        The Written. Cost: one forward pass without the unembedding.
    """
    stream, frame = steps.embed(tokens, mask), steps.frame(tokens, mask)
    embed, z, mlp = stream, [], []
    for layer in range(len(steps.layers)):
        seen = steps.layer(layer, stream, frame)
        z.append(seen["z"])
        mlp.append(seen["mlp_out"])
        stream = seen["resid_post"]
    return Written(embed, tuple(z), tuple(mlp))


@dataclass(frozen=True, eq=False)
class EdgeRun:
    """Some prompts, ready for forward passes with weighted edges; make one with `prepare`.

    Attributes:
        steps: of the model; its key-value heads are the graph's.
        graph: whose edges have weights.
        read: the metric, its positions counted from `start`.
        start: first position at which the run can differ from the off run; earlier ones are not computed.
        frame: of the positions from there on; keys of all.
        embed: change of the input, `[token d_model]`; a token is a prompt and a position.
        off: what is written in the off run, from `start` on.
        inputs: by layer what attention and what the MLP read in the off run, then what the logits read (twice),
            `[token d_model]`.
        prefix: by layer keys (rotated) and values before `start`, `[batch pos kv_head d_head]`.
        counted: tokens at which edges are weighted, bool `[token]`; at others destinations read all that the current
            run writes. None for all.
    """

    steps: Program
    graph: Graph
    read: Readout
    start: int
    frame: Frame
    embed: Tensor
    off: Written
    inputs: tuple[tuple[Tensor, Tensor], ...]
    prefix: tuple[tuple[Tensor, Tensor], ...]
    counted: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Prompts, and positions from `start` on."""
        return self.off.embed.shape[0], self.off.embed.shape[1]

    def forward(
        self,
        weights: Float[Tensor, "cell dst src"],
        *,
        first: int = 0,
        known: Sequence[Change] = (),
    ) -> tuple[Float[Tensor, "cell batch"], list[Change]]:
        """The metric with weighted edges, for several sets of weights at once.

        Args:
            weights: 1 for an edge that is in, 0 for one that is not, and anything between; on the model's device.
            first: layer from which the cells differ; earlier ones are in `known`.
            known: changes of the layers before `first`, of one cell or as many as there are.

        Returns:
            The metric, and the change of every layer, those known first.

        Cost: per cell one forward pass from layer `first` on, and about half of one for the sums of inputs. Memory:
            cells x tokens x d_model x (2 layers + 5 layers' inputs). Gradients reach the weights where they ask.
            Positions that are not counted cost one sum a layer more.
        """
        n_cells, n_layers = len(weights), self.graph.n_layers
        per_layer = (len(self.graph.destinations) - 1) // n_layers
        changes = list(known)
        whole = None if self.counted is None else self._whole(changes)
        for start in range(first, n_layers, _LAYERS):
            block = range(start, min(start + _LAYERS, n_layers))
            # Row n of `sums[layer]` is what the nth destination of that layer reads.
            sums = {layer: self._off_inputs(layer, per_layer, n_cells) for layer in block}
            own = {layer: weights[:, layer * per_layer : (layer + 1) * per_layer] for layer in block}
            for layer in block:
                sums[layer] = _added(sums[layer], own[layer][..., :1], self.embed[None, None])
            for source, change in enumerate(changes):
                self._add(sums, own, source, change)
            for layer in block:
                heads = self._counted(sums[layer][:, :-1], self.inputs[layer][0], whole)
                z = self._attention(layer, heads) - self.off.z[layer].flatten(0, 1)
                change = Change(z, z.new_zeros(()))
                before, whole = whole, None if whole is None else whole + self._brought(layer, z)
                if not self.steps.parallel:
                    self._add({layer: sums[layer]}, own, layer, change, into=sums)
                    before = whole
                stream = self._counted(sums.pop(layer)[:, -1:], self.inputs[layer][1], before)[:, 0]
                mlp = self._mlp(layer, stream) - self.off.mlp[layer].flatten(0, 1)
                whole = None if whole is None else whole + mlp
                changes.append(Change(z, mlp))
                self._add(sums, own, layer, changes[-1])
        return self._score(weights[:, -1], changes, whole), changes

    def _whole(self, changes: Sequence[Change]) -> Tensor:
        """What all sources bring so far, `[cell or 1, token d_model]`."""
        total = self.embed[None].to(_wide(self.embed.dtype))
        for layer, change in enumerate(changes):
            total = total + self._brought(layer, change.z) + change.mlp
        return total

    def _brought(self, layer: int, z: Tensor) -> Tensor:
        """What a layer's heads write together, `[cell token d_model]`."""
        w_o = self.steps.w_o(layer)
        return torch.einsum("cthd,hdm->ctm", z.to(w_o.dtype), w_o)

    def _counted(self, sums: Tensor, off: Tensor, whole: Tensor | None) -> Tensor:
        """Inputs `[cell input token d_model]`: the weighted sums at counted tokens, everything at others."""
        if whole is None or self.counted is None:
            return sums
        return torch.where(self.counted[:, None], sums, (off + whole)[:, None])

    def _off_inputs(self, layer: int, per_layer: int, n_cells: int) -> Tensor:
        attention, mlp = self.inputs[layer]
        rows = [attention.expand(per_layer - 1, -1, -1), mlp[None]]
        whole = torch.cat(rows).to(_wide(attention.dtype))
        return whole.expand(n_cells, -1, -1, -1).clone()

    def _add(
        self,
        sums: dict[int, Tensor],
        own: dict[int, Tensor],
        source: int,
        change: Change,
        into: dict[int, Tensor] | None = None,
    ) -> None:
        """Add what a layer writes to the inputs of others; before its MLP is known, its heads to that MLP's."""
        into = sums if into is None else into
        width = self.graph.n_heads + 1
        columns = slice(1 + source * width, 1 + (source + 1) * width - (change.mlp.ndim == 0))
        weights = {layer: own[layer][..., columns] for layer in sums}
        if not torch.is_grad_enabled():
            weights = {layer: some for layer, some in weights.items() if bool(some.any())}
        if not weights:
            return
        z = change.z.to(self.steps.w_o(source).dtype)
        wrote = torch.einsum("cthd,hdm->chtm", z, self.steps.w_o(source))
        if change.mlp.ndim:
            wrote = torch.cat([wrote, change.mlp[:, None].to(wrote.dtype)], 1)
        for layer, some in weights.items():
            into[layer] = _added(into[layer], some, wrote)

    def _attention(self, layer: int, inputs: Tensor) -> Tensor:
        """What heads hold, `[cell token head d_head]`, of what q, k and v read `[cell input token ...]`."""
        steps, modules = self.steps, self.steps.layers[layer]
        normed = modules.ln1(inputs.to(steps.model.dtype))
        n, groups = steps.n_heads, steps.n_key_value_heads
        parts = normed.split([n, groups, groups], 1)
        (n_prompts, n_pos), cells = self.shape, len(inputs)

        def by_prompt(heads: Tensor) -> Tensor:
            return heads.unflatten(2, (n_prompts, n_pos)).permute(0, 2, 3, 1, 4)

        q, k, v = (
            by_prompt(_per_head(linear, part, steps.d_head))
            for linear, part in zip((modules.q, modules.k, modules.v), parts, strict=True)
        )
        q, k = steps.rotate(modules.q_norm(q), self.frame.rotary), steps.rotate(modules.k_norm(k), self.frame.rotary)
        k, v = (
            torch.cat([past.expand(cells, *past.shape), now], 2).flatten(0, 1)
            for past, now in zip(self.prefix[layer], (k, v), strict=True)
        )
        allowed = steps.allowed(layer, self.frame).expand(cells, -1, -1, -1).flatten(0, 1)
        z = steps.mix(steps.pattern(steps.scores(q.flatten(0, 1), k, allowed)), v)
        return z.unflatten(0, (cells, n_prompts)).flatten(1, 2)

    def _mlp(self, layer: int, stream: Tensor) -> Tensor:
        return self.steps.mlp_out(layer, self.steps.post(layer, stream.to(self.steps.model.dtype)))

    def _score(self, weights: Tensor, changes: Sequence[Change], whole: Tensor | None) -> Tensor:
        """The metric `[cell batch]`, of the edges into the logits `[cell src]`, at the positions that are read."""
        at = self.at
        stream = self.inputs[-1][0][at].to(_wide(self.embed.dtype)).expand(len(weights), -1, -1)
        stream = stream + weights[:, :1, None] * self.embed[at]
        width = self.graph.n_heads + 1
        for layer, change in enumerate(changes):
            some = weights[:, 1 + layer * width : 1 + (layer + 1) * width]
            z = change.z[:, at] * some[:, None, :-1, None]
            stream = stream + torch.einsum("cbhd,hdm->cbm", z.to(self.steps.w_o(layer).dtype), self.steps.w_o(layer))
            stream = stream + some[:, -1, None, None] * change.mlp[:, at]
        if whole is not None and self.counted is not None:
            stream = torch.where(self.counted[at, None], stream, self.inputs[-1][0][at] + whole[:, at])
        return self.metric_of(stream)

    @property
    def at(self) -> Tensor:
        """The token of each prompt that the metric reads, `[batch]`."""
        n_prompts, n_pos = self.shape
        return torch.arange(n_prompts, device=self.embed.device) * n_pos + self.read.where.to(self.embed.device)

    def metric_of(self, stream: Float[Tensor, "cell batch d_model"]) -> Float[Tensor, "cell batch"]:
        """The metric of what the logits read.

        Args:
            stream: at the positions that are read.

        Returns:
            One number a cell and prompt.
        """
        stream = stream.to(self.steps.model.dtype)
        cells, n_prompts = stream.shape[:2]
        owner = torch.arange(n_prompts, device=stream.device).expand(cells, -1).reshape(-1)
        if self.read.tokens is not None:
            logits = self.steps.logits_of(stream, self.read.tokens.to(stream.device)).flatten(0, 1)
        else:
            logits = self.steps.logits(stream.flatten(0, 1))
        return self.read.score(logits, owner).float().unflatten(0, (cells, n_prompts))


@torch.no_grad()
def prepare(
    steps: Program,
    graph: Graph,
    tokens: Tensor,
    mask: Tensor | None,
    off: Written | Tensor,
    read: Readout,
    counted: Tensor | None = None,
) -> EdgeRun:
    """Prompts made ready for forward passes with weighted edges.

    Args:
        steps: of the model.
        graph: of the model, with keys and values grouped or one a head.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.
        off: prompts of the off run `[batch pos]`, padded alike; or what is written there.
        read: the metric of these prompts.
        counted: positions of destinations at which edges are weighted, bool `[batch pos]`; None for all.

    Returns:
        The EdgeRun. Cost: one forward pass, where the off run is given as prompts.
    """
    start = 0
    if isinstance(off, Tensor):
        differs = (tokens != off).any(0).nonzero()
        start = min(int(differs[0]) if len(differs) else tokens.shape[1] - 1, int(read.where.min()))
        off = written(steps, off, mask)
    frame = steps.frame(tokens, mask)
    embed = steps.embed(tokens, mask) - off.embed
    inputs, prefix, stream = [], [], off.embed
    for layer, (z, mlp) in enumerate(zip(off.z, off.mlp, strict=True)):
        modules = steps.layers[layer]
        normed = modules.ln1(stream[:, :start])
        rotary = None if frame.rotary is None else tuple(part[:, :start] for part in frame.rotary)
        keys = steps.rotate(modules.k_norm(steps.keys(layer, normed)), rotary)  # type: ignore[arg-type]
        times = graph.n_key_value_heads // steps.n_key_value_heads
        values = steps.values(layer, normed)
        prefix.append((keys.repeat_interleave(times, 2), values.repeat_interleave(times, 2)))
        middle = stream + steps.attn_out(layer, z)
        read_by_mlp = stream if steps.parallel else middle
        inputs.append((stream[:, start:].flatten(0, 1), read_by_mlp[:, start:].flatten(0, 1)))
        stream = middle + mlp
    inputs.append((stream[:, start:].flatten(0, 1), stream[:, start:].flatten(0, 1)))
    rotary = None if frame.rotary is None else tuple(part[:, start:] for part in frame.rotary)
    later = Frame(
        rotary,  # type: ignore[arg-type]
        frame.allowed[:, start:],
        None if frame.windowed is None else frame.windowed[:, start:],
    )
    return EdgeRun(
        steps=replace(steps, n_key_value_heads=graph.n_key_value_heads),
        graph=graph,
        read=replace(read, where=read.where - start),
        start=start,
        frame=later,
        embed=embed[:, start:].flatten(0, 1),
        off=off.map(lambda each: each[:, start:]),
        inputs=tuple(inputs),
        prefix=tuple(prefix),
        counted=None if counted is None else counted[:, start:].flatten(),
    )


def as_weights(kept: np.ndarray, like: Tensor) -> Float[Tensor, "cell dst src"]:
    """Edges that are in, bool `[cell dst src]`, as weights on a tensor's device.

    Args:
        kept: which.
        like: whose device.

    Returns:
        Zeros and ones.
    """
    return torch.as_tensor(kept, dtype=torch.float32, device=like.device)


def cells_at_once(run: EdgeRun, budget: int = 2**28) -> int:
    """How many sets of weights fit into some bytes in one pass.

    Args:
        run: the prompts.
        budget: bytes.

    Returns:
        At least 1.
    """
    n_prompts, n_pos = run.shape
    inputs = _LAYERS * (run.graph.n_heads + 2 * run.graph.n_key_value_heads + 1)
    per_cell = 4 * n_prompts * n_pos * run.steps.model.d_model * (inputs + 2 * run.graph.n_layers + run.graph.n_heads)
    return max(1, budget // per_cell)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _added(total: Tensor, weights: Tensor, wrote: Tensor) -> Tensor:
    """Sums `[cell input token d_model]` plus weights `[cell input node]` times `[cell or 1, node token d_model]`."""
    wrote, flat, weights = wrote.to(total.dtype).flatten(2), total.flatten(2), weights.to(total.dtype)
    if len(wrote) == 1:  # shared by all cells: one multiplication
        rows, once = flat.flatten(0, 1), (weights.flatten(0, 1), wrote[0])
        return (torch.addmm(rows, *once) if torch.is_grad_enabled() else rows.addmm_(*once)).view_as(total)
    grown = torch.baddbmm(flat, weights, wrote) if torch.is_grad_enabled() else flat.baddbmm_(weights, wrote)
    return grown.view_as(total)


def _per_head(linear: object, normed: Tensor, d_head: int) -> Tensor:
    """`[cell head token d_head]`: each head's own map, of its own input `[cell head token d_model]`."""
    weight = linear.weight.unflatten(0, (-1, d_head))  # type: ignore[attr-defined]
    bias = getattr(linear, "bias", None)
    n = normed.shape[1]
    weight = weight.repeat_interleave(n // len(weight), 0)  # an expanded graph: a key a head
    out = torch.einsum("chtm,hdm->chtd", normed, weight)
    if bias is None:
        return out
    return out + bias.unflatten(0, (-1, d_head)).repeat_interleave(n // (len(bias) // d_head), 0)[:, None]
