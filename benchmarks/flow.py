"""What do direct attribution and logit flow cost, in forward passes of the model and against one vector at a time?

    OMP_NUM_THREADS=1 python benchmarks/flow.py              # everything, about 10 minutes
    OMP_NUM_THREADS=1 python benchmarks/flow.py heads flow   # some cases only; the other rows stay

One prompt of 32 tokens on the default model. A forward pass is the bridge's own, with all logits. The peer of the
exact log-probability increases is the loop that the definition says: for each MLP neuron the final norm and the
unembedding of the stream with its vector added, timed on a sample of neurons of all layers and scaled. "brute" computes
all of them, many at once, and compares the strongest.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from _measure import RESULTS, in_fresh_process, interleave, median, peak_mb, report, rows_with_origin

import interp
from interp.dynamics.depth import TASKS, compare_depths
from interp.flow import attribution, logit_flow
from interp.flow._direct import frozen, matrix, seen_at
from interp.models import Model
from interp.models.program import program
from interp.tasks import Task

_TEXT = (
    "The small town lies at the foot of the mountains, an hour by train from the border. Anyone who wants to know more "
    "about it should ask. The capital of France is the city of"
)
_TOKENS = 32


def _task(model: Model) -> Task:
    ids = model.tokenize(_TEXT).ids[:, -_TOKENS:]
    assert ids.shape[1] == _TOKENS, "the text is too short"
    return Task("32 tokens", ("benchmark",), ids, "benchmark", answers=torch.tensor([model.single_token(" Paris")]))


def _forwards(model: Model, case: str, ours: Callable[[], Any], target: float) -> list[dict[str, Any]]:
    """A call in forward passes over the same prompt."""
    task = _task(model)
    times = interleave({"ours": ours, "forward": lambda: model(task.clean)}, repeats=7)
    return [
        {
            "case": f"{case}, {clock}",
            "value": round(median(times["ours"][clock]) / median(times["forward"][clock]), 2),
            "target": target, "better": "lower", "unit": "forward passes", "ours": median(times["ours"][clock]),
            "peer": median(times["forward"][clock]), "peer_name": "one forward pass of the bridge", "parity": None,
        }
        for clock in ("cpu", "wall")
    ]  # fmt: skip


def _neurons(model: Model) -> None:
    for by in ("attention_neuron", "neuron"):
        attribution.attribute(model, _task(model), by=by, top_k=30)  # type: ignore[arg-type]


def _memory() -> None:
    """In a process of its own: what the neuron-level call needs on top of the loaded model."""
    model = interp.load("smollm2-135m")
    task = _task(model)
    model(task.clean)
    before = peak_mb(lambda: None)
    print(json.dumps({"mb": peak_mb(lambda: _neurons(model)) - before}))


def _memory_row() -> list[dict[str, Any]]:
    found = in_fresh_process(__file__, ["--memory"])
    return [{
        "case": "logits of all neurons, top 30: memory on top of the model", "value": round(found["mb"], 1),
        "target": 500.0, "better": "lower", "unit": "MB", "ours": None, "peer": None, "peer_name": "", "parity": None,
    }]  # fmt: skip


class _Slow:
    """The increases of MLP neurons as their definition says."""

    def __init__(self, model: Model) -> None:
        self.model, self.task, self.steps = model, _task(model), program(model)
        with torch.no_grad():
            self.seen = seen_at(self.steps, self.task.clean, None, torch.tensor([_TOKENS - 1]))
            self.head = frozen(self.steps, self.seen.final)
        assert self.task.answers is not None
        self.target = int(self.task.answers[0])

    def _log_p(self, streams: torch.Tensor) -> torch.Tensor:
        return self.head.logits(streams[None])[0].log_softmax(-1)[:, self.target]

    @torch.no_grad()
    def of(self, layer: int, neurons: Sequence[int] | slice) -> torch.Tensor:
        """Many at once."""
        x, post = self.seen.mid[layer, 0], self.seen.post[layer, 0]
        down = matrix(self.steps.layers[layer].down)
        return self._log_p(x + post[neurons, None] * down[neurons]) - self._log_p(x[None])

    def loop(self, sample: Sequence[tuple[int, int]]) -> np.ndarray:
        """One at a time."""
        return np.array([float(self.of(layer, [neuron])) for layer, neuron in sample])


def _increases(model: Model) -> list[dict[str, Any]]:
    slow = _Slow(model)
    sample = [(layer, (layer * 53 + i * 311) % model.d_mlp) for layer in range(model.n_layers) for i in range(4)]
    ask = partial(attribution.attribute, model, slow.task, by="neuron", quantity="log_prob_increase", top_k=30)
    times = interleave({"ours": ask, "loop": lambda: slow.loop(sample)}, repeats=5)
    found = ask()
    kept = [(int(layer), int(neuron)) for layer, neuron in found.table[["layer", "neuron"]].to_numpy()]
    parity = float(np.abs(slow.loop(kept) - found.table["value"].to_numpy()).max())
    scale = model.n_layers * model.d_mlp / len(sample)
    return [
        {
            "case": f"exact increases of all MLP neurons, the 30 largest, {clock}",
            "value": round(median(times["loop"][clock]) * scale / median(times["ours"][clock]), 1), "target": 10.0,
            "better": "higher", "unit": "times faster", "ours": median(times["ours"][clock]),
            "peer": round(median(times["loop"][clock]) * scale, 1), "peer_name": "one neuron at a time",
            "parity": parity, "evaluated": int(found.arrays["evaluated"][1][0]),
            "of": int(found.arrays["offered"][1][0]), "peer_neurons_timed": len(sample),
        }
        for clock in ("cpu", "wall")
    ]  # fmt: skip


def _brute(model: Model) -> list[dict[str, Any]]:
    """All increases, 64 neurons at once: how much of the gain is batching, and whether the 30 are the 30."""
    slow = _Slow(model)
    every: dict[str, torch.Tensor] = {}

    def all_of_them() -> None:
        cuts = [slice(start, start + 64) for start in range(0, model.d_mlp, 64)]
        every["values"] = torch.stack([
            torch.cat([slow.of(layer, cut) for cut in cuts]) for layer in range(model.n_layers)
        ])  # fmt: skip

    ask = partial(attribution.attribute, model, slow.task, by="neuron", quantity="log_prob_increase", top_k=30)
    times = interleave({"ours": ask, "brute": all_of_them}, repeats=1, warmups=0)
    best = every["values"].flatten().topk(30)
    table = ask().table
    mine = set((table["layer"] * model.d_mlp + table["neuron"]).astype(int))
    assert mine == set(best.indices.tolist()), "the strongest of brute force are others"
    parity = float(np.abs(best.values.double().numpy() - table["value"].to_numpy()).max())
    return [{
        "case": "exact increases of all MLP neurons, the 30 largest, against brute force in batches, cpu",
        "value": round(median(times["brute"]["cpu"]) / median(times["ours"]["cpu"]), 1), "target": 10.0,
        "better": "higher", "unit": "times faster", "ours": median(times["ours"]["cpu"]),
        "peer": median(times["brute"]["cpu"]), "peer_name": "64 neurons at a time", "parity": parity,
    }]  # fmt: skip


def _flow(model: Model) -> list[dict[str, Any]]:
    task = _task(model)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["INTERP_CACHE"] = cache
        times = interleave({"ours": lambda: logit_flow.flow(model, task, top_k=30)}, repeats=5, warmups=1)
    return [
        {
            "case": f"logit flow, 30 neurons a step, {clock}", "value": median(times["ours"][clock]), "target": 20.0,
            "better": "lower", "unit": "s", "ours": median(times["ours"][clock]), "peer": None, "peer_name": "",
            "parity": None,
        }
        for clock in ("cpu", "wall")
    ]  # fmt: skip


def _toy() -> list[dict[str, Any]]:
    """The whole toy experiment of back attention: two tasks, three transformers, three seeds; a task a core."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor() as cores:
        os.environ["INTERP_CACHE"] = cache
        found = list(cores.map(lambda task: in_fresh_process(__file__, ["--toy", task]), TASKS))
    spent = {"cpu, all processes": sum(each["cpu_s"] for each in found), "wall": time.perf_counter() - start}
    return [{
        "case": f"back attention, toy experiment, {clock}", "value": round(seconds, 1), "target": 900.0,
        "better": "lower", "unit": "s", "ours": round(seconds, 1), "peer": None, "peer_name": "", "parity": None,
        "model": "small transformers trained there",
    } for clock, seconds in spent.items()]  # fmt: skip


def main(wanted: Sequence[str]) -> None:
    """Case by case."""
    if list(wanted) == ["--memory"]:
        _memory()
        return
    if wanted and wanted[0] == "--toy":
        print(json.dumps({"rows": len(compare_depths(wanted[1]).table)}))
        return
    model = interp.load("smollm2-135m")
    task = _task(model)
    attribute = partial(attribution.attribute, model, task)
    cases: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "heads": lambda: _forwards(model, "logits of all heads and MLPs", lambda: attribute(by="head"), 2.0),
        "components": lambda: _forwards(
            model, "increases of all attention layers and MLPs", lambda: attribute(quantity="log_prob_increase"), 2.0
        ),
        "neurons": lambda: _forwards(model, "logits of all neurons, top 30", lambda: _neurons(model), 6.0),
        "memory": _memory_row,
        "increases": lambda: _increases(model),
        "flow": lambda: _flow(model),
        "brute": lambda: _brute(model),
        "toy": _toy,
    }
    rows: list[dict[str, Any]] = []
    stored = RESULTS / "flow.json"
    for name in [name for name in cases if not wanted or name in wanted]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += cases[name]()
        # After each case, so that a run that is stopped has not been for nothing; rows of other cases stay.
        fresh = rows_with_origin(rows, model="smollm2-135m")
        earlier = json.loads(stored.read_text(encoding="utf-8")) if wanted and stored.is_file() else []
        names = {row["case"] for row in fresh}
        report("flow", [row for row in earlier if row["case"] not in names] + fresh)


if __name__ == "__main__":
    main(sys.argv[1:])
