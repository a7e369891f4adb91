"""How is a lens trained that has a row of its own for every token of the vocabulary? The target made anew in each tile.

A full lens's logits are s = x A + b with A `[input d_vocab]`, so the gradient needs the model's p itself:
dKL/dA = x^T (q - p), dKL/db = q - p. One walk over the vocabulary finds log-sum-exp(s); a second makes p and q tile by
tile, and leaves the gradient of that tile. p is made once for all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.lenses import _divergence
from interp.lenses._divergence import _tiles, _walk


def full_divergence(
    x: Float[Tensor, "lens token input"],
    maps: Float[Tensor, "lens input d_vocab"],
    bias: Float[Tensor, "lens d_vocab"],
    r: Float[Tensor, "token d_model"],
    unembed: Float[Tensor, "d_model d_vocab"],
    unembed_bias: Float[Tensor, " d_vocab"] | None,
    *,
    cap: float | None = None,
) -> Float[Tensor, "lens token"]:
    """KL(p || softmax(x A + b)) of every token, p the model's own; differentiable in A and b.

    Args:
        x: what each lens reads.
        maps: A of each lens.
        bias: b of each lens.
        r: the final norm's output.
        unembed: the model's U.
        unembed_bias: its bias, or None.
        cap: of the model's logits.

    Returns:
        Nats. Only a mean or sum over the tokens may be differentiated.

    Cost: 4 d_model d_vocab operations a token for p, and 6 input d_vocab for each lens (4 without gradients).
    """
    return _Full.apply(maps, bias, x, r, unembed, unembed_bias, cap)


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        bias: Tensor,
        x: Tensor,
        r: Tensor,
        unembed: Tensor,
        own: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        n, wanted = len(r), any(ctx.needs_input_grad[:2])
        kl = x.new_zeros(x.shape[:2])
        to_maps, to_bias = (torch.zeros_like(like) if wanted else like.new_empty(0) for like in (maps, bias))
        for start in range(0, n, _divergence._ROWS):
            rows = slice(start, min(start + _divergence._ROWS, n))
            target = _walk(r[rows], unembed, own, cap=cap).log_partition[:, None]
            ours = [_walk(x[h, rows], maps[h], bias[h]).log_partition[:, None] for h in range(len(x))]
            for columns in _tiles(unembed.shape[1]):
                logits = r[rows] @ unembed[:, columns].to(r.dtype)
                if own is not None:
                    logits += own[columns].to(r.dtype)
                if cap is not None:
                    logits.div_(cap).tanh_().mul_(cap)
                log_p = logits - target
                p = log_p.exp()
                for h, partition in enumerate(ours):
                    log_q = torch.addmm(bias[h, columns], x[h, rows], maps[h, :, columns]) - partition
                    kl[h, rows] += (p * (log_p - log_q)).sum(1)
                    if wanted:
                        off = log_q.exp_().sub_(p)
                        to_maps[h, :, columns].addmm_(x[h, rows].T, off)
                        to_bias[h, columns] += off.sum(0)
        ctx.save_for_backward(to_maps, to_bias)
        return kl

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = weights
        if not bool((weight == weight[:, :1]).all()):
            raise ValueError(
                "a full lens is trained, so every token must weigh the same: take the mean over the tokens."
            )
        maps, bias = ctx.saved_tensors
        return weight[:, :1, None] * maps, weight[:, :1] * bias, None, None, None, None, None
