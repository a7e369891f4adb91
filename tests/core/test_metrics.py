"""Are the metrics the textbook's, in their values, their gradients and at the edges?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from interp.core.metrics import _at, kl, log_prob, logit_diff, next_token_loss, rank

ANSWERS, WRONG = torch.tensor([2, 0, 4]), torch.tensor([1, 3, 0])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def changed(logits: torch.Tensor) -> torch.Tensor:
    return logits + draw(*logits.shape, seed=9)


SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logit_diff": lambda logits: logit_diff(logits, ANSWERS, WRONG),
    "log_prob": lambda logits: log_prob(logits, ANSWERS),
    "kl": lambda logits: kl(logits, draw(3, 5, seed=9)),
    "kl of the reference": lambda logits: kl(draw(3, 5, seed=9), logits),
}


def test_values_computed_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    answers, wrong = torch.tensor([0, 1]), torch.tensor([2, 2])
    ln = np.log
    assert logit_diff(logits, answers, wrong).tolist() == pytest.approx([ln(2), ln(2 / 7)])
    assert log_prob(logits, answers).tolist() == pytest.approx([ln(0.5), ln(0.2)])
    assert rank(logits, answers).tolist() == [0, 1]
    other = torch.log(torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.2, 0.7]]))
    # KL(reference || logits): 0.25 ln(.25/.5) + 0.5 ln(.5/.25); the other way round has the same value here by symmetry
    assert kl(logits, other).tolist() == pytest.approx([0.25 * ln(2), 0.0], abs=1e-7)


def test_divergence_is_scipys_and_its_direction_is_reference_first() -> None:
    logits, reference = draw(6, 11), draw(6, 11, seed=1)
    p, q = (np.exp(log_softmax(x.numpy(), axis=-1)) for x in (reference, logits))
    assert kl(logits, reference).numpy() == pytest.approx(entropy(p, q, axis=-1), rel=1e-12)  # float64
    assert kl(logits, reference).numpy() != pytest.approx(entropy(q, p, axis=-1), rel=1e-3)


@pytest.mark.parametrize("name", SCORES)
def test_no_metric_depends_on_the_absolute_level_of_a_prompts_logits(name: str) -> None:
    logits = draw(3, 5)
    shift = torch.tensor([[7.0], [-300.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(SCORES[name](logits + shift), SCORES[name](logits), rtol=1e-12, atol=1e-12)
    assert torch.equal(rank(logits + shift, ANSWERS), rank(logits, ANSWERS))


@pytest.mark.parametrize("name", SCORES)
def test_gradient_equals_finite_differences(name: str) -> None:
    logits = draw(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(SCORES[name], (logits,), eps=1e-6, atol=1e-8)
    (gradient,) = torch.autograd.grad(SCORES[name](logits)[0], logits)
    assert gradient[0].abs().max() > 0.01  # per prompt: the score of one does not see the others
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))


def test_ties_count_against_the_answer() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0], [3.0, 1.0, 0.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    assert rank(logits, torch.tensor([0, 3, 1])).tolist() == [2, 3, 3]


def test_rank_is_the_place_in_the_sorted_vocabulary() -> None:
    logits = draw(20, 50)
    answers = torch.arange(20)
    order = logits.argsort(-1, descending=True)
    expected = [order[row].tolist().index(token) for row, token in enumerate(answers.tolist())]
    assert rank(logits, answers).tolist() == expected
    assert len(set(expected)) > 5


def test_a_nan_logit_has_no_rank() -> None:
    logits = draw(2, 5)
    logits[1, 3] = float("nan")
    with pytest.raises(ValueError, match="a logit is NaN"):
        rank(logits, torch.tensor([0, 3]))


def test_loss_is_torchs_cross_entropy_of_the_next_token() -> None:
    logits, tokens = draw(4, 9, 13, dtype=torch.float32), torch.randint(13, (4, 9), generator=torch.Generator())
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 13), tokens[:, 1:].reshape(-1), reduction="none"
    ).reshape(4, 8)
    # float32 rounding of numbers of order 1
    torch.testing.assert_close(next_token_loss(logits, tokens), expected, rtol=1e-5, atol=1e-6)


def test_loss_is_nan_on_padding_only() -> None:
    logits, tokens = draw(2, 5, 7), torch.tensor([[1, 1, 2, 3, 4], [5, 4, 3, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])  # one padded on the left, one on the right
    loss = next_token_loss(logits, tokens, mask)
    # entry p is the loss of token p+1 predicted from p; token 2 of the first prompt is predicted from padding
    assert loss.isnan().tolist() == [[True, True, False, False], [False, False, True, True]]
    whole = next_token_loss(logits, tokens)
    assert torch.equal(loss[~loss.isnan()], whole[~loss.isnan()])
    assert torch.equal(next_token_loss(logits, tokens, torch.ones_like(mask)), whole)


def test_extreme_logits_stay_finite_in_float32() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 0], logits[1, 0] = 1e4, -1e4
    answers = torch.tensor([1, 0])
    assert log_prob(logits, answers).tolist() == pytest.approx([-1e4, -1e4 - np.log(3)])
    assert logit_diff(logits, answers, torch.tensor([0, 1])).tolist() == [-1e4, -1e4]
    # All mass on one token against a uniform reference: -ln 4 + 3/4 * 1e4
    assert kl(logits, torch.zeros(2, 4))[0].item() == pytest.approx(7500 - np.log(4))
    assert kl(torch.zeros(2, 4), logits)[0].item() == pytest.approx(np.log(4))
    assert next_token_loss(logits[:, None].repeat(1, 2, 1), torch.ones(2, 2, dtype=torch.long)).isfinite().all()


def test_equal_distributions_have_no_divergence() -> None:
    logits = 30 * draw(5, 100, dtype=torch.float32)
    assert kl(logits, logits).tolist() == [0.0] * 5


def test_half_precision_logits_lose_nothing_further() -> None:
    logits = (3 * draw(4, 5000)).to(torch.bfloat16)
    answers = torch.arange(4)
    # The logits are rounded already; what is computed from them is good to float32, where bfloat16 is off by 0.03.
    torch.testing.assert_close(
        log_prob(logits, answers).double(), log_prob(logits.double(), answers), rtol=1e-5, atol=1e-5
    )
    other = (3 * draw(4, 5000, seed=1)).to(torch.bfloat16)
    torch.testing.assert_close(kl(logits, other).double(), kl(logits.double(), other.double()), rtol=1e-4, atol=1e-5)
    assert next_token_loss(logits[None], answers[None]).dtype == torch.float32


def test_logits_of_every_position_are_refused_with_the_way_out() -> None:
    # Below the run-time shape checks of the test run, which would speak first: a user has none.
    with pytest.raises(ValueError, match=r"logits have shape \(3, 4, 5\).*logits\[:, -1\]"):
        _at(draw(3, 4, 5), ANSWERS)
