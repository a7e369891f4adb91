"""What does detecting massive activations cost beyond the forward passes?

    python benchmarks/massive.py

64 prompts of 128 tokens on the default model. Three ways over the same tokens: the bare forward passes (in the same
batches, without hooks; with and without the unembedding), `massive.detect`, and the reference repository's way written
plainly: one prompt at a time, every layer's output cached, then the top three and the median of each.
"""

from __future__ import annotations

import json
import sys

import torch
from _measure import in_fresh_process, interleave, median, peak_mb, report, rows_with_origin

import interp
from interp.activations import massive

N_PROMPTS, LENGTH, BATCH = 64, 128, 8


def _setup() -> tuple[interp.Model, torch.Tensor]:
    model = interp.load("smollm2-135m", weights="raw")
    return model, interp.tasks.text(model, n_prompts=N_PROMPTS, length=LENGTH).clean


def _bare(model: interp.Model, tokens: torch.Tensor) -> None:
    for rows in tokens.split(BATCH):
        model(rows)


def _bare_stream(model: interp.Model, tokens: torch.Tensor) -> None:
    for rows in tokens.split(BATCH):
        interp.models.run(model, rows, stop_after=model.n_layers - 1)


def _ours(model: interp.Model, tokens: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(massive.detect(model, tokens, batch_size=BATCH).arrays["profile"][1])


def _reference_way(model: interp.Model, tokens: torch.Tensor) -> torch.Tensor:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    profile = torch.empty(len(tokens), model.n_layers, 4)
    for prompt, row in enumerate(tokens):
        cache = interp.models.run(model, row[None], capture=names).cache
        for layer, name in enumerate(names):
            size = cache[name].abs().flatten()
            profile[prompt, layer, :3] = size.topk(3).values
            profile[prompt, layer, 3] = size.median()
    return profile


ARMS = {"forward": _bare, "forward to the last block": _bare_stream, "ours": _ours, "reference": _reference_way}


def _memory(arm: str) -> None:
    model, tokens = _setup()
    print(json.dumps({"peak_mb": peak_mb(lambda: ARMS[arm](model, tokens))}))


def main() -> None:
    """Parity, then time interleaved, then memory in fresh processes."""
    model, tokens = _setup()
    ours, reference = _ours(model, tokens), _reference_way(model, tokens)
    parity = float(((ours - reference).abs() / reference).max())
    times = interleave({name: lambda arm=arm: arm(model, tokens) for name, arm in ARMS.items()})
    cpu = {name: median(found["cpu"]) for name, found in times.items()}
    wall = {name: median(found["wall"]) for name, found in times.items()}
    peak = {name: in_fresh_process(__file__, [name])["peak_mb"] for name in ARMS}

    def ratio(case: str, one: dict, other: dict, peer: str, target: float) -> dict:
        return {
            "case": case, "value": round(one["ours"] / other[peer], 3), "target": target, "better": "lower",
            "unit": "ratio", "ours": one["ours"], "peer": other[peer], "peer_name": peer, "parity": parity,
        }  # fmt: skip

    rows = [
        ratio("detect, CPU time", cpu, cpu, "forward", 1.25),
        ratio("detect, CPU time", cpu, cpu, "forward to the last block", 1.25),
        ratio("detect, CPU time", cpu, cpu, "reference", 1.0),
        ratio("detect, wall time", wall, wall, "forward", 1.25),
        ratio("detect, wall time", wall, wall, "reference", 1.0),
    ]
    rows += [
        {"case": "detect, peak memory", "value": round(peak["ours"] - peak[peer]), "target": target, "better": "lower",
         "unit": "MB above the peer", "ours": round(peak["ours"]), "peer": round(peak[peer]), "peer_name": peer,
         "parity": None}
        for peer, target in (("forward", 300), ("forward to the last block", 300), ("reference", 300))
    ]  # fmt: skip
    report("massive", rows_with_origin(rows, model="smollm2-135m"))


if __name__ == "__main__":
    _memory(sys.argv[1]) if len(sys.argv) > 1 else main()
