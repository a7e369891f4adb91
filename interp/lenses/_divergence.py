"""How far is a lens from the model, in nats? KL with closed-form gradients, and no array of tokens by vocabulary.

A lens's logits are s = y U + b, with y of d_model numbers a token and U the model's unembedding. Of the model's own
distribution p only two things are needed, which never change while a lens is trained: its entropy H(p) and the mean
unembedding m = E_p[U] = sum_v p_v U_v. With q = softmax(s),

    KL(p || q) = log-sum-exp(s) - y.m - p.b - H(p),    dKL/dy = E_q[U] - m,    dKL/db = q - p.

E_q[U] and log-sum-exp(s) come from one walk over tiles of the vocabulary, with a running maximum as in flash attention:
4 d_model d_vocab operations a token (2 without a gradient).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

#: Tokens and vocabulary entries of a tile: products of these shapes run as fast as square ones.
_ROWS, _COLUMNS = 256, 4096
#: Whether this build of torch has the operator that `product` takes.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
#: Scratch for the mean of q over the tokens, which a trained bias needs, in bytes.
_SCRATCH = 64 * 2**20


class Targets(NamedTuple):
    """What a lens needs to know of the model's distributions p.

    Attributes:
        mean: E_p[U], `[token d_model]`.
        entropy: H(p) in nats, `[token]`.
        total: the sum of p over the tokens, `[d_vocab]`.
        extra: E_p of further columns `[token k]`; k is 0 without any.
    """

    mean: Tensor
    entropy: Tensor
    total: Tensor
    extra: Tensor


@torch.no_grad()
def targets(
    unembed: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None,
    r: Float[Tensor, "token d_model"],
    *,
    cap: float | None = None,
    extra: Float[Tensor, "d_vocab k"] | None = None,
) -> Targets:
    """The model's distributions p = softmax(cap(r U + bias)) in the form that `divergence` takes.

    Args:
        unembed: U.
        bias: of the model's unembedding; None for none.
        r: the final norm's output.
        cap: of the logits, l -> cap tanh(l / cap); None for none.
        extra: columns whose mean under p is wanted, such as the bias of a lens that is evaluated.

    Returns:
        `Targets`, in float32 (float64 where `r` is).

    Cost: 4 d_model d_vocab operations a token, and `_SCRATCH` bytes.
    """
    exact = _wide(r.dtype)
    walked = _walk(r.to(exact), unembed, bias, cap=cap, extra=extra, mean=True, total=True, entropy=True)
    return Targets(walked.mean, walked.entropy, walked.total, walked.extra)


def divergence(
    y: Float[Tensor, "*lens token d_model"],
    unembed: Float[Tensor, "d_model d_vocab"],
    targets: Targets,
    *,
    bias: Float[Tensor, "*lens_or_none d_vocab"] | None = None,
    expected_bias: Float[Tensor, "*lens_or_not token"] | None = None,
) -> Float[Tensor, "*lens token"]:
    """KL(p || softmax(y U + bias)) of every token, differentiable in `y` and `bias`.

    Args:
        y: what a lens writes before the unembedding. Leading axes are several lenses with the same targets.
        unembed: U.
        targets: of the same tokens.
        bias: of the lens, for all lenses or one each (`y`'s leading axes); None for none.
        expected_bias: p.b of each token, as `targets(..., extra=bias[:, None]).extra` has it. None takes p.b's mean
            over the tokens (`targets.total`) for each: then the mean of the result over the tokens is exact, its single
            values are not. A bias with a gradient may only be used so, in a mean or sum over the tokens.

    Returns:
        Nats.

    Raises:
        ValueError: in the backward pass, when a bias with a gradient met tokens of unequal weight.

    Cost: 4 d_model d_vocab operations a token and lens in the forward pass (2 without gradients), next to none in the
        backward pass.

    Example:
        >>> u, r = torch.randn(4, 9), torch.randn(3, 4)
        >>> known = targets(u, None, r)
        >>> bool((divergence(r, u, known).abs() < 1e-5).all())
        True
    """
    exact = _wide(y.dtype)
    wide = y.to(exact)
    log_partition = _LogPartition.apply(wide, unembed, None if bias is None else bias.to(exact))
    kl = log_partition - (wide * targets.mean).sum(-1) - targets.entropy
    if bias is None:
        return kl
    if expected_bias is None:
        expected_bias = (bias.to(exact) @ (targets.total / len(targets.entropy)))[..., None]
    return kl - expected_bias


class _LogPartition(torch.autograd.Function):
    """log-sum-exp(y U + b), `[*lens token]`, with its gradients made on the way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, unembed: Tensor, bias: Tensor | None) -> Tensor:
        mean, total = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if bias is None or bias.ndim == 1:
            walked = [_walk(y.flatten(0, -2), unembed, bias, mean=mean, total=total)]
        else:
            own = bias.expand(*y.shape[:-2], -1).flatten(0, -2)
            lenses = y.reshape(-1, *y.shape[-2:])
            walked = [_walk(one, unembed, b, mean=mean, total=total) for one, b in zip(lenses, own, strict=True)]
        means = torch.cat([part.mean for part in walked]).reshape(y.shape) if mean else None
        totals = (
            torch.stack([part.total for part in walked]).reshape(bias.shape) if total and bias is not None else None
        )
        ctx.save_for_backward(means, totals)
        return torch.cat([part.log_partition for part in walked]).reshape(y.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = grads
        mean, total = ctx.saved_tensors
        to_y = None if mean is None else weight[..., None] * mean
        if total is None:
            return to_y, None, None
        one = weight[..., :1] if total.ndim > 1 else weight.flatten()[:1]
        if not bool((weight == one).all()):
            raise ValueError("a bias is trained, so every token must weigh the same: take the mean over the tokens.")
        return to_y, None, one * total


class _Walked(NamedTuple):
    """What a walk over the vocabulary found: see `_walk`."""

    log_partition: Tensor
    entropy: Tensor
    mean: Tensor
    total: Tensor
    extra: Tensor


@torch.no_grad()
def _walk(
    y: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    *,
    cap: float | None = None,
    extra: Tensor | None = None,
    mean: bool = False,
    total: bool = False,
    entropy: bool = False,
) -> _Walked:
    """Means under q = softmax(cap(y U + bias)), tile by tile.

    Args:
        y: `[token d_model]`, float32 or float64; the tiles have its type.
        unembed: U `[d_model d_vocab]`.
        bias: `[d_vocab]` or None.
        cap: of the logits.
        extra: columns `[d_vocab k]`.
        mean: whether E_q[U] is wanted.
        total: whether the sum of q over the tokens is.
        entropy: whether H(q) is.

    Returns:
        log-sum-exp `[token]`, H(q) `[token]`, E_q[U] `[token d_model]`, the sum of q `[d_vocab]`, E_q[extra]
        `[token k]`; those not asked for are empty.
    """
    n, (d_model, d_vocab) = len(y), unembed.shape
    k = 0 if extra is None else extra.shape[1]
    rows = min(_ROWS, max(1, _SCRATCH // (y.element_size() * d_vocab))) if total else _ROWS
    found = _Walked(
        y.new_empty(n), y.new_empty(n if entropy else 0), y.new_empty(n, d_model if mean else 0),
        y.new_zeros(d_vocab if total else 0), y.new_empty(n, k),
    )  # fmt: skip
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        own = y[part]
        size = len(own)
        highest = own.new_full((size, 1), -torch.inf)
        weight, surprise = own.new_zeros(size, 1), own.new_zeros(size, 1)
        means, extras = own.new_zeros(size, found.mean.shape[1]), own.new_zeros(size, k)
        tiles: list[tuple[slice, Tensor, Tensor]] = []
        for columns in _tiles(d_vocab):
            u = unembed.T[columns].to(y.dtype).contiguous()
            tile = product(own, u)
            if bias is not None:
                tile += bias[columns].to(y.dtype)
            if cap is not None:
                tile.div_(cap).tanh_().mul_(cap)
            before, highest = highest, torch.maximum(highest, tile.amax(1, keepdim=True))
            tile -= highest
            below = tile.clone() if entropy else None
            tile.exp_()
            shrink = (before - highest).exp_()
            if below is not None:
                drop = torch.where(shrink == 0, 0, before - highest)  # nothing was summed before the first tile
                surprise = shrink * (surprise + drop * weight) + (tile * below).sum(1, keepdim=True)
            weight = shrink * weight + tile.sum(1, keepdim=True)
            if mean:
                means.mul_(shrink).add_(product(tile, u.T))
            if extra is not None:
                extras.mul_(shrink).addmm_(tile, extra[columns].to(y.dtype))
            if total:
                tiles.append((columns, tile, highest))
        log_partition = highest + weight.log()
        found.log_partition[part] = log_partition[:, 0]
        found.mean[part] = means / weight
        found.extra[part] = extras / weight
        if entropy:
            found.entropy[part] = (weight.log() - surprise / weight)[:, 0]
        for columns, tile, shift in tiles:
            found.total[columns] += ((shift - log_partition).exp().T @ tile)[0]
    return found


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x `[row k]` and the transpose of weight `[column k]`, `[row column]`.

    In float32 on a CPU torch takes MKL, which on AMD's processors reaches half of what oneDNN does; the only way to
    oneDNN's float32 product without packing both sides anew is this operator. Either side of `weight` may be the
    contiguous one, but one has to be.
    """
    if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def _tiles(d_vocab: int) -> Iterator[slice]:
    for start in range(0, d_vocab, _COLUMNS):
        yield slice(start, min(start + _COLUMNS, d_vocab))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision is too coarse for sums over a vocabulary."""
    return torch.promote_types(dtype, torch.float32)
