"""Can a model follow two facts in a row? From an entity to its country, and on to what belongs to that country."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from interp.models.model import Model
from interp.tasks._prompts import continuation, distinct, last_tokens, require_decoder, rows
from interp.tasks.task import Task

#: "e1's r1's r2 is", and "the r2 of the r1 of e1 is".
_ORDERS = ("entity_first", "relation_first")
#: What is asked: e1 to e3, or one of the hops alone (e1 to e2, e2 to e3).
_HOPS = ("both", "first", "second")

_FIRST = {"landmark": "country", "city": "country", "person": "homeland"}
#: How a sentence about a relation ends. Small models go on with "a" after a bare "is".
_ENDS = {
    "country": " is called", "homeland": " is called", "capital": " is the city of", "language": " is called",
    "currency": " is the", "continent": " is called",
}  # fmt: skip
_SECOND = ("capital", "language", "currency", "continent")
#: So that the entity never falls on the first position, where attention sinks are.
_LEAD = "In fact,"
#: Prompts in one forward pass of `two_hop_chains`.
_BATCH = 64


class _Question(NamedTuple):
    """One prompt: whose relations are asked for (the last one is the question), and the answer."""

    entity: str
    relations: tuple[str, ...]
    answer: str


class _Chain(NamedTuple):
    """e1, r1, e2, r2, e3."""

    entity: str
    relation1: str
    bridge: str
    relation2: str
    answer: str

    def question(self, hop: str) -> _Question:
        if hop == "first":
            return _Question(self.entity, (self.relation1,), self.bridge)
        if hop == "second":
            return _Question(self.bridge, (self.relation2,), self.answer)
        return _Question(self.entity, (self.relation1, self.relation2), self.answer)


def two_hop(
    model: Model,
    n_prompts: int | None = None,
    *,
    order: str = "entity_first",
    hop: str = "both",
    known_only: bool = False,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """Prompts such as "In fact, the Eiffel Tower's country's capital is the city of", whose answer is " Paris".

    A chain is e1, r1, e2, r2, e3: an entity (landmark, city or person), its country or homeland, and that country's
    capital, language, currency or continent. Only chains whose e2 and e3 are one token each are posed, and none whose
    entity has one of them in its name. The corrupted prompt has another entity with the same relations and another
    answer, which is the wrong one; its tokens fall on the same positions.

    Args:
        model: whose tokenizer is used (and whose knowledge, with `known_only`).
        n_prompts: number of prompts; None for all that can be made.
        order: "entity_first" ("the Eiffel Tower's country's capital") or "relation_first" ("the capital of the country
            of the Eiffel Tower").
        hop: "both"; or the single hops of the same chains, each prompt once: "first" ("the Eiffel Tower's country is
            called") or "second" ("France's capital is the city of").
        known_only: keep the chains both of whose single hops the model gets right, in the sense of `two_hop_chains`.
        seed: seed of the choice, its order and the partners.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task. Positions, each the last token of the words: "entity", "relation1" and "relation2" (single hops have
        "relation"), and "end", in the order in which they stand. `source` says how many chains were kept of how many.

    Raises:
        ValueError: for a model that is not a decoder, an unknown order or hop, or more prompts than can be made.

    Cost: with `known_only`, that of `two_hop_chains`; otherwise no forward pass.
    """
    chains, counts = _posable(model, order)
    if hop not in _HOPS:
        raise ValueError(f"two_hop: hop={hop!r} is not known; use one of {', '.join(map(repr, _HOPS))}.")
    if known_only:
        known = {hop: _known(model, chains, hop, order, prepend_bos) for hop in ("first", "second")}
        chains = [
            c for c in chains if c.question("first") in known["first"] and c.question("second") in known["second"]
        ]
        counts += f", {len(chains)} both single hops that the model gets right"
    questions = list(dict.fromkeys(chain.question(hop) for chain in chains))
    places = {question: last_tokens(model, _parts(question, order), prepend_bos) for question in questions}
    # Partners: the same relations, the same positions, another answer. A prompt without any cannot be corrupted.
    groups: dict[tuple[object, ...], list[_Question]] = defaultdict(list)
    for question in questions:
        groups[question.relations, tuple(places[question])].append(question)
    partners = {
        question: others
        for group in groups.values()
        for question in group
        if (others := [other for other in group if other.answer != question.answer])
    }
    counts += f"; {len(partners)} of {len(questions)} prompts have a partner of equal length"
    if not partners:
        raise ValueError(f"two_hop: nothing is left for {model.name}: {counts}.")
    rng = np.random.default_rng(seed)
    listed = [question for question in questions if question in partners]
    wanted = len(listed) if n_prompts is None else n_prompts
    chosen = [listed[i] for i in distinct(rng, wanted, len(listed), "two_hop", f"the lists, where {counts}")]
    paired = [partners[question][int(rng.integers(len(partners[question])))] for question in chosen]
    names = ("relation",) if hop != "both" else ("relation1", "relation2")
    # What `_parts` puts together, in its order; the last part is the end of the prompt.
    labels = ("entity", *names) if order == "entity_first" else (*reversed(names), "entity")
    return Task.from_pairs(
        model,
        "two_hop" if hop == "both" else f"two_hop_{hop}",
        ["".join(_parts(question, order)) for question in chosen],
        ["".join(_parts(question, order)) for question in paired],
        [f" {question.answer}" for question in chosen],
        [f" {question.answer}" for question in paired],
        positions={label: [places[q][index] for q in chosen] for index, label in enumerate(labels)},
        source=f"lists written for interp; {counts}",
        prepend_bos=prepend_bos,
    )


def two_hop_chains(model: Model, *, order: str = "entity_first", prepend_bos: bool | None = None) -> pd.DataFrame:
    """Every chain that the tokenizer can express, and whether the model gets its single hops right.

    A hop is right when, at the end of its prompt, its answer has the largest logit of all answers to that relation in
    the list (of all countries, of all capitals ...). The first choice of the whole vocabulary would be another
    criterion; small models often choose a word that leads up to the answer (" a", a quotation mark).

    Args:
        model: a decoder.
        order: of the single hops' prompts, as in `two_hop`.
        prepend_bos: see `Model.tokenize`.

    Returns:
        A row a chain: `prompt` (that of `two_hop`, so that it finds the row of a prompt), `entity`, `relation1`,
        `bridge`, `relation2`, `answer`, `first` and `second` (whether that hop is right).

    Raises:
        ValueError: for a model that is not a decoder, or an unknown order.

    Cost: one forward pass of some ten tokens for each entity and for each pair of country and relation, about 600.
    """
    chains, _ = _posable(model, order)
    table = pd.DataFrame(chains, columns=list(_Chain._fields))
    table.insert(0, "prompt", ["".join(_parts(chain.question("both"), order)) for chain in chains])
    for hop in ("first", "second"):
        right = _known(model, chains, hop, order, prepend_bos)
        table[hop] = [chain.question(hop) in right for chain in chains]
    return table


def two_hop_facts(task: Task) -> pd.DataFrame:
    """Which facts each prompt of a task of `two_hop` asks for.

    Args:
        task: of `two_hop`, in any order and with any hops, or a part of one.

    Returns:
        A row a prompt: `prompt` (its number), `entity` (of which it asks; a country for hop="second"), `country`,
        `relation` (the one that is answered), `kind` ("country" for first hops, else the relation: what the answer is).

    Raises:
        ValueError: a prompt that `two_hop` does not make.
    """
    known = _by_prompt()
    strange = next((prompt for prompt in task.prompts if prompt not in known), None)
    if strange is not None:
        raise ValueError(
            f"task {task.name!r} has the prompt {strange!r}, which two_hop does not make: give one of its."
        )
    found = [known[prompt] for prompt in task.prompts]
    asked = [
        (index, question.entity, country, question.relations[-1]) for index, (question, country) in enumerate(found)
    ]
    table = pd.DataFrame(asked, columns=["prompt", "entity", "country", "relation"])
    return table.assign(kind=table["relation"].replace(dict.fromkeys(_FIRST.values(), "country")))


def two_hop_split(task: Task, *, by: str = "country", held_out: float = 0.3, seed: int = 0) -> tuple[Task, Task]:
    """A task of `two_hop` in two parts that share no facts: one to train on, one to test.

    With by="country" whole countries are held out: no prompt to train on has an entity of theirs, so neither hop of a
    held-out chain is in the other part. The answer itself may be: several countries have the same currency, language or
    continent, never the same capital. With by="entity" the first hops differ, and the second hops are in both parts.

    The countries (entities) are drawn from all of the lists, so a seed holds out the same ones in every task: prompts
    in another order, or for the single hops, are divided as the two-hop prompts are.

    Args:
        task: of `two_hop`.
        by: "country" or "entity".
        held_out: share of the countries (entities) that are held out.
        seed: of the draw.

    Returns:
        (train, test); together they hold every prompt once.

    Raises:
        ValueError: an unknown `by`, a prompt that `two_hop` does not make, or a part without prompts.
    """
    if by not in ("country", "entity"):
        raise ValueError(f'two_hop_split: by={by!r} is not known; use "country" or "entity".')
    facts = two_hop_facts(task)
    listed = {"country": (country for _, country in _by_prompt().values())}
    listed["entity"] = (question.entity for question, _ in _by_prompt().values())
    names = sorted(set(listed[by]))
    drawn = np.random.default_rng(seed).permutation(len(names))[: round(held_out * len(names))]
    out = facts[by].isin([names[i] for i in drawn]).to_numpy()
    if out.all() or not out.any():
        raise ValueError(
            f"two_hop_split: held_out={held_out} leaves {int((~out).sum())} prompts to train on and {int(out.sum())} "
            "to test: give another share, another seed or more prompts."
        )
    return task[np.flatnonzero(~out)], task[np.flatnonzero(out)]


def _listed() -> list[_Chain]:
    """All chains of the lists but those whose entity names a later part of the chain."""
    countries = {row["country"]: row for row in rows("two_hop_countries")}
    entities = [(row["landmark"], "landmark", row["country"]) for row in rows("landmark_country")]
    entities += [(row["entity"], row["kind"], row["country"]) for row in rows("two_hop_entities")]
    chains = [
        _Chain(entity, _FIRST[kind], country, relation, countries[country][relation])
        for entity, kind, country in entities
        for relation in _SECOND
        if countries[country][relation]
    ]
    return [chain for chain in chains if not any(word in chain.entity for word in (chain.bridge, chain.answer))]


def _posable(model: Model, order: str) -> tuple[list[_Chain], str]:
    """The chains whose bridge and answer are one token each, and how many they are, in words."""
    require_decoder(model, "two_hop")
    if order not in _ORDERS:
        raise ValueError(f"two_hop: order={order!r} is not known; use one of {', '.join(map(repr, _ORDERS))}.")
    listed = _listed()
    ends = {(relation, word) for c in listed for relation, word in ((c.relation1, c.bridge), (c.relation2, c.answer))}
    # Where a prompt ends does not depend on how it begins.
    single = {
        (relation, word)
        for relation, word in ends
        if continuation(model, f"the{_ENDS[relation]}", f" {word}") is not None
    }
    kept = [c for c in listed if (c.relation1, c.bridge) in single and (c.relation2, c.answer) in single]
    return kept, f"{len(kept)} of {len(listed)} chains have a bridge and an answer of one token"


@functools.cache
def _by_prompt() -> dict[str, tuple[_Question, str]]:
    """Every prompt that the lists can make, with what it asks and the country on the way."""
    return {
        "".join(_parts(question, order)): (question, chain.bridge)
        for chain in _listed()
        for hop in _HOPS
        for question in (chain.question(hop),)
        for order in _ORDERS
    }


def _parts(question: _Question, order: str) -> list[str]:
    """Pieces of the prompt, each ending with what a position is named after; the last is the end."""
    entity, relations = question.entity, question.relations
    if order == "entity_first":
        parts = [f"{_LEAD} {entity}"]
        for owner, relation in zip((entity, *relations[:-1]), relations, strict=True):
            parts.append(("' " if owner.endswith("s") else "'s ") + relation)
    else:
        first, *others = reversed(relations)
        parts = [f"{_LEAD} the {first}", *(f" of the {relation}" for relation in others), f" of {entity}"]
    return [*parts, _ENDS[relations[-1]]]


@torch.no_grad()
def _known(model: Model, chains: Iterable[_Chain], hop: str, order: str, prepend_bos: bool | None) -> set[_Question]:
    """The single hops whose answer has the largest logit of all answers to their relation."""
    asked: dict[str, list[_Question]] = defaultdict(list)
    for question in dict.fromkeys(chain.question(hop) for chain in chains):
        asked["country" if hop == "first" else question.relations[0]].append(question)
    right = set()
    for questions in asked.values():
        # Answers are asked for in context: a tokenizer may write them otherwise elsewhere.
        words = {
            question.answer: continuation(model, "".join(_parts(question, order)), f" {question.answer}")
            for question in questions
        }
        options = list(words)
        ids = torch.tensor([words[word] for word in options], device=model.device)
        for start in range(0, len(questions), _BATCH):
            part = questions[start : start + _BATCH]
            tokens = model.tokenize(["".join(_parts(question, order)) for question in part], prepend_bos=prepend_bos)
            best = model(*tokens)[:, -1, ids].argmax(-1).tolist()
            right |= {question for question, index in zip(part, best, strict=True) if options[index] == question.answer}
    return right
