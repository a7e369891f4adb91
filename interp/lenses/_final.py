"""What does the final norm do to one part of the stream? Its gain, its bias and its scale, asked of the norm itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.lenses._output import output
from interp.models.model import Model


class FinalNorm(NamedTuple):
    """norm(x) = linear(x) / sigma(x) + bias, for LayerNorm and RMSNorm, folded or not.

    Attributes:
        norm: the module, in the model's arithmetic.
        gain: `[d_model]`.
        bias: `[d_model]`.
        centres: whether the mean over d_model is taken off first.
    """

    norm: Callable[[Tensor], Tensor]
    gain: Tensor
    bias: Tensor
    centres: bool

    def linear(self, vectors: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What the norm makes of a part of the stream, but for its scale: (v - mean v, or v) * gain."""
        centred = vectors - vectors.mean(-1, keepdim=True) if self.centres else vectors
        return centred * self.gain

    def inverse_scale(
        self, streams: Float[Tensor, "token d_model"], normed: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, " token"]:
        """1 / sigma of each stream, from what the norm made of it."""
        linear = self.linear(streams)
        return ((normed - self.bias) * linear).sum(-1) / linear.square().sum(-1)


@torch.no_grad()
def final_norm(model: Model) -> FinalNorm:
    """The final norm of a decoder, in float32 at least; of processed weights little is left of it.

    Asked rather than read: norms differ in the name of their gain and in what it is relative to (Gemma's to 1).
    """
    norm = output(model).norm
    probe = torch.ones(1, model.d_model, device=model.device, dtype=model.dtype)
    probe[:, 1::2] = -1
    if model.d_model % 2:
        probe[:, -3:] = torch.tensor([1.0, 1.0, -2.0])
    probe *= 100  # the epsilon under the root is nothing beside it
    bias = _wide(norm(torch.zeros_like(probe)))
    there, moved = _wide(norm(probe)) - bias, _wide(norm(probe + 50)) - bias
    wide = _wide(probe)
    gain = there * wide.square().mean().sqrt() / wide
    # Bfloat16 keeps 8 bits; without centring the two differ by a tenth at least.
    centres = bool((moved - there).abs().max() < 0.02 * there.abs().max())
    return FinalNorm(norm, gain[0], bias[0], centres)


@torch.no_grad()
def written_maps(model: Model, layers: Sequence[int]) -> dict[int, Tensor]:
    """W_O with the linear part of the final norm, `[head d_head d_model]` of each layer, float32."""
    norm = final_norm(model)
    return {layer: norm.linear(model.bridge.blocks[layer].attn.W_O.detach().float()) for layer in layers}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
