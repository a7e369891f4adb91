"""Run a model with hooks that must fire.

TransformerBridge 3.9 accepts a misspelt hook name, or a hook on a point that its forward never
reaches, in silence: the study then reports the unchanged model. Every hook of this library goes
through `run`, which refuses a name that does not exist and a hook that did not fire.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from interp.models.model import Model

#: A hook gets the activation and the HookPoint, and returns a replacement or None.
HookFn = Callable[..., Tensor | None]


class HookNotFiredError(RuntimeError):
    """A hook was set but the forward pass never reached its point."""


@dataclass(frozen=True)
class Run:
    """What `run` returns.

    Attributes:
        cache: the captured activations by hook name.
        output: logits `[batch pos d_vocab]` (the last hidden state of a model without an unembedding); None when the
            pass was stopped early.
    """

    cache: dict[str, Tensor]
    output: Tensor | None

    @property
    def logits(self) -> Tensor:
        """The output of a pass that ran to its end."""
        if self.output is None:
            raise ValueError("this run was stopped early (stop_after), so it has no logits: leave stop_after out.")
        return self.output


class _Stop(Exception):
    """Ends a forward pass at the layer asked for."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names most like a name that is not known.

    Args:
        name: what was asked for.
        known: names there are.
        n: how many to offer.

    Returns:
        At most n names, most alike first.
    """
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.4)


def run(
    model: Model,
    tokens: Tensor,
    *,
    hooks: Sequence[tuple[str, HookFn]] = (),
    capture: Sequence[str] = (),
    mask: Tensor | None = None,
    stop_after: int | None = None,
    grad: bool = False,
) -> Run:
    """Run the model once with hooks, and refuse to return if one of them did nothing.

    Args:
        model: a loaded model.
        tokens: token ids `[batch pos]` (pixels for a vision model).
        hooks: pairs (hook name, function). The function gets `(activation, hook)` and returns the
            new activation, or None to leave it. Several hooks on one name run in the order given.
        capture: hook names whose activations are kept, as they are after all `hooks`.
        mask: 1 on real tokens, 0 on padding, `[batch pos]`.
        stop_after: last layer to run; the rest of the pass is skipped and there are no logits.
        grad: keep the graph for a backward pass (default: no gradients).

    Returns:
        A `Run` with the `logits` and the `cache`.

    Raises:
        ValueError: for a hook name that the model does not have, for no tokens, and for more than its context.
        HookNotFiredError: when a hook or capture was never reached.

    Cost: one forward pass (up to `stop_after`); memory for what is captured only.
    """
    _require_room(model, tokens)
    pending = {name for name, _ in hooks} | set(capture)
    cache: dict[str, Tensor] = {}

    def counted(name: str, function: HookFn) -> HookFn:
        def fire(activation: Tensor, hook: object) -> Tensor | None:
            pending.discard(name)
            return function(activation, hook=hook)

        return fire

    def keep(name: str) -> HookFn:
        def store(activation: Tensor, hook: object) -> Tensor | None:
            cache[name] = activation if grad else activation.detach()
            # The bridge shows some points as a reshaped copy, which has no gradient unless it is what goes on.
            return activation if grad else None

        return store

    def stop(activation: Tensor, hook: object) -> None:
        raise _Stop

    wanted = [(name, counted(name, function)) for name, function in hooks]
    wanted += [(name, counted(name, keep(name))) for name in dict.fromkeys(capture)]
    if stop_after is not None:
        if not -model.n_layers <= stop_after < model.n_layers:
            raise ValueError(f"stop_after={stop_after}, but {model.name} has layers 0 to {model.n_layers - 1}.")
        wanted.append((f"blocks.{stop_after % model.n_layers}.hook_resid_post", stop))
    points = [(model.hook_point(name), function) for name, function in wanted]  # all names checked before any is set

    handles = []
    logits = None
    try:
        for point, function in points:
            point.add_hook(function)
            handles.append((point, point.fwd_hooks[-1]))
        with torch.set_grad_enabled(grad):
            logits = _forward(model, tokens, mask)
    except _Stop:
        pass
    finally:
        # Only our own hooks: the user may have set some too.
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)
    if pending:
        raise HookNotFiredError(
            f"hook {sorted(pending)[0]!r} exists on {model.name} but did not fire in this forward pass"
            + (f" (it stopped after layer {stop_after})" if stop_after is not None else "")
            + ": the architecture does not compute it, or a TransformerLens flag must be set first "
            "(for example model.bridge.set_use_attn_result(True) for hook_result)."
        )
    return Run(cache, logits)


def _require_room(model: Model, tokens: Tensor) -> None:
    if model.kind == "vision":
        return
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}: give [batch pos], with at least one token.")
    if model.n_ctx and tokens.shape[1] > model.n_ctx:  # rotary models would go on, with positions never trained
        raise ValueError(
            f"the prompts have {tokens.shape[1]} tokens, but {model.name} has a context of {model.n_ctx}: "
            f"cut them, tokens[:, :{model.n_ctx}]."
        )


def _forward(model: Model, tokens: Tensor, mask: Tensor | None) -> Tensor:
    if model.kind == "vision":
        return model.bridge(tokens)
    if mask is not None and bool(mask.all()):
        mask = None  # the unpadded path is the faster one, and exactly equal
    if model.d_vocab:
        return model.bridge(tokens, attention_mask=mask)
    return _hidden(model, tokens, mask)


def _hidden(model: Model, tokens: Tensor, mask: Tensor | None) -> Tensor:
    # An encoder without an unembedding: its output is the last block's.
    found: list[Tensor] = []
    point = model.hook_point(f"blocks.{model.n_layers - 1}.hook_resid_post")
    point.add_hook(lambda activation, hook: found.append(activation))
    handle = point.fwd_hooks[-1]
    try:
        model.bridge(tokens, attention_mask=mask)
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)
    return found[0]
