"""What do lenses of a whole model cost, and how near is their training to what the machine could do?

    python benchmarks/lenses.py                     # everything, about a quarter of an hour
    OMP_NUM_THREADS=1 python benchmarks/lenses.py caching peak  # some cases only; the other rows stay
    python benchmarks/lenses.py --short reference   # a tenth of the text or less, to see that it runs; nothing is kept

Each case runs in a process of its own: its peak memory counts from the call's start. The peers: a bare forward pass;
the layout of Attention Lens's code (for each head a full linear map from what it writes to the vocabulary, the last
position of each sentence, 4 sentences at a time, Adam every 10 batches), on the same activations, without running the
positions that it throws away; and for the tuned lens plain autograd through a dense softmax, a layer at a time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, in_fresh_process, interleave, median, peak_mb, report, rows_with_origin
from torch import Tensor, nn
from torch.nn import functional as F

import interp
from interp.lenses import attention, tuned
from interp.lenses._divergence import divergence, product, targets
from interp.lenses._output import output
from interp.lenses.cached import Cached, cache
from interp.models import Model

SHORT = "--short" in sys.argv
LAYER = 12
WINDOW, SKIP = 128, 8


def _cached(
    folder: str, n_tokens: int, *, site: Any = "z", layers: Sequence[int] | None = None
) -> tuple[Model, Cached]:
    """The default model, and that many tokens of offline text."""
    model = interp.load("smollm2-135m")
    n_windows = -(-n_tokens // (WINDOW - SKIP))
    windows = interp.tasks.corpus(model, n_tokens=n_windows * WINDOW).windows(WINDOW)
    return model, cache(model, windows, site=site, layers=layers, skip=SKIP, folder=Path(folder) / "cached")


def _size(n: int) -> int:
    return max(600, n // 10) if SHORT else n


def _square() -> float:
    """FLOP/s of a square float32 product, by the wall clock: the faster one of two libraries, median of seven."""
    one, other = torch.randn(2048, 2048), torch.randn(2048, 2048)
    speeds = []
    for multiply in (torch.mm, product):
        seconds = []
        for turn in range(9):
            start = time.perf_counter()
            multiply(one, other)
            if turn >= 2:
                seconds.append(time.perf_counter() - start)
        speeds.append(2 * 2048**3 / statistics.median(seconds))
    return max(speeds)


def _timed(function: Callable[[], Any]) -> dict[str, float]:
    """Processor and wall seconds, peak memory of the process and how much of it is new, MB."""
    resident = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    cpu, wall = time.process_time(), time.perf_counter()
    peak = peak_mb(function)
    return {
        "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak_mb": peak,
        "above_mb": peak - resident, "threads": torch.get_num_threads(),
    }  # fmt: skip


# --- in a process of its own ---------------------------------------------------------------------------------------


def caching_alone() -> dict[str, Any]:
    """Activations of all layers, against the bare forward pass of the same windows."""
    model = interp.load("smollm2-135m")
    windows = interp.tasks.corpus(model, n_tokens=_size(4096) // WINDOW * WINDOW).windows(WINDOW)
    sizes = []

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = cache(model, windows, skip=SKIP, folder=Path(folder) / "cached")
            sizes.append(sum(file.stat().st_size for file in found.folder.iterdir()) / len(found))

    def bare() -> None:
        for rows in windows.tokens.split(8):  # as many windows as `cache` takes at a time
            model(rows)

    times = interleave({"ours": ours, "bare": bare}, repeats=1 if SHORT else 3, warmups=0 if SHORT else 1)
    found = {f"{arm}_{clock}": median(times[arm][clock]) for arm in times for clock in ("cpu", "wall")}
    return {**found, "bytes": sizes[-1], "tokens": windows.tokens.numel()}


def peak_alone() -> dict[str, Any]:
    """Additive training of four layers beside a square product."""
    with tempfile.TemporaryDirectory() as folder:
        layers = [6, 12, 18, 24]
        model, cached = _cached(folder, _size(4096), layers=layers)
        before = _square()
        found = _timed(lambda: attention.train(model, cached, estimand="additive"))
        flops = (4 * len(layers) + 2) * model.d_model * model.d_vocab * len(cached)
        return {**found, "flops": flops, "square": (before + _square()) / 2, "tokens": len(cached)}


def _train_alone(estimand: Any, layers: Sequence[int] | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model, cached = _cached(folder, _size(10_000), layers=layers)
        if SHORT and layers is None:
            layers = range(3)
        return {
            **_timed(lambda: attention.train(model, cached, estimand=estimand, layers=layers)), "tokens": len(cached),
            "layers": len(layers or cached.layers),
        }  # fmt: skip


def reference_alone(arm: str) -> dict[str, Any]:
    """Head-tokens a second of one arm, and its KL of one lens that both arms can express."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, cached = _cached(folder, 600 if SHORT else 2048, layers=[LAYER])
        w_o, out = model.bridge.blocks[LAYER].attn.W_O.detach(), output(model)
        z, r = cached.activation(LAYER), cached.r
        if arm == "ours":
            known = targets(out.unembed, None, r[:200])
            y = torch.einsum("thk,hkd->td", z[:200], w_o)
            kl = float(divergence(y, out.unembed, known).mean())
            found = _timed(lambda: attention.train(model, cached, estimand="additive"))
            return {**found, "kl": kl, "rate": len(cached) * model.n_heads / found["wall"], "tokens": len(cached)}
        lenses = nn.ModuleList(nn.Linear(model.d_model, model.d_vocab) for _ in w_o)
        for lens in lenses:
            lens.weight.data, lens.bias.data = out.unembed.T.clone(), torch.zeros(model.d_vocab)  # type: ignore[union-attr]
        optimiser = torch.optim.Adam(lenses.parameters(), lr=1e-3)

        def loss(rows: Tensor) -> Tensor:
            logits = torch.stack([lens(z[rows, h] @ w_o[h]) for h, lens in enumerate(lenses)]).sum(0)
            target = (r[rows] @ out.unembed).log_softmax(-1)
            return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

        with torch.no_grad():
            kl = float(loss(torch.arange(200)))
        n_steps = 1 if SHORT else 3

        def run() -> None:
            for _ in range(n_steps):
                for _ in range(10):
                    (loss(torch.randint(len(r), (4,))) / 10).backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=False)

        run()  # Adam's averages are made
        found = _timed(run)
        n = n_steps * 40
        return {**found, "kl": kl, "rate": n * model.n_heads / found["wall"], "tokens": n}


def tuned_alone(arm: str, size: int) -> dict[str, Any]:
    """Tokens a second of tuned lenses of all layers, and the memory above what is there before."""
    with tempfile.TemporaryDirectory() as folder:
        layers = [0, 14, 29] if SHORT else None
        model, cached = _cached(folder, 1024 if SHORT else max(2048, size), site="resid", layers=layers)
        if arm == "ours":
            found = _timed(lambda: tuned.train(model, cached, start="identity", tokens_per_step=size))
            n = len(cached) // size * size
            return {**found, "rate": n / found["wall"], "tokens": n}
        out, chosen = output(model), cached.layers
        lenses = nn.ModuleList(nn.Linear(model.d_model, model.d_model) for _ in chosen)
        for lens in lenses:
            for parameter in lens.parameters():
                nn.init.zeros_(parameter)
        optimiser = torch.optim.Adam(lenses.parameters(), lr=3e-4)
        n = len(cached) // size * size

        def run() -> None:
            for rows in torch.randperm(len(cached))[:n].split(size):
                log_p = (cached.r[rows] @ out.unembed).log_softmax(-1)
                for lens, layer in zip(lenses, chosen, strict=True):
                    h = cached.activation(layer, rows)
                    log_q = out.log_probs(h + lens(h))
                    F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).backward()
                optimiser.step()
                optimiser.zero_grad()

        found = _timed(run)
        return {**found, "rate": n / found["wall"], "tokens": n}


ALONE: dict[str, Callable[[], dict[str, Any]]] = {
    "caching": caching_alone,
    "peak": peak_alone,
    "additive": lambda: _train_alone("additive", None),
    "independent": lambda: _train_alone("independent", [LAYER]),
    "reference ours": lambda: reference_alone("ours"),
    "reference plain": lambda: reference_alone("plain"),
    "tuned ours": lambda: tuned_alone("ours", 512),
    "tuned plain": lambda: tuned_alone("plain", 512),
    "tuned large ours": lambda: tuned_alone("ours", 4096),
    "tuned large plain": lambda: tuned_alone("plain", 4096),
}


# --- cases ---------------------------------------------------------------------------------------------------------


def _row(case: str, value: float, target: float, unit: str, **more: Any) -> dict[str, Any]:
    row = {"case": case, "value": float(f"{value:.4g}"), "target": target, "better": "lower", "unit": unit}
    return {**row, "ours": float(f"{value:.4g}"), "peer": None, "peer_name": None, "parity": None, **more}


def _alone(name: str) -> dict[str, Any]:
    return in_fresh_process(__file__, ["--alone", name, *(["--short"] if SHORT else [])])


def _caching() -> list[dict[str, Any]]:
    found = _alone("caching")
    rows = []
    for clock in ("cpu", "wall"):
        ours, bare = found[f"ours_{clock}"], found[f"bare_{clock}"]
        more = {"ours": ours, "peer": bare, "peer_name": "bare forward passes", "tokens": found["tokens"]}
        rows.append(_row(f"activations of all layers and targets, {clock}", ours / bare, 1.2, "of a forward", **more))
    return [*rows, _row("activations on disk", found["bytes"], 40_000, "bytes a token")]


def _peak() -> list[dict[str, Any]]:
    found = _alone("peak")
    speed = found["flops"] / found["wall"]
    more = {
        "better": "higher", "ours": f"{speed / 1e9:.1f} GFLOP/s", "peer": f"{found['square'] / 1e9:.1f} GFLOP/s",
        "peer_name": "[2048 2048] x [2048 2048]", "tokens": found["tokens"], "torch_threads": found["threads"],
    }  # fmt: skip
    return [_row("additive lenses of 4 layers: share of the machine's speed", speed / found["square"], 0.6, "", **more)]


def _additive() -> list[dict[str, Any]]:
    found = _alone("additive")
    case = f"additive lenses of {found['layers']} layers on {found['tokens']} tokens, one pass"
    more = {"cpu_s": round(found["cpu"], 1), "torch_threads": found["threads"]}
    return [
        _row(case, found["wall"] / 60, 12, "minutes of wall time", **more),
        _row(f"{case}: peak memory of the process", found["peak_mb"], 3072, "MB", above_mb=round(found["above_mb"])),
    ]


def _independent() -> list[dict[str, Any]]:
    found = _alone("independent")
    case = f"independent lenses of one layer on {found['tokens']} tokens, one pass"
    more = {"cpu_s": round(found["cpu"], 1), "torch_threads": found["threads"], "peak_mb": round(found["peak_mb"])}
    return [_row(case, found["wall"] / 60, 6, "minutes of wall time", **more)]


def _against(case: str, peer: str, target: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    ours, plain = _alone(f"{case} ours"), _alone(f"{case} plain")
    more = {"better": "higher", "ours": round(ours["rate"], 1), "peer": round(plain["rate"], 2), "peer_name": peer}
    return ours, plain, {"target": target, **more}


def _reference() -> list[dict[str, Any]]:
    ours, plain, more = _against("reference", "the reference's layout", 6)
    assert abs(ours["kl"] - plain["kl"]) < 1e-3 * plain["kl"], "the two arms measure another KL"
    more |= {"parity": abs(ours["kl"] - plain["kl"]), "memory_mb": [round(x["peak_mb"]) for x in (ours, plain)]}
    ratio = ours["rate"] / plain["rate"]
    return [_row("additive lenses of a layer: head-tokens a second", ratio, more.pop("target"), "times more", **more)]


def _tuned() -> list[dict[str, Any]]:
    ours, plain, more = _against("tuned", "plain autograd, a layer at a time", 2)
    rows = [_row("tuned lenses of all layers: tokens a second", ours["rate"] / plain["rate"], more.pop("target"),
                 "times more", **more)]  # fmt: skip
    return [*rows, _memory(ours, plain, 512)]


def _tuned_large() -> list[dict[str, Any]]:
    ours, plain, _ = _against("tuned large", "", 2)
    return [_memory(ours, plain, 4096)]


def _memory(ours: dict[str, Any], plain: dict[str, Any], size: int) -> dict[str, Any]:
    """Translators, gradients and Adam's averages are in both; what plain autograd adds grows with the step."""
    return _row(
        f"tuned lenses of all layers, {size} tokens a step: memory above the model",
        plain["above_mb"] / ours["above_mb"], 10, "times less", better="higher", ours=round(ours["above_mb"]),
        peer=round(plain["above_mb"]), peer_name="plain autograd, a layer at a time",
    )  # fmt: skip


CASES = {
    "caching": _caching, "peak": _peak, "additive": _additive, "independent": _independent, "reference": _reference,
    "tuned": _tuned, "tuned_large": _tuned_large,
}  # fmt: skip


def main(wanted: Sequence[str]) -> None:
    """Case by case; after each the table is written, and rows of other cases stay."""
    if unknown := set(wanted) - set(CASES):
        raise SystemExit(f"no case is called {sorted(unknown)[0]!r}; there are {', '.join(CASES)}.")
    rows: list[dict[str, Any]] = []
    stored = RESULTS / "lenses.json"
    for name in [name for name in CASES if not wanted or name in wanted]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = rows_with_origin(CASES[name](), model="smollm2-135m")
        if SHORT:
            print(json.dumps(found, indent=1))
            continue
        rows += found
        earlier = json.loads(stored.read_text(encoding="utf-8")) if wanted and stored.is_file() else []
        names = {row["case"] for row in rows}
        report("lenses", [row for row in earlier if row["case"] not in names] + rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(ALONE[sys.argv[2]]()))
    else:
        main([argument for argument in sys.argv[1:] if argument != "--short"])
