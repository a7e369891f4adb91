"""What is a task? Prompts with their answers, the contrast they make, and named positions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from interp.models.model import Model
from interp.tasks._prompts import continuation

_TENSORS = ("clean", "corrupt", "answers", "wrong", "options", "mask")


@dataclass(frozen=True, eq=False)
class Task:
    """A set of prompts of one kind for one model's tokenizer.

    Attributes:
        name: "ioi", "greater_than", ...
        prompts: the clean prompts as text.
        clean: their token ids `[batch pos]`.
        source: where the data are from, and how many were kept of how many.
        corrupt: token ids of the corrupted prompts `[batch pos]`, or None.
        answers: id of each right answer `[batch]`, or None for plain text.
        wrong: id of each wrong answer `[batch]`, or None.
        positions: named positions {"subject": `[batch]`, "end": `[batch]`}.
        mask: 1 on tokens, 0 on left padding `[batch pos]`, or None when all prompts are equally long.
        options: ids of the candidate answers of each prompt `[batch option]`, the right and the wrong one among them
            (the labels of multiple choice, in the order in which they stand in the prompt), or None.
    """

    name: str
    prompts: tuple[str, ...]
    clean: Tensor
    source: str
    corrupt: Tensor | None = None
    answers: Tensor | None = None
    wrong: Tensor | None = None
    positions: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    options: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) == 0:
            raise ValueError(f"task {self.name!r} has no prompts. Its source: {self.source}.")
        for label in _TENSORS:
            tensor = getattr(self, label)
            if tensor is not None and len(tensor) != len(self.prompts):
                raise ValueError(f"task {self.name!r}: {label} has {len(tensor)} rows for {len(self.prompts)} prompts.")
            if tensor is not None and label in ("corrupt", "mask") and tensor.shape != self.clean.shape:
                raise ValueError(
                    f"task {self.name!r}: {label} is {tuple(tensor.shape)} and clean {tuple(self.clean.shape)}; both "
                    "are [batch pos] of one shape."
                )
        if self.options is not None:
            self._check_options(self.options)
        for label, where in self.positions.items():
            if tuple(where.shape) != (len(self.prompts),):
                raise ValueError(
                    f"task {self.name!r}: position {label!r} is {tuple(where.shape)}; it needs one position for each "
                    f"of the {len(self.prompts)} prompts."
                )

    def _check_options(self, options: Tensor) -> None:
        if options.ndim != 2:
            raise ValueError(
                f"task {self.name!r}: options is {tuple(options.shape)}; it is [batch option], as many token ids for "
                "each prompt."
            )
        ordered = options.sort(1).values
        refused = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero()
        if len(refused):
            row = int(refused[0])
            raise ValueError(f"task {self.name!r}, prompt {row}: an option comes twice: {options[row].tolist()}.")
        for label in ("answers", "wrong"):
            chosen = getattr(self, label)
            if chosen is not None and len(refused := (options != chosen[:, None]).all(1).nonzero()):
                row = int(refused[0])
                raise ValueError(
                    f"task {self.name!r}, prompt {row}: {label} is token {int(chosen[row])}, which is not among its "
                    f"options {options[row].tolist()}. Give all the candidates, or none."
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"<Task {self.name!r}: {len(self)} prompts of {self.clean.shape[1]} tokens; {self.source}>"

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Task:
        """Some of the prompts, as a Task: `task[:8]` or `task[[0, 3]]`."""
        index = np.arange(len(self))[rows]
        if index.ndim == 0:
            raise TypeError("task[i] would be a single prompt; write task[i:i+1], which is a Task.")
        picked = torch.as_tensor(index, device=self.clean.device)
        changed: dict[str, object] = {
            label: None if (tensor := getattr(self, label)) is None else tensor[picked] for label in _TENSORS
        }
        changed["prompts"] = tuple(self.prompts[i] for i in index)
        changed["positions"] = {name: where[picked] for name, where in self.positions.items()}
        return replace(self, **changed)  # type: ignore[arg-type]

    def split(self, seed: int = 0, *, fraction: float = 0.5) -> tuple[Task, Task]:
        """Two disjoint random parts.

        Args:
            seed: seed of the shuffle.
            fraction: share of the prompts in the first part.

        Returns:
            (first, second); together they hold every prompt once.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        cut = round(fraction * len(self))
        if not 0 < cut < len(self):
            raise ValueError(f"task {self.name!r}: {len(self)} prompts cannot be split at fraction {fraction}.")
        return self[np.sort(order[:cut])], self[np.sort(order[cut:])]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that a method can read."""
        digest = hashlib.sha256(self.name.encode())
        tensors = {k: getattr(self, k) for k in _TENSORS} | dict(self.positions)
        for label in sorted(tensors):
            if tensors[label] is not None:
                tensor = tensors[label].cpu()
                digest.update(f"{label}{tuple(tensor.shape)}".encode() + tensor.long().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pairs(
        cls,
        model: Model,
        name: str,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[str],
        wrong: Sequence[str],
        *,
        options: Sequence[Sequence[str]] | None = None,
        positions: Mapping[str, Sequence[int]] | None = None,
        source: str = "given by the caller",
        prepend_bos: bool | None = None,
    ) -> Task:
        """A task from clean and corrupt prompts, each pair of equal token length.

        Args:
            model: whose tokenizer is used.
            name: name of the task.
            clean: prompts whose answer is `answers`.
            corrupt: prompts for which `answers` is not the answer (but `wrong` is, or none).
            answers: right answers, one token each where they follow the clean prompt (" Paris", with its space).
            wrong: wrong answers, likewise.
            options: all candidates of each prompt, its answer and its wrong answer among them, as many for each prompt.
            positions: named positions, counted from the start of each unpadded prompt; "end" is added.
            source: where the data are from.
            prepend_bos: see `Model.tokenize`.

        Returns:
            The Task; prompts of different lengths are padded on the left, with a mask.

        Raises:
            ValueError: naming the first pair with unequal token lengths, equal prompts, an answer that is not one token
                after its prompt, equal answers, options without the answer, or a position outside the prompt.
        """
        if not len(clean) == len(corrupt) == len(answers) == len(wrong):
            raise ValueError(
                f"task {name!r}: {len(clean)} clean prompts, {len(corrupt)} corrupt, {len(answers)} answers and "
                f"{len(wrong)} wrong answers; there must be as many of each."
            )
        if not clean:
            raise ValueError(f"task {name!r}: no prompts were given.")
        first, second = (model.tokenize(texts, prepend_bos=prepend_bos) for texts in (clean, corrupt))
        for index, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
            n_clean, n_corrupt = int(first.mask[index].sum()), int(second.mask[index].sum())
            if n_clean != n_corrupt:
                raise ValueError(
                    f"task {name!r}, pair {index}: the clean prompt has {n_clean} tokens and the corrupt one "
                    f"{n_corrupt}: {one!r} / {other!r}. Patching needs them aligned: reword one of them."
                )
            if torch.equal(first.ids[index], second.ids[index]):
                raise ValueError(f"task {name!r}, pair {index}: clean and corrupt are the same prompt: {one!r}.")
            if answers[index] == wrong[index]:
                raise ValueError(
                    f"task {name!r}, pair {index}: {answers[index]!r} is both the answer and the wrong answer."
                )
        width = first.ids.shape[1]
        lengths = first.mask.sum(1)
        named = {key: _padded(name, key, where, lengths, width) for key, where in (positions or {}).items()}
        if "end" in named:
            raise ValueError(f"task {name!r}: position 'end' is the last token and is added here: leave it out.")
        named["end"] = torch.full((len(clean),), width - 1, device=lengths.device)
        return cls(
            name=name,
            prompts=tuple(clean),
            clean=first.ids,
            corrupt=second.ids,
            answers=_answer_ids(model, name, clean, answers),
            wrong=_answer_ids(model, name, clean, wrong),
            options=None if options is None else _option_ids(model, name, clean, options),
            positions=named,
            mask=None if bool(first.mask.all()) else first.mask,
            source=source,
        )


def _padded(task: str, key: str, where: Sequence[int], lengths: Tensor, width: int) -> Tensor:
    """Positions in the padded batch, from positions in each prompt."""
    given = torch.as_tensor(list(where), device=lengths.device)
    if given.shape != lengths.shape:
        raise ValueError(f"task {task!r}: position {key!r} has {len(given)} values for {len(lengths)} prompts.")
    outside = (given < 0) | (given >= lengths)
    if bool(outside.any()):
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"task {task!r}, pair {index}: position {key!r} is {int(given[index])}, but the prompt has "
            f"{int(lengths[index])} tokens, counted from 0."
        )
    return given + width - lengths


def _answer_ids(model: Model, task: str, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Id of each answer where it follows its prompt."""
    ids = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        token = continuation(model, prompt, answer)
        if token is None:
            pieces = model.to_str_tokens(model.tokenize(answer, prepend_bos=False).ids[0])
            raise ValueError(
                f"task {task!r}, pair {index}: {answer!r} is not one known token of {model.name} after {prompt!r}; "
                f"alone it is {pieces}. Choose another answer; it starts with a space where the prompt ends with a "
                "word, and the prompt must not end with a space."
            )
        ids.append(token)
    return torch.tensor(ids, device=model.device)


def _option_ids(model: Model, task: str, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> Tensor:
    """Id of each candidate answer, `[batch option]`."""
    counts = sorted({len(row) for row in options})
    if len(options) != len(prompts) or len(counts) != 1 or counts[0] < 2:
        raise ValueError(
            f"task {task!r}: {len(options)} rows of options, of {' or '.join(map(str, counts))} candidates, for "
            f"{len(prompts)} prompts; each prompt needs a row, and all rows as many candidates."
        )
    columns = [_answer_ids(model, task, prompts, column) for column in zip(*options, strict=True)]
    return torch.stack(columns, dim=1)
