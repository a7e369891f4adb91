"""How much faster is a patching sweep than one forward pass a cell, and how near to what the machine could do?

    OMP_NUM_THREADS=1 python benchmarks/patching.py            # everything, about 25 minutes
    OMP_NUM_THREADS=1 python benchmarks/patching.py z16 path16 # some cases only; the other rows stay

Peers: TransformerLens's own `patching.get_act_patch_*` on the same bridge, and for path patching the plain
implementation with two hooked forward passes a sender. A peer's cost is one forward pass whatever the cell, so it
is timed on a sample of its cells, spread evenly over the layers, and scaled up; ours is timed on the whole sweep. The
floor is the time that the multiplications of the causal cones alone would take at the speed of one large matrix
multiplication, measured in the same run.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from _measure import RESULTS, interleave, median, report, rows_with_origin
from transformer_lens import patching as peer

import interp
from interp.patching import activation, attribution, path
from interp.tasks import Task

_NAMES = (
    "John Mary|Tom James|Dan Sid|Martin Amy|Paul Anna|Mark Sarah|David Laura|Peter Susan|James Emily|Robert Alice|"
    "George Helen|Thomas Julia|Henry Clara|Simon Maria|Kevin Linda|Jack Rose"
)
PAIRS = [tuple(pair.split()) for pair in _NAMES.split("|")]


def _task(model: interp.Model, n: int, *, shared: bool = True) -> Task:
    """IOI pairs of 14 tokens. They differ from S2 on (position 9), or, not shared, in the first token too."""
    clean, corrupt = [], []
    for one, other in PAIRS[:n]:
        clean.append(f"When {one} and {other} went to the shops, {one} gave the bag to")
        first = "When" if shared else "While"
        corrupt.append(f"{first} {one} and {other} went to the shops, {other} gave the bag to")
    answers, wrong = ([f" {pair[i]}" for pair in PAIRS[:n]] for i in (1, 0))
    return Task.from_pairs(model, "ioi of 14 tokens", clean, corrupt, answers, wrong, source="benchmark")


def cone_flops(model: interp.Model, cells: Sequence[tuple[int, int]], n_pos: int, *, whole: bool) -> float:
    """Multiplications and additions of the linear maps in the cells' cones, for one prompt.

    Args:
        model: for the shapes.
        cells: (layer, first position changed) of each.
        n_pos: tokens of the prompt.
        whole: whether the first layer's attention is part of the cone (q, k, v, pattern, resid_pre), or only what
            comes after the heads' outputs (z).

    Returns:
        FLOPs: the sum over cells of later layers x positions x 2 x weights. In the last layer all positions need keys
        and values, and only the one that is read the rest.
    """
    attention_in = model.d_model * model.d_head * (model.n_heads + 2 * model.n_key_value_heads)
    keys_values = 2 * model.d_model * model.d_head * model.n_key_value_heads
    out = model.d_model * model.d_head * model.n_heads
    mlp = (3 if model.gated_mlp else 2) * model.d_model * model.d_mlp
    layer_cost, total = attention_in + out + mlp, 0
    for layer, start in cells:
        tail, last = n_pos - start, layer == model.n_layers - 1
        first = (1 if last else tail) * (out + mlp) + (tail * attention_in if whole else 0)
        later = max(0, model.n_layers - 2 - layer) * tail * layer_cost
        end = 0 if last else tail * keys_values + layer_cost - keys_values
        total += first + later + end
    return 2.0 * total


def _layer_flops(model: interp.Model) -> tuple[float, float]:
    """FLOPs of a layer's linear maps for one token, and of its MLP alone."""
    attention = 2 * model.d_model * model.d_head * (model.n_heads + model.n_key_value_heads)
    mlp = (3 if model.gated_mlp else 2) * model.d_model * model.d_mlp
    return 2.0 * (attention + mlp), 2.0 * mlp


def _floor(flops: float, times: dict[str, dict[str, list[float]]], clock: str) -> dict[str, float]:
    """The floor of a row in seconds, and the part of our time that it is."""
    floor = flops / (_GEMM_FLOPS / median(times["gemm"][clock]))
    return {"floor_s": round(floor, 3), "fraction_of_floor": round(floor / median(times["ours"][clock]), 3)}


def _gemm() -> Callable[[], Any]:
    """1024 tokens through a matrix as large as an MLP's of the default model, 20 times."""
    one, other = torch.randn(1024, 576), torch.randn(576, 1536)
    return lambda: [one @ other for _ in range(20)]


_GEMM_FLOPS = 20 * 2.0 * 1024 * 576 * 1536


class _Sweep:
    """One sweep: ours over all cells, the peer over a sample."""

    def __init__(
        self, model: interp.Model, task: Task, site: str, by: tuple[str, ...], theirs: Callable, axes: Sequence[str]
    ) -> None:
        self.model, self.task, self.site, self.by, self.theirs, self.axes = model, task, site, by, theirs, axes
        assert task.corrupt is not None
        names = {"z": "z", "q": "q", "k": "k", "v": "v", "pattern": "pattern", "resid_pre": "resid_pre"}
        hooks = [n for n in (f"blocks.{layer}" for layer in range(model.n_layers))]
        part = "hook_resid_pre" if site == "resid_pre" else f"attn.hook_{names[site]}"
        self.clean = interp.models.run(model, task.clean, capture=[f"{hook}.{part}" for hook in hooks]).cache
        heads = model.n_key_value_heads if site in ("k", "v") else model.n_heads
        sizes = {"layer": model.n_layers, "pos": task.clean.shape[1], "head": heads}
        grid = np.indices([sizes[axis] for axis in by]).reshape(len(by), -1).T
        self.cells = pd.DataFrame(grid, columns=list(by))
        step = max(1, len(self.cells) // 30)
        self.sample = self.cells.iloc[step // 2 :: step]

    def ours(self) -> np.ndarray:
        found = activation.patch(self.model, self.task, site=self.site, by=self.by, min_oriented=0.0)
        return found.table.groupby(list(self.by), sort=True)["value_metric"].mean().to_numpy()

    def peer(self) -> np.ndarray:
        rows = torch.arange(len(self.task))
        answers, wrong = self.task.answers, self.task.wrong

        def metric(logits: torch.Tensor) -> torch.Tensor:
            last = logits[:, -1]
            return (last[rows, answers] - last[rows, wrong]).mean()

        order = self.sample[[{"head_index": "head"}.get(axis, axis) for axis in self.axes]]
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            found = self.theirs(
                self.model.bridge, self.task.corrupt, self.clean, metric, index_df=order, index_axis_names=None
            )
        return found.numpy()

    def row(self, case: str, target: float, repeats: int) -> list[dict[str, Any]]:
        found: dict[str, np.ndarray] = {}
        arms = {
            "ours": lambda: found.update(ours=self.ours()),
            "peer": lambda: found.update(peer=self.peer()),
            "gemm": _gemm(),
        }
        times = interleave(arms, repeats=repeats, warmups=2 if repeats >= 5 else 0)
        parity = float(np.abs(found["ours"][self.sample.index] - found["peer"]).max())
        scale = len(self.cells) / len(self.sample)
        differs = (self.task.clean != self.task.corrupt).long().argmax(1)
        starts = self.cells["pos"] if "pos" in self.by else pd.Series(0, index=self.cells.index)
        flops = 0.0
        for first in differs.tolist():
            cone = [
                (int(layer), max(int(start), first))
                for layer, start in zip(self.cells["layer"], starts, strict=True)
                if "pos" not in self.by or start >= first
            ]
            flops += cone_flops(self.model, cone, self.task.clean.shape[1], whole=self.site != "z")
        rows = []
        for clock in ("cpu", "wall"):
            ours, theirs = median(times["ours"][clock]), median(times["peer"][clock]) * scale
            floor = _floor(flops, times, clock)
            rows.append({
                "case": f"{case}, {clock}", "value": round(theirs / ours, 2), "target": target, "better": "higher",
                "unit": "times faster", "ours": ours, "peer": round(theirs, 2), "peer_name": self.theirs_name,
                "parity": parity, **floor, "floor_ratio": round(theirs / floor["floor_s"], 2),
                "cells": len(self.cells), "peer_cells_timed": len(self.sample),
                "repeats": repeats,
            })  # fmt: skip
        return rows

    @property
    def theirs_name(self) -> str:
        return f"TransformerLens patching, {self.site} by {', '.join(self.by)}"


def _z(model: interp.Model, n: int, target: float, repeats: int, *, shared: bool = True) -> list[dict[str, Any]]:
    task = _task(model, n, shared=shared)
    sweep = _Sweep(model, task, "z", ("layer", "head"), peer.get_act_patch_attn_head_out_all_pos, ("layer", "head"))
    return sweep.row(f"z, all positions, {n} pairs{'' if shared else ' without a shared prefix'}", target, repeats)


def _z_by_position(model: interp.Model, n: int, target: float, repeats: int) -> list[dict[str, Any]]:
    theirs, axes = peer.get_act_patch_attn_head_out_by_pos, ("layer", "pos", "head")
    return _Sweep(model, _task(model, n), "z", ("layer", "pos", "head"), theirs, axes).row(
        f"z by position, {n} pairs", target, repeats
    )


def _resid_pre(model: interp.Model, n: int, target: float, repeats: int) -> list[dict[str, Any]]:
    theirs = peer.get_act_patch_resid_pre
    return _Sweep(model, _task(model, n), "resid_pre", ("layer", "pos"), theirs, ("layer", "pos")).row(
        f"resid_pre by layer and position, {n} pairs", target, repeats
    )


def _heads(model: interp.Model, site: str, n: int, target: float, repeats: int) -> list[dict[str, Any]]:
    theirs = getattr(peer, f"get_act_patch_attn_head_{site}_all_pos")
    axes = ("layer", "head_index" if site == "pattern" else "head")
    return _Sweep(model, _task(model, n), site, ("layer", "head"), theirs, axes).row(
        f"{site}, all positions, {n} pairs", target, repeats
    )


def _path(model: interp.Model, n: int, target: float, repeats: int) -> list[dict[str, Any]]:
    """Every head to the logits, against two hooked forward passes a sender."""
    task = _task(model, n)
    some = [path.Node("z", layer, layer // 3 % 9) for layer in range(0, 30, 3)]

    def ours() -> pd.DataFrame:
        return path.patch(model, task, receivers="logits", senders="heads", min_oriented=0.0).table

    def plain() -> pd.DataFrame:
        return path.patch(model, task, receivers="logits", senders=some, min_oriented=0.0, exact_path="hooks").table

    keys = ["layer", "head", "prompt"]
    both = ours().merge(plain(), on=keys)
    assert len(both) == len(some) * n, "not every sampled sender was found in both"
    parity = float((both["value_metric_x"] - both["value_metric_y"]).abs().max())
    times = interleave({"ours": ours, "peer": plain, "gemm": _gemm()}, repeats=repeats)
    scale = model.n_layers * model.n_heads / len(some)
    # Both prompts' runs, and for each sender the MLPs from its layer on at the one position.
    layer_flops, mlp_flops = _layer_flops(model)
    mlps = model.n_heads * model.n_layers * (model.n_layers + 1) / 2
    flops = n * (2 * task.clean.shape[1] * model.n_layers * layer_flops + mlps * mlp_flops)
    return [
        {
            "case": f"path patching to the logits, 270 senders, {n} pairs, {clock}",
            "value": round(median(times["peer"][clock]) * scale / median(times["ours"][clock]), 2), "target": target,
            "better": "higher", "unit": "times faster", "ours": median(times["ours"][clock]),
            "peer": round(median(times["peer"][clock]) * scale, 2), "peer_name": "two hooked forward passes a sender",
            "parity": parity, **_floor(flops, times, clock), "cells": model.n_layers * model.n_heads,
            "peer_cells_timed": len(some),
        }
        for clock in ("cpu", "wall")
    ]  # fmt: skip


def _attribution(model: interp.Model, n: int, repeats: int) -> list[dict[str, Any]]:
    """All heads and MLPs to first order, in forward passes of the bridge over the same prompts."""
    task = _task(model, n)

    def ours() -> Any:
        return attribution.attribute(model, task, sites=("z", "mlp_out"), min_oriented=0.0)

    def forward() -> None:
        model(task.clean)

    times = interleave({"ours": ours, "forward": forward, "gemm": _gemm()}, repeats=repeats)
    # Both prompts' runs, and the clean one's way back to its activations.
    flops = 3 * n * task.clean.shape[1] * model.n_layers * _layer_flops(model)[0]
    return [
        {
            "case": f"attribution of all heads and MLPs, {n} pairs, {clock}",
            "value": round(median(times["ours"][clock]) / median(times["forward"][clock]), 2), "target": 4.0,
            "better": "lower", "unit": "forward passes", "ours": median(times["ours"][clock]),
            "peer": median(times["forward"][clock]), "peer_name": "one forward pass of the bridge", "parity": None,
            **_floor(flops, times, clock),
        }
        for clock in ("cpu", "wall")
    ]  # fmt: skip


def _exponents() -> list[dict[str, Any]]:
    """How the time of a z sweep grows: the slope of log time against log size, other sizes fixed."""
    import transformers

    from interp.core.edits import Edit
    from interp.core.readout import readout
    from interp.core.rerun import rerun
    from interp.models import load, toy

    def sweep(n_layers: int = 8, n_pos: int = 32, heads: int = 4, n: int = 4) -> Callable[[], Any]:
        config = transformers.LlamaConfig(
            num_hidden_layers=n_layers, hidden_size=256, num_attention_heads=8, num_key_value_heads=4, vocab_size=64,
            intermediate_size=768, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = load(module.eval(), tokenizer=toy.tokenizer(), weights="raw")
        clean, corrupt = (toy.random_tokens(model, n, n_pos, seed=seed) for seed in (0, 1))
        corrupt[:, 0] = (clean[:, 0] - 1).clamp(min=2) + (clean[:, 0] == 2).long()
        answers, wrong = toy.random_tokens(model, 2, n, seed=2)
        task = Task("random", ("x",) * n, clean, "drawn", corrupt=corrupt, answers=answers, wrong=wrong)
        read = readout(model, task)
        cells = [[Edit("z", layer, head=head)] for layer in range(n_layers) for head in range(heads)]
        return lambda: rerun(model, corrupt, cells, read, source=clean)

    rows = []
    sizes = {"n_layers": (4, 8, 16), "n_pos": (16, 32, 64), "heads": (2, 4, 8), "n": (4, 8, 16)}
    names = {"n_layers": "layers", "n_pos": "positions", "heads": "heads", "n": "prompts"}
    expected = {"n_layers": 2.0, "n_pos": 1.0, "heads": 1.0, "n": 1.0}
    for size, values in sizes.items():
        times = interleave({str(value): sweep(**{size: value}) for value in values}, repeats=5)
        seconds = [median(times[str(value)]["cpu"]) for value in values]
        slope = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
        rows.append({
            "case": f"growth of a z sweep with {names[size]} {values}, cpu", "value": round(slope, 2),
            "target": expected[size] + 0.3, "better": "lower", "unit": "exponent", "ours": seconds, "peer": None,
            "peer_name": f"expected {expected[size]:g}: cells x layers left x positions x prompts", "parity": None,
        })  # fmt: skip
    return rows


def _cases(model: interp.Model) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    cases: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "z1": partial(_z, model, 1, 8.0, 5),
        "zpos1": partial(_z_by_position, model, 1, 60.0, 5),
        "resid1": partial(_resid_pre, model, 1, 15.0, 5),
        **{f"{site}1": partial(_heads, model, site, 1, 6.0, 5) for site in ("q", "k", "v", "pattern")},
        "path1": partial(_path, model, 1, 6.0, 5),
        "apart1": partial(_z, model, 1, 3.0, 5, shared=False),
        "attribution1": partial(_attribution, model, 1, 5),
        "z4": partial(_z, model, 4, 8.0, 5),
        "path16": partial(_path, model, 16, 6.0, 5),
        "attribution16": partial(_attribution, model, 16, 5),
        "growth": _exponents,
        # Minutes each: fewer repeats, and the time is nearly all matrix multiplication.
        "z16": partial(_z, model, 16, 8.0, 2),
        "resid16": partial(_resid_pre, model, 16, 15.0, 1),
        "apart16": partial(_z, model, 16, 3.0, 1, shared=False),
        **{f"{site}16": partial(_heads, model, site, 16, 6.0, 1) for site in ("q", "k", "v", "pattern")},
        "zpos16": partial(_z_by_position, model, 16, 60.0, 1),
    }
    return cases


def main(wanted: Sequence[str]) -> None:
    """Parity, then time interleaved, case by case."""
    model = interp.load("smollm2-135m")
    cases = _cases(model)
    chosen = [name for name in cases if not wanted or name in wanted]
    rows: list[dict[str, Any]] = []
    stored = RESULTS / "patching.json"
    for name in chosen:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = cases[name]()
        rows += found
        for row in found:
            shown = {k: row[k] for k in ("case", "value", "target", "parity", "fraction_of_floor", "ours") if k in row}
            print(shown, flush=True)
        # After each case, so that a run that is stopped has not been for nothing; rows of other cases stay.
        fresh = rows_with_origin(rows, model="smollm2-135m")
        earlier = json.loads(stored.read_text(encoding="utf-8")) if wanted and stored.is_file() else []
        names = {row["case"] for row in fresh}
        report("patching", [row for row in earlier if row["case"] not in names] + fresh)


if __name__ == "__main__":
    main(sys.argv[1:])
