"""Is the year later? The greater-than prompts of Hanna et al. (arXiv:2305.00586), for two kinds of tokenizer."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.models.model import Model
from interp.tasks._prompts import bare_ids, column, distinct, last_tokens, require_decoder, single_words
from interp.tasks.task import Task

_CENTURIES = range(11, 19)
_START_YEAR = re.compile(r"from the year (\d\d)(\d\d) to the year")


class YearSets(NamedTuple):
    """Which next tokens make the end year later than the start year, and which do not; both bool `[batch d_vocab]`."""

    right: Tensor
    wrong: Tensor


class _Years(NamedTuple):
    """How a tokenizer writes years: digits in a step (2 or 1), the id of each step, the usable start years."""

    digits: int
    ids: dict[int, int]
    starts: list[tuple[int, int]]


def greater_than(model: Model, n_prompts: int = 64, *, seed: int = 0, prepend_bos: bool | None = None) -> Task:
    """Prompts such as "The war lasted from the year 1732 to the year 17", whose end year must be later.

    What the next token is depends on the tokenizer; the prompts are the same:
    *two digits in a token* (GPT-2: " 17" "32"): the paper's task. The next token is a whole YY; right are
    those above the start's YY (2 to 98), wrong are those up to it. Only start years that the tokenizer
    splits as XX, YY are used.
    *one digit in a token* (SmolLM2, Llama 2, Gemma: " 17" and then "3", "2"): the next token is the tens digit; right
    are those above the start's tens digit (1 to 8), wrong those below. The same digit is in neither set,
    because the year is then decided by the digit after.

    The corrupted prompt starts in year XX01 (the paper's "01" prompts), after which any end year is right.

    There are many right answers, and a Task has room for one: `answers` is the nearest right step (YY + 1, or the tens
    digit + 1) and `wrong` the nearest wrong one (- 1), which are the two sides of the paper's "cutoff sharpness". They
    make the logit difference of every method work on this task. The paper's own metric, the probability of all right
    years less that of all wrong ones, takes the sets of `year_sets(model, task)`; they are computed from the prompts,
    so that a slice or a split of the task has them too.

    Args:
        model: whose tokenizer is used.
        n_prompts: number of different prompts.
        seed: seed of the draw.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task; positions "noun", "XX" (last token of the start's century), "YY" (the token after it: the year in
        the century, or its tens digit), "YY_units" (only for one digit in a token) and "end".

    Raises:
        ValueError: for a model that is not a decoder, a tokenizer that splits years in neither way, or more prompts
            than can be made.
    """
    require_decoder(model, "greater_than")
    years = _years(model)
    listed = column("greater_than_nouns", "noun")
    nouns = single_words(model, listed)
    rng = np.random.default_rng(seed)
    counts = f"{len(nouns)} of {len(listed)} nouns of one token and {len(years.starts)} start years"
    draws = distinct(rng, n_prompts, len(nouns) * len(years.starts), "greater_than", counts)
    prompts, corrupted, answers, wrong = [], [], [], []
    where: dict[str, list[int]] = {"noun": [], "XX": [], "YY": []}
    if years.digits == 1:
        where["YY_units"] = []
    for draw in draws:
        noun, (century, year) = nouns[draw // len(years.starts)], years.starts[draw % len(years.starts)]
        parts = [f"The {noun}", f" lasted from the year {century}", *_steps(year, years.digits), " to the year "]
        parts[-1] += str(century)
        prompts.append("".join(parts))
        corrupted.append("".join([*parts[:2], "01", parts[-1]]))
        step = year if years.digits == 2 else year // 10
        answers.append(f"{step + 1:0{years.digits}d}")
        wrong.append(f"{step - 1:0{years.digits}d}")
        for name, place in zip(where, last_tokens(model, parts, prepend_bos), strict=False):
            where[name].append(place)
    kind = "two digits" if years.digits == 2 else "one digit"
    return Task.from_pairs(
        model, "greater_than", prompts, corrupted, answers, wrong, positions=where, prepend_bos=prepend_bos,
        source=f"nouns written for interp; {counts}; {kind} in a token",
    )  # fmt: skip


def year_sets(model: Model, task: Task) -> YearSets:
    """All right and all wrong next tokens of each greater-than prompt.

    Args:
        model: the model that the task was made for.
        task: what `greater_than` returned, or a part of it.

    Returns:
        `YearSets(right, wrong)`, bool `[batch d_vocab]`, on the model's device. With `p = logits.softmax(-1)` at "end",
        the paper's probability difference is `(p * right).sum(-1) - (p * wrong).sum(-1)`.

    Raises:
        ValueError: for another task.
    """
    years = _years(model)
    right = torch.zeros((len(task), model.d_vocab), dtype=torch.bool)
    wrong = torch.zeros_like(right)
    for index, prompt in enumerate(task.prompts):
        found = _START_YEAR.search(prompt)
        if found is None:
            raise ValueError(
                f"year_sets reads greater-than prompts, and {prompt!r} is none: its task is {task.name!r}."
            )
        year = int(found[2])
        step = year if years.digits == 2 else year // 10
        for value, token in years.ids.items():
            right[index, token] = value > step
            # A year equal to the start is not later; an equal tens digit has not decided yet.
            wrong[index, token] = value <= step if years.digits == 2 else value < step
    return YearSets(right.to(model.device), wrong.to(model.device))


def _steps(year: int, digits: int) -> list[str]:
    text = f"{year:02d}"
    return [text] if digits == 2 else list(text)


def _years(model: Model) -> _Years:
    """How this tokenizer writes the years, found by asking it."""
    best = _Years(2, {}, [])
    for digits, values, usable in ((2, range(100), range(2, 99)), (1, range(10), range(10, 90))):
        ids: dict[int, int] = {}
        splits: set[tuple[int, int]] = set()
        for century in _CENTURIES:
            head = bare_ids(model, f"the year {century}")
            for year in range(100):
                whole = bare_ids(model, f"the year {century}{year:02d}")
                tail = whole[len(head) :]
                if whole[: len(head)] == head and len(tail) == 3 - digits and model.tokenizer.unk_token_id not in tail:
                    splits.add((century, year))
                    ids.setdefault(int(_steps(year, digits)[0]), tail[0])
        starts = [(c, y) for c, y in sorted(splits) if y in usable and (c, 1) in splits]
        if set(ids) >= set(values) and len(starts) > len(best.starts):
            best = _Years(digits, ids, starts)
    if not best.starts:
        pieces = model.to_str_tokens(bare_ids(model, "the year 1732"))
        raise ValueError(
            f"greater_than: {model.name}'s tokenizer writes 'the year 1732' as {pieces}; the task needs the century "
            "and then YY as one token or as two digits. Use another task with this model."
        )
    return best
