"""A model whose logits are a plain sum of what three heads write, and its prompts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from interp.models import Model
from interp.models._planted_build import BOS, END, WORDS, blank, finish, head

_N_WORDS = 10


class Linear(NamedTuple):
    """The model, what heads 0, 1 and 2 add to the logits of words when they read a word, and the first word's id."""

    model: Model
    writes: tuple[Tensor, Tensor, Tensor]
    words: int = WORDS

    def prompts(self, n: int, *, same: float = 0.8, seed: int = 0, thirds: bool = False) -> Tensor:
        """`[n 5]`, "<bos> a b c <end>": b is a with the probability `same`; or each word is of a third of its own."""
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.randint(_N_WORDS, (3, n), generator=generator)
        b = torch.where(torch.rand(n, generator=generator) < same, a, b)
        if thirds:
            a, b, c = a % 3, 3 + b % 3, 6 + c % 3
        fixed = torch.ones(n, dtype=torch.long)
        return torch.stack([BOS * fixed, WORDS + a, WORDS + b, WORDS + c, END * fixed], 1)


@pytest.fixture(scope="session")
def linear() -> Linear:
    """Heads 0, 1 and 2 read the words at positions 1, 2 and 3 of "<bos> a b c <end>", from the end.

    Head 0 adds 6 to the logit of its word, head 1 takes 2 off that of its own, head 2 adds noise; all of them move the
    other words' logits a little, so that no two are equal. No norm has an effect: the logits are the exact sum.
    """
    build = blank(1, 3, n_words=_N_WORDS, out=_N_WORDS)
    generator = torch.Generator().manual_seed(0)
    writes = []
    for number, own in enumerate((6.0, -2.0, 0.0)):
        noise = torch.randn(_N_WORDS, _N_WORDS, generator=generator)
        writes.append(own * torch.eye(_N_WORDS) + (0.1 if own else 1.0) * noise)
        place = build["pos"][1 + number : 2 + number]
        head(
            build, (0, number), asks=build.end, want=build.end, offer=place, value=build.words,
            write=writes[-1] @ build["out"],
        )  # fmt: skip
    first, second, third = writes
    return Linear(finish(build, out=build["out"], scale=1.0), (first, second, third))
