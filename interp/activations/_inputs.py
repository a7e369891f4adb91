"""What do the methods of this room run on? A Task, or a tensor of tokens or pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.models.model import Model
from interp.tasks.task import Task

#: Characters that end or separate clauses: the delimiters of the paper.
_DELIMITERS = frozenset(".,;:!?\n")


def inputs(model: Model, task: Task | Tensor) -> tuple[Tensor, Tensor]:
    """The tensor to run and its mask.

    Args:
        model: for the device, the context and the kind.
        task: a Task, token ids `[batch pos]`, or pixels `[batch channel height width]`.

    Returns:
        (tensor, mask `[batch pos]`), on the model's device.

    Raises:
        ValueError: no prompts, or prompts longer than the context.
    """
    tensor, mask = (task.clean, task.mask) if isinstance(task, Task) else (task, None)
    if len(tensor) == 0:
        raise ValueError("no prompts were given: pass a task or a tensor with at least one row.")
    tensor = tensor.to(model.device)
    if model.kind == "vision":
        from interp.models.vision import token_names

        n_tokens = len(token_names(model.bridge.module, _size(tensor)))
        return tensor, torch.ones((len(tensor), n_tokens), dtype=torch.long, device=model.device)
    if tensor.ndim != 2:
        raise ValueError(f"tokens have shape {tuple(tensor.shape)}; {model.name} needs token ids [batch pos].")
    if tensor.shape[1] > model.n_ctx:
        raise ValueError(f"the prompts have {tensor.shape[1]} tokens, but {model.name} has a context of {model.n_ctx}.")
    return tensor, torch.ones_like(tensor) if mask is None else mask.to(model.device)


def _size(pixels: Task | Tensor) -> tuple[int, int]:
    if isinstance(pixels, Task) or pixels.ndim != 4:
        raise ValueError("a vision model needs pixels [batch channel height width].")
    return int(pixels.shape[2]), int(pixels.shape[3])


def fingerprint(task: Task | Tensor) -> str:
    """SHA-256 of the prompts.

    Args:
        task: as for `inputs`.

    Returns:
        The digest in hex.
    """
    if isinstance(task, Task):
        return task.fingerprint
    array = task.detach().cpu().contiguous().numpy()
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def provenance(model: Model, task: Task | Tensor, **options: Any) -> dict[str, Any]:
    """What a Result's `meta` says of a run.

    Args:
        model: the model.
        task: the prompts.
        **options: the method's options.

    Returns:
        A JSON-ready dictionary.
    """
    import transformers

    name = task.name if isinstance(task, Task) else "tensor"
    return {
        **model.provenance,
        "task": name,
        "task_fingerprint": fingerprint(task),
        **options,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def token_namer(model: Model, task: Task | Tensor) -> Callable[[int, int], str]:
    """How to name a token: its text, or its place in the picture.

    Args:
        model: the model.
        task: the prompts.

    Returns:
        A function from (prompt, position) to a name.
    """
    if model.kind == "vision":
        from interp.models.vision import token_names

        names = token_names(model.bridge.module, _size(task))
        return lambda prompt, pos: names[pos]
    ids = inputs(model, task)[0].tolist()
    return lambda prompt, pos: model.tokenizer.decode([ids[prompt][pos]]) if model.tokenizer else str(ids[prompt][pos])


def token_kind(token: str, first: bool) -> str:
    """The paper's classes of tokens.

    Args:
        token: its text.
        first: whether it is the first of its prompt.

    Returns:
        "first token", "delimiter" or "other token".
    """
    if first:
        return "first token"
    text = token.strip(" ")
    return "delimiter" if text and set(text) <= _DELIMITERS else "other token"


def first_positions(mask: Tensor) -> np.ndarray:
    """Position of each prompt's first token.

    Args:
        mask: `[batch pos]`, padding on the left.

    Returns:
        `[batch]`.
    """
    return mask.argmax(1).cpu().numpy()


def first_token(mask: Tensor) -> Tensor:
    """Where each prompt's first token is.

    Args:
        mask: `[batch pos]`, padding on the left.

    Returns:
        Boolean `[batch pos]`, true once a row.
    """
    first = torch.zeros_like(mask, dtype=torch.bool)
    first[torch.arange(len(mask), device=mask.device), mask.argmax(1)] = True
    return first
