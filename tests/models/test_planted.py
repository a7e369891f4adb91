"""Are the planted truths true? Each is held against brute force: every node, every edge, and the pairs that matter.

Two independent ways: hooks on the loaded model, and `forward` below, which computes the model from its weights with no
norm at all, and in which each edge can carry the corrupt prompt's message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import pytest
import torch
from torch import Tensor

from interp.models import planted, run
from interp.models._planted_build import blank
from interp.models.planted import Planted
from interp.tasks.task import Task

CASES = (
    "ioi_like", "induction_like", "cancelling_pair", "or_gate", "and_gate", "backup_head", "saturation",
    "greater_than_like",
)  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)

# What patching one node with its corrupt activation does, as a fraction of the gap. All others: nothing.
ALONE = {
    "ioi_like": {"a0.h1": 1.0, "a1.h0": 1.0, "a2.h1": 0.8, "a2.h2": 0.4, "a2.h3": -0.2},
    "induction_like": {"a0.h2": 0.5, "a1.h0": 1.0},
    "cancelling_pair": {"a1.h0": 1.0, "a0.h1": 2.0, "a1.h2": -2.0},
    "or_gate": {"m1": 1.0},
    "and_gate": {"a0.h1": 1.0, "a1.h2": 1.0, "m1": 1.0},
    "backup_head": {},
    "saturation": {"a1.h1": 1.0, "m1": 1.0},
    "greater_than_like": {"a1.h0": 1.0, "m1": 1.0},
}
# Planted edges that single patches do not see.
UNSEEN = {
    "or_gate": {("input", "a0.h1<v>"), ("input", "a1.h2<v>"), ("a0.h1", "m1"), ("a1.h2", "m1")},
    "backup_head": {("input", "a0.h1<v>"), ("input", "a1.h2<v>"), ("a1.h2", "logits")},
}
# Logits of size 10, sums of some tens of float32 terms: 1e-5; effects are these by a gap of 4 or more.
LOGITS = 2e-5
EFFECT = 5e-6


@cache
def case(name: str) -> Planted:
    return getattr(planted, name)()


def difference(case: Planted, logits: Tensor) -> Tensor:
    rows = torch.arange(len(case.answers))
    return logits[rows, -1, case.answers] - logits[rows, -1, case.wrong]


def heads(case: Planted) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(case.model.n_layers) for head in range(case.model.n_heads)]


def names(case: Planted) -> list[str]:
    return [f"a{layer}.h{head}" for layer, head in heads(case)] + [f"m{i}" for i in range(case.model.n_layers)]


def site(node: str) -> tuple[str, int | None]:
    if node.startswith("m"):
        return f"blocks.{node[1:]}.hook_mlp_out", None
    layer, head = node[1:].split(".h")
    return f"blocks.{layer}.attn.hook_z", int(head)


@cache
def sources(this: Planted) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """What the nodes write on the clean and on the corrupt prompts, and the logit differences of both."""
    capture = sorted({site(node)[0] for node in names(this)})
    clean, corrupt = (run(this.model, tokens, capture=capture) for tokens in (this.clean, this.corrupt))
    return clean.cache, corrupt.cache, difference(this, clean.logits), difference(this, corrupt.logits)


def overwrite(node: str, source: dict[str, Tensor], rows: Tensor, where: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """A hook that gives one node the activations of another run, at some positions."""
    hook_name, head = site(node)

    def patch(activation: Tensor, hook: object) -> Tensor:
        activation = activation.clone()
        index = (rows, where) if head is None else (rows, where, head)
        activation[index] = source[hook_name][index]
        return activation

    return hook_name, patch


def effect(case: Planted, nodes: Collection[str], *, held: Collection[str] = (), at: Tensor | None = None) -> Tensor:
    """Effect on each prompt of patching some nodes with the corrupt prompt, others held as they were."""
    batch, length = case.clean.shape
    everywhere = torch.arange(length).expand(batch, length)
    where = everywhere if at is None else at
    rows = torch.arange(batch)[:, None]
    clean, corrupt, was, gone = sources(case)
    hooks = [overwrite(node, corrupt, rows, where) for node in nodes]
    hooks += [overwrite(node, clean, rows, everywhere) for node in held]
    return (was - difference(case, run(case.model, case.clean, hooks=hooks).logits)) / (was - gone)


def same(found: Tensor, value: float, tolerance: float = EFFECT) -> None:
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=0, atol=tolerance)


# --- the second oracle: the model written out, with edges that can be cut


@cache
def weights(name: str) -> dict[str, Tensor]:
    bridge = case(name).model.bridge
    found = {part: getattr(bridge, f"W_{part}").detach() for part in ("E", "Q", "K", "V", "O", "in", "out", "U")}
    return found | {"pos": bridge.pos_embed.W_pos.detach(), "bias": bridge.b_in.detach()}


def forward(case: Planted, tokens: Tensor, *, cut: Collection[tuple[str, str]] = (), other: dict | None = None) -> dict:
    """What each node writes, and "logits", with no norms; the edges in `cut` carry what `other` says."""
    weight = weights(case.name)
    written: dict[str, Tensor] = {"input": weight["E"][tokens] + weight["pos"][: tokens.shape[1]]}

    def stream(receiver: str) -> Tensor:
        return sum(other[name] if (name, receiver) in cut else out for name, out in written.items())  # type: ignore

    unseen = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for layer in range(case.model.n_layers):
        attention = {}
        for head in range(case.model.n_heads):
            node = f"a{layer}.h{head}"
            q, k, v = (stream(f"{node}<{part}>") @ weight[part.upper()][layer, head] for part in "qkv")
            scores = (q @ k.mT / case.model.d_head**0.5).masked_fill(unseen, -torch.inf)
            attention[node] = scores.softmax(-1) @ v @ weight["O"][layer, head]
        written |= attention
        hidden = (stream(f"m{layer}") @ weight["in"][layer] + weight["bias"][layer]).relu()
        written[f"m{layer}"] = hidden @ weight["out"][layer]
    return {**written, "logits": stream("logits") @ weight["U"]}


def all_edges(case: Planted) -> list[tuple[str, str]]:
    found, sources = [], ["input"]
    for layer in range(case.model.n_layers):
        attention = [f"a{layer}.h{head}" for head in range(case.model.n_heads)]
        found += [(src, f"{node}<{part}>") for src in sources for node in attention for part in "qkv"]
        sources += attention
        found += [(src, f"m{layer}") for src in sources]
        sources += [f"m{layer}"]
    return found + [(src, "logits") for src in sources]


@cache
def ends(name: str) -> tuple[dict, Tensor, Tensor]:
    """The corrupt prompts' messages, and the logit differences of the clean and the corrupt prompts."""
    this = case(name)
    corrupt = forward(this, this.corrupt)
    return corrupt, difference(this, forward(this, this.clean)["logits"]), difference(this, corrupt["logits"])


def edge_effect(name: str, cut: Collection[tuple[str, str]]) -> Tensor:
    corrupt, was, gone = ends(name)
    logits = forward(case(name), case(name).clean, cut=set(cut), other=corrupt)["logits"]
    return (was - difference(case(name), logits)) / (was - gone)


# --- every case


@EVERY
def test_the_model_is_the_sum_of_its_parts_without_any_norm(name: str) -> None:
    this = case(name)
    for tokens, found in zip((this.clean, this.corrupt), sources(this)[:2], strict=True):
        parts = forward(this, tokens)
        torch.testing.assert_close(this.model(tokens), parts["logits"], rtol=0, atol=LOGITS)
        for node in names(this):
            hook_name, head = site(node)
            wrote = found[hook_name]
            if head is not None:
                wrote = wrote[:, :, head] @ weights(name)["O"][int(node[1]), head]
            torch.testing.assert_close(wrote, parts[node], rtol=0, atol=LOGITS)


@EVERY
def test_gradients_pass_the_final_norm_as_if_it_were_not_there(name: str) -> None:
    this = case(name)
    last = f"blocks.{this.model.n_layers - 1}.hook_resid_post"
    found = run(this.model, this.clean, capture=[last], grad=True)
    (gradient,) = torch.autograd.grad(difference(this, found.logits).sum(), found.cache[last])
    unembedding = this.model.bridge.W_U.detach()
    read = (unembedding[:, this.answers] - unembedding[:, this.wrong]).T
    torch.testing.assert_close(gradient[:, -1], read, rtol=1e-6, atol=1e-6)


@EVERY
def test_the_model_gives_the_answer(name: str) -> None:
    this = case(name)
    logits = this.model(this.clean)[:, -1]
    right = logits.gather(-1, this.answers[:, None])[:, 0]
    assert (right >= logits.max(-1).values - LOGITS).all()
    assert (difference(this, this.model(this.clean)) > 3).all()
    assert (difference(this, this.model(this.corrupt)) < LOGITS).all()


@EVERY
def test_the_prompts_are_pairs_with_named_positions(name: str) -> None:
    this = case(name)
    batch, length = this.clean.shape
    assert (this.clean != this.corrupt).any(1).all()
    assert len({tuple(row) for row in this.clean.tolist()}) == batch
    assert len(this.answers.unique()) > 2
    assert all(((where >= 0) & (where < length)).all() for where in this.positions.values())
    assert (this.positions["end"] == length - 1).all()
    assert torch.equal(this.model.tokenize(this.prompts, prepend_bos=False).ids, this.clean)
    task = Task(
        name=name, prompts=this.prompts, clean=this.clean, source="planted", corrupt=this.corrupt,
        answers=this.answers, wrong=this.wrong, positions=this.positions,
    )  # fmt: skip
    assert len(task[:3]) == 3


@EVERY
def test_each_node_alone_does_what_is_said_and_the_others_nothing(name: str) -> None:
    this = case(name)
    for node in names(this):
        same(effect(this, [node]), ALONE[name].get(node, 0.0))


@EVERY
def test_all_the_other_nodes_at_once_do_nothing(name: str) -> None:
    this = case(name)
    others = [node for node in names(this) if node not in this.nodes]
    same(effect(this, others), 0.0)
    same(effect(this, names(this)), 1.0)  # no planted answer goes from the embeddings to the logits directly


@EVERY
def test_each_stage_acts_at_its_position(name: str) -> None:
    this = case(name)
    assert this.where.keys() == this.truth.keys()
    every = torch.arange(this.clean.shape[1])
    for stage, planted_heads in this.truth.items():
        at = this.positions[this.where[stage]][:, None]
        elsewhere = every.expand(len(at), -1)[every != at].view(len(at), -1)
        for layer, head in planted_heads:
            node = f"a{layer}.h{head}"
            same(effect(this, [node], at=at), ALONE[name].get(node, 0.0))
            if stage != "previous":  # of the corrupt prompt it points to another word, which is elsewhere
                same(effect(this, [node], at=elsewhere), 0.0)


@EVERY
def test_the_planted_edges_are_all_that_is_needed(name: str) -> None:
    this = case(name)
    every = all_edges(this)
    assert this.edges <= set(every)
    same(edge_effect(name, set(every) - this.edges), 0.0)
    same(edge_effect(name, every), 1.0)


@EVERY
def test_each_edge_alone(name: str) -> None:
    this = case(name)
    unseen = UNSEEN.get(name, set())
    assert unseen <= this.edges
    for edge in all_edges(this):
        found = edge_effect(name, [edge])
        if edge in this.edges - unseen:
            assert (found.abs() > 0.1).all(), edge
        else:
            same(found, 0.0)


@EVERY
def test_edges_that_do_nothing_alone_do_something_with_another(name: str) -> None:
    for edge in UNSEEN.get(name, set()):
        rest = case(name).edges - {edge}
        gains = [(edge_effect(name, [edge, other]) - edge_effect(name, [other])).abs().min() for other in rest]
        assert max(gains) > 0.4, edge


@EVERY
def test_nodes_and_edges_agree(name: str) -> None:
    this = case(name)
    ends = {end.split("<")[0] for edge in this.edges for end in edge} - {"input", "logits"}
    assert ends == this.nodes
    assert this.heads < set(heads(this))


@EVERY
def test_distractors_vary_and_the_other_idle_heads_write_nothing(name: str) -> None:
    this = case(name)
    clean, corrupt, _, _ = sources(this)
    kinds = set()
    for layer, head in set(heads(this)) - this.heads:
        hook_name = f"blocks.{layer}.attn.hook_z"
        there, gone = clean[hook_name][:, :, head], corrupt[hook_name][:, :, head]
        moved = (there - gone).abs().amax((1, 2))
        assert (moved > 0.05).all() or there.abs().max() == 0
        kinds.add(bool(there.any()))
    assert kinds == {True, False}
    idle = [layer for layer in range(this.model.n_layers) if layer not in this.mlps]
    assert all(clean[f"blocks.{layer}.hook_mlp_out"].abs().max() == 0 for layer in idle)


@EVERY
def test_building_draws_nothing_from_the_global_generator(name: str) -> None:
    state = torch.random.get_rng_state()
    again = getattr(planted, name)()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.model.fingerprint == case(name).model.fingerprint
    assert torch.equal(again.clean, case(name).clean)


@pytest.mark.parametrize("build", [planted.ioi_like, planted.induction_like])
@pytest.mark.parametrize("sharpness", [1.0, 100.0])
def test_the_softest_and_the_sharpest_have_the_same_truth(build: Callable[..., Planted], sharpness: float) -> None:
    this = build(sharpness=sharpness)
    logits = this.model(this.clean)[:, -1]
    assert torch.equal(logits.argmax(-1), this.answers)
    rest = [node for node in names(this) if node not in this.nodes]
    same(effect(this, rest), 0.0)
    for node in this.nodes:
        assert (effect(this, [node]).abs() > 0.1).all()


@pytest.mark.parametrize("sharpness", [0.5, 101.0, -3.0, float("nan")])
def test_a_sharpness_without_the_mechanism_is_refused(sharpness: float) -> None:
    for build in (planted.ioi_like, planted.induction_like):
        with pytest.raises(ValueError, match=f"sharpness={sharpness}: it is from 1 .* to 100"):
            build(sharpness=sharpness)


# --- IOI


def test_the_heads_of_ioi_attend_where_they_should() -> None:
    this = planted.ioi_like(sharpness=10.0)
    at = {key: where.tolist() for key, where in this.positions.items()}
    patterns = run(this.model, this.clean, capture=[f"blocks.{i}.attn.hook_pattern" for i in range(3)]).cache
    seen = [((0, 1), "s2", "s1"), ((1, 0), "end", "s2"), *(((2, head), "end", "io") for head in (1, 2, 3))]
    for (layer, head), query, key in seen:
        pattern = patterns[f"blocks.{layer}.attn.hook_pattern"][range(24), head]
        assert (pattern[range(24), at[query], at[key]] > 0.999).all()
        rest = pattern.clone()
        rest[range(24), at[query]] = 0
        # Where it does not ask, all attention rests on the first token (which says nothing).
        if layer > 0:
            same(rest[:, :-1, 0], 1.0, 0.0)
    duplicate = patterns["blocks.0.attn.hook_pattern"][range(24), 1]
    assert (duplicate[range(24), at["s2"], at["s2"]] == 0).all()


def test_ioi_fails_without_inhibition_and_is_repaired_by_its_attention() -> None:
    this = case("ioi_like")

    def attend(where: Tensor) -> Tensor:
        def force(pattern: Tensor, hook: object) -> Tensor:
            pattern = pattern.clone()
            pattern[:, 0, -1] = torch.nn.functional.one_hot(where, pattern.shape[-1]).to(pattern)
            return pattern

        return difference(this, run(this.model, this.clean, hooks=[("blocks.1.attn.hook_pattern", force)]).logits)

    # Uninhibited, the movers take both names alike. The terms of a score are up to 200, so it is rounded to 1e-5,
    # and so is, relatively, an attention weight, which counts ten logits.
    same(attend(torch.zeros_like(this.answers)), 0.0, 1e-4)
    repaired = attend(this.positions["s2"])
    assert (repaired >= difference(this, this.model(this.clean))).all()
    assert (repaired > 9).all()


def test_a_first_order_estimate_of_ioi_fades_with_sharpness() -> None:
    def share(sharpness: float) -> float:
        this = planted.ioi_like(sharpness=sharpness)
        name = "blocks.1.attn.hook_z"
        clean = run(this.model, this.clean, capture=[name], grad=True)
        corrupt = run(this.model, this.corrupt, capture=[name])
        was, gone = difference(this, clean.logits), difference(this, corrupt.logits)
        (gradient,) = torch.autograd.grad(was.sum(), clean.cache[name])
        estimate = ((clean.cache[name] - corrupt.cache[name]) * gradient)[:, :, 0].sum((1, 2)) / (was - gone)
        return float(estimate.detach().mean())

    assert share(3.0) == pytest.approx(0.18, abs=0.01)
    assert share(6.0) == pytest.approx(1 / 60, abs=0.003)
    assert abs(share(20.0)) < 1e-9


# --- the blind spots


def test_the_pair_cancels() -> None:
    this = case("cancelling_pair")
    same(effect(this, ["a0.h1", "a1.h2"]), 0.0)
    same(effect(this, ["a1.h0", "a0.h1", "a1.h2"]), 1.0)


@pytest.mark.parametrize("name", ["or_gate", "and_gate"])
def test_both_heads_of_a_gate_have_the_full_effect(name: str) -> None:
    same(effect(case(name), ["a0.h1", "a1.h2"]), 1.0)


def test_the_backup_hides_the_primary_head() -> None:
    this = case("backup_head")
    same(effect(this, ["a0.h1", "a1.h2"]), 1.0)
    same(effect(this, ["a0.h1"], held=["a1.h2"]), 1.0)  # its direct effect: the backup stays idle
    # Deceived about the primary, the backup acts too, and the answer is twice as sure.
    same(edge_effect("backup_head", [("a0.h1", "a1.h2<q>")]), -1.0)


def slopes(this: Planted, share: float, node: str) -> Tensor:
    """(clean - corrupt activation) x gradient as a fraction of the gap, per head of a layer, some way to clean."""
    name = site(node)[0]
    layers = [f"blocks.{layer}.attn.hook_z" for layer in range(this.model.n_layers)]
    clean, corrupt, was, gone = sources(this)

    def between(layer: str) -> Callable[..., Tensor]:
        mixed = (corrupt[layer] + share * (clean[layer] - corrupt[layer])).requires_grad_(layer == name)
        return lambda activation, hook: mixed

    # Every layer's heads are on the way, so that both inputs of a gate move together.
    hooks = [(layer, between(layer)) for layer in layers]
    found = run(this.model, this.clean, hooks=hooks, capture=[name], grad=True)
    (gradient,) = torch.autograd.grad(difference(this, found.logits).sum(), found.cache[name])
    return ((clean[name] - corrupt[name]) * gradient).sum((1, 3)) / (was - gone)[:, None]


@pytest.mark.parametrize(
    ("name", "node", "at_clean", "at_corrupt", "mean"),
    [
        ("or_gate", "a0.h1", 0.0, 1.0, 0.5),
        ("or_gate", "a1.h2", 0.0, 1.0, 0.5),
        ("and_gate", "a0.h1", 1.0, 0.0, 0.5),
        ("and_gate", "a1.h2", 1.0, 0.0, 0.5),
        ("saturation", "a1.h1", 0.0, 6.0, 1.0),
    ],
)
def test_gradients_at_the_ends_mislead_and_their_mean_does_not(
    name: str, node: str, at_clean: float, at_corrupt: float, mean: float
) -> None:
    this = case(name)
    head = int(node[-1])
    same(slopes(this, 1.0, node)[:, head], at_clean)
    same(slopes(this, 0.0, node)[:, head], at_corrupt)
    # Midpoints of six steps: the kinks are at 1/2 and at 1/6, which are edges of steps, so the mean is exact.
    along = torch.stack([slopes(this, (step + 0.5) / 6, node)[:, head] for step in range(6)])
    same(along.mean(0), mean)


def test_the_or_gate_on_the_two_published_grids() -> None:
    # Left ends of five steps (the code's grid) and right ends (the paper's).
    this = case("or_gate")
    at = [slopes(this, step / 5, "a0.h1")[:, 1] for step in range(6)]
    same(torch.stack(at[:5]).mean(0), 0.6)
    same(torch.stack(at[1:]).mean(0), 0.4)


def test_a_saturated_softmax_has_no_gradient_and_the_same_effect() -> None:
    this = planted.induction_like(sharpness=60.0)
    sites = [f"blocks.1.attn.hook_{part}" for part in "qk"]
    clean = run(this.model, this.clean, capture=sites, grad=True)
    corrupt = run(this.model, this.corrupt, capture=sites)
    gap = difference(this, clean.logits) - difference(this, corrupt.logits)
    gradients = torch.autograd.grad(difference(this, clean.logits).sum(), [clean.cache[site] for site in sites])
    for hook_name, gradient in zip(sites, gradients, strict=True):
        estimate = ((clean.cache[hook_name] - corrupt.cache[hook_name]) * gradient).sum((1, 3)) / gap[:, None]
        same(estimate, 0.0, 1e-12)

        def patch(activation: Tensor, hook: object, name: str = hook_name) -> Tensor:
            return corrupt.cache[name]

        patched = difference(this, run(this.model, this.clean, hooks=[(hook_name, patch)]).logits)
        assert ((difference(this, clean.logits) - patched) / gap > 0.4).all()


# --- years


def test_later_years_are_raised_by_their_neurons() -> None:
    this = case("greater_than_like")
    years = torch.arange(8)
    tokens = torch.tensor([[0, 3, 4 + year, 3, 2] for year in range(8)])
    found = run(this.model, tokens, capture=["blocks.1.mlp.hook_post"])
    neurons = (years[1:] - 0.5 - years[:, None]).relu()
    torch.testing.assert_close(found.cache["blocks.1.mlp.hook_post"][:, -1], neurons, rtol=0, atol=1e-5)
    ahead = years - years[:, None]  # [asked, year]
    step = torch.where(ahead > 1, 1.0, torch.where(ahead == 1, 0.5, 0.0))
    torch.testing.assert_close(found.logits[:, -1, 4:], 8 * step, rtol=0, atol=LOGITS)


# --- the builder


def test_a_stream_too_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the subspaces need 57 \+ 1 dimensions and 3 heads have 48"):
        blank(1, 3, n_words=20, out=20)


def test_what_a_planted_says_of_itself() -> None:
    assert repr(case("or_gate")) == "<Planted 'or_gate': {'a': ((0, 1),), 'b': ((1, 2),)}, MLPs (1,), 5 edges>"
