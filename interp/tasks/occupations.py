"""Who is expected to do which work? Prompts that differ in a woman or a man, and occupations that follow."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.models.model import Model
from interp.tasks._prompts import column, continuation, distinct, require_decoder, rows, single_words
from interp.tasks.task import Task


class Occupations(NamedTuple):
    """Prompts on a person's work, and the words whose probabilities show what is expected.

    Attributes:
        task: `clean` names a woman, `corrupt` a man; `answers` and `wrong` are an occupation expected of women and one
            expected of men; `options` are all of both.
        women: ids of the occupations expected of women `[word]`.
        men: of those expected of men `[word]`.
    """

    task: Task
    women: Tensor
    men: Tensor


def occupations(model: Model, n_prompts: int = 48, *, seed: int = 0, prepend_bos: bool | None = None) -> Occupations:
    """Prompts such as "The woman worked as a" beside "The man worked as a".

    A model's lean is the mean logit of the occupations expected of women less that of those expected of men; its bias,
    the lean after a woman less that after a man. Which occupation is expected of whom is a stereotype, written down for
    interp, and says nothing about people.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of different pairs.
        seed: seed of the draw.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The `Occupations`. Position "end"; "person" is the woman or the man.

    Raises:
        ValueError: a model that is not a decoder, too few occupations or pairs of persons that are one token each, or
            more prompts than can be made.
    """
    require_decoder(model, "occupations")
    persons = [(row["woman"], row["man"]) for row in rows("gender_pairs")]
    listed = [(row["occupation"], row["expected_of"]) for row in rows("occupations")]
    whole = set(single_words(model, [word for pair in [*persons, *listed] for word in pair]))
    persons = [pair for pair in persons if whole.issuperset(pair)]
    words = {who: [word for word, of in listed if of == who and word in whole] for who in ("women", "men")}
    counts = ", ".join(f"{len(some)} occupations expected of {who}" for who, some in words.items())
    counts = f"{len(persons)} pairs of persons, {counts}"
    if not persons or min(map(len, words.values())) < 2:
        raise ValueError(
            f"occupations: {model.name}'s tokenizer has too few of the words as single tokens ({counts}); it takes a "
            "pair of persons and two occupations of each kind."
        )
    templates = column("occupation_templates", "template")
    shape = (len(templates), len(persons))
    rng = np.random.default_rng(seed)
    draws = distinct(rng, n_prompts, int(np.prod(shape)), "occupations", f"the single-token words ({counts})")
    clean, corrupt = [], []
    for draw in draws:
        template, pair = (int(i) for i in np.unravel_index(draw, shape))
        woman, man = (templates[template].format(person=person) for person in persons[pair])
        clean.append(woman)
        corrupt.append(man)
    # Asked for after a prompt, where a word is the token that the model would write.
    ids = {who: [_id(model, clean[0], word) for word in some] for who, some in words.items()}
    options = [f" {word}" for some in words.values() for word in some]
    answers, wrong = (
        [f" {words[who][i % len(words[who])]}" for i in range(n_prompts)] for who in ("women", "men")
    )  # fmt: skip
    task = Task.from_pairs(
        model, "occupations", clean, corrupt, answers, wrong, options=[options] * n_prompts, prepend_bos=prepend_bos,
        source=f"{len(templates)} templates written for interp; single tokens: {counts}",
    )  # fmt: skip
    women, men = (torch.tensor(ids[who], device=model.device) for who in ("women", "men"))
    assert task.corrupt is not None
    person = (task.clean != task.corrupt).int().argmax(1)
    return Occupations(replace(task, positions={**task.positions, "person": person}), women, men)


def _id(model: Model, prompt: str, word: str) -> int:
    found = continuation(model, prompt, f" {word}")
    assert found is not None  # `single_words` asked already
    return found
