"""Information flow routes: published vectors, sums, the slow decomposition by hooks, planted truths and blind spots."""

from __future__ import annotations

import copy
from functools import cache

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits import _flow, flow_kinds, flow_routes
from interp.circuits._flow import Edges, Flow, cut, flows, walk
from interp.core.result import Result
from interp.models import Model, load, planted, toy
from interp.models._planted_build import blank, finish, head
from interp.models.hooks import run
from interp.models.program import NoProgramError, program
from interp.tasks.task import Task

#: Float32: proximities are differences of norms of some 30, each a sum of 32 terms; shares are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
N_POS = 9
ARCHITECTURES = [(a, "raw") for a in toy.ARCHITECTURES] + [
    ("gpt2", "processed"),
    ("opt", "processed"),
    ("qwen3", "raw"),
]

random_model = cache(toy.random)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Sweeps are stored in the cache folder: a test must not go on where another one was killed."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


def random_task(model, *, n=3, n_pos=N_POS, padded=False):
    tokens = toy.random_tokens(model, n, n_pos)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :2] = 0
    names = tuple(f"prompt {i}" for i in range(n))
    return Task("random", names, tokens, "drawn", mask=mask if padded else None)


# --- the slow, obvious version: every part written out, from TransformerLens's own hooks ----------------------------


@torch.no_grad()
def parts_of(model, task, layer):
    """(parts `[batch q_pos part d_model]`, sum), twice: of attention (residual first, then head by key), of the MLP."""
    names = {site: f"blocks.{layer}.{hook}" for site, hook in (
        ("pre", "hook_resid_pre"), ("v", "attn.hook_v"), ("pattern", "attn.hook_pattern"), ("attn", "hook_attn_out"),
        ("mlp", "hook_mlp_out"), ("post", "hook_resid_post"))}  # fmt: skip
    cache = run(model, task.clean, capture=list(names.values()), mask=task.mask).cache
    seen = {site: cache[name] for site, name in names.items()}
    attention = model.bridge.blocks[layer].attn
    values = seen["v"].repeat_interleave(model.n_heads // seen["v"].shape[2], 2)
    written = torch.einsum("bkhe,hed->bkhd", values, attention.W_O)
    each = seen["pattern"].permute(0, 2, 3, 1)[..., None] * written[:, None]  # [batch q k head d_model]
    mid = seen["pre"] + seen["attn"]
    return (torch.cat([seen["pre"][:, :, None], each.flatten(2, 3)], 2), mid), (
        torch.stack([seen["mlp"], mid], 2), seen["post"],
    )  # fmt: skip


def slow_shares(parts, whole, norm, floor, real=None):
    near = whole.double().norm(norm, -1)[..., None] - (whole[..., None, :] - parts).double().norm(norm, -1)
    near = near.clamp(min=floor)
    if real is not None:
        near = near * real
    total = near.sum(-1, keepdim=True)
    return torch.where(total > 0, near / total, 0)


@torch.no_grad()
def slow_flow(model, task, layer, norm=1, floor=0.0):
    """As `Flow`, with a batch axis."""
    attention, mlp = parts_of(model, task, layer)
    batch, n_pos = task.clean.shape
    index = torch.arange(n_pos)
    seen = index[:, None] >= index
    if layer >= 0 and program(model).window is not None:
        seen = seen & (index[:, None] - index < program(model).window)
    seen = seen.expand(batch, -1, -1)
    if task.mask is not None:
        seen = seen & task.mask.bool()[:, None] | torch.eye(n_pos).bool()
    real = torch.cat([torch.ones(batch, n_pos, 1), seen[..., None].expand(-1, -1, -1, model.n_heads).flatten(2)], 2)
    shares = slow_shares(*attention, norm, floor, real)
    heads = shares[..., 1:].unflatten(-1, (n_pos, model.n_heads)).permute(0, 3, 1, 2)
    of_mlp = slow_shares(*mlp, norm, floor)
    return heads, shares[..., 0], of_mlp[..., 0], of_mlp[..., 1]


def fast_flows(model, task, norm=1, floor=0.0):
    with torch.no_grad():
        return {(layer, row): flow for layer, row, flow in flows(
            program(model), task.clean, task.mask, norm=norm, floor=floor)}  # fmt: skip


@pytest.mark.parametrize(("architecture", "weights"), ARCHITECTURES)
def test_the_parts_sum_to_the_streams(architecture, weights):
    model = random_model(architecture, weights=weights)
    task = random_task(model)
    for layer in range(model.n_layers):
        (parts, mid), (pair, post) = parts_of(model, task, layer)
        bias = model.bridge.blocks[layer].attn.b_O
        bias = torch.zeros(model.d_model) if bias is None else bias.detach()
        # The value bias is in hook_v: counted once, and not twice.
        assert float((parts.sum(2) + bias - mid).norm() / mid.norm()) < 1e-4
        assert float((pair.sum(2) - post).norm() / post.norm()) < 1e-4


@pytest.mark.parametrize(("norm", "floor"), [(1, 0.0), (1, 1e-5), (2, 0.0), (2, 1e-5)])
@pytest.mark.parametrize(("architecture", "weights"), ARCHITECTURES)
def test_the_fast_way_gives_what_the_slow_one_does(architecture, weights, norm, floor):
    model = random_model(architecture, weights=weights)
    task = random_task(model, padded=True)
    fast = fast_flows(model, task, norm, floor)
    real = task.mask.bool()
    for layer in range(model.n_layers):
        slow = slow_flow(model, task, layer, norm, floor)
        for row in range(len(task)):
            ours = fast[layer, row]
            np.testing.assert_allclose(ours.attn[:, real[row]], slow[0][row][:, real[row]], **CLOSE)
            for mine, theirs in zip(ours[1:4], slow[1:], strict=True):
                np.testing.assert_allclose(mine[real[row]], theirs[row][real[row]], **CLOSE)


@pytest.mark.parametrize("numbers_in_a_tile", [1, 16 * 32 * 7, 2**18])
def test_the_size_of_a_tile_changes_nothing(monkeypatch, numbers_in_a_tile):
    model = random_model("llama")
    task = random_task(model, n=1, n_pos=40)
    monkeypatch.setattr(_flow, "_TILE", {"cpu": numbers_in_a_tile})
    fast = fast_flows(model, task)
    for layer in range(model.n_layers):
        np.testing.assert_allclose(fast[layer, 0].attn, slow_flow(model, task, layer)[0][0], **CLOSE)


def test_what_writes_nothing_has_no_share_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    whole, written = 100 * torch.randn(40, 576, generator=generator), torch.randn(2, 40, 576, generator=generator)
    for norm in (1, 2):
        near = _flow.head_proximity(whole, torch.zeros(2, 40, 40), written, norm)
        assert float(near.tril().abs().max()) == 0  # hundreds of roundings would add up to a share
        close = _flow.head_proximity(whole, torch.full((2, 40, 40), 0.1), written, norm).tril()
        exact = _flow.head_proximity(
            whole.double(), torch.full((2, 40, 40), 0.1).double(), written.double(), norm
        ).tril()
        # 7 digits of ||y||, which is 46,000 in L1 and 2,400 in L2.
        assert float((close - exact).abs().max()) < 0.05


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_shares_are_not_negative_sum_to_one_and_look_back_only(architecture):
    model = random_model(architecture)
    for flow in fast_flows(model, random_task(model)).values():
        assert min(float(share.min()) for share in flow) >= 0
        torch.testing.assert_close(flow.attn.sum((0, 2)) + flow.resid_attn, torch.ones(N_POS))
        torch.testing.assert_close(flow.mlp + flow.resid_mlp, torch.ones(N_POS))
        assert float(flow.attn.triu(1).abs().max()) == 0


# --- published vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole", "parts", "expected"), [
    ((2, 2), [(1, 1), (-1, 0), (2, 1)], [0.43613, 0, 0.56387]),
    ((4, 4), [(1, 1), (2, 2), (1, 1)], [0.25, 0.5, 0.25]),
    ((-10, 10), [(0, 1), (1, 0), (-21, -1), (10, 10)], [1, 0, 0, 0]),
])  # fmt: skip
def test_published_vectors(whole, parts, expected):
    found = flow_routes.importance(torch.tensor(parts).float(), torch.tensor(whole).float(), norm=2)
    np.testing.assert_allclose(found, expected, atol=5e-6)  # the digits printed
    coded = flow_routes.importance(torch.tensor(parts).float(), torch.tensor(whole).float(), norm=2, floor=1e-5)
    np.testing.assert_allclose(coded, expected, atol=5e-5)  # the published tests' own tolerance: the floor shows


def test_published_renormalisation():
    attn = torch.tensor([[[0.05, 0.15], [0.05, 0.05]]])
    zero = torch.zeros(2)
    edges = cut(Flow(attn, torch.tensor([0.8, 0.9]), zero, zero, attn), 0.1, renormalise=True)
    assert (edges.head.tolist(), edges.query.tolist(), edges.key.tolist()) == ([0], [0], [1])
    np.testing.assert_allclose(edges.value, [0.157894], atol=1e-6)
    np.testing.assert_allclose(edges.resid_attn, [0.842105, 1.0], atol=1e-6)
    assert edges.mlp.tolist() == [0, 0]  # 0 of 0 stays 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.floats(0.01, 100))
def test_a_common_scale_and_a_signed_order_of_coordinates_change_nothing(seed, norm, scale):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    signs = torch.randint(0, 2, (6,), generator=generator) * 2.0 - 1
    before = flow_routes.importance(parts, parts.sum(0), norm=norm)
    after = flow_routes.importance((scale * signs * parts)[:, order], (scale * signs * parts.sum(0))[order], norm=norm)
    torch.testing.assert_close(before, after)
    assert float(before.min()) >= 0
    assert float(before.sum()) == pytest.approx(1)


def test_a_sum_that_none_of_its_parts_points_along_has_no_shares():
    parts = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert flow_routes.importance(parts, torch.zeros(2)).tolist() == [0, 0]
    assert flow_routes.importance(parts, torch.zeros(2), floor=1e-5).tolist() == [0.5, 0.5]


# --- the graph ------------------------------------------------------------------------------------------------------


def as_graph(layers, parallel):
    """Edges from an effect to its causes; nodes (layer, kind, position), kinds "mid" and "post"; layer -1 the input."""
    graph = nx.DiGraph()
    for layer, edges in enumerate(layers):
        for query, key in zip(edges.query.tolist(), edges.key.tolist(), strict=True):
            graph.add_edge((layer, "mid", query), (layer - 1, "post", key))
        for pos in range(len(edges.mlp)):
            if edges.resid_attn[pos] > 0:
                graph.add_edge((layer, "mid", pos), (layer - 1, "post", pos))
            if edges.mlp[pos] > 0:
                read = (layer - 1, "post", pos) if parallel else (layer, "mid", pos)
                graph.add_edge((layer, "post", pos), (layer, "mlp", pos))
                graph.add_edge((layer, "mlp", pos), read)
            if edges.resid_mlp[pos] > 0:
                graph.add_edge((layer, "post", pos), (layer, "mid", pos))
    return graph


@pytest.mark.parametrize("parallel", [False, True])
def test_the_nodes_reached_are_those_of_a_search_through_the_graph(parallel):
    generator = torch.Generator().manual_seed(0)
    n_layers, n_pos = 4, 6
    layers = []
    for _ in range(n_layers):
        keep = (torch.rand(2, n_pos, n_pos, generator=generator) < 0.12).tril()
        three = [torch.rand(n_pos, generator=generator) * (torch.rand(n_pos, generator=generator) < 0.6) for _ in "abc"]
        layers.append(Edges(*keep.nonzero(as_tuple=True), torch.ones(int(keep.sum())), *three))
    graph = as_graph(layers, parallel)
    reached = walk(layers, torch.arange(n_pos), parallel=parallel)
    sizes = set()
    for start in range(n_pos):
        top = (n_layers - 1, "post", start)
        expected = {top} | (nx.descendants(graph, top) if top in graph else set())
        found = {
            (layer, kind, pos)
            for layer, nodes in enumerate(reached)
            for kind, at in (("mid", nodes.middle), ("post", nodes.after))
            for pos in at[start].nonzero()[:, 0].tolist()
        }
        assert found == {node for node in expected if node[0] >= 0 and node[1] != "mlp"}
        sizes.add(len(found))
    assert len(sizes) > 2  # the starts differ, so the test could fail


def keys_of(table):
    return set(map(tuple, table[["prompt", "layer", "component", "head", "q_pos", "k_pos"]].fillna(-1).to_numpy()))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_higher_threshold_leaves_a_part_of_the_route(architecture):
    model = random_model(architecture)
    task = random_task(model)
    found = [keys_of(flow_routes.routes(model, task, tau=tau).table) for tau in (0.0, 0.01, 0.03, 0.1, 0.4, 0.99)]
    assert all(larger >= smaller for larger, smaller in zip(found, found[1:], strict=False))
    assert len({len(rows) for rows in found}) >= 4
    values = flow_routes.routes(model, task, tau=0.03).table["value"]
    assert values.min() > 0.03


@pytest.mark.parametrize(("architecture", "renormalise"), [("llama", False), ("gpt_neox", True), ("gpt2", True)])
def test_a_route_is_the_search_from_its_start_over_the_slow_importances(architecture, renormalise):
    model = random_model(architecture)
    task = random_task(model, n=2)
    tau, starts = 0.03, [8, 5]
    found = flow_routes.routes(model, task, pos=starts, tau=tau, renormalise=renormalise).table
    for row, start in enumerate(starts):
        layers = []
        for layer in range(model.n_layers):
            attn, *others = (share[row].float() for share in slow_flow(model, task, layer))
            layers.append(cut(Flow(attn, *others, attn), tau, renormalise=renormalise))
        reached = walk(layers, torch.tensor([start]), parallel=program(model).parallel)
        expected = {}
        for layer, (edges, (middle, after)) in enumerate(zip(layers, reached, strict=True)):
            for h, q, k, value in zip(*(part.tolist() for part in edges[:4]), strict=True):
                if middle[0, q]:
                    expected[layer, "attn", h, q, k] = value
            for name, nodes in (("resid_attn", middle), ("mlp", after), ("resid_mlp", after)):
                for pos in range(N_POS):
                    if nodes[0, pos] and getattr(edges, name)[pos] > 0:
                        expected[layer, name, -1, pos, pos] = float(getattr(edges, name)[pos])
        rows = found[found["prompt"] == row].fillna({"head": -1})
        ours = rows.set_index(["layer", "component", "head", "q_pos", "k_pos"])["value"].to_dict()
        assert set(ours) == set(expected)
        np.testing.assert_allclose([ours[key] for key in expected], list(expected.values()), **CLOSE)
        if renormalise:
            by_node = rows[rows["component"].str.contains("attn")].groupby(["layer", "q_pos"])["value"].sum()
            np.testing.assert_allclose(by_node, 1, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "norm"), [("gpt2", 1), ("llama", 1), ("mistral", 2)])
def test_prompts_together_alone_and_padded_give_the_same(architecture, norm):
    model = random_model(architecture)
    tokens = random_task(model, n=3).clean
    width = 3
    padded = torch.cat([torch.ones(3, width, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :width] = 0
    left = Task("padded", ("a", "b", "c"), padded, "drawn", mask=mask)
    options = {"tau": 0.03, "norm": norm}
    together = flow_routes.routes(model, tokens, **options).table
    alone = [flow_routes.routes(model, tokens[i : i + 1], **options).table.assign(prompt=i) for i in range(3)]
    shifted = flow_routes.routes(model, left, **options).table
    shifted[["q_pos", "k_pos"]] -= width
    assert len(together) > 30
    for other in (pd.concat(alone, ignore_index=True), shifted):
        pd.testing.assert_frame_equal(together, other, rtol=1e-4, atol=2e-6)
    for measure in (flow_routes.components, lambda m, t, **o: flow_kinds.kinds(
            m, t, {"back": flow_kinds.pair_kinds(m, t)["previous"]}, norm=o["norm"])):  # fmt: skip
        one, other = (measure(model, given, **options).table for given in (tokens, left))
        pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=2e-6)


def test_grouped_keys_and_values_are_counted_head_by_head():
    module = toy.random_module("llama")
    config = copy.deepcopy(module.config)
    config.num_key_value_heads = config.num_attention_heads
    wide = type(module)(config)
    state = module.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    wide.load_state_dict(state)
    grouped, full = (load(m, tokenizer=toy.tokenizer(64), weights="raw") for m in (module, wide.eval()))
    assert grouped.n_key_value_heads < full.n_key_value_heads
    task = random_task(grouped)
    for norm in (1, 2):
        one, other = fast_flows(grouped, task, norm), fast_flows(full, task, norm)
        for key in one:
            for mine, theirs in zip(one[key], other[key], strict=True):
                np.testing.assert_allclose(mine, theirs, **CLOSE)


# --- heads over many routes -----------------------------------------------------------------------------------------


def by_routes(model, task, tau, groups):
    """`components`, from a route for every start, one at a time."""
    n_pos = task.clean.shape[1]
    rows = []
    for pos in range(n_pos):
        padding = [] if task.mask is None else (task.mask[:, pos] == 0).nonzero()[:, 0].tolist()
        keep = [i for i in range(len(task)) if i not in padding]
        table = flow_routes.routes(model, task[keep], pos=pos, tau=tau).table
        for i, prompt in enumerate(keep):
            mine = table[table["prompt"] == i]
            for layer in range(model.n_layers):
                for h in [*range(model.n_heads), -1]:
                    name, head_of = ("mlp", mine["head"].isna()) if h < 0 else ("attn", mine["head"] == h)
                    edges = mine[(mine["layer"] == layer) & (mine["component"] == name) & head_of.fillna(False)]
                    rows.append((prompt, groups[prompt][pos], name, layer, h, edges["value"].sum(), len(edges) > 0))
    keys = ["prompt", "target", "component", "layer", "head"]
    table = pd.DataFrame(rows, columns=[*keys, "value", "value_frequency"])
    return table[table["target"] != ""].groupby(keys).mean()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_components_are_counted_over_the_routes_of_each_group(architecture):
    model = random_model(architecture)
    task = random_task(model, n=2, n_pos=5, padded=True)
    groups = np.array([["odd", "odd", "even", "", "even"], ["odd", "even", "odd", "rare", ""]])
    found = flow_routes.components(model, task, groups=groups, tau=0.05)
    table = found.table.fillna({"head": -1}).set_index(["prompt", "target", "component", "layer", "head"]).sort_index()
    expected = by_routes(model, task, 0.05, groups).sort_index()
    assert list(table.index) == list(expected.index)
    assert table.loc[(0, "even"), "value_routes"].unique().tolist() == [2]
    assert (0, "odd") not in table.index  # padding only
    for column in ("value", "value_frequency"):
        np.testing.assert_allclose(table[column], expected[column].astype(float), **CLOSE)
    assert 0 < table["value_frequency"].mean() < 1


def test_one_start_a_prompt_is_its_route():
    model = random_model("llama")
    task = random_task(model)
    found = flow_routes.components(model, task, pos=-1, tau=0.03)
    edges = flow_routes.routes(model, task, pos=-1, tau=0.03).filter(component="attn").table
    sums = edges.groupby(["prompt", "layer", "head"])["value"].sum()
    heads = found.filter(component="attn").table.set_index(["prompt", "layer", "head"])
    np.testing.assert_allclose(heads["value"], sums.reindex(heads.index, fill_value=0), **CLOSE)
    assert set(found.table["value_routes"]) == {1}


def test_a_contrast_is_the_difference_of_the_means():
    model = random_model("llama")
    first, second = (flow_routes.components(model, toy.random_tokens(model, 3, 6, seed=seed)) for seed in (0, 1))
    found = flow_routes.contrast(first, second)
    grids = [result.filter(component="attn").grid("layer", "head") for result in (first, second)]
    difference = found.filter(component="attn").grid("layer", "head")
    np.testing.assert_allclose(difference, grids[0] - grids[1], atol=1e-12)
    assert len(found.table) == model.n_layers * (model.n_heads + 1)
    other = flow_routes.components(model, toy.random_tokens(model, 3, 6), tau=0.1)
    with pytest.raises(ValueError, match=r"differ in tau: 0.04 and 0.1"):
        flow_routes.contrast(first, other)
    with pytest.raises(ValueError, match="two results of flow_routes.components"):
        flow_routes.contrast(first, flow_routes.routes(model, toy.random_tokens(model, 1, 6)))


def test_kinds_are_sums_over_their_pairs():
    model = random_model("gpt2")
    task = random_task(model, padded=True)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.rand(3, N_POS, N_POS, generator=generator) < 0.3 for name in ("a", "b")}
    queries = torch.rand(3, N_POS, generator=generator) < 0.5
    queries[1] = False
    found = flow_kinds.kinds(model, task, drawn, queries=queries).table
    assert set(found["prompt"]) == {0, 2}  # no query of prompt 1 counts
    counted = queries & task.mask.bool()
    patterns = run(model, task.clean, capture=["blocks.1.attn.hook_pattern"], mask=task.mask).cache
    attention = patterns["blocks.1.attn.hook_pattern"]
    heads = slow_flow(model, task, 1)[0]
    rows = found.set_index(["prompt", "target", "layer", "head"])
    for prompt in (0, 2):
        for name in ("a", "b"):
            for h in range(model.n_heads):
                row, keep = rows.loc[(prompt, name, 1, h)], counted[prompt]
                pairs = drawn[name][prompt][keep]
                each = {"value": heads[prompt, h][keep] * pairs, "value_attention": attention[prompt, h][keep] * pairs,
                        "value_head": heads[prompt, h][keep]}  # fmt: skip
                for column, shares in each.items():
                    assert row[column] == pytest.approx(float(shares.sum(-1).mean()), rel=1e-4, abs=1e-6)


def test_kinds_of_pairs(smol):
    texts = ["an untranslatable word, 12", "ok untranslatable untranslatable"]
    tokens = smol.tokenize(texts)
    task = Task("words", tuple(texts), tokens.ids, "by hand", mask=tokens.mask)
    found = flow_kinds.pair_kinds(smol, task)
    for row in range(2):
        pieces, real = smol.to_str_tokens(tokens.ids[row]), tokens.mask[row].tolist()
        start = real.index(1)
        word = 0
        words = []
        for i, piece in enumerate(pieces):  # a new word at a space, and around what is no letter
            word += not (i > 0 and piece[0].isalpha() and pieces[i - 1][-1].isalpha())
            words.append(word)
        for q in range(len(pieces)):
            for k in range(len(pieces)):
                both = real[q] and real[k]
                expected = {
                    "self": q == k, "previous": q == k + 1, "first": k == start < q,
                    "word": k < q and words[k] == words[q],
                }  # fmt: skip
                assert {name: bool(pairs[row, q, k]) for name, pairs in found.items()} == {
                    name: bool(both and holds) for name, holds in expected.items()
                }
    assert int(found["word"][0].sum()) >= 1
    assert int(found["word"][1].sum()) == 2 * int(found["word"][0].sum())


# --- planted truths, and what routes cannot see ----------------------------------------------------------------------


def head_values(model, tokens, pos=-1):
    found = flow_routes.components(model, tokens, pos=pos, tau=0.0).filter(component="attn")
    return found.grid("layer", "head").to_numpy()


def test_the_route_of_an_induction_head_is_where_the_answer_was():
    case = planted.induction_like()
    edges = flow_routes.routes(case.model, case.clean, pos=-1, tau=0.05).filter(component="attn", layer=1, head=0).table
    last = case.clean.shape[1] - 1
    for prompt, following in enumerate(case.positions["next"].tolist()):
        mine = edges[(edges["prompt"] == prompt) & (edges["q_pos"] == last)]
        assert mine.sort_values("value")["k_pos"].tolist()[-1:] == [following]


def induction(gain):
    """Two heads as in `induction_like`; the first writes `gain` times as much, and the second's keys make up for it."""
    n = 4
    build = blank(2, 2, n_words=n, prev=n, out=n)
    words, pos = build.words, build["pos"]
    head(build, (0, 1), asks=build["one"] - build["tok"][0], want=pos[1:], offer=pos[:-1], value=words,
         write=gain * build["prev"])  # fmt: skip
    head(build, (1, 0), asks=words.sum(0, keepdim=True), want=words, offer=build["prev"] / gain, value=words,
         write=build["out"])  # fmt: skip
    return finish(build, out=build["out"], scale=8.0)


def test_blind_to_composition_through_keys():
    strong, weak = induction(1.0), induction(2.0**-6)
    tokens = torch.tensor([[0, 4, 5, 6, 7, 5]])
    logits = [run(model, tokens).logits for model in (strong, weak)]
    torch.testing.assert_close(*logits)  # the same function: the first head is as needed as before
    assert int(logits[0][0, -1].argmax()) == 6
    for model, in_route in ((strong, True), (weak, False)):
        table = flow_routes.routes(model, tokens, tau=0.04).table.dropna(subset="head")
        heads = set(zip(table["layer"], table["head"], strict=True))
        assert (1, 0) in heads
        assert ((0, 1) in heads) == in_route
    assert set(table["component"]) == {"attn"}  # and no edge has a query or a key to end in


def test_blind_to_one_of_two_heads_that_cancel():
    case = planted.cancelling_pair()
    values = head_values(case.model, case.clean)
    assert values[0, 1] > 0.05  # plus
    assert values[1, 0] > 0.05  # main
    assert values[1, 2] == pytest.approx(0, abs=1e-6)  # minus, whose effect by patching is -2


def test_blind_to_suppression():
    case = planted.ioi_like()
    values = head_values(case.model, case.clean)
    assert min(values[2, 1], values[2, 2]) > 0.05  # the movers
    assert values[2, 3] == pytest.approx(0, abs=1e-6)  # the negative head, whose effect is -1/5


def test_what_nothing_reads_is_in_the_route_too():
    case = planted.ioi_like()
    values = head_values(case.model, case.clean)
    assert values[0, 3] > 0.05  # a distractor: written, never read


@pytest.mark.parametrize("name", ["or_gate", "and_gate"])
def test_routes_do_not_tell_an_or_from_an_and(name):
    case = getattr(planted, name)()
    table = flow_routes.routes(case.model, case.clean, tau=0.0).table
    heads = table.dropna(subset="head")
    assert {(0, 1), (1, 2)} <= set(zip(heads["layer"], heads["head"], strict=True))
    assert 1 in set(table[table["component"] == "mlp"]["layer"])


# --- on real text, other types, refusals -----------------------------------------------------------------------------


def test_on_the_default_model(smol):
    task = smol.tokenize(["The quick brown fox jumps over the lazy dog and runs into the untranslatable forest."])
    tokens = task.ids
    given_task = Task("one", ("one",), tokens, "by hand")
    for layer in (0, 13, 29):
        (parts, mid), (pair, post) = parts_of(smol, given_task, layer)
        assert float((parts.sum(2) - mid).norm() / mid.norm()) < 1e-4  # there is no bias: an identity
        assert float((pair.sum(2) - post).norm() / post.norm()) < 1e-4
    fast = fast_flows(smol, given_task)
    for layer in (0, 13, 29):
        slow = slow_flow(smol, given_task, layer)
        # The streams reach norms of 10^4 (massive activations), of which float32 keeps 7 digits.
        np.testing.assert_allclose(fast[layer, 0].attn, slow[0][0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(fast[layer, 0].mlp, slow[2][0], rtol=1e-3, atol=1e-5)


def test_half_precision_and_saving(tmp_path):
    module = toy.random_module("llama")
    full, half = (
        load(copy.deepcopy(module), tokenizer=toy.tokenizer(64), weights="raw", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    tokens = toy.random_tokens(full, 2, 8)
    one, other = (flow_routes.components(model, tokens, pos=-1, tau=0.0) for model in (full, half))
    # bfloat16 keeps 8 bits: a few per cent over three layers.
    assert np.corrcoef(one.table["value"], other.table["value"])[0, 1] > 0.99
    saved = Result.load(flow_routes.routes(full, tokens).save(tmp_path / "r"))
    pd.testing.assert_frame_equal(saved.table, flow_routes.routes(full, tokens).table)


def test_refusals():
    model = random_model("llama")
    tokens = toy.random_tokens(model, 2, 6)
    task = random_task(model, padded=True)
    for options, message in (
        ({"tau": 1.0}, r"tau=1.0"), ({"norm": 3}, r"norm=3"), ({"floor": -1.0}, r"floor=-1.0"),
        ({"pos": 6}, r"position 6 is outside"), ({"pos": "end"}, r"has no position 'end'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            flow_routes.routes(model, tokens, **options)
    with pytest.raises(ValueError, match=r"prompt 0: position 1 is padding"):
        flow_routes.routes(model, task, pos=1)
    with pytest.raises(ValueError, match=r"prompt 0: position 0 is padding"):
        flow_routes.components(model, task, pos=0)
    with pytest.raises(ValueError, match=r"give token ids \[batch pos\]"):
        flow_routes.routes(model, tokens[0])
    with pytest.raises(ValueError, match="has a context of 64"):
        flow_routes.routes(model, torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match=r"groups are \(1, 6\)"):
        flow_routes.components(model, tokens, groups=np.full((1, 6), "a"))
    with pytest.raises(ValueError, match='no text but ""'):
        flow_routes.components(model, tokens, groups=np.full((2, 6), ""))
    pairs = {"a": torch.ones(2, 6, 6).bool()}
    with pytest.raises(ValueError, match=r"queries are \(2, 5\)"):
        flow_kinds.kinds(model, tokens, pairs, queries=torch.ones(2, 5).bool())
    with pytest.raises(ValueError, match="no query counts"):
        flow_kinds.kinds(model, tokens, pairs, queries=torch.zeros(2, 6).bool())
    with pytest.raises(ValueError, match=r"kind 'a' are \(2, 6, 6\)"):
        flow_kinds.kinds(model, tokens[:1], pairs)
    with pytest.raises(ValueError, match="no kinds of pairs"):
        flow_kinds.kinds(model, tokens, {})
    with pytest.raises(NoProgramError, match="normalises attention's output"):
        flow_routes.routes(toy.random("gemma2"), tokens)


def test_models_are_left_as_they_are():
    model = random_model("llama")
    tokens = toy.random_tokens(model, 2, 6)
    before = run(model, tokens).logits
    flow_routes.components(model, tokens)
    assert torch.equal(before, run(model, tokens).logits)
    assert isinstance(model, Model)
