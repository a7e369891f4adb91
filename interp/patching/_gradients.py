"""How does a metric change with each activation? Passes in which every wanted site is visited, with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from interp.core.readout import Readout
from interp.core.rerun import _CPU_TOKENS as CPU_TOKENS
from interp.core.rerun import ExactPath
from interp.core.rerun import _free_bytes as free_bytes
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.models.program import Frame, NoProgramError, Program, hook_name, program

#: Called with (site, layer, activation) where a pass has computed it; what it returns goes on.
Visit = Callable[[str, int, Tensor], Tensor]


class Prompts(NamedTuple):
    """One batch: token ids `[batch pos]`, their mask or None, and what is read of their run."""

    tokens: Tensor
    mask: Tensor | None
    read: Readout


def steps_of(model: Model, exact_path: ExactPath | None) -> Program | NoProgramError:
    """The model's program, or why there is none (hooks are used then).

    Args:
        model: a decoder.
        exact_path: as in `interp.core.rerun`.

    Returns:
        The Program, or the reason.

    Raises:
        NoProgramError: exact_path="rerun" for a model without a program.
    """
    if exact_path == "hooks":
        return NoProgramError("exact_path='hooks' was asked for.")
    try:
        return program(model)
    except NoProgramError as reason:
        if exact_path == "rerun":
            raise
        warnings.warn(f"{reason} Gradients are taken through its own forward pass, with hooks.", stacklevel=3)
        return reason


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Gradients on, also where a caller has turned them off, but none of weights: a backward pass costs one forward.

    Args:
        model: whose weights are as they were afterwards.

    Yields:
        None.
    """
    trained = [weight for weight in model.bridge.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def room(model: Model, n_pos: int) -> int:
    """How many tokens' graph fits into a quarter of the free memory.

    Args:
        model: a decoder.
        n_pos: tokens a prompt.

    Returns:
        The number of tokens; on a CPU at most as many as make matrix multiplications faster.
    """
    width = 14 * model.d_model + 5 * model.d_mlp + model.n_heads * (6 * model.d_head + 8 * n_pos)
    fits = free_bytes(model.device) // 4 // (width * model.n_layers * model.dtype.itemsize)
    return max(1, min(fits, CPU_TOKENS) if model.device.type == "cpu" else fits)


def forward(
    model: Model,
    steps: Program | NoProgramError,
    prompts: Prompts,
    visit: Visit,
    wanted: set[tuple[str, int]],
    *,
    joined: tuple[int, Tensor] | None = None,
) -> Tensor:
    """The metric of one pass, in which a function sees, and may change, some of the activations.

    Args:
        model: a decoder.
        steps: its program, or NoProgramError for hooks.
        prompts: the batch.
        visit: called for every site that is wanted, in the order of computation.
        wanted: (site, layer).
        joined: (layer, its input `[batch pos d_model]`), to start there; plain hooks start at the embedding anyway.

    Returns:
        `[batch]`, with a graph where gradients are on and something asks for them.
    """
    if isinstance(steps, NoProgramError):
        return _by_hooks(model, prompts, visit, wanted)
    frame = steps.frame(prompts.tokens, prompts.mask)
    first, stream = joined or (0, steps.embed(prompts.tokens, prompts.mask))

    def seen(site: str, layer: int, activation: Tensor) -> Tensor:
        return visit(site, layer, activation) if (site, layer) in wanted else activation

    for layer in range(first, len(steps.layers)):
        stream = _layer(steps, layer, stream, frame, seen)
    return _score(steps, stream, prompts.read)


def _layer(steps: Program, layer: int, stream: Tensor, frame: Frame, seen: Visit) -> Tensor:
    stream = seen("resid_pre", layer, stream)
    normed = steps.layers[layer].ln1(stream)
    q = seen("q", layer, steps.queries(layer, normed))
    k = seen("k", layer, steps.keys(layer, normed))
    v = seen("v", layer, steps.values(layer, normed))
    rotated = steps.rotated_q(layer, q, frame.rotary), steps.rotated_k(layer, k, frame.rotary)
    pattern = seen("pattern", layer, steps.pattern(steps.scores(*rotated, steps.allowed(layer, frame))))
    z = seen("z", layer, steps.mix(pattern, v))
    middle = seen("resid_mid", layer, stream + seen("attn_out", layer, steps.attn_out(layer, z)))
    post = seen("post", layer, steps.post(layer, stream if steps.parallel else middle))
    return seen("resid_post", layer, middle + seen("mlp_out", layer, steps.mlp_out(layer, post)))


def _score(steps: Program, stream: Tensor, read: Readout) -> Tensor:
    """The metric of the last stream, by the logits that it reads and no others."""
    rows = torch.arange(len(stream), device=stream.device)
    last = stream[rows, read.where.to(stream.device)]
    if read.tokens is None:
        return read.score(steps.logits(last), rows)
    return read.score(steps.logits_of(last, read.tokens.to(stream.device)), rows)


def _by_hooks(model: Model, prompts: Prompts, visit: Visit, wanted: set[tuple[str, int]]) -> Tensor:
    hooks: list[tuple[str, HookFn]] = []
    for site, layer in sorted(wanted):
        if site == "resid_mid":
            hooks += _middle(layer, visit)
        else:
            hooks.append((hook_name(site, layer), _hook(site, layer, visit)))
    done = run(model, prompts.tokens, hooks=hooks, mask=prompts.mask, grad=torch.is_grad_enabled())
    return prompts.read.of(done.logits)


def _hook(site: str, layer: int, visit: Visit) -> HookFn:
    return lambda activation, hook: visit(site, layer, activation)


def _middle(layer: int, visit: Visit) -> list[tuple[str, HookFn]]:
    # The bridge's hook_resid_mid is a copy that only the MLP reads. Attention's output leads to all of the stream.
    before = {}

    def note(stream: Tensor, hook: object) -> None:
        before["stream"] = stream

    def add(out: Tensor, hook: object) -> Tensor:
        return visit("resid_mid", layer, before["stream"] + out) - before["stream"]

    return [(hook_name("resid_pre", layer), note), (hook_name("attn_out", layer), add)]
