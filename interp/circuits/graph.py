"""Which edges does a decoder have? Its components as a graph, with keys and values as the model groups them.

Every component reads the sum of what the components before it wrote, so an edge is a pair of one that writes and an
input that reads. Names are those of `interp.models.planted` and, for models without groups, of the MIB benchmark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from interp.models.model import Model
from interp.models.program import NoProgramError, program

INPUT, LOGITS = "input", "logits"

_NODE = re.compile(r"^(?:a(?P<layer>\d+)\.h(?P<head>\d+)|m(?P<mlp>\d+))$")


class Destination(NamedTuple):
    """An input.

    Attributes:
        name: "a1.h0<q>", "a1.g0<k>" (of a key-value group that several heads share), "m1" or "logits".
        kind: "q", "k", "v", "mlp" or "logits".
        layer: counted from 0; that after the last for the logits.
        place: query head, or key-value group (or head, where the graph is expanded); 0 for the others.
        nodes: the sources whose output depends on it: for a key or value all heads that read it.
        n_before: how many sources it reads; the first so many of `Graph.sources`.
    """

    name: str
    kind: str
    layer: int
    place: int
    nodes: tuple[str, ...]
    n_before: int


@dataclass(frozen=True)
class Graph:
    """The graph of a model's sizes.

    Attributes:
        n_layers, n_heads: of the model.
        n_key_value_heads: how many keys and values a layer has; as many as `n_heads` where each head has its own, or
            where the graph is expanded.
        parallel: whether an MLP reads the stream before the attention of its layer (GPT-NeoX).
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, model: Model, *, grouped: bool = True) -> Graph:
        """The graph of a model.

        Args:
            model: a decoder.
            grouped: whether a key or value that several heads share is one input, as in the model, or one a head.

        Returns:
            The Graph.

        Raises:
            NoProgramError: the model has no layer-by-layer program, or its heads do not add up (Gemma 2).
        """
        steps = program(model)
        if not steps.heads_add:
            raise NoProgramError(
                f"{model.name} normalises attention's output: no head writes a part of its own, so there are no edges "
                "from heads. Use interp.patching.path or activation, which patch what its heads hold."
            )
        groups = steps.n_key_value_heads if grouped else steps.n_heads
        return cls(len(steps.layers), steps.n_heads, groups, steps.parallel)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """What writes, in the order of computation: "input" (the embeddings), then "a0.h0" ..., "m0", "a1.h0" ..."""
        names = [INPUT]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @cached_property
    def destinations(self) -> tuple[Destination, ...]:
        """What reads, in the order of computation."""
        found = []
        per_group, width = self.n_heads // self.n_key_value_heads, self.n_heads + 1
        letter = "h" if per_group == 1 else "g"
        for layer in range(self.n_layers):
            heads, before = [f"a{layer}.h{head}" for head in range(self.n_heads)], 1 + width * layer
            found += [Destination(f"{h}<q>", "q", layer, i, (h,), before) for i, h in enumerate(heads)]
            for kind in "kv":
                for group in range(self.n_key_value_heads):
                    readers = tuple(heads[group * per_group : (group + 1) * per_group])
                    name = f"a{layer}.{letter}{group}<{kind}>"
                    found.append(Destination(name, kind, layer, group, readers, before))
            seen = before if self.parallel else before + self.n_heads
            found.append(Destination(f"m{layer}", "mlp", layer, 0, (f"m{layer}",), seen))
        found.append(Destination(LOGITS, "logits", self.n_layers, 0, (), len(self.sources)))
        return tuple(found)

    @cached_property
    def source_index(self) -> dict[str, int]:
        """Number of each source, by name."""
        return {name: index for index, name in enumerate(self.sources)}

    @cached_property
    def destination_index(self) -> dict[str, int]:
        """Number of each destination, by name."""
        return {each.name: index for index, each in enumerate(self.destinations)}

    @cached_property
    def possible(self) -> np.ndarray:
        """Which edges there are, bool `[dst src]`."""
        before = np.array([each.n_before for each in self.destinations])
        return np.arange(len(self.sources))[None] < before[:, None]

    @cached_property
    def of_node(self) -> np.ndarray:
        """Which sources depend on which inputs, bool `[dst src]`."""
        found = np.zeros_like(self.possible)
        for row, each in enumerate(self.destinations):
            found[row, [self.source_index[node] for node in each.nodes]] = True
        return found

    @cached_property
    def read_by(self) -> np.ndarray:
        """Number of the input that each head reads its query, key and value from, `[3 layer head]`."""
        rows = np.zeros((3, self.n_layers, self.n_heads), dtype=np.int64)
        for row, each in enumerate(self.destinations):
            if each.kind in "qkv":
                for node in each.nodes:
                    layer, head = at(node)
                    rows["qkv".index(each.kind), layer, head] = row
        return rows

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.possible.sum())

    def edge(self, src: str, dst: str) -> tuple[int, int]:
        """(row, column) of an edge in every `[dst src]` array.

        Args:
            src: name of a source.
            dst: name of a destination.

        Returns:
            Their numbers.

        Raises:
            ValueError: no such name, or no such edge.
        """
        if src not in self.source_index:
            raise ValueError(f"no source {src!r}: sources are 'input', heads such as 'a0.h0' and MLPs such as 'm0'.")
        if dst not in self.destination_index:
            raise ValueError(
                f"no destination {dst!r}: destinations are {', '.join(repr(d.name) for d in self.destinations[:1])}, "
                f"{self.destinations[self.n_heads].name!r} ..., 'm0' and 'logits'."
            )
        row, column = self.destination_index[dst], self.source_index[src]
        if not self.possible[row, column]:
            raise ValueError(f"{src!r} comes after {dst!r} has been read: there is no such edge.")
        return row, column


def at(node: str) -> tuple[int, int]:
    """(layer, head) of a head's name, (layer, -1) of an MLP's.

    Args:
        node: for example "a1.h0" or "m1".

    Returns:
        The numbers.

    Raises:
        ValueError: another name.
    """
    match = _NODE.match(node)
    if match is None:
        raise ValueError(f"{node!r} is neither a head such as 'a1.h0' nor an MLP such as 'm1'.")
    if match["mlp"] is not None:
        return int(match["mlp"]), -1
    return int(match["layer"]), int(match["head"])
