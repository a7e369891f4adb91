from __future__ import annotations

import collections
import csv
import re

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from interp.core.places import shipped
from interp.models.model import Model
from interp.tasks import Relation, Relations, relations
from interp.tasks._prompts import continuation, rows

FOLDER = shipped("data") / "relations"
GENERATED = {"copying", "name_copying", "first_letter", "last_letter", "capitalised", "upper_case", "next_year"}
# Where English or the markup languages have no 60: data/README.md says so.
SHORT = {"number_digit", "pronoun_object", "pronoun_possessive", "pronoun_reflexive"}
SYMMETRIC = {"antonym", "synonym", "homophone", "direction"}


def table(name):
    with open(FOLDER / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


INDEX = {row["relation"]: row for row in table("index")}
LISTED = sorted(set(INDEX) - GENERATED)
WORDS = {row["word"] for row in table("words")} | {row["name"] for row in rows("names")}
TEMPLATES = collections.defaultdict(list)
for row in table("templates"):
    TEMPLATES[row["relation"]].append(row["template"])


def listed(name):
    return [(row["source"], row["target"]) for row in table(name)]


def make_model(inner, **changed):
    """A model that is a tokenizer and nothing else."""
    tokenizer = None if inner is None else PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    given = {
        "bridge": nn.Linear(1, 1), "name": "words", "kind": "decoder", "weights": "raw", "fingerprint": "0" * 64,
        "n_layers": 1, "n_heads": 1, "n_key_value_heads": 1, "d_model": 1, "d_head": 1, "d_mlp": 1, "d_vocab": 9,
        "n_ctx": 64, "gated_mlp": False, "causal": True,
    }  # fmt: skip
    return Model(**given | changed, tokenizer=tokenizer)


def gpt_like(*pieces):
    """Spaces belong to the word after them; what is not in `pieces` is unknown."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "the", "\n", *pieces])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?-?[^\s-]+"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return inner


# --- the data ------------------------------------------------------------------------------------------------------


def test_every_relation_has_its_file_its_line_and_its_templates():
    files = {path.stem for path in FOLDER.glob("*.csv")} - {"index", "templates", "words"}
    assert files == set(LISTED)
    assert set(TEMPLATES) == set(INDEX) | {"any"}
    assert len(table("index")) == len(INDEX) >= 30
    for row in INDEX.values():
        assert row["category"] in ("algorithmic", "knowledge", "linguistic", "translation", "code")
        assert row["space"] in ("both", "source", "none") and len(row["about"].split()) > 4
    assert {name for name in INDEX if INDEX[name]["space"] != "both"} == {"bracket", "number_digit"}


@pytest.mark.parametrize("name", LISTED)
def test_the_lists_are_clean(name):
    pairs = listed(name)
    assert all(word and word == " ".join(word.split()) and ";" not in word for pair in pairs for word in pair)
    assert len(set(pairs)) == len(pairs), "no pair twice"
    assert not [source for source, target in pairs if source == target]
    assert (len(pairs) < 60) == (name in SHORT)
    if name in SYMMETRIC:
        examples = {word for source, _ in shots(name) for word in (source, dict(shots(name))[source])}
        back = {(target, source) for source, target in pairs if target not in examples}
        assert back <= set(pairs), "each pair both ways"


def shots(name):
    """The worked examples in a relation's templates."""
    found = []
    for template in TEMPLATES[name]:
        if template.startswith("For example: "):
            found += [tuple(part.split(" -> ")) for part in template[13:].split(", ")[:-1]]
    return found


@pytest.mark.parametrize("name", [*INDEX, "any"])
def test_templates_ask_without_giving_the_answer_away(name):
    asks = TEMPLATES[name]
    assert 2 <= len(asks) == len(set(asks))
    for ask in asks:
        before, _, after = ask.partition("{source}")
        assert "{" not in before + after and (after or name == "any") and ask == ask.strip()
        assert before and before.endswith(" ") == (name != "bracket"), "the source stands there as it was filtered"
    if name != "any":
        sources = {source for source, _ in listed(name)} if name in LISTED else WORDS
        used = {word for pair in shots(name) for word in pair}
        assert not used & sources
        # Two templates show examples, the same ones.
        showing = [
            ask for ask in asks if all(re.search(rf"\b{word}\b", ask) for pair in shots(name)[:2] for word in pair)
        ]
        assert not shots(name) or len(showing) == 2
        assert (len(shots(name)) >= 3) == (name not in SHORT | {"bracket"})


def test_facts_agree_with_the_lists_made_at_another_time():
    ours, theirs = dict(listed("country_capital")), {row["country"]: row["capital"] for row in rows("country_capital")}
    common = set(ours) & set(theirs)
    assert len(common) > 80
    assert {c: ours[c] for c in common} == {c: theirs[c] for c in common}
    capitals = set(ours.values())
    assert not {city for city, _ in listed("city_country")} & capitals


def test_inflected_forms_follow_the_rules_of_spelling_or_are_known_exceptions():
    assert all(form.endswith("ing") for _, form in listed("present_participle"))
    assert {form for _, form in listed("third_person") if not form.endswith("s")} == set()
    assert {form for _, form in listed("adverb") if not form.endswith("ly")} == {"well"}
    assert {form[-2:] for _, form in listed("superlative")} == {"st"}
    comparative, superlative = dict(listed("comparative")), dict(listed("superlative"))
    assert set(comparative) == set(superlative)
    odd = {a for a in comparative if superlative[a] != re.sub("er$", "est", comparative[a])}
    assert odd == {"good", "bad", "much", "many", "little"}
    past, ing = dict(listed("past_tense")), dict(listed("present_participle"))
    regular = {verb: form for verb, form in past.items() if form.endswith("ed") and verb in ing}
    # One stem takes -ed and -ing, but for a final e or y.
    stems = {verb for verb, form in regular.items() if form[:-2] not in (ing[verb][:-3], ing[verb][:-4] + "i")}
    assert stems <= {"feed", "need", "bleed", "breed", "speed", "lead", "flee", "agree"}, stems
    for british, american in (("our", "or"), ("tre", "ter"), ("ise", "ize"), ("yse", "yze")):
        assert sum(b.endswith(british) and a.endswith(american) for a, b in listed("british_spelling")) >= 2


def test_generated_relations(smol):
    found = relations(smol, sorted(GENERATED - {"next_year"}))
    pairs = {relation.name: [(pair.source, pair.target) for pair in relation.pairs] for relation in found}
    assert all(source == target for name in ("copying", "name_copying") for source, target in pairs[name])
    assert all(source[0] == target and len(source) > 2 for source, target in pairs["first_letter"])
    assert all(source.endswith(target) and len(target) == 1 for source, target in pairs["last_letter"])
    assert all(source.islower() and source.title() == target for source, target in pairs["capitalised"])
    assert all(source.islower() and source.upper() == target for source, target in pairs["upper_case"])
    assert [relation.name for relation in found if relation.copying] == ["copying", "name_copying"]


def test_next_year_where_years_are_one_token():
    model = make_model(gpt_like(*(f" {year}" for year in range(1890, 1950))))
    kept = relations(model, "next_year")["next_year"].pairs
    assert [(int(pair.source), int(pair.target)) for pair in kept] == [(y, y + 1) for y in range(1890, 1949)]


# --- the filter ----------------------------------------------------------------------------------------------------


def test_kept_pairs_are_those_of_one_token_with_a_space_each(smol):
    """Against the plain filter, a word at a time and without context: for a byte-level tokenizer it is the same."""

    def tokens(word):
        return tuple(smol.tokenizer.encode(f" {word}", add_special_tokens=False))

    names = ["country_capital", "country_language", "past_tense", "element_symbol", "english_french"]
    for relation in relations(smol, names):
        pairs = [(s, t, tokens(s), tokens(t)) for s, t in listed(relation.name)]
        single = [(s, t, ids, target[0]) for s, t, ids, target in pairs if len(ids) == len(target) == 1]
        several = [(s, t, ids, target[0]) for s, t, ids, target in pairs if len(ids) > 1 and len(target) == 1]
        assert [tuple(pair) for pair in relation.pairs] == single
        assert [tuple(pair) for pair in relation.multi_token] == several
        assert relation.source_ids.tolist() == [ids[0] for _, _, ids, _ in single]
        assert relation.target_ids.tolist() == [target for *_, target in single]
        assert relation.source_ids.dtype == torch.long and relation.source_ids.device == smol.device
        assert relation.n_listed == len(pairs)


def test_the_default_model_keeps_enough(smol):
    found = relations(smol)
    counts = found.counts.set_index("relation")
    assert set(counts.index) == set(INDEX) and counts["used"].sum() == len(found) >= 40
    few = set(counts.index[counts["kept"] < 40])
    # No tokenizer of single digits has years, and few capitals and symbols are words of their own.
    assert few <= SHORT | {"next_year", "bracket", "element_symbol"}
    assert counts["kept"].to_dict() | {r.name: len(r) for r in found} == counts["kept"].to_dict()
    assert set(counts.index[~counts["used"]]) == {r.name for r in found.left_out} <= SHORT | {"next_year"}
    assert ((counts["kept"] + counts["multi_token"]) <= counts["listed"]).all()
    assert (counts["sources"] <= counts["kept"]).all() and counts.loc["noun_pronoun", "targets"] == 4


@pytest.mark.parametrize("name", [name for name in INDEX if name != "next_year"])
def test_in_each_template_source_and_target_are_the_tokens_of_the_pair(smol, name):
    relation = relations(smol, name, min_pairs=1)[name]
    before_target = "" if INDEX[name]["space"] != "both" else " "
    for template in relation.templates:
        for pair in (*relation.pairs[::40], *relation.multi_token[:2]):
            prompt = template.format(source=pair.source)
            ids = smol.tokenize(prompt, prepend_bos=False).ids[0].tolist()
            width = len(pair.source_tokens)
            assert pair.source_tokens in [tuple(ids[i : i + width]) for i in range(len(ids))], prompt
            if name != "bracket":  # its partner may join the letter before it into one token
                assert continuation(smol, prompt, before_target + pair.target) == pair.target_token, prompt


PAIRS = [
    ("hot", "cold"),
    ("hot", "icy"),
    ("big", "small"),
    ("semi-dark", "light"),
    ("dark", "un-known"),
    ("odd", "even"),
]


def test_planted_vocabulary():
    model = make_model(gpt_like(" hot", " cold", " icy", " big", " semi", "-dark", " dark", " light", "small", " even"))
    relation = Relation.from_pairs(
        model, "opposite", PAIRS, about="a word and its opposite", templates=["Not {source} but"]
    )
    assert [(p.source, p.target) for p in relation.pairs] == [("hot", "cold"), ("hot", "icy")]
    assert relation.source_ids.tolist() == [3, 3] and relation.target_ids.tolist() == [4, 5]
    assert [tuple(p) for p in relation.multi_token] == [("semi-dark", "light", (7, 8), 10)]
    assert relation.targets == {"hot": (4, 5), "semi-dark": (10,)}
    assert (len(relation), relation.n_listed, relation.category, relation.copying) == (2, 6, "own", False)
    bare = Relation.from_pairs(model, "bare", [("small", "small")], space="none")
    assert [tuple(p) for p in bare.pairs] == [("small", "small", (11,), 11)] and bare.copying
    mixed = Relation.from_pairs(model, "mixed", [("big", "small"), ("small", "big")], space="source")
    assert [tuple(p) for p in mixed.pairs] == [("big", "small", (6,), 11)]


def test_a_tokenizer_that_puts_its_own_space_before_a_text():
    """Llama's writes " hot" alone as "▁", "▁hot" and "(" alone as "▁(": other tokens than inside a line."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁the", "▁hot", "▁cold", "▁", "\n", "small", "▁(", "(", ")"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁\(|[()]|▁|\n"), "isolated")
    model = make_model(inner)
    assert model.tokenizer.encode("(", add_special_tokens=False) == [7]
    assert model.tokenizer.encode(" hot", add_special_tokens=False) == [4, 2]
    bracket = Relation.from_pairs(model, "bracket", [("(", ")")], space="none")
    assert [tuple(p) for p in bracket.pairs] == [("(", ")", (8,), 9)]
    opposite = Relation.from_pairs(model, "opposite", [("hot", "cold"), ("small", "hot")])
    assert [tuple(p) for p in opposite.pairs] == [("hot", "cold", (2,), 3)]


def test_a_word_whose_start_joins_what_stands_before_it_has_no_tokens():
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(["<unk>", "\n", "\n(", "x", "y"])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\(|\n|[xy]"), "isolated")
    pairs = [("(x", "y"), ("x", "y"), ("y", "(x")]
    relation = Relation.from_pairs(make_model(inner), "joined", pairs, space="none")
    assert [tuple(p) for p in relation.pairs] == [("x", "y", (3,), 4)] and not relation.multi_token


def test_an_uncased_tokenizer_has_no_capitals():
    inner = gpt_like(" word", " paris", " london")
    inner.normalizer = normalizers.Lowercase()
    model = make_model(inner)
    pairs = [("word", "Word"), ("Paris", "London"), ("paris", "london")]
    relation = Relation.from_pairs(model, "capitals", pairs)
    assert [(p.source, p.target) for p in relation.pairs] == [("Paris", "London")], "the same tokens count once"
    copying = Relation.from_pairs(model, "copying", [("Paris", "Paris"), ("paris", "paris"), ("word", "word")])
    assert [p.source for p in copying.pairs] == ["Paris", "word"]


def test_max_pairs_spreads_evenly(smol):
    every, some = (relations(smol, "plural", max_pairs=most)["plural"] for most in (None, 40))
    places = [every.pairs.index(pair) for pair in some.pairs]
    assert len(some) == 40 and places[0] == 0
    gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
    assert gaps <= {len(every) // 40, len(every) // 40 + 1}
    assert some.n_listed == every.n_listed and len(some.source_ids) == 40
    languages, few = (relations(smol, "country_language", max_pairs=most)["country_language"] for most in (None, 30))
    assert len(few) == len(few.multi_token) == 30
    assert few.targets == {pair.source: languages.targets[pair.source] for pair in (*few.pairs, *few.multi_token)}
    whole = relations(smol, "plural", max_pairs=10_000)["plural"]
    assert whole.pairs == every.pairs


# --- the collection ------------------------------------------------------------------------------------------------


def test_several_targets_are_collected(smol):
    languages = relations(smol, "country_language")["country_language"].targets
    (german, french, italian) = (smol.single_token(f" {word}") for word in ("German", "French", "Italian"))
    assert languages["Switzerland"] == (german, french, italian)
    assert languages["Austria"] == (german,)


def test_the_collection_reads_like_a_table_of_its_relations(smol):
    found = relations(smol, ["plural", "antonym"])
    assert found.names == ("plural", "antonym") and [r.name for r in found] == ["plural", "antonym"]
    assert found["antonym"] is list(found)[1]
    assert found.templates == tuple(TEMPLATES["any"])
    assert found["plural"].templates == tuple(TEMPLATES["plural"])
    assert "2 with" in repr(found) and "plural" in repr(found["plural"])
    with pytest.raises(KeyError, match="antonyms.*the nearest: antonym"):
        found["antonyms"]
    own = Relations((found["plural"],), templates=("It is {source}",))
    assert own.counts["used"].tolist() == [True]


def test_fingerprint_is_of_everything_that_can_be_read(smol):
    def of(**changed):
        given = {"name": "own", "pairs": [("hot", "cold"), ("big", "small")], "templates": ["Not {source} but"]}
        given |= changed
        return Relations((Relation.from_pairs(smol, given.pop("name"), given.pop("pairs"), **given),)).fingerprint

    assert of() == of()
    changes = [{"name": "x"}, {"pairs": [("hot", "cold")]}, {"pairs": [("big", "small"), ("hot", "cold")]}]
    changes += [{"templates": []}, {"space": "none"}]
    assert len({of(), *(of(**change) for change in changes)}) == 6


def test_refusals(smol):
    with pytest.raises(ValueError, match=r"no relation is called 'antonyms'; the nearest: antonym"):
        relations(smol, ["plural", "antonyms"])
    with pytest.raises(ValueError, match="'xqzzq'; there are copying, name_copying"):
        relations(smol, "xqzzq")
    with pytest.raises(ValueError, match="a name is given twice"):
        relations(smol, ["plural", "plural"])
    with pytest.raises(ValueError, match="min_pairs=0"):
        relations(smol, min_pairs=0)
    with pytest.raises(ValueError, match="min_pairs=30 and max_pairs=10"):
        relations(smol, max_pairs=10)
    message = r"'pronoun_object' keeps 6 of 6 pairs, fewer than min_pairs=30.*min_pairs=6\)"
    with pytest.raises(ValueError, match=message):
        relations(smol, ["plural", "pronoun_object"])
    assert len(relations(smol, ["plural", "pronoun_object"], min_pairs=6)) == 2
    strange = make_model(gpt_like(" nothing"))
    with pytest.raises(ValueError, match="'plural' keeps 0 of 417 pairs"):
        relations(strange)
    with pytest.raises(ValueError, match="vision model without a tokenizer"):
        relations(make_model(None, kind="vision"))
    with pytest.raises(ValueError, match=r"\(' hot', 'cold'\) has an empty word or spaces"):
        Relation.from_pairs(smol, "own", [(" hot", "cold")])
    with pytest.raises(ValueError, match=r"\('hot', 'cold'\) is given twice"):
        Relation.from_pairs(smol, "own", [("hot", "cold"), ("hot", "cold")])
    for template in ("The opposite is", "{source} {source}", "The opposite of {source} is "):
        with pytest.raises(ValueError, match="needs {source} in it once and no space at its end"):
            Relation.from_pairs(smol, "own", [("hot", "cold")], templates=[template])
    with pytest.raises(ValueError, match="there is no relation here"):
        Relations(())
    one = Relation.from_pairs(smol, "own", [("hot", "cold")])
    with pytest.raises(ValueError, match="two relations have one name: own, own"):
        Relations((one, one))
