"""What is a planted case made of? The noun `Planted`, and the parts that the cases of `planted` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models._planted_build import BOS, END, FILLER, WORDS, Build, Rows, copier, head
from interp.models.model import Model

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with a known mechanism, prompts that show it, and the truth.

    Attributes:
        name: the case.
        model: the model, raw weights.
        clean: token ids `[batch pos]`; every prompt starts with "<bos>" and is as long as the others.
        corrupt: the same prompts with something changed, so that the answer is another one or there is none.
        answers: id of a right answer of each clean prompt `[batch]`; no token has a higher logit.
        wrong: id of a wrong answer `[batch]`.
        positions: named positions `[batch]`; "end" is the last.
        truth: the planted heads (layer, head) by stage; patching the others changes nothing.
        where: by stage, the name of the position at which its heads write what matters.
        mlps: the layers whose MLP takes part; the others write nothing.
        edges: pairs (source, destination). Sources are "input" (the embeddings), heads "a1.h0" and MLPs "m1";
            destinations "a1.h0<q>", "a1.h0<k>", "a1.h0<v>", "m1" and "logits". An edge is in when what its destination
            reads of its source differs between the clean and the corrupt prompt and makes a difference to the
            answer, alone or together with other edges. With all other edges taken from the corrupt prompt, the model
            answers as before.
    """

    name: str
    model: Model
    clean: Int[Tensor, "batch pos"]
    corrupt: Int[Tensor, "batch pos"]
    answers: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    positions: Mapping[str, Int[Tensor, " batch"]]
    truth: Mapping[str, tuple[Head, ...]]
    where: Mapping[str, str]
    mlps: tuple[int, ...]
    edges: frozenset[tuple[str, str]]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The clean prompts as text, which the model's tokenizer turns into `clean` again."""
        return tuple(" ".join(self.model.to_str_tokens(row)) for row in self.clean)

    @property
    def heads(self) -> frozenset[Head]:
        """The planted heads of all stages."""
        return frozenset(at for stage in self.truth.values() for at in stage)

    @property
    def nodes(self) -> frozenset[str]:
        """The names of the planted heads and MLPs, as in `edges`."""
        return frozenset({name_of(at) for at in self.heads} | {f"m{layer}" for layer in self.mlps})

    def __repr__(self) -> str:
        return f"<Planted {self.name!r}: {dict(self.truth)}, MLPs {self.mlps}, {len(self.edges)} edges>"


def read_from_end(
    build: Build,
    at: Head,
    kind: Rows,
    *,
    value: Float[Tensor, "entry d_model"],
    write: Float[Tensor, "entry d_model"],
) -> None:
    """Make a head attend, from the end, to the word that is one of a kind, and copy `value` of it to `write`."""
    end = build.end
    head(build, at, asks=end, want=end, offer=any_of(kind), value=value, write=write)


def distract(build: Build, *heads: Head) -> None:
    """Make heads copy words evenly from everywhere into a subspace that nothing reads."""
    for at in heads:
        copier(build, at, value=build.words[: len(build["junk"])], write=build["junk"])


def any_of(rows: Rows) -> Float[Tensor, "1 d_model"]:
    """One row that reads the sum of what the rows read."""
    return rows.sum(0, keepdim=True)


def prompt(length: int, words: Mapping[int, int]) -> list[int]:
    """Fillers between "<bos>" and the end, with some words at some positions."""
    middle = [WORDS + words[place] if place in words else FILLER for place in range(1, length - 1)]
    return [BOS, *middle, END]


def name_of(at: Head) -> str:
    """The name of a head (layer, head) in `Planted.edges`."""
    return f"a{at[0]}.h{at[1]}"


def make(
    name: str,
    model: Model,
    clean: Sequence[Sequence[int]],
    corrupt: Sequence[Sequence[int]],
    answers: Sequence[int],
    wrong: Sequence[int],
    positions: Mapping[str, Sequence[int]],
    *,
    truth: Mapping[str, Sequence[Head]],
    where: Mapping[str, str],
    edges: Iterable[tuple[str, str]],
    mlps: tuple[int, ...] = (),
) -> Planted:
    """The Planted of plain lists; the position "end" is added."""

    def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=model.device)

    named = {key: tensor(places) for key, places in positions.items()}
    named["end"] = tensor([len(row) - 1 for row in clean])
    return Planted(
        name=name, model=model, clean=tensor(clean), corrupt=tensor(corrupt), answers=tensor(answers),
        wrong=tensor(wrong), positions=named, truth={stage: tuple(heads) for stage, heads in truth.items()},
        where=where, mlps=mlps, edges=frozenset(edges),
    )  # fmt: skip
