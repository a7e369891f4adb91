"""How does a gradient go back through a decoder's maps? Norms taken apart, linear maps the other way round, LRP rules.

The gradient by what one head's query reads is J^T W^T dq, with J the derivative of the norm, which all readers of a
layer share. Written out it is one matrix multiplication and a multiple of the normed stream, so that the gradients of
all readers come without a backward pass each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp.models.program import NoProgramError, Program


class Rules(NamedTuple):
    """What stands in for the derivative (RelP); nothing for plain gradients.

    Attributes:
        lrp: the scale of a norm is a constant, an activation function f has the slope f(x) / x, and of a gated product
            each factor gets half.
        attention: attention patterns are constants.
    """

    lrp: bool = False
    attention: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm taken apart: y = weight * n + bias, n = s * c, c the input (or the input less its mean).

    s = 1 / sqrt(mean(c^2) + eps).
    """

    weight: Tensor
    bias: Tensor
    eps: float
    centred: bool

    def parts(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """N `[... d_model]` and s `[... 1]`, in float32 or wider."""
        wide = widened(stream)
        centred = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * scale, scale

    def back(self, gradient: Tensor, normed: Tensor, scale: Tensor, *, frozen: bool) -> Tensor:
        """The gradient by the norm's input, from that by its output `[... d_model]` and the parts of the input."""
        return self.back_of_weighted(gradient * self.weight, normed, scale, frozen=frozen)

    def back_of_weighted(self, gradient: Tensor, normed: Tensor, scale: Tensor, *, frozen: bool) -> Tensor:
        """As `back`, where the weight is in the gradient already."""
        if self.centred:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        if not frozen:
            gradient = gradient - normed * (normed * gradient).mean(-1, keepdim=True)
        return gradient * scale

    def frozen(self, stream: Tensor) -> Tensor:
        """The norm with its scale as a constant, for autograd."""
        wide = widened(stream)
        centred = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        with torch.no_grad():
            scale = self.parts(stream)[1]
        return (centred * scale * self.weight + self.bias).to(stream.dtype)


def norm_of(module: Any) -> Norm:
    """A LayerNorm or RMSNorm taken apart, and checked against itself.

    Args:
        module: of a decoder.

    Returns:
        The Norm.

    Raises:
        NoProgramError: it computes something else.
    """
    weight = widened(getattr(module, "weight", torch.zeros(0)).detach())
    eps = float(getattr(module, "eps", getattr(module, "variance_epsilon", -1.0)))
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else widened(bias.detach())
    centred = isinstance(module, nn.LayerNorm)
    if weight.numel() and eps >= 0:
        at = torch.arange(2 * weight.numel(), device=weight.device).view(2, -1) + 1.0
        probe = (torch.sin(at) + 0.3).to(module.weight.dtype)
        with torch.no_grad():
            wanted = widened(module(probe))
            for factor in (weight, 1 + weight):  # Gemma keeps the difference from 1
                found = Norm(factor, bias, eps, centred)
                # Half precision keeps 8 to 11 bits; float32 sums over d_model differ by 1e-6 or so.
                near = 1e-4 if probe.dtype in (torch.float32, torch.float64) else 2e-2
                gap = (found.frozen(probe).to(wanted) - wanted).abs().max()
                if bool(gap <= near * wanted.abs().max().clamp(min=1e-30)):
                    return found
    raise NoProgramError(f"a {type(module).__name__} is neither a LayerNorm nor an RMSNorm, whose derivative is known")


def back(linear: Any, gradient: Tensor) -> Tensor:
    """The gradient by a linear map's input, from that by its output `[... out]`; in the gradient's type."""
    return (gradient.to(linear.weight.dtype) @ rows_of(linear)).to(gradient.dtype)


def rows_of(linear: Any) -> Tensor:
    """The weight of a linear map `[out in]`, without gradients."""
    if type(linear).__name__ == "Conv1D":  # GPT-2 keeps [in out]
        return linear.weight.detach().T
    if isinstance(linear, nn.Linear):
        return linear.weight.detach()
    raise NoProgramError(f"a {type(linear).__name__} is no plain linear map, whose derivative is known")


@dataclass(frozen=True)
class Reads:
    """How one layer's queries, keys and values read the stream.

    Attributes:
        rows: of each query, then each key, then each value, `[read d_head d_model]`: its map, times the norm's weight,
            and without what a LayerNorm's centring takes away.
        constant: what each is where the normed stream is 0, `[read d_head]`.
        norm: of the layer.
    """

    rows: Tensor
    constant: Tensor
    norm: Norm


def reads(steps: Program, layer: int, norm: Norm, copies: int) -> Reads:
    """The maps of a layer's readers.

    Args:
        steps: of a model.
        layer: counted from 0.
        norm: the layer's first norm.
        copies: how many rows a key or value gets: 1 where the graph groups them as the model does, else one a head.

    Returns:
        The Reads.
    """
    modules, rows, constant = steps.layers[layer], [], []
    zero = norm.bias.to(rows_of(modules.q).dtype)
    with torch.no_grad():
        for linear, repeats in ((modules.q, 1), (modules.k, copies), (modules.v, copies)):
            part = widened(rows_of(linear)).unflatten(0, (-1, steps.d_head)) * norm.weight
            if norm.centred:
                part = part - part.mean(-1, keepdim=True)
            rows.append(part.repeat_interleave(repeats, 0))
            level = widened(linear(zero)).unflatten(0, (-1, steps.d_head))
            constant.append(level.repeat_interleave(repeats, 0))
    return Reads(torch.cat(rows), torch.cat(constant), norm)


def ruled(steps: Program, rules: Rules) -> Program:
    """The program in which the derivative of activation functions and of other norms is that of the rules.

    Args:
        steps: of a model.
        rules: what to use.

    Returns:
        A Program with the same values.
    """
    if not rules.lrp:
        return steps

    def flat(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return norm_of(module).frozen if isinstance(module, nn.Module) else module

    layers = tuple(replace(each, q_norm=flat(each.q_norm), k_norm=flat(each.k_norm)) for each in steps.layers)
    act = _identity_rule(steps.act)
    return replace(steps, layers=layers, act=act, final_norm=norm_of(steps.final_norm).frozen)


def _identity_rule(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def linear(x: Tensor) -> Tensor:
        with torch.no_grad():
            # At 0 the ratio is the slope there, which a small number shows: 1/2 for GELU and SiLU.
            near = torch.where(x == 0, torch.full_like(x, 1e-4), x)
            ratio = act(near) / near
        return x * ratio

    return linear


def widened(tensor: Tensor) -> Tensor:
    """In float32, or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
