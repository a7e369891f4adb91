"""What followed last time? A small transformer trained to continue repeated blocks, which it does by induction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from interp.core.result import Result
from interp.dynamics._kept import trained_once
from interp.dynamics.train import IGNORED, Batch, Trained, config, train
from interp.models import toy
from interp.models.model import Model, Weights

#: Lengths of the blocks, the shortest and the longest, and of the prompts they fill.
BLOCKS, LENGTH = (8, 16), 32
_D_VOCAB = 64  # of `toy.tokenizer`, whose first two tokens are special
# Not as wide as the vocabulary: TransformerLens takes a square unembedding for its transpose when it folds norms.
_SIZES: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "d_model": 48, "d_mlp": 96}
_TRAINING: dict[str, Any] = {"steps": 2500, "learning_rate": 3e-3, "stop_at": 0.99}


def train_repeats(
    *,
    seed: int = 0,
    weights: Weights | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[Model, Result]:
    """A two-layer Llama that continues repeated blocks, trained at the first call and read from the cache afterwards.

    Prompts are a <bos> and a block of 8 to 16 different random tokens, again and again up to 32 tokens. Blocks are of
    all lengths, so that no fixed distance would do: the next token must be looked up where the current one stood
    before. The known way is that of induction: a head of layer 0 attends to the token before, and a head of layer 1
    finds, by its keys, the place after the earlier copy. `interp.tasks.induction(model, length=12)` asks for it.

    Args:
        seed: of the weights and the prompts.
        weights: "processed", "raw" or None, see `interp.load`.
        device: where to put the model. It is trained on the CPU wherever it goes, so that a seed is one model.
        dtype: type of the loaded weights; they are trained in float32.
        folder: where to keep the model; None for one in the cache folder, named by the recipe.

    Returns:
        (model, history): the Model, named "repeats", and the Result of `train`; its held-out prompts are drawn by a
        generator that no step used.

    Raises:
        ValueError: the folder holds a model of another recipe.
        OSError: the folder cannot be written.

    Cost: about 20 seconds of CPU at the first call; 1 MB on disk.
    """
    recipe = {
        "task": "repeats", "seed": seed, "blocks": BLOCKS, "length": LENGTH, "sizes": _SIZES, "training": _TRAINING,
    }  # fmt: skip

    def train_in(root: Path) -> Trained:
        return train(
            config("llama", d_vocab=_D_VOCAB, n_ctx=LENGTH, **_SIZES), batch, seed=seed, folder=root, **_TRAINING
        )

    return trained_once(
        "repeats", recipe, train_in, toy.tokenizer, weights=weights, device=device, dtype=dtype, folder=folder
    )


def batch(generator: torch.Generator, n: int) -> Batch:
    """Training prompts of `train_repeats`, for `train`.

    Args:
        generator: on the CPU.
        n: number of prompts.

    Returns:
        (tokens, targets), both `[n 32]`; targets are the next tokens, wherever the current one has stood before.

    Example:
        >>> tokens, targets = batch(torch.Generator().manual_seed(0), 2)
        >>> length = int((targets[0] == IGNORED).sum()) - 2  # all of <bos> and the first block, and the last position
        >>> bool((tokens[0, 1 + length:] == tokens[0, 1:-length]).all())
        True
    """
    length = torch.randint(BLOCKS[0], BLOCKS[1] + 1, (n, 1), generator=generator)
    block = torch.rand(n, _D_VOCAB - 2, generator=generator).argsort(1)[:, : BLOCKS[1]] + 2
    place = torch.arange(LENGTH - 1)[None]
    begin = torch.zeros(n, 1, dtype=torch.long)
    tokens = torch.cat([begin, block.gather(1, place % length)], 1)
    following = torch.cat([tokens[:, 1:], torch.full((n, 1), IGNORED)], 1)
    seen_before = torch.arange(LENGTH)[None] > length
    return tokens, torch.where(seen_before, following, IGNORED)
