from __future__ import annotations

import re

import pytest
import torch

from interp.tasks import country_capital, landmark_country
from interp.tasks._prompts import rows

KINDS = {
    country_capital: ("country_capital", r"The capital of (.+) is the city of"),
    landmark_country: ("landmark_country", r"We went to see (.+), which is in the country of"),
}


def table(name):
    return dict(tuple(row.values()) for row in rows(name))


@pytest.mark.parametrize("make", KINDS)
def test_the_lists_are_clean(make):
    name, _ = KINDS[make]
    listed = rows(name)
    facts = table(name)
    assert len(facts) == len(listed) >= 60, "no subject twice"
    for subject, answer in facts.items():
        assert subject == subject.strip() and answer == answer.strip() and subject and answer
        assert answer.lower() not in subject.lower(), "the prompt must not contain the answer"
        assert subject.lower() not in answer.lower()
    if name == "country_capital":
        assert len(set(facts.values())) == len(facts)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("prepend_bos", [None, True])
def test_every_prompt_asks_for_its_fact(words, make, prepend_bos):
    name, pattern = KINDS[make]
    facts = table(name)
    task = make(words, prepend_bos=prepend_bos)
    row = torch.arange(len(task))
    right, wrong = ([t.strip() for t in words.to_str_tokens(ids)] for ids in (task.answers, task.wrong))
    at_subject = words.to_str_tokens(task.clean[row, task.positions["subject"]])
    assert task.mask is not None and 0 in task.mask, "these lists are ragged"
    skip = 1 if prepend_bos else 0
    for i, prompt in enumerate(task.prompts):
        clean, corrupt = (
            words.tokenizer.decode(ids[i][task.mask[i] == 1].tolist()[skip:]) for ids in (task.clean, task.corrupt)
        )
        assert clean == prompt
        subject, other = (re.fullmatch(pattern, text)[1] for text in (clean, corrupt))
        assert facts[subject] == right[i]
        assert facts[other] == wrong[i] != right[i]
        assert subject.endswith(at_subject[i].strip())
    assert set(words.to_str_tokens(task.clean[:, -1])) == {" of"}


def test_all_facts_that_can_be_posed_come_once(words):
    task = country_capital(words)
    listed = len(rows("country_capital"))
    single = sum(
        " " not in capital and "-" not in capital and "'" not in capital
        for capital in table("country_capital").values()
    )
    assert len(task) == len(set(task.prompts)) == single
    assert f"{single} of {listed} have an answer of one token, {single} a partner" in task.source


def test_a_fact_without_a_partner_is_left_out_and_counted(make_model):
    """With all other countries of four words gone, "the United Kingdom" has nobody to swap with."""
    capitals = table("country_capital")
    keep = {"France", "Italy", "the United Kingdom"}
    model = make_model(unknown=[capital for country, capital in capitals.items() if country not in keep])
    task = country_capital(model)
    assert "3 of 125 have an answer of one token, 2 a partner of equal length" in task.source
    assert len(task) == 2
    with pytest.raises(ValueError, match=r"n_prompts=3, but only 2 different prompts.*3 of 125"):
        country_capital(model, 3)
    lonely = make_model(unknown=[capital for country, capital in capitals.items() if country != "France"])
    with pytest.raises(ValueError, match="nothing is left .* 1 of 125"):
        country_capital(lonely)


@pytest.mark.parametrize("make", KINDS)
def test_seeds(words, make):
    assert make(words, 10, seed=3).fingerprint == make(words, 10, seed=3).fingerprint
    assert make(words, 10, seed=3).fingerprint != make(words, 10, seed=4).fingerprint


def test_refusals(make_model):
    with pytest.raises(ValueError, match="the landmark_country task asks for the next token"):
        landmark_country(make_model(kind="encoder"))
    with pytest.raises(ValueError, match="n_prompts=0"):
        country_capital(make_model(), 0)


@pytest.mark.parametrize("make", KINDS)
def test_the_default_model_knows_most(smol, make):
    task = make(smol, 32)
    logits = smol(task.clean, task.mask)[:, -1]
    prefer = logits.gather(1, task.answers[:, None]) > logits.gather(1, task.wrong[:, None])
    # Measured on all of them: capitals 100% (77% are the first choice of the whole vocabulary), landmarks 98% (70%).
    assert prefer.float().mean() >= 0.8
    assert (logits.argmax(-1) == task.answers).float().mean() >= 0.5
