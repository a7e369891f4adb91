"""What would the model have said? Many changed runs of the same prompts, each recomputed only where it can differ.

A changed run differs from the unchanged one only in its causal cone: from the layer of its first edit on, and from the
position of its first edit on (for values taken from another prompt: from the first token in which the two differ). All
else is taken from one unchanged pass. The changed runs ("cells") of a sweep go through the layers as one batch, which
each joins at its own layer; keys and values of the shared earlier positions are computed once. In the last layer only
the position that is read is computed, and only the logits that the metric reads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.edits import Activations, Cell, Edit, apply, checked, reach, sites_of
from interp.core.readout import Readout
from interp.models.check import require_live
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import NoProgramError, Program, hook_name, program

ExactPath = Literal["rerun", "hooks"]

#: Where in a layer a changed run joins, by the site of its first edit there: everything before is the unchanged run's.
_JOINS = {"resid_pre": 0, "q": 0, "k": 0, "v": 0, "attn_scores": 0, "pattern": 0, "z": 1, "attn_out": 1,
          "resid_mid": 2, "post": 2, "mlp_out": 2, "resid_post": 3}  # fmt: skip
#: What such a run needs of the unchanged one.
_JOIN_SITES = (("resid_pre",), ("resid_pre", "z"), ("resid_mid",), ("resid_post",))

#: More tokens than this at once make no matrix multiplication faster on a CPU, and leave its caches.
_CPU_TOKENS = 1024


def rerun(
    model: Model,
    tokens: Tensor,
    cells: Sequence[Cell],
    read: Readout,
    *,
    source: Tensor | None = None,
    mask: Tensor | None = None,
    exact_path: ExactPath | None = None,
    tokens_at_once: int | None = None,
) -> Tensor:
    """The metric of every changed run, for every prompt.

    Args:
        model: a decoder.
        tokens: prompts `[batch pos]` of the run that is changed.
        cells: the changed runs, each a set of edits that are made together. No edit gives the unchanged run.
        read: the metric, see `interp.core.readout`.
        source: prompts `[batch pos]` whose activations are the values of edits without a value of their own.
        mask: 1 on tokens, 0 on padding, `[batch pos]`, the same for both.
        exact_path: "rerun" recomputes the causal cone only; "hooks" runs one whole forward pass a cell, the slow way
            that the other is checked against; None takes the first, and the second, with a warning, for a model whose
            layers are not of the common form.
        tokens_at_once: rows x positions that are in memory together; None chooses from the free memory.

    Returns:
        `[cell batch]` (or `[cell batch n]`, if the metric has n numbers), in float32, on the model's device.

    Raises:
        ValueError: an edit that the model has no place for, prompts and source of different shapes, no cells.
        NoProgramError: exact_path="rerun" for a model without a program.

    Cost: two forward passes (one without a source), then for each cell the layers from its first edit on, on the
        positions from its first effect on. Memory: the stream, keys and values of one pass over all layers,
        `layer x batch x pos x (d_model + 2 kv_head d_head)`, the source's activations at the edited sites, and a few
        activations of `tokens_at_once` tokens.
    """
    if not len(cells):
        raise ValueError("there are no cells: give at least one set of edits ([] is the unchanged run).")
    if source is not None and source.shape != tokens.shape:
        raise ValueError(
            f"the prompts are {tuple(tokens.shape)} and the source {tuple(source.shape)}: both are [batch pos] of one "
            "shape, aligned token by token."
        )
    checked(model, cells, tokens.shape[1], len(tokens), sourced=source is not None)
    if mask is not None and bool(mask.all()):
        mask = None
    with torch.no_grad():
        if exact_path == "hooks":
            return _by_hooks(model, tokens, cells, read, source, mask)
        try:
            steps = program(model)
        except NoProgramError as reason:
            if exact_path == "rerun":
                raise
            warnings.warn(
                f"{reason} Each changed run is a whole forward pass, with hooks: exact, slower.", stacklevel=2
            )
            return _by_hooks(model, tokens, cells, read, source, mask)
        return _Sweep(steps, tokens, list(cells), read, source, mask).metrics(tokens_at_once)


def _by_hooks(
    model: Model, tokens: Tensor, cells: Sequence[Cell], read: Readout, source: Tensor | None, mask: Tensor | None
) -> Tensor:
    values = {}
    if source is not None and (sites := sites_of(cells, sourced_only=True)):
        names = {site: hook_name(*site) for site in sorted(sites)}
        cache = run(model, source, capture=list(names.values()), mask=mask).cache
        values = {site: cache[name] for site, name in names.items()}
    for site, layer in {site: layer for site, layer in sites_of(cells) if site in ("attn_scores", "pattern")}.items():
        require_live(model, hook_name(site, layer))  # on OPT the bridge shows them, and computes with its own
    view = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)

    def changed(cell: Cell) -> Tensor:
        by_site: dict[tuple[str, int], list[tuple[int, Edit]]] = {}
        for edit in cell:
            by_site.setdefault((edit.site, edit.layer), []).append((0, edit))

        hooks = []
        for (site, layer), edits in by_site.items():
            hooks += _setters(site, layer, edits, view, values)
        return read.of(run(model, tokens, hooks=hooks, mask=mask).logits).float()

    return torch.stack([changed(cell) for cell in tqdm(cells, leave=False, disable=len(cells) < 20)])


def _setters(
    site: str, layer: int, edits: list[tuple[int, Edit]], view: Tensor, values: Activations
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """The hooks that make some edits of one site."""

    def put(activation: Tensor, hook: object) -> Tensor:
        state = activation.clone()[None]
        apply(site, edits, state, view, values)
        return state[0]

    if site != "resid_mid":
        return [(hook_name(site, layer), put)]
    # The bridge's hook_resid_mid shows what the MLP reads, and the stream goes on without the edit: what attention adds
    # is edited instead, so that the sum comes out as wanted.
    before = {}

    def note(activation: Tensor, hook: object) -> None:
        before["stream"] = activation

    def add(activation: Tensor, hook: object) -> Tensor:
        return put(before["stream"] + activation, hook) - before["stream"]

    return [(hook_name("resid_pre", layer), note), (hook_name("attn_out", layer), add)]


@dataclass
class _Group:
    """Cells whose first effect is at the same position; their rows share everything before it."""

    start: int
    cells: list[int]
    view: Tensor
    joined: int = 0
    stream: Tensor | None = None
    z: Tensor | None = None
    #: {(site, layer): [(row, edit)]}
    edits: dict[tuple[str, int], list[tuple[int, Edit]]] = field(default_factory=dict)


class _Sweep:
    """One batch of prompts, its unchanged run, its source, and the cells that are run against them."""

    def __init__(
        self,
        steps: Program,
        tokens: Tensor,
        cells: list[Cell],
        read: Readout,
        source: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self.steps, self.cells, self.read = steps, cells, read
        self.n_prompts, self.n_pos = tokens.shape
        self.where = read.where.to(tokens.device)
        if int(self.where.min()) < 0 or int(self.where.max()) >= self.n_pos:
            raise ValueError(f"the metric reads position {int(self.where.max())} of prompts of {self.n_pos} tokens.")
        self.frame = steps.frame(tokens, mask)
        self.joins = [self._join(cell) for cell in cells]
        self.starts = self._starts(tokens, source)
        alive = [i for i, start in enumerate(self.starts) if start < self.n_pos and cells[i]]
        self.alive = sorted(alive, key=lambda i: self.joins[i])
        wanted = {(site, layer) for layer, rank in (self.joins[i] for i in alive) for site in _JOIN_SITES[rank]}
        layers = range(len(steps.layers))
        wanted |= {("rotated_k", layer) for layer in layers} | {("v", layer) for layer in layers}
        self.base = trace(steps, tokens, mask, wanted | {("resid_post", len(steps.layers) - 1)})
        own = sites_of([cells[i] for i in alive], sourced_only=True)
        self.source = {} if source is None or not own else trace(steps, source, mask, own)

    def _join(self, cell: Cell) -> tuple[int, int]:
        """(layer, rank in `_JOIN_SITES`) from which on a cell has a row of its own."""
        ranks = [(edit.layer, _JOINS[edit.site]) for edit in cell]
        layer, rank = min(ranks, default=(0, 0))
        # A parallel MLP has read the stream by then, so its layer is done again from the start.
        return (layer, 0) if self.steps.parallel and rank < 3 else (layer, rank)

    def _starts(self, tokens: Tensor, source: Tensor | None) -> list[int]:
        same = torch.full((self.n_prompts,), self.n_pos)
        if source is not None:
            differs = (tokens != source).cpu()
            same = torch.where(differs.any(1), differs.long().argmax(1), same)
        first_read = int(self.where.min())
        starts = []
        for cell in self.cells:
            first = min((int(reach(edit, self.n_prompts, self.n_pos, same).min()) for edit in cell), default=self.n_pos)
            starts.append(first if first == self.n_pos else min(first, first_read))
        return starts

    def metrics(self, tokens_at_once: int | None) -> Tensor:
        """`[cell batch]`: the unchanged run's metric where a cell changes nothing."""
        rows = torch.arange(self.n_prompts, device=self.where.device)
        last = self.base["resid_post", len(self.steps.layers) - 1]
        unchanged = self._score(last[rows, self.where][None])[0]
        out = unchanged.expand(len(self.cells), *unchanged.shape).clone()
        room = tokens_at_once or self._room()
        with tqdm(total=len(self.alive), leave=False, disable=len(self.alive) < 20) as bar:
            for part in self._parts(room):
                for group in self._chunk(part):
                    assert group.stream is not None
                    out[torch.tensor(group.cells, device=out.device)] = self._score(group.stream.squeeze(2))
                bar.update(len(part))
        return out

    def _parts(self, room: int) -> list[list[int]]:
        """The cells, by the layer they join at, in parts of at most `room` tokens."""
        parts: list[list[int]] = [[]]
        used = 0
        for index in self.alive:
            size = self.n_prompts * (self.n_pos - self.starts[index])
            if parts[-1] and used + size > room:
                parts.append([])
                used = 0
            parts[-1].append(index)
            used += size
        return parts if parts[0] else []

    def _room(self) -> int:
        model = self.steps.model
        per_token = (6 * model.d_model + 4 * model.d_mlp + 4 * model.n_heads * (model.d_head + self.n_pos)) * 4
        free = _free_bytes(model.device) // 4 // per_token
        return max(1, min(free, _CPU_TOKENS) if model.device.type == "cpu" else free)

    def _chunk(self, part: list[int]) -> list[_Group]:
        groups = []
        for start in sorted({self.starts[i] for i in part}):
            cells = [i for i in part if self.starts[i] == start]
            view = torch.arange(start, self.n_pos, device=self.where.device).expand(self.n_prompts, -1)
            group = _Group(start, cells, view)
            for row, index in enumerate(cells):
                for edit in self.cells[index]:
                    group.edits.setdefault((edit.site, edit.layer), []).append((row, edit))
            groups.append(group)
        first = self.joins[part[0]][0]
        for layer in range(first, len(self.steps.layers)):
            self._layer(groups, layer)
        return groups

    def _layer(self, groups: list[_Group], layer: int) -> None:
        steps, modules = self.steps, self.steps.layers[layer]
        last = layer == len(steps.layers) - 1
        for group in groups:
            self._let_in(group, layer, 0)
            self._edit(group, "resid_pre", layer, group.stream)
        active = [group for group in groups if group.stream is not None]
        read_by_mlp: list[Tensor] = []
        if active:
            normed = _each(modules.ln1, [group.stream for group in active])
            keys = _each(lambda x: steps.keys(layer, x), normed)
            values = _each(lambda x: steps.values(layer, x), normed)
            for group, k, v in zip(active, keys, values, strict=True):
                self._edit(group, "k", layer, k)
                self._edit(group, "v", layer, v)
            tails = [steps.rotated_k(layer, k, self._rotary(group.view)) for group, k in zip(active, keys, strict=True)]
            if last:
                normed = [self._narrow(group, x) for group, x in zip(active, normed, strict=True)]
            queries = _each(lambda x: steps.queries(layer, x), normed)
            for group, q, tail, v in zip(active, queries, tails, values, strict=True):
                self._edit(group, "q", layer, q)
                group.z = self._attend(group, layer, q, tail, v)
        if last:
            for group in groups:
                group.view = self.where[:, None]
        for group in groups:
            self._let_in(group, layer, 1)
            self._edit(group, "z", layer, group.z)
        active = [group for group in groups if group.stream is not None]
        if active:
            outs = _each(lambda z: steps.attn_out(layer, z), [group.z for group in active])
            for group, out in zip(active, outs, strict=True):
                self._edit(group, "attn_out", layer, out)
                assert group.stream is not None
                read_by_mlp.append(group.stream)
                group.stream, group.z = group.stream + out, None
        for group in groups:
            self._let_in(group, layer, 2)
            self._edit(group, "resid_mid", layer, group.stream)
        active = [group for group in groups if group.stream is not None]
        if active:
            streams = [group.stream for group in active]
            posts = _each(lambda x: steps.post(layer, x), read_by_mlp if steps.parallel else streams)
            for group, post in zip(active, posts, strict=True):
                self._edit(group, "post", layer, post)
            outs = _each(lambda x: steps.mlp_out(layer, x), posts)
            for group, out in zip(active, outs, strict=True):
                self._edit(group, "mlp_out", layer, out)
                assert group.stream is not None
                group.stream = group.stream + out
        for group in groups:
            self._let_in(group, layer, 3)
            self._edit(group, "resid_post", layer, group.stream)

    def _let_in(self, group: _Group, layer: int, rank: int) -> None:
        """Give the cells that join here rows of their own, copies of the unchanged run's."""
        new = 0
        for index in group.cells[group.joined :]:
            if self.joins[index] != (layer, rank):
                break
            new += 1
        if not new:
            return
        group.joined += new
        group.stream = _append(group.stream, self._of_base(group, _JOIN_SITES[rank][0], layer), new)
        if rank == 1:
            group.z = _append(group.z, self._of_base(group, "z", layer), new)

    def _of_base(self, group: _Group, site: str, layer: int) -> Tensor:
        prompts = torch.arange(self.n_prompts, device=group.view.device)[:, None]
        return self.base[site, layer][prompts, group.view]

    def _edit(self, group: _Group, site: str, layer: int, state: Tensor | None) -> None:
        if edits := group.edits.get((site, layer)):
            assert state is not None
            apply(site, edits, state, group.view, self.source)

    def _rotary(self, view: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.frame.rotary is None:
            return None
        prompts = torch.arange(self.n_prompts, device=view.device)[:, None]
        cos, sin = (part.expand(self.n_prompts, -1, -1)[prompts, view] for part in self.frame.rotary)
        return cos, sin

    def _narrow(self, group: _Group, normed: Tensor) -> Tensor:
        """Keep the position that is read only; nothing reads the others any more."""
        prompts = torch.arange(self.n_prompts, device=group.view.device)
        at = self.where - group.start
        assert group.stream is not None
        group.stream = group.stream[:, prompts, at].unsqueeze(2)
        group.view = self.where[:, None]
        return normed[:, prompts, at].unsqueeze(2)

    def _attend(self, group: _Group, layer: int, queries: Tensor, tail: Tensor, values: Tensor) -> Tensor:
        """Attention of the rows' own queries to the shared earlier positions and to the rows' own later ones."""
        steps = self.steps
        prompts = torch.arange(self.n_prompts, device=group.view.device)[:, None]
        allowed = steps.allowed(layer, self.frame)[prompts, group.view]  # [batch q_pos k_pos]
        queries = steps.rotated_q(layer, queries, self._rotary(group.view))
        queries = queries.unflatten(3, (steps.n_key_value_heads, -1))
        shared_keys = self.base["rotated_k", layer][:, : group.start]
        scores = torch.cat(
            [
                torch.einsum("nbqgrd,bkgd->nbgrqk", queries, shared_keys),
                torch.einsum("nbqgrd,nbkgd->nbgrqk", queries, tail),
            ],
            -1,
        )
        scores = steps.capped(scores.flatten(2, 3) * steps.scale).masked_fill(~allowed[:, None], float("-inf"))
        self._edit(group, "attn_scores", layer, scores)
        pattern = steps.pattern(scores)
        self._edit(group, "pattern", layer, pattern)
        pattern = pattern.unflatten(2, (steps.n_key_value_heads, -1))
        mixed = torch.einsum("nbgrqk,nbkgd->nbqgrd", pattern[..., group.start :], values)
        shared = torch.einsum(
            "nbgrqk,bkgd->nbqgrd", pattern[..., : group.start], self.base["v", layer][:, : group.start]
        )
        return (mixed + shared).flatten(3, 4)

    def _score(self, streams: Tensor) -> Tensor:
        """The metric of streams after the last layer, at the positions read: `[row batch d_model]`."""
        rows, prompts = streams.shape[:2]
        owner = torch.arange(prompts, device=streams.device).expand(rows, -1).reshape(-1)
        if self.read.tokens is not None:
            logits = self.steps.logits_of(streams, self.read.tokens.to(streams.device))
            scored = self.read.score(logits.flatten(0, 1), owner)
        else:
            # A vocabulary of 250,000 and a thousand rows would be a gigabyte: a few rows at a time.
            flat = streams.flatten(0, 1)
            parts = [
                self.read.score(self.steps.logits(flat[some]), owner[some])
                for some in batches(len(flat), max(1, 2**25 // self.steps.model.d_vocab))
            ]
            scored = torch.cat(parts)
        return scored.float().unflatten(0, (rows, prompts))


def trace(steps: Program, tokens: Tensor, mask: Tensor | None, wanted: set[tuple[str, int]]) -> Activations:
    """Some activations of one unchanged pass.

    Args:
        steps: of a model.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.
        wanted: (site, layer); "rotated_k" keeps the keys as attention reads them.

    Returns:
        {(site, layer): activation}. Cost: one forward pass up to the last layer wanted; memory for what is kept.
    """
    frame = steps.frame(tokens, mask)
    stream = steps.embed(tokens, mask)
    kept: dict[tuple[str, int], Tensor] = {}
    for layer in range(max(layer for _, layer in wanted) + 1):
        seen = steps.layer(layer, stream, frame)
        kept.update({(site, layer): seen[site] for site in seen if (site, layer) in wanted})
        stream = seen["resid_post"]
    return kept


def _append(rows: Tensor | None, row: Tensor, times: int) -> Tensor:
    new = row.expand(times, *row.shape)
    return new.clone() if rows is None else torch.cat([rows, new])


def _each(step: Callable[[Tensor], Tensor], parts: Sequence[Tensor | None]) -> list[Tensor]:
    """A step that treats each token alone, on the tokens of several groups at once."""
    whole = [part for part in parts if part is not None]
    if len(whole) == 1:
        return [step(whole[0])]
    done = step(torch.cat([part.flatten(0, 2) for part in whole]))
    sizes = [part.shape[:3] for part in whole]
    return [
        piece.unflatten(0, size)
        for piece, size in zip(done.split([size.numel() for size in sizes]), sizes, strict=True)
    ]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * 2**30  # macOS and Windows do not tell this way
