"""What does finding a circuit cost, in forward passes, in memory, and against the published algorithms?

    OMP_NUM_THREADS=1 python benchmarks/circuits.py            # everything
    OMP_NUM_THREADS=1 python benchmarks/circuits.py eap        # some cases only; the other rows stay

The unit of cost is a plain forward pass of the wrapped Hugging Face model over the same batch, without gradients, timed
between the repeats. The peer of edge attribution is the algorithm of EAP-IG's code, written on TransformerLens's hooks:
a buffer `[batch pos node d_model]` of differences, filled by hooks on each head's result, and a product with it in a
backward hook on each input. It is timed with gradients of the weights, as the published code has them, and without.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from _measure import RESULTS, in_fresh_process, interleave, median, peak_mb, report, rows_with_origin
from patching import _task as ioi
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

import interp
from interp.circuits import Circuit, Graph
from interp.circuits._ablated import ablated
from interp.circuits._edges import as_weights
from interp.circuits.acdc import acdc
from interp.circuits.eap import eap, eap_ig
from interp.circuits.flow_routes import components
from interp.models import toy
from interp.tasks import Task

N_PAIRS = 16
_DEFAULT = "smollm2-135m"


def _eap(model: interp.Model, steps: int) -> Circuit:
    task = ioi(model, N_PAIRS)
    return eap_ig(model, task, steps=steps) if steps else eap(model, task)


def _cost(steps: int, repeats: int = 5) -> list[dict[str, Any]]:
    """EAP (no steps) or EAP-IG on the default model: forward passes and peak memory; EAP-IG in units of EAP too."""
    model = interp.load(_DEFAULT)
    task = ioi(model, N_PAIRS)
    found: dict[str, Circuit] = {}

    def plain() -> None:
        with torch.no_grad():
            model.bridge.original_model(task.clean)

    arms: dict[str, Callable[[], Any]] = {"forward": plain, "eap": lambda: found.update(eap=eap(model, task))}
    if steps:
        arms["eap_ig"] = lambda: found.update(eap_ig=eap_ig(model, task, steps=steps))
    times = interleave(arms, repeats=repeats, warmups=1)
    name = f"EAP-IG, {steps} points" if steps else "EAP"
    mine = "eap_ig" if steps else "eap"
    case = f"{name}, {found[mine].graph.n_edges} edges, {N_PAIRS} pairs of {task.clean.shape[1]} tokens"
    rows = []
    for clock in ("cpu", "wall"):
        cost = {arm: median(seconds[clock]) for arm, seconds in times.items()}
        unit, peer = ("times EAP", "eap") if steps else ("forward passes", "forward")
        rows.append({
            "case": f"{case}, {clock}", "value": round(cost[mine] / cost[peer], 2),
            "target": 1.2 * steps if steps else 6.0, "better": "lower", "unit": unit, "ours": cost[mine],
            "peer": cost[peer],
            "peer_name": "EAP" if steps else "plain forward pass", "parity": None, "repeats": repeats,
            "forward_passes": round(cost[mine] / cost["forward"], 2),
        })  # fmt: skip
    fresh = in_fresh_process(__file__, ["--memory", str(steps)])
    if not steps:
        rows.append({
            "case": f"{case}, memory", "value": round(fresh["peak_mb"] - fresh["before_mb"], 1),
            "target": 600.0, "better": "lower", "unit": "MB above the loaded model", "ours": fresh["peak_mb"],
            "peer": fresh["before_mb"], "peer_name": "loaded model", "parity": None,
        })  # fmt: skip
    else:
        rows[0]["memory_mb"] = round(fresh["peak_mb"] - fresh["before_mb"], 1)
    return rows


def _memory(steps: int) -> None:
    """In a process of its own: memory after loading and one forward pass, and at the peak."""
    model = interp.load(_DEFAULT)
    task = ioi(model, N_PAIRS)
    with torch.no_grad():
        model.bridge.original_model(task.clean[:1])
    ctypes.CDLL(None).malloc_trim(0)  # what loading used and freed would hide what comes after
    before = peak_mb(lambda: None)
    print(json.dumps({"before_mb": before, "peak_mb": peak_mb(lambda: _eap(model, steps))}))


# ---- the published algorithm


def _gpt2_small(n_pairs: int) -> tuple[interp.Model, HookedTransformer, Task]:
    """A random GPT-2 of the small one's sizes, here and in TransformerLens, and random pairs."""
    config = transformers.GPT2Config(tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if "attn.c_attn.weight" in name:
                    weight.mul_(4)  # else attention is uniform, and queries and keys score next to nothing
    model = interp.models.load(module, tokenizer=toy.tokenizer(64), weights="raw")
    shape = HookedTransformerConfig(
        n_layers=config.n_layer, d_model=config.n_embd, n_ctx=config.n_positions, d_head=config.n_embd // config.n_head,
        n_heads=config.n_head, d_vocab=config.vocab_size, act_fn="gelu_new", normalization_type="LN",
    )  # fmt: skip
    theirs = HookedTransformer(shape)
    theirs.load_state_dict(convert_gpt2_weights(module, shape), strict=False)
    theirs.set_use_attn_result(True)
    theirs.set_use_split_qkv_input(True)
    theirs.set_use_hook_mlp_in(True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (2, n_pairs, 14), generator=generator)
    answers = torch.randint(2, config.vocab_size, (2, n_pairs), generator=generator)
    names = tuple(f"pair {i}" for i in range(n_pairs))
    task = Task("random pairs", names, tokens[0], "random tokens", tokens[1], answers[0], answers[1])
    return model, theirs.eval(), task


def published(model: HookedTransformer, task: Task, steps: int) -> np.ndarray:
    """EAP (no steps), or EAP-IG by its code's grid, on hooks; scores `[dst src]`, the mean over pairs."""
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    width, n_pairs, n_pos = heads + 1, *task.clean.shape
    sources = {"hook_embed": slice(0, 1)}
    inputs: dict[str, tuple[slice, int]] = {}
    for layer in range(layers):
        block, first, row = f"blocks.{layer}", 1 + layer * width, layer * (3 * heads + 1)
        sources[f"{block}.attn.hook_result"] = slice(first, first + heads)
        sources[f"{block}.hook_mlp_out"] = slice(first + heads, first + width)
        for i, kind in enumerate("qkv"):
            inputs[f"{block}.hook_{kind}_input"] = (slice(row + i * heads, row + (i + 1) * heads), first)
        inputs[f"{block}.hook_mlp_in"] = (slice(row + 3 * heads, row + 3 * heads + 1), first + heads)
    inputs[f"blocks.{layers - 1}.hook_resid_post"] = (slice(-1, None), 1 + layers * width)
    difference = torch.zeros(n_pairs, n_pos, 1 + layers * width, model.cfg.d_model)
    scores = torch.zeros(layers * (3 * heads + 1) + 1, difference.shape[2])

    def add(activation: torch.Tensor, hook: Any, sign: int) -> None:
        difference[:, :, sources[hook.name]] += sign * activation.detach().view(n_pairs, n_pos, -1, model.cfg.d_model)

    def receive(gradient: torch.Tensor, hook: Any) -> None:
        rows, before = inputs[hook.name]
        wide = gradient.detach().view(n_pairs, n_pos, -1, model.cfg.d_model)
        scores[rows, :before] += torch.einsum("bpsd,bpvd->vs", difference[:, :, :before], wide)

    with torch.inference_mode():
        model.run_with_hooks(task.corrupt, fwd_hooks=[(name, partial(add, sign=1)) for name in sources])
        start = difference[:, :, 0].clone()
        model.run_with_hooks(task.clean, fwd_hooks=[(name, partial(add, sign=-1)) for name in sources])
    end = start - difference[:, :, 0]
    rows = torch.arange(n_pairs)
    for step in range(max(steps, 1)):

        def between(activation: torch.Tensor, hook: Any, step: int = step) -> torch.Tensor:
            stream = start + step / steps * (end - start) if steps else activation.detach()
            return stream.clone().requires_grad_()

        hooks = [("hook_embed", between)]
        with model.hooks(fwd_hooks=hooks, bwd_hooks=[(name, receive) for name in inputs]):
            last = model(task.clean)[:, -1]
            (last[rows, task.answers] - last[rows, task.wrong]).sum().backward()
        model.zero_grad()
    return scores.numpy() / n_pairs / max(steps, 1)


def _against_published(steps: int, n_pairs: int, repeats: int = 5) -> list[dict[str, Any]]:
    model, theirs, task = _gpt2_small(n_pairs)
    found: dict[str, np.ndarray] = {}

    def peer(weights: bool) -> None:
        theirs.requires_grad_(weights)
        found["peer"] = published(theirs, task, steps)

    def ours() -> None:
        circuit = eap_ig(model, task, steps=steps, grid="code") if steps else eap(model, task)
        found["ours"] = circuit.scores

    times = interleave(
        {"ours": ours, "peer": partial(peer, True), "frozen": partial(peer, False)}, repeats=repeats, warmups=1
    )
    parity = float(np.abs(found["ours"] - found["peer"]).max() / np.abs(found["peer"]).max())
    assert parity < 1e-4, f"scores differ by {parity:.1e} of the largest"
    rows = []
    what = f"EAP-IG, {steps} points" if steps else "EAP"
    for clock in ("cpu", "wall"):
        mine, weights, frozen = (median(times[arm][clock]) for arm in ("ours", "peer", "frozen"))
        rows.append({
            "case": f"{what} against the published algorithm, GPT-2 small's shape, {n_pairs} pairs, {clock}",
            "value": round(weights / mine, 2), "target": 5.0, "better": "higher", "unit": "times faster", "ours": mine,
            "peer": weights, "peer_name": "EAP-IG's algorithm on TransformerLens hooks", "parity": parity,
            "peer_without_weight_gradients": frozen, "value_without_weight_gradients": round(frozen / mine, 2),
            "repeats": repeats, "model": "random GPT-2 of the small one's sizes",
        })  # fmt: skip
    return rows


# ---- ACDC


def _random_gpt2(n_pairs: int) -> tuple[interp.Model, Task]:
    """A random GPT-2 of four layers, and pairs without a token in common."""
    config = transformers.GPT2Config(n_layer=4, n_head=8, n_embd=256, vocab_size=1024, n_positions=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if name.endswith("weight") and "attn" in name or "mlp" in name and name.endswith("weight"):
                    weight.mul_(3)  # else all edges but the last are next to nothing
    model = interp.models.load(module, tokenizer=toy.tokenizer(64), weights="raw")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (2, n_pairs, 14), generator=generator)
    answers = torch.randint(2, config.vocab_size, (2, n_pairs), generator=generator)
    names = tuple(f"pair {i}" for i in range(n_pairs))
    return model, Task("random pairs", names, tokens[0], "random tokens", tokens[1], answers[0], answers[1])


@torch.no_grad()
def sequential(model: interp.Model, task: Task, start: Circuit, tau: float, metric: str) -> tuple[np.ndarray, int]:
    """Plain ACDC: the edges that stay, and the tests, each one whole forward pass with weighted edges.

    Edges into nodes that nothing reads any more are cut without a test, as in the authors' code.
    """
    run = ablated(model, task, start.graph, metric=metric).run(slice(None))
    kept, n_tests = start.kept.copy(), 0

    def value() -> float:
        return float(run.forward(as_weights(kept[None], task.clean))[0].double().mean())

    current = value()
    for row in reversed(range(len(kept))):
        if start.graph.destinations[row].nodes and not kept[:, start.graph.of_node[row]].any():
            kept[row] = False
        for source in np.flatnonzero(kept[row])[::-1]:
            kept[row, source] = False
            new, n_tests = value(), n_tests + 1
            if (new - current if metric == "kl" else abs(new - current)) < tau:
                current = new
            else:
                kept[row, source] = True
    return kept, n_tests


def _acdc(
    model: interp.Model, task: Task, start: Circuit, tau: float, metric: str, name: str, label: str
) -> list[dict[str, Any]]:
    """FLOPs of ACDC against as many bare forward passes as plain ACDC has tests, and its time; the same circuit."""
    seconds = {}
    begun = time.process_time()
    found = acdc(model, task, tau=tau, start=start, metric=metric, absolute=metric != "kl")
    seconds["ours"], begun = time.process_time() - begun, time.process_time()
    kept, n_tests = sequential(model, task, start, tau, metric)
    seconds["peer"] = time.process_time() - begun
    assert (found.kept == kept).all(), f"{(found.kept != kept).sum()} edges differ from plain ACDC's"
    meta = found.meta
    print(
        f"{name}: {len(found)} of {len(start)} edges stay at tau {tau}; plain ACDC: {n_tests} forward passes; here "
        f"{meta['n_cells']} parts, worth {meta['flops'] / meta['plain_flops'] * meta['n_tests']:.0f} forward passes"
    )
    case = f"ACDC, {name}, {len(start)} edges to {len(found)}, {len(task)} pairs of {task.clean.shape[1]} tokens"
    shared = {"better": "higher", "parity": 0.0, "model": label, "n_tests": n_tests, "n_parts": meta["n_cells"]}
    return [
        {"case": f"{case}, FLOPs", "value": round(meta["plain_flops"] / meta["flops"], 1), "target": 4.0,
         "unit": "times fewer", "ours": meta["flops"], "peer": meta["plain_flops"],
         "peer_name": "a bare forward pass a test", **shared},
        {"case": f"{case}, cpu", "value": round(seconds["peer"] / seconds["ours"], 1), "target": 4.0,
         "unit": "times faster", "ours": seconds["ours"], "peer": seconds["peer"],
         "peer_name": "plain ACDC, a pass with weighted edges a test", **shared, "repeats": 1},
    ]  # fmt: skip


def _acdc_random() -> list[dict[str, Any]]:
    model, task = _random_gpt2(4)
    graph = Graph.of(model)
    start = Circuit.of(graph, graph.possible * 1.0, unit="none")
    label = "random GPT-2, 4 layers x 8 heads, d_model 256"
    return _acdc(model, task, start, 3e-4, "kl", "random GPT-2 of 4 layers, all edges", label)


def _acdc_default() -> list[dict[str, Any]]:
    model = interp.load(_DEFAULT)
    task = ioi(model, 4)
    return _acdc(model, task, eap(model, task).top(300), 0.02, "logit_diff", "IOI from EAP's best edges", _DEFAULT)


# ---- growth


def _random_llama(n_layers: int, n_pos: int, n: int = 8) -> tuple[interp.Model, Task]:
    """A random Llama with keys and values in groups, and pairs without a token in common."""
    config = transformers.LlamaConfig(
        num_hidden_layers=n_layers, hidden_size=256, num_attention_heads=8, num_key_value_heads=4, vocab_size=1024,
        intermediate_size=768, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = interp.models.load(module, tokenizer=toy.tokenizer(64), weights="raw")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (2, n, n_pos), generator=generator)
    answers = torch.randint(2, config.vocab_size, (2, n), generator=generator)
    names = tuple(f"pair {i}" for i in range(n))
    return model, Task("random pairs", names, tokens[0], "random tokens", tokens[1], answers[0], answers[1])


def _growth() -> list[dict[str, Any]]:
    """How the time grows with layers, edges and tokens: slopes of log time against log size."""
    layers, positions = (4, 8, 16, 32), (8, 16, 32)
    sized = {f"{n} layers": _random_llama(n, 16) for n in layers}
    sized |= {f"{n} tokens": _random_llama(8, n) for n in positions}
    times = interleave({name: partial(eap, *made) for name, made in sized.items()})
    seconds = {name: median(found["cpu"]) for name, found in times.items()}
    edges = [Graph.of(sized[f"{n} layers"][0]).n_edges for n in layers]
    by_layer, by_token = (
        [seconds[f"{n} {what}"] for n in of] for of, what in ((layers, "layers"), (positions, "tokens"))
    )
    routed = {str(n): interp.tasks.text(interp.load(_DEFAULT), n_prompts=1, length=n) for n in (32, 64, 128)}
    model = interp.load(_DEFAULT)
    flow = interleave({name: partial(components, model, task) for name, task in routed.items()}, repeats=3, warmups=1)
    by_length = [median(flow[name]["cpu"]) for name in routed]
    fits = (
        ("EAP with layers", layers, by_layer, 2, "the passes grow as layers, the scores as their square"),
        ("EAP with edges", edges, by_layer, 1, "edges grow as the square of layers"),
        ("EAP with tokens", positions, by_token, 1, "expected 1"),
        ("flow routes with tokens", tuple(map(int, routed)), by_length, 2, "pairs of tokens"),
    )
    return [
        {
            "case": f"growth of {what} {tuple(sizes)}, cpu", "target": expected + 0.2, "better": "lower",
            "value": round(float(np.polyfit(np.log(sizes), np.log(spent), 1)[0]), 2), "unit": "exponent", "ours": spent,
            "peer": None, "peer_name": why, "parity": None, "model": "random Llama" if "EAP" in what else _DEFAULT,
        }
        for what, sizes, spent, expected, why in fits
    ]  # fmt: skip


def _cases() -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """By name, a function that measures and returns rows."""
    return {
        "eap": partial(_cost, 0),
        "eap_ig": partial(_cost, 5),
        "published_eap": partial(_against_published, 0, 8),
        "published_eap_ig": partial(_against_published, 5, 4),
        "acdc_random": _acdc_random,
        "acdc": _acdc_default,
        "growth": _growth,
    }


def main(wanted: Sequence[str]) -> None:
    """Case by case; rows are stored after each, so that a run that is stopped has not been for nothing."""
    if wanted[:1] == ["--memory"]:
        _memory(int(wanted[1]))
        return
    stored = RESULTS / "circuits.json"
    cases = _cases()
    rows: list[dict[str, Any]] = []
    for name in wanted or cases:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for row in cases[name]():
            rows += rows_with_origin([row], model=row.get("model", _DEFAULT))
        earlier = json.loads(stored.read_text(encoding="utf-8")) if wanted and stored.is_file() else []
        names = {row["case"] for row in rows}
        report("circuits", [row for row in earlier if row["case"] not in names] + rows)


if __name__ == "__main__":
    main(sys.argv[1:])
