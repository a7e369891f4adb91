"""How does a metric change with what each input reads, and how much of that is each source's? All edges of a batch.

The score of an edge u -> v is the sum over positions of (off_u - clean_u) . G_v, with G_v the gradient of the metric by
the stream as v reads it. No array has a d_model for each node: differences are kept as heads and MLPs hold them, and
gradients as queries and keys hold them; both are widened for a few layers at a time, where one matrix multiplication
gives the scores of all edges between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from interp.circuits._edge_maps import Norm, Rules, back, norm_of, reads, ruled, widened
from interp.circuits.graph import Graph
from interp.core.readout import Readout
from interp.models.program import Frame, Program
from interp.patching._gradients import _score as metric_of

#: Bytes of the two widened arrays on a CPU: larger ones make no multiplication faster.
_GRADIENTS, _SOURCES = 2**26, 2**25


@dataclass
class Run:
    """One run, with what a backward pass through it reads, by layer.

    Attributes:
        first: the layer it starts at.
        pre, mid: what attention and the MLP read `[batch pos d_model]`, from layer `first` on.
        qkv: queries, keys and values, before any norm or rotation of their own.
        gated: what the activation function gets and, where the MLP is gated, what that is multiplied with.
        z, mlp: what heads and MLPs write, where it was asked for.
        last: the final stream.
    """

    first: int
    pre: list[Tensor] = field(default_factory=list)
    mid: list[Tensor] = field(default_factory=list)
    qkv: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    gated: list[tuple[Tensor, ...]] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    last: Tensor = torch.empty(0)


class Place(NamedTuple):
    """A place in the stream: before the attention of a layer, or (`after`) before the MLP that comes after it."""

    layer: int
    after: bool = False


class Setting(NamedTuple):
    """What all runs of a batch share: the program (with rules), the graph, who sees whom, and the metric."""

    steps: Program
    graph: Graph
    frame: Frame
    read: Readout
    rules: Rules


def forward(setting: Setting, stream: Tensor, start: Place, *, kept: bool, written: bool) -> Run:
    """One run from a place in the stream on.

    Args:
        setting: of the batch.
        stream: `[batch pos d_model]` there.
        start: the place.
        kept: whether to keep what a backward pass reads.
        written: whether to keep what heads and MLPs write.

    Returns:
        The Run.
    """
    steps, run = setting.steps, Run(start.layer)
    with torch.no_grad():
        for layer in range(start.layer, len(steps.layers)):
            modules, pre = steps.layers[layer], stream
            qkv: tuple[Tensor, ...] = ()
            if not (start.after and layer == start.layer):
                normed = modules.ln1(pre)
                qkv = steps.queries(layer, normed), steps.keys(layer, normed), steps.values(layer, normed)
                z = _mix(setting, layer, *qkv)
                stream = pre + steps.attn_out(layer, z)
                if written:
                    run.z.append(z)
            mid = pre if steps.parallel else stream
            normed = modules.ln2(mid)
            gated = (modules.up(normed),) if modules.gate is None else (modules.gate(normed), modules.up(normed))
            out = steps.mlp_out(layer, _product(steps, gated))
            stream = stream + out
            if written:
                run.mlp.append(out)
            if kept:
                run.pre.append(pre)
                run.mid.append(mid)
                run.qkv.append(qkv)  # type: ignore[arg-type]
                run.gated.append(gated)
    run.last = stream
    return run


def _mix(setting: Setting, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What heads hold `[batch pos head d_head]`, from queries and keys that are grouped as in the model, or not."""
    steps, frame = setting.steps, setting.frame
    if k.shape[-2] != steps.n_key_value_heads:
        steps = replace(steps, n_key_value_heads=k.shape[-2])
    rotated = steps.rotated_q(layer, q, frame.rotary), steps.rotated_k(layer, k, frame.rotary)
    pattern = steps.pattern(steps.scores(*rotated, steps.allowed(layer, frame)))
    return steps.mix(pattern.detach() if setting.rules.attention else pattern, v)


def _product(steps: Program, gated: tuple[Tensor, ...]) -> Tensor:
    """`mlp.hook_post` of what the activation function gets and what that is multiplied with."""
    return steps.act(gated[0]) * gated[1] if len(gated) == 2 else steps.act(gated[0])


@dataclass
class Deltas:
    """off - clean of every source of a batch: the embeddings, and by layer what heads hold and what MLPs write."""

    embed: Tensor
    z: list[Tensor]
    mlp: list[Tensor]

    @property
    def n_groups(self) -> int:
        """Groups of sources: the input, then in each layer the heads and the MLP."""
        return 1 + 2 * len(self.z)

    def width(self, group: int) -> int:
        """How many sources a group has."""
        return self.z[0].shape[-2] if group % 2 else 1

    def columns(self, groups: range) -> slice:
        """Where some groups stand among the sources."""
        first = sum(self.width(group) for group in range(groups.start))
        return slice(first, first + sum(self.width(group) for group in groups))

    def wide(self, steps: Program, groups: range) -> Tensor:
        """What they add to the stream, `[src batch pos d_model]`."""
        parts = []
        for group in groups:
            layer = (group - 1) // 2
            if group == 0:
                parts.append(widened(self.embed)[None])
            elif group % 2:
                z = widened(self.z[layer])  # [batch pos head d_head]
                out = torch.bmm(z.flatten(0, 1).transpose(0, 1), widened(steps.w_o(layer).detach()))
                parts.append(out.unflatten(1, z.shape[:2]))
            else:
                parts.append(widened(self.mlp[layer])[None])
        return torch.cat(parts)


class Edges:
    """Scores `[batch dst src]` that grow as gradients arrive, from the last destination to the first."""

    def __init__(self, setting: Setting, deltas: Deltas, counted: Tensor | None) -> None:
        """No score yet.

        Args:
            setting: of the batch.
            deltas: of the sources.
            counted: positions of destinations that count, `[batch pos]`, or None for all.
        """
        self.setting, self.deltas = setting, deltas
        self.counted = None if counted is None else counted.to(widened(deltas.embed).dtype)
        graph, like = setting.graph, widened(deltas.embed)
        self.scores = like.new_zeros(len(like), len(graph.destinations), len(graph.sources))
        self.before = [each.n_before for each in graph.destinations]
        self.per_layer = graph.n_heads + 2 * graph.n_key_value_heads + 1
        self.groups = range(deltas.n_groups)
        layers = max(1, _GRADIENTS // (self.per_layer * like.numel() * like.element_size()))
        self.buffer = like.new_empty(min(layers, graph.n_layers) * self.per_layer + 1, *like.shape)
        self.low = self.high = len(graph.destinations)

    def rows(self, first: int, n: int) -> Tensor:
        """Room for the gradients of n destinations, `[n batch pos d_model]`; the next ones are those before."""
        assert first + n == self.low, "destinations come from the last to the first"
        if self.high - first > len(self.buffer):
            self.finish()
            self.high = self.low
        self.low = first
        start = len(self.buffer) - (self.high - first)
        return self.buffer[start : start + n]

    def finish(self) -> None:
        """Add the scores of the gradients that are there, for the groups of sources that are asked for."""
        if self.low == self.high:
            return
        gradients = self.buffer[len(self.buffer) - (self.high - self.low) :]
        if self.counted is not None:
            gradients *= self.counted[None, :, :, None]
        left = gradients.flatten(2).transpose(0, 1)  # [batch dst pos*d_model]
        group = self.groups.start
        while group < self.groups.stop:
            some = range(group, self._upto(group))
            columns = self.deltas.columns(some)
            if columns.start >= self.before[self.high - 1]:
                break
            right = self.deltas.wide(self.setting.steps, some).flatten(2).permute(1, 2, 0)
            self.scores[:, self.low : self.high, columns] += torch.bmm(left, right)
            group = some.stop
        self.high = self.low

    def restart(self, groups: range) -> None:
        """Start again at the last destination, for some groups of sources."""
        self.finish()
        self.low = self.high = len(self.before)
        self.groups = groups

    def _upto(self, group: int) -> int:
        """The end of as many groups as may be wide at a time."""
        one = self.deltas.embed.numel() * self.scores.element_size()
        end, size = group + 1, self.deltas.width(group) * one
        while end < self.groups.stop and (size := size + self.deltas.width(end) * one) <= _SOURCES:
            end += 1
        return end


@dataclass(frozen=True)
class Maps:
    """What a backward pass needs of a model beside its program: the norms of each layer, taken apart."""

    first: tuple[Norm, ...]
    second: tuple[Norm, ...]

    @classmethod
    def of(cls, steps: Program) -> Maps:
        """The norms of a program."""
        return cls(tuple(norm_of(each.ln1) for each in steps.layers), tuple(norm_of(each.ln2) for each in steps.layers))


def backward(setting: Setting, maps: Maps, runs: Sequence[Run], share: float, edges: Edges, stop: Place) -> None:
    """Give `edges` the gradients by all that reads the stream from a place on, added up over some runs.

    Args:
        setting: of the batch.
        maps: of the model.
        runs: that start at the place or before it.
        share: what each run's gradient is multiplied with.
        edges: where the scores are.
        stop: the place.
    """
    steps, copies = setting.steps, setting.graph.n_key_value_heads // setting.steps.n_key_value_heads
    streams = [_of_metric(setting, run.last) * share for run in runs]
    edges.rows(edges.low - 1, 1)[0] = torch.stack(streams).sum(0)
    for layer in reversed(range(stop.layer, len(steps.layers))):
        first, modules = layer * edges.per_layer, steps.layers[layer]
        by_mlp = torch.zeros_like(streams[0])
        outs = []
        for index, run in enumerate(runs):
            at, norm = layer - run.first, maps.second[layer]
            by_gated = _by_gated(setting, run.gated[at], back(modules.down, streams[index]))
            by_normed = back(modules.up, by_gated[-1])
            if modules.gate is not None:
                by_normed = by_normed + back(modules.gate, by_gated[0])
            by_mid = norm.back(by_normed, *norm.parts(run.mid[at]), frozen=setting.rules.lrp)
            by_mlp += by_mid
            outs.append(streams[index] if steps.parallel else streams[index] + by_mid)
            streams[index] = streams[index] + by_mid
        edges.rows(first + edges.per_layer - 1, 1)[0] = by_mlp
        if layer == stop.layer and stop.after:
            break
        read = reads(steps, layer, maps.first[layer], copies)
        by_heads, levels = torch.zeros(()), []
        for index, run in enumerate(runs):
            at = layer - run.first
            normed, scale = read.norm.parts(run.pre[at])
            leaves = [part.repeat_interleave(n, -2) for part, n in zip(run.qkv[at], (1, copies, copies), strict=True)]
            by_reads = _by_qkv(setting, layer, leaves, outs[index]) * scale[..., None]  # [batch pos read d_head]
            # The part of each gradient along the normed stream, which the norm's scale takes away.
            level = (by_reads * (widened(torch.cat(leaves, -2)) - read.constant)).sum(-1) / normed.shape[-1]
            if setting.rules.lrp:
                level = torch.zeros_like(level)
            levels.append((level, normed))
            by_heads = by_heads + by_reads if index else by_reads
            if layer > stop.layer:
                by_pre = by_reads.flatten(-2) @ read.rows.flatten(0, 1)
                streams[index] = streams[index] + by_pre - normed * level.sum(-1, keepdim=True)
        wide = edges.rows(first, len(read.rows))
        torch.bmm(by_heads.flatten(0, 1).transpose(0, 1), read.rows, out=wide.flatten(1, 2))
        if not setting.rules.lrp:
            for level, normed in levels:
                wide.addcmul_(level.permute(2, 0, 1)[..., None], normed[None], value=-1)


def _of_metric(setting: Setting, last: Tensor) -> Tensor:
    """The gradient of the metric by the final stream."""
    leaf = last.detach().requires_grad_()
    with torch.enable_grad():
        metric = metric_of(setting.steps, leaf, setting.read)
    if metric.ndim != 1:
        raise ValueError(
            f"metric {setting.read.name!r} has several numbers a prompt, and a gradient is of one: take a Readout with "
            "one, or a name such as 'logit_diff'."
        )
    return widened(torch.autograd.grad(metric.sum(), leaf)[0])


def _by_gated(setting: Setting, gated: tuple[Tensor, ...], gradient: Tensor) -> list[Tensor]:
    """The gradients by what the activation function gets and by what that is multiplied with."""
    leaves = tuple(part.detach().requires_grad_() for part in gated)
    with torch.enable_grad():
        product = _product(setting.steps, leaves)
    found = torch.autograd.grad(product, leaves, gradient.to(product.dtype))
    half = 0.5 if setting.rules.lrp and len(found) == 2 else 1.0
    return [widened(part) * half for part in found]


def _by_qkv(setting: Setting, layer: int, qkv: Sequence[Tensor], by_out: Tensor) -> Tensor:
    """The gradients by queries, keys and values, `[batch pos read d_head]`, from that by attention's output."""
    leaves = [part.detach().requires_grad_() for part in qkv]
    with torch.enable_grad():
        z = _mix(setting, layer, *leaves)
    by_z = back(setting.steps.layers[layer].o, by_out).view_as(z).to(z.dtype)
    found = torch.autograd.grad(z, leaves, by_z, allow_unused=True)
    parts = [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True)]
    return widened(torch.cat(parts, -2))


class Plan(NamedTuple):
    """What is computed.

    Attributes:
        ablation: what a cut edge carries: "corrupt" is that of the other prompts, all else values given.
        distances: of the points where gradients are taken from the clean run; the other end is at 1.
        along: "embedding", or "activation": the outputs of one layer's heads, or of one MLP, alone.
        rules: what stands in for derivatives.
    """

    ablation: str
    distances: tuple[float, ...]
    along: str
    rules: Rules


class Prompts(NamedTuple):
    """A batch: token ids `[batch pos]`, their mask, the positions of destinations that count, and the metric."""

    clean: Tensor
    corrupt: Tensor | None
    mask: Tensor | None
    counted: Tensor | None
    read: Readout


def edge_scores(
    steps: Program, maps: Maps, graph: Graph, plan: Plan, prompts: Prompts, means: Callable[[str, int], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scores of all edges for some prompts.

    Args:
        steps: of the model, its own.
        maps: of it.
        graph: of it.
        plan: what is computed.
        prompts: the batch.
        means: from (site, layer) to what a source writes in the off run, where that is no other prompt's.

    Returns:
        Scores `[batch dst src]`, meaningless where there is no edge; the metric of the clean and of the corrupted run
        `[batch]`, None where there is none.
    """
    setting = Setting(
        ruled(steps, plan.rules), graph, steps.frame(prompts.clean, prompts.mask), prompts.read, plan.rules
    )
    share, start = 1 / len(plan.distances), Place(0)
    with torch.no_grad():
        base = steps.embed(prompts.clean, prompts.mask)
        kept = 0.0 in plan.distances or plan.along == "activation"
        clean = forward(setting, base, start, kept=kept, written=True)
        corrupt = None
        if prompts.corrupt is not None:
            other = steps.embed(prompts.corrupt, prompts.mask)
            kept = 1.0 in plan.distances and plan.along == "embedding"
            corrupt = forward(setting, other, start, kept=kept, written=plan.ablation == "corrupt")
        metrics = [None if run is None else metric_of(steps, run.last, prompts.read) for run in (clean, corrupt)]
        if plan.ablation == "corrupt":
            assert corrupt is not None
            deltas = Deltas(other - base, _less(corrupt.z, clean.z), _less(corrupt.mlp, clean.mlp))
        else:
            off = {site: [means(site, layer) for layer in range(graph.n_layers)] for site in ("z", "mlp_out")}
            deltas = Deltas(means("resid_pre", 0) - base, _less(off["z"], clean.z), _less(off["mlp_out"], clean.mlp))
        clean.z, clean.mlp = [], []
    edges = Edges(setting, deltas, prompts.counted)
    if plan.along == "embedding":
        ends = {0.0: clean, 1.0: corrupt}
        runs = [
            ends.get(d) or forward(setting, base + d * deltas.embed, start, kept=True, written=False)
            for d in plan.distances
        ]
        backward(setting, maps, runs, share, edges, start)
    else:
        if 0.0 in plan.distances:  # the clean run is on the way of each group
            backward(setting, maps, [clean], share, edges, start)
        for group in range(deltas.n_groups):
            edges.restart(range(group, group + 1))
            place, stream = _joins(setting, clean, group)
            change = deltas.wide(steps, edges.groups).sum(0).to(stream.dtype)
            ways = [stream + d * change for d in plan.distances if d != 0]
            runs = [forward(setting, way, place, kept=True, written=False) for way in ways]
            if runs:
                backward(setting, maps, runs, share, edges, place)
    edges.finish()
    assert metrics[0] is not None
    return edges.scores, metrics[0], metrics[1]


def _joins(setting: Setting, clean: Run, group: int) -> tuple[Place, Tensor]:
    """Where in the stream a group of sources writes, and the clean stream there."""
    if group == 0:
        return Place(0), clean.pre[0]
    layer = (group - 1) // 2
    if group % 2 and not setting.steps.parallel:
        return Place(layer, after=True), clean.mid[layer]
    after = layer + 1
    return Place(after), clean.pre[after] if after < len(clean.pre) else clean.last


def _less(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [widened(one) - widened(other) for one, other in zip(first, second, strict=True)]
