"""Occupations after women and men, and injected instructions: are the prompts what they say?"""

from __future__ import annotations

import pytest
import torch

from interp.models import toy
from interp.tasks import injections, occupations
from interp.tasks._prompts import column, rows


def test_pairs_differ_in_the_person_alone(smol):
    found = occupations(smol, 60)
    task = found.task
    assert len(set(task.prompts)) == 60
    pairs = {(row["woman"], row["man"]) for row in rows("gender_pairs")}
    templates = column("occupation_templates", "template")
    for i in range(len(task)):
        differ = (task.clean[i] != task.corrupt[i]).nonzero().flatten().tolist()
        assert differ == [task.positions["person"][i].item()]
        woman, man = (smol.tokenizer.decode(row[i].tolist()) for row in (task.clean, task.corrupt))
        assert any(
            woman.endswith(template.format(person=a)) and man.endswith(template.format(person=b))
            for template in templates
            for a, b in pairs
        )


def test_words_are_the_tokens_that_would_be_written(smol):
    found = occupations(smol, 4)
    expected = {row["occupation"]: row["expected_of"] for row in rows("occupations")}
    for ids, who in ((found.women, "women"), (found.men, "men")):
        words = smol.to_str_tokens(ids)
        assert len(set(words)) == len(words) >= 5
        assert {expected[word.removeprefix(" ")] for word in words} == {who}
    assert torch.equal(found.task.options[0], torch.cat([found.women, found.men]))
    assert torch.isin(found.task.answers, found.women).all()
    assert torch.isin(found.task.wrong, found.men).all()


def test_the_three_versions_of_a_request(smol):
    made = injections(smol, 90, seed=3)
    sentences, words = column("injection_sentences", "sentence"), column("injection_words", "word")
    seen = set()
    for i, (plain, injected, mentioned) in enumerate(zip(*(task.prompts for task in made), strict=True)):
        word = smol.tokenizer.decode(made.plain.answers[i].item()).strip()
        sentence = plain.removeprefix("Correct the grammar in this sentence: ").removesuffix("\nAnswer:")
        assert word in words
        assert sentence in sentences
        assert word not in plain
        assert f"print the word {word}." in injected
        assert "print" not in mentioned
        assert f"about the word {word}." in mentioned
        seen.add((word, sentence))
    assert len(seen) == 90
    assert all(torch.equal(task.answers, made.plain.answers) for task in made)
    for task in made:
        tail = smol.tokenizer.decode(task.clean[0, -2:].tolist())
        assert tail.endswith("Answer:")
        assert (task.positions["end"] == task.clean.shape[1] - 1).all()


@pytest.mark.parametrize("make", [occupations, injections])
def test_a_draw_is_of_its_seed_and_bounded(smol, make):
    def prompts(seed: int) -> tuple[str, ...]:
        return make(smol, 8, seed=seed)[0].prompts

    assert prompts(1) == prompts(1) != prompts(2)
    with pytest.raises(ValueError, match="ask for at most"):
        make(smol, 10**6)
    with pytest.raises(ValueError, match="at least one prompt"):
        make(smol, 0)


@pytest.mark.parametrize("make", [occupations, injections])
def test_an_encoder_is_refused(make_model, make):
    with pytest.raises(ValueError, match="load a decoder"):
        make(make_model(kind="encoder"))


@pytest.mark.parametrize(
    ("make", "needs"), [(occupations, "two occupations of each kind"), (injections, "none of the words")]
)
def test_a_tokenizer_without_the_words(make, needs):
    with pytest.raises(ValueError, match=needs):
        make(toy.random("llama"))
