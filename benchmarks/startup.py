"""How long until the first question? `import interp`, and loading the default model from the cache.

    python benchmarks/startup.py

The peer of `load` is what a TransformerLens user writes: boot a bridge on the same folder and process its weights.
"""

from __future__ import annotations

import json
import sys
import time

from _measure import in_fresh_process, median, report, rows_with_origin


def _load(arm: str) -> None:
    import torch
    import transformers  # noqa: F401
    from transformer_lens.model_bridge import TransformerBridge

    from interp.models import packaged

    folder = str(packaged.folder_of("smollm2-135m") / "raw")
    tokens = torch.arange(5, 21)[None]
    start = time.process_time()
    if arm == "ours":
        import interp

        model = interp.load("smollm2-135m")
        seconds = time.process_time() - start
        logits = model(tokens)
    else:
        bridge = TransformerBridge.boot_transformers(folder, device="cpu")
        bridge.enable_compatibility_mode(disable_warnings=True)
        seconds = time.process_time() - start
        with torch.no_grad():
            logits = bridge(tokens)
    print(json.dumps({"seconds": seconds, "top": logits[0].log_softmax(-1)[:, :50].double().tolist()}))


def main() -> None:
    """Measure, five fresh processes each, interleaved."""
    imports = {"ours": [], "peer": []}
    loads: dict[str, list[float]] = {"ours": [], "peer": []}
    top = {}
    for _ in range(5):
        imports["peer"].append(in_fresh_process("-c", ["pass"])["cpu_s"])
        imports["ours"].append(in_fresh_process("-c", ["import interp"])["cpu_s"])
        for arm in ("ours", "peer"):
            found = in_fresh_process(__file__, [arm])
            loads[arm].append(found["seconds"])
            top[arm] = found["top"]
    parity = max(abs(a - b) for x, y in zip(top["ours"], top["peer"], strict=True) for a, b in zip(x, y, strict=True))
    ours, bare = median(imports["ours"]), median(imports["peer"])
    load, peer = median(loads["ours"]), median(loads["peer"])
    base = {"better": "lower", "parity": None}
    rows = [
        {"case": "import interp, beyond a bare interpreter", "value": round(ours - bare, 3), "target": 0.15,
         "unit": "s CPU", "ours": ours, "peer": bare, "peer_name": "python -c pass", **base},
        {"case": "load default model, beyond imports", "value": load, "target": 3.0, "unit": "s CPU", "ours": load,
         "peer": peer, "peer_name": "TransformerBridge boot + enable_compatibility_mode", **base, "parity": parity},
    ]  # fmt: skip
    report("startup", rows_with_origin(rows, model="smollm2-135m"))


if __name__ == "__main__":
    _load(sys.argv[1]) if len(sys.argv) > 1 else main()
