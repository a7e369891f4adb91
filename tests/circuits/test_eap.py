"""Edge attribution: plain autograd with a leaf for each input, exact patching, completeness, planted blindness."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interp.circuits.circuit import Circuit
from interp.circuits.eap import eap, eap_ig, edge_scores, relp
from interp.circuits.graph import Graph
from interp.core.edits import Edit
from interp.core.readout import Readout, readout
from interp.core.rerun import rerun
from interp.models import Model, load, planted, toy
from interp.models.program import NoProgramError, program
from interp.tasks import Task

#: Logits of the toys are about 10; sums in another order differ by 1e-6 a layer, their gradients likewise.
TOLERANCE = 5e-5
N_POS = 9
ARCHITECTURES = [name for name in (*toy.ARCHITECTURES, *toy.VARIANTS) if name != "gemma2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps are stored in the cache folder: a test must not go on where another one was killed."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


@cache
def random_model(architecture: str, scale: float = 0.3, weights: str = "processed") -> Model:
    return toy.random(architecture, scale=scale, weights=weights)


def random_task(model: Model, *, n: int = 3, padded: bool = True) -> Task:
    """Random pairs that share two tokens, the first pair padded."""
    clean = toy.random_tokens(model, n, N_POS)
    corrupt = toy.random_tokens(model, n, N_POS, seed=1)
    corrupt[:, :2] = clean[:, :2]
    pair = toy.random_tokens(model, n, 2, seed=5)
    mask = torch.ones_like(clean)
    if padded:
        mask[0, :2] = 0
    positions = {"early": torch.tensor([4, 5, 3] * n)[:n], "end": torch.full((n,), N_POS - 1)}
    names = tuple(f"prompt {i}" for i in range(n))
    return Task(
        "random", names, clean, "drawn", corrupt, pair[:, 0], pair[:, 1], positions, mask if padded else None
    )  # fmt: skip


@cache
def case_of(name: str) -> tuple[planted.Planted, Task]:
    case = getattr(planted, name)()
    return case, Task(
        case.name, case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, case.positions
    )


def close(ours: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    """Equal but for rounding, which grows with the largest score."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * max(1, np.abs(expected).max()), err_msg=what)


# ---- the slow way: every source written out, a leaf for every input, autograd for each


class Slow:
    """One prompt, forwards, with an own copy of the stream for each input. Nothing here is shared with the library."""

    def __init__(
        self, model: Model, *, grouped: bool = True, lrp: bool = False, frozen_attention: bool = False
    ) -> None:
        self.model, self.steps = model, program(model)
        self.graph = Graph.of(model, grouped=grouped)
        self.grouped, self.lrp, self.frozen_attention = grouped, lrp, frozen_attention

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        if not self.lrp:
            return module(x)
        # A norm with its scale held: the value is that of the module, the slope that of a linear map.
        c = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
        eps = getattr(module, "eps", None) or module.variance_epsilon
        gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
        bias = getattr(module, "bias", None)
        y = c / (c.square().mean(-1, keepdim=True) + eps).sqrt().detach() * gain
        return y if bias is None else y + bias

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        modules = self.steps.layers[layer]
        normed = self.norm(modules.ln2, x)
        if not self.lrp:
            return self.steps.mlp_out(layer, self.steps.post(layer, x))
        first = modules.up(normed) if modules.gate is None else modules.gate(normed)
        a = first * (self.steps.act(first) / first).detach()
        if modules.gate is not None:
            b = modules.up(normed)
            a = (a * b.detach() + a.detach() * b) / 2
        return modules.down(a)

    def run(self, tokens: Tensor, embed: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(what each source writes, the leaf of each input, the final stream), all `[1 pos d_model]`."""
        steps, frame = self.steps, self.steps.frame(tokens, None)
        written = [steps.embed(tokens) if embed is None else embed]
        leaves: list[Tensor] = []

        def copy() -> Tensor:
            leaves.append(torch.zeros_like(written[0], requires_grad=True))
            return torch.stack(written).sum(0) + self.bias + leaves[-1]

        self.bias = torch.zeros_like(written[0])
        group = steps.n_heads // steps.n_key_value_heads
        for layer in range(len(steps.layers)):
            modules = steps.layers[layer]
            qs = [steps.queries(layer, self.norm(modules.ln1, copy()))[..., [h], :] for h in range(steps.n_heads)]
            ks, vs = [], []
            for found, step in ((ks, steps.keys), (vs, steps.values)):
                for i in range(self.graph.n_key_value_heads):
                    one = step(layer, self.norm(modules.ln1, copy()))
                    found.append(one[..., [i if self.grouped else i // group], :])
            q, k, v = (torch.cat(parts, -2) for parts in (qs, ks, vs))
            if self.grouped:
                k, v = (part.repeat_interleave(group, -2) for part in (k, v))
            q, k = (
                steps.rotate(self.norm(n, x) if isinstance(n, nn.Module) else x, frame.rotary)
                for n, x in ((modules.q_norm, q), (modules.k_norm, k))
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * steps.scale
            pattern = scores.masked_fill(~steps.allowed(layer, frame)[:, None], -torch.inf).softmax(-1)
            z = torch.einsum("bhqk,bkhd->bqhd", pattern.detach() if self.frozen_attention else pattern, v)
            parts = [z[..., h, :] @ steps.w_o(layer)[h] for h in range(steps.n_heads)]
            rest = steps.attn_out(layer, z).detach() - torch.stack(parts).sum(0).detach()
            if steps.parallel:
                out = self.mlp(layer, copy())
            self.bias = self.bias + rest
            written += parts
            if not steps.parallel:
                out = self.mlp(layer, copy())
            written.append(out)
        return written, leaves, copy()

    def metric(self, last: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        head = self.model.bridge.unembed.original_component
        logits = head(self.norm(self.steps.final_norm, last))[0, -1]
        return logits[right] - logits[wrong]

    def scores(
        self, task: Task, *, at: tuple[float, ...] = (0.0,), off: str = "corrupt", end_only: bool = False
    ) -> np.ndarray:
        """`[prompt dst src]`, without padding, one prompt at a time."""
        rows = []
        for index in range(len(task)):
            start = 0 if task.mask is None else int(task.mask[index].argmax())
            clean, corrupt = task.clean[index : index + 1, start:], task.corrupt[index : index + 1, start:]
            e, e_star = self.steps.embed(clean), self.steps.embed(corrupt)
            base = torch.stack(self.run(clean)[0]).detach()
            other = torch.stack(self.run(corrupt)[0]).detach() if off == "corrupt" else torch.zeros_like(base)
            total = 0.0
            for distance in at:
                _, leaves, last = self.run(clean, (e + distance * (e_star - e)).detach())
                metric = self.metric(last, task.answers[index], task.wrong[index])
                slopes = torch.autograd.grad(metric, leaves, allow_unused=True)
                g = torch.stack([torch.zeros_like(e) if s is None else s for s in slopes])
                if end_only:
                    g[:, :, :-1] = 0
                total = total + torch.einsum("sbpd,vbpd->vs", other - base, g) / len(at)
            rows.append(total.detach().double().numpy() * self.graph.possible)
        return np.stack(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_plain_autograd_with_a_leaf_for_each_input(architecture):
    model = random_model(architecture)
    task = random_task(model)
    expected = Slow(model).scores(task)
    found = edge_scores(model, task).arrays["scores"][1]
    close(found, expected)
    assert np.abs(expected).max() > 0.1  # or nothing was compared
    close(eap(model, task).scores, expected.mean(0))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma", "qwen3"])
def test_norms_keep_their_weights_and_biases_in_raw_models(architecture):
    model = random_model(architecture, weights="raw")
    task = random_task(model)
    close(eap(model, task).scores, Slow(model).scores(task).mean(0))
    close(relp(model, task, at="clean").scores, Slow(model, lrp=True).scores(task).mean(0))


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2"])
def test_a_key_for_each_head_and_the_sum_of_a_group(architecture):
    model = random_model(architecture)
    task = random_task(model)
    each = eap(model, task, grouped=False)
    close(each.scores, Slow(model, grouped=False).scores(task).mean(0))
    together, group = eap(model, task), model.n_heads // model.n_key_value_heads
    for row, dst in enumerate(together.graph.destinations):
        if dst.kind in "kv":
            members = [f"a{dst.layer}.h{dst.place * group + i}<{dst.kind}>" for i in range(group)]
            rows = [each.graph.destination_index[name] for name in members]
            close(each.scores[rows].sum(0), together.scores[row], dst.name)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("freeze", [False, True])
def test_relevance_coefficients_equal_autograd_by_the_rules(architecture, freeze):
    model = random_model(architecture)
    task = random_task(model)
    slow = Slow(model, lrp=True, frozen_attention=freeze)
    for at, distance in (("clean", 0.0), ("corrupt", 1.0)):
        expected = slow.scores(task, at=(distance,)).mean(0)
        close(relp(model, task, at=at, freeze_attention=freeze).scores, expected, at)
        assert np.abs(expected).max() > 0.1
    assert np.abs(eap(model, task).scores - relp(model, task, at="clean").scores).max() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"steps": 3}, (0, 1 / 3, 2 / 3)), ({"steps": 2, "grid": "code"}, (0.5, 1)),
        ({"steps": 2, "grid": "midpoint"}, (0.25, 0.75)), ({"path": "ends"}, (0, 1)),
    ],
)  # fmt: skip
def test_along_the_embeddings_equals_autograd_at_each_point(architecture, options, at):
    model = random_model(architecture)
    task = random_task(model)
    close(eap_ig(model, task, **options).scores, Slow(model).scores(task, at=at).mean(0))


def test_positions_are_those_of_the_destination():
    model = random_model("llama")
    task = random_task(model)
    close(eap(model, task, positions="end").scores, Slow(model).scores(task, end_only=True).mean(0))
    each = [eap(model, task, positions=pos).scores for pos in range(N_POS)]
    close(sum(each), eap(model, task).scores)
    close(eap(model, task, positions=["end", N_POS - 1, 3]).scores, each[-1] + each[3])  # none counts twice


def test_zero_and_mean_are_off_values():
    model = random_model("llama")
    task = random_task(model)
    alone = dataclasses.replace(task, corrupt=None)
    zero = eap(model, alone, ablation="zero")
    close(zero.scores, Slow(model).scores(task, off="zero").mean(0))
    assert "corrupt" not in zero.meta
    # The mean over one prompt of one token that is repeated is what every source writes there but for its position.
    slow, whole = Slow(model), random_task(model, padded=False)
    written = [torch.stack(slow.run(row[None])[0]).detach() for row in whole.clean]
    mean = torch.stack(written).mean((0, 2, 3))  # over prompts and positions
    difference = [(mean[:, None, None] - each) for each in written]
    _, leaves, last = slow.run(whole.clean[:1])
    slopes = torch.autograd.grad(slow.metric(last, whole.answers[0], whole.wrong[0]), leaves)
    expected = torch.einsum("sbpd,vbpd->vs", difference[0], torch.stack(slopes)).numpy() * slow.graph.possible
    close(edge_scores(model, whole, ablation="mean").arrays["scores"][1][0], expected)
    close(eap(model, whole[:1], ablation="mean", reference=whole).scores, expected)
    mean = torch.stack(written).mean((0, 2))[:, None]  # over prompts
    expected = torch.einsum("sbpd,vbpd->vs", mean - written[0], torch.stack(slopes)).numpy() * slow.graph.possible
    close(edge_scores(model, whole, ablation="position_mean").arrays["scores"][1][0], expected)


# ---- exact patching, and sums that are known


def exact_edges(model: Model, task: Task, share: float, edges: list[tuple[str, str]]) -> np.ndarray:
    """How the metric moves when a share of an edge is cut, by running forwards with a changed copy of the stream."""
    slow, rows = Slow(model), []
    for index in range(len(task)):
        clean, corrupt = task.clean[index : index + 1], task.corrupt[index : index + 1]
        base, other = (torch.stack(slow.run(tokens)[0]).detach() for tokens in (clean, corrupt))
        _, leaves, last = slow.run(clean)
        before = slow.metric(last, task.answers[index], task.wrong[index])
        moved = []
        for src, dst in edges:
            row, column = slow.graph.edge(src, dst)
            change = share * (other - base)[column]
            moved.append(float((_moved(slow, clean, row, change, task, index) - before).detach()))
        rows.append(moved)
    return np.array(rows)


def _moved(slow: Slow, clean: Tensor, row: int, change: Tensor, task: Task, index: int) -> Tensor:
    """The metric when one input reads the stream plus a change."""
    zeros, made = torch.zeros_like, []

    def leaf(like: Tensor, **options: bool) -> Tensor:
        made.append(None)
        return change.clone().requires_grad_() if len(made) - 1 == row else zeros(like, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros_like", lambda like, **o: leaf(like, **o) if o else zeros(like))
        last = slow.run(clean)[2]
    return slow.metric(last, task.answers[index], task.wrong[index])


def test_equals_finite_differences_of_exact_edge_patching():
    model = random_model("llama", 0.15)  # small weights, so that a few points follow the curve
    task = random_task(model, padded=False)
    edges = [("input", "a0.h1<q>"), ("input", "a1.g0<k>"), ("a0.h3", "a2.g1<v>"), ("m0", "m1"), ("a1.h2", "m1"),
             ("m1", "logits"), ("a2.h0", "m2")]  # fmt: skip
    far, near = (
        exact_edges(model, task, share, edges) - exact_edges(model, task, -share, edges) for share in (0.1, 0.05)
    )
    slope = (8 * near - far) / (12 * 0.05)  # without the third derivative
    found = edge_scores(model, task).arrays["scores"][1]
    graph = Graph.of(model)
    ours = np.array([[row[graph.edge(*edge)] for edge in edges] for row in found])
    # A metric near 10 is known to 1e-6 or so, and is divided by 0.05.
    np.testing.assert_allclose(ours, slope, atol=1e-3 * max(1, np.abs(slope).max()))
    assert np.abs(slope).min(0).max() > 1e-3


@pytest.mark.parametrize("name", ["ioi_like", "cancelling_pair"])
def test_is_exact_into_the_logits_where_the_norm_is_frozen(name):
    case, task = case_of(name)  # its norms divide by a constant
    few = task[:4]
    graph = Graph.of(case.model)
    edges = [(src, "logits") for src in graph.sources]
    found = edge_scores(case.model, few).arrays["scores"][1][:, -1]
    exact = exact_edges(case.model, few, 1.0, edges)
    np.testing.assert_allclose(found, exact, atol=TOLERANCE * np.abs(exact).max())
    assert np.abs(exact).max() > 1


def out_of_input(circuit: Circuit) -> float:
    return float(circuit.scores[:, 0].sum())


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_along_the_embeddings_the_edges_out_of_the_input_sum_to_the_whole(metric):
    model = random_model("llama", 0.15)
    task = random_task(model)
    errors = {}
    for grid, steps in itertools.product(("paper", "code", "midpoint"), (24, 48)):
        found = eap_ig(model, task, metric=metric, steps=steps, grid=grid)
        whole = found.meta["corrupt"] - found.meta["clean"]
        errors[grid, steps] = abs(out_of_input(found) - whole)
    # Sums at one end of each interval are off by half of (last - first slope) / m, the midpoint rule by 1/m^2.
    for grid in ("paper", "code"):
        assert 1.6 < errors[grid, 24] / errors[grid, 48] < 2.5
    assert errors["midpoint", 24] / errors["midpoint", 48] > 3
    assert errors["midpoint", 48] < 0.002 * abs(whole)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_along_an_activation_the_edges_out_of_a_layer_sum_to_the_exact_effect_of_all(architecture):
    model = random_model(architecture, 0.15)
    task = random_task(model)
    found = eap_ig(model, task, path="activation", steps=6, grid="midpoint")
    first = eap(model, task)
    heads, names = model.n_heads, np.array(found.graph.sources)
    for site, wanted in (("z", "a{}."), ("mlp_out", "m{}")):
        cells = [[], *([Edit(site, layer)] for layer in range(model.n_layers))]
        metric = rerun(model, task.clean, cells, readout(model, task), source=task.corrupt, mask=task.mask)
        exact = (metric[1:] - metric[:1]).double().mean(1).tolist()
        for layer in range(model.n_layers):
            of = np.char.startswith(names, wanted.format(layer))
            assert of.sum() == (heads if site == "z" else 1)
            # The midpoint rule is off by the curvature over 24 m^2.
            assert found.scores[:, of].sum() == pytest.approx(exact[layer], abs=0.01 * max(map(abs, exact)))
    assert np.abs(first.scores.sum(0) - found.scores.sum(0)).max() > 0.01 * np.abs(found.scores.sum(0)).max()


@pytest.mark.parametrize("grid", ["paper", "code", "midpoint"])
def test_a_point_at_an_end_is_the_run_that_is_there(grid):
    """Points that are the clean run are not computed twice; nor do they count twice."""
    model = random_model("llama")
    task = random_task(model)
    whole = eap_ig(model, task, path="activation", steps=1, grid=grid).scores
    if grid == "paper":
        close(whole, eap(model, task).scores)
    # Of the input alone, the ways along its embeddings and along its activation are one.
    close(whole[:, 0], eap_ig(model, task, steps=1, grid=grid).scores[:, 0])


def test_relevance_out_of_the_input_is_the_metric_where_nothing_adds_a_constant():
    model = random_model("llama")  # no biases
    task = random_task(model)
    options = {"estimate": "relp", "ablation": "zero", "at": "clean"}
    found = edge_scores(model, task, freeze_attention=True, **options).table
    np.testing.assert_allclose(found["value"], -found["value_clean"], rtol=1e-4)
    moving = edge_scores(model, task, **options).table
    assert (moving["value"] + moving["value_clean"]).abs().max() > 0.1  # queries and keys do not conserve


# ---- batches, blocks, metrics


def test_batches_and_blocks_do_not_change_the_scores(monkeypatch):
    model = random_model("llama")
    task = random_task(model, n=5)
    whole = {path: eap_ig(model, task, steps=2, path=path, batch_size=5).scores for path in ("embedding", "activation")}
    for path, expected in whole.items():
        close(eap_ig(model, task, steps=2, path=path, batch_size=2).scores, expected)
        each = edge_scores(model, task, estimate="eap_ig", steps=2, path=path, batch_size=3)
        close(each.arrays["scores"][1].mean(0), expected)
    one = 5 * N_POS * model.d_model * 4  # bytes of one node
    for gradients, sources in ((1, 1), (20 * one, 6 * one), (45 * one, 11 * one)):
        monkeypatch.setattr("interp.circuits._edge_gradients._GRADIENTS", gradients)
        monkeypatch.setattr("interp.circuits._edge_gradients._SOURCES", sources)
        for path, expected in whole.items():
            close(eap_ig(model, task, steps=2, path=path, batch_size=5).scores, expected)


def test_double_precision_agrees_and_half_precision_is_near():
    module = toy.random_module("llama")
    task = random_task(random_model("llama"))
    expected = eap(random_model("llama"), task).scores
    double = load(module.double(), tokenizer=toy.tokenizer())
    np.testing.assert_allclose(eap(double, task).scores, expected, atol=TOLERANCE * np.abs(expected).max())
    half = load(toy.random_module("llama").bfloat16(), tokenizer=toy.tokenizer())
    # bfloat16 keeps 8 bits, and three layers multiply its rounding.
    assert np.corrcoef(eap(half, task).scores.ravel(), expected.ravel())[0, 1] > 0.98


def test_other_metrics():
    model = random_model("llama")
    task = random_task(model)
    read = readout(model, task, "log_prob")
    own = Readout("mine", "nats", read.where, None, read.score)
    named, given = eap(model, task, metric="log_prob"), eap(model, task, metric=own, batch_size=2)
    close(named.scores, given.scores)
    assert (named.unit, given.meta["metric"]) == ("nats", "mine")
    assert np.abs(named.scores - eap(model, task).scores).max() > 0.01
    two = Readout("two", "logits", read.where, None, lambda logits, rows: logits[:, :2])
    with pytest.raises(ValueError, match="several numbers a prompt"):
        eap(model, task, metric=two)


def test_the_circuit_says_where_it_is_from(tmp_path):
    model = random_model("llama")
    task = random_task(model)
    found = eap_ig(model, task, steps=2, positions=("end",))
    assert {k: found.meta[k] for k in ("method", "steps", "grid", "path", "ablation", "positions")} == {
        "method": "eap_ig", "steps": 2, "grid": "paper", "path": "embedding", "ablation": "corrupt",
        "positions": ["end"],
    }  # fmt: skip
    found.require(model)
    again = Circuit.load(found.save(tmp_path / "circuit"))
    np.testing.assert_array_equal(again.scores, found.scores)
    assert len(found) == found.graph.n_edges and np.isfinite(found.scores).all()


def test_refusals():
    model = random_model("llama")
    task = random_task(model)
    alone = dataclasses.replace(task, corrupt=None)
    for call, words in (
        (lambda: eap(model, task, metric="kl"), "gradient of a divergence from the clean run is 0"),
        (lambda: eap(model, task, metric=readout(model, task, "kl")), "gradient of a divergence"),
        (lambda: eap_ig(model, task, metric="kl", steps=1), "gradient of a divergence"),
        (lambda: relp(model, task, metric="kl", at="clean"), "gradient of a divergence"),
        (lambda: eap(model, alone), "has no corrupted prompts"),
        (lambda: relp(model, alone, ablation="zero"), "has no corrupted prompts"),
        (lambda: eap_ig(model, task, steps=0), "steps=0"),
        (lambda: eap_ig(model, task, ablation="zero"), "no embeddings for a path to start from"),
        (lambda: eap(model, task, reference=task), "reference= gives the prompts of a mean"),
        (lambda: eap(model, task, ablation="position_mean"), "different lengths"),
        (lambda: eap(model, task, positions="nowhere"), "no position 'nowhere'"),
        (lambda: eap(model, task, positions=[]), "no positions were given"),
        (lambda: eap(model, dataclasses.replace(task, corrupt=task.clean.clone())), "prompt 0: clean and corrupt are"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    other = task.corrupt.clone()
    other[0, 0] = 7
    with pytest.raises(ValueError, match="prompt 0: the corrupt prompt differs where the clean one has padding"):
        eap(model, dataclasses.replace(task, corrupt=other))
    with pytest.raises(NoProgramError, match="normalises attention's output"):
        eap(random_model("gemma2"), random_task(random_model("gemma2")))


def test_a_prompt_whose_scores_overflow_is_named():
    model = random_model("llama")
    task = random_task(model)
    read = readout(model, task, "logit_diff")

    def score(logits: Tensor, rows: Tensor) -> Tensor:
        return read.score(logits, rows) * torch.where(rows == 1, float("inf"), 1.0)

    for size in (1, 3):
        with pytest.raises(ValueError, match="prompt 1 .*scores are not finite"):
            eap(model, task, metric=dataclasses.replace(read, score=score), batch_size=size)
