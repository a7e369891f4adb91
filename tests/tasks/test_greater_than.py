from __future__ import annotations

import re

import pytest
import torch

from interp.tasks import greater_than, ioi, year_sets
from interp.tasks._prompts import column

PROMPT = re.compile(r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)")


@pytest.fixture(params=[2, 1], ids=["two-digit tokens", "digit tokens"])
def digits(request):
    return request.param


@pytest.fixture
def model(make_model, digits):
    return make_model(digits=digits)


def test_every_prompt_is_what_it_says(model, digits):
    task = greater_than(model, 150)
    assert len(set(task.prompts)) == 150
    nouns = set(column("greater_than_nouns", "noun"))
    right, wrong = model.to_str_tokens(task.answers), model.to_str_tokens(task.wrong)
    for i, prompt in enumerate(task.prompts):
        assert model.tokenizer.decode(task.clean[i].tolist()) == prompt
        noun, century, year, end = PROMPT.fullmatch(prompt).groups()
        assert noun in nouns
        assert century == end
        assert model.tokenizer.decode(task.corrupt[i].tolist()) == prompt.replace(century + year, century + "01")
        step = int(year) if digits == 2 else int(year[0])
        assert (int(right[i]), int(wrong[i])) == (step + 1, step - 1)


def test_named_positions(model, digits):
    task = greater_than(model, 60, prepend_bos=True)
    row = torch.arange(60)
    at = {k: [t.strip() for t in model.to_str_tokens(task.clean[row, v])] for k, v in task.positions.items()}
    for i, prompt in enumerate(task.prompts):
        noun, century, year, _ = PROMPT.fullmatch(prompt).groups()
        assert at["noun"][i] == noun
        assert at["XX"][i] == (century if digits == 2 else century[1])
        assert at["YY"][i] == (year if digits == 2 else year[0])
        assert at["end"][i] == at["XX"][i]
        if digits == 1:
            assert at["YY_units"][i] == year[1]
    assert ("YY_units" in at) == (digits == 1)
    if digits == 1:  # the corrupted year is at the same place, and reads 01
        at_year = model.to_str_tokens(task.corrupt[row, task.positions["YY"]])
        assert set(at_year) == {"0"}


def test_year_sets_hold_all_right_and_all_wrong_years(model, digits):
    task = greater_than(model, 80)[10:50]
    right, wrong = year_sets(model, task)
    assert right.shape == wrong.shape == (40, model.d_vocab)
    for i, prompt in enumerate(task.prompts):
        year = PROMPT.fullmatch(prompt)[3]
        later, earlier = (
            sorted(int(t) for t in model.to_str_tokens(mask[i].nonzero()[:, 0])) for mask in (right, wrong)
        )
        if digits == 2:
            assert later == list(range(int(year) + 1, 100))
            assert earlier == list(range(int(year) + 1))
        else:
            # Every completion of a right digit is later, none of a wrong digit is.
            assert later == [d for d in range(10) if 10 * d > int(year)]
            assert earlier == [d for d in range(10) if 10 * d + 9 < int(year)]
    row = torch.arange(40)
    assert bool(right[row, task.answers].all()) and bool(wrong[row, task.wrong].all())


def test_years_that_are_one_token_are_not_used(make_model):
    """A GPT-2-like tokenizer without a token for 45 after the century: no prompt may start in a year ..45."""
    model = make_model(unknown=["trade"])
    assert "131 of 132 nouns of one token and 776 start years; two digits" in greater_than(model).source
    assert "132 of 132 nouns of one token and 640 start years; one digit" in greater_than(make_model(digits=1)).source


def test_seeds_and_refusals(model, make_model, digits):
    assert greater_than(model, 8, seed=1).fingerprint == greater_than(model, 8, seed=1).fingerprint
    assert greater_than(model, 8, seed=1).fingerprint != greater_than(model, 8, seed=2).fingerprint
    total = 132 * (776 if digits == 2 else 640)
    with pytest.raises(ValueError, match=f"n_prompts={total + 1}, but only {total} different"):
        greater_than(model, total + 1)
    with pytest.raises(ValueError, match="n_prompts=0"):
        greater_than(model, 0)
    with pytest.raises(ValueError, match="needs the century and then YY"):
        greater_than(
            make_model(digits=digits, unknown="0123456789" if digits == 1 else [f"{n:02d}" for n in range(100)])
        )
    with pytest.raises(ValueError, match="year_sets reads greater-than prompts.*its task is 'ioi'"):
        year_sets(model, ioi(model, 2))


def test_the_default_model_does_it_digit_by_digit(smol):
    task = greater_than(smol, 24)
    assert "one digit in a token" in task.source
    assert task.mask is None
    right, wrong = year_sets(smol, task)
    row = torch.arange(24)
    difference = {}
    for name, ids in (("clean", task.clean), ("corrupt", task.corrupt)):
        p = smol(ids)[row, task.positions["end"]].softmax(-1)
        difference[name] = (p * right).sum(-1) - (p * wrong).sum(-1)
        assert (p * (right | wrong)).sum(-1).mean() > 0.5, "the model answers with a digit"
    # Measured: positive on 100% of the prompts, mean 0.56; after year XX01 it is -0.72.
    assert (difference["clean"] > 0).float().mean() >= 0.8
    assert difference["clean"].mean() > 0.3
    assert difference["corrupt"].mean() < 0
