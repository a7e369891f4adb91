"""Does the model copy what followed last time? Random tokens, repeated."""

from __future__ import annotations

import numpy as np
import torch

from interp.models.model import Model
from interp.tasks._prompts import affixes, require_decoder
from interp.tasks.task import Task


def induction(
    model: Model, n_prompts: int = 64, length: int = 50, *, seed: int = 0, prepend_bos: bool | None = None
) -> Task:
    """A block of random tokens, and the same block again up to its last token, which is the answer.

    The clean prompt is r[0] ... r[L-1] r[0] ... r[L-2]; the answer is r[L-1], which followed r[L-2] the first time. The
    tokens of one block are all different, so that every token of the second block has one earlier occurrence and one
    continuation: position p of it should attend to p - L + 1.

    The corrupted prompt has another first block, without any token of the clean one: the second block is unchanged,
    but nothing in it has been seen before, and the answer is nowhere in the prompt. The wrong answer is a token of the
    block other than the last two: a model that only favours tokens of the context does not tell it from the right one.

    Special tokens, added tokens and ids without an entry in the tokenizer's vocabulary are not drawn.

    Args:
        model: whose vocabulary is used.
        n_prompts: number of prompts.
        length: L, number of tokens in the block; a prompt has 2 L - 1 of them, and a BOS if there is one.
        seed: seed of the draw.
        prepend_bos: see `Model.tokenize`.

    Returns:
        The Task; positions "source" (the answer's occurrence in the first block, where an induction head looks from
        "end"), "repeat" (start of the second block) and "end". Its `prompts` are the decoded tokens, for reading only:
        random tokens do not survive decoding and tokenizing again.

    Raises:
        ValueError: for a model that is not a decoder, a length below 3 or beyond the context, a vocabulary with fewer
            than two blocks of different tokens, or `n_prompts` below 1.
    """
    require_decoder(model, "induction")
    if n_prompts < 1:
        raise ValueError(f"induction: n_prompts={n_prompts}, but a task needs at least one prompt.")
    start, _ = affixes(model, prepend_bos)
    width = len(start) + 2 * length - 1
    if length < 3 or width > model.n_ctx:
        raise ValueError(
            f"induction: length={length} makes prompts of {width} tokens; the length must be at least 3, and "
            f"{model.name} has a context of {model.n_ctx}: use one from 3 to {(model.n_ctx - len(start) + 1) // 2}."
        )
    tokenizer = model.tokenizer
    excluded = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    vocabulary = np.array(
        [i for i in sorted(tokenizer.get_vocab().values()) if i < model.d_vocab and i not in excluded]
    )
    if len(vocabulary) < 2 * length:
        raise ValueError(
            f"induction: length={length} needs {2 * length} different tokens (two blocks without a common one), but "
            f"{model.name} has {len(vocabulary)} that are not special: use a length of at most {len(vocabulary) // 2}."
        )
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(vocabulary, size=2 * length, replace=False) for _ in range(n_prompts)])
    block, other = drawn[:, :length], drawn[:, length:]
    begin = np.tile(np.array(start, dtype=np.int64), (n_prompts, 1))
    clean, corrupt = (np.concatenate([begin, first, block[:, :-1]], axis=1) for first in (block, other))
    wrong = block[np.arange(n_prompts), rng.integers(length - 2, size=n_prompts)]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values.astype(np.int64), device=model.device)

    places = {"source": len(start) + length - 1, "repeat": len(start) + length, "end": width - 1}
    return Task(
        name="induction",
        prompts=tuple(tokenizer.decode(row) for row in clean.tolist()),
        clean=tensor(clean),
        corrupt=tensor(corrupt),
        answers=tensor(block[:, -1]),
        wrong=tensor(wrong),
        positions={name: tensor(np.full(n_prompts, place)) for name, place in places.items()},
        source=f"random blocks of {length} tokens from {len(vocabulary)} of {model.d_vocab} ids; seed {seed}",
    )
