"""What does reading a whole model's heads from its weights cost, and how near is it to what the machine could do?

    OMP_NUM_THREADS=1 python benchmarks/maps.py                  # everything, about 9 minutes
    OMP_NUM_THREADS=1 python benchmarks/maps.py scores saliency  # some cases only; the other rows stay

Each case runs in a process of its own: its processor time is that of the call alone, its peak memory counts from the
call's start. The peer is the published procedure written plainly: for each relation and head the d_model x d_model
map, its product with the effective embedding and the unembedding for the whole relation at once, and two `topk`. The
speed of the machine is measured in the same process, on a large square product and on one as thin as a head's map.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from _measure import RESULTS, in_fresh_process, interleave, median, peak_mb, report, rows_with_origin

import interp
from interp.models import Model, toy
from interp.tasks import Relation, Relations
from interp.weights import maps, salient

#: Ours that are nearest to the paper's relations, with all their pairs, and the layer that both arms read.
REFERENCE_RELATIONS = [
    "copying", "name_copying", "first_letter", "last_letter", "country_capital", "country_language",
    "object_superclass", "occupation_workplace", "antonym", "comparative", "superlative", "past_tense", "noun_pronoun",
    "synonym", "homophone", "compound",
]  # fmt: skip
REFERENCE_LAYERS = [23]
ATLAS_HEAD = (23, 4)

# malloc.h: blocks of this size and more are given back when they are freed.
_M_MMAP_THRESHOLD = -3


def _flops_a_second(rows: int, inner: int, columns: int, repeats: int = 7) -> float:
    """Multiplications and additions a second of processor time in a float32 product of that shape: the median."""
    one, other, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    seconds = []
    for turn in range(repeats + 2):
        start = time.process_time()
        torch.mm(one, other, out=out)
        if turn >= 2:
            seconds.append(time.process_time() - start)
    return 2.0 * rows * inner * columns / statistics.median(seconds)


def _settled_mb() -> float:
    """What is resident now, after what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


@contextlib.contextmanager
def _from_the_start() -> Iterator[None]:
    """Sweeps are stored while they run: a measured one must not go on where an earlier one was stopped."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, INTERP_CACHE=folder):
        yield


def _measured(function: Callable[[], Any]) -> dict[str, float]:
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the library's own buffers
    with _from_the_start():
        before, start = _settled_mb(), time.process_time()
        peak = peak_mb(function)
        return {"cpu": time.process_time() - start, "peak_mb": peak, "above_mb": peak - before}


def _smol() -> Model:
    return interp.load("smollm2-135m", weights="raw")


def _planned_mb(found: Any) -> float:
    return found.filter(component="peak").table["value"].item() / 2**20


# --- in a process of its own ---------------------------------------------------------------------------------------


def scores_alone() -> dict[str, Any]:
    """All heads, all relations."""
    model = _smol()
    relations = interp.tasks.relations(model)
    planned = maps.plan(model, relations)
    found = _measured(lambda: maps.relation_scores(model, relations))
    square, thin = _flops_a_second(2048, 2048, 2048), _flops_a_second(1024, model.d_head, model.d_vocab)
    return {
        **found, "planned_mb": _planned_mb(planned), "flops": planned.meta["flops"], "square": square, "thin": thin,
        "relations": len(relations), "pairs": sum(map(len, relations)), "sources": planned.meta["n_sources"],
    }  # fmt: skip


def saliency_alone() -> dict[str, Any]:
    """All tokens, all heads."""
    model = _smol()
    return _measured(lambda: salient.saliency(model))


def atlas_alone() -> dict[str, Any]:
    """The ten largest entries of every row of one head's map."""
    model = _smol()
    return _measured(lambda: salient.atlas(model, [ATLAS_HEAD], k=10))


def llama_alone() -> dict[str, Any]:
    """One layer above the first of a random bfloat16 model of Llama 3.1 8B's shape, on 200 sources."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.uniform_(-0.03, 0.03, generator=generator)
    module.model.rotary_emb = type(module.model.rotary_emb)(config)
    model = interp.load(module.eval(), tokenizer=toy.tokenizer(config.vocab_size), weights="raw", dtype="bfloat16")
    del module
    words = np.random.default_rng(0).choice(np.arange(2, model.d_vocab), (200, 2), replace=False)
    random = Relation.from_pairs(model, "random", [(f"w{a}", f"w{b}") for a, b in words])
    relations = Relations((random,))
    sizes = maps.Sizes.of(model)
    planned = maps.plan(sizes, relations)
    whole = maps.plan(sizes._replace(n_layers=32), relations)
    retained = _measured(lambda: maps.relation_scores(model, relations, layers=[1]))
    # What is freed goes back to the system at once, so that what is resident is what is in use.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    found = _measured(lambda: maps.relation_scores(model, relations, layers=[1]))
    return {
        **found, "retained_mb": retained["above_mb"], "planned_mb": _planned_mb(planned),
        "planned_whole_mb": _planned_mb(whole), "whole_model_mb": whole.meta["model_bytes"] / 2**20,
    }  # fmt: skip


def reference_alone(arm: str) -> dict[str, Any]:
    """Memory of one arm on the reference's subset."""
    model, relations = _reference_setup()
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: maps.relation_scores(model, relations, layers=REFERENCE_LAYERS),
        "plain": lambda: plain_hits(model, relations, REFERENCE_LAYERS),
    }
    return _measured(arms[arm])


ALONE: dict[str, Callable[[], dict[str, Any]]] = {
    "scores": scores_alone,
    "saliency": saliency_alone,
    "atlas": atlas_alone,
    "llama": llama_alone,
    "ours": lambda: reference_alone("ours"),
    "plain": lambda: reference_alone("plain"),
}


# --- the published procedure ---------------------------------------------------------------------------------------


def _reference_setup() -> tuple[Model, Relations]:
    model = _smol()
    return model, interp.tasks.relations(model, REFERENCE_RELATIONS)


@torch.no_grad()
def plain_hits(model: Model, relations: Relations, layers: Sequence[int]) -> np.ndarray:
    """Whether each target is among the k largest, and the k smallest, of its source's row.

    Args:
        model: raw weights.
        relations: each is one batch, with a source as often as it has pairs.
        layers: which.

    Returns:
        `[sign pair layer head]`.
    """
    bridge, per_group = model.bridge, model.n_heads // model.n_key_value_heads
    w_u, first = bridge.unembed.W_U, bridge.blocks[0]
    hits = []
    for relation in relations:
        k = maps.paper_k(model.name, relation)
        raw = bridge.embed.W_E[relation.source_ids]
        effective = first.mlp(first.ln2(raw[None]))[0]
        own = torch.zeros(2, len(relation), len(layers), model.n_heads, dtype=torch.bool)
        for at, layer in enumerate(layers):
            attention = bridge.blocks[layer].attn
            w_v, w_o = attention.W_V, attention.W_O
            w_v = w_v[:: len(w_v) // model.n_key_value_heads]
            for head in range(model.n_heads):
                w_vo = w_v[head // per_group] @ w_o[head]
                entries = (raw if layer == 0 else effective) @ w_vo @ w_u
                for sign, projected in enumerate((entries, -entries)):
                    top = projected.topk(k, dim=1).indices
                    own[sign, :, at, head] = (top == relation.target_ids[:, None]).any(1)
        hits.append(own)
    return torch.cat(hits, 1).numpy()


# --- cases ---------------------------------------------------------------------------------------------------------


def _row(case: str, value: float, target: float, unit: str, **more: Any) -> dict[str, Any]:
    row = {"case": case, "value": float(f"{value:.4g}"), "target": target, "better": "lower", "unit": unit}
    return {**row, "ours": float(f"{value:.4g}"), "peer": None, "peer_name": None, "parity": None, **more}


def _alone(name: str) -> dict[str, Any]:
    return in_fresh_process(__file__, ["--alone", name])


def _scores() -> list[dict[str, Any]]:
    found = _alone("scores")
    sizes = {name: found[name] for name in ("relations", "pairs", "sources")}
    speed = found["flops"] / found["cpu"]
    shares = [
        _row(
            f"all heads, all relations: share of the speed of {shape}", speed / found[name], 0.5, "of its FLOP/s",
            better="higher", ours=f"{speed / 1e9:.1f} GFLOP/s", peer=f"{found[name] / 1e9:.1f} GFLOP/s",
            peer_name=shape,
        )
        for name, shape in (("square", "[2048 2048] x [2048 2048]"), ("thin", "[1024 64] x [64 49152]"))
    ]  # fmt: skip
    return [
        _row("all heads, all relations, cpu", found["cpu"], 120, "seconds", flops=found["flops"], **sizes),
        _row(
            "all heads, all relations, peak memory of the process", found["peak_mb"], 1500, "MB, the model included",
            above_the_model_mb=round(found["above_mb"], 1), planned_mb=round(found["planned_mb"], 1),
        ),
        *shares,
    ]  # fmt: skip


def _reference() -> list[dict[str, Any]]:
    model, relations = _reference_setup()
    ks = {relation.name: maps.paper_k(model.name, relation) for relation in relations}
    stored: dict[str, Any] = {}
    arms = {
        "ours": lambda: stored.update(ours=maps.relation_scores(model, relations, layers=REFERENCE_LAYERS)),
        "plain": lambda: stored.update(plain=plain_hits(model, relations, REFERENCE_LAYERS)),
    }
    with _from_the_start():
        times = interleave(arms, repeats=2, warmups=0)
    arrays = stored["ours"].arrays
    k = np.array([ks[name] for name in relations.names])[arrays["relation"][1]][:, None, None]
    ranked = np.stack([arrays["rank"][1], arrays["rank_suppressed"][1]])
    # Where they differ the target must be in place k, give or take one: equal to its neighbour up to rounding.
    differ = (ranked < k) != stored["plain"]
    assert (np.abs(ranked - k + 0.5) <= 1.5)[differ].all(), "a hit differs that is no tie"
    assert differ.mean() < 1e-5, f"{differ.sum()} hits differ"
    which = arrays["relation"][1]
    scores = [
        np.stack([hits[:, which == i].mean(1) for i in range(len(relations))]) for hits in (ranked < k, stored["plain"])
    ]
    parity = float(np.abs(scores[0] - scores[1]).max())
    memory = {arm: _alone(arm)["above_mb"] for arm in arms}
    shared = {
        "better": "higher", "peer_name": "the published procedure, plainly", "parity": parity,
        "hits_that_differ": int(differ.sum()), "hits": int(differ.size), "relations": len(relations),
        "pairs": sum(map(len, relations)), "layers": REFERENCE_LAYERS,
    }  # fmt: skip
    rows = []
    for clock in ("cpu", "wall"):
        ours, plain = (median(times[arm][clock]) for arm in ("ours", "plain"))
        more = {**shared, "ours": ours, "peer": plain, "repeats": 2}
        rows.append(_row(f"16 relations, 1 layer, {clock}", plain / ours, 5, "times faster", **more))
    more = {**shared, "ours": round(memory["ours"], 1), "peer": round(memory["plain"], 1)}
    ratio = memory["plain"] / memory["ours"]
    return [*rows, _row("16 relations, 1 layer, memory above the model", ratio, 5, "times less", **more)]


def _saliency() -> list[dict[str, Any]]:
    found = _alone("saliency")
    more = {"peak_mb": round(found["peak_mb"]), "above_the_model_mb": round(found["above_mb"])}
    return [_row("saliency of all tokens for all heads, cpu", found["cpu"], 40, "seconds", **more)]


def _atlas() -> list[dict[str, Any]]:
    found = _alone("atlas")
    more = {"peak_mb": round(found["peak_mb"]), "above_the_model_mb": round(found["above_mb"])}
    return [_row("atlas of one head, ten targets for every token, cpu", found["cpu"], 15, "seconds", **more)]


def _llama() -> list[dict[str, Any]]:
    found = _alone("llama")
    note = (
        "Random weights, 2 layers, the second scored. Layers are read one at a time: of the plan only the stored ranks "
        f"grow with their number, to {found['planned_whole_mb']:.1f} MB in all for 32, beside a model of "
        f"{found['whole_model_mb'] / 1024:.1f} GB. The C library's allocator keeps some of what was freed."
    )
    return [
        _row(
            f"Llama 3.1 8B's shape in bfloat16, 200 sources: memory above the model{more}, over the plan's",
            above / found["planned_mb"], 1.0, "ratio", ours=f"{above:.1f} MB", peer=f"{found['planned_mb']:.1f} MB",
            peer_name="maps.plan", cpu_s=round(found["cpu"], 1), note=note,
        )
        for above, more in (
            (found["above_mb"], " that is in use"),
            (found["retained_mb"], ", with what the allocator keeps"),
        )
    ]  # fmt: skip


CASES = {"scores": _scores, "reference": _reference, "saliency": _saliency, "atlas": _atlas, "llama": _llama}


def main(wanted: Sequence[str]) -> None:
    """Case by case; after each the table is written, and rows of other cases stay."""
    if unknown := set(wanted) - set(CASES):
        raise SystemExit(f"no case is called {sorted(unknown)[0]!r}; there are {', '.join(CASES)}.")
    rows: list[dict[str, Any]] = []
    stored = RESULTS / "maps.json"
    for name in [name for name in CASES if not wanted or name in wanted]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        model = "random, Llama 3.1 8B's shape, 2 layers" if name == "llama" else "smollm2-135m"
        rows += rows_with_origin(CASES[name](), model=model)
        earlier = json.loads(stored.read_text(encoding="utf-8")) if wanted and stored.is_file() else []
        names = {row["case"] for row in rows}
        report("maps", [row for row in earlier if row["case"] not in names] + rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(ALONE[sys.argv[2]]()))
    else:
        main(sys.argv[1:])
