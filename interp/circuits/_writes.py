"""What do nodes write beyond the off run? Held as heads hold it, and made a vector each for some of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits._edges import Change, EdgeRun, _wide


class Fresh(NamedTuple):
    """What some nodes of one layer write in several cells.

    `heads` are numbers in order; `z` what they hold `[cell token head d_head]`; `mlp` what the MLP writes
    `[cell token d_model]`, None without it; `vectors` what each head writes `[cell head token d_model]`, None where
    that is made again when it is asked for.
    """

    heads: np.ndarray
    z: Tensor
    mlp: Tensor | None
    vectors: Tensor | None = None

    def one(self, cell: int) -> Fresh:
        """Of one cell only."""
        z, mlp, vectors = (None if each is None else each[cell : cell + 1] for each in (self.z, self.mlp, self.vectors))
        assert z is not None
        return Fresh(self.heads, z, mlp, vectors)

    def of_heads(self, run: EdgeRun, layer: int, tokens: Tensor | slice = slice(None)) -> Tensor:
        """What each head writes at some tokens `[cell head read d_model]`, in float32 at least."""
        if self.vectors is not None:
            return self.vectors[:, :, tokens]
        w_o = run.steps.w_o(layer)[self.heads]
        return torch.einsum("cthd,hdm->chtm", self.z[:, tokens].to(w_o.dtype), w_o).to(_wide(w_o.dtype))

    def of_nodes(self, run: EdgeRun, layer: int) -> Tensor:
        """What each head writes, then the MLP, in the only cell `[node token d_model]`."""
        made = self.of_heads(run, layer)[0]
        return made if self.mlp is None else torch.cat([made, self.mlp.to(made)])


class Writes:
    """What sources write beyond the off run in one circuit, held as `_edges.Change` holds it.

    Args:
        run: the prompts.
        changes: of every layer, of one cell; `put` changes them.
        alive: sources that will be asked for, bool `[src]`; None for all.
        room: bytes of vectors that are held beside, so that they need not be made again.

    Attributes:
        flops: multiplications and additions so far.

    Cost: memory for layers x tokens x 2 d_model numbers, where one vector a source takes n_heads times as many, and
        `room`.
    """

    def __init__(
        self, run: EdgeRun, changes: Sequence[Change], *, alive: np.ndarray | None = None, room: float = 0
    ) -> None:
        self.run, self.changes = run, [Change(each.z[0], each.mlp[0]) for each in changes]
        self.flops, self._room = 0.0, room
        self._alive = np.ones(len(run.graph.sources), bool) if alive is None else alive
        self._held: dict[int, tuple[np.ndarray, Tensor]] = {}
        self._last: tuple[np.ndarray, Tensor] | None = None

    def vectors(
        self, sources: Sequence[int] | np.ndarray, tokens: Tensor | slice = slice(None)
    ) -> Float[Tensor, "src read d_model"]:
        """What each of some sources writes.

        Args:
            sources: numbers.
            tokens: at which.

        Returns:
            In float32 at least.
        """
        like = self.run.embed[tokens]
        out = like.new_empty((len(sources), *like.shape), dtype=_wide(like.dtype))
        for layer, at, nodes in self._by_layer(np.asarray(sources)):
            out[at] = (like[None] if layer < 0 else self._made(layer, nodes, tokens)).to(out)
        return out

    def sums(
        self, mask: np.ndarray, tokens: Tensor | slice = slice(None)
    ) -> tuple[Float[Tensor, "set read d_model"], np.ndarray]:
        """What sources bring together, for several sets of them.

        Args:
            mask: which are in, bool `[row src]`.
            tokens: at which.

        Returns:
            A sum for each different row of `mask`, and which of them each row has.
        """
        sets, which = np.unique(mask, axis=0, return_inverse=True)
        if len(sets) == 1:
            return self.total(np.flatnonzero(sets[0]), tokens)[None], which.reshape(-1)
        like = self.run.embed[tokens]
        out = torch.zeros((len(sets), *like.shape), dtype=_wide(like.dtype), device=like.device)
        sources = np.flatnonzero(sets.any(0))
        for layer, at, nodes in self._by_layer(sources):
            own = sets[:, sources[at]]
            rows = np.flatnonzero(own.any(1))
            vectors = like[None] if layer < 0 else self._made(layer, nodes, tokens)
            weights = torch.as_tensor(own[rows], dtype=out.dtype, device=out.device)
            out[rows] += torch.tensordot(weights, vectors.to(out), 1)
            self.flops += 2.0 * weights.numel() * like.numel()
        return out, which.reshape(-1)

    def total(self, sources: np.ndarray, tokens: Tensor | slice = slice(None)) -> Float[Tensor, "read d_model"]:
        """What some sources bring together; their vectors are not made where none is held.

        Args:
            sources: numbers, each once.
            tokens: at which; a slice is that of all.

        Returns:
            The sum.
        """
        # All inputs of a layer's attention read the same sources where every edge is in.
        if self._last is not None and isinstance(tokens, slice) and np.array_equal(self._last[0], sources):
            return self._last[1]
        like = self.run.embed[tokens]
        total = torch.zeros_like(like, dtype=_wide(like.dtype))
        for layer, _, nodes in self._by_layer(np.asarray(sources)):
            if layer < 0:
                total += like
            elif self._hold(layer):
                total += self._made(layer, nodes, tokens).sum(0)
                self.flops += 2.0 * len(nodes) * like.numel()
            else:
                own = self._own(layer, nodes, tokens)
                w_o = self.run.steps.w_o(layer)[own.heads]
                total += torch.einsum("cthd,hdm->tm", own.z.to(w_o.dtype), w_o).to(total)
                self.flops += 2.0 * own.z.numel() * like.shape[-1]
                if own.mlp is not None:
                    total += own.mlp[0].to(total)
        if isinstance(tokens, slice):
            self._last = np.array(sources), total
        return total

    def put(self, fresh: Mapping[int, Fresh], cell: int) -> None:
        """Take what nodes write in one cell in the place of what they wrote.

        Args:
            fresh: by layer.
            cell: which.
        """
        self._last = None
        for layer, own in fresh.items():
            to = self.changes[layer]
            to.z[:, own.heads] = own.z[cell]
            if own.mlp is not None:
                to.mlp.copy_(own.mlp[cell])
            if layer in self._held:
                nodes, vectors = self._held[layer]
                if own.vectors is None:
                    self.flops += 2.0 * own.z[cell].numel() * vectors.shape[-1]
                one = own.one(cell)
                mine = own.heads if own.mlp is None else np.append(own.heads, self.run.graph.n_heads)
                vectors[np.searchsorted(nodes, mine)] = one.of_nodes(self.run, layer)

    def changed(self, tokens: Tensor | slice = slice(None)) -> np.ndarray:
        """Which sources may write anything beyond the off run at some tokens, bool `[src]`.

        Args:
            tokens: at which.

        Returns:
            False for a head that holds the same, or what its output map takes for the same.
        """
        parts = [(self.run.embed[tokens] != 0).any()[None]]
        for reads, (z, mlp) in zip(self._read, self.changes, strict=True):
            parts += [((z[tokens] != 0).any(0) & reads).any(1), (mlp[tokens] != 0).any()[None]]
        return torch.cat(parts).cpu().numpy()

    @cached_property
    def _read(self) -> list[Tensor]:
        """Which numbers of each head its layer's output map reads, bool `[head d_head]`."""
        return [(self.run.steps.w_o(layer) != 0).any(2) for layer in range(len(self.changes))]

    def _hold(self, layer: int) -> bool:
        """Whether the vectors of a layer's nodes are held; they are from now on, if there is room."""
        if layer not in self._held:
            width = self.run.graph.n_heads + 1
            nodes = np.flatnonzero(self._alive[1 + layer * width :][:width])
            size = len(nodes) * self.run.embed.numel() * _wide(self.run.embed.dtype).itemsize
            if size > self._room:
                return False
            own = self._own(layer, nodes)
            self.flops += 2.0 * own.z.numel() * self.run.embed.shape[-1]
            self._room -= size
            self._held[layer] = nodes, own.of_nodes(self.run, layer)
        return True

    def _made(self, layer: int, nodes: np.ndarray, tokens: Tensor | slice) -> Tensor:
        """What nodes of a layer write `[node read d_model]`."""
        if self._hold(layer):
            held, vectors = self._held[layer]
            return vectors[np.searchsorted(held, nodes)][:, tokens]
        order = np.argsort(nodes)
        own = self._own(layer, nodes[order], tokens)
        self.flops += 2.0 * own.z.numel() * self.run.embed.shape[-1]
        return own.of_nodes(self.run, layer)[np.argsort(order)]

    def _own(self, layer: int, nodes: np.ndarray, tokens: Tensor | slice = slice(None)) -> Fresh:
        """What nodes of a layer, in order, hold at some tokens."""
        z, mlp = self.changes[layer]
        heads = nodes[nodes < self.run.graph.n_heads]
        return Fresh(heads, z[tokens][:, heads][None], mlp[tokens][None] if len(heads) < len(nodes) else None)

    def _by_layer(self, sources: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each layer (-1: the input) where its nodes are among the sources, and their places in it."""
        layers, nodes = np.divmod(sources - 1, self.run.graph.n_heads + 1)
        for layer in np.unique(layers).tolist():
            at = np.flatnonzero(layers == layer)
            yield layer, at, nodes[at]
