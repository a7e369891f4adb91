"""What does one input change? The nodes that it reaches through edges that are in, computed again; all else is held.

A pass over a circuit of few edges computes few nodes: those below one destination. What other nodes write, what still
inputs read, and the queries, keys and values that no moving source feeds are taken as they are. MLPs that only lead to
the logits by way of the position that is read are computed there only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits._edges import Change, EdgeRun, _wide
from interp.circuits.graph import LOGITS


class _Part(NamedTuple):
    """Queries, keys or values of some heads of one layer.

    `rows` are the inputs they are made of, each once; `own` says which of them each head reads; `moves` which of them
    change from cell to cell; `held` is what the others give, `[1 batch pos row d_head]`.
    """

    kind: str
    rows: np.ndarray
    own: np.ndarray
    moves: np.ndarray
    held: Tensor | None


class Writes:
    """What sources write beyond the off run, held as `_edges.Change` holds it; one vector each when they are asked for.

    Args:
        run: the prompts.
        changes: of every layer, of one cell.

    Attributes:
        shape: sources, tokens and d_model, as of the tensor that `wrote_of` makes.

    Cost: memory for layers x tokens x 2 d_model numbers, where one vector a source takes n_heads times as many.
    """

    def __init__(self, run: EdgeRun, changes: Sequence[Change]) -> None:
        self.run, self.changes = run, [Change(each.z[0], each.mlp[0]) for each in changes]
        self.shape = (len(run.graph.sources), *run.embed.shape)
        self._last: tuple[np.ndarray, Tensor] | None = None

    def __getitem__(self, sources: np.ndarray) -> Float[Tensor, "src token d_model"]:
        out = self.run.embed.new_empty((len(sources), *self.shape[1:]), dtype=_wide(self.run.embed.dtype))
        for layer, rows, heads, others in self._by_layer(sources):
            if len(heads):
                w_o = self.run.steps.w_o(layer)[heads]
                out[rows] = torch.einsum("thd,hdm->htm", self.changes[layer].z[:, heads].to(w_o.dtype), w_o).to(out)
            if len(others):
                out[others] = self._one(layer).to(out)
        return out

    def total(self, sources: np.ndarray, tokens: Tensor | slice) -> Float[Tensor, "read d_model"]:
        """What some sources bring together at some tokens.

        Args:
            sources: numbers, each once.
            tokens: which; a slice is that of all.

        Returns:
            The sum of their vectors, none of which is made.
        """
        # All inputs of a layer's attention read the same sources where every edge is in.
        if self._last is not None and isinstance(tokens, slice) and np.array_equal(self._last[0], sources):
            return self._last[1]
        wide = _wide(self.run.embed.dtype)
        total = torch.zeros_like(self.run.embed[tokens], dtype=wide)
        for layer, _, heads, others in self._by_layer(sources):
            if len(heads):
                w_o = self.run.steps.w_o(layer)[heads]
                z = self.changes[layer].z[tokens][:, heads].to(w_o.dtype)
                total += torch.einsum("thd,hdm->tm", z, w_o).to(wide)
            if len(others):
                total += self._one(layer)[tokens].to(wide)
        if isinstance(tokens, slice):
            self._last = np.array(sources), total
        return total

    def changed(self, tokens: Tensor | slice) -> np.ndarray:
        """Which sources write anything beyond the off run at some tokens, bool `[src]`."""
        numbers = np.arange(self.shape[0])
        layers = [numbers[:1], *numbers[1:].reshape(len(self.changes), -1)]
        found = [(self[some][:, tokens] != 0).flatten(1).any(1).cpu().numpy() for some in layers]
        return np.concatenate(found)

    def _one(self, layer: int) -> Tensor:
        """What the input or an MLP writes, `[token d_model]`."""
        return self.run.embed if layer < 0 else self.changes[layer].mlp

    def _by_layer(self, sources: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Of each layer (-1: the input) where its heads are among the sources, which they are, where the other is."""
        width = self.run.graph.n_heads + 1
        layers, columns = np.divmod(np.asarray(sources) - 1, width)
        for layer in np.unique(layers).tolist():
            is_head = (layers == layer) & (columns < width - 1)
            other = (layers == layer) & (columns == width - 1)
            yield layer, np.flatnonzero(is_head), columns[is_head], np.flatnonzero(other)


class Cone:
    """What lies below one destination of a circuit.

    Args:
        run: the prompts.
        kept: which edges are in, bool `[dst src]`; edges into nodes that nothing reads are not followed.
        wrote: what each source writes beyond the off run in this circuit: `[src token d_model]`, or Writes.
        row: number of the destination.

    Attributes:
        nodes: numbers of the sources that it reaches.
        flops: multiplications and additions of linear maps, attention and sums so far.

    Cost: memory for an input of each reached node, inputs x tokens x d_model.
    """

    def __init__(self, run: EdgeRun, kept: np.ndarray, wrote: Tensor | Writes, row: int) -> None:
        self.run, self.kept, self.wrote, self.row, self.flops = run, kept, wrote, row, 0.0
        graph = run.graph
        self.is_logits = graph.destinations[row].name == LOGITS
        alive = kept.any(0)
        reached, moving = np.zeros(len(graph.sources), bool), np.zeros(len(kept), bool)
        moving[row] = True
        for number in range(row, len(kept)):
            if moving[number] or (kept[number] & reached).any():
                moving[number] = True
                reached |= graph.of_node[number] & alive
        self.nodes, self._moving = np.flatnonzero(reached), moving
        self._everywhere = self._read_everywhere()
        self._heads = {
            layer: heads
            for layer in range(graph.destinations[row].layer, graph.n_layers)
            if len(heads := np.flatnonzero(reached[1 + layer * self._width :][: graph.n_heads]))
        }
        self._mlps = {
            layer for layer in range(graph.n_layers) if reached[1 + layer * self._width + graph.n_heads]
        }  # fmt: skip
        self._still = self._inputs(reached)
        self._parts = {layer: [self._part(layer, kind) for kind in "qkv"] for layer in self._heads}

    @property
    def _width(self) -> int:
        return self.run.graph.n_heads + 1

    def own(self, kept: np.ndarray) -> Tensor:
        """What the destination reads `[token d_model]` with some edges in, bool `[src]`; for the logits, where read."""
        off, tokens = self._off(self.row), self.run.at if self.is_logits else slice(None)
        some = np.flatnonzero(kept)
        self.flops += 2.0 * len(some) * off.numel()
        return off[tokens].to(_wide(off.dtype)) + self._total(some, tokens)

    def without(self, sources: Sequence[int] | np.ndarray) -> Tensor:
        """What some sources bring to the destination, `[source token d_model]`."""
        some = self.wrote[np.asarray(sources)]
        return some[:, self.run.at] if self.is_logits else some

    def metric(
        self, inputs: Float[Tensor, "cell read d_model"]
    ) -> tuple[Float[Tensor, "cell batch"], Float[Tensor, "cell node token d_model"]]:
        """The metric for several inputs of the destination.

        Args:
            inputs: what it reads in each cell, at all tokens; for the logits, where they are read.

        Returns:
            The metric, and what the reached nodes write beyond the off run.

        Cost: the reached nodes, once a cell.
        """
        run, cells = self.run, len(inputs)
        fresh = inputs.new_zeros((cells, len(self.nodes), *self.wrote.shape[1:]))
        if self.is_logits:
            return self._score(inputs), fresh
        done = 0
        for layer in sorted({*self._heads, *self._mlps}):
            if layer in self._heads:
                heads = self._heads[layer]
                fresh[:, done : done + len(heads)] = self._attend(layer, heads, inputs, fresh[:, :done])
                done += len(heads)
            if layer in self._mlps:
                row = run.graph.destination_index[f"m{layer}"]
                # Where parallel, no head of this layer is read: their weights are zeros.
                tokens: Tensor | slice = slice(None) if self._everywhere[self.nodes[done]] else run.at
                stream = self._gather(np.array([row]), inputs, fresh[:, :done])[:, 0, tokens]
                out = run._mlp(layer, stream) - run.off.mlp[layer].flatten(0, 1)[tokens]
                model = run.steps.model
                self.flops += (6.0 if model.gated_mlp else 4.0) * stream.numel() * model.d_mlp
                fresh[:, done, tokens] = out.to(fresh.dtype)
                done += 1
        row = run.graph.destination_index[LOGITS]
        stream = self._gather(np.array([row]), inputs, fresh[:, :, run.at])[:, 0]
        return self._score(stream), fresh

    def values(self, inputs: Float[Tensor, "cell read d_model"]) -> Float[Tensor, "cell node read width"]:
        """What the destination's own nodes give: z of each head that reads it, or an MLP's output.

        Args:
            inputs: what it reads in each cell.

        Returns:
            One entry a node, `width` d_head or d_model.
        """
        to = self.run.graph.destinations[self.row]
        if to.kind == "mlp":
            return self.run._mlp(to.layer, inputs)[:, None]
        return self._z(to.layer, self._heads[to.layer], inputs, inputs[:, None, :0]).transpose(1, 2)

    def _score(self, stream: Tensor) -> Tensor:
        read, model = self.run.read, self.run.steps.model
        self.flops += 2.0 * stream.numel() * (model.d_vocab if read.tokens is None else read.tokens.shape[1])
        return self.run.metric_of(stream)

    def _total(self, sources: np.ndarray, tokens: Tensor | slice) -> Tensor:
        """What some sources bring together, `[read d_model]`."""
        if isinstance(self.wrote, Writes):
            return self.wrote.total(sources, tokens)
        return self.wrote[sources][:, tokens].sum(0)

    def _off(self, row: int) -> Tensor:
        each = self.run.graph.destinations[row]
        return self.run.inputs[each.layer][1 if each.kind == "mlp" else 0]

    def _read_everywhere(self) -> np.ndarray:
        """Which sources are read at other positions than the metric's: by keys, by values, and by what these read."""
        graph, found = self.run.graph, np.zeros(self.kept.shape[1], bool)
        for row in range(len(self.kept) - 2, self.row - 1, -1):
            each = graph.destinations[row]
            if self.kept[row].any() and (each.kind in "kv" or found[graph.of_node[row]].any()):
                found |= self.kept[row]
        return found

    def _inputs(self, reached: np.ndarray) -> dict[int, Tensor]:
        """What every input of the reached nodes, and the logits, read of nodes that are not reached."""
        graph, last = self.run.graph, len(self.kept) - 1
        rows = {last}
        for layer, heads in self._heads.items():
            rows |= set(graph.read_by[:, layer, heads].flatten().tolist())
        rows |= {graph.destination_index[f"m{layer}"] for layer in self._mlps}
        rows -= {self.row}
        found = {}
        for row in sorted(rows):
            some = np.flatnonzero(self.kept[row] & ~reached)
            tokens: Tensor | slice = self.run.at if row == last else slice(None)
            off = self._off(row)[tokens]
            found[row] = off.to(_wide(off.dtype)) + self._total(some, tokens)
            self.flops += 2.0 * len(some) * off.numel()
        return found

    def _part(self, layer: int, kind: str) -> _Part:
        rows, own = np.unique(self.run.graph.read_by["qkv".index(kind), layer, self._heads[layer]], return_inverse=True)
        moves = self._moving[rows]
        held = None
        if not moves.all():
            still = torch.stack([self._still[row] for row in rows[~moves]])[None]
            held = self._project(layer, kind, rows[~moves], still)
        return _Part(kind, rows, own, moves, held)

    def _gather(self, rows: np.ndarray, inputs: Tensor, fresh: Tensor) -> Tensor:
        """What moving inputs read, `[cell row token d_model]`."""
        if self.row in rows:  # nothing else of its layer and kind moves
            return inputs[:, None]
        into = self.kept[np.ix_(rows, self.nodes[: fresh.shape[1]])]
        used = into.any(0)
        weights = torch.as_tensor(into[:, used], dtype=fresh.dtype, device=fresh.device)
        wrote = (fresh if used.all() else fresh[:, np.flatnonzero(used)]).flatten(2)
        self.flops += 2.0 * weights.numel() * wrote[:, 0].numel() if used.any() else 0.0
        still = torch.stack([self._still[row] for row in rows])
        return still + (weights @ wrote).unflatten(2, still.shape[1:])

    def _project(self, layer: int, kind: str, rows: np.ndarray, inputs: Tensor) -> Tensor:
        """Queries, rotated keys or values `[cell batch pos row d_head]` of inputs `[cell row token d_model]`."""
        run, steps = self.run, self.run.steps
        modules = steps.layers[layer]
        linear = getattr(modules, kind)
        weight = linear.weight.unflatten(0, (-1, steps.d_head))
        places = np.array([run.graph.destinations[row].place for row in rows])
        n_places = run.graph.n_heads if kind == "q" else run.graph.n_key_value_heads
        block = torch.as_tensor(places * len(weight) // n_places, device=inputs.device)
        out = torch.einsum("crtm,rdm->crtd", modules.ln1(inputs.to(steps.model.dtype)), weight[block])
        self.flops += 2.0 * inputs.numel() * steps.d_head
        if getattr(linear, "bias", None) is not None:
            out = out + linear.bias.unflatten(0, (-1, steps.d_head))[block][:, None]
        out = out.unflatten(2, run.shape).permute(0, 2, 3, 1, 4)
        if kind == "q":
            return steps.rotate(modules.q_norm(out), run.frame.rotary)
        if kind == "k":
            out = steps.rotate(modules.k_norm(out), run.frame.rotary)
        past = run.prefix[layer]["kv".index(kind)][:, :, torch.as_tensor(places, device=inputs.device)]
        return torch.cat([past.expand(len(out), *past.shape), out], 2)

    def _attend(self, layer: int, heads: np.ndarray, inputs: Tensor, fresh: Tensor) -> Tensor:
        """What some heads write beyond the off run, `[cell head token d_model]`."""
        z = self._z(layer, heads, inputs, fresh) - self.run.off.z[layer].flatten(0, 1)[:, heads]
        self.flops += 2.0 * z.numel() * self.run.steps.model.d_model
        return torch.einsum("cthd,hdm->chtm", z, self.run.steps.w_o(layer)[heads]).to(inputs.dtype)

    def _z(self, layer: int, heads: np.ndarray, inputs: Tensor, fresh: Tensor) -> Tensor:
        """What some heads hold, `[cell token head d_head]`."""
        run, cells, found = self.run, len(inputs), []
        for part in self._parts[layer]:
            if not part.moves.any():
                assert part.held is not None
                whole = part.held.expand(cells, -1, -1, -1, -1)
            else:
                rows = part.rows[part.moves]
                whole = self._project(layer, part.kind, rows, self._gather(rows, inputs, fresh))
                if part.held is not None:
                    both = whole.new_empty((*whole.shape[:3], len(part.rows), whole.shape[-1]))
                    both[:, :, :, part.moves], both[:, :, :, ~part.moves] = whole, part.held
                    whole = both
            found.append(whole[:, :, :, part.own].flatten(0, 1))
        q, k, v = found
        steps = replace(run.steps, n_heads=len(heads), n_key_value_heads=len(heads))
        allowed = steps.allowed(layer, run.frame).expand(cells, -1, -1, -1).flatten(0, 1)
        z = steps.mix(steps.pattern(steps.scores(q, k, allowed)), v)
        self.flops += 4.0 * q.numel() * k.shape[1]
        return z.unflatten(0, (cells, -1)).flatten(1, 2)


def wrote_of(run: EdgeRun, changes: Sequence[Change]) -> Float[Tensor, "src token d_model"]:
    """What sources write beyond the off run, one vector each.

    Args:
        run: the prompts.
        changes: of every layer, of one cell.

    Returns:
        In the order of `Graph.sources`, in float32 at least.

    Cost: memory for sources x tokens x d_model numbers.
    """
    wide = _wide(run.embed.dtype)
    parts = [run.embed[None].to(wide)]
    for layer, change in enumerate(changes):
        w_o = run.steps.w_o(layer)
        parts.append(torch.einsum("thd,hdm->htm", change.z[0].to(w_o.dtype), w_o).to(wide))
        parts.append(change.mlp.to(wide))
    return torch.cat(parts)


def forward_flops(run: EdgeRun, n_pos: int) -> float:
    """Multiplications and additions of one bare forward pass of the model over the whole prompts.

    Args:
        run: the prompts.
        n_pos: tokens a prompt.

    Returns:
        Linear maps at all positions, attention, and the unembedding where the metric is read: no sums over edges.
    """
    model = run.steps.model
    tokens = run.shape[0] * n_pos
    maps = model.d_model * model.d_head * (2 * model.n_heads + 2 * model.n_key_value_heads)
    maps += (3 if model.gated_mlp else 2) * model.d_model * model.d_mlp
    attention = 2 * n_pos * model.n_heads * model.d_head
    words = model.d_vocab if run.read.tokens is None else run.read.tokens.shape[1]
    return 2.0 * (model.n_layers * tokens * (maps + attention) + run.shape[0] * model.d_model * words)
