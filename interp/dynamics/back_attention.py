"""Can one layer do the work of two? Back attention trained inside a small transformer, or on a frozen model."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interp.core.result import Result
from interp.dynamics._kept import kept_place
from interp.dynamics.train import IGNORED, Batch, build, train
from interp.models.back_attention import Attached, BackAttention, frozen
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import program
from interp.tasks.task import Task

#: Prompts in one forward pass of `Upper`.
_AT_ONCE = 16


class Small(nn.Module):
    """A small transformer with back attention, all of it trainable: what `train` takes as its start.

    Gradients go through both passes. `base` can be loaded with `interp.load`, and `Attached(model, small.back)` is then
    the same computation with hooks.

    Args:
        configuration: of `config`.
        source: the lower layer, whose input is changed.
        target: the higher layer, whose output is read.
        d_inner: see `BackAttention`.
        n_heads: see `BackAttention`.
        seed: of all weights; `base` is `build(configuration, seed=seed)`.

    Raises:
        ValueError: layers out of range or reversed, or what `BackAttention` refuses.

    Cost: two forward passes.

    Example:
        >>> from interp.dynamics.train import config
        >>> small = Small(config("llama", d_vocab=30, n_ctx=8, n_layers=1, d_model=16), d_inner=8, n_heads=2)
        >>> small(torch.zeros(2, 3, dtype=torch.long)).shape
        torch.Size([2, 3, 30])
    """

    def __init__(
        self,
        configuration: Any,
        *,
        source: int = 0,
        target: int = 0,
        d_inner: int | None = None,
        n_heads: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = configuration
        self.base: Any = build(configuration, seed=seed)
        width = configuration.hidden_size  # GPT-2's config answers to this name too
        self.back = BackAttention(width, source=source, target=target, d_inner=d_inner, n_heads=n_heads, seed=seed)
        if target >= len(self._steps()) - 1:
            raise ValueError(f"target={target}, but the transformer has layers 0 to {len(self._steps()) - 2}.")

    def _steps(self) -> list[nn.Module]:
        """The layers, and the final norm, whose input is the stream after the last of them."""
        if hasattr(self.base, "transformer"):  # GPT-2
            return [*self.base.transformer.h, self.base.transformer.ln_f]
        return [*self.base.model.layers, self.base.model.norm]

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Tensor:
        """Logits `[batch pos d_vocab]`."""
        steps = self._steps()
        streams: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def store(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                streams[name] = inputs[0]

            return store

        below, above = steps[self.back.source], steps[self.back.target + 1]
        hooks = [below.register_forward_pre_hook(keep("low")), above.register_forward_pre_hook(keep("high"))]
        try:
            self.base.base_model(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        written = self.back(streams["low"], streams["high"])
        hooks = [below.register_forward_pre_hook(lambda module, inputs: (inputs[0] + written, *inputs[1:]))]
        try:
            return self.base(tokens).logits
        finally:
            hooks[0].remove()


class Upper(nn.Module):
    """`Attached`, for prompts that are known: what back attention does not change is computed once a prompt.

    These are the streams before layer `source` and, of the plain pass, after layer `target`. What is left for each call
    are the layers from `source` on, and the unembedding at the last tokens.

    Args:
        model: a decoder with a `program`.
        back: what `Attached` takes.
        tasks: all prompts that will come, as `examples` gives them.

    Raises:
        ValueError: what `Attached` refuses.
        NoProgramError: a model that has none.

    Cost: the streams, 8 bytes x d_model for each token, are kept.
    """

    def __init__(self, model: Model, back: BackAttention, *tasks: Task) -> None:
        super().__init__()
        self.config = Attached(model, back).config
        self.model, self.back, self.steps = model, back, program(model)
        #: Where each prompt ends, several places for one whose padding looks like another.
        self.ends: dict[bytes, set[int]] = defaultdict(set)
        # Always the same prompts at once: their number decides the last bits, and a run that goes on would differ.
        self.parts: dict[bytes, Tensor] = {}
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}
        for task in tasks:
            for part in zip(*(each.split(_AT_ONCE) for each in examples(task)), strict=True):
                for row, targets in zip(*part, strict=True):
                    self.ends[_key(row)].add(int((targets != IGNORED).nonzero()))
                    self.parts.setdefault(_key(row), part[0])

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Tensor:
        """Logits `[batch pos d_vocab]` at the last token of each prompt; zeros elsewhere, where nothing is asked."""
        keys = [_key(row) for row in tokens.cpu()]
        for key in keys:
            if key not in self.known:
                self._learn(self.parts[key])
        last = [(i, end) for i, key in enumerate(keys) for end in sorted(self.ends[key])]
        length = 1 + max(end for _, end in last)  # nothing that counts sees what comes after
        low, high = (torch.stack([self.known[key][which][:length] for key in keys]) for which in (0, 1))
        frame = self.steps.frame(tokens[:, :length])
        with frozen(self.model.bridge):
            stream = low + self.back(low, high)
            for layer in range(self.back.source, self.model.n_layers):
                stream = self.steps.layer(layer, stream, frame)["resid_post"]
            rows, places = (torch.tensor(each, device=tokens.device) for each in zip(*last, strict=True))
            asked = self.steps.logits(stream[rows, places])
        return asked.new_zeros(*tokens.shape, asked.shape[-1]).index_put((rows, places), asked)

    def _learn(self, tokens: Tensor) -> None:
        """Both streams of some prompts."""
        below, above = f"blocks.{self.back.source}.hook_resid_pre", f"blocks.{self.back.target}.hook_resid_post"
        given = tokens.to(self.model.device)
        cache = run(self.model, given, capture=[below, above], stop_after=self.back.target).cache
        for row, low, high in zip(tokens, cache[below], cache[above], strict=True):
            self.known.setdefault(_key(row), (low, high))


def _key(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def train_back_attention(
    model: Model,
    task: Task,
    *,
    source: int,
    target: int,
    held_out: Task,
    d_inner: int = 16,
    n_heads: int = 1,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[BackAttention, Result]:
    """Back attention for a loaded model, which stays as it is, trained to give a task's answers (arXiv:2502.10835).

    It is trained at the first call and read from the cache afterwards.

    The loss is the cross-entropy of the answer after the last token. `held_out` measures it; its prompts should not be
    in `task`, nor, for a claim on composition, the facts. A random `task.split` shares both hops with the other part;
    `train, test = interp.tasks.two_hop_split(task, by="country", seed=seed)` shares neither, and by="entity" shares
    only the second. `interp.dynamics.two_hop` trains so for several seeds, beside controls.

    Args:
        model: a decoder.
        task: prompts with answers; any length, padded on the left.
        source: the lower layer, whose input is changed.
        target: the higher layer, whose output is read.
        held_out: another such task.
        d_inner: see `BackAttention`.
        n_heads: see `BackAttention`.
        seed: of the module's weights and of the batches.
        folder: for the checkpoint, from which a stopped run goes on, and a finished one is read; see `train`. None for
            one in the cache folder, named by all that decides the module.
        **options: of `train`: steps, learning_rate, batch_size, stop_at, every, weight_decay, warmup.

    Returns:
        (back, history): the module in evaluation mode, and the Result of `train`. Its `meta["n_trained"]` are the
        parameters added.

    Raises:
        ValueError: a task without answers, layers out of range or reversed, or what `train` refuses.

    Cost: a forward pass up to `target` once a prompt; a step is a forward and a backward pass through the layers from
        `source` on. Prompts' streams are kept, 8 bytes x d_model for each token.
    """
    for given in (task, held_out):
        if given.answers is None:
            raise ValueError(f"task {given.name!r} has no answers to train for: give one that has.")
    back = BackAttention(model.d_model, source=source, target=target, d_inner=d_inner, n_heads=n_heads, seed=seed)
    recipe = {
        "back attention": model.provenance, "tasks": [given.fingerprint for given in (task, held_out)], "seed": seed,
        "source": source, "target": target, "d_inner": d_inner, "n_heads": n_heads, "training": options,
        "device": model.device.type,
    }  # fmt: skip
    tokens, targets = examples(task)

    def draw(generator: torch.Generator, n: int) -> Batch:
        rows = torch.randint(len(tokens), (n,), generator=generator)
        return tokens[rows], targets[rows]

    _, history = train(
        Upper(model, back, task, held_out),
        draw,
        held_out=examples(held_out),
        seed=seed,
        device=model.device,
        folder=kept_place(recipe, folder)[1],
        **options,
    )
    return back, history


def examples(task: Task) -> Batch:
    """A task's prompts and answers as `train` takes them.

    Padding moves to the right, where nothing that counts can see it, so that no mask is needed.

    Args:
        task: prompts with answers.

    Returns:
        (tokens, targets), both `[batch pos]` on the CPU; the only target is the answer, after each prompt's last token.

    Example:
        >>> from interp.models import toy
        >>> model = toy.random("llama")
        >>> task = Task.from_pairs(model, "own", ["w2 w3", "w4"], ["w2 w4", "w3"], [" w5", " w6"], [" w7", " w8"])
        >>> tokens, targets = examples(task)
        >>> tokens.tolist(), targets.tolist()
        ([[2, 3], [4, 4]], [[-100, 5], [6, -100]])
    """
    assert task.answers is not None
    clean, answers = task.clean.cpu(), task.answers.cpu()
    width = clean.shape[1]
    lengths = torch.full((len(task), 1), width) if task.mask is None else task.mask.cpu().long().sum(1, keepdim=True)
    place = torch.arange(width)[None]
    tokens = clean.gather(1, (place + width - lengths).clamp(max=width - 1))
    return tokens, torch.where(place == lengths - 1, answers[:, None], IGNORED)
