"""What does the model know of the world? Capitals of countries, and countries of landmarks."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from interp.models.model import Model
from interp.tasks._prompts import bare_ids, continuation, distinct, last_tokens, require_decoder, rows
from interp.tasks.task import Task


def country_capital(
    model: Model, n_prompts: int | None = None, *, seed: int = 0, prepend_bos: bool | None = None
) -> Task:
    """Prompts such as "The capital of France is the city of", whose answer is " Paris".

    The corrupted prompt asks for another country, with a name of as many tokens; the wrong answer is that country's
    capital. The list leaves out countries that share their name with the capital, and disputed capitals.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of countries; None for all that the tokenizer can express.
        seed: seed of the choice, its order and the partners.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task; positions "subject" (last token of the country) and "end". `source` says how many of the listed
        countries have a capital of one token, and how many of those a partner of equal length.

    Raises:
        ValueError: for a model that is not a decoder, or more prompts than can be made.
    """
    template = ("The capital of ", " is the city of")
    return _facts(model, "country_capital", template, ("country", "capital"), n_prompts, seed, prepend_bos)


def landmark_country(
    model: Model, n_prompts: int | None = None, *, seed: int = 0, prepend_bos: bool | None = None
) -> Task:
    """Prompts such as "We went to see the Eiffel Tower, which is in the country of", whose answer is " France".

    The corrupted prompt names a landmark of another country, of as many tokens; the wrong answer is that country.
    The landmark stands inside the sentence, so that it never falls on the first position, where attention sinks are.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of landmarks; None for all that the tokenizer can express.
        seed: seed of the choice, its order and the partners.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task; positions "subject" (last token of the landmark) and "end". `source` says how many of the listed
        landmarks have a country of one token, and how many of those a partner of equal length.

    Raises:
        ValueError: for a model that is not a decoder, or more prompts than can be made.
    """
    template = ("We went to see ", ", which is in the country of")
    return _facts(model, "landmark_country", template, ("landmark", "country"), n_prompts, seed, prepend_bos)


def _facts(
    model: Model,
    name: str,
    template: tuple[str, str],
    columns: tuple[str, str],
    n_prompts: int | None,
    seed: int,
    prepend_bos: bool | None,
) -> Task:
    require_decoder(model, name)
    before, after = template
    listed = [(row[columns[0]], row[columns[1]]) for row in rows(name)]
    single = [(s, a) for s, a in listed if continuation(model, f"{before}{s}{after}", f" {a}") is not None]
    by_length: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for subject, answer in single:
        by_length[len(bare_ids(model, f"{before}{subject}{after}"))].append((subject, answer))
    # Partners: facts with a prompt of equal length and another answer. A fact without any cannot be corrupted.
    partners = {
        fact: others
        for group in by_length.values()
        for fact in group
        if (others := [other for other in group if other[1] != fact[1]])
    }
    counts = f"{len(single)} of {len(listed)} have an answer of one token, {len(partners)} a partner of equal length"
    rng = np.random.default_rng(seed)
    wanted = len(partners) if n_prompts is None else n_prompts
    if not partners:
        raise ValueError(f"{name}: nothing is left for {model.name}'s tokenizer: {counts}.")
    facts = [fact for fact in single if fact in partners]
    chosen = [facts[i] for i in distinct(rng, wanted, len(facts), name, f"the list, where {counts}")]
    paired = [partners[fact][int(rng.integers(len(partners[fact])))] for fact in chosen]
    return Task.from_pairs(
        model,
        name,
        [f"{before}{subject}{after}" for subject, _ in chosen],
        [f"{before}{subject}{after}" for subject, _ in paired],
        [f" {answer}" for _, answer in chosen],
        [f" {answer}" for _, answer in paired],
        positions={"subject": [last_tokens(model, [before + s, after], prepend_bos)[0] for s, _ in chosen]},
        source=f"list written for interp; {counts}",
        prepend_bos=prepend_bos,
    )
