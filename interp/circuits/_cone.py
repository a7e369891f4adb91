"""What does one input change? The nodes that it reaches through edges that are in, computed again; all else is held.

A pass over a circuit of few edges computes few nodes: those below one destination. What other nodes write, what still
inputs read, and the queries, keys and values that no moving source feeds are taken as they are. MLPs that only lead to
the logits by way of the position that is read are computed there only.

What nodes write is held as heads hold it, and what still inputs read for as many layers at a time as there is room for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits._edges import EdgeRun, _wide
from interp.circuits._writes import Fresh, Writes
from interp.circuits.graph import LOGITS

# Bytes of what inputs read, and of the vectors of what nodes write in all cells, that one cone holds at most.
_ROOM = 2**26


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


class Cone:
    """What lies below one destination of a circuit.

    Args:
        run: the prompts.
        kept: which edges are in, bool `[dst src]`; edges into nodes that nothing reads are not followed.
        wrote: what each source writes beyond the off run in this circuit.
        row: number of the destination.

    Attributes:
        nodes: numbers of the sources that it reaches.
        flops: multiplications and additions of linear maps, attention and sums so far.

    Cost: memory for queries, keys and values of the still inputs of reached nodes, and twice `_ROOM` bytes: what they
        read and what nodes write is made again in each pass where more would have to be held.
    """

    def __init__(self, run: EdgeRun, kept: np.ndarray, wrote: Writes, row: int) -> None:
        self.run, self.kept, self.wrote, self.row, self._flops = run, kept, wrote, row, -wrote.flops
        graph = run.graph
        self.is_logits = graph.destinations[row].name == LOGITS
        alive = kept.any(0)
        reached, moving = np.zeros(len(graph.sources), bool), np.zeros(len(kept), bool)
        moving[row] = True
        for number in range(row, len(kept)):
            if moving[number] or (kept[number] & reached).any():
                moving[number] = True
                reached |= graph.of_node[number] & alive
        self.nodes, self._moving, self._reached = np.flatnonzero(reached), moving, reached
        self._everywhere = self._read_everywhere()
        self._heads = {
            layer: heads
            for layer in range(graph.destinations[row].layer, graph.n_layers)
            if len(heads := np.flatnonzero(reached[1 + layer * self._width :][: graph.n_heads]))
        }
        self._mlps = {
            layer for layer in range(graph.n_layers) if reached[1 + layer * self._width + graph.n_heads]
        }  # fmt: skip
        self._blocks = self._in_blocks()
        self._sums: dict[int, tuple[Tensor, np.ndarray]] = {}
        self._parts: dict[int, list[_Part]] = {}

    @property
    def _width(self) -> int:
        return self.run.graph.n_heads + 1

    @property
    def flops(self) -> float:
        """Multiplications and additions so far."""
        return self._flops + self.wrote.flops

    @property
    def bytes_held(self) -> int:
        """Of what is taken from pass to pass, until `release`."""
        parts = [part.held for parts in self._parts.values() for part in parts if part.held is not None]
        return sum(each.nbytes for each in (*parts, *(sums for sums, _ in self._sums.values())))

    def release(self) -> None:
        """Hold nothing: the next pass makes it again."""
        self._sums.clear()
        self._parts.clear()

    def own(self, kept: np.ndarray) -> Tensor:
        """What the destination reads `[token d_model]` with some edges in, bool `[src]`; for the logits, where read."""
        off, tokens = self._off(self.row), self._tokens
        return off[tokens].to(_wide(off.dtype)) + self.wrote.total(np.flatnonzero(kept), tokens)

    def without(self, sources: Sequence[int] | np.ndarray) -> Tensor:
        """What some sources bring to the destination, `[source token d_model]`; to the logits, where they are read."""
        return self.wrote.vectors(sources, self._tokens)

    @property
    def _tokens(self) -> Tensor | slice:
        return self.run.at if self.is_logits else slice(None)

    def metric(
        self, inputs: Float[Tensor, "cell read d_model"]
    ) -> tuple[Float[Tensor, "cell batch"], dict[int, Fresh]]:
        """The metric for several inputs of the destination.

        Args:
            inputs: what it reads in each cell, at all tokens; for the logits, where they are read.

        Returns:
            The metric, and by layer what the reached nodes write beyond the off run.

        Cost: the reached nodes, once a cell.
        """
        run, fresh = self.run, dict[int, Fresh]()
        if self.is_logits:
            return self._score(inputs), fresh
        room = _ROOM
        for layer in sorted({*self._heads, *self._mlps}):
            own = fresh[layer] = self._attend(layer, inputs, fresh, room)
            room -= 0 if own.vectors is None else own.vectors.nbytes
            if layer in self._mlps:
                row, node = run.graph.destination_index[f"m{layer}"], 1 + layer * self._width + run.graph.n_heads
                tokens: Tensor | slice = slice(None) if self._everywhere[node] else run.at
                # Where parallel, no head of this layer is read: their weights are zeros.
                stream = self._gather(np.array([row]), inputs, fresh, tokens)[:, 0]
                out = run._mlp(layer, stream) - run.off.mlp[layer].flatten(0, 1)[tokens]
                model = run.steps.model
                self._flops += (6.0 if model.gated_mlp else 4.0) * stream.numel() * model.d_mlp
                mlp = out.new_zeros((len(inputs), *run.embed.shape))
                mlp[:, tokens] = out
                fresh[layer] = own._replace(mlp=mlp)
        stream = self._gather(np.array([len(self.kept) - 1]), inputs, fresh, run.at)[:, 0]
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
        return self._z(to.layer, self._heads[to.layer], inputs, {}).transpose(1, 2)

    def _score(self, stream: Tensor) -> Tensor:
        read, model = self.run.read, self.run.steps.model
        self._flops += 2.0 * stream.numel() * (model.d_vocab if read.tokens is None else read.tokens.shape[1])
        return self.run.metric_of(stream)

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

    def _in_blocks(self) -> list[np.ndarray]:
        """Inputs of the reached nodes, then the logits alone: of as many layers together as there is room for."""
        graph, blocks = self.run.graph, list[np.ndarray]()
        most = _ROOM // (self.run.embed.numel() * _wide(self.run.embed.dtype).itemsize)
        for layer in sorted({*self._heads, *self._mlps}):
            rows = set(graph.read_by[:, layer, self._heads.get(layer, [])].flatten().tolist())
            rows |= {graph.destination_index[f"m{layer}"]} if layer in self._mlps else set()
            own = np.array(sorted(rows - {self.row}), dtype=np.int64)
            if blocks and len(blocks[-1]) + len(own) <= most:
                blocks[-1] = np.concatenate([blocks[-1], own])
            else:
                blocks.append(own)
        return [*blocks, np.array([len(self.kept) - 1])]

    def _still(self, rows: np.ndarray, tokens: Tensor | slice = slice(None)) -> Tensor:
        """What inputs of one layer and kind read of nodes that are not reached, `[row read d_model]`."""
        last = rows[0] == len(self.kept) - 1
        number = next(n for n, block in enumerate(self._blocks) if rows[0] in block)
        if number not in self._sums:
            if len(self._blocks) > 2 and not last:
                self._sums.clear()  # one at a time; with a single one it lasts from pass to pass
            mask = self.kept[self._blocks[number]] & ~self._reached
            self._sums[number] = self.wrote.sums(mask, tokens if last else slice(None))
        sums, which = self._sums[number]
        found = sums[which[np.searchsorted(self._blocks[number], rows)]]
        off = self._off(int(rows[0]))[tokens]
        self._flops += 2.0 * len(rows) * off.numel()
        return off.to(found.dtype) + (found if last else found[:, tokens])

    def _parts_of(self, layer: int) -> list[_Part]:
        """Queries, keys and values of a layer's reached heads, as far as they are still."""
        if layer not in self._parts:
            self._parts[layer] = [self._part(layer, kind) for kind in "qkv"]
        return self._parts[layer]

    def _part(self, layer: int, kind: str) -> _Part:
        rows, own = np.unique(self.run.graph.read_by["qkv".index(kind), layer, self._heads[layer]], return_inverse=True)
        moves = self._moving[rows]
        held = None
        if not moves.all():
            held = self._project(layer, kind, rows[~moves], self._still(rows[~moves])[None])
        return _Part(kind, rows, own, moves, held)

    def _gather(
        self, rows: np.ndarray, inputs: Tensor, fresh: Mapping[int, Fresh], tokens: Tensor | slice = slice(None)
    ) -> Tensor:
        """What moving inputs of one layer and kind read, `[cell row read d_model]`."""
        if self.row in rows:  # nothing else of its layer and kind moves
            return inputs[:, None, tokens]
        out = self._still(rows, tokens).repeat(len(inputs), 1, 1, 1)
        for layer, own in fresh.items():
            first = 1 + layer * self._width
            into = self.kept[np.ix_(rows, first + own.heads)]
            some, used = np.flatnonzero(into.any(1)), np.flatnonzero(into.any(0))
            if len(used):
                taken = Fresh(own.heads[used], own.z[:, :, used], None, None)
                if own.vectors is not None:
                    taken = taken._replace(vectors=own.vectors if into.any(0).all() else own.vectors[:, used])
                vectors = taken.of_heads(self.run, layer, tokens)
                self._flops += 0.0 if own.vectors is not None else 2.0 * vectors.numel() * own.z.shape[-1]
                weights = torch.as_tensor(into[np.ix_(some, used)], dtype=out.dtype, device=out.device)
                self._flops += 2.0 * weights.numel() * vectors[:, 0].numel()
                added = (weights @ vectors.to(out).flatten(2)).unflatten(2, vectors.shape[2:])
                if len(some) == len(rows):
                    out += added
                else:
                    out[:, some] += added
            if own.mlp is not None and (reads := np.flatnonzero(self.kept[rows, first + self._width - 1])).size:
                out[:, reads] += own.mlp[:, None, tokens].to(out)
        return out

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
        self._flops += 2.0 * inputs.numel() * steps.d_head
        if getattr(linear, "bias", None) is not None:
            out = out + linear.bias.unflatten(0, (-1, steps.d_head))[block][:, None]
        out = out.unflatten(2, run.shape).permute(0, 2, 3, 1, 4)
        if kind == "q":
            return steps.rotate(modules.q_norm(out), run.frame.rotary)
        if kind == "k":
            out = steps.rotate(modules.k_norm(out), run.frame.rotary)
        past = run.prefix[layer]["kv".index(kind)][:, :, torch.as_tensor(places, device=inputs.device)]
        return torch.cat([past.expand(len(out), *past.shape), out], 2)

    def _attend(self, layer: int, inputs: Tensor, fresh: Mapping[int, Fresh], room: int) -> Fresh:
        """What the reached heads of a layer write beyond the off run; with vectors, if there is room for them."""
        off = self.run.off.z[layer].flatten(0, 1)
        heads = self._heads.get(layer)
        if heads is None:
            return Fresh(np.zeros(0, np.int64), off.new_zeros((len(inputs), len(off), 0, off.shape[2])), None)
        own = Fresh(heads, self._z(layer, heads, inputs, fresh) - off[:, heads], None)
        width = self.run.embed.shape[1]
        if own.z.numel() // own.z.shape[-1] * width * inputs.itemsize > room:
            return own
        self._flops += 2.0 * own.z.numel() * width
        return own._replace(vectors=own.of_heads(self.run, layer))

    def _z(self, layer: int, heads: np.ndarray, inputs: Tensor, fresh: Mapping[int, Fresh]) -> Tensor:
        """What some heads hold, `[cell token head d_head]`."""
        run, cells, found = self.run, len(inputs), []
        for part in self._parts_of(layer):
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
        self._flops += 4.0 * q.numel() * k.shape[1]
        return z.unflatten(0, (cells, -1)).flatten(1, 2)


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
