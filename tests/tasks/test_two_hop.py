from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch

from interp.tasks import two_hop, two_hop_chains, two_hop_facts, two_hop_split
from interp.tasks._prompts import rows

ASKS = {
    "country": "is called", "homeland": "is called", "capital": "is the city of", "language": "is called",
    "currency": "is the", "continent": "is called",
}  # fmt: skip
WORDS = "|".join(ASKS)
SECOND = ("capital", "language", "currency", "continent")
COUNTRIES = {row["country"]: row for row in rows("two_hop_countries")}
ENTITIES = {row["landmark"]: ("country", row["country"]) for row in rows("landmark_country")} | {
    row["entity"]: ("homeland" if row["kind"] == "person" else "country", row["country"])
    for row in rows("two_hop_entities")
}


def listed() -> list[tuple[str, str, str, str, str]]:
    """The chains, put together here from the files alone."""
    return [
        (entity, first, country, second, COUNTRIES[country][second])
        for entity, (first, country) in ENTITIES.items()
        for second in SECOND
        if COUNTRIES[country][second] and COUNTRIES[country][second] not in entity and country not in entity
    ]


def read(prompt: str, order: str) -> tuple[str, ...]:
    """Entity and relations of a prompt, outermost relation last."""
    if order == "entity_first":
        found = re.fullmatch(rf"In fact, (.+?)'s? ({WORDS})(?:'s? ({WORDS}))? (is .+)", prompt)
        assert found is not None, prompt
        entity, *relations, end = found.groups()
    else:
        found = re.fullmatch(rf"In fact, the ({WORDS})(?: of the ({WORDS}))? of (.+) (is .+)", prompt)
        assert found is not None, prompt
        last, before, entity, end = found.groups()
        relations = [before, last]
    kept = [relation for relation in relations if relation]
    assert end == ASKS[kept[-1]]
    return entity, *kept


@pytest.fixture(scope="module")
def made(words):
    """A function that makes a task of all prompts, each only once in this file."""
    return lru_cache(maxsize=None)(lambda **options: two_hop(words, **options))


def test_the_lists_are_clean() -> None:
    assert len(COUNTRIES) == len(rows("two_hop_countries"))
    assert len(ENTITIES) == len(rows("two_hop_entities")) + len(rows("landmark_country")), "no entity twice"
    fields = [
        field for name in ("two_hop_countries", "two_hop_entities") for row in rows(name) for field in row.values()
    ]
    assert all(field == field.strip() for field in fields)
    assert {row["kind"] for row in rows("two_hop_entities")} == {"city", "person"}
    for entity, (_, country) in ENTITIES.items():
        assert country in COUNTRIES, f"{entity}: {country} has no second hop"
    for country, row in COUNTRIES.items():
        assert sum(bool(row[relation]) for relation in SECOND) >= 1
        assert country not in row["capital"], "an answer would be read off the bridge"
    capitals = [row["capital"] for row in COUNTRIES.values() if row["capital"]]
    assert len(set(capitals)) == len(capitals)
    assert not set(capitals) & set(ENTITIES), "a capital would be both the first and the last word of a chain"
    assert {row["continent"] for row in COUNTRIES.values()} == {
        "", "Africa", "Asia", "Europe", "North America", "South America"
    }  # fmt: skip


def test_the_lists_agree_with_the_relations_written_independently() -> None:
    from interp.tasks.relations import _rows

    for relation in SECOND:
        theirs: dict[str, set[str]] = {}
        for row in _rows(f"country_{relation}"):
            theirs.setdefault(row["source"], set()).add(row["target"])
        both = [country for country in COUNTRIES if country in theirs and COUNTRIES[country][relation]]
        assert len(both) >= 40
        assert [c for c in both if COUNTRIES[c][relation] not in theirs[c]] == []
    cities = {}
    for row in _rows("city_country"):
        cities.setdefault(row["source"], set()).add(row["target"])
    assert [e for e, (_, country) in ENTITIES.items() if e in cities and country not in cities[e]] == []


@pytest.mark.parametrize("order", ["entity_first", "relation_first"])
@pytest.mark.parametrize("prepend_bos", [None, True])
def test_every_prompt_asks_for_its_chain(words, made, order, prepend_bos) -> None:
    task = made(order=order, hop="both", prepend_bos=prepend_bos)
    chains = {(entity, r1, r2): answer for entity, r1, _, r2, answer in listed()}
    right, wrong = ([t.strip() for t in words.to_str_tokens(ids)] for ids in (task.answers, task.wrong))
    skip = 1 if prepend_bos else 0
    asked = set()
    for i, prompt in enumerate(task.prompts):
        clean, corrupt = (
            words.tokenizer.decode(ids[i][task.mask[i] == 1].tolist()[skip:]) for ids in (task.clean, task.corrupt)
        )
        assert clean == prompt
        (entity, *relations), (other, *same) = read(clean, order), read(corrupt, order)
        assert relations == same
        assert chains[(entity, *relations)] == right[i]
        assert chains[(other, *relations)] == wrong[i] != right[i]
        asked.add((entity, *relations))
    assert len(asked) == len(task) >= 200, "two hundred chains, each once"
    single = [chain for chain in listed() if " " not in chain[2] + chain[4]]
    assert f"{len(single)} of {len(listed())} chains" in task.source
    assert asked <= {(entity, r1, r2) for entity, r1, _, r2, _ in single}


@pytest.mark.parametrize("order", ["entity_first", "relation_first"])
@pytest.mark.parametrize("hop", ["both", "first", "second"])
@pytest.mark.parametrize("prepend_bos", [None, True])
def test_positions_are_where_the_words_end(words, made, order, hop, prepend_bos) -> None:
    task = made(order=order, hop=hop, prepend_bos=prepend_bos)
    row = torch.arange(len(task))
    names = ["relation1", "relation2"] if hop == "both" else ["relation"]
    assert set(task.positions) == {"entity", *names, "end"}
    at = {name: words.to_str_tokens(task.clean[row, where]) for name, where in task.positions.items()}
    also = {name: words.to_str_tokens(task.corrupt[row, where]) for name, where in task.positions.items()}
    for i, prompt in enumerate(task.prompts):
        entity, *relations = read(prompt, order)
        assert entity.endswith(at["entity"][i].strip())
        assert [at[name][i].strip() for name in names] == relations
        assert [also[name][i] for name in (*names, "end")] == [at[name][i] for name in (*names, "end")]
        assert prompt.endswith(at["end"][i])
    where = task.positions
    order_of = ["entity", *names] if order == "entity_first" else [*reversed(names), "entity"]
    for one, other in zip(order_of, [*order_of[1:], "end"], strict=True):
        assert bool((where[one] < where[other]).all())
    start = torch.zeros(len(task)) if task.mask is None else task.mask.argmax(1)
    assert bool((where["entity"] > start + 2).all()), "the entity comes after 'In fact,'"


def test_single_hops_are_those_of_the_chains(words, made) -> None:
    both, first, second = (made(order="entity_first", hop=hop, prepend_bos=None) for hop in ("both", "first", "second"))
    assert [task.name for task in (both, first, second)] == ["two_hop", "two_hop_first", "two_hop_second"]
    for task, table in ((first, ENTITIES), (second, None)):
        right = [t.strip() for t in words.to_str_tokens(task.answers)]
        assert len(set(task.prompts)) == len(task)
        for prompt, answer in zip(task.prompts, right, strict=True):
            entity, relation = read(prompt, "entity_first")
            assert answer == (COUNTRIES[entity][relation] if table is None else table[entity][1])


@pytest.mark.parametrize("order", ["entity_first", "relation_first"])
def test_names_that_end_in_s_take_an_apostrophe(made, order) -> None:
    prompts = made(order=order, hop="both", prepend_bos=None).prompts
    assert not any("s's" in prompt for prompt in prompts)
    if order == "entity_first":
        assert any("the Cliffs" not in prompt and "s' country's" in prompt for prompt in prompts)


def test_a_chain_whose_entity_gives_it_away_is_left_out(made) -> None:
    asked = {
        read(prompt, "entity_first") for prompt in made(order="entity_first", hop="both", prepend_bos=None).prompts
    }
    about = {second for entity, _, second in asked if entity == "the Berlin Wall"}
    assert "currency" in about and "capital" not in about


def test_seeds_and_numbers(words) -> None:
    assert two_hop(words, 10, hop="second", seed=3).fingerprint == two_hop(words, 10, hop="second", seed=3).fingerprint
    assert two_hop(words, 10, hop="second", seed=3).fingerprint != two_hop(words, 10, hop="second", seed=4).fingerprint
    with pytest.raises(ValueError, match="n_prompts=9999, but only .* different prompts"):
        two_hop(words, 9999, hop="second")


def test_refusals(words, make_model) -> None:
    with pytest.raises(ValueError, match="the two_hop task asks for the next token"):
        two_hop(make_model(kind="encoder"))
    with pytest.raises(ValueError, match="order='backwards' is not known; use one of 'entity_first'"):
        two_hop(words, order="backwards")
    with pytest.raises(ValueError, match="hop='third' is not known; use one of 'both'"):
        two_hop(words, hop="third")
    lonely = make_model(unknown=[country for country in COUNTRIES if country != "France"])
    with pytest.raises(ValueError, match="nothing is left .* 0 of"):
        two_hop(lonely, hop="first")


def test_known_chains_are_those_whose_hops_come_first(words, made, monkeypatch) -> None:
    """A model that gives one answer for each relation knows the chains with that answer, whatever it is asked."""
    liked = {"Paris", "French", "euro", "Europe"}
    favourites = [words.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in {"France", *liked}]

    def answer(self, tokens, mask=None):
        logits = torch.zeros(*tokens.shape, self.d_vocab)
        logits[:, -1, favourites] = 1.0
        logits[:, -1, 0] = 2.0  # the first choice of all is not asked for
        logits[:, :-1] = torch.randn(logits[:, :-1].shape, generator=torch.Generator().manual_seed(0)) * 9
        return logits

    monkeypatch.setattr(type(words), "__call__", answer)
    table = two_hop_chains(words)
    assert isinstance(table, pd.DataFrame) and table["prompt"].is_unique
    assert (table["first"] == (table["bridge"] == "France")).all()
    assert (table["second"] == table["answer"].isin(liked)).all()
    assert 0 < table["second"].sum() < len(table)
    both = table[table["first"] & table["second"]]
    assert set(made(order="entity_first", hop="both", prepend_bos=None).prompts) <= set(table["prompt"])
    with pytest.raises(ValueError, match=f"{len(both)} both single hops that the model gets right; 0 of"):
        two_hop(words, known_only=True)  # one answer for a relation: nobody to swap with


def test_what_the_default_model_knows(smol) -> None:
    task = two_hop(smol, hop="second", order="relation_first", n_prompts=32)
    logits = smol(task.clean, task.mask)[:, -1]
    prefer = logits.gather(1, task.answers[:, None]) > logits.gather(1, task.wrong[:, None])
    # Measured on all of them: 96% of the answers have the largest logit of all answers to their relation.
    assert prefer.float().mean() >= 0.9


# --- parts that share no facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["entity_first", "relation_first"])
@pytest.mark.parametrize("hop", ["both", "first", "second"])
def test_facts_are_those_that_the_prompts_say(made, order: str, hop: str) -> None:
    task = made(order=order, hop=hop)
    facts = two_hop_facts(task)
    for prompt, row in zip(task.prompts, facts.itertuples(), strict=True):
        entity, *relations = read(prompt, order)
        assert (row.entity, row.relation) == (entity, relations[-1])
        assert row.country == (entity if hop == "second" else ENTITIES[entity][1])
        assert row.kind == (row.relation if hop != "first" else "country")


@pytest.mark.parametrize("by", ["country", "entity"])
def test_a_split_shares_no_entity_and_no_country(made, by: str) -> None:
    task = made()
    train, test = two_hop_split(task, by=by, held_out=0.3, seed=4)
    assert sorted(train.prompts + test.prompts) == sorted(task.prompts)
    trained, tested = two_hop_facts(train), two_hop_facts(test)
    assert not set(trained[by]) & set(tested[by])
    assert not set(trained["entity"]) & set(tested["entity"])
    assert bool(set(trained["country"]) & set(tested["country"])) == (by == "entity")
    capitals = [
        set(part.answers[np.flatnonzero(facts["relation"] == "capital")].tolist())
        for part, facts in ((train, trained), (test, tested))
    ]
    assert bool(capitals[0] & capitals[1]) == (by == "entity")
    # half to one and a half times the share asked for: countries have from 1 to 60 prompts
    assert 0.15 < len(test) / len(task) < 0.45


def test_a_seed_holds_out_the_same_countries_in_every_task(made) -> None:
    parts = [
        [set(two_hop_facts(part)["country"]) for part in two_hop_split(made(order=order, hop=hop), seed=1)]
        for order in ("entity_first", "relation_first")
        for hop in ("both", "first", "second")
    ]
    train, test = (set.union(*each) for each in zip(*parts, strict=True))
    assert not train & test
    assert set(two_hop_facts(two_hop_split(made(), seed=2)[1])["country"]) != parts[0][1]


def test_splits_that_cannot_be_are_refused(made) -> None:
    task = made()
    with pytest.raises(ValueError, match='by=.continent. is not known; use "country" or "entity"'):
        two_hop_split(task, by="continent")
    with pytest.raises(ValueError, match="leaves [0-9]+ prompts to train on and 0 to test"):
        two_hop_split(task, held_out=0.0)
    with pytest.raises(ValueError, match="which two_hop does not make"):
        two_hop_facts(replace(task[:1], prompts=("The sky is",)))
