"""What do the generators share? Reading data/tasks, what one token is, and where a word sits in a prompt."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from interp.core.places import shipped
from interp.models.model import Model


def rows(name: str) -> list[dict[str, str]]:
    """The lines of data/tasks/NAME.csv, one dictionary a line."""
    with open(shipped("data") / "tasks" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def column(name: str, label: str) -> list[str]:
    """One column of data/tasks/NAME.csv."""
    return [row[label] for row in rows(name)]


def bare_ids(model: Model, text: str) -> list[int]:
    """Token ids of a text without BOS or any other special token."""
    return list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def continuation(model: Model, prompt: str, answer: str) -> int | None:
    """Id of `answer` where it follows `prompt`; None when it is not exactly one (known) token there.

    Asking in context is what counts: SentencePiece tokenizers split a leading space off a text that stands alone,
    and a prompt that ends in a space takes it away from the answer.
    """
    before, both = bare_ids(model, prompt), bare_ids(model, prompt + answer)
    if both[:-1] != before or both[-1] == model.tokenizer.unk_token_id:
        return None
    return both[-1]


def single_words(model: Model, words: Sequence[str]) -> list[str]:
    """The words that are one token in the middle of a sentence."""
    return [word for word in words if continuation(model, "the", f" {word}") is not None]


def affixes(model: Model, prepend_bos: bool | None) -> tuple[list[int], list[int]]:
    """Special tokens that `Model.tokenize` puts before and after a text."""
    inside, whole = bare_ids(model, "the"), model.tokenize("the", prepend_bos=prepend_bos).ids[0].tolist()
    start = next(i for i in range(len(whole)) if whole[i : i + len(inside)] == inside)
    return whole[:start], whole[start + len(inside) :]


def last_tokens(model: Model, parts: Sequence[str], prepend_bos: bool | None) -> list[int]:
    """Position of the last token of each part of a prompt, counted from the start of the prompt.

    Args:
        model: whose tokenizer is used.
        parts: consecutive pieces whose concatenation is the prompt.
        prepend_bos: see `Model.tokenize`.

    Returns:
        One position a part.

    Raises:
        ValueError: when a token reaches over the border between two parts.
    """
    offset = len(affixes(model, prepend_bos)[0])
    heads = ["".join(parts[: i + 1]) for i in range(len(parts))]
    ids = [bare_ids(model, head) for head in heads]
    for head, (shorter, longer) in zip(heads, pairwise(ids), strict=False):
        if longer[: len(shorter)] != shorter:
            raise ValueError(
                f"{model.name}'s tokenizer joins the end of {head!r} with what follows, so this position of the prompt "
                "has no token of its own: the task cannot be posed to this model."
            )
    return [offset + len(row) - 1 for row in ids]


def require_decoder(model: Model, task: str) -> None:
    """Refuse a model that does not predict the next token of a text."""
    if model.kind != "decoder" or model.tokenizer is None:
        raise ValueError(
            f"the {task} task asks for the next token, but {model.name} is a {model.kind} model: load a decoder, for "
            'example interp.load("smollm2-135m").'
        )


def distinct(rng: np.random.Generator, n_prompts: int, total: int, task: str, made_of: str) -> list[int]:
    """`n_prompts` different numbers below `total`, in random order; an error with the numbers when there are too few.

    Args:
        rng: the task's generator.
        n_prompts: how many are asked for.
        total: how many different prompts there are.
        task: name for the error message.
        made_of: what limits them, for the error message.
    """
    if n_prompts < 1:
        raise ValueError(f"{task}: n_prompts={n_prompts}, but a task needs at least one prompt.")
    if n_prompts > total:
        raise ValueError(
            f"{task}: n_prompts={n_prompts}, but only {total} different prompts can be made from {made_of}: "
            f"ask for at most {total}."
        )
    return [int(i) for i in rng.choice(total, size=n_prompts, replace=False)]
