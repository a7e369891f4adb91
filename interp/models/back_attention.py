"""What if a lower layer could look at a higher one? Attention from one to the other, and a model with it attached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.models.hooks import run
from interp.models.model import Model


class BackAttention(nn.Module):
    """Attention whose queries come from a lower layer's stream and whose keys and values from a higher layer's.

    With h^s the stream before layer `source` and h^t the stream after layer `target`, both divided by their root mean
    square, it writes for each head

        B = softmax((h^s Q)(h^t K)^T / sqrt(d_head) + causal mask) (h^t V) O

    which is added to the stream before layer `source`; the layers from there on are then computed again.
    O starts at zero, so that at first nothing changes. It has 4 x d_model x d_inner parameters and no biases.

    Differs from the paper: the streams are divided by their root mean square. In pretrained models a few positions have
    streams a hundred times as large as the others, and the scores would be nothing else.

    Args:
        d_model: width of the stream.
        source: the lower layer, whose input is changed; from 0.
        target: the higher layer, whose output is read; `source` itself is the lowest.
        d_inner: width of queries, keys and values of all heads together; None for d_model.
        n_heads: heads, each of d_inner / n_heads.
        seed: of Q, K and V, drawn on the CPU from N(0, 1 / d_model).

    Raises:
        ValueError: layers that are negative or reversed, heads that do not divide d_inner.

    Example:
        >>> back = BackAttention(32, source=0, target=2, d_inner=8, n_heads=2)
        >>> sum(weight.numel() for weight in back.parameters())
        1024
    """

    #: (source, target); a buffer, so that two modules of other layers have other fingerprints.
    layers: Tensor

    def __init__(
        self, d_model: int, *, source: int, target: int, d_inner: int | None = None, n_heads: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        d_inner = d_model if d_inner is None else d_inner
        if not 0 <= source <= target:
            raise ValueError(
                f"source={source}, target={target}: a lower layer reads from a higher one, so give "
                "0 <= source <= target."
            )
        if min(d_inner, n_heads) < 1 or d_inner % n_heads:
            raise ValueError(f"d_inner={d_inner} cannot be divided among n_heads={n_heads} heads.")
        self.source, self.target, self.n_heads = source, target, n_heads
        self.d_model, self.d_inner = d_model, d_inner
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            nn.Parameter(torch.randn(d_model, d_inner, generator=generator) * d_model**-0.5) for _ in range(3)
        )
        self.o = nn.Parameter(torch.zeros(d_inner, d_model))
        self.register_buffer("layers", torch.tensor([source, target]))

    def forward(
        self,
        low: Float[Tensor, "batch pos d_model"],
        high: Float[Tensor, "batch pos d_model"],
        mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What is added to the stream before layer `source`.

        Args:
            low: the stream before layer `source`.
            high: the stream after layer `target`.
            mask: 1 on tokens, 0 on padding, which nothing looks at; None for no padding.

        Returns:
            B, of the dtype of `low`; computed in that of the parameters.
        """
        queries, keys, values = (
            (_unit(stream.to(self.q.dtype)) @ weight).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for stream, weight in ((low, self.q), (high, self.k), (high, self.v))
        )
        index = torch.arange(low.shape[1], device=low.device)
        allowed = (index[:, None] >= index)[None]
        if mask is not None:
            # Padding sees itself: a row without any key would be undefined.
            allowed = (allowed & mask.bool()[:, None, :]) | (index[:, None] == index)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed[:, None])
        return (mixed.transpose(1, 2).flatten(2) @ self.o).to(low.dtype)


class Attached(nn.Module):
    """A loaded model with back attention: `Attached(model, back)(tokens, mask)` are its logits.

    The model's own weights are frozen and not among this module's parameters. The first pass is the plain one, up to
    layer `target`; the second is the whole model, with B added before layer `source`.

    Args:
        model: a decoder.
        back: of the model's d_model, with layers that it has.

    Raises:
        ValueError: a model that is not a decoder, another width, or layers out of range.

    Cost: two forward passes, the first up to layer `target`; a backward pass reaches down to layer `source`.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> attached = Attached(model, BackAttention(model.d_model, source=1, target=2))
        >>> tokens = toy.random_tokens(model, 2, 5)
        >>> bool((attached(tokens) == model(tokens)).all())  # nothing changes before it is trained
        True
    """

    def __init__(self, model: Model, back: BackAttention) -> None:
        super().__init__()
        if model.kind != "decoder":
            raise ValueError(f"{model.name} is a {model.kind} model: back attention needs a decoder.")
        if back.d_model != model.d_model:
            raise ValueError(
                f"this back attention has d_model={back.d_model}, but {model.name} has {model.d_model}: make it with "
                f"BackAttention({model.d_model}, ...)."
            )
        if back.target >= model.n_layers:
            raise ValueError(
                f"target={back.target}, but {model.name} has layers 0 to {model.n_layers - 1}: give one of those."
            )
        self.model, self.back = model, back.to(model.device)
        sizes = {
            "vocab_size": model.d_vocab, "max_position_embeddings": model.n_ctx,
            "model_fingerprint": model.fingerprint, "weights": model.weights,
        }  # fmt: skip
        # A trainer reads the sizes from here, and tells by it one model's checkpoint from another's.
        self.config = SimpleNamespace(**sizes, to_dict=lambda: sizes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits `[batch pos d_vocab]` of token ids `[batch pos]`, with their mask if some are padding."""
        below, above = f"blocks.{self.back.source}.hook_resid_pre", f"blocks.{self.back.target}.hook_resid_post"
        streams = run(self.model, tokens, capture=[below, above], mask=mask, stop_after=self.back.target).cache
        written = self.back(streams[below], streams[above], mask)

        def add(stream: Tensor, hook: Any) -> Tensor:
            return stream + written

        with frozen(self.model.bridge):
            return run(self.model, tokens, hooks=[(below, add)], mask=mask, grad=torch.is_grad_enabled()).logits


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for a module's weights in what is computed meanwhile; afterwards as before.

    Args:
        module: whose parameters.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _unit(stream: Tensor) -> Tensor:
    """Each position's stream over its root mean square."""
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)
