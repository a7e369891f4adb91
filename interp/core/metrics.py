"""How good is a prediction? Metrics per prompt, differentiable, none dependent on a logit's absolute level."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def logit_diff(
    logits: Float[Tensor, "batch d_vocab"], answers: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Logit of the right answer minus logit of the wrong one.

    Args:
        logits: at the position that predicts the answer, `[batch d_vocab]`.
        answers: right token of each prompt, `[batch]`.
        wrong: wrong token of each prompt, `[batch]`.

    Returns:
        `[batch]`, in logits (equal to the difference of log-probabilities, in nats).
    """
    return _at(logits, answers) - _at(logits, wrong)


def log_prob(logits: Float[Tensor, "batch d_vocab"], answers: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Log-probability of the right answer.

    Args:
        logits: `[batch d_vocab]`.
        answers: right token of each prompt, `[batch]`.

    Returns:
        `[batch]`, in nats.
    """
    return _at(logits, answers) - _exact(logits).logsumexp(-1)


def kl(logits: Float[Tensor, "batch d_vocab"], reference: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """Kullback-Leibler divergence KL(reference || logits) of the next-token distributions.

    Args:
        logits: of the changed model, `[batch d_vocab]`.
        reference: of the model it is compared with, `[batch d_vocab]`.

    Returns:
        `[batch]`, in nats; zero exactly when the distributions are equal.
    """
    ours, theirs = _exact(logits).log_softmax(-1), _exact(reference).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def rank(logits: Float[Tensor, "batch d_vocab"], answers: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Rank of the right answer, 0 for the top; ties count against it.

    Args:
        logits: `[batch d_vocab]`.
        answers: right token of each prompt, `[batch]`.

    Returns:
        `[batch]`: how many other tokens have a logit at least as high. Not differentiable.

    Raises:
        ValueError: a logit is NaN, which has no rank.
    """
    if logits.isnan().any():
        raise ValueError("a logit is NaN, and NaN has no rank: look for the first activation that is not finite.")
    return (logits >= _at(logits, answers)[:, None]).sum(-1) - 1


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch pos_minus_1"]:
    """Negative log-probability of each token given the ones before it.

    Args:
        logits: `[batch pos d_vocab]`.
        tokens: `[batch pos]`.
        mask: 1 on tokens, 0 on padding, `[batch pos]`.

    Returns:
        `[batch pos-1]`, in nats, in float32; entry p is the loss of the token at p+1. NaN where that token, or the
        position that predicts it, is padding. The exponential of the mean is the perplexity.
    """
    scores = logits[:, :-1].float()
    target = tokens[:, 1:, None].to(scores.device)
    loss = scores.logsumexp(-1) - scores.gather(-1, target).squeeze(-1)
    if mask is not None:
        real = (mask[:, 1:] * mask[:, :-1]).to(loss.device).bool()
        loss = loss.masked_fill(~real, float("nan"))
    return loss


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    if logits.ndim != 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; give those of the position that predicts the answer, "
            "[batch d_vocab], for example logits[:, -1]."
        )
    return _exact(logits.gather(-1, tokens[:, None].to(logits.device)).squeeze(-1))


def _exact(logits: Tensor) -> Tensor:
    # The logarithm of a sum over the vocabulary, taken in bfloat16, is off by up to 0.06 nats.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
