"""Which colour has the object? One-shot coloured objects, the prompts of Merullo et al. (arXiv:2310.08744)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from interp.models.model import Model
from interp.tasks._prompts import distinct, last_tokens, require_decoder
from interp.tasks._questions import arrangement, coloured_words
from interp.tasks.task import Task

_SURFACES = ("table", "desk", "floor")
_STARTS = ("there is", "you see", "I see")


class _Question(NamedTuple):
    """Three coloured things in the order in which they are named, and which of them is asked about."""

    surface: str
    start: str
    colours: list[str]
    objects: list[str]
    query: int


def coloured_objects(
    model: Model, n_prompts: int = 64, *, seed: int = 0, corrupt: str = "query", prepend_bos: bool | None = None
) -> Task:
    """One-shot prompts whose second question asks for the colour of one of three objects.

        Q: On the table, there is a blue ball, a black pen, and a red cup. What color is the pen?
        A: Black
        Q: On the desk, I see an orange jug, a brown bowl, and a green plate. What color is the jug?
        A:

    The answer is " Orange". The words are those of the paper's generator: 3 surfaces, 3 starts, 17 objects, 8 colours.
    Colours and objects are drawn without replacement over the whole prompt, so that neither those of the first
    question recur in the second. Which of the three objects the second question asks about, and which of the other two
    the contrast is with, take turns: any six consecutive prompts hold each case once.

    Corrupted prompts differ from the clean ones in the second question only:
    "query" (default, the paper's) asks about another of its three objects, one token.
    "swap" lets that object and the queried one trade colours, two tokens (and their articles, where one is "an"), and
    asks the same. The wrong answer, which is the right one of the corrupted prompt, is the same colour for both.

    Only colours and objects of one token inside a sentence are used, and of the colours those whose answer (" Red") is
    one token after "A:" as well. This costs a few objects (3 of the 17 for SmolLM2) and makes all prompts equally long
    where surfaces, starts and articles have as many tokens each too (SmolLM2: 62 tokens); elsewhere they are
    left-padded with a mask.

    The default model, SmolLM2-135M-Instruct, hardly does this: over 400 prompts (seeds 0 to 3), 37% right among the
    three colours, where chance is 33%, 28% right among all tokens (69% of the first choices are one of the three), and
    the right colour above the wrong one on 58%, by 0.2 logits on average.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of different prompts.
        seed: seed of the draw.
        corrupt: "query" or "swap".
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task. `answers` are the colours of the queried object, `wrong` those of the object the contrast is with, and
        `options` the three colours in the order in which they are named. Positions, all in the second question:
        "correct_object", "correct_colour" (the queried item), "wrong_object1", "wrong_colour1" (the item that the
        contrast is with), "wrong_object2", "wrong_colour2" (the third item), "query_object" (the last token
        of the question's object) and "end".

    Raises:
        ValueError: for an unknown `corrupt`, a model that is not a decoder, a tokenizer with fewer than six colours or
            objects of one token, or more prompts than can be made.
    """
    require_decoder(model, "coloured_objects")
    if corrupt not in ("query", "swap"):
        raise ValueError(f"coloured_objects: corrupt={corrupt!r} is not known; use one of 'query', 'swap'.")
    colours, objects, counts = coloured_words(model, "coloured_objects", colours=6, objects=6)
    rng = np.random.default_rng(seed)
    shape = (len(_SURFACES), len(_STARTS), math.perm(len(colours), 3), math.perm(len(objects), 3))
    draws = distinct(rng, n_prompts, math.prod(shape), "coloured_objects", f"the single-token words ({counts})")

    clean, corrupted, answers, wrong, options = [], [], [], [], []
    where: dict[str, list[int]] = {}
    for index, draw in enumerate(draws):
        surface, start, colour, thing = (int(i) for i in np.unravel_index(draw, shape))
        query = index % 3
        other = (query + 1 + index // 3 % 2) % 3
        question = _Question(
            _SURFACES[surface], _STARTS[start], arrangement(colour, colours, 3), arrangement(thing, objects, 3), query
        )
        shot = _shot(rng, colours, objects, question)
        first = f"{''.join(_parts(shot))}{_answer(shot, shot.query)}\n"
        parts = _parts(question)
        clean.append(first + "".join(parts))
        corrupted.append(first + "".join(_parts(_corrupted(question, other, corrupt))))
        answers.append(_answer(question, query))
        wrong.append(_answer(question, other))
        options.append([_answer(question, item) for item in range(3)])
        places = last_tokens(model, [first + parts[0], *parts[1:]], prepend_bos)
        roles = (("correct_", "", query), ("wrong_", "1", other), ("wrong_", "2", 3 - query - other))
        named = {f"{role}colour{digit}": places[2 * item] for role, digit, item in roles}
        named |= {f"{role}object{digit}": places[2 * item + 1] for role, digit, item in roles}
        for name, place in {**named, "query_object": places[6]}.items():
            where.setdefault(name, []).append(place)
    return Task.from_pairs(
        model, "coloured_objects", clean, corrupted, answers, wrong, options=options, positions=where,
        prepend_bos=prepend_bos,
        source=f"words of the generator of arXiv:2310.08744; single tokens: {counts}; corrupt {corrupt}",
    )  # fmt: skip


def _shot(rng: np.random.Generator, colours: list[str], objects: list[str], question: _Question) -> _Question:
    """The first question, which shares no colour and no object with the second."""
    unused = [
        [word for word in words if word not in used]
        for words, used in ((colours, question.colours), (objects, question.objects))
    ]
    drawn = [[str(word) for word in rng.choice(words, size=3, replace=False)] for words in unused]
    return _Question(
        _SURFACES[int(rng.integers(3))], _STARTS[int(rng.integers(3))], drawn[0], drawn[1], int(rng.integers(3))
    )


def _corrupted(question: _Question, other: int, corrupt: str) -> _Question:
    """The same three things, asked about another one or with two colours swapped."""
    if corrupt == "query":
        return question._replace(query=other)
    colours = list(question.colours)
    colours[question.query], colours[other] = colours[other], colours[question.query]
    return question._replace(colours=colours)


def _parts(question: _Question) -> list[str]:
    """The question in pieces that end with a colour, its object, the next colour ... the queried object, and "A:"."""
    parts = []
    before = (f"Q: On the {question.surface}, {question.start} ", ", ", ", and ")
    for lead, colour, thing in zip(before, question.colours, question.objects, strict=True):
        article = "an" if colour[0] in "aeiou" else "a"
        parts += [f"{lead}{article} {colour}", f" {thing}"]
    return [*parts, f". What color is the {question.objects[question.query]}", "?\nA:"]


def _answer(question: _Question, item: int) -> str:
    return f" {question.colours[item].title()}"
