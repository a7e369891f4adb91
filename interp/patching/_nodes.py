"""Which components send, and which receive? Their names, and which of them lie before which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interp.models.model import Model

_SENDERS = ("z", "mlp_out", "embed")
_RECEIVERS = ("q", "k", "v", "mlp", "logits")


@dataclass(frozen=True)
class Node:
    """A component that writes into the residual stream.

    Attributes:
        component: "z" (one head's output), "mlp_out" (an MLP's) or "embed" (the stream before layer 0).
        layer: counted from 0; None for "embed".
        head: query head; None for "mlp_out" and "embed".
    """

    component: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return {"z": f"head {self.layer}.{self.head}", "mlp_out": f"MLP {self.layer}"}.get(self.component, "embedding")


@dataclass(frozen=True)
class Receiver:
    """An input by which a component reads the residual stream.

    Attributes:
        component: "q", "k" or "v" (a head's query, key or value), "mlp" (what an MLP reads) or "logits" (what the final
            norm reads).
        layer: counted from 0; None for "logits".
        head: for "q" the query head; for "k" and "v" the key-value group, which several query heads share in a model
            with grouped-query attention; None for "mlp" and "logits".
    """

    component: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        if self.component == "logits":
            return "logits"
        return f"MLP {self.layer}" if self.component == "mlp" else f"{self.component} of {self.layer}.{self.head}"


#: What stands for the final residual stream.
LOGITS = Receiver("logits")


def nodes(model: Model, wanted: str | Sequence[Node]) -> list[Node]:
    """The components meant.

    Args:
        model: a decoder.
        wanted: "heads", "mlps", "all" (embedding, heads and MLPs) or Nodes.

    Returns:
        The Nodes, in the order in which a model computes them, or as given.

    Raises:
        ValueError: an unknown word, a component that the model does not have, none, or one given twice.
    """
    if isinstance(wanted, str):
        if wanted not in ("heads", "mlps", "all"):
            raise ValueError(
                f"{wanted!r} is not known; use 'heads', 'mlps', 'all', or a list such as [Node('z', 3, 1)]."
            )
        found = [Node("embed")] if wanted == "all" else []
        for layer in range(model.n_layers):
            if wanted != "mlps":
                found += [Node("z", layer, head) for head in range(model.n_heads)]
            if wanted != "heads" and model.d_mlp:
                found.append(Node("mlp_out", layer))
        if not found:
            raise ValueError(f"{model.name} has no MLPs: use 'heads'.")
        return found
    for node in wanted:
        if node.component not in _SENDERS:
            raise ValueError(f"{node!r}: component is one of {', '.join(map(repr, _SENDERS))}.")
        _check(model, node, "z", model.n_heads, layered=node.component != "embed")
    return _distinct(list(wanted), "nodes")


def receivers(model: Model, wanted: str | Sequence[Receiver]) -> list[Receiver]:
    """The inputs meant.

    Args:
        model: a decoder.
        wanted: "logits", or Receivers.

    Returns:
        The Receivers as given.

    Raises:
        ValueError: an unknown word, a component that the model does not have, none, one given twice, or the logits
            together with others.
    """
    if isinstance(wanted, str):
        if wanted != "logits":
            raise ValueError(
                f"receivers={wanted!r} is not known; use 'logits', or a list such as [Receiver('q', 3, 1)]."
            )
        return [LOGITS]
    for receiver in wanted:
        if receiver.component not in _RECEIVERS:
            raise ValueError(f"{receiver!r}: component is one of {', '.join(map(repr, _RECEIVERS))}.")
        heads = model.n_key_value_heads if receiver.component in ("k", "v") else model.n_heads
        _check(model, receiver, "qkv", heads, layered=receiver.component != "logits")
    if LOGITS in wanted and len(wanted) > 1:
        raise ValueError(
            "the logits read the final residual stream, and overwriting that leaves the other receivers without an "
            "effect: ask for receivers='logits' by itself."
        )
    return _distinct(list(wanted), "receivers")


def _check(model: Model, given: Node | Receiver, with_heads: str, n_heads: int, *, layered: bool) -> None:
    headed = given.component in with_heads
    if (given.layer is not None) != layered or (given.head is not None) != headed:
        needs = "a layer and a head" if headed else "a layer and no head" if layered else "neither layer nor head"
        raise ValueError(f"{given!r}: {given.component!r} has {needs}.")
    if given.layer is not None and not 0 <= given.layer < model.n_layers:
        raise ValueError(f"{given!r}: {model.name} has layers 0 to {model.n_layers - 1}.")
    if given.head is not None and not 0 <= given.head < n_heads:
        kind = "key-value heads (groups)" if given.component in "kv" else "heads"
        raise ValueError(f"{given!r}: {model.name} has {kind} 0 to {n_heads - 1}.")
    if given.component.startswith("mlp") and not model.d_mlp:
        raise ValueError(f"{given!r}: {model.name} has no MLPs.")


def _distinct(given: list, what: str) -> list:
    if not given:
        raise ValueError(f"there are no {what}: give at least one.")
    twice = [one for index, one in enumerate(given) if one in given[:index]]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: list each of the {what} once.")
    return given


def is_parallel(model: Model) -> bool:
    """Whether an MLP reads the layer's input, as attention does.

    Args:
        model: a decoder.

    Returns:
        True for GPT-NeoX and its like.
    """
    return bool(getattr(model.bridge.cfg, "parallel_attn_mlp", False))


def reaches(node: Node, receiver: Receiver, *, parallel: bool) -> bool:
    """Whether what a node writes is read by a receiver at the same position.

    Args:
        node: the sender.
        receiver: the input.
        parallel: whether an MLP reads the layer's input.

    Returns:
        True for receivers in later layers, for the MLP after a head in its own layer (unless parallel), for the
        logits, and whatever the embedding sends to.
    """
    if receiver.layer is None or node.layer is None:
        return True
    if node.component == "z" and receiver.component == "mlp" and not parallel:
        return node.layer <= receiver.layer
    return node.layer < receiver.layer


__all__ = ["LOGITS", "Node", "Receiver", "is_parallel", "nodes", "reaches", "receivers"]
