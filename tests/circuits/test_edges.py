"""Forward passes with a weight an edge: against loops over nodes and edges, edits of one input, and whole nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits._ablated import ABLATIONS, ablated, metric_of
from interp.circuits._edges import as_weights, cells_at_once, prepare, written
from interp.circuits.graph import Graph
from interp.core.edits import Edit
from interp.core.readout import readout
from interp.core.rerun import rerun
from interp.models import load, run, toy
from interp.models.program import program
from interp.patching import activation
from interp.tasks.task import Task

ARCHITECTURES = (*toy.ARCHITECTURES, "qwen3", "phi")
SHARED = 3
# Sums of a few hundred float32 products in another order, through three layers of large random weights.
CLOSE = 2e-4


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = toy.random(architecture)
        return made[architecture]

    return get


def pairs(model, n=4, length=9, *, shared=SHARED, padded=False):
    """Random pairs that agree in their first tokens; padded, every second one is two tokens shorter."""
    tokens = toy.random_tokens(model, 2 * n, length)
    clean, corrupt = tokens[:n], tokens[n:].clone()
    corrupt[:, :shared] = clean[:, :shared]
    end, mask = torch.full((n,), length - 1), None
    if padded:
        clean, corrupt = (torch.cat([torch.ones(n, 2, dtype=torch.long), each], 1) for each in (clean, corrupt))
        mask = torch.ones_like(clean)
        mask[::2, :2] = 0
        mask[1::2, :] = 1
        end = end + 2
    answers = 2 + torch.arange(n) % 30
    names = tuple(f"prompt {i}" for i in range(n))
    task = Task("pairs", names, clean, "random", corrupt, answers, answers + 30, {"end": end}, mask)
    read = readout(model, task)
    with torch.no_grad():
        apart = read.of(run(model, clean, mask=mask).logits) - read.of(run(model, corrupt, mask=mask).logits)
    # The answer is the token that the clean prompt favours more.
    return replace(task, answers=answers + 30 * (apart < 0), wrong=answers + 30 * (apart >= 0))


def random_sets(graph, n_cells, *, share=0.5, seed=0):
    draw = np.random.default_rng(seed).random((n_cells, *graph.possible.shape))
    return (draw < share) & graph.possible


def metrics(model, task, graph, kept, *, metric="logit_diff", ablation="corrupt"):
    made = ablated(model, task, graph, metric=metric, ablation=ablation)
    with torch.no_grad():
        return made.run(slice(None)).forward(as_weights(kept, task.clean))[0]


def slow(model, task, graph, kept, off, metric="logit_diff", counted=None):
    """One set of edges, node by node: every input is the off stream plus what its own edges bring, in a loop.

    Where positions `counted` are given, every edge is in at the others.
    """
    steps = program(model)
    frame = steps.frame(task.clean, task.mask)
    per_group = steps.n_heads // steps.n_key_value_heads
    embed = steps.embed(task.clean, task.mask)

    def bias(layer):
        return steps.attn_out(layer, torch.zeros_like(off.z[layer]))

    def changes_into(name):
        row = graph.destination_index[name]
        total = torch.zeros_like(embed)
        for source, change in delta.items():
            if kept[row, graph.source_index[source]]:
                total = total + change
            elif counted is not None:
                total = total + change * ~counted[..., None]
        return total

    delta = {"input": embed - off.embed}
    stream = off.embed
    letter = "h" if graph.n_key_value_heads == steps.n_heads else "g"
    share = steps.n_heads // graph.n_key_value_heads
    for layer in range(graph.n_layers):
        modules, new = steps.layers[layer], {}
        for h in range(steps.n_heads):
            own = [f"a{layer}.h{h}<q>", *(f"a{layer}.{letter}{h // share}<{kind}>" for kind in "kv")]
            q, k, v = (modules.ln1(stream + changes_into(name)) for name in own)
            q = steps.rotated_q(layer, steps.queries(layer, q), frame.rotary)[:, :, h]
            k = steps.rotated_k(layer, steps.keys(layer, k), frame.rotary)[:, :, h // per_group]
            v = steps.values(layer, v)[:, :, h // per_group]
            scores = (q @ k.transpose(1, 2) * steps.scale).masked_fill(~steps.allowed(layer, frame), float("-inf"))
            z = scores.softmax(-1) @ v
            new[f"a{layer}.h{h}"] = (z - off.z[layer][:, :, h]) @ steps.w_o(layer)[h]
        middle = stream + bias(layer) + sum(off.z[layer][:, :, h] @ steps.w_o(layer)[h] for h in range(steps.n_heads))
        if not steps.parallel:
            delta.update(new)
        base = stream if steps.parallel else middle
        mlp = steps.mlp_out(layer, steps.post(layer, base + changes_into(f"m{layer}")))
        delta.update(new)
        delta[f"m{layer}"] = mlp - off.mlp[layer]
        stream = middle + off.mlp[layer]
    return readout(model, task, metric).of(steps.logits(stream + changes_into("logits")))


def off_of(model, task, ablation):
    """What the off run writes, made anew with hooks."""
    if ablation == "corrupt":
        return written(program(model), task.corrupt, task.mask)
    seen = written(program(model), task.clean, task.mask)
    if ablation == "zero":
        return seen.map(torch.zeros_like)
    axes = (0,) if ablation == "position_mean" else (0, 1)
    return seen.map(lambda each: each.mean(axes, keepdim=True).expand_as(each))


@torch.no_grad()
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_edges_equal_loops(models, architecture, grouped):
    model = models(architecture)
    task, graph = pairs(model), Graph.of(model, grouped=grouped)
    kept = random_sets(graph, 3)
    got = metrics(model, task, graph, kept)
    want = torch.stack([slow(model, task, graph, each, off_of(model, task, "corrupt")) for each in kept])
    assert torch.allclose(got, want, atol=CLOSE)
    assert (want - want[0]).abs().amax() > 100 * CLOSE  # the sets differ in what they say


@torch.no_grad()
@pytest.mark.parametrize("ablation", [name for name in ABLATIONS if name != "resample"])
def test_every_off_run_equals_loops(models, ablation):
    model = models("gpt2")
    task, graph = pairs(model, shared=0), Graph.of(model)
    kept = random_sets(graph, 2)
    got = metrics(model, task, graph, kept, ablation=ablation, metric="kl")
    off = off_of(model, task, ablation)
    want = torch.stack([slow(model, task, graph, each, off, "kl") for each in kept])
    assert torch.allclose(got, want, atol=CLOSE)


def at(model, task, graph, kept, positions, **options):
    made = ablated(model, task, graph, positions=positions, **options)
    with torch.no_grad():
        return made.run(slice(None)).forward(as_weights(kept, task.clean))[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "positions", "options"),
    [
        ("llama", ["end", 4], {}),
        ("gpt2", "early", {"metric": "kl"}),
        ("gpt_neox", [5, "early"], {}),
        ("phi", ["end"], {}),
        ("gemma", [-2, 3], {"ablation": "zero"}),
        ("mistral", ["early", "end"], {"ablation": "mean"}),
    ],
)
def test_edges_at_some_positions_equal_loops(models, architecture, positions, options):
    model = models(architecture)
    task = pairs(model, padded=True, shared=0 if options.get("ablation") else SHARED)
    if options.get("ablation"):
        task = replace(task, mask=None)
    task = replace(task, positions={**task.positions, "early": torch.tensor([7, 5, 6, 8])})
    graph = Graph.of(model)
    kept = random_sets(graph, 3, share=0.3)
    counted = torch.zeros_like(task.clean, dtype=torch.bool)
    for each in positions if isinstance(positions, list) else [positions]:
        for row in range(len(task)):
            counted[row, task.positions[each][row] if isinstance(each, str) else each] = True
    off = off_of(model, task, options.get("ablation", "corrupt"))
    got = at(model, task, graph, kept, positions, **options)
    metric = options.get("metric", "logit_diff")
    want = torch.stack([slow(model, task, graph, each, off, metric, counted) for each in kept])
    assert torch.allclose(got, want, atol=CLOSE)
    assert (want - metrics(model, task, graph, kept, **options)).abs().max() > 100 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_all_positions_are_no_positions(models, architecture):
    model = models(architecture)
    task, graph = pairs(model), Graph.of(model)
    kept = random_sets(graph, 3)
    assert torch.equal(at(model, task, graph, kept, list(range(9))), metrics(model, task, graph, kept))
    # Before the first token that differs there is nothing to cut.
    full = metrics(model, task, graph, graph.possible[None]).expand(3, -1)
    assert torch.allclose(at(model, task, graph, kept, [0, SHARED - 1]), full, atol=CLOSE)


@torch.no_grad()
def test_going_on_and_a_computed_prefix_are_the_same_at_some_positions(models):
    model = models("llama")
    task, graph, steps = pairs(model, shared=5), Graph.of(model), program(model)
    read, kept = readout(model, task), random_sets(graph, 3)
    counted = torch.zeros_like(task.clean, dtype=torch.bool)
    counted[:, 6] = counted[:, -1] = True
    short = prepare(steps, graph, task.clean, None, task.corrupt, read, counted)
    whole = prepare(steps, graph, task.clean, None, written(steps, task.corrupt, None), read, counted)
    weights = as_weights(kept, task.clean)
    want, changes = short.forward(weights)
    assert torch.allclose(want, whole.forward(weights)[0], atol=CLOSE)
    assert torch.allclose(short.forward(weights, first=2, known=changes[:2])[0], want, atol=CLOSE)


def test_positions_that_a_task_has_not_are_refused(models):
    model = models("llama")
    task, graph = pairs(model), Graph.of(model)
    for positions, message in (("nowhere", "no position 'nowhere'"), ([], "no positions were given"), (9, "outside")):
        with pytest.raises(ValueError, match=message):
            ablated(model, task, graph, positions=positions)


@torch.no_grad()
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_edges_are_the_model_and_none_the_off_run(models, architecture, grouped):
    model = models(architecture)
    task, graph = pairs(model, padded=True), Graph.of(model, grouped=grouped)
    kept = np.stack([graph.possible, np.zeros_like(graph.possible)])
    got = metrics(model, task, graph, kept)
    read = readout(model, task)
    for each, tokens in zip(got, (task.clean, task.corrupt), strict=True):
        assert torch.allclose(each, read.of(run(model, tokens, mask=task.mask).logits), atol=CLOSE)


@torch.no_grad()
def test_resampled_prompts_are_the_off_run(models):
    model = models("llama")
    task, graph = pairs(model, shared=0), Graph.of(model)
    made = ablated(model, task, graph, ablation="resample", seed=3)
    assert made.source.tokens is not None
    assert not torch.equal(made.source.tokens, task.clean)
    none = np.zeros((1, *graph.possible.shape), bool)
    got = made.run(slice(None)).forward(as_weights(none, task.clean))[0][0]
    want = readout(model, task).of(run(model, made.source.tokens).logits)
    assert torch.allclose(got, want, atol=CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_one_edge_cut_is_an_edit_of_what_its_destination_reads(models, architecture):
    model = models(architecture)
    task, graph, steps = pairs(model), Graph.of(model), program(model)
    cut = [("input", "m0"), ("a0.h1", "m1"), ("m0", "a1.h2<q>"), ("a1.h3", "m2"), ("a0.h0", "a2.h1<q>")]
    names = {each.kind: each.name for each in graph.destinations if each.layer == 1 and each.kind in "kv"}
    cut += [("a0.h2", names["k"]), ("input", names["v"])]
    kept = np.repeat(graph.possible[None], len(cut), 0)
    for number, edge in enumerate(cut):
        kept[number][graph.edge(*edge)] = False
    got = metrics(model, task, graph, kept)

    seen, off = (run(model, t, capture=_every(model)).cache for t in (task.clean, task.corrupt))
    for number, (src, dst) in enumerate(cut):
        to = graph.destinations[graph.destination_index[dst]]
        shift = _wrote(steps, seen, src) - _wrote(steps, off, src)
        stream = seen[f"blocks.{to.layer}.hook_resid_pre"]
        if to.kind == "mlp":
            if not steps.parallel:
                stream = stream + seen[f"blocks.{to.layer}.hook_attn_out"]
            value = steps.mlp_out(to.layer, steps.post(to.layer, stream - shift))
            edit = Edit("mlp_out", to.layer, value=value)
        else:
            take = {"q": steps.queries, "k": steps.keys, "v": steps.values}[to.kind]
            value = take(to.layer, steps.layers[to.layer].ln1(stream - shift))[:, :, to.place]
            edit = Edit(to.kind, to.layer, head=to.place, value=value)
        want = rerun(model, task.clean, [[edit]], readout(model, task), exact_path="hooks")[0]
        assert torch.allclose(got[number], want, atol=CLOSE), (src, dst)
        assert (want - metrics(model, task, graph, graph.possible[None])[0]).abs().max() > 10 * CLOSE, (src, dst)


def _every(model):
    names = ("hook_resid_pre", "hook_attn_out", "attn.hook_z", "hook_mlp_out")
    return [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in names]


def _wrote(steps, cache, source):
    if source == "input":
        return cache["blocks.0.hook_resid_pre"]
    layer = int(source[1])
    if source[0] == "m":
        return cache[f"blocks.{layer}.hook_mlp_out"]
    head = int(source[-1])
    return cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ steps.w_o(layer)[head]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_node_without_outgoing_edges_is_a_patched_node(models, architecture):
    model = models(architecture)
    task, graph = pairs(model), Graph.of(model)
    kept = np.repeat(graph.possible[None], len(graph.sources), 0)
    kept[np.arange(len(kept)), :, np.arange(len(kept))] = False
    got = metrics(model, task, graph, kept).double().numpy()
    for site, by, name in (("z", ("layer", "head"), "a{}.h{}"), ("mlp_out", ("layer",), "m{}")):
        table = activation.patch(model, task, site=site, by=by, direction="noising", min_oriented=0.0).table
        for at, rows in table.groupby(list(by)):
            row = graph.source_index[name.format(*at)]
            assert np.allclose(got[row], rows.sort_values("prompt")["value_metric"], atol=CLOSE), at


@torch.no_grad()
def test_grouped_keys_are_expanded_ones_that_agree(models):
    model = models("llama")
    task, small, large = pairs(model), Graph.of(model), Graph.of(model, grouped=False)
    assert len(large.destinations) > len(small.destinations)
    kept = random_sets(small, 2)
    expanded = np.zeros((2, *large.possible.shape), bool)
    for row, each in enumerate(large.destinations):
        name = each.name
        if each.kind in ("k", "v"):
            name = f"a{each.layer}.g{each.place // 2}<{each.kind}>"
        expanded[:, row] = kept[:, small.destination_index[name]]
    assert torch.allclose(metrics(model, task, small, kept), metrics(model, task, large, expanded), atol=CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
def test_one_at_a_time_and_padding_change_nothing(models, architecture):
    model = models(architecture)
    graph = Graph.of(model)
    kept, padded, plain = random_sets(graph, 3), pairs(model, padded=True), pairs(model)
    together = metrics(model, padded, graph, kept)
    for row in range(len(padded)):
        # Prompt 1 and 3 have two tokens more, which are not padding there.
        alone = padded[row : row + 1]
        if row % 2 == 0:
            alone = plain[row : row + 1]
        for cell in range(3):
            one = metrics(model, alone, graph, kept[cell : cell + 1])
            assert torch.allclose(one[0, 0], together[cell, row], atol=CLOSE), (row, cell)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_going_on_from_a_layer_equals_the_whole(models, architecture):
    model = models(architecture)
    task, graph = pairs(model), Graph.of(model)
    made = ablated(model, task, graph).run(slice(None))
    kept = random_sets(graph, 3)
    layers = np.array([each.layer for each in graph.destinations])
    for first in (1, 2, 3):
        kept[:, layers < first] = kept[:1, layers < first]  # the cells differ from that layer on
        weights = as_weights(kept, task.clean)
        want, changes = made.forward(weights)
        got, also = made.forward(weights, first=first, known=[type(c)(c.z[:1], c.mlp[:1]) for c in changes[:first]])
        assert torch.allclose(got, want, atol=CLOSE)
        assert len(also) == graph.n_layers


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gpt_neox"])
def test_the_shared_prefix_may_be_computed_or_not(models, architecture):
    model = models(architecture)
    task, graph, steps = pairs(model, shared=5), Graph.of(model), program(model)
    read, kept = readout(model, task), random_sets(graph, 3)
    short = prepare(steps, graph, task.clean, None, task.corrupt, read)
    whole = prepare(steps, graph, task.clean, None, written(steps, task.corrupt, None), read)
    assert (short.start, whole.start) == (5, 0)
    weights = as_weights(kept, task.clean)
    assert torch.allclose(short.forward(weights)[0], whole.forward(weights)[0], atol=CLOSE)


def test_gradients_equal_finite_differences(models):
    model = models("llama")
    task, graph = pairs(model), Graph.of(model)
    made = ablated(model, task, graph).run(slice(None))
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand((1, *graph.possible.shape), generator=generator) * as_weights(graph.possible[None], task.clean)
    weights.requires_grad_(True)
    (gradient,) = torch.autograd.grad(made.forward(weights)[0].sum(), weights)
    assert not bool(gradient[0][~torch.as_tensor(graph.possible)].any())
    strongest = gradient[0].abs().flatten().topk(12).indices
    for index in strongest.tolist():
        step = torch.zeros_like(weights).flatten()
        step[index] = 1e-2
        step = step.view_as(weights)
        with torch.no_grad():
            high, low = (made.forward(weights + sign * step)[0].sum() for sign in (1, -1))
        # The metric is about 10 with 1e-6 of rounding each way, over a step of 2e-2; and the curve's third derivative.
        assert float((high - low) / 2e-2) == pytest.approx(float(gradient.flatten()[index]), rel=0.02, abs=2e-3)


@torch.no_grad()
def test_bfloat16_runs_and_is_near(models):
    module = toy.random_module("llama").to(torch.bfloat16)
    model = load(module, tokenizer=toy.tokenizer())
    task, graph = pairs(model), Graph.of(model)
    kept = random_sets(graph, 2)
    got, want = metrics(model, task, graph, kept), metrics(models("llama"), task, graph, kept)
    assert got.isfinite().all()
    # Eight bits through three layers of large weights: two numbers of about 5.
    assert (got - want).abs().mean() < 0.1 * want.abs().mean()


@torch.no_grad()
def test_a_whole_task_goes_in_batches(models):
    model = models("gpt2")
    task, graph = pairs(model, n=70, length=8), Graph.of(model)
    kept = random_sets(graph, 5)
    made = ablated(model, task, graph)
    assert made.batch_size < len(task)
    got = metric_of(made, kept, identity={"method": "a test"})
    assert np.allclose(got.T, metrics(model, task, graph, kept), atol=CLOSE)
    assert cells_at_once(made.run(slice(None)), budget=1) == 1


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_edges_of_nodes_without_a_way_to_the_logits_do_not_matter(seed, share):
    model = _cached_gpt2()
    task, graph = pairs(model, n=2, length=6), Graph.of(model)
    kept = random_sets(graph, 1, share=share, seed=seed)
    kept[0][graph.destination_index["logits"], graph.source_index["a1.h2"]] = False
    kept[0][:, graph.source_index["a1.h2"]] = False
    more = kept.copy()
    for kind in "qkv":
        more[0][graph.destination_index[f"a1.h2<{kind}>"]] = graph.possible[graph.destination_index[f"a1.h2<{kind}>"]]
    assert torch.allclose(metrics(model, task, graph, kept), metrics(model, task, graph, more), atol=CLOSE)


_GPT2 = []


def _cached_gpt2():
    if not _GPT2:
        _GPT2.append(toy.random("gpt2"))
    return _GPT2[0]


def test_the_metric_may_be_read_before_the_end(models):
    model = models("llama")
    task, graph = pairs(model, shared=4), Graph.of(model)
    early = replace(task, positions={"end": torch.tensor([8, 5, 2, 7])})
    kept = random_sets(graph, 2)
    got = metrics(model, early, graph, kept)
    with torch.no_grad():
        want = torch.stack([slow(model, early, graph, each, off_of(model, early, "corrupt")) for each in kept])
    assert torch.allclose(got, want, atol=CLOSE)


def test_a_metric_that_is_not_finite_is_refused_with_its_prompt(models):
    model = models("llama")
    task = pairs(model)
    read = readout(model, task, "logit_diff")
    kept = Graph.of(model).possible[None]

    def score(logits, rows):
        return torch.where(rows == 2, float("nan"), read.score(logits, rows))

    made = ablated(model, task, Graph.of(model), metric=replace(read, score=score))
    with pytest.raises(ValueError, match=r"prompt 2 .*not finite with set 0 of the 1 sets"):
        metric_of(made, kept, identity={"method": "test"})


def test_a_corrupt_prompt_that_is_longer_than_its_clean_one_is_refused(models):
    model = models("llama")
    task = pairs(model, padded=True)
    longer = task.corrupt.clone()
    longer[2, 1] += 1
    with pytest.raises(ValueError, match="prompt 2: the corrupt prompt differs where the clean one has padding"):
        ablated(model, replace(task, corrupt=longer), Graph.of(model))
