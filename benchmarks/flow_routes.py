"""What do the importances of information flow routes cost, beside the published algorithm written plainly?

    OMP_NUM_THREADS=1 python benchmarks/flow_routes.py      # about 4 minutes
    OMP_NUM_THREADS=1 python benchmarks/flow_routes.py 64   # 64 tokens only; the other rows stay

All importances (every head, query and key; every MLP and residual) of one prompt of the default model, both ways on the
same weights and tokens. The plain way is that of the published code (facebookresearch/llm-transparency-tool,
`routes/contributions.py`): a forward pass with everything cached, then a layer at a time the vectors of all pairs of
positions and heads, [pos pos head d_model], and pairwise distances to the stream. The floor is one sum over as many
numbers as there are L1 terms, from a tile that stays in the cache: each term cannot be touched less than once.
The parity is the plain way's rounding: its two norms are summed in different orders, which adds up over hundreds of
parts (layer 4, 64 tokens, against float64: 2e-4 there, 3e-5 here).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, in_fresh_process, interleave, median, peak_mb, report, rows_with_origin
from torch import Tensor

import interp
from interp.circuits import _flow, flow_routes
from interp.models.program import program

#: The quickest public tool on 128 tokens of this model, as measured before this was written: CPU seconds, and MB.
_PUBLIC_SECONDS, _PUBLIC_MB, _PUBLIC_TOKENS = 36.9, 2600, 128
#: Repeats by number of tokens.
_REPEATS = {64: 3, _PUBLIC_TOKENS: 2}


def _setup(length: int) -> tuple[interp.Model, Tensor]:
    model = interp.load("smollm2-135m", weights="raw")
    return model, interp.tasks.text(model, n_prompts=1, length=length).clean


@torch.no_grad()
def _ours(model: interp.Model, tokens: Tensor) -> list[_flow.Flow]:
    return [flow for _, _, flow in _flow.flows(program(model), tokens, None, norm=1, floor=0.0)]


@torch.no_grad()
def _forward(model: interp.Model, tokens: Tensor) -> None:
    steps = program(model)
    frame, stream = steps.frame(tokens), steps.embed(tokens)
    for layer in range(model.n_layers):
        stream = steps.layer(layer, stream, frame)["resid_post"]


def _shares(parts: Tensor, whole: Tensor, exact: bool) -> Tensor:
    """The published formula: parts `[part batch pos d_model]`."""
    eps, floor = (0.0, 0.0) if exact else (1e-6, 1e-5)
    apart = torch.nn.functional.pairwise_distance(parts, whole.expand(parts.shape), p=1, eps=eps)
    near = (whole.norm(p=1, dim=-1) - apart).clip(min=floor)
    return near / near.sum(0, keepdim=True)


@torch.no_grad()
def _plain(model: interp.Model, tokens: Tensor, exact: bool = False) -> list[tuple[Tensor, ...]]:
    sites = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post", "attn.hook_v", "attn.hook_pattern")
    names = [f"blocks.{layer}.{site}" for layer in range(model.n_layers) for site in sites]
    cache = interp.models.run(model, tokens, capture=names).cache
    found: list[tuple[Tensor, ...]] = []
    for layer in range(model.n_layers):
        before, attn, mlp, after, values, pattern = (cache[f"blocks.{layer}.{site}"] for site in sites)
        middle = before + attn
        values = values.repeat_interleave(model.n_heads // values.shape[2], 2)
        mixed = torch.einsum("bhqk,bkhe->bqkhe", pattern, values)
        written = torch.einsum("bqkhe,hed->bqkhd", mixed, model.bridge.blocks[layer].attn.W_O)
        parts = written.permute(2, 3, 0, 1, 4).flatten(0, 1)
        shares = _shares(torch.cat([parts, before[None]]), middle, exact)
        heads = shares[:-1].unflatten(0, (tokens.shape[1], model.n_heads)).permute(2, 1, 3, 0)  # [batch head q k]
        pair = _shares(torch.stack([mlp, middle]), after, exact)
        found.append((heads[0], shares[-1, 0], pair[0, 0], pair[1, 0]))
    return found


def _parity(model: interp.Model, tokens: Tensor) -> float:
    """Largest difference of a share, with what the published code adds to differences (1e-6) and proximities at 0."""
    both = zip(_ours(model, tokens), _plain(model, tokens, exact=True), strict=True)
    return max(
        float((mine - theirs).abs().max())
        for ours, plain in both for mine, theirs in zip((ours.attn, *ours[1:4]), plain,
                                                        strict=True)
    )  # fmt: skip


def _floor(model: interp.Model, length: int) -> tuple[float, Callable[[], Any]]:
    """Number of L1 terms, and what reads as many numbers from the cache."""
    terms = length * (length + 1) / 2 * model.n_heads * model.n_layers * model.d_model
    tile = torch.randn(2**17)
    return terms, lambda: [torch.sum(tile) for _ in range(round(terms / len(tile)))]


ARMS: dict[str, Callable[[interp.Model, Tensor], Any]] = {
    "ours": _ours,
    "plain": _plain,
    "forward": _forward,
    "routes": flow_routes.routes,
    "components": flow_routes.components,
}


def _memory(arm: str, length: str) -> None:
    model, tokens = _setup(int(length))
    program(model)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    print(json.dumps({"above_model_mb": peak_mb(lambda: ARMS[arm](model, tokens)) - resident}))


def _case(length: int, repeats: int) -> list[dict[str, Any]]:
    """Parity, then time interleaved, then memory in fresh processes."""
    model, tokens = _setup(length)
    common = {"peer_name": "the published algorithm, written plainly", "parity": _parity(model, tokens)}
    terms, read_once = _floor(model, length)
    arms = {name: lambda arm=ARMS[name]: arm(model, tokens) for name in ARMS}
    # The parity has warmed both; the plain way takes long, so there are few repeats.
    times = interleave({**arms, "floor": read_once}, repeats=repeats, warmups=0)
    cpu = {name: median(found["cpu"]) for name, found in times.items()}
    peak = {
        name: in_fresh_process(__file__, ["memory", name, str(length)])["above_model_mb"]
        for name in ("ours", "plain", "components")
    }
    l1 = cpu["ours"] - cpu["forward"]
    rows = [
        {"case": f"all importances of {length} tokens, CPU time", "value": round(cpu["plain"] / cpu["ours"], 1),
         "target": 6.0, "better": "higher", "unit": "times faster", "ours": cpu["ours"], "peer": cpu["plain"], **common,
         "forward_s": cpu["forward"], "routes_s": cpu["routes"], "components_s": cpu["components"], "repeats": repeats},
        {"case": f"L1 terms of {length} tokens, speed of the floor", "value": round(cpu["floor"] / l1, 3),
         "target": 0.1, "better": "higher", "unit": "share", "ours": round(l1, 4), "peer": cpu["floor"], "parity": None,
         "peer_name": "one sum over as many numbers in the cache", "l1_terms": terms,
         "terms_per_second": round(terms / l1), "repeats": repeats},
        {"case": f"memory above the model, {length} tokens", "value": round(peak["components"]), "target": 300,
         "better": "lower", "unit": "MB", "ours": round(peak["components"]), "peer": round(peak["plain"]), **common,
         "importances_mb": round(peak["ours"])},
    ]  # fmt: skip
    if length == _PUBLIC_TOKENS:
        rows.append({
            "case": f"all importances of {length} tokens, CPU seconds", "value": cpu["ours"], "better": "lower",
            "unit": "s", "target": round(_PUBLIC_SECONDS / 6, 2), "ours": cpu["ours"], "peer": _PUBLIC_SECONDS,
            "parity": None, "peer_name": f"the quickest public tool, measured earlier ({_PUBLIC_MB} MB)",
        })  # fmt: skip
    return rows


def main(wanted: Sequence[str]) -> None:
    """Case by case, stored after each; rows of other cases stay."""
    stored = RESULTS / "flow_routes.json"
    for length, repeats in _REPEATS.items():
        if wanted and str(length) not in wanted:
            continue
        fresh = rows_with_origin(_case(length, repeats), model="smollm2-135m")
        earlier = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else []
        names = {row["case"] for row in fresh}
        report("flow_routes", [row for row in earlier if row["case"] not in names] + fresh)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        _memory(*sys.argv[2:])
    else:
        main(sys.argv[1:])
