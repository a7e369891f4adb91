from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from interp.tasks import in_context
from interp.tasks._prompts import rows

KINDS = {"sentiment": ("Text", "Sentiment", 2), "topic": ("Article", "Answer", 4), "question": ("Text", "Type", 4)}


def halves(kind: str) -> dict[str, dict[str, str]]:
    """{half: {text: label}}."""
    return {half: {r["text"]: r["label"] for r in rows(f"in_context_{kind}") if r["part"] == half}
            for half in ("test", "development")}  # fmt: skip


def read(prompt: str, kind: str) -> tuple[list[tuple[str, str]], str]:
    """Demonstrations as (text, label), and the text that is asked about."""
    text, label, _ = KINDS[kind]
    *shots, asked = prompt.split("\n\n")
    found = [re.fullmatch(rf"{text}: (.+)\n{label}: (\w+)", shot) for shot in shots]
    last = re.fullmatch(rf"{text}: (.+)\n{label}:", asked)
    assert last is not None and all(found), prompt
    return [shot.groups() for shot in found], last[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lists_are_clean(kind: str) -> None:
    listed = rows(f"in_context_{kind}")
    texts = [row["text"] for row in listed]
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and "\n" not in text and text[-1] in ".?!" for text in texts)
    counts = Counter((row["label"], row["part"]) for row in listed)
    assert len(counts) == 2 * KINDS[kind][2] and len(set(counts.values())) == 1 and min(counts.values()) >= 30
    # A label that stands in its text is given away.
    told = [row for row in listed if row["label"].lower() in re.findall(r"\w+", row["text"].lower())]
    assert len(told) < 0.02 * len(listed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepend_bos", [None, True])
def test_every_prompt_shows_each_class_once_and_asks_for_one(words, kind: str, prepend_bos: bool | None) -> None:
    task = in_context(words, kind, prepend_bos=prepend_bos)
    lists = halves(kind)
    n_classes = KINDS[kind][2]
    assert len(task) == len(set(task.prompts)) == len(lists["test"])
    order = [label.strip() for label in words.to_str_tokens(task.options[0])]
    assert len(set(order)) == n_classes and (task.options == task.options[0]).all()
    for i, prompt in enumerate(task.prompts):
        ids = task.clean[i] if task.mask is None else task.clean[i][task.mask[i] == 1]
        skip = 1 if prepend_bos else 0
        assert words.tokenizer.decode(ids.tolist()[skip:]) == prompt
        shots, asked = read(prompt, kind)
        assert [label for _, label in shots] == order
        assert all(lists["development"][text] == label for text, label in shots)
        answer, wrong = (words.to_str_tokens(each[i : i + 1])[0].strip() for each in (task.answers, task.wrong))
        assert lists["test"][asked] == answer
        assert wrong == order[(order.index(answer) + 1) % n_classes]
    assert len({shot for prompt in task.prompts for shot in read(prompt, kind)[0]}) > n_classes, "a draw for each"


@pytest.mark.parametrize("prepend_bos", [None, True])
@pytest.mark.parametrize("n_shots", [1, 2])
def test_positions_are_every_token_but_those_of_the_texts(words, prepend_bos: bool | None, n_shots: int) -> None:
    task = in_context(words, "topic", 12, n_shots=n_shots, prepend_bos=prepend_bos)
    n_labels, names = 4 * n_shots, set(task.positions)
    labels = [f"label_{i}" for i in range(n_labels)]
    formats = [f"format_{i}" for i in range(len(names) - n_labels - 2)]
    assert names == {*labels, *formats, "query", "end"}
    for i, prompt in enumerate(task.prompts):
        tokens = words.to_str_tokens(task.clean[i])
        at = {name: int(where[i]) for name, where in task.positions.items()}
        assert at["end"] == len(tokens) - 1
        shots, asked = read(prompt, "topic")
        assert [tokens[at[name]].strip() for name in labels] == [label for _, label in shots]
        options = words.to_str_tokens(task.options[i])
        assert [tokens[at[name]] for name in labels] == options * n_shots
        assert "".join(tokens[at["query"] :]) == f"\n\nArticle: {asked}\nAnswer:"
        form = "".join(tokens[at[name]] for name in formats)
        bos = "<bos>" if prepend_bos else ""
        assert form == bos + "\n\n".join(["Article:\nAnswer:"] * n_labels)
        first = 0 if task.mask is None else int(task.mask[i].long().argmax())
        rest = set(range(first, at["query"])) - {at[name] for name in [*labels, *formats]}
        assert "".join(tokens[j] for j in sorted(rest)) == "".join(f" {text}" for text, _ in shots)


def test_shared_demonstrations(words) -> None:
    made = {half: in_context(words, "sentiment", part=half, shared=True, seed=3) for half in ("test", "development")}
    shots = {half: {tuple(read(prompt, "sentiment")[0]) for prompt in task.prompts} for half, task in made.items()}
    assert len(shots["test"]) == 1 and shots["test"] == shots["development"]
    (common,) = shots["test"]
    asked = [read(prompt, "sentiment")[1] for prompt in made["development"].prompts]
    assert not {text for text, _ in common} & set(asked)
    assert len(asked) == len(halves("sentiment")["development"]) - 2
    assert "the same for all prompts" in made["test"].source


def test_a_text_is_never_its_own_demonstration(words) -> None:
    task = in_context(words, "question", part="development")
    assert set(read(p, "question")[1] for p in task.prompts) == set(halves("question")["development"])
    for prompt in task.prompts:
        shots, asked = read(prompt, "question")
        assert asked not in [text for text, _ in shots]


def test_classes_come_equally_often_and_in_an_order_drawn(words) -> None:
    task = in_context(words, "topic", 10)
    assert sorted(Counter(task.answers.tolist()).values()) == [2, 2, 3, 3]
    orders = {tuple(in_context(words, "topic", 1, seed=seed).options[0].tolist()) for seed in range(12)}
    assert len(orders) > 5
    assert in_context(words, n_prompts=9, seed=3).fingerprint == in_context(words, n_prompts=9, seed=3).fingerprint
    assert in_context(words, n_prompts=9, seed=3).fingerprint != in_context(words, n_prompts=9, seed=4).fingerprint


def test_refusals(make_model, words) -> None:
    with pytest.raises(ValueError, match="the in_context task asks for the next token"):
        in_context(make_model(kind="encoder"))
    with pytest.raises(ValueError, match="kind='emotion' is not known; use one of 'sentiment'"):
        in_context(words, "emotion")
    with pytest.raises(ValueError, match="part='train' is not known"):
        in_context(words, part="train")
    with pytest.raises(ValueError, match="the label 'Sports' of topic is not one token"):
        in_context(make_model(unknown=["Sports"]), "topic")
    with pytest.raises(ValueError, match="n_prompts=81, but 80 texts of sentiment"):
        in_context(words, n_prompts=81)
    with pytest.raises(ValueError, match="n_prompts=0"):
        in_context(words, n_prompts=0)
    with pytest.raises(ValueError, match="n_shots=30; the topic list has 30 demonstrations a class: 1 to 29"):
        in_context(words, "topic", n_shots=30)


def test_the_default_model_can_do_it(smol) -> None:
    task = in_context(smol, "sentiment", 12)
    logits = smol(task.clean, task.mask)[:, -1]
    best = task.options.gather(1, logits.gather(1, task.options).argmax(1, keepdim=True))[:, 0]
    # Chance is a half.
    assert (best == task.answers).float().mean() >= 0.75
    assert torch.equal(task.clean.gather(1, task.positions["label_1"][:, None])[:, 0], task.options[:, 1])
