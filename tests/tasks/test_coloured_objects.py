from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from interp.tasks import coloured_objects
from interp.tasks._prompts import column

COLOURS, OBJECTS = column("colours", "colour"), column("coloured_objects", "object")
POSITIONS = {
    "correct_colour", "correct_object", "wrong_colour1", "wrong_object1", "wrong_colour2", "wrong_object2",
    "query_object", "end",
}  # fmt: skip
QUESTION = (
    r"Q: On the (?:table|desk|floor), (?:there is|you see|I see) "
    r"(an? \w+ \w+), (an? \w+ \w+), and (an? \w+ \w+)\. What color is the (\w+)\?\nA:"
)


def read(prompt):
    """An own reading of a prompt: the two questions' things {object: colour} and queries, and the shot's answer."""
    first, second = re.fullmatch(rf"({QUESTION}) (\w+)\n({QUESTION})", prompt), []
    groups = first.groups()
    for things in (groups[1:5], groups[7:11]):
        words = [thing.split() for thing in things[:3]]
        assert all((article == "an") == (colour[0] in "aeiou") for article, colour, _ in words)
        second.append(({thing: colour for _, colour, thing in words}, things[3]))
    return second, groups[5]


def decoded(model, ids):
    return [model.tokenizer.decode(row.tolist()) for row in ids]


def text(model, ids):
    return [token.strip() for token in model.to_str_tokens(ids)]


@pytest.mark.parametrize("corrupt", ["query", "swap"])
def test_every_prompt_is_what_it_says(words, corrupt):
    task = coloured_objects(words, 100, corrupt=corrupt)
    assert decoded(words, task.clean) == list(task.prompts)
    assert len(set(task.prompts)) == 100
    everything = zip(
        task.prompts, decoded(words, task.corrupt), text(words, task.answers), text(words, task.wrong), strict=True
    )
    for row, (clean, other, right, wrong) in enumerate(everything):
        ((shot, shot_query), (things, query)), shot_answer = read(clean)
        ((_, _), (changed, changed_query)), _ = read(other)
        assert clean.split("\n")[:2] == other.split("\n")[:2], "the shot is the same"
        assert shot_answer == shot[shot_query].title()
        assert len({*shot, *things}) == 6, "no object comes again"
        assert len({*shot.values(), *things.values()}) == 6, "no colour comes again"
        assert right == things[query].title()
        assert wrong == changed[changed_query].title() != right
        assert text(words, task.options[row]) == [colour.title() for colour in things.values()]
        assert list(changed) == list(things)
        if corrupt == "query":
            assert changed == things and changed_query in things and changed_query != query
        else:
            traded = {thing for thing in things if things[thing] != changed[thing]}
            assert changed_query == query in traded and len(traded) == 2
            assert sorted(changed.values()) == sorted(things.values())


@pytest.mark.parametrize("prepend_bos", [None, True])
@pytest.mark.parametrize("corrupt", ["query", "swap"])
def test_named_positions_hold_the_words_of_the_second_question(words, corrupt, prepend_bos):
    task = coloured_objects(words, 30, corrupt=corrupt, prepend_bos=prepend_bos)
    assert set(task.positions) == POSITIONS
    row = torch.arange(30)
    at = {name: text(words, task.clean[row, where]) for name, where in task.positions.items()}
    for i, prompt in enumerate(task.prompts):
        _, (things, query) = read(prompt)[0]
        assert at["query_object"][i] == at["correct_object"][i] == query
        for label in ("correct_{}", "wrong_{}1", "wrong_{}2"):
            assert at[label.format("colour")][i] == things[at[label.format("object")][i]]
        assert at["wrong_colour1"][i].title() == text(words, task.wrong[i : i + 1])[0]
        assert len({at[name][i] for name in POSITIONS if "colour" in name}) == 3
    start = [row.index(words.tokenizer.convert_tokens_to_ids("Q"), 5) for row in task.clean.tolist()]
    for name, where in task.positions.items():
        assert bool((where > torch.tensor(start)).all()), "the first question is left out"
        if "object" in name and name != "query_object":
            assert bool((where == task.positions[name.replace("object", "colour")] + 1).all())
    assert bool((task.positions["query_object"] == task.clean.shape[1] - 5).all()), "pen ? newline A :"
    assert set(at["end"]) == {":"}


def test_queries_and_contrasts_are_balanced_in_any_six(words):
    task = coloured_objects(words, 30)
    cases = []
    for prompt, wrong in zip(task.prompts, text(words, task.wrong), strict=True):
        _, (things, query) = read(prompt)[0]
        cases.append((list(things).index(query), list(things.values()).index(wrong.lower())))
    for begin in (0, 6, 11):
        assert len(set(cases[begin : begin + 6])) == 6
    shots = Counter(list(read(prompt)[0][0][0]).index(read(prompt)[0][0][1]) for prompt in task.prompts)
    assert set(shots) == {0, 1, 2}, "the shot asks about any of its three"


def test_seeds(words):
    assert coloured_objects(words, 16, seed=1).fingerprint == coloured_objects(words, 16, seed=1).fingerprint
    assert coloured_objects(words, 16, seed=1).fingerprint != coloured_objects(words, 16, seed=2).fingerprint
    swapped, queried = (coloured_objects(words, 16, corrupt=corrupt) for corrupt in ("swap", "query"))
    assert swapped.prompts == queried.prompts
    assert swapped.answers.tolist() == queried.answers.tolist()
    assert swapped.wrong.tolist() == queried.wrong.tolist()


def test_words_that_the_tokenizer_lacks_are_left_out_and_counted(make_model):
    # "brown" is gone as a word of the question, "Black" as an answer: neither colour can be used.
    model = make_model(unknown=["brown", "Black", "mug", "leash"])
    task = coloured_objects(model, 50)
    assert "colours 6 of 8, objects 15 of 17" in task.source
    assert not set(re.findall(r"\w+", " ".join(task.prompts))) & {"brown", "Brown", "black", "Black", "mug", "leash"}


def test_refusals_say_the_numbers(make_model, words):
    with pytest.raises(ValueError, match=r"takes 6 colours and 6 objects .* only: colours 5 of 8, objects 17 of 17"):
        coloured_objects(make_model(unknown=COLOURS[5:]))
    with pytest.raises(ValueError, match="objects 5 of 17"):
        coloured_objects(make_model(unknown=OBJECTS[5:]))
    with pytest.raises(ValueError, match="corrupt='abc' is not known; use one of 'query', 'swap'"):
        coloured_objects(words, corrupt="abc")
    with pytest.raises(ValueError, match="n_prompts=0"):
        coloured_objects(words, 0)
    with pytest.raises(ValueError, match="the coloured_objects task asks for the next token"):
        coloured_objects(make_model(kind="encoder"))


@pytest.mark.parametrize("corrupt", ["query", "swap"])
def test_the_default_tokenizer_states_the_task_in_tokens(smol, corrupt):
    """The answer, found from the ids alone: the token before the first mention of what the question ends with."""
    task = coloured_objects(smol, 32, corrupt=corrupt)
    assert task.mask is None, "all prompts are 62 tokens of the default tokenizer"
    assert task.clean.shape == (32, 62)
    assert "colours 8 of 8, objects 14 of 17" in task.source
    for ids, wanted in ((task.clean, task.answers), (task.corrupt, task.wrong)):
        for row, answer in zip(ids.tolist(), text(smol, wanted), strict=True):
            colour = row[row.index(row[-5]) - 1]
            assert text(smol, [colour]) == [answer.lower()]
    differ = (task.clean != task.corrupt).sum(1)
    if corrupt == "query":
        assert differ.tolist() == [1] * 32, "the queried object and nothing else"
    else:
        assert set(differ.tolist()) == {2, 4}, "two colours, and two articles where one of them is orange"


def test_the_default_model_answers_with_a_colour_of_the_question(smol):
    """It hardly chooses the right one (see the docstring), but the form of the prompt is understood."""
    task = coloured_objects(smol, 8)
    with torch.no_grad():
        top = smol(task.clean)[:, -1].argmax(-1)
    # Measured on 400 prompts: 69% of the first choices of the whole vocabulary are one of the three.
    assert (task.options == top[:, None]).any(1).float().mean() >= 0.5
