from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from interp.tasks import multiple_choice
from interp.tasks._prompts import column, rows

CAPITALS = {row["country"]: row["capital"] for row in rows("country_capital")}
COUNTRIES = {row["landmark"]: row["country"] for row in rows("landmark_country")}
PRELUDE = "The following are multiple choice questions with answers."


def read(prompt, separator=")", prelude=True):
    """An own reading of a prompt: each question with its labels, its contents, its right content and its answer."""
    head, *blocks = prompt.split("\n\n") if prelude else [None, *prompt.split("\n\n")]
    assert head == (PRELUDE if prelude else None)
    found = []
    for block in blocks:
        question, *lines, answer = block.split("\n")
        opening = "(" if separator == ")" else ""
        marks, contents = zip(*(line.removeprefix(opening).split(f"{separator} ", 1) for line in lines), strict=True)
        assert all(line.startswith(opening) for line in lines)
        assert answer.startswith(f"Answer: {opening}".rstrip())
        given = answer.removeprefix(f"Answer: {opening}".rstrip()).strip().removesuffix(")")
        found.append((question, list(marks), list(contents), solve(question), given))
    return found


def solve(question):
    if hit := re.fullmatch(r"The (\w+) is (\w+)\. What color is the (\w+)\?", question):
        assert hit[1] == hit[3]
        return hit[2]
    if hit := re.fullmatch(r"What is the capital of (.+)\?", question):
        return CAPITALS[hit[1]]
    return COUNTRIES[re.fullmatch(r"Which country is home to (.+)\?", question)[1]]


def decoded(model, task, ids):
    masks = torch.ones_like(ids) if task.mask is None else task.mask
    return [model.tokenizer.decode(row[mask == 1].tolist()) for row, mask in zip(ids, masks, strict=True)]


def text(model, ids):
    return [token.strip() for token in model.to_str_tokens(ids)]


@pytest.mark.parametrize("form", ["copy", "knowledge"])
@pytest.mark.parametrize("given", [{}, {"n_shots": 3, "n_options": 3}, {"prelude": False, "separator": "."}])
def test_every_prompt_is_what_it_says(words, form, given):
    task = multiple_choice(words, 60, form=form, **given)
    assert decoded(words, task, task.clean) == list(task.prompts)
    assert len(set(task.prompts)) == 60
    layout = {name: given[name] for name in ("separator", "prelude") if name in given}
    right, wrong = text(words, task.answers), text(words, task.wrong)
    for row, (clean, other) in enumerate(zip(task.prompts, decoded(words, task, task.corrupt), strict=True)):
        *shots, (question, marks, contents, content, answer) = read(clean, **layout)
        *other_shots, (other_question, other_marks, other_contents, _, _) = read(other, **layout)
        assert len(shots) == given.get("n_shots", 0) and shots == other_shots
        for shot_question, shot_marks, shot_contents, shot_content, shot_answer in shots:
            assert shot_answer == shot_marks[shot_contents.index(shot_content)]
            assert shot_marks == marks and len(set(shot_contents)) == len(marks)
            assert shot_question != question
            if form == "knowledge":
                assert shot_content != content, "a shot does not give the answer away"
        assert answer == ""
        assert marks == other_marks == list("ABCD")[: given.get("n_options", 4)] == text(words, task.options[row])
        assert question == other_question and len(set(contents)) == len(marks)
        assert right[row] == marks[contents.index(content)]
        assert wrong[row] == marks[other_contents.index(content)] != right[row]
        moved = [i for i in range(len(marks)) if contents[i] != other_contents[i]]
        assert [marks[i] for i in moved] == sorted([right[row], wrong[row]]), "two options trade places"


@pytest.mark.parametrize("form", ["copy", "knowledge"])
@pytest.mark.parametrize("prepend_bos", [None, True])
def test_named_positions_hold_labels_and_contents_in_both_prompts(words, form, prepend_bos):
    task = multiple_choice(words, 40, form=form, n_shots=1, labels="random_letters", prepend_bos=prepend_bos)
    assert (task.mask is None) == (form == "copy"), "names of countries are ragged"
    row = torch.arange(40)
    at, at_corrupt = (
        {name: text(words, ids[row, where]) for name, where in task.positions.items()}
        for ids in (task.clean, task.corrupt)
    )
    for i, (clean, other) in enumerate(zip(task.prompts, decoded(words, task, task.corrupt), strict=True)):
        skip = 5 if prepend_bos else 0  # "<bos>" is decoded too
        for prompt, tokens in ((clean, at), (other[skip:], at_corrupt)):
            marks, contents, content = read(prompt)[-1][1:4]
            for option, (mark, words_of_option) in enumerate(zip(marks, contents, strict=True)):
                assert tokens[f"label_{option}"][i] == mark
                assert words_of_option.endswith(tokens[f"content_{option}"][i])
        assert contents.index(content) == marks.index(at["wrong_label"][i]), "where the corrupt answer stands"
    assert at["correct_label"] == text(words, task.answers)
    assert at["wrong_label"] == at_corrupt["wrong_label"] == text(words, task.wrong)
    for name in ("label", "content"):
        each = torch.stack([task.positions[f"{name}_{i}"] for i in range(4)])
        assert bool((each[1:] > each[:-1]).all())
        labels = zip(options(words, task), at["correct_label"], strict=True)
        right = torch.tensor([marks.index(answer) for marks, answer in labels])
        assert torch.equal(each[right, row], task.positions[f"correct_{name}"])
    assert bool((task.positions["label_0"] > task.clean.shape[1] // 2).all()), "in the last question, not in the shot"
    assert set(at["end"]) == {"("}


def options(model, task):
    return [text(model, row) for row in task.options]


@pytest.mark.parametrize("form", ["copy", "knowledge"])
def test_the_two_prompts_hold_the_same_tokens(words, form):
    task = multiple_choice(words, 40, form=form, n_shots=1)
    assert torch.equal(task.clean.sort(1).values, task.corrupt.sort(1).values)
    if form == "copy":
        assert set((task.clean != task.corrupt).sum(1).tolist()) == {2}


def test_right_and_wrong_labels_are_balanced(words):
    task = multiple_choice(words, 24, n_shots=2)
    pairs = Counter(zip(text(words, task.answers), text(words, task.wrong), strict=True))
    assert len(pairs) == 12 and set(pairs.values()) == {2}
    assert {read(prompt)[0][4] for prompt in task.prompts} == set("ABCD"), "shots have any answer"


def test_labels(make_model):
    model = make_model(digits=1)
    random, ordered, numbers = (
        options(model, multiple_choice(model, 40, labels=labels, n_options=5))
        for labels in ("random_letters", "ordered_letters", "numbers")
    )
    assert all(len(set(marks)) == 5 for marks in random + ordered)
    assert all(marks == sorted(marks) for marks in ordered)
    assert sum(marks == sorted(marks) for marks in random) <= 4, "1 of 120 orders is that of the alphabet"
    assert {mark for marks in random for mark in marks} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert all(marks == list("12345") for marks in numbers)
    task = multiple_choice(model, 4, labels="numbers")
    for prompt, right in zip(task.prompts, text(model, task.answers), strict=True):
        _, marks, contents, content, _ = read(prompt)[0]
        assert right == marks[contents.index(content)]


def test_a_label_stands_before_its_separator_and_the_end_asks_for_it(words):
    lines = r"(\n\([A-D]\) \w+){4}"
    assert re.fullmatch(rf"{PRELUDE}\n\n[^\n]*{lines}\nAnswer: \(", multiple_choice(words, 1).prompts[0])
    for separator, end in ((".", "Answer:"), (" -", "Answer:")):
        task = multiple_choice(words, 8, separator=separator, n_shots=1)
        assert all(prompt.endswith(f"\n{end}") for prompt in task.prompts)
        assert f"\nB{separator} " in task.prompts[0]
        assert words.to_str_tokens(task.options[0]) == [" A", " B", " C", " D"], "with the space of the answer"
        assert set(words.to_str_tokens(task.clean[torch.arange(8), task.positions["correct_label"]])) <= set("ABCD")


def test_seeds(words):
    for form in ("copy", "knowledge"):
        first = multiple_choice(words, 16, form=form, labels="random_letters", n_shots=2, seed=1)
        assert first.fingerprint == (
            multiple_choice(words, 16, form=form, labels="random_letters", n_shots=2, seed=1).fingerprint
        )
        assert first.fingerprint != (
            multiple_choice(words, 16, form=form, labels="random_letters", n_shots=2, seed=2).fingerprint
        )


def test_what_the_tokenizer_lacks_is_left_out_and_counted(make_model):
    model = make_model(unknown=["B", "C", "red", "mug"])
    task = multiple_choice(model, 40, labels="ordered_letters")
    assert "colours 7 of 8, objects 16 of 17" in task.source
    assert not {mark for marks in options(model, task) for mark in marks} & {"B", "C"}
    assert not set(re.findall(r"\w+", " ".join(task.prompts))) & {"red", "mug"}
    with pytest.raises(
        ValueError, match=r"need 4 labels that are single tokens after 'Answer: \(', but words's .* has 2"
    ):
        multiple_choice(model)


def test_facts_with_too_few_answers_of_their_length_are_left_out(words):
    """Contents of one question have as many tokens, so that no label moves when two of them trade places."""
    task = multiple_choice(words, 200, form="knowledge", n_options=5)
    kept = int(re.search(r"(\d+) of (\d+) facts have 4 other answers", task.source)[1])
    lengths = Counter()
    for name, table in (("capital", CAPITALS), ("country", COUNTRIES)):
        for answer in set(table.values()):
            lengths[name, len(words.tokenizer(f"the {answer}")["input_ids"])] += 1
    wanted = sum(
        lengths[name, len(words.tokenizer(f"the {answer}")["input_ids"])] >= 5
        for name, table in (("capital", CAPITALS), ("country", COUNTRIES))
        for answer in table.values()
    )
    assert kept == wanted < len(CAPITALS) + len(COUNTRIES)
    with pytest.raises(ValueError, match=f"n_prompts=300, but only {kept} different prompts"):
        multiple_choice(words, 300, form="knowledge", n_options=5)


def test_refusals_say_what_to_do(make_model, words):
    for given, message in (
        ({"form": "cloze"}, "form='cloze' is not known; use one of 'copy', 'knowledge'"),
        ({"labels": "roman"}, "labels='roman' is not known; use one of 'letters'"),
        ({"separator": ""}, "separator=''; it stands between"),
        ({"separator": " "}, "separator=' '; it stands between"),
        ({"separator": "x"}, "separator='x'; it stands between"),
        ({"separator": ".\n"}, "separator='.\\\\n'; it stands between"),
        ({"n_options": 1}, "n_options=1 and n_shots=0; there must be two options"),
        ({"n_shots": -1}, "n_options=4 and n_shots=-1"),
        ({"n_options": 9}, "takes 9 colours and 1 objects .* colours 8 of 8"),
        ({"n_shots": 17}, "takes 4 colours and 18 objects .* objects 17 of 17"),
        ({"n_options": 10, "labels": "numbers"}, "need 10 labels that are single tokens"),
        ({"n_shots": 400, "form": "knowledge"}, "n_shots=400, but only .* other facts can be shots of"),
        ({"n_prompts": 0}, "n_prompts=0"),
    ):
        with pytest.raises(ValueError, match=message):
            multiple_choice(words, **given)
    with pytest.raises(ValueError, match='has 0: use fewer options, other labels or separator="\\)"'):
        multiple_choice(make_model(digits=1, unknown=["1", "2", "3", "4"]), labels="numbers", separator=".")
    two = make_model(unknown=column("colours", "colour")[2:] + column("coloured_objects", "object")[1:])
    assert len(multiple_choice(two, 2, n_options=2)) == 2
    with pytest.raises(ValueError, match="n_prompts=3, but only 2 different prompts"):
        multiple_choice(two, 3, n_options=2)
    with pytest.raises(ValueError, match="the multiple_choice task asks for the next token"):
        multiple_choice(make_model(kind="encoder"))


@pytest.mark.parametrize("form", ["copy", "knowledge"])
def test_the_default_tokenizer_keeps_labels_in_place(smol, form):
    task = multiple_choice(smol, 40, form=form, labels="numbers", n_shots=1)
    assert decoded(smol, task, task.clean) == list(task.prompts)
    row = torch.arange(40)
    for option in range(4):
        where = task.positions[f"label_{option}"]
        assert torch.equal(task.clean[row, where], task.options[:, option])
        assert torch.equal(task.corrupt[row, where], task.options[:, option])
    assert (task.mask is None) == (form == "copy")
    with pytest.raises(ValueError, match="'Answer:', but smollm2-135m's tokenizer has 0"):
        multiple_choice(smol, labels="numbers", separator=".")


def test_the_default_model_answers_with_a_label(smol):
    """It is at chance in choosing the right one (see the docstring), but the form of the prompt is understood."""
    task = multiple_choice(smol, 8)
    assert task.mask is None, "all prompts are 46 tokens of the default tokenizer"
    assert task.clean.shape == (8, 46)
    with torch.no_grad():
        top = smol(task.clean)[:, -1].argmax(-1)
    # Measured: on 100 of 100 prompts.
    assert bool((task.options == top[:, None]).any(1).all())
