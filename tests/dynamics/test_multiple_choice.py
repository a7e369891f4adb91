"""Are the prompts what they say, the held-out ones never trained on, and the model trained once only?"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import interp
from interp.dynamics import _run, multiple_choice
from interp.dynamics.multiple_choice import (
    FORMS,
    LETTERS,
    NUMBERS,
    SEPARATORS,
    VOCABULARY,
    WORDS,
    batch,
    multiple_choice_task,
    tokenizer,
    train_multiple_choice,
)
from interp.dynamics.train import IGNORED, build, config
from interp.models import Model, toy


class Read(NamedTuple):
    """A prompt as a reader reads it."""

    asked: str
    labels: list[str]
    separators: list[str]
    contents: list[str]

    @property
    def answer(self) -> str:
        return self.labels[self.contents.index(self.asked)]

    @property
    def form(self) -> str:
        if self.labels in (["A", "B", "C", "D"], ["1", "2", "3", "4"]):
            return "letters" if self.labels[0] == "A" else "numbers"
        return "ordered_letters" if self.labels == sorted(self.labels) else "random_letters"


def read(prompt: str) -> Read:
    options = r"(?P<options>(?:\S+ \S+ \S+ ){4})"
    for form in (rf"<bos> query (?P<asked>\S+) : {options}answer :", rf"<bos> {options}query (?P<asked>\S+)"):
        if found := re.fullmatch(form, prompt):
            break
    assert found, prompt
    words = found["options"].split()
    return Read(found["asked"], words[::3], words[1::3], words[2::3])


def held_out(prompt: Read) -> bool:
    return sum(int(word[1:]) for word in prompt.contents) % 10 == 0


def text(tokens: torch.Tensor) -> list[str]:
    return [" ".join(VOCABULARY[token] for token in row) for row in tokens.tolist()]


@pytest.fixture(scope="module")
def model() -> Model:
    """An untrained model of the vocabulary."""
    sizes = config("gpt2", d_vocab=len(VOCABULARY), n_ctx=32, n_layers=1, n_heads=2, d_model=16)
    return interp.load(build(sizes), tokenizer=tokenizer(), weights="raw")


@pytest.fixture(params=["first", "last"])
def either(request: pytest.FixtureRequest, model: Model) -> Model:
    """The same, named as one that was trained with the question first, or last."""
    return replace(model, name=f"multiple-choice-question-{request.param}")


# --- training prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question, length", [("first", 18), ("last", 15)])
def test_training_prompts_ask_for_the_label_of_the_content(question: str, length: int) -> None:
    tokens, targets = batch(torch.Generator().manual_seed(0), 500, question=question)
    assert tokens.shape == targets.shape == (500, length)
    assert {row[1] == VOCABULARY.index("query") for row in tokens.tolist()} == {question == "first"}
    assert bool((targets[:, :-1] == IGNORED).all())
    for prompt, target in zip(map(read, text(tokens)), targets[:, -1].tolist(), strict=True):
        assert prompt.answer == VOCABULARY[target]
        assert len(set(prompt.labels)) == len(set(prompt.contents)) == 4
        assert set(prompt.contents) <= set(WORDS)
        assert len(set(prompt.separators)) == 1
        assert not held_out(prompt)


def test_training_prompts_are_mixed_as_stated() -> None:
    n = 4000
    prompts = [read(prompt) for prompt in text(batch(torch.Generator().manual_seed(1), n)[0])]
    # One random draw in 24 is in order by chance, and one of those in 14,950 is A B C D.
    shares = FORMS | {
        "ordered_letters": FORMS["ordered_letters"] + FORMS["random_letters"] / 24,
        "random_letters": FORMS["random_letters"] * 23 / 24,
    }
    assert sum(FORMS.values()) == pytest.approx(1) and sum(SEPARATORS.values()) == pytest.approx(1)
    for counted, expected in (
        (Counter(prompt.form for prompt in prompts), shares),
        (Counter(prompt.separators[0] for prompt in prompts), SEPARATORS),
        (Counter(prompt.contents.index(prompt.asked) for prompt in prompts), dict.fromkeys(range(4), 0.25)),
        (Counter(prompt.asked for prompt in prompts), dict.fromkeys(WORDS, 1 / len(WORDS))),
    ):
        assert set(counted) == set(expected)
        for name, share in expected.items():
            # four standard errors of a share of n draws: one such test in 16,000 fails by chance
            assert counted[name] / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n)), name
    drawn = Counter(label for prompt in prompts if prompt.form == "random_letters" for label in prompt.labels)
    assert set(drawn) == set(LETTERS)


# --- the task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", FORMS)
def test_task_prompts_their_answers_and_their_corruption(either: Model, labels: str) -> None:
    task = multiple_choice_task(either, 48, labels=labels, separator="]", seed=3)
    assert len(task) == 48 and task.name == "multiple_choice" and labels in task.source
    assert task.prompts[0].startswith("<bos> query") == either.name.endswith("first")
    assert torch.equal(either.tokenize(list(task.prompts)).ids, task.clean)
    for row, (clean, corrupt) in enumerate(zip(task.prompts, text(task.corrupt), strict=True)):
        one, other = read(clean), read(corrupt)
        assert one.answer == VOCABULARY[task.answers[row]]
        assert other.answer == VOCABULARY[task.wrong[row]] != one.answer
        assert (one.asked, one.labels, one.separators) == (other.asked, other.labels, ["]"] * 4)
        assert sorted(one.contents) == sorted(other.contents)
        assert sum(a != b for a, b in zip(one.contents, other.contents, strict=True)) == 2
        assert [VOCABULARY[token] for token in task.options[row]] == one.labels
        assert held_out(one) and held_out(other)
    forms = {read(prompt).form for prompt in task.prompts}
    assert labels in forms and forms <= {labels, "ordered_letters"}


def test_task_positions_point_at_what_they_name(either: Model) -> None:
    task = multiple_choice_task(either, 24, labels="random_letters", seed=1)
    words = [prompt.split() for prompt in task.prompts]

    def at(name: str) -> list[str]:
        return [line[place] for line, place in zip(words, task.positions[name].tolist(), strict=True)]

    prompts = [read(prompt) for prompt in task.prompts]
    for option in range(4):
        assert at(f"label_{option}") == [prompt.labels[option] for prompt in prompts]
        assert at(f"content_{option}") == [prompt.contents[option] for prompt in prompts]
    # Words come twice, so a place is checked by its neighbour too.
    assert at("correct_label") == [VOCABULARY[token] for token in task.answers]
    assert at("wrong_label") == [VOCABULARY[token] for token in task.wrong]
    assert at("correct_content") == [prompt.asked for prompt in prompts]
    assert torch.equal(task.positions["correct_content"], task.positions["correct_label"] + 2)
    assert task.positions["end"].tolist() == [len(line) - 1 for line in words]
    first = task.positions["label_0"]
    right, wrong = ((task.positions[name] - first) // 3 for name in ("correct_label", "wrong_label"))
    # Both go round: in 24 prompts each of the twelve pairs of places comes twice.
    assert Counter(zip(right.tolist(), wrong.tolist(), strict=True)) == {
        (a, b): 2 for a in range(4) for b in range(4) if a != b
    }


def test_names_are_those_of_the_natural_task(model: Model, smol: Model) -> None:
    ours, theirs = multiple_choice_task(model, 4), interp.tasks.multiple_choice(smol, 4)
    assert set(ours.positions) == set(theirs.positions)
    assert ours.name == theirs.name
    for field in ("corrupt", "answers", "wrong", "options"):
        assert getattr(ours, field).shape[0] == getattr(theirs, field).shape[0] == 4


def test_seed_decides_the_task(model: Model) -> None:
    first, second, third = (multiple_choice_task(model, 8, seed=seed).fingerprint for seed in (0, 0, 1))
    assert first == second != third
    before = torch.get_rng_state()
    assert len(multiple_choice_task(model, 5, labels="numbers")) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_tasks_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="labels='roman' is not known here; use one of 'letters'"):
        multiple_choice_task(model, labels="roman")
    with pytest.raises(ValueError, match="separator='/' is not known here"):
        multiple_choice_task(model, separator="/")
    with pytest.raises(ValueError, match="at least one"):
        multiple_choice_task(model, 0)
    with pytest.raises(ValueError, match="another vocabulary; use the model of train_multiple_choice"):
        multiple_choice_task(toy.random("gpt2"))


def test_vocabulary_has_no_word_twice() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert set(NUMBERS[:4]) <= set(VOCABULARY)


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a training of six steps."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    short = {"steps": 6, "every": 3, "batch_size": 64}
    monkeypatch.setattr(multiple_choice, "_TRAINING", multiple_choice._TRAINING | short)
    return tmp_path / "trained"


def no_training(*given: Any, **options: Any) -> None:
    raise AssertionError("trained again")


def test_the_model_is_trained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, history = train_multiple_choice(weights="raw")
    assert (first.n_layers, first.d_vocab) == (3, len(VOCABULARY))
    assert history.meta["steps_done"] == 6
    (kept,) = cache.iterdir()
    assert {path.name for path in kept.iterdir()} == {first.name, "history"}
    other, _ = train_multiple_choice(seed=1)
    assert other.fingerprint != first.fingerprint
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(multiple_choice, "train", no_training)
    second, again = train_multiple_choice(weights="raw")
    assert second.fingerprint == first.fingerprint
    assert again.table.equals(history.table)
    # The history's held-out accuracy is that of the model that is handed over, on prompts never trained on.
    half, _ = train_multiple_choice(dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.weights == "processed"
    assert half.fingerprint == first.fingerprint


def test_another_recipe_is_another_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_multiple_choice()
    monkeypatch.setattr(multiple_choice, "FORMS", FORMS | {"numbers": 0.2})
    train_multiple_choice()
    monkeypatch.setattr(multiple_choice, "_TRAINING", multiple_choice._TRAINING | {"learning_rate": 2e-3})
    train_multiple_choice()
    assert len(list(cache.iterdir())) == 3
    other, _ = train_multiple_choice(question="last")
    assert len(list(cache.iterdir())) == 4
    assert multiple_choice_task(other, 1).clean.shape == (1, 15)


def test_history_is_that_of_the_model_handed_over(cache: Path) -> None:
    model, history = train_multiple_choice(seed=5, weights="raw")
    tokens, targets = multiple_choice._held_out(5, "first")
    assert all(held_out(read(prompt)) for prompt in text(tokens))
    right = (model(tokens)[:, -1].argmax(-1) == targets[:, -1]).double().mean()
    last = history.filter(metric="held-out accuracy").table["value"].iloc[-1]
    # A near tie may fall the other way with eager attention: one prompt of 1,024.
    assert float(right) == pytest.approx(last, abs=0.0015)
    assert history.meta["n_held_out"] == len(tokens) == 1024


def test_a_stopped_training_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, history = train_multiple_choice()
    for folder in cache.iterdir():
        folder.rename(cache.parent / "elsewhere")
    real, calls = multiple_choice.batch, iter(range(-1, 100))  # one draw is for the data's fingerprint

    class Stopped(Exception):
        pass

    def stops(generator: torch.Generator, n: int, *, question: str) -> _run.Batch:
        if next(calls) == 5:
            raise Stopped
        return real(generator, n, question=question)

    monkeypatch.setattr(multiple_choice, "batch", stops)
    with pytest.raises(Stopped):
        train_multiple_choice()
    (unfinished,) = cache.iterdir()
    assert [path.name for path in unfinished.iterdir()] == ["checkpoint.safetensors"]
    monkeypatch.setattr(multiple_choice, "batch", real)
    resumed, again = train_multiple_choice()
    assert resumed.fingerprint == whole.fingerprint
    assert again.table.equals(history.table)


def test_folders_that_do_not_fit_are_refused(cache: Path, tmp_path: Path) -> None:
    model, _ = train_multiple_choice(folder=tmp_path / "mine")
    assert not cache.exists()
    assert train_multiple_choice(folder=tmp_path / "mine")[0].fingerprint == model.fingerprint
    with pytest.raises(ValueError, match="another recipe .seed 0; asked for: 7"):
        train_multiple_choice(seed=7, folder=tmp_path / "mine")
    with pytest.raises(ValueError, match="question='middle' is not known here; use one of 'first', 'last'"):
        train_multiple_choice(question="middle")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="give folder=, or set INTERP_CACHE"):
        train_multiple_choice(folder=tmp_path / "file")
