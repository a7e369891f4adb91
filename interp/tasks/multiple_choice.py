"""Which label has the right option? Labelled multiple choice, for the questions of arXiv:2307.09458."""

from __future__ import annotations

import math
import string
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from interp.models.model import Model
from interp.tasks._prompts import bare_ids, continuation, distinct, last_tokens, require_decoder, rows
from interp.tasks._questions import arrangement, coloured_words
from interp.tasks.task import Task

_PRELUDE = "The following are multiple choice questions with answers.\n\n"
_POOLS = {
    "letters": string.ascii_uppercase,
    "random_letters": string.ascii_uppercase,
    "ordered_letters": string.ascii_uppercase,
    "numbers": string.digits[1:],
}
_QUESTIONS = {
    "country_capital": ("What is the capital of {}?", "country", "capital"),
    "landmark_country": ("Which country is home to {}?", "landmark", "country"),
}


class _Item(NamedTuple):
    """A question, the contents of its options in order, and which of them is right."""

    question: str
    contents: list[str]
    right: int


class _Fact(NamedTuple):
    """A question with its answer; `kind` is shared by the facts whose answers can stand in for each other."""

    question: str
    answer: str
    kind: tuple[str, int]


class _Style(NamedTuple):
    """What stands before a label, and after it."""

    opening: str
    separator: str

    @property
    def cue(self) -> str:
        """The end of the prompt, which asks for a label."""
        return f"\nAnswer:{' (' if self.opening else ''}"

    def answer(self, label: str) -> str:
        """A label as it follows the cue."""
        return label if self.opening else f" {label}"


def multiple_choice(
    model: Model,
    n_prompts: int = 64,
    *,
    form: str = "copy",
    labels: str = "letters",
    separator: str = ")",
    n_options: int = 4,
    n_shots: int = 0,
    prelude: bool = True,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """Questions with labelled options, of which the label of the right one is asked.

        The following are multiple choice questions with answers.

        The cup is red. What color is the cup?
        (A) blue
        (B) red
        (C) green
        (D) black
        Answer: (

    The answer is "B". `form` says where the right content is from:
    "copy" (default) states it in front of the question, so that the model needs no knowledge, only the step from a
    content to its label. Objects and colours are those of `coloured_objects`.
    "knowledge" asks for the capitals and countries of `country_capital` and `landmark_country`; the other options are
    answers to other questions of the same kind.

    Each place holds the right option equally often: it goes round. The corrupted prompt lets the right content trade
    places with one other option (which also goes round): the same tokens, and as long, with another label to give. All
    contents of one question have as many tokens, so that every label and every content stays where it is.

    `labels` and `separator` change what a model may rely on (the mutations of the paper's semantics tests):
    "letters" A B C D; "random_letters" any capitals in any order; "ordered_letters" any capitals in the order of the
    alphabet; "numbers" 1 2 3 4. Random labels are drawn for each prompt and are the same in its shots. After the
    separator ")" options read "(A) red" and the prompt ends with "Answer: (", so that a label is the same token in
    both places; with any other, such as ".", they read "A. red", and the prompt ends with "Answer:".

    The default model, SmolLM2-135M-Instruct, cannot do this: it is at chance (25%) in every format tried. Its most
    probable token is one of the four labels on all of 100 prompts (with separator ".", from one shot on), but the right
    one on 25, 28, 15, 19, 27 of them with 0, 1, 2, 3, 4 shots, and with separator "." on 23, 23, 21, 27 with 1 to 4; in
    the "knowledge" form on 24, 26, 25 with 0, 1, 4 shots. With no shot it says "A" whatever is asked. The defaults
    are the shortest prompts after which it gives a label at all. Use a model that can do the task before reading a
    circuit off it.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of different prompts; in the "knowledge" form no fact is asked twice.
        form: "copy" or "knowledge".
        labels: "letters", "random_letters", "ordered_letters" or "numbers".
        separator: the mark between a label and its content.
        n_options: options of each question, at least 2.
        n_shots: answered questions before the one that is asked; their right labels are drawn at random.
        prelude: whether the first line is there.
        seed: seed of the draw.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task. `answers` are the labels of the right options, `wrong` those that are right in the corrupted
        prompts, `options` all labels in the order in which they stand in the prompt. Positions, all in the last
        question: "label_0" ... (the label in front of each option), "content_0" ... (the last token of each content),
        "correct_label", "correct_content", "wrong_label" (where `wrong` stands) and "end".

    Raises:
        ValueError: for an unknown `form` or `labels`, a separator without a mark, too few options, labels or words for
            the tokenizer, a model that is not a decoder, or more prompts than can be made.
    """
    require_decoder(model, "multiple_choice")
    for name, value, known in (("form", form, ("copy", "knowledge")), ("labels", labels, tuple(_POOLS))):
        if value not in known:
            raise ValueError(
                f"multiple_choice: {name}={value!r} is not known; use one of {', '.join(map(repr, known))}."
            )
    if n_options < 2 or n_shots < 0:
        raise ValueError(
            f"multiple_choice: n_options={n_options} and n_shots={n_shots}; there must be two options to choose from, "
            "and no fewer than zero shots."
        )
    style = _style(separator)
    pool = _label_pool(model, labels, style, n_options)
    rng = np.random.default_rng(seed)
    make = _copy if form == "copy" else _knowledge
    items, source = make(model, rng, n_prompts, n_options, n_shots)

    clean, corrupted, answers, wrong, options = [], [], [], [], []
    where: dict[str, list[int]] = defaultdict(list)
    for index, (*shots, item) in enumerate(items):
        marks = _draw_labels(rng, pool, labels, n_options)
        other = (item.right + 1 + index // n_options % (n_options - 1)) % n_options
        before = _PRELUDE if prelude else ""
        for shot in shots:
            closing = ")" if style.opening else ""
            before += f"{''.join(_parts(shot, marks, style))}{style.answer(marks[shot.right])}{closing}\n\n"
        parts = _parts(item, marks, style)
        clean.append(before + "".join(parts))
        corrupted.append(before + "".join(_parts(_traded(item, other), marks, style)))
        options.append([style.answer(mark) for mark in marks])
        answers.append(options[-1][item.right])
        wrong.append(options[-1][other])
        places = last_tokens(model, [before + parts[0], *parts[1:]], prepend_bos)
        named = {f"label_{i}": places[2 * i] for i in range(n_options)}
        named |= {f"content_{i}": places[2 * i + 1] for i in range(n_options)}
        named |= {
            "correct_label": named[f"label_{item.right}"],
            "correct_content": named[f"content_{item.right}"],
            "wrong_label": named[f"label_{other}"],
        }
        for name, place in named.items():
            where[name].append(place)
    return Task.from_pairs(
        model, "multiple_choice", clean, corrupted, answers, wrong, options=options, positions=where,
        prepend_bos=prepend_bos,
        source=f"{form}: {source}; {n_options} options, {labels}, separator {separator!r}, {n_shots} shots"
        + ("" if prelude else ", no prelude"),
    )  # fmt: skip


def _style(separator: str) -> _Style:
    if not separator.strip() or "\n" in separator or any(mark.isalnum() for mark in separator):
        raise ValueError(
            f"multiple_choice: separator={separator!r}; it stands between a label and its option, so it must be a mark "
            'on the same line that is neither letter nor digit: ")", ".", ":" or " -".'
        )
    return _Style("(" if separator == ")" else "", separator)


def _label_pool(model: Model, labels: str, style: _Style, n_options: int) -> list[str]:
    """The labels that are one token where the answer stands."""
    pool = [mark for mark in _POOLS[labels] if continuation(model, style.cue, style.answer(mark)) is not None]
    if labels in ("letters", "numbers"):
        pool = [mark for mark in pool if mark in _POOLS[labels][:n_options]]
    if len(pool) < n_options:
        raise ValueError(
            f"multiple_choice: {n_options} options with labels={labels!r} and separator={style.separator!r} need "
            f"{n_options} labels that are single tokens after {style.cue.strip()!r}, but {model.name}'s tokenizer has "
            f'{len(pool)}: use fewer options, other labels or separator=")", which needs no space before the label.'
        )
    return pool


def _draw_labels(rng: np.random.Generator, pool: list[str], labels: str, n_options: int) -> list[str]:
    if labels in ("letters", "numbers"):
        return pool
    drawn = [str(mark) for mark in rng.choice(pool, size=n_options, replace=False)]
    return sorted(drawn) if labels == "ordered_letters" else drawn


def _copy(
    model: Model, rng: np.random.Generator, n_prompts: int, n_options: int, n_shots: int
) -> tuple[list[list[_Item]], str]:
    """For each prompt its shots and its question, with the answer stated; and what they are made of."""
    colours, objects, counts = coloured_words(model, "multiple_choice", colours=n_options, objects=n_shots + 1)
    n_arrangements = math.perm(len(colours), n_options)
    prompts = []
    draws = distinct(rng, n_prompts, len(objects) * n_arrangements, "multiple_choice", f"single tokens: {counts}")
    for index, draw in enumerate(draws):
        asked, number = divmod(draw, n_arrangements)
        others = rng.choice([thing for thing in objects if thing != objects[asked]], size=n_shots, replace=False)
        items = []
        for thing in others:
            contents = arrangement(int(rng.integers(n_arrangements)), colours, n_options)
            items.append(_stated(str(thing), contents, int(rng.integers(n_options))))
        items.append(_stated(objects[asked], arrangement(number, colours, n_options), index % n_options))
        prompts.append(items)
    return prompts, f"words of the generator of arXiv:2310.08744, single tokens: {counts}"


def _stated(thing: str, contents: list[str], right: int) -> _Item:
    return _Item(f"The {thing} is {contents[right]}. What color is the {thing}?", contents, right)


def _knowledge(
    model: Model, rng: np.random.Generator, n_prompts: int, n_options: int, n_shots: int
) -> tuple[list[list[_Item]], str]:
    """For each prompt its shots and its question, about facts; and what they are made of."""
    listed = [
        _Fact(question.format(row[subject]), row[answer], (name, len(bare_ids(model, f"the {row[answer]}"))))
        for name, (question, subject, answer) in _QUESTIONS.items()
        for row in rows(name)
    ]
    contents: dict[tuple[str, int], list[str]] = defaultdict(list)
    for fact in listed:
        if fact.answer not in contents[fact.kind]:
            contents[fact.kind].append(fact.answer)
    facts = [fact for fact in listed if len(contents[fact.kind]) >= n_options]
    counts = f"{len(facts)} of {len(listed)} facts have {n_options - 1} other answers of as many tokens"
    prompts = []
    for index, draw in enumerate(distinct(rng, n_prompts, len(facts), "multiple_choice", f"the lists, where {counts}")):
        asked = facts[draw]
        # A shot about the same answer would give the content away; one of another kind would not show the format.
        usable = [fact for fact in facts if fact.kind[0] == asked.kind[0] and fact.answer != asked.answer]
        if len(usable) < n_shots:
            raise ValueError(
                f"multiple_choice: n_shots={n_shots}, but only {len(usable)} other facts can be shots of "
                f"{asked.question!r}: ask for at most {len(usable)}."
            )
        chosen = [usable[int(i)] for i in rng.choice(len(usable), size=n_shots, replace=False)]
        rights = [*(int(rng.integers(n_options)) for _ in chosen), index % n_options]
        prompts.append(
            [_known(rng, fact, contents[fact.kind], n_options, right)
             for fact, right in zip([*chosen, asked], rights, strict=True)]
        )  # fmt: skip
    return prompts, f"lists written for interp, {counts}"


def _known(rng: np.random.Generator, fact: _Fact, contents: list[str], n_options: int, right: int) -> _Item:
    others = [content for content in contents if content != fact.answer]
    drawn = [str(content) for content in rng.choice(others, size=n_options - 1, replace=False)]
    return _Item(fact.question, [*drawn[:right], fact.answer, *drawn[right:]], right)


def _traded(item: _Item, other: int) -> _Item:
    """The same question, its right content in place of another and that one in its own."""
    contents = list(item.contents)
    contents[item.right], contents[other] = contents[other], contents[item.right]
    return item._replace(contents=contents, right=other)


def _parts(item: _Item, marks: list[str], style: _Style) -> list[str]:
    """The question in pieces that end with a label, its content, the next label ... and the cue."""
    parts = []
    for mark, content in zip(marks, item.contents, strict=True):
        parts += [f"\n{style.opening}{mark}", f"{style.separator} {content}"]
    return [item.question + parts[0], *parts[1:], style.cue]
