"""What do a new query or a new key do to attention? The softmax computed again, times the gradient by the pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from interp.models.program import Frame, Program


def of_query(steps: Program, layer: int, frame: Frame, q: Tensor, k: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
    """What new queries do to the pattern, times the gradient by it.

    Args:
        steps: of the model.
        layer: which layer.
        frame: of the prompts.
        q: queries of the base run `[batch pos head d_head]`.
        k: its keys `[batch pos kv_head d_head]`.
        new: the queries instead.
        gradient: by the pattern, `[batch head q_pos k_pos]`.

    Returns:
        `[batch pos head]`; a query changes its own row only, so its positions are independent.
    """
    moved = _scores(steps, layer, frame, new, k).softmax(-1) - _scores(steps, layer, frame, q, k).softmax(-1)
    return (moved * gradient).sum(-1).transpose(1, 2)


def of_keys(steps: Program, layer: int, frame: Frame, q: Tensor, k: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
    """What new keys at all positions do to the pattern, times the gradient by it.

    Args:
        steps: of the model.
        layer: which layer.
        frame: of the prompts.
        q: queries of the base run `[batch pos head d_head]`.
        k: its keys `[batch pos kv_head d_head]`.
        new: the keys instead.
        gradient: by the pattern, `[batch head q_pos k_pos]`.

    Returns:
        `[batch 1 kv_head]`: one number for all positions.
    """
    moved = _scores(steps, layer, frame, q, new).softmax(-1) - _scores(steps, layer, frame, q, k).softmax(-1)
    return _by_group(steps, (moved * gradient).sum((2, 3)))[:, None]


def of_key(steps: Program, layer: int, frame: Frame, q: Tensor, k: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
    """What a new key at each position alone does to the pattern, times the gradient by it.

    With S_j the log-sum-exp of the scores of a row without key j, its new attention is the logistic function of its
    new score minus S_j, and what it gains the others lose in proportion: (new attention - old) (G_j - mean G of the
    others). No array is larger than the pattern.

    Args:
        steps: of the model.
        layer: which layer.
        frame: of the prompts.
        q: queries of the base run `[batch pos head d_head]`.
        k: its keys `[batch pos kv_head d_head]`.
        new: the keys instead.
        gradient: by the pattern, `[batch head q_pos k_pos]`.

    Returns:
        `[batch pos kv_head]`.
    """
    scores = _scores(steps, layer, frame, q, k)
    pattern = scores.softmax(-1)
    total = scores.logsumexp(-1, keepdim=True)
    top = scores.argmax(-1, keepdim=True)
    rest = scores.scatter(-1, top, float("-inf"))
    # Without the key of most attention, 1 - p may have no digit left: that column is summed anew.
    lse = (total + torch.log1p(-pattern)).scatter(-1, top, rest.logsumexp(-1, keepdim=True))
    mean = ((pattern * gradient).sum(-1, keepdim=True) - pattern * gradient) / (1 - pattern)
    without_top = (rest.softmax(-1) * gradient).sum(-1, keepdim=True)
    mean = mean.scatter(-1, top, without_top).nan_to_num(0.0)  # a row of one key has no others, and does not move
    attention = torch.sigmoid(_scores(steps, layer, frame, q, new) - lse)
    moved = (attention - pattern) * (gradient - mean)
    return _by_group(steps, moved.sum(2)).transpose(1, 2)


def _scores(steps: Program, layer: int, frame: Frame, q: Tensor, k: Tensor) -> Tensor:
    rotated = steps.rotated_q(layer, q, frame.rotary), steps.rotated_k(layer, k, frame.rotary)
    return steps.scores(*rotated, steps.allowed(layer, frame)).float()


def _by_group(steps: Program, heads: Tensor) -> Tensor:
    """Sum over the query heads of each key-value group: `[batch head ...]` to `[batch kv_head ...]`."""
    return heads.unflatten(1, (steps.n_key_value_heads, -1)).sum(2)
