"""Which prompts need two steps? Functions one after the other, and sums of three, with combinations held out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from interp.dynamics.train import IGNORED, Batch, Draw


class Synthetic(NamedTuple):
    """Prompts for `train`.

    Attributes:
        batch: draws training prompts, for `train`.
        held_out: every combination that `batch` never draws, for `train(..., held_out=)`.
        d_vocab: number of tokens; 0 and 1 are the beginning and end of text, as in `toy.tokenizer`.
        n_ctx: tokens a prompt.
    """

    batch: Draw
    held_out: Batch
    d_vocab: int
    n_ctx: int


def function_tables(n_symbols: int, n_functions: int, *, seed: int = 0) -> Int[Tensor, "n_functions n_symbols"]:
    """Random functions from symbols to symbols: `table[f, x]` is f(x).

    Each is a permutation, so that a composition has no favourite values, which could be guessed without the first step.

    Args:
        n_symbols: symbols, numbered from 0.
        n_functions: functions.
        seed: of the tables.

    Returns:
        The tables.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_functions, n_symbols, generator=generator).argsort(1)


def function_composition(
    n_symbols: int = 8, n_functions: int = 16, *, held_out: float = 0.1, seed: int = 0
) -> Synthetic:
    """Prompts "x f g =" whose answer is g(f(x)); in training the single fact f(x) is asked for too, after f.

    All single facts are trained on; a share of the triples (x, f, g) is not, and is what is measured, at "=" alone. Who
    answers them has learned to apply one function to the value of another. Token 2 + x is the symbol x, then come the
    functions, and "=".

    Args:
        n_symbols: symbols.
        n_functions: functions, see `function_tables`.
        held_out: share of the triples that are held out.
        seed: of the tables and of the choice of triples.

    Returns:
        The `Synthetic` prompts, 4 tokens each.

    Raises:
        ValueError: fewer than two symbols or functions, or a share that leaves nothing to train on or to hold out.

    Example:
        >>> made = function_composition(n_symbols=5, n_functions=3)
        >>> tokens, targets = made.held_out
        >>> tokens.shape, targets[0, :3].tolist(), made.d_vocab
        (torch.Size([4, 4]), [-100, -100, -100], 11)
    """
    _require(min(n_symbols, n_functions) >= 2, f"n_symbols={n_symbols}, n_functions={n_functions}: at least 2 of each")
    tables = function_tables(n_symbols, n_functions, seed=seed)
    first, equals = 2 + n_symbols, 2 + n_symbols + n_functions
    triples = torch.cartesian_prod(torch.arange(n_symbols), torch.arange(n_functions), torch.arange(n_functions))
    trained, kept = _divided(triples, held_out, seed)

    def prompts(rows: Tensor) -> Batch:
        x, f, g = rows.unbind(1)
        tokens = torch.stack([2 + x, first + f, first + g, torch.full_like(x, equals)], 1)
        return tokens, _last(tokens, 2 + tables[g, tables[f, x]])

    def batch(generator: torch.Generator, n: int) -> Batch:
        rows = trained[torch.randint(len(trained), (n,), generator=generator)]
        tokens, targets = prompts(rows)
        targets[:, 1] = 2 + tables[rows[:, 1], rows[:, 0]]
        return tokens, targets

    return Synthetic(batch, prompts(kept), equals + 1, 4)


def double_sum(modulus: int = 23, *, held_out: float = 0.2, seed: int = 0) -> Synthetic:
    """Prompts "a + b + c =" whose answer is (a + b + c) mod `modulus`.

    Token 2 + a is the number a; then come "+" and "=".

    Args:
        modulus: numbers run from 0 to modulus - 1.
        held_out: share of the triples that are held out.
        seed: of the choice of triples.

    Returns:
        The `Synthetic` prompts, 6 tokens each.

    Raises:
        ValueError: a modulus below 2, or a share that leaves nothing to train on or to hold out.

    Example:
        >>> made = double_sum(5)
        >>> tokens, targets = made.batch(torch.Generator().manual_seed(0), 1)
        >>> a, b, c = (tokens[0, [0, 2, 4]] - 2).tolist()
        >>> targets[0, -1].item() == 2 + (a + b + c) % 5
        True
    """
    _require(modulus >= 2, f"modulus={modulus}: at least 2")
    numbers = torch.arange(modulus)
    trained, kept = _divided(torch.cartesian_prod(numbers, numbers, numbers), held_out, seed)

    def prompts(rows: Tensor) -> Batch:
        a, b, c = (2 + rows).unbind(1)
        plus, equals = torch.full_like(a, 2 + modulus), torch.full_like(a, 3 + modulus)
        tokens = torch.stack([a, plus, b, plus, c, equals], 1)
        return tokens, _last(tokens, 2 + rows.sum(1) % modulus)

    def batch(generator: torch.Generator, n: int) -> Batch:
        return prompts(trained[torch.randint(len(trained), (n,), generator=generator)])

    return Synthetic(batch, prompts(kept), 4 + modulus, 6)


def _divided(triples: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """The triples to train on, and those to hold out; one of each first two numbers is always trained on."""
    n = round(held_out * len(triples))
    # Not the generator of the tables: the choice must not depend on how many numbers they took.
    order = torch.randperm(len(triples), generator=torch.Generator().manual_seed(seed + 1))
    # `triples` is sorted: those with the same beginning are neighbours, and a random one of them stays.
    size = int(triples[:, 2].max()) + 1
    stays = order.view(-1, size).argmin(1) + size * torch.arange(len(triples) // size)
    free = order[~torch.isin(order, stays)]
    _require(0 < n <= len(free), f"held_out={held_out} of {len(triples)} combinations is {n}: 1 to {len(free)}")
    kept = torch.zeros(len(triples), dtype=torch.bool)
    kept[free[:n]] = True
    return triples[~kept], triples[kept]


def _last(tokens: Tensor, answers: Tensor) -> Tensor:
    """Targets: the answer after the last token, and nothing before."""
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1] = answers
    return targets


def _require(right: bool, needed: str) -> None:
    if not right:
        raise ValueError(f"{needed} are needed.")
