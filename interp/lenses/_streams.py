"""What do translators learn from? Streams of all layers and the model's predictions, cached or made in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from interp.core.batching import batches
from interp.lenses._divergence import Targets, targets
from interp.lenses._final import FinalNorm, final_norm
from interp.lenses._output import Output, output
from interp.lenses.cached import Cached, _text
from interp.models.hooks import run
from interp.models.model import Model
from interp.tasks.corpus import Windows
from interp.tasks.task import Task

Text = Cached | Windows | Task | Tensor

#: Tokens whose streams of all layers are in memory together.
_ROWS = 512


@dataclass(frozen=True)
class Batch:
    """Some tokens: what lenses read, and what they should predict.

    `hidden` gives the stream before a layer, `[token d_model]` in float32; `r` `[token d_model]` is the final norm's
    output and `scale` `[token]` its 1 / sigma; `make` gives the targets.
    """

    hidden: Callable[[int], Tensor]
    r: Tensor
    scale: Tensor
    make: Callable[[], Targets]

    @cached_property
    def known(self) -> Targets:
        """The targets, made once for all layers, with E_p[b_U] as `extra` where there is a b_U."""
        return self.make()


@dataclass(frozen=True)
class Streams:
    """A text in batches. It consists of `units`, tokens or windows, of `per_unit` tokens each.

    `get` makes the batch of some units; `fingerprint` is that of the text and of what was left out of it.
    """

    get: Callable[[Tensor], Batch]
    units: int
    per_unit: int
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        """Tokens of all units."""
        return self.units * self.per_unit

    def step(self, index: int, size: int, seed: int) -> Iterator[Batch]:
        """The batches of one step of `size` units.

        They depend on these numbers alone, so that a run can go on in the middle. Each epoch has an order of its own.
        """
        a_epoch = self.units // size
        order = np.random.default_rng([seed, index // a_epoch]).permutation(self.units)
        first = index % a_epoch * size
        return self._batches(torch.from_numpy(order[first : first + size]))

    def everything(self) -> Iterator[Batch]:
        """All tokens, in the order of the text."""
        return self._batches(torch.arange(self.units))

    def _batches(self, units: Tensor) -> Iterator[Batch]:
        for part in batches(len(units), max(1, _ROWS // self.per_unit)):
            yield self.get(units[part])


def streams(model: Model, text: Text, layers: Sequence[int], skip: int) -> Streams:
    """A text for the translators of some layers.

    Args:
        model: a decoder.
        text: cached activations of site "resid"; or windows, a task without padding, or token ids `[window pos]`.
        layers: whose streams are read.
        skip: first positions of each window that are left out; cached activations have their own.

    Returns:
        The Streams.

    Raises:
        ValueError: activations of another model, site or layers, another tokenizer, padding, or nothing left.
    """
    way, norm = output(model), final_norm(model)
    if isinstance(text, Cached):
        return _cached(model, way, text, layers)
    tokens, mask, _, fingerprint = _text(model, text)
    if not bool(mask.all()):
        raise ValueError("the prompts are of unequal length: cut the text in windows, corpus(...).windows(128).")
    if skip < 0 or tokens.shape[1] <= skip:
        raise ValueError(f"skip={skip} leaves no token of windows of {tokens.shape[1]}: give longer windows.")

    def get(units: Tensor) -> Batch:
        return _pass(model, way, norm, tokens[units].to(model.device), layers, skip)

    return Streams(get, len(tokens), tokens.shape[1] - skip, f"{fingerprint} without the first {skip}")


@torch.no_grad()
def _pass(model: Model, way: Output, norm: FinalNorm, tokens: Tensor, layers: Sequence[int], skip: int) -> Batch:
    """One pass for all layers; the unembedding is left to the targets."""
    names = {layer: f"blocks.{layer}.hook_resid_pre" for layer in layers}
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    seen = run(model, tokens, capture=[*names.values(), last], stop_after=model.n_layers - 1).cache
    final = seen[last][:, skip:].flatten(0, 1)
    r = norm.norm(final).float()
    return Batch(
        lambda layer: seen[names[layer]][:, skip:].flatten(0, 1).float(), r, norm.inverse_scale(final.float(), r),
        lambda: _targets(way, r),
    )  # fmt: skip


def _targets(way: Output, r: Tensor) -> Targets:
    extra = None if way.bias is None else way.bias[:, None]
    return targets(way.unembed, way.bias, r, cap=way.cap, extra=extra)


def _cached(model: Model, way: Output, text: Cached, layers: Sequence[int]) -> Streams:
    text.require(model, site="resid")
    if missing := [layer for layer in layers if layer not in text.layers]:
        raise ValueError(
            f"layer {missing[0]} was not cached, only {list(text.layers)}: cache the text with that layer, or train "
            "the others with layers=."
        )
    # E_p[b_U] is not cached: the few models with a b_U need one more walk over the vocabulary.
    of_bias = [torch.zeros(len(text), 0, device=model.device)]
    if way.bias is not None:
        of_bias = [_targets(way, text.r[rows].to(model.device)).extra for rows in batches(len(text), _ROWS)]
    extra = torch.cat(of_bias)

    def get(units: Tensor) -> Batch:
        r, scale = (part[units].to(model.device) for part in (text.r, text.scale))
        return Batch(
            lambda layer: text.activation(layer, units), r, scale,
            lambda: text.targets(units)._replace(extra=extra[units.to(extra.device)]),
        )  # fmt: skip

    return Streams(get, len(text), 1, text.fingerprint)
