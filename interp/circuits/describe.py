"""What does each node of a circuit do on one prompt? Where a head looks, and which tokens a node writes."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.circuits.circuit import Circuit
from interp.circuits.graph import INPUT, at
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.models.program import forward, program
from interp.patching._inputs import numbers, provenance, where
from interp.tasks.task import Task


@method(name="Nodes of a circuit described", paper="arXiv:2211.00593", notebook="circuit_discovery")
@torch.no_grad()
def describe_nodes(model: Model, task: Task, circuit: Circuit, *, prompt: int = 0, k: int = 5) -> Result:
    """Where each head of a circuit attends from the end of one prompt, and which tokens each node writes there.

    What a node writes is read out directly: logits(r) - logits(r - o), with r the final stream at the end and o the
    node's output there, less its mean over the vocabulary. It goes through the final norm and the unembedding and no
    other component. Attention is that of the whole model, not of the circuit.

    Args:
        model: a decoder.
        task: the prompts; the place read is their position "end", else the last.
        circuit: whose nodes.
        prompt: which prompt.
        k: how many positions and tokens a node.

    Returns:
        Result, unit "attention weight, or logits"; rows by node (`component`) and `metric`: "attention", the k
        positions (`k_pos`, `token`) a head attends to most, and "writes", the k tokens it raises most (`k_pos` -1);
        `step` ranks them from 0. `value` is the weight, or the logits. `interp.report.circuit.view` shows it.

    Raises:
        ValueError: a circuit of another model, a prompt that the task does not have.

    Cost: one forward pass of one prompt, and one unembedding a node.
    """
    circuit.require(model)
    if not 0 <= prompt < len(task):
        raise ValueError(f"prompt={prompt}: task {task.name!r} has prompts 0 to {len(task) - 1}.")
    one, steps = task[prompt : prompt + 1], program(model)
    end = int(where(one, "end" if "end" in one.positions else -1)[0])  # type: ignore[index]
    _, cache = forward(steps, one.clean, one.mask, capture=("pattern", "z", "mlp_out", "resid_post"))
    final = cache["resid_post", len(steps.layers) - 1][0, end]
    words = model.to_str_tokens(one.clean[0])
    rows: list[dict[str, Any]] = []

    def add(node: str, metric: str, values: Tensor, texts: list[str] | None) -> None:
        best = values.topk(min(k, len(values)))
        names = texts or model.to_str_tokens(best.indices)
        for step, (index, value) in enumerate(zip(best.indices.tolist(), numbers(best.values), strict=True)):
            rows.append({
                "component": node, "metric": metric, "step": step, "k_pos": -1 if texts is None else index,
                "token": names[step] if texts is None else names[index], "value": float(value),
            })  # fmt: skip

    for node in circuit.nodes:
        if node == INPUT:
            continue
        layer, head = at(node)
        if head >= 0:
            add(node, "attention", cache["pattern", layer][0, head, end, : end + 1].float(), words)
            wrote = cache["z", layer][0, end, head] @ steps.w_o(layer)[head]
        else:
            wrote = cache["mlp_out", layer][0, end]
        change = (steps.logits(final) - steps.logits(final - wrote)).float()
        add(node, "writes", change - change.mean(), None)
    columns = ["component", "metric", "step", "k_pos", "token", "value"]
    meta = provenance(model, task, prompt=prompt, k=k, text="".join(words))
    return Result(
        "describe.describe_nodes", pd.DataFrame(rows, columns=columns), "attention weight, or logits", meta=meta
    )
