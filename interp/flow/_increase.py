"""By how much does a vector raise a token's log-probability? Exactly, for the few of many that raise it most.

With x a stream, v a vector and bs the frozen final norm and unembedding, the increase of the token w is

    Imp(v|x) = log softmax(bs(x + v))[w] - log softmax(bs(x))[w] = d[w] - log E[exp d],   d = bs(x + v) - bs(x)

where E is the mean over the vocabulary under softmax(bs(x)). By Jensen's inequality log E[exp d] >= E[d], so

    Imp(v|x) <= d[w] - E[d] = v . pull(W[w] - E[W])

which is one product with d_model numbers. Only vectors whose bound reaches the k-th best found are evaluated exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from interp.core.batching import batches
from interp.flow._direct import Frozen

#: Vectors that are evaluated exactly together.
_CHUNK = 16
#: Logits in memory together.
_LOGITS = 2**23
#: Rounding of float32 in bounds and increases (nats): logits of some tens, whose exponentials are summed.
_SLACK = 1e-4


class Bases(NamedTuple):
    """Streams of one prompt, to which vectors are added.

    `logits` `[n d_vocab]`; `log_z` `[n]`, the log of the sum of their exponentials; `log_p` `[n]` of the target;
    `bound` `[n d_model]`, the direction whose product with a vector bounds its increase.
    """

    logits: Tensor
    log_z: Tensor
    log_p: Tensor
    bound: Tensor


def log_probs(head: Frozen, streams: Tensor, target: Tensor) -> Tensor:
    """The log-probability of the target `[batch]` in streams `[n batch d_model]`, `[n batch]`."""
    found = []
    for some in batches(len(streams), max(1, _LOGITS // (streams.shape[1] * head.steps.model.d_vocab))):
        logits = head.logits(streams[some].transpose(0, 1))
        own = logits.gather(2, target[:, None, None].expand(-1, logits.shape[1], 1))[:, :, 0]
        found.append((own - logits.logsumexp(2)).T)
    return torch.cat(found)


def bases(head: Frozen, streams: Tensor, target: int) -> Bases:
    """The Bases of one prompt's streams `[n d_model]`; `head` is that prompt's."""
    logits = head.logits(streams[None])[0]
    log_z = logits.logsumexp(1)
    expected = head.expected((logits - log_z[:, None]).exp())
    ids = torch.tensor([target], device=logits.device)
    row = head.steps.directions(ids)[0].to(expected.dtype)
    return Bases(logits, log_z, logits[:, target] - log_z, head.pull(row - expected))


def increases(head: Frozen, base: Bases, index: int, vectors: Tensor, target: int) -> Tensor:
    """Imp of vectors `[n d_model]` at one base, `[n]`, exactly. Cost: n times d_model x d_vocab."""
    change = head.change(vectors[None])[0]
    gained = change[:, target].clone()
    return gained - (change.add_(base.logits[index]).logsumexp(1) - base.log_z[index])


class Strongest:
    """The k largest values among all vectors offered so far.

    Attributes:
        found: `[n]`, largest first.
        where: (layer, number within the layer) of each, `[n 2]`.
        n_offered, n_evaluated: how many vectors there were, and how many were evaluated exactly.
    """

    def __init__(self, k: int, like: Tensor) -> None:
        self.k = k
        self.found = like.new_empty(0)
        self.where = torch.empty(0, 2, device=like.device, dtype=torch.long)
        self.n_offered = self.n_evaluated = 0

    def keep(self, layer: int, values: Tensor, *, magnitude: bool) -> None:
        """Let values `[n]` of one layer in that are known already, ranked by magnitude or by value."""
        top = (values.abs() if magnitude else values).topk(min(self.k, len(values))).indices
        self._take(layer, top, values[top], magnitude=magnitude)
        self.n_offered += len(values)

    def offer(self, layer: int, bounds: Tensor, exact: Callable[[Tensor], Tensor]) -> None:
        """Let the vectors of one layer in, evaluated only where they can be among the k.

        Args:
            layer: whose they are.
            bounds: of their values from above, `[n]`; -inf for those that do not count.
            exact: from numbers `[m]` to values `[m]`.
        """
        self.n_offered += int(bounds.isfinite().sum())
        near = (bounds > self._bar()).nonzero()[:, 0]
        order = near[bounds[near].argsort(descending=True, stable=True)]
        for some in order.split(_CHUNK):
            some = some[bounds[some] > self._bar()]
            if not len(some):
                break
            self.n_evaluated += len(some)
            self._take(layer, some, exact(some), magnitude=False)

    def _bar(self) -> float:
        return float(self.found[-1]) - _SLACK if len(self.found) == self.k else -float("inf")

    def _take(self, layer: int, index: Tensor, values: Tensor, *, magnitude: bool) -> None:
        both = torch.cat([self.found, values.to(self.found.dtype)])
        places = torch.cat([self.where, torch.stack([torch.full_like(index, layer), index], 1)])
        order = (both.abs() if magnitude else both).argsort(descending=True, stable=True)[: self.k]
        self.found, self.where = both[order], places[order]
