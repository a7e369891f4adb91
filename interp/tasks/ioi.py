"""Who gets it? Indirect object identification, the prompts of Wang et al. (arXiv:2211.00593)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from interp.models.model import Model
from interp.tasks._prompts import column, distinct, last_tokens, require_decoder, single_words
from interp.tasks.task import Task

_POSITIONS = ("indirect_object", "subject1", "after_subject1", "subject2")


class _Words(NamedTuple):
    """What fills one template."""

    first: str
    second: str
    subject: str
    place: str
    object: str


def ioi(
    model: Model,
    n_prompts: int = 64,
    *,
    seed: int = 0,
    order: str = "both",
    corrupt: str = "abc",
    prepend_bos: bool | None = None,
) -> Task:
    """Prompts such as "Then, Mary and John went to the store. John gave a drink to", whose answer is " Mary".

    Two names are introduced: the indirect object (IO) and the subject (S1). The subject comes again (S2) and gives
    something to whoever is left. "ABBA" names the IO first ("Mary and John ... John"), "BABA" the subject
    ("John and Mary ... John"); "both" alternates, so that each half is exact for even `n_prompts`, and templates
    take turns, so that any slice holds several of them.

    Corrupted prompts differ from the clean ones in names only:
    "abc" (default, the paper's p_ABC and ACDC's corruption) puts three other names in the three places, all different
    from each other and from the clean two. Nothing of the answer is left in it, neither the names nor which one is
    repeated, so what is patched from it removes all the information that the task needs, and its logit difference is
    about 0.
    "swap" changes S2 into the IO and nothing else ("Mary and John ... Mary"): the answer becomes S and the logit
    difference changes sign. It is the smallest contrast, one token, and only shows what depends on *which* name is
    repeated; components that carry the names themselves look idle under it.

    Names, places and objects are drawn from data/tasks, from those that are one token for the model. With the words of
    the templates being whole tokens too (SmolLM2, GPT-2) all prompts are equally long; otherwise they are
    left-padded with a mask.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of different prompts.
        seed: seed of the draw.
        order: "ABBA", "BABA" or "both".
        corrupt: "abc" or "swap".
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task. `answers` are the IO, `wrong` the S. Positions: "indirect_object" (IO), "subject1" (S1),
        "after_subject1" (S1+1, where previous-token heads act), "subject2" (S2), "end".

    Raises:
        ValueError: for an unknown `order` or `corrupt`, a model that is not a decoder, a tokenizer with fewer than
            five single-token names, or more prompts than can be made.
    """
    require_decoder(model, "ioi")
    for label, value, known in (("order", order, ("ABBA", "BABA", "both")), ("corrupt", corrupt, ("abc", "swap"))):
        if value not in known:
            raise ValueError(f"ioi: {label}={value!r} is not known; use one of {', '.join(map(repr, known))}.")
    kept, counts = _single_token_words(model)
    rng = np.random.default_rng(seed)
    templates = [str(t) for t in rng.permutation(column("ioi_templates", "template"))]
    shape = (len(kept["names"]), len(kept["names"]) - 1, len(kept["places"]), len(kept["objects"]))
    draws = distinct(rng, n_prompts, int(np.prod(shape)), "ioi", f"the single-token words ({counts})")

    pairs, where = [], []
    for index, draw in enumerate(draws):
        io, s, place, thing = (int(i) for i in np.unravel_index(draw, shape))
        indirect = kept["names"][io]
        subject = [*kept["names"][:io], *kept["names"][io + 1 :]][s]
        io_first = order == "ABBA" or (order == "both" and index % 2 == 0)
        template = templates[(index // 2 if order == "both" else index) % len(templates)]
        first, second = (indirect, subject) if io_first else (subject, indirect)
        words = _Words(first, second, subject, kept["places"][place], kept["objects"][thing])
        changed = _corrupted(words, indirect, kept["names"], corrupt, rng)
        filled = [template.format(**version._asdict()) for version in (words, changed)]
        pairs.append((*filled, f" {indirect}", f" {subject}"))
        at_first, at_second, at_subject = _places(model, template, words, prepend_bos)
        at_io, at_s = (at_first, at_second) if io_first else (at_second, at_first)
        where.append((at_io, at_s, at_s + 1, at_subject))
    clean, corrupted, answers, wrong = (list(texts) for texts in zip(*pairs, strict=True))
    return Task.from_pairs(
        model, "ioi", clean, corrupted, answers, wrong, prepend_bos=prepend_bos,
        positions=dict(zip(_POSITIONS, zip(*where, strict=True), strict=True)),
        source=f"{len(templates)} templates written for interp; single tokens: {counts}; {order}, corrupt {corrupt}",
    )  # fmt: skip


def _corrupted(words: _Words, indirect: str, names: list[str], corrupt: str, rng: np.random.Generator) -> _Words:
    """The words of the corrupted prompt: the repeated name swapped, or three other names."""
    if corrupt == "swap":
        return words._replace(subject=indirect)
    others = [name for name in names if name not in (words.first, words.second)]
    first, second, subject = rng.choice(others, size=3, replace=False)
    return words._replace(first=str(first), second=str(second), subject=str(subject))


def _single_token_words(model: Model) -> tuple[dict[str, list[str]], str]:
    """The names, places and objects that are one token, and how many of how many there are."""
    listed = {
        "names": column("names", "name"),
        "places": column("ioi_places", "place"),
        "objects": column("ioi_objects", "object"),
    }
    kept = {label: single_words(model, words) for label, words in listed.items()}
    counts = ", ".join(f"{label} {len(kept[label])} of {len(words)}" for label, words in listed.items())
    if len(kept["names"]) < 5 or not kept["places"] or not kept["objects"]:
        raise ValueError(
            f"ioi: {model.name}'s tokenizer has too few of the words as single tokens ({counts}); it takes five names "
            "(two, and three for the corrupted prompt), a place and an object."
        )
    return kept, counts


def _places(model: Model, template: str, words: _Words, prepend_bos: bool | None) -> list[int]:
    """Positions of the three names: first, second, and the subject's second mention."""
    filled = words._asdict()
    parts, rest = [], template
    for name in ("first", "second", "subject"):
        before, rest = rest.split(f"{{{name}}}")
        parts.append(before.format(**filled) + filled[name])
    return last_tokens(model, [*parts, rest.format(**filled)], prepend_bos)[:3]
