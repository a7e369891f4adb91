from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from interp.tasks import Task

CLEAN = ["The capital of France is", "The capital of the Netherlands is"]
CORRUPT = ["The capital of Italy is", "The capital of the Philippines is"]
ANSWERS, WRONG = [" Paris", " Amsterdam"], [" Rome", " Manila"]


def make(model, **changed):
    given = {"clean": CLEAN, "corrupt": CORRUPT, "answers": ANSWERS, "wrong": WRONG, "positions": {"subject": [3, 4]}}
    given |= changed
    return Task.from_pairs(model, "capitals", given.pop("clean"), given.pop("corrupt"), **given)


@pytest.fixture
def task(words):
    return make(words)


@pytest.fixture
def ten():
    """Ten prompts whose rows tell them apart."""
    row = torch.arange(10)
    return Task(
        "ten", tuple(f"prompt {i}" for i in range(10)), row[:, None] * 10 + torch.arange(3), "counting",
        corrupt=row[:, None] * 10 + 5 + torch.arange(3), answers=row, wrong=row + 50, positions={"end": row + 100},
        mask=torch.ones(10, 3, dtype=torch.long), options=torch.stack([row, row + 30, row + 50], dim=1),
    )  # fmt: skip


def test_ragged_prompts_are_padded_left_and_positions_move_along(words, task):
    assert task.mask.tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    for ids, prompts in ((task.clean, CLEAN), (task.corrupt, CORRUPT)):
        for row, mask, prompt in zip(ids, task.mask, prompts, strict=True):
            assert words.tokenizer.decode(row[mask == 1].tolist()) == prompt
    at = {name: words.to_str_tokens(task.clean[[0, 1], where]) for name, where in task.positions.items()}
    assert at == {"subject": [" France", " Netherlands"], "end": [" is", " is"]}
    assert words.to_str_tokens(task.answers) == ANSWERS
    assert words.to_str_tokens(task.wrong) == WRONG


def test_options_are_the_candidates_in_the_order_given(words):
    task = make(words, options=[[" Rome", " Oslo", " Paris"], [" Amsterdam", " Manila", " Oslo"]])
    assert [words.to_str_tokens(row) for row in task.options] == [
        [" Rome", " Oslo", " Paris"],
        [" Amsterdam", " Manila", " Oslo"],
    ]
    assert make(words).options is None


def test_equally_long_prompts_have_no_mask(words):
    assert (
        make(words, clean=CLEAN[:1], corrupt=CORRUPT[:1], answers=[" Paris"], wrong=[" Rome"], positions={}).mask
        is None
    )


def test_bos_moves_positions_only_when_they_count_it(make_model):
    task = make(make_model(bos=True), positions={"subject": [4, 5]})
    assert task.clean[1, 0] == 1
    assert task.clean[0, :2].tolist()[1] == 1, "padding comes before BOS"
    assert task.positions["subject"].tolist() == [5, 5]


def test_slices_are_tasks_of_the_same_rows(ten):
    for rows, kept in ((slice(0, 3), [0, 1, 2]), ([7, 2], [7, 2]), (np.array([False] * 9 + [True]), [9])):
        part = ten[rows]
        assert part.prompts == tuple(f"prompt {i}" for i in kept)
        assert part.clean[:, 0].tolist() == [10 * i for i in kept]
        assert part.corrupt[:, 0].tolist() == [10 * i + 5 for i in kept]
        assert part.answers.tolist() == kept
        assert part.wrong.tolist() == [i + 50 for i in kept]
        assert part.positions["end"].tolist() == [i + 100 for i in kept]
        assert len(part.mask) == len(kept)
        assert part.options.tolist() == [[i, i + 30, i + 50] for i in kept]
    with pytest.raises(ValueError, match="'ten' has no prompts"):
        ten[10:]


def test_a_single_prompt_is_asked_for_as_a_slice(ten):
    with pytest.raises(TypeError, match=r"task\[i:i\+1\]"):
        ten[np.array(3)]


def test_split_is_a_partition_that_the_seed_chooses(ten):
    first, second = ten.split(0, fraction=0.3)
    assert len(first) == 3
    assert sorted([*first.answers.tolist(), *second.answers.tolist()]) == list(range(10))
    assert ten.split(0)[0].fingerprint == ten.split(0)[0].fingerprint
    assert len({ten.split(seed)[0].fingerprint for seed in range(5)}) > 1
    for fraction in (0.0, 0.04, 1.0):
        with pytest.raises(ValueError, match=f"10 prompts cannot be split at fraction {fraction}"):
            ten.split(0, fraction=fraction)


def test_fingerprint_covers_all_that_a_method_reads(ten):
    same = dataclasses.replace(ten, source="somewhere else", prompts=tuple("abcdefghij"))
    assert same.fingerprint == ten.fingerprint
    seen = {ten.fingerprint, dataclasses.replace(ten, name="other").fingerprint}
    free = dataclasses.replace(ten, options=None)
    for label in ("clean", "corrupt", "answers", "wrong", "mask"):
        tensor = getattr(ten, label).clone()
        tensor.view(-1)[-1] += 1
        seen.add(dataclasses.replace(free, **{label: tensor}).fingerprint)
    seen.add(dataclasses.replace(ten, options=ten.options + torch.tensor([0, 1, 0])).fingerprint)
    seen.add(dataclasses.replace(ten, options=ten.options.flip(1)).fingerprint)
    for label in ("corrupt", "answers", "wrong", "mask", "options"):
        seen.add(dataclasses.replace(ten, **{label: None}).fingerprint)
    seen.add(dataclasses.replace(ten, positions={"end": ten.positions["end"] + 1}).fingerprint)
    seen.add(dataclasses.replace(ten, positions={"start": ten.positions["end"]}).fingerprint)
    assert len(seen) == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corrupt": [CORRUPT[0], "The capital of Italy is"]}, r"pair 1: the clean prompt has 6 tokens .* one 5"),
        ({"corrupt": [CORRUPT[0], CLEAN[1]]}, "pair 1: clean and corrupt are the same prompt"),
        ({"answers": [" Paris", " New York"]}, r"pair 1: ' New York' is not one known token"),
        ({"wrong": [" Rome", " Atlantis"]}, r"pair 1: ' Atlantis' is not one known token"),
        ({"answers": [" Paris", " Manila"]}, "pair 1: ' Manila' is both"),
        ({"positions": {"subject": [3]}}, "'subject' has 1 values for 2 prompts"),
        ({"positions": {"subject": [3, 6]}}, "pair 1: position 'subject' is 6, but the prompt has 6 tokens"),
        ({"positions": {"subject": [5, 5]}}, "pair 0: position 'subject' is 5, but the prompt has 5 tokens"),
        ({"positions": {"subject": [-1, 4]}}, "pair 0: position 'subject' is -1"),
        ({"positions": {"end": [4, 5]}}, "'end' is the last token and is added here"),
        ({"options": [[" Paris", " Rome"]]}, "1 rows of options, of 2 candidates, for 2 prompts"),
        ({"options": [[" Paris", " Rome"], [" Manila"]]}, "2 rows of options, of 1 or 2 candidates, for 2 prompts"),
        (
            {"options": [[" Paris", " Rome"], [" Manila", " Rome"]]},
            "prompt 1: answers is token .* not among its options",
        ),
        (
            {"options": [[" Paris", " Oslo"], [" Manila", " Oslo"]]},
            "prompt 1: answers is token .* not among its options",
        ),
        ({"options": [[" Paris", " Atlantis"]] * 2}, r"pair 0: ' Atlantis' is not one known token"),
        ({"answers": [" Paris"]}, "2 clean prompts, 2 corrupt, 1 answers and 2 wrong"),
        ({"clean": [], "corrupt": [], "answers": [], "wrong": []}, "no prompts were given"),
        ({"clean": [CLEAN[0], ""]}, "prompt 1 is empty"),
    ],
)
def test_refused_pairs_are_named(words, changed, message):
    with pytest.raises(ValueError, match=message):
        make(words, **changed)


def test_prompts_beyond_the_context_are_refused(make_model):
    with pytest.raises(ValueError, match="prompt 1 has 6 tokens, but words has a context of 5"):
        make(make_model(n_ctx=5))


def test_shapes_that_do_not_fit_are_refused(ten):
    with pytest.raises(ValueError, match="answers has 9 rows for 10 prompts"):
        dataclasses.replace(ten, answers=torch.arange(9))
    with pytest.raises(ValueError, match=r"corrupt is \(10, 4\) and clean \(10, 3\)"):
        dataclasses.replace(ten, corrupt=torch.zeros(10, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"options is \(10,\); it is \[batch option\]"):
        dataclasses.replace(ten, options=ten.answers)
    with pytest.raises(ValueError, match="prompt 3: wrong is token 53, which is not among its options"):
        dataclasses.replace(ten, options=torch.where(ten.options == 53, 90, ten.options))
    with pytest.raises(ValueError, match="prompt 0: an option comes twice"):
        dataclasses.replace(ten, options=ten.options[:, [0, 2, 0]])
    with pytest.raises(ValueError, match="position 'end' is"):
        dataclasses.replace(ten, positions={"end": torch.arange(9)})


def test_an_answer_is_the_token_that_it_is_after_its_prompt(smol):
    """A year's last two digits after its first two; and the trap of a prompt that ends with a space."""
    task = Task.from_pairs(smol, "digits", ["to the year 17"], ["to the year 18"], ["3"], ["1"])
    assert smol.to_str_tokens(task.answers) == ["3"]
    with pytest.raises(ValueError, match="must not end with a space"):
        Task.from_pairs(smol, "space", ["It is in "], ["It was in "], ["France"], ["Spain"])
