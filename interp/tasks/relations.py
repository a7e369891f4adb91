"""Which words go together? Relations such as country to capital, as far as a tokenizer has their words."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.places import shipped
from interp.models.hooks import nearest
from interp.models.model import Model
from interp.tasks._prompts import bare_ids, rows

#: Which of the two words has a space before it, as in the middle of a sentence.
Space = Literal["both", "source", "none"]

# What stands before a word when its tokens are asked for: SentencePiece would add a space to a text that stands alone.
_SPACED, _BARE = ("the", " "), ("\n", "")

# In the column `relation` of templates.csv: a template for every relation.
_ANY = "any"


class Pair(NamedTuple):
    """A source and one right target of it, with their token ids; the target is always one token."""

    source: str
    target: str
    source_tokens: tuple[int, ...]
    target_token: int


@dataclass(frozen=True, eq=False)
class Relation:
    """Pairs of words that stand in one relation, as one model's tokenizer writes them.

    A source with several right targets (Belgium: Dutch, French, German) has a pair for each, the usual one first.

    Attributes:
        name: "antonym", "country_capital", ...
        category: "algorithmic", "knowledge", "linguistic", "translation", "code", or the caller's own.
        about: the relation in words.
        pairs: those whose source and target are one token each.
        multi_token: those whose source is several tokens and whose target is one.
        source_ids: token of each source of `pairs`, `[pair]`, on the model's device.
        target_ids: token of each target of `pairs`, `[pair]`.
        targets: tokens of all right targets of each source, of one token or of several.
        templates: prompts that ask for the relation, with "{source}" in them; the target comes next.
        n_listed: number of pairs before any were left out.
    """

    name: str
    category: str
    about: str
    pairs: tuple[Pair, ...]
    multi_token: tuple[Pair, ...]
    source_ids: Int[Tensor, " pair"]
    target_ids: Int[Tensor, " pair"]
    targets: Mapping[str, tuple[int, ...]]
    templates: tuple[str, ...]
    n_listed: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"<Relation {self.name!r}: {len(self)} of {self.n_listed} pairs, for example {self.pairs[:1]}>"

    @property
    def copying(self) -> bool:
        """Whether every target is its source."""
        pairs = (*self.pairs, *self.multi_token)
        return bool(pairs) and all(pair.source == pair.target for pair in pairs)

    @classmethod
    def from_pairs(
        cls,
        model: Model,
        name: str,
        pairs: Sequence[tuple[str, str]],
        *,
        category: str = "own",
        about: str = "",
        templates: Sequence[str] = (),
        space: Space = "both",
        max_pairs: int | None = None,
    ) -> Relation:
        """A relation from any list of pairs, reduced to what the model's tokenizer can express.

        Args:
            model: whose tokenizer is used.
            name: name of the relation.
            pairs: (source, target) as words, without spaces around them.
            category: any label.
            about: the relation in words.
            templates: prompts with "{source}" in them once, such as "The capital of {source} is".
            space: which words are taken with the space before them (see `relations`).
            max_pairs: keep at most so many of `pairs` and of `multi_token`, spread evenly; None for all.

        Returns:
            The Relation; it may be left with no pairs.

        Raises:
            ValueError: for a model without a tokenizer, an empty or padded word, a pair given twice, or a
                template without "{source}".

        Example:
            >>> from interp.models import toy
            >>> from interp.tasks import Relation
            >>> model = toy.random("gpt2")
            >>> own = Relation.from_pairs(model, "next", [("w2", "w3"), ("w3", "w4"), ("w4", "unheard-of")])
            >>> len(own), own.n_listed, own.target_ids.tolist()
            (2, 3, [3, 4])
        """
        _check(model, name, pairs, templates)
        tokens = {bare: _tokens(model, {word for pair in pairs for word in pair}, bare) for bare in (False, True)}
        sources, targets = tokens[space == "none"], tokens[space != "both"]
        kept: dict[tuple[tuple[int, ...], int], Pair] = {}
        for source, target in pairs:
            from_ids, to_ids = sources[source], targets[target]
            # A tokenizer without capitals turns "paris -> Paris" into copying: such pairs are not of the relation.
            folded = from_ids == to_ids and source != target
            if from_ids and len(to_ids) == 1 and not folded:
                kept.setdefault((from_ids, to_ids[0]), Pair(source, target, from_ids, to_ids[0]))
        single = _spread([pair for pair in kept.values() if len(pair.source_tokens) == 1], max_pairs)
        several = _spread([pair for pair in kept.values() if len(pair.source_tokens) > 1], max_pairs)
        # Of all pairs, also where `max_pairs` leaves a source with some: any right answer is right.
        right: dict[str, tuple[int, ...]] = {pair.source: () for pair in (*single, *several)}
        for pair in kept.values():
            if pair.source in right:
                right[pair.source] += (pair.target_token,)
        return cls(
            name=name, category=category, about=about, pairs=single, multi_token=several, targets=right,
            source_ids=torch.tensor([pair.source_tokens[0] for pair in single], dtype=torch.long, device=model.device),
            target_ids=torch.tensor([pair.target_token for pair in single], dtype=torch.long, device=model.device),
            templates=tuple(templates), n_listed=len(pairs),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Relations:
    """Relations to ask about together; iterating gives each `Relation`, `relations["antonym"]` one of them.

    Attributes:
        kept: the relations.
        left_out: those with too few pairs for this tokenizer; only `counts` reads them.
        templates: prompts that fit every relation's source, the paper's "This is a document about {source}".
    """

    kept: tuple[Relation, ...]
    left_out: tuple[Relation, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.kept:
            raise ValueError("there is no relation here: give at least one Relation.")
        if len(set(self.names)) < len(self.kept):
            raise ValueError(f"two relations have one name: {', '.join(self.names)}. Rename one of them.")

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Relation]:
        return iter(self.kept)

    def __getitem__(self, name: str) -> Relation:
        for relation in self.kept:
            if relation.name == name:
                return relation
        raise KeyError(f"no relation {name!r} here; {_did_you_mean(name, self.names)}")

    def __repr__(self) -> str:
        return f"<Relations: {len(self)} with {sum(map(len, self))} pairs; {len(self.left_out)} left out>"

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each relation."""
        return tuple(relation.name for relation in self.kept)

    @property
    def counts(self) -> pd.DataFrame:
        """How many pairs each relation keeps, those left out included.

        Returns:
            A row a relation: `relation`, `category`, `listed` (pairs in the list), `kept` (source and target of one
            token), `sources`, `targets` (different ones among those), `multi_token` (source of several tokens, target
            of one) and `used` (False for a relation left out).
        """
        return pd.DataFrame(
            {
                "relation": relation.name,
                "category": relation.category,
                "listed": relation.n_listed,
                "kept": len(relation),
                "sources": len({pair.source for pair in relation.pairs}),
                "targets": len({pair.target for pair in relation.pairs}),
                "multi_token": len(relation.multi_token),
                "used": used,
            }
            for used, group in ((True, self.kept), (False, self.left_out))
            for relation in group
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that a method can read."""
        digest = hashlib.sha256(repr(self.templates).encode())
        for relation in self.kept:
            read = (relation.name, [tuple(p) for p in (*relation.pairs, *relation.multi_token)], relation.templates)
            digest.update(repr(read).encode())
        return digest.hexdigest()


def relations(
    model: Model, names: Sequence[str] | str | None = None, *, min_pairs: int = 30, max_pairs: int | None = None
) -> Relations:
    """The relations that ship with interp, reduced to pairs that the model's tokenizer can express.

    A pair is kept when its source and its target are one known token each *with the space before them*, that is as they
    stand after another word (arXiv:2412.11965's filter). Two relations are written otherwise, which the column `space`
    of data/relations/index.csv says: a bracket and its partner without a space ("none"), a number word with and its
    digits without ("source"), since tokenizers of single digits have no " 7". Two pairs that are the same tokens count
    once; a pair whose two words are one token for an uncased tokenizer is left out, unless the relation is copying.

    Pairs whose source is several tokens, and whose target is one, go to `Relation.multi_token`.

    Args:
        model: whose tokenizer is used; of any kind that has one.
        names: names of relations (the files in data/relations, and the generated ones); None for all.
        min_pairs: a relation with fewer kept pairs is left out, and `counts` says so; 30 is the paper's.
        max_pairs: keep at most so many pairs of a relation, spread evenly over its list; None for all. What a method
            costs often grows with the number of different sources.

    Returns:
        The Relations, in the order asked for; `counts` has how many pairs each keeps.

    Raises:
        ValueError: for an unknown name (with the nearest), a name given twice, a named relation with fewer than
            `min_pairs` pairs, a model without a tokenizer, or when none is left.

    Cost: one tokenization of about 20,000 words for all (about two seconds); no forward pass.

    Differs from the paper: the relations and their pairs are our own; its 20 are among the 51. Multi-token sources are
    those of several tokens *with* the space, which is how they stand in a prompt; the paper's code asks without it.
    """
    known = {row["relation"]: row for row in _rows("index")}
    wanted = [names] if isinstance(names, str) else list(known if names is None else names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no relation is called {name!r}; {_did_you_mean(name, known)}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"relations: a name is given twice in {wanted}; give each once.")
    if min_pairs < 1 or (max_pairs is not None and max_pairs < min_pairs):
        raise ValueError(
            f"relations: min_pairs={min_pairs} and max_pairs={max_pairs}; it takes min_pairs of at least 1, and "
            "max_pairs no smaller than that."
        )
    asks: dict[str, list[str]] = {}
    for row in _rows("templates"):
        asks.setdefault(row["relation"], []).append(row["template"])
    made = [
        Relation.from_pairs(
            model, name, _pairs(name), category=known[name]["category"], about=known[name]["about"],
            templates=asks[name], space=known[name]["space"], max_pairs=max_pairs,  # type: ignore[arg-type]
        )
        for name in wanted
    ]  # fmt: skip
    few = tuple(relation for relation in made if len(relation) < min_pairs)
    if few and (names is not None or len(few) == len(made)):
        raise ValueError(
            f"relations: for {model.name}'s tokenizer "
            + ", ".join(f"{relation.name!r} keeps {len(relation)} of {relation.n_listed} pairs" for relation in few)
            + f", fewer than min_pairs={min_pairs}. Ask for less, relations(..., min_pairs="
            f"{max(1, min(map(len, few)))}), or leave them out."
        )
    return Relations(tuple(r for r in made if r not in few), few, tuple(asks[_ANY]))


def _pairs(name: str) -> list[tuple[str, str]]:
    """All pairs of a relation: generated by its rule, or read from its file."""
    if name in _RULES:
        return list(_RULES[name]())
    return [(row["source"], row["target"]) for row in _rows(name)]


def _words() -> list[str]:
    return [row["word"] for row in _rows("words")]


#: Relations that a rule states better than a list does.
_RULES: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "capitalised": lambda: ((word, word.capitalize()) for word in _words()),
    "copying": lambda: ((word, word) for word in _words()),
    "first_letter": lambda: ((word, word[0]) for word in _words()),
    "last_letter": lambda: ((word, word[-1]) for word in _words()),
    "name_copying": lambda: ((row["name"], row["name"]) for row in rows("names")),
    "next_year": lambda: ((str(year), str(year + 1)) for year in range(1400, 2100)),
    "upper_case": lambda: ((word, word.upper()) for word in _words()),
}


def _rows(name: str) -> list[dict[str, str]]:
    """The lines of data/relations/NAME.csv, one dictionary a line."""
    with open(shipped("data") / "relations" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _tokens(model: Model, words: Iterable[str], bare: bool) -> dict[str, tuple[int, ...]]:
    """Token ids of each word where it follows another word or, bare, a new line; none for a word with unknown parts."""
    before, space = _BARE if bare else _SPACED
    head, listed = bare_ids(model, before), sorted(words)
    whole = model.tokenizer([f"{before}{space}{word}" for word in listed], add_special_tokens=False)["input_ids"]
    tails = [tuple(ids[len(head) :]) if list(ids[: len(head)]) == head else () for ids in whole]
    unknown = model.tokenizer.unk_token_id
    return {word: () if unknown in tail else tail for word, tail in zip(listed, tails, strict=True)}


def _spread(pairs: list[Pair], most: int | None) -> tuple[Pair, ...]:
    """At most so many of the pairs, evenly spaced in their list, the first one included."""
    if most is None or len(pairs) <= most:
        return tuple(pairs)
    return tuple(pairs[i * len(pairs) // most] for i in range(most))


def _check(model: Model, name: str, pairs: Sequence[tuple[str, str]], templates: Sequence[str]) -> None:
    if model.tokenizer is None:
        raise ValueError(
            f"relation {name!r}: {model.name} is a {model.kind} model without a tokenizer: load a model of text, for "
            'example interp.load("smollm2-135m").'
        )
    for pair in pairs:
        if any(word != word.strip() or not word for word in pair):
            raise ValueError(f"relation {name!r}: {pair} has an empty word or spaces around one; write them without.")
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if list(pairs).count(pair) > 1)
        raise ValueError(f"relation {name!r}: {twice} is given twice; give each pair once.")
    for template in templates:
        if template.count("{source}") != 1 or template != template.rstrip():
            raise ValueError(
                f"relation {name!r}: the template {template!r} needs {{source}} in it once and no space at its end, as "
                'in "The capital of {source} is".'
            )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"the nearest: {', '.join(near)}." if near else f"there are {', '.join(known)}."
