"""How does a stream become logits? The model's own final norm, unembedding and cap, out of their wrappers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.core.batching import batches
from interp.models.hooks import run
from interp.models.model import Model
from interp.patching._inputs import require_decoder

#: Logits that are in memory together: 2^22 float32 are 16 MB.
_TILE = 2**22


class Output(NamedTuple):
    """What stands between the last stream and the model's logits.

    `norm` is the final norm, of streams `[... d_model]`; `linear` the unembedding in the model's own arithmetic, and
    `unembed` `[d_model d_vocab]` and `bias` `[d_vocab]` (None for none) its parts; `cap` the c of c tanh(x / c) that
    Gemma 2 applies to logits, or None.
    """

    norm: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    unembed: Tensor
    bias: Tensor | None
    cap: float | None

    def logits(self, streams: Tensor) -> Tensor:
        """Logits `[... d_vocab]` of streams `[... d_model]`, as the model makes them of its last one.

        In float32 at least: a log-probability taken in bfloat16 is off by up to 0.06 nats.
        """
        found = self.linear(self.norm(streams))
        found = found if self.cap is None else self.cap * torch.tanh(found / self.cap)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def log_probs(self, streams: Tensor) -> Tensor:
        """Log-probabilities `[... d_vocab]` of streams `[... d_model]`, in nats."""
        return self.logits(streams).log_softmax(-1)


_KNOWN: weakref.WeakKeyDictionary[Any, Output] = weakref.WeakKeyDictionary()


def output(model: Model) -> Output:
    """The way from the last stream to the logits, checked against the model's own.

    Args:
        model: a decoder.

    Returns:
        The Output; the same one at each call.

    Raises:
        ValueError: an encoder or vision model; or a model whose logits come out different, since something else stands
            between its stream and its logits.

    Cost: the first call on a model runs one forward pass of 12 tokens.
    """
    require_decoder(model)
    if model.bridge not in _KNOWN:
        found = _build(model)
        _check(model, found)
        _KNOWN[model.bridge] = found
    return _KNOWN[model.bridge]


def tiles(n: int, d_vocab: int) -> list[slice]:
    """Rows 0 to n in pieces whose logits fit in a tile of 16 MB.

    Args:
        n: number of rows.
        d_vocab: logits a row.

    Returns:
        Slices.
    """
    return list(batches(n, max(1, _TILE // d_vocab)))


def _build(model: Model) -> Output:
    bridge = model.bridge
    norm, linear = (getattr(part, "original_component", part) for part in (bridge.ln_final, bridge.unembed))
    # A HookedTransformer has no Hugging Face module, and keeps its cap in its own config.
    config = bridge.original_model.config if hasattr(bridge, "original_model") else bridge.cfg
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "output_logits_soft_cap", None)
    bias = getattr(linear, "bias", None) if hasattr(linear, "weight") else linear.b_U
    weight = linear.weight.T if hasattr(linear, "weight") else linear.W_U
    return Output(norm, linear, weight.detach(), None if bias is None else bias.detach(), float(cap) if cap else None)


def _check(model: Model, found: Output) -> None:
    tokens = ((torch.arange(12, device=model.device) * 7919 + 5) % model.d_vocab)[None]
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    seen = run(model, tokens, capture=[last])
    with torch.no_grad():
        ours = found.log_probs(seen.cache[last])
    gap = float((ours - seen.logits.to(ours.dtype).log_softmax(-1)).abs().max())
    # The same arithmetic on the same numbers: only the order of sums in a product may differ; bfloat16 keeps 8 bits.
    if not gap <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25):
        raise ValueError(
            f"the logits of {model.name} are not its final norm and unembedding of its last stream (log-probabilities "
            f"differ by {gap:.2g} nats): something else stands between them, so no lens can read its layers."
        )
