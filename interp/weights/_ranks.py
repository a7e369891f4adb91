"""Where does each right answer rank in a head's map? Counted tile by tile, without a row of the map in memory.

A head's map in factors: entry [s, t] is z_s . c_t, with z_s = e_s W_V shared by the heads of a key-value group and
c_t a column of C = W_O W_U. A tile of some sources and some tokens stays in the processor's cache and is
compared there with the entry of each right answer; what is kept is how many entries were above or below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.batching import batches

# A tile of 768 sources x 768 tokens: 2.4 MB, measured to be the fastest of some shapes on one processor (by 5%).
ROWS, COLUMNS = 768, 768


@dataclass(frozen=True, eq=False)
class Layout:
    """Pairs (source, target) by source, those with the most targets first, so that tiles are compared whole.

    Attributes:
        sources: each source token once, `[n]`.
        targets: each target token once, `[m]`.
        row, slot: which source a pair has, and its number among the source's pairs, `[pair]`.
        column: which target it has, `[pair]`.
        filled: number of sources with more than `slot` targets, for each slot.
    """

    sources: Tensor
    targets: Tensor
    row: Tensor
    slot: Tensor
    column: Tensor
    filled: tuple[int, ...]

    @classmethod
    def of(cls, source: np.ndarray, target: np.ndarray, device: torch.device) -> Layout:
        """The layout of different pairs.

        Args:
            source: token of each pair, `[pair]`.
            target: likewise.
            device: of the tensors.
        """
        sources, number, counts = np.unique(source, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        row = place[number]
        slot, seen = np.empty(len(row), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
        for pair, at in enumerate(row):
            slot[pair] = seen[at]
            seen[at] += 1
        targets, column = np.unique(target, return_inverse=True)
        filled = tuple(int((counts > j).sum()) for j in range(int(counts.max())))
        sources, targets, row, slot, column = (
            torch.as_tensor(each, device=device) for each in (sources[order], targets, row, slot, column)
        )
        return cls(sources, targets, row, slot, column, filled)


@torch.no_grad()
def ranks(
    layout: Layout,
    z: Float[Tensor, "kv n d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
    w_u: Tensor,
    w_u_targets: Float[Tensor, "d_model target"],
) -> tuple[Tensor, Tensor]:
    """How many tokens come before the target in the source's row of the map, and in that of its negative.

    Pessimistic: a token whose entry equals the target's counts as before it. Equal means within the rounding of a
    float32 sum of d_head products, d_head / 2^24 of the sum of their sizes, because the target's entry and the tile
    are not summed in the same order.

    Args:
        layout: of the pairs.
        z: values of the sources, a key-value group each.
        w_o: output maps of the heads; those of a group follow one another.
        w_u: unembedding `[d_model d_vocab]`, of any type.
        w_u_targets: its columns of the layout's targets.

    Returns:
        (rank, rank of the suppressed), int32 `[pair head]`, from 0 to d_vocab - 1.
    """
    n_heads, per_group = len(w_o), len(w_o) // len(z)
    low, high = _bounds(layout, z, w_o, w_u_targets)
    counts = torch.zeros(n_heads, len(layout.filled), 2, len(layout.sources), dtype=torch.int32, device=z.device)
    tile, flat = _Tile(layout, z.device), w_o.flatten(0, 1)
    # One piece of memory for all chunks: freed ones stay with the process, and add up to more than the plan.
    whole = torch.empty(len(flat) * COLUMNS, device=z.device)
    wide = None if w_u.dtype == torch.float32 else torch.empty(len(w_u), COLUMNS, device=z.device)
    spans = list(batches(len(layout.sources), ROWS))
    bounds = [[tile.bounds(low[head], high[head], rows) for rows in spans] for head in range(n_heads)]
    for columns in batches(w_u.shape[1], COLUMNS):
        some = w_u[:, columns]
        some = some if wide is None else wide[:, : some.shape[1]].copy_(some)
        c = torch.mm(flat, some, out=whole[: len(flat) * some.shape[1]].view(len(flat), -1)).unflatten(0, (n_heads, -1))
        views = [tile.views(rows, some.shape[1]) for rows in spans]
        for head in range(n_heads):
            values, map_ = z[head // per_group], c[head]
            for rows, view, bound in zip(spans, views, bounds[head], strict=True):
                tile.count(values[rows], map_, view, bound, counts[head, :, :, rows])
    picked = counts[:, layout.slot, :, layout.row] - 1  # [pair head sign]: the target itself is not before itself
    return picked[..., 0], picked[..., 1]


def _bounds(layout: Layout, z: Tensor, w_o: Tensor, w_u_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's entry less and plus its rounding, `[head slot n]`."""
    shape = (len(w_o), len(layout.filled), len(layout.sources))
    low, high = (torch.zeros(shape, device=z.device) for _ in range(2))
    for head, out in enumerate(w_o):
        products = z[head // (len(w_o) // len(z)), layout.row] * (out @ w_u_targets).T[layout.column]
        entry, rounding = products.sum(1), products.abs().sum(1) * (products.shape[1] * 2.0**-24)
        low[head, layout.slot, layout.row] = entry - rounding
        high[head, layout.slot, layout.row] = entry + rounding
    return low, high


class _View(NamedTuple):
    """Parts of a tile's memory that are used alike for every head: all of the tile, then slot by slot its rows."""

    entries: Tensor
    slots: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # entries, zeros and ones, their sums at or above, and below
    sums: Tensor


class _Tile:
    """Memory for one tile, used again for each. Views of it are made once, not a hundred thousand times."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.filled = layout.filled
        self.entries, self.beyond = (torch.empty(ROWS * COLUMNS, device=device) for _ in range(2))
        self.sums = torch.zeros(len(layout.filled), 2, ROWS, device=device)

    def views(self, rows: slice, width: int) -> _View:
        """The memory of a tile of some sources and so many tokens."""
        n = rows.stop - rows.start
        entries, beyond = (memory[: n * width].view(n, width) for memory in (self.entries, self.beyond))
        ends = [min(filled, rows.stop) - rows.start for filled in self.filled if filled > rows.start]
        slots = [
            (entries[:m], beyond[:m], self.sums[slot, 0, :m], self.sums[slot, 1, :m]) for slot, m in enumerate(ends)
        ]
        return _View(entries, slots, self.sums[: len(ends), :, :n])

    def bounds(self, low: Tensor, high: Tensor, rows: slice) -> list[tuple[Tensor, Tensor]]:
        """Each slot's bounds for some sources, as columns."""
        ends = [min(filled, rows.stop) for filled in self.filled if filled > rows.start]
        return [(low[slot, rows.start : m, None], high[slot, rows.start : m, None]) for slot, m in enumerate(ends)]

    def count(self, z: Tensor, c: Tensor, view: _View, bounds: list[tuple[Tensor, Tensor]], counts: Tensor) -> None:
        """Add to `counts` `[slot sign n]` how many entries of this tile are at or beyond each target's."""
        torch.mm(z, c, out=view.entries)
        for (entries, beyond, above, below), (low, high) in zip(view.slots, bounds, strict=True):
            # Zeros and ones as float32: four times as fast on a processor as bools.
            torch.ge(entries, low, out=beyond)
            torch.sum(beyond, 1, out=above)
            torch.le(entries, high, out=beyond)
            torch.sum(beyond, 1, out=below)
        counts[: len(bounds)] += view.sums.int()
