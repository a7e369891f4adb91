"""What is changed in a forward pass? Edits of components, in one notation for the fast path and for plain hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.models.model import Model
from interp.models.program import SITES

#: Sites with a head axis, with the number of heads they have.
_HEADS = {"q": "n_heads", "z": "n_heads", "attn_scores": "n_heads", "pattern": "n_heads",
          "k": "n_key_value_heads", "v": "n_key_value_heads"}  # fmt: skip
#: Sites `[batch head q_pos k_pos]`.
_SQUARE = ("attn_scores", "pattern")

#: {(site, layer): activation, as the hook of that name has it}.
Activations = Mapping[tuple[str, int], Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """Set a component to another value.

    Attributes:
        site: one of `interp.models.program.SITES`.
        layer: counted from 0.
        head: which head (for k and v: which key-value group); None for all, or where the site has none.
        neuron: which neuron of "post"; None for all.
        pos: position, for attention scores and patterns that of the query: one for all prompts, or `[batch]`, each
            prompt's own (negative: none in this prompt); None for all.
        k_pos: position of the key, for attention scores and patterns only.
        value: None for the source run's own value at the same place; a number; or a tensor `[batch *feature]`, or
            `[batch pos *feature]` with a value for each position, where `feature` is what is left of the activation
            after the axes chosen above (`d_head` for one head of z, `k_pos` for one head's pattern, none for one
            neuron).
    """

    site: str
    layer: int
    head: int | None = None
    neuron: int | None = None
    pos: int | Tensor | None = None
    k_pos: int | Tensor | None = None
    value: float | Tensor | None = None


#: Edits that are made together in one changed run.
Cell = Sequence[Edit]


def checked(model: Model, cells: Sequence[Cell], n_pos: int, n_prompts: int, *, sourced: bool) -> None:
    """Refuse edits that the model has no place for.

    Args:
        model: that is edited.
        cells: sets of edits.
        n_pos: tokens a prompt.
        n_prompts: prompts of the batch.
        sourced: whether there is a source run.

    Raises:
        ValueError: naming the edit, what the model has, and what to write.
    """
    for edit in {id(edit): edit for cell in cells for edit in cell}.values():
        what = f"an edit of {edit.site!r}"
        if edit.site not in SITES:
            raise ValueError(f"site {edit.site!r} is not known; use one of {', '.join(SITES)}.")
        if not 0 <= edit.layer < model.n_layers:
            raise ValueError(f"{what} in layer {edit.layer}, but {model.name} has layers 0 to {model.n_layers - 1}.")
        if edit.site == "resid_mid" and getattr(model.bridge.cfg, "parallel_attn_mlp", False):
            raise ValueError(
                f"{model.name} computes attention and MLP in parallel, so it has no 'resid_mid': patch 'attn_out', "
                "'mlp_out' or 'resid_post'."
            )
        if edit.head is not None:
            if edit.site not in _HEADS:
                raise ValueError(f"{what} names head {edit.head}, but {edit.site} has no heads: leave head out.")
            heads = getattr(model, _HEADS[edit.site])
            if not 0 <= edit.head < heads:
                kind = "heads" if _HEADS[edit.site] == "n_heads" else "key-value heads (groups)"
                raise ValueError(f"{what} names head {edit.head}, but {model.name} has {kind} 0 to {heads - 1}.")
        if edit.neuron is not None and (edit.site != "post" or not 0 <= edit.neuron < model.d_mlp):
            raise ValueError(
                f"{what} names neuron {edit.neuron}: neurons are those of site 'post', 0 to {model.d_mlp - 1}."
            )
        if edit.k_pos is not None and edit.site not in _SQUARE:
            raise ValueError(f"{what} names a key position, which only {' and '.join(_SQUARE)} have: leave k_pos out.")
        for label, where in (("pos", edit.pos), ("k_pos", edit.k_pos)):
            if isinstance(where, Tensor) and tuple(where.shape) != (n_prompts,):
                raise ValueError(
                    f"{what} has {label} of shape {tuple(where.shape)}; give one for each of {n_prompts} prompts."
                )
            last = -1 if where is None else int(where.max()) if isinstance(where, Tensor) else where
            if last >= n_pos or (isinstance(where, int) and where < 0):
                raise ValueError(
                    f"{what} is at {label} {last}, but the prompts have {n_pos} tokens, 0 to {n_pos - 1} "
                    "(padding on the left counts)."
                )
        if edit.value is None and not sourced:
            raise ValueError(f"{what} takes its value from a source run, but none was given: give source= or value=.")


def reach(edit: Edit, n_prompts: int, n_pos: int, same: Tensor) -> Tensor:
    """First position that an edit can change, for each prompt; n_pos where it changes nothing.

    Args:
        edit: one edit.
        n_prompts: prompts of the batch.
        n_pos: tokens a prompt.
        same: how many tokens the source run shares with the changed run from the start, `[batch]`: up to there its
            activations are the changed run's own.

    Returns:
        `[batch]`, on the CPU.
    """
    if edit.pos is None:
        first = torch.zeros(n_prompts, dtype=torch.long)
        return torch.maximum(first, same) if edit.value is None else first
    where = edit.pos.cpu() if isinstance(edit.pos, Tensor) else torch.full((n_prompts,), edit.pos)
    none = torch.full_like(where, n_pos)
    where = torch.where(where < 0, none, where)
    return torch.where(where < same, none, where) if edit.value is None else where


def apply(site: str, edits: Sequence[tuple[int, Edit]], state: Tensor, view: Tensor, source: Activations) -> None:
    """Make edits of one site of one layer, in place.

    Args:
        site: of all the edits.
        edits: (row of the state, edit).
        state: `[row batch pos *feature]`; attention scores and patterns as `[row batch head q_pos k_pos]`.
        view: absolute position of each position in the state, `[batch pos]`.
        source: the source run's activations, over all positions.

    Cost: memory for what is written.
    """
    if site in _SQUARE:
        state = state.transpose(2, 3)  # [row batch q_pos head k_pos]: positions third, as everywhere else
    for group in _alike(edits):
        _write(site, group, state, view, source)


def _alike(edits: Sequence[tuple[int, Edit]]) -> list[list[tuple[int, Edit]]]:
    """Edits that one indexed assignment can make."""
    groups: dict[object, list[tuple[int, Edit]]] = {}
    for row, edit in edits:
        given = type(edit.value) if not isinstance(edit.value, Tensor) else edit.value.shape
        key = (edit.head is None, edit.neuron is None, edit.k_pos is None, given)
        groups.setdefault(key, []).append((row, edit))
    return list(groups.values())


def _write(site: str, group: list[tuple[int, Edit]], state: Tensor, view: Tensor, source: Activations) -> None:
    device, n_prompts = state.device, state.shape[1]
    edits = [edit for _, edit in group]
    first = edits[0]
    chosen = _matches([edit.pos for edit in edits], view)  # [edit batch pos]
    which, prompt, index = chosen.nonzero(as_tuple=True)
    rows = torch.tensor([row for row, _ in group], device=device)[which]
    absolute = view[prompt, index]
    target: list[Tensor] = [rows, prompt, index]
    place: list[Tensor] = [prompt, absolute]
    if first.head is not None:
        heads = torch.tensor([edit.head for edit in edits], device=device)[which]
        target.append(heads)
        place.append(heads)
    if first.neuron is not None:
        neurons = torch.tensor([edit.neuron for edit in edits], device=device)[which]
        target.append(neurons)
        place.append(neurons)
    if first.k_pos is not None:
        keys = _per_prompt([edit.k_pos for edit in edits], n_prompts, device)[which, prompt]
        there = keys >= 0
        if not bool(there.all()):
            target, place = [part[there] for part in target], [part[there] for part in place]
            which, keys = which[there], keys[there]
        filler = [] if first.head is not None else [slice(None)]
        target, place = [*target, *filler, keys], [*place, *filler, keys]  # type: ignore[list-item]
    if first.value is None:
        origin = source[site, first.layer]
        state[tuple(target)] = (origin.transpose(1, 2) if site in _SQUARE else origin)[tuple(place)]
    elif isinstance(first.value, Tensor):
        values = torch.stack([edit.value for edit in edits]).to(state)  # type: ignore[misc]
        feature = values.ndim - 2
        by_position = feature > state[tuple(target)].ndim - 1
        state[tuple(target)] = values[which, place[0], place[1]] if by_position else values[which, place[0]]
    else:
        constant = torch.tensor([float(edit.value) for edit in edits], device=device)[which].to(state.dtype)  # type: ignore[arg-type]
        shape = state[tuple(target)].shape
        state[tuple(target)] = constant.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def _matches(positions: Sequence[int | Tensor | None], view: Tensor) -> Tensor:
    """`[edit batch pos]`: whether an edit is made at a position of the view."""
    wanted = _per_prompt([-2 if pos is None else pos for pos in positions], len(view), view.device)
    return (wanted[:, :, None] == view[None]) | (wanted == -2)[:, :, None]


def _per_prompt(positions: Sequence[int | Tensor | None], n_prompts: int, device: torch.device) -> Tensor:
    """`[edit batch]` of positions given once for all prompts or for each."""
    if not any(isinstance(pos, Tensor) for pos in positions):
        return torch.tensor(positions, device=device)[:, None].expand(-1, n_prompts)
    rows = [torch.as_tensor(pos, device=device).expand(n_prompts) for pos in positions]
    return torch.stack(rows)


def sites_of(cells: Sequence[Cell], *, sourced_only: bool = False) -> set[tuple[str, int]]:
    """Every (site, layer) that the cells edit.

    Args:
        cells: sets of edits.
        sourced_only: only those whose value is the source run's.

    Returns:
        A set of (site, layer).
    """
    return {
        (edit.site, edit.layer) for cell in cells for edit in cell if not sourced_only or edit.value is None
    }  # fmt: skip
