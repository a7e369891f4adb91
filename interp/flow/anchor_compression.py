"""How much of the demonstrations can be thrown away once they are read? Keys and values of a few positions alone.

Context compression of *Label Words are Anchors* (arXiv 2305.14160): for the tasks that `interp.flow.anchors` describes,
with positions "format_0", "format_1", ... (tokens of the demonstrations that belong to neither text nor label) and
"query" (the first token after the demonstrations) besides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.batching import batches
from interp.core.registry import method
from interp.core.result import Result
from interp.flow._labels import at_once, bounds, elsewhere, label_positions, logits_at_end, loyalty, require_options
from interp.models.model import Model
from interp.models.program import Program, program
from interp.patching._inputs import provenance
from interp.tasks.task import Task

#: The full prompt, and what of its demonstrations is kept; see `compressed`.
TARGETS = ("full", "anchor", "text", "random", "random_top")


class Kept(NamedTuple):
    """What attention reads of some positions, in every layer: keys as it reads them (rotated), and values.

    `keys` and `values` are `[layer batch kept kv_head d_head]`, `positions` `[batch kept]`; -1 is none.
    """

    keys: Float[Tensor, "layer batch kept kv_head d_head"]
    values: Float[Tensor, "layer batch kept kv_head d_head"]
    positions: Int[Tensor, "batch kept"]

    def only(self, positions: Int[Tensor, "batch some"]) -> Kept:
        """Some of them, by their place among those kept."""
        at = positions[None, :, :, None, None].expand(len(self.keys), -1, -1, *self.keys.shape[-2:])
        return Kept(self.keys.gather(2, at), self.values.gather(2, at), self.positions.gather(1, positions))


@torch.no_grad()
def keep(model: Model, task: Task, positions: Int[Tensor, "batch kept"]) -> Kept:
    """Keys and values of some positions of the demonstrations, from a run of the whole prompt.

    Args:
        model: a decoder.
        task: with the position "query".
        positions: of each prompt, before its query; -1 for none, where a prompt keeps fewer.

    Returns:
        What `resume` reads.

    Raises:
        ValueError: no "query"; a position that is not of the demonstrations; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: one forward pass.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> tokens = toy.random_tokens(model, 2, 9)
        >>> places = {"label_0": torch.tensor([3, 3]), "query": torch.tensor([5, 6]), "end": torch.tensor([8, 8])}
        >>> task = Task("drawn", ("a", "b"), tokens, "drawn", positions=places)
        >>> kept = keep(model, task, torch.tensor([[0, 3], [0, 3]]))
        >>> tuple(kept.keys.shape), tuple(resume(model, task, kept).shape)
        ((3, 2, 2, 2, 8), (2, 64))
    """
    query = _query(model, task)
    first = torch.as_tensor(bounds(task)[0], device=query.device)
    outside = (positions >= query[:, None]) | ((positions < first[:, None]) & (positions != -1))
    if bool(outside.any()):
        row = int(outside.any(1).nonzero()[0])
        raise ValueError(
            f"task {task.name!r}, prompt {row}: positions {positions[row].tolist()} are to be kept, but its "
            f"demonstrations are at {int(first[row])} to {int(query[row]) - 1} (-1 is none)."
        )
    return _read(program(model), task)[1].only(positions.clamp(min=0))._replace(positions=positions)


@torch.no_grad()
def resume(model: Model, task: Task, kept: Kept) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the end of a run of the query alone, which sees what is kept of the demonstrations.

    Every token has the position that it has in the whole prompt.

    Args:
        model: a decoder.
        task: the prompts that `kept` is of.
        kept: of `keep`.

    Returns:
        The logits; with all positions of the demonstrations kept, those of the whole prompt.

    Raises:
        ValueError: no "query"; no decoder.

    Cost: a forward pass of the tokens of the longest query.
    """
    query, steps = _query(model, task), program(model)
    start = int(query.min())
    frame, stream = steps.frame(task.clean, task.mask), steps.embed(task.clean, task.mask)[:, start:]
    rotary = None if frame.rotary is None else (frame.rotary[0][:, start:], frame.rotary[1][:, start:])
    at = kept.positions.clamp(min=0)[:, None].expand(-1, stream.shape[1], -1)
    own = torch.arange(start, task.clean.shape[1], device=query.device)
    # In a prompt with a shorter query, its last demonstration's end stands here; nobody sees that but itself.
    inside = (own >= query[:, None])[:, None] | torch.eye(len(own), dtype=torch.bool, device=query.device)
    for layer, modules in enumerate(steps.layers):
        allowed = steps.allowed(layer, frame)[:, start:]
        seen = torch.cat((allowed.gather(2, at) & (kept.positions >= 0)[:, None], allowed[:, :, start:] & inside), 2)
        normed = modules.ln1(stream)
        queries = steps.rotated_q(layer, steps.queries(layer, normed), rotary)
        keys = torch.cat((kept.keys[layer], steps.rotated_k(layer, steps.keys(layer, normed), rotary)), 1)
        values = torch.cat((kept.values[layer], steps.values(layer, normed)), 1)
        z = steps.mix(steps.pattern(steps.scores(queries, keys, seen)), values)
        middle = stream + steps.attn_out(layer, z)
        stream = middle + steps.mlp_out(layer, steps.post(layer, stream if steps.parallel else middle))
    return steps.logits(stream[:, -1])


def anchors_of(model: Model, task: Task) -> Int[Tensor, "batch kept"]:
    """Positions of the label words and of the formatting of the demonstrations, in order.

    Args:
        model: a decoder.
        task: see the module.

    Returns:
        What `keep` takes.

    Raises:
        ValueError: label words as for `anchors.saliency`; no "format_0", or a number left out.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> places = {"label_0": 3, "format_0": 0, "format_1": 2, "query": 4, "end": 8}
        >>> places = {name: torch.tensor([at]) for name, at in places.items()}
        >>> anchors_of(model, Task("drawn", ("a",), toy.random_tokens(model, 1, 9), "drawn", positions=places)).tolist()
        [[0, 2, 3]]
    """
    labels = label_positions(model, task)
    names = [name for i in range(len(task.positions)) if (name := f"format_{i}") in task.positions]
    if not names or names[-1] != f"format_{len(names) - 1}":
        raise ValueError(
            f"task {task.name!r} has positions {', '.join(sorted(task.positions))}; it needs the formatting of the "
            "demonstrations as 'format_0', 'format_1', ... without a gap, as those of interp.tasks.in_context have."
        )
    return torch.cat((labels, torch.stack([task.positions[name] for name in names], 1)), 1).sort(1).values


@method(name="Context compression (Hidden_anchor)", paper="arXiv:2305.14160", notebook="label_anchors")
def compressed(model: Model, task: Task, *, draws: int = 20, seed: int = 0, batch_size: int | None = None) -> Result:
    """Whether the model still says the same when only a few positions of the demonstrations can be read.

        full        the whole prompt
        anchor      keys and values of the label words and the formatting of the demonstrations, in every layer
                    (Hidden_anchor)
        text        those words alone as a shorter prompt (Text_anchor)
        random      as "anchor", with as many random words of the demonstrations' texts in the place of the label words
                    (Hidden_random), mean over the draws
        random_top  that draw whose mean label loyalty is the highest (Hidden_random-top)

    Args:
        model: a decoder.
        task: see the module; with answers and options.
        draws: random sets of words.
        seed: of the draws; prompt i has its own from (seed, i).
        batch_size: prompts at once; None chooses from the free memory.

    Returns:
        Result, one row a prompt and target: `prompt target value value_words value_right`: label loyalty (1 where the
        most probable option is that of the full prompt), word loyalty (the Jaccard index of the five most probable
        tokens) and accuracy (1 where the most probable option is the answer); unit "share". Array "loyalty" `[draw]`.

    Raises:
        ValueError: no answers or options; positions that the module asks for and the task lacks; no draws;
            demonstrations with too few other words; no decoder.
        NoProgramError: an architecture without a layer-by-layer program.

    Cost: one forward pass, one of the query for each draw and two more, and one of the words kept.

    Differs from the paper: which tokens count as formatting ("Review:", "Sentiment:", line breaks), and that the random
    sets keep them too, is our reading.

    Example:
        >>> from interp.models import toy
        >>> model, tokens = toy.random("llama"), toy.random_tokens(toy.random("llama"), 2, 9)
        >>> places = {"label_0": 3, "format_0": 0, "query": 4, "end": 8}
        >>> places = {name: torch.full((2,), at) for name, at in places.items()}
        >>> task = Task("drawn", ("a", "b"), tokens, "drawn", answers=torch.tensor([10, 20]),
        ...             options=torch.tensor([[10, 20]] * 2), positions=places)
        >>> compressed(model, task, draws=2).table["target"].unique().tolist()
        ['full', 'anchor', 'text', 'random', 'random_top']
    """
    anchors, labels = anchors_of(model, task), label_positions(model, task)
    answers, options = require_options(task, answers=True)
    query, steps = _query(model, task), program(model)
    if draws < 1:
        raise ValueError(f"draws={draws}: take at least 1.")
    words = elsewhere(task, anchors, labels.shape[1], query, draws, seed)
    is_label = (anchors[:, :, None] == labels[:, None]).any(-1)
    formatting = anchors[~is_label].view(len(task), -1)
    found: dict[str, list[np.ndarray]] = {"full": [], "anchor": [], "text": [], "draws": []}
    for cut in batches(len(task), batch_size or at_once(model, task.clean.shape[1])):
        part = task[cut]
        with torch.no_grad():
            before, every = _read(steps, part)
        sets = [torch.cat((formatting[cut], drawn), 1) for drawn in words[cut].unbind(1)]
        runs = {
            "full": [before], "anchor": [resume(model, part, every.only(anchors[cut]))],
            "text": [_as_text(model, steps, part, anchors[cut])],
            "draws": [resume(model, part, every.only(one)) for one in sets],
        }  # fmt: skip
        for target, many in runs.items():
            found[target].append(np.stack([_judged(part, before, logits) for logits in many], 1))
    numbers = {target: np.concatenate(parts) for target, parts in found.items()}  # each [prompt draw metric]
    drawn = numbers.pop("draws")
    loyal = drawn[:, :, 0].mean(0)
    numbers |= {"random": drawn.mean(1, keepdims=True), "random_top": drawn[:, [loyal.argmax()]]}
    rows = [(prompt, target, *numbers[target][prompt, 0]) for prompt in range(len(task)) for target in TARGETS]
    table = pd.DataFrame(rows, columns=["prompt", "target", "value", "value_words", "value_right"])
    meta = provenance(model, task, draws=draws, seed=seed)
    return Result("anchor_compression.compressed", table, "share", arrays={"loyalty": (("draw",), loyal)}, meta=meta)


def _read(steps: Program, part: Task) -> tuple[Tensor, Kept]:
    """Logits at the last position, and keys and values of all positions."""
    frame, stream = steps.frame(part.clean, part.mask), steps.embed(part.clean, part.mask)
    keys, values = [], []
    for layer in range(len(steps.layers)):
        seen = steps.layer(layer, stream, frame)
        keys.append(seen["rotated_k"])
        values.append(seen["v"])
        stream = seen["resid_post"]
    every = torch.arange(part.clean.shape[1], device=stream.device).expand(len(part), -1)
    return steps.logits(stream[:, -1]), Kept(torch.stack(keys), torch.stack(values), every)


def _as_text(model: Model, steps: Program, part: Task, positions: Tensor) -> Tensor:
    """Logits at the end of a prompt of the tokens at some positions and the query, padded on the left."""
    index = torch.arange(part.clean.shape[1], device=positions.device)
    kept = (index[None, :, None] == positions[:, None]).any(-1) | (index >= part.positions["query"][:, None])
    width = int(kept.sum(1).max())
    order = kept.long().argsort(dim=1, stable=True)[:, -width:]  # what is kept, in its order, at the right
    mask = kept.gather(1, order).long()
    end = torch.full((len(part),), width - 1, device=positions.device)
    shorter = replace(part, clean=part.clean.gather(1, order), corrupt=None, mask=mask, positions={"end": end})
    return logits_at_end(model, steps, shorter)


def _judged(part: Task, before: Tensor, after: Tensor) -> np.ndarray:
    """Label loyalty, word loyalty and accuracy `[prompt metric]`."""
    answers, options = require_options(part, answers=True)
    said = options.gather(1, after.gather(1, options).argmax(1, keepdim=True))[:, 0]
    return np.column_stack([np.array(loyalty(part, before, after)), (said == answers).double().cpu().numpy()])


def _query(model: Model, task: Task) -> Tensor:
    """The first token of each query."""
    label_positions(model, task)
    if "query" not in task.positions:
        raise ValueError(
            f"task {task.name!r} has positions {', '.join(sorted(task.positions))}; it needs 'query', the first token "
            "after the demonstrations, as those of interp.tasks.in_context have."
        )
    return task.positions["query"]
