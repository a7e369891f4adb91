"""Which label stands before the content asked for? A labelled multiple choice that a transformer trained here can do.

The default model cannot do `interp.tasks.multiple_choice`; this is the same question in the smallest language that has
it, so that one analysis runs on both.
"""

from __future__ import annotations

import os
import string
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.result import Result
from interp.dynamics._kept import trained_once
from interp.dynamics.train import IGNORED, Batch, Trained, build, config, train
from interp.models.model import Model, Weights
from interp.tasks.task import Task

N_OPTIONS = 4
LETTERS = tuple(string.ascii_uppercase)
NUMBERS = tuple(str(number) for number in range(1, 11))
WORDS = tuple(f"w{number}" for number in range(16))
#: How often each form of labels, and each separator, stands in a training prompt.
FORMS = {"letters": 0.4, "ordered_letters": 0.2, "random_letters": 0.3, "numbers": 0.1}
SEPARATORS = {")": 0.7, ".": 0.1, "]": 0.1, "-": 0.1}
VOCABULARY = ("<bos>", "<eos>", "query", "answer", ":", *SEPARATORS, *LETTERS, *NUMBERS, *WORDS)

#: The prompt before the options and after them, by where the question stands; "?" is the content asked for.
_AROUND = {"first": (("<bos>", "query", "?", ":"), ("answer", ":")), "last": (("<bos>",), ("query", "?"))}
_ID = {word: index for index, word in enumerate(VOCABULARY)}
#: One arrangement of contents in so many is never trained on.
_HELD_OUT_IN = 10
_SIZES: dict[str, Any] = {"n_ctx": 32, "n_layers": 3, "n_heads": 4, "d_model": 64, "d_mlp": 128}
#: Positions start at a fifth of the size of words, so that a content is compared as a word, wherever it stands.
_POSITION_SCALE = 0.2
_TRAINING: dict[str, Any] = {"steps": 4000, "learning_rate": 1e-3, "batch_size": 64, "stop_at": 0.998}


def train_multiple_choice(
    *,
    question: str = "first",
    seed: int = 0,
    weights: Weights | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[Model, Result]:
    """A small GPT-2 that can do labelled multiple choice, trained at the first call and read from the cache afterwards.

    Prompts are "<bos> query w7 : A ) w4 B ) w7 C ) w9 D ) w0 answer :", whose answer is "B"; only that is learned. What
    the model saw in training decides what it relies on:

    Labels. 40% of the prompts have A B C D, for which a fixed letter a place would do; 30% have four letters at random
    in any order and 20% in the order of the alphabet, for which the label must be looked up; 10% have 1 2 3 4. The
    separator is ")" in 70%, and "." "]" "-" in 10% each. The right option is equally often in each place. Contents are
    four different words of 16; arrangements whose words' numbers sum to a multiple of ten, one in ten, are held out.

    Question. Where it comes "first", what stands at labels and contents can already depend on it; where it comes
    "last" ("<bos> A ) w4 B ) w7 C ) w9 D ) w0 query w7"), it cannot, and the end has to look for the content.

    Args:
        question: "first" or "last".
        seed: of the weights and the prompts.
        weights: "processed", "raw" or None, see `interp.load`.
        device: where to put the model. It is trained on the CPU wherever it goes, so that a seed is one model.
        dtype: type of the loaded weights; they are trained in float32.
        folder: where to keep the model; None for one in the cache folder, named by the recipe.

    Returns:
        (model, history): the Model, named "multiple-choice-question-first" or "-last", and the Result of `train`; its
        held-out prompts are 1,024 of the training mixture, of arrangements never trained on.

    Raises:
        ValueError: an unknown `question`; the folder holds a model of another recipe, or one that cannot be read.
        OSError: the folder cannot be written.

    Cost: about a minute of CPU at the first call; 1 MB on disk.
    """
    _require(question=(question, _AROUND))
    recipe = {
        "question": question, "seed": seed, "forms": FORMS, "separators": SEPARATORS, "vocabulary": VOCABULARY,
        "options": N_OPTIONS, "held_out_in": _HELD_OUT_IN, "sizes": _SIZES, "position_scale": _POSITION_SCALE,
        "training": _TRAINING,
    }  # fmt: skip

    def train_in(root: Path) -> Trained:
        start: Any = build(config("gpt2", d_vocab=len(VOCABULARY), **_SIZES), seed=seed)
        with torch.no_grad():
            start.transformer.wpe.weight.mul_(_POSITION_SCALE)
        draw = partial(batch, question=question)
        return train(start, draw, held_out=_held_out(seed, question), seed=seed, folder=root, **_TRAINING)

    return trained_once(
        f"multiple-choice-question-{question}", recipe, train_in, tokenizer,
        weights=weights, device=device, dtype=dtype, folder=folder,
    )  # fmt: skip


def tokenizer() -> Any:
    """A tokenizer of whole words, those of `VOCABULARY`, separated by spaces.

    Returns:
        A Hugging Face fast tokenizer; it adds no special tokens of its own accord.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(dict(_ID), unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<eos>"
    )


def batch(generator: torch.Generator, n: int, *, question: str = "first") -> Batch:
    """Training prompts of `train_multiple_choice`, for `train`.

    Args:
        generator: on the CPU.
        n: number of prompts.
        question: "first" or "last".

    Returns:
        (tokens, targets), both `[n pos]`, 18 tokens or 15; the only target is the answer, after the last token.

    Example:
        >>> tokens, targets = batch(torch.Generator().manual_seed(0), 2)
        >>> tokenizer().decode(tokens[0]), tokenizer().decode(targets[0, -1:])
        ('<bos> query w1 : A ) w7 B ) w1 C ) w5 D ) w9 answer :', 'B')
    """
    return _draw(generator, n, question, held_out=False)


def multiple_choice_task(
    model: Model, n_prompts: int = 64, *, labels: str = "letters", separator: str = ")", seed: int = 0
) -> Task:
    """Prompts for a model of `train_multiple_choice`, of arrangements that it was never trained on.

    The question stands where it stood in the model's training, which its name says ("first" for any other name). The
    right option goes round the four places. The corrupted prompt lets the right content trade places with one other
    option (which also goes round): the same tokens, with another label to give.

    Args:
        model: of `train_multiple_choice`, or any with its vocabulary.
        n_prompts: number of prompts.
        labels: "letters" A B C D; "random_letters" any four capitals in any order; "ordered_letters" any four in the
            order of the alphabet; "numbers" 1 2 3 4.
        separator: the mark between a label and its content, one of `SEPARATORS`.
        seed: seed of the draw.

    Returns:
        The Task, with the names of `interp.tasks.multiple_choice`. `answers` are the labels of the right options,
        `wrong` those that are right in the corrupted prompts, `options` the four labels in their order.
        Positions: "label_0" ..., "content_0" ..., "correct_label", "correct_content", "wrong_label" (where `wrong`
        stands) and "end".

    Raises:
        ValueError: unknown labels or separator, fewer than one prompt, or a model with another vocabulary.
    """
    _require(labels=(labels, FORMS), separator=(separator, SEPARATORS))
    if model.tokenizer is None or model.tokenizer.get_vocab() != _ID:
        raise ValueError(
            f"multiple_choice_task: {model.name} has another vocabulary; use the model of train_multiple_choice(), or "
            "interp.tasks.multiple_choice for a model of natural language."
        )
    if n_prompts < 1:
        raise ValueError(f"multiple_choice_task: n_prompts={n_prompts}; ask for at least one.")
    question = "last" if model.name.endswith("question-last") else "first"
    generator = torch.Generator().manual_seed(seed)
    contents = _contents(generator, n_prompts, held_out=True)
    marks = _marks(generator, n_prompts, labels)
    row = torch.arange(n_prompts)
    right = row % N_OPTIONS
    other = (right + 1 + row // N_OPTIONS % (N_OPTIONS - 1)) % N_OPTIONS
    traded = contents.clone()
    traded[row, right], traded[row, other] = contents[row, other], contents[row, right]
    between = torch.full((n_prompts,), _ID[separator])
    asked = contents[row, right]
    clean, corrupt = (
        _tokens(question, asked, marks, between, listed).to(model.device) for listed in (contents, traded)
    )
    places = len(_AROUND[question][0]) + 3 * torch.arange(N_OPTIONS)
    positions = {f"label_{i}": places[i].expand(n_prompts) for i in range(N_OPTIONS)}
    positions |= {f"content_{i}": places[i].expand(n_prompts) + 2 for i in range(N_OPTIONS)}
    positions |= {"correct_label": places[right], "correct_content": places[right] + 2, "wrong_label": places[other]}
    positions["end"] = torch.full((n_prompts,), clean.shape[1] - 1)
    return Task(
        name="multiple_choice",
        prompts=tuple(" ".join(VOCABULARY[token] for token in prompt) for prompt in clean.tolist()),
        clean=clean,
        corrupt=corrupt,
        answers=marks[row, right].to(model.device),
        wrong=marks[row, other].to(model.device),
        options=marks.to(model.device),
        positions={name: where.to(model.device) for name, where in positions.items()},
        source=f"words of train_multiple_choice, arrangements held out of its training; {labels}, "
        f"separator {separator!r}, question {question}",
    )


def _require(**options: tuple[str, Collection[str]]) -> None:
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known here; use one of {', '.join(map(repr, known))}.")


def _held_out(seed: int, question: str) -> Batch:
    """The prompts that a training is measured on: its mixture, of arrangements that it never sees."""
    return _draw(torch.Generator().manual_seed(seed), 1024, question, held_out=True)


def _draw(generator: torch.Generator, n: int, question: str, *, held_out: bool) -> Batch:
    """Prompts of the training mixture, and their answers as targets."""

    def one_of(shares: dict[str, float]) -> Tensor:
        return torch.multinomial(torch.tensor(list(shares.values())), n, True, generator=generator)

    row = torch.arange(n)
    contents = _contents(generator, n, held_out=held_out)
    marks = torch.stack([_marks(generator, n, form) for form in FORMS])[one_of(FORMS), row]
    between = torch.tensor([_ID[mark] for mark in SEPARATORS])[one_of(SEPARATORS)]
    right = torch.randint(N_OPTIONS, (n,), generator=generator)
    tokens = _tokens(question, contents[row, right], marks, between, contents)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1] = marks[row, right]
    return tokens, targets


def _contents(generator: torch.Generator, n: int, *, held_out: bool) -> Int[Tensor, "n option"]:
    """Ids of different words, of arrangements that are held out or are not."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        drawn = _different(generator, 2 * n, len(WORDS))
        kept.append(drawn[(drawn.sum(-1) % _HELD_OUT_IN == 0) == held_out])
    return _ID[WORDS[0]] + torch.cat(kept)[:n]


def _marks(generator: torch.Generator, n: int, labels: str) -> Int[Tensor, "n option"]:
    """Ids of the labels, in the order in which they stand in the prompt."""
    if labels in ("letters", "numbers"):
        first = LETTERS[0] if labels == "letters" else NUMBERS[0]
        return (_ID[first] + torch.arange(N_OPTIONS)).expand(n, -1)
    drawn = _different(generator, n, len(LETTERS))
    return _ID[LETTERS[0]] + (drawn.sort(-1).values if labels == "ordered_letters" else drawn)


def _different(generator: torch.Generator, n: int, of: int) -> Int[Tensor, "n option"]:
    """In each row, as many different numbers below `of` as there are options."""
    return torch.rand(n, of, generator=generator).topk(N_OPTIONS).indices


def _tokens(
    question: str,
    asked: Int[Tensor, " n"],
    marks: Int[Tensor, "n option"],
    between: Int[Tensor, " n"],
    contents: Int[Tensor, "n option"],
) -> Int[Tensor, "n pos"]:
    """Whole prompts, from the content asked for, the labels, the separator and the contents of the options."""
    before, after = (
        [asked if word == "?" else torch.full_like(asked, _ID[word]) for word in words] for words in _AROUND[question]
    )
    options = torch.stack([marks, between[:, None].expand_as(marks), contents], dim=-1).flatten(1)
    return torch.cat([torch.stack(before, dim=1), options, torch.stack(after, dim=1)], dim=1)
