"""Is the metric read where and as it says?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.core import metrics
from interp.core.readout import METRICS, candidates, readout, some
from interp.models import toy
from interp.tasks import Task

MODEL = toy.random("llama")
TOKENS = toy.random_tokens(MODEL, 4, 6)
ANSWERS, WRONG = toy.random_tokens(MODEL, 2, 4, seed=2)
TASK = Task("t", ("a", "b", "c", "d"), TOKENS, "here", answers=ANSWERS, wrong=WRONG,
            positions={"end": torch.tensor([5, 3, 5, 4])})  # fmt: skip


def expected(metric: str) -> torch.Tensor:
    """The metric by hand, from the whole logits."""
    at = MODEL(TOKENS)[torch.arange(4), TASK.positions["end"]]
    if metric == "logit_diff":
        return metrics.logit_diff(at, ANSWERS, WRONG)
    if metric == "kl":
        return torch.zeros(4)
    log_prob = metrics.log_prob(at, ANSWERS)
    return log_prob if metric == "log_prob" else log_prob.exp()


@pytest.mark.parametrize("metric", METRICS)
def test_named_metrics_are_read_at_the_end_of_each_prompt(metric: str):
    # The same logits, the same arithmetic: float32 rounding only.
    assert torch.allclose(readout(MODEL, TASK, metric).of(MODEL(TOKENS)), expected(metric), atol=1e-6)


def test_kl_is_from_the_clean_run():
    other = MODEL(toy.random_tokens(MODEL, 4, 6, seed=8))
    at = torch.arange(4), TASK.positions["end"]
    theirs = metrics.kl(other[at], MODEL(TOKENS)[at])
    assert torch.allclose(readout(MODEL, TASK, "kl").of(other), theirs, atol=1e-6)
    assert float(theirs.min()) > 0.01


def test_some_of_the_prompts():
    logits = MODEL(TOKENS)
    for metric in METRICS:
        read = readout(MODEL, TASK, metric)
        part = some(read, torch.tensor([2, 1]))
        assert torch.allclose(part.of(logits[[2, 1]]), read.of(logits)[[2, 1]], atol=1e-6)
        assert torch.allclose(some(read, slice(1, 3)).of(logits[1:3]), read.of(logits)[1:3], atol=1e-6)


def test_candidates_are_centred():
    tokens = toy.random_tokens(MODEL, 4, 3, seed=4)
    logits = MODEL(TOKENS)
    found = candidates(TASK.positions["end"], tokens).of(logits)
    raw = logits[torch.arange(4), TASK.positions["end"]].gather(1, tokens)
    assert torch.allclose(found, raw - raw.mean(1, keepdim=True), atol=1e-6)


def test_without_a_named_end_the_last_position_is_read():
    assert readout(MODEL, replace(TASK, positions={}), "prob").where.tolist() == [5, 5, 5, 5]


def test_a_readout_is_taken_as_it_is():
    read = readout(MODEL, TASK, "prob")
    assert readout(MODEL, TASK, read) is read


def test_what_a_metric_lacks_is_named():
    with pytest.raises(ValueError, match="use one of logit_diff, log_prob, prob, kl"):
        readout(MODEL, TASK, "accuracy")
    with pytest.raises(ValueError, match="has no answers"):
        readout(MODEL, replace(TASK, answers=None), "log_prob")
    with pytest.raises(ValueError, match="has no wrong answers"):
        readout(MODEL, replace(TASK, wrong=None), "logit_diff")
