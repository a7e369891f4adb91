"""Does a model confuse the classes whose label words have near keys? The error diagnosis of Label Words are Anchors.

*Label Words are Anchors* (arXiv 2305.14160): the end reads the label words by their keys. Two label words whose keys
are alike in the directions in which the queries of the end differ draw the same attention whatever is asked.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.batching import batches
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.result import Result
from interp.flow._labels import at_once, classes, label_positions, require_options
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._gradients import Prompts, forward
from interp.patching._inputs import numbers, provenance
from interp.tasks.task import Task


@method(name="Label words: error diagnosis", paper="arXiv:2305.14160", notebook="label_anchors")
def confusion(model: Model, task: Task, *, n_components: int = 10, batch_size: int | None = None) -> Result:
    """How far apart the keys of two label words are, and how often the model takes one class for the other.

    For each head, the queries of the end are centred over the prompts, and U holds their first principal directions.
    With k_i the key of the label word of class i, mean over prompts, the distance of two classes in a layer is

        d_ij^2 = sum over heads of | U^T (k_i - k_j) |^2,    value = d_ij / largest d of the layer

    so that a small value foretells confusion. Queries and keys are those before any rotation by position.

    Args:
        model: a decoder.
        task: see `interp.flow.anchors`; with answers and options, the same options in every prompt.
        n_components: directions of each head; fewer than prompts.
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a layer and pair of classes: `layer src dst value value_confused`, src and dst the words;
        `value_confused` is the share of the prompts of the two classes in which the other one of the two has the larger
        logit, the same in all layers, NaN without such prompts; unit "share of the largest distance".

    Raises:
        ValueError: no answers or options; label words as for `anchors.aucroc`; fewer than two classes; too many
            components; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: one forward pass, and a decomposition of prompt x d_head for each head.

    Differs from the paper: its projection was not at hand in detail. How many directions, that heads are put together
    by the sum of squares, keys before rotation, and the measure of confusion are ours.

    Example:
        >>> from interp.models import toy
        >>> model, tokens = toy.random("llama"), toy.random_tokens(toy.random("llama"), 8, 9)
        >>> tokens[:, 3], tokens[:, 6] = 10, 20
        >>> places = {name: torch.full((8,), at) for name, at in (("label_0", 3), ("label_1", 6), ("end", 8))}
        >>> options = torch.tensor([[10, 20]] * 8)
        >>> task = Task("drawn", tuple("abcdefgh"), tokens, "drawn", answers=options[:, 0], options=options,
        ...             positions=places)
        >>> confusion(model, task, n_components=2).table["value"].tolist()  # one pair is the farthest
        [1.0, 1.0, 1.0]
    """
    labels = label_positions(model, task)
    answers, options = require_options(task, answers=True)
    of_class, steps = classes(task, labels).cpu().numpy(), program(model)
    n_options, most = options.shape[1], min(len(task) - 1, steps.d_head)
    if n_options < 2 or len(set(of_class)) < n_options:
        raise ValueError(f"task {task.name!r}: {n_options} options; there must be two, each with a label word.")
    if not 1 <= n_components <= most:
        raise ValueError(
            f"n_components={n_components}: {len(task)} prompts and heads of {steps.d_head} dimensions have 1 to {most}."
        )
    size = batch_size or at_once(model, task.clean.shape[1])
    parts = [_seen(model, steps, task[cut], labels[cut]) for cut in batches(len(task), size)]
    logits = np.concatenate([part[0] for part in parts])
    queries, keys = (np.concatenate([part[i] for part in parts], 1) for i in (1, 2))  # [layer prompt ...]
    keys = np.stack([keys[:, :, of_class == i].mean((1, 2)) for i in range(n_options)], 1)  # [layer option head d_head]
    centred = np.moveaxis(queries - queries.mean(1, keepdims=True), 1, 2)  # [layer head prompt d_head]
    directions = np.linalg.svd(centred, full_matrices=False)[2][:, :, :n_components]
    projected = np.einsum("lhcd,lohd->lohc", directions, keys)
    right = options.cpu().numpy() == answers.cpu().numpy()[:, None]
    words = [word.strip() for word in model.to_str_tokens(options[0])] if model.tokenizer else options[0].tolist()
    pairs = list(combinations(range(n_options), 2))
    apart = np.stack([np.sqrt(((projected[:, i] - projected[:, j]) ** 2).sum((1, 2))) for i, j in pairs], 1)
    apart = apart / apart.max(1, keepdims=True)
    wrong = [_confused(logits[:, [i, j]], right[:, [i, j]]) for i, j in pairs]
    rows = [
        (layer, str(words[i]), str(words[j]), float(apart[layer, pair]), wrong[pair])
        for layer in range(model.n_layers)
        for pair, (i, j) in enumerate(pairs)
    ]
    table = pd.DataFrame(rows, columns=["layer", "src", "dst", "value", "value_confused"])
    meta = provenance(model, task, n_components=n_components)
    return Result("anchor_errors.confusion", table, "share of the largest distance", meta=meta)


@torch.no_grad()
def _seen(model: Model, steps: Program, part: Task, labels: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the options `[prompt option]`, queries of the end and keys of the label words as every head reads them.

    `[layer prompt head d_head]` and `[layer prompt label head d_head]`.
    """
    rows, end = torch.arange(len(part), device=labels.device), part.positions["end"]
    queries, keys = [], []

    def visit(site: str, layer: int, activation: Tensor) -> Tensor:
        if site == "q":
            queries.append(numbers(steps.rotated_q(layer, activation[rows, end], None)))
        else:
            shared = steps.rotated_k(layer, activation[rows[:, None], labels], None)
            keys.append(numbers(shared.repeat_interleave(steps.n_heads // steps.n_key_value_heads, 2)))
        return activation

    read = Readout("logits", "logits", end, None, lambda logits, _: logits)
    wanted = {(site, layer) for site in ("q", "k") for layer in range(model.n_layers)}
    logits = forward(model, steps, Prompts(part.clean, part.mask, read), visit, wanted)
    assert part.options is not None
    return numbers(logits.gather(1, part.options)), np.stack(queries), np.stack(keys)


def _confused(logits: np.ndarray, right: np.ndarray) -> float:
    """Share of the prompts of two classes that have the other one's logit above their own; `[prompt two]` each."""
    asked = right.any(1)
    if not asked.any():
        return float("nan")
    return float((logits[asked][right[asked]] < logits[asked][~right[asked]]).mean())
