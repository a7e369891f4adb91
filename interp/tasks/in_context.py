"""Can a model sort a text into a class from one example of each? In-context classification, for arXiv:2305.14160."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from interp.models.model import Model
from interp.tasks._prompts import continuation, last_tokens, require_decoder, rows
from interp.tasks.task import Task

#: What stands before the text and before the label, of each kind of task.
_WORDS = {"sentiment": ("Text", "Sentiment"), "topic": ("Article", "Answer"), "question": ("Text", "Type")}
_PARTS = ("test", "development")
#: What stands before each demonstration but the first, and before the question.
_BREAK = "\n\n"


class _Prompt(NamedTuple):
    """The demonstrations, as (label, text) in the order in which they stand, and the text that is asked about."""

    shots: tuple[tuple[str, str], ...]
    label: str
    text: str


def in_context(
    model: Model,
    kind: str = "sentiment",
    n_prompts: int | None = None,
    *,
    n_shots: int = 1,
    part: str = "test",
    shared: bool = False,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """A demonstration of each class, and a text whose class is asked for.

        Text: The soup was rich, hot and full of flavour.
        Sentiment: positive

        Text: I gave up on this book after thirty pages.
        Sentiment: negative

        Text: The cakes are dry and much too sweet.
        Sentiment:

    `kind` is "sentiment" (positive, negative), "topic" of a sentence of news (World, Sports, Business, Technology) or
    "question", what the answer to a question would be (Person, Location, Number, Description). The classes stand in one
    order in all prompts of a task, drawn by the seed. Demonstrations are always texts of the development half of the
    list; the texts asked about, each once and as many of each class as can be, are from the half named by `part`.

    The templates are those of three a kind with which the default model, SmolLM2-135M-Instruct, was right most often on
    the development half (for "sentiment" and "question" by a few hundredths). With seed 0, its most
    probable option is the answer for 78 of the 80 test texts of "sentiment", 80 of 120 of "topic" and 93 of 120 of
    "question".

    Args:
        model: whose tokenizer is used.
        kind: "sentiment", "topic" or "question".
        n_prompts: number of texts asked about; None for all of the half.
        n_shots: demonstrations a class.
        part: "test" or "development".
        shared: one draw of demonstrations for all prompts, as in the paper, or (False) one for each prompt. With
            "development", shared demonstrations are never asked about.
        seed: of the order of classes, the demonstrations and the texts; the demonstrations that are shared, and the
            order of classes, are the same in both halves.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task. `options` are the labels, in the order of their first demonstrations; `wrong` is the option after the
        answer, round the circle. Positions: "label_0" ... (the label word of each demonstration; that of class i is
        `label_i`, and with more shots i plus multiples of the number of classes), "format_0" ... (every other token of
        the demonstrations that is not of their texts), "query" (the first token after the demonstrations) and "end".

    Raises:
        ValueError: for a model that is not a decoder, an unknown kind or part, labels that are not one token, or more
            prompts or shots than the list has texts.
    """
    require_decoder(model, "in_context")
    for name, value, known in (("kind", kind, tuple(_WORDS)), ("part", part, _PARTS)):
        if value not in known:
            raise ValueError(f"in_context: {name}={value!r} is not known; use one of {', '.join(map(repr, known))}.")
    texts: dict[str, dict[str, list[str]]] = {half: defaultdict(list) for half in _PARTS}
    for row in rows(f"in_context_{kind}"):
        texts[row["part"]][row["label"]].append(row["text"])
    listed = sorted(texts["test"])
    ids = {label: continuation(model, f"{_WORDS[kind][1]}:", f" {label}") for label in listed}
    if split := [label for label in listed if ids[label] is None]:
        raise ValueError(f"in_context: the label {split[0]!r} of {kind} is not one token for {model.name}.")
    draws = np.random.default_rng([seed, len(listed)])
    labels = [listed[i] for i in draws.permutation(len(listed))]
    few = min(len(texts["development"][label]) for label in labels)
    if not 1 <= n_shots < few:
        raise ValueError(
            f"in_context: n_shots={n_shots}; the {kind} list has {few} demonstrations a class: 1 to {few - 1}."
        )
    common = _shots(draws, texts["development"], labels, n_shots)
    taken = set(common) if shared and part == "development" else set()
    asked = _asked(draws, {label: texts[part][label] for label in labels}, taken, n_prompts, kind)
    prompts = []
    for label, text in asked:
        shots = common if shared else _shots(draws, texts["development"], labels, n_shots, other_than=text)
        prompts.append(_Prompt(tuple(shots), label, text))

    written = ["".join(_pieces(prompt, kind)) for prompt in prompts]
    tokens = model.tokenize(written, prepend_bos=prepend_bos)
    lengths, width = tokens.mask.sum(1), tokens.ids.shape[1]
    positions = {
        name: torch.tensor(where, device=model.device) + width - lengths
        for name, where in _positions(model, prompts, kind, prepend_bos).items()
    }
    answers = torch.tensor([ids[prompt.label] for prompt in prompts], device=model.device)
    options = torch.tensor([ids[label] for label in labels], device=model.device)
    wrong = torch.tensor(
        [ids[labels[(labels.index(prompt.label) + 1) % len(labels)]] for prompt in prompts], device=model.device
    )
    total = sum(map(len, texts[part].values()))
    source = f"sentences written for interp; {len(prompts)} of the {total} of the {part} half, {n_shots} shots a class"
    return Task(
        f"in_context_{kind}", tuple(written), tokens.ids, source + (", the same for all prompts" if shared else ""),
        answers=answers, wrong=wrong, options=options.expand(len(prompts), -1).clone(), positions=positions,
        mask=None if bool(tokens.mask.all()) else tokens.mask,
    )  # fmt: skip


def _shots(
    draws: np.random.Generator, texts: dict[str, list[str]], labels: list[str], n_shots: int, other_than: str = ""
) -> list[tuple[str, str]]:
    """Rounds of one demonstration a class, none of them twice."""
    chosen = {}
    for label in labels:
        free = [text for text in texts[label] if text != other_than]
        chosen[label] = [free[i] for i in draws.choice(len(free), size=n_shots, replace=False)]
    return [(label, chosen[label][shot]) for shot in range(n_shots) for label in labels]


def _asked(
    draws: np.random.Generator,
    texts: dict[str, list[str]],
    taken: set[tuple[str, str]],
    n_prompts: int | None,
    kind: str,
) -> list[tuple[str, str]]:
    """(label, text) of each prompt: the classes in turn, in a drawn order of texts."""
    free = {label: [text for text in some if (label, text) not in taken] for label, some in texts.items()}
    order = {label: [some[i] for i in draws.permutation(len(some))] for label, some in free.items()}
    rounds = [
        (label, order[label][i])
        for i in range(max(map(len, order.values())))
        for label in order
        if i < len(order[label])
    ]
    if n_prompts is not None and not 1 <= n_prompts <= len(rounds):
        raise ValueError(f"in_context: n_prompts={n_prompts}, but {len(rounds)} texts of {kind} can be asked about.")
    return rounds[:n_prompts]


def _pieces(prompt: _Prompt, kind: str) -> list[str]:
    """Before each demonstration's text, the text, before its label, the label; and the question: joined, a prompt."""
    text_word, label_word = _WORDS[kind]
    pieces: list[str] = []
    for label, text in prompt.shots:
        pieces += [f"{_BREAK if pieces else ''}{text_word}:", f" {text}", f"\n{label_word}:", f" {label}"]
    return [*pieces, f"{_BREAK}{text_word}: {prompt.text}\n{label_word}:"]


def _positions(model: Model, prompts: list[_Prompt], kind: str, prepend_bos: bool | None) -> dict[str, list[int]]:
    """Positions of label words, formatting, query and end, counted from the start of each unpadded prompt."""
    found: dict[str, list[int]] = defaultdict(list)
    for prompt in prompts:
        ends = last_tokens(model, _pieces(prompt, kind), prepend_bos)
        starts = [0, *(end + 1 for end in ends)]  # a BOS token belongs to the formatting
        counted = 0
        for piece in range(len(ends) - 1):
            what, own = piece % 4, range(starts[piece], ends[piece] + 1)
            if what == 3:
                found[f"label_{piece // 4}"].append(own[0])
            elif what != 1:
                for at in own:
                    found[f"format_{counted}"].append(at)
                    counted += 1
        found["query"].append(starts[len(ends) - 1])
        found["end"].append(ends[-1])
    return found
