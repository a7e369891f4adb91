"""Path patching word by word: two whole forward passes a sender, with every other head held by a hook.

This is the algorithm as the papers have it. It is what `interp.patching._paths` is checked against, and what runs for
models whose layers are not of the common form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.edits import Activations
from interp.core.readout import Readout
from interp.models import check
from interp.models.hooks import HookFn, run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.patching._nodes import Node, Receiver, is_parallel, reaches


def seen_at(model: Model, tokens: Tensor, mask: Tensor | None, where: Tensor) -> Activations:
    """What senders write at one position of each prompt.

    Args:
        model: a decoder.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.
        where: `[batch]`.

    Returns:
        {(site, layer): `[batch ...]`} for z and mlp_out of all layers and resid_pre of layer 0. Cost: one forward pass.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    return {key: seen[rows, where] for key, seen in _seen(model, tokens, mask).items()}


def require_live(model: Model, targets: Sequence[Receiver]) -> None:
    """Refuse hooks on activations that the bridge only shows.

    Args:
        model: a decoder.
        targets: receivers, which are to be overwritten.

    Raises:
        ModelCheckError: names the hook.

    Cost: two forward passes of a few tokens for each kind of receiver.
    """
    for component in sorted({target.component for target in targets} - {"logits"}):
        check.require_live(model, _site(model, Receiver(component, 0)))


def _seen(model: Model, tokens: Tensor, mask: Tensor | None) -> Activations:
    keys = [("z", layer) for layer in range(model.n_layers)] + [("resid_pre", 0)]
    keys += [("mlp_out", layer) for layer in range(model.n_layers) if model.d_mlp]
    names = {key: hook_name(*key) for key in keys}
    cache = run(model, tokens, capture=list(names.values()), mask=mask).cache
    return {key: cache[name] for key, name in names.items()}


def patched(
    model: Model,
    tokens: Tensor,
    mask: Tensor | None,
    where: Tensor,
    source: Activations,
    groups: Sequence[Sequence[Node]],
    targets: Sequence[Receiver],
    read: Readout,
    *,
    freeze_mlps: bool,
) -> Tensor:
    """As `interp.patching._paths.patched`.

    Args:
        model: a decoder.
        tokens: prompts of the run that is changed, `[batch pos]`.
        mask: `[batch pos]`, or None.
        where: position of senders and receivers, `[batch]`.
        source: the senders' other values at that position, as from `seen_at`.
        groups: senders, each set changed together.
        targets: receivers, overwritten together.
        read: the metric.
        freeze_mlps: whether MLPs stay as they are.

    Returns:
        `[group batch]`. Cost: one forward pass, and two a group.
    """
    clean = _seen(model, tokens, mask)
    rows = torch.arange(len(tokens), device=tokens.device)
    parallel = is_parallel(model)

    def metric(group: Sequence[Node]) -> Tensor:
        reached = [r for r in targets if any(reaches(node, r, parallel=parallel) for node in group)]
        # First run: the senders changed, all else held; note what the receivers read. Of an MLP that is its output,
        # noted before the hook that holds it.
        names = {receiver: _site(model, receiver) for receiver in reached}
        noted: dict[str, Tensor] = {}
        hooks = [(name, _note(name, noted)) for name in dict.fromkeys(names.values())]
        run(model, tokens, hooks=hooks + _held(model, clean, source, group, where, freeze_mlps), mask=mask)
        # Second run: nothing held, the receivers overwritten.
        hooks = []
        for receiver, name in names.items():
            place = (rows, where) if receiver.head is None else (rows, where, receiver.head)
            hooks.append((name, _put(place, noted[name][place])))
        return read.of(run(model, tokens, hooks=hooks, mask=mask).logits).float()

    return torch.stack([metric(group) for group in tqdm(groups, leave=False, disable=len(groups) < 20)])


def _held(
    model: Model, clean: Activations, source: Activations, group: Sequence[Node], where: Tensor, freeze_mlps: bool
) -> list[tuple[str, HookFn]]:
    """Hooks that hold every head (and MLP) at its unchanged value, and give the senders their other one."""
    rows = torch.arange(len(where), device=where.device)
    hooks = []
    for layer in range(model.n_layers):
        z = clean["z", layer].clone()
        for node in group:
            if (node.component, node.layer) == ("z", layer):
                z[rows, where, node.head] = source["z", layer][:, node.head]
        hooks.append((hook_name("z", layer), _replace(z)))
        if model.d_mlp and freeze_mlps:
            hooks.append((hook_name("mlp_out", layer), _replace(clean["mlp_out", layer])))
        if Node("mlp_out", layer) in group:
            hooks.append((hook_name("mlp_out", layer), _put((rows, where), source["mlp_out", layer])))
    if Node("embed") in group:
        hooks.append((hook_name("resid_pre", 0), _put((rows, where), source["resid_pre", 0])))
    return hooks


def _site(model: Model, receiver: Receiver) -> str:
    if receiver.layer is None:
        return hook_name("resid_post", model.n_layers - 1)
    return hook_name("mlp_out" if receiver.component == "mlp" else receiver.component, receiver.layer)


def _note(name: str, noted: dict[str, Tensor]) -> HookFn:
    def hook_fn(activation: Tensor, hook: object) -> None:
        noted[name] = activation

    return hook_fn


def _replace(value: Tensor) -> HookFn:
    def hook_fn(activation: Tensor, hook: object) -> Tensor:
        return value

    return hook_fn


def _put(place: tuple[Tensor | int, ...], value: Tensor) -> HookFn:
    def hook_fn(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        changed[place] = value
        return changed

    return hook_fn
