"""Attention lenses: planted maps, the reference's layout, the direct read-out, and runs that go wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import interp
from interp.lenses import _train, attention
from interp.lenses._divergence import divergence, targets
from interp.lenses._final import final_norm
from interp.lenses._full import full_divergence
from interp.lenses._output import output
from interp.lenses.attention import AttentionLens, direct, load, save, train
from interp.lenses.cached import Cached, cache
from interp.models import Model, toy
from interp.models.hooks import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


def _text(model: Model, n: int = 12, *, seed: int = 0) -> Cached:
    return cache(model, toy.random_tokens(model, n, 24, seed=seed), dtype="float32")


def _planted(model: Model, z: Tensor, r: Tensor) -> Cached:
    """A cached text whose heads and predictions are given."""
    base = _text(model)
    known = targets(output(model).unembed, None, r)
    rows = torch.zeros(len(r), dtype=torch.long)
    return replace(
        base, tokens=rows, next=rows, document=rows, position=rows, r=r, mean=known.mean, entropy=known.entropy,
        scale=torch.ones(len(r)), total=known.total, layers=(0,), _stored={0: z},
        meta={**base.meta, "n_tokens": len(r), "layers": [0], "text": str(float(z.sum()))},
    )  # fmt: skip


def _last(history: Any, metric: str = "validation KL") -> Tensor:
    table = history.table[history.table["metric"] == metric]
    return torch.tensor(table[table["step"] == table["step"].max()]["value"].to_numpy())


# --- planted maps ----------------------------------------------------------------------------------------------------


def _suppressor(model: Model, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Head 0 writes +6 u_t, head 1 writes -2 u_t, heads 2 and 3 nothing; `[token head d_head]`, maps, r.

    Topic t, one of 8, is what heads 0 and 1 see, each as strongly as it happens to.
    """
    generator = torch.Generator().manual_seed(seed)
    u = output(model).unembed
    topic = F.one_hot(torch.randint(8, (n,), generator=generator), 8).float()
    z = torch.randn(n, 4, 8, generator=generator)
    z[:, :2] = topic[:, None] * (0.5 + torch.rand(n, 2, 1, generator=generator))
    write = torch.linalg.pinv(u)[10:18]  # moves the logit of token 10 + t, and as little else as U allows
    maps = torch.stack([6 * write, -2 * write, 0 * write, 0 * write])
    return z, maps, torch.einsum("thk,hkd->td", z, maps)


def test_the_suppressor_says_what_it_suppresses_unless_asked_beside_the_others() -> None:
    model = toy.random("llama")
    u = output(model).unembed
    cached, held_out = (_planted(model, *_suppressor(model, n, seed)[::2]) for n, seed in ((400, 0), (150, 1)))
    maps = _suppressor(model, 1, 0)[1]
    options: dict[str, Any] = {"layers": [0], "optimiser": "lbfgs", "validation": held_out}
    additive, history = train(model, cached, estimand="additive", epochs=150, **options)
    alone, _ = train(model, cached, estimand="independent", epochs=10, **options)
    assert _last(history).item() < 1e-4  # of the 0.27 nats that a constant is away; on its way to 0
    centred = [x @ u - (x @ u).mean(-1, keepdim=True) for x in (additive.maps[0], maps)]
    # The largest entries are 4.0 and 1.3; what L-BFGS has not reached yet are directions that cost next to nothing.
    torch.testing.assert_close(centred[0], centred[1], atol=0.15, rtol=0)
    for topic in range(8):
        z = F.one_hot(torch.tensor(topic), 8).float().expand(4, 8)
        assert additive.logits(model, 0, z, heads=[1])[0].argmin() == 10 + topic
        assert alone.logits(model, 0, z, heads=[1])[0].argmax() == 10 + topic


def test_the_loss_is_convex() -> None:
    model = toy.random("gpt2")
    cached, held_out = _text(model), _text(model, seed=1)
    found = [
        _last(train(model, cached, estimand="additive", layers=[1], validation=held_out, weight_decay=0.03, **way)[1])
        for way in (
            {"optimiser": "lbfgs", "start": "ridge", "epochs": 100},
            {"epochs": 120, "learning_rate": 0.02, "tokens_per_step": 96, "seed": 1},
            {"epochs": 120, "learning_rate": 0.02, "tokens_per_step": 96, "seed": 2},
        )
    ]
    # Adam's noise, whose rate falls to 0; the KL is about 1 nat
    torch.testing.assert_close(found[1], found[2], atol=3e-3, rtol=0)
    torch.testing.assert_close(found[0], found[1], atol=1e-2, rtol=0)


# --- the reference's layout ------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """A full linear map with a bias for each head of what it writes, z W_O; their sum is the prediction."""

    def __init__(self, w_o: Tensor, unembed: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.w_o = w_o
        self.lenses = nn.ModuleList(nn.Linear(*unembed.shape) for _ in w_o)
        for lens in self.lenses:
            lens.weight.data, lens.bias.data = unembed.T.clone(), bias.clone()  # type: ignore[union-attr, operator]

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([lens(z[:, h] @ self.w_o[h]) for h, lens in enumerate(self.lenses)]).sum(0)


def _reference(model: Model, cached: Cached) -> tuple[Reference, Tensor, Tensor]:
    w_o, u = model.bridge.blocks[1].attn.W_O.detach(), output(model).unembed
    reference = Reference(w_o, u, torch.randn(model.d_vocab, generator=torch.Generator().manual_seed(0)))
    logits = reference(cached.activation(1))
    p = (cached.r @ u).softmax(-1)
    loss = F.kl_div(logits.log_softmax(-1), p.log(), log_target=True, reduction="batchmean")
    loss.backward()
    return reference, logits, loss


def test_the_references_sum_is_one_linear_map_of_all_z_and_one_bias() -> None:
    model = toy.random("llama")
    cached = _text(model)
    reference, logits, loss = _reference(model, cached)
    u, w_o = output(model).unembed, reference.w_o
    bias = 4 * reference.lenses[0].bias.detach()  # type: ignore[operator]
    joint = cached.activation(1).flatten(1) @ (w_o @ u).flatten(0, 1) + bias
    torch.testing.assert_close(joint, logits.detach(), atol=1e-4, rtol=1e-4)  # float32, sums of 64 terms
    # The same function as a lens: the sum of its heads' maps and its bias, and the same KL.
    lens = AttentionLens("additive", "low_rank", {1: w_o}, {1: bias}, {**model.provenance})
    heads = lens.logits(model, 1, cached.activation(1))
    torch.testing.assert_close(heads.sum(1) + lens.biases[1], logits.detach(), atol=1e-4, rtol=1e-4)
    y = lens.written(1, cached.activation(1)).sum(1)
    kl = divergence(y, u, targets(u, None, cached.r), bias=bias).mean()
    torch.testing.assert_close(kl, loss.detach(), atol=1e-4, rtol=1e-4)


def test_the_references_biases_are_not_identified_and_most_of_its_directions_do_nothing() -> None:
    model = toy.random("llama")
    reference, *_ = _reference(model, _text(model))
    first, *others = [lens.bias.grad for lens in reference.lenses]
    assert first.abs().max() > 0
    assert all(torch.equal(first, other) for other in others)
    for lens, w_o in zip(reference.lenses, reference.w_o, strict=True):
        gradient = lens.weight.grad  # [d_vocab d_model]
        written = torch.linalg.qr(w_o.T).Q  # the d_head directions that the head can write
        inert = gradient - gradient @ written @ written.T
        assert inert.abs().max() < 1e-5 * gradient.abs().max()  # float32 rounding
        assert torch.linalg.matrix_rank(gradient, rtol=1e-4) <= model.d_head


# --- the direct read-out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("weights", ["raw", "processed"])
def test_direct_parts_and_the_rest_add_up_to_the_logits(architecture: str, weights: Any) -> None:
    model = toy.random(architecture, weights=weights)
    tokens = toy.random_tokens(model, 2, 12)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    seen = run(model, tokens, capture=[*names, "blocks.2.hook_resid_post"])
    stream = seen.cache["blocks.2.hook_resid_post"].flatten(0, 1)
    lens, norm, out = direct(model), final_norm(model), output(model)
    scale = norm.inverse_scale(stream, norm.norm(stream))
    total, rest = torch.zeros(24, model.d_vocab), stream
    for layer, name in enumerate(names):
        z = seen.cache[name].flatten(0, 1)
        total = total + lens.logits(model, layer, z, scale=scale).sum(1)
        rest = rest - torch.einsum("thk,hkd->td", z, model.bridge.blocks[layer].attn.W_O.detach())
    other = (norm.linear(rest) * scale[:, None] + norm.bias) @ out.unembed + (0 if out.bias is None else out.bias)
    torch.testing.assert_close(total + other, seen.logits.flatten(0, 1), atol=1e-4, rtol=1e-4)  # float32
    with pytest.raises(ValueError, match="give scale="):
        lens.written(0, seen.cache[names[0]])


def test_a_low_rank_lens_starts_at_the_direct_read_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.random("gpt2", weights="raw")
    cached = _text(model)
    mean = cached.scale.mean()
    known = direct(model).logits(model, 1, cached.activation(1), scale=mean.expand(len(cached)))
    monkeypatch.setattr(_train.Training, "adam", lambda self: None)
    for estimand in ("additive", "independent"):
        lens, _ = train(model, cached, estimand=estimand, layers=[1], start="direct")  # type: ignore[arg-type]
        bias = lens.biases[1] if estimand == "independent" else 0
        torch.testing.assert_close(lens.logits(model, 1, cached.activation(1)) - bias, known, atol=1e-4, rtol=1e-4)
        # With the mean z, the lens gives the mean prediction, up to the smoothing of it.
        mean_z = cached.activation(1).mean(0)
        at = lens.logits(model, 1, mean_z)
        at = at if estimand == "independent" else (at.sum(0) + lens.biases[1])[None]
        torch.testing.assert_close(at.softmax(-1), (cached.total / len(cached)).expand_as(at), atol=2e-2, rtol=0)


def test_the_ridge_start_is_that_of_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.random("llama")
    cached = _text(model)
    monkeypatch.setattr(_train.Training, "adam", lambda self: None)
    monkeypatch.setattr(_train, "_TOKENS", 50)
    lens, _ = train(model, cached, estimand="independent", layers=[2])
    x = cached.activation(2)[:, 3].double()
    x, r = x - x.mean(0), (cached.r - cached.r.mean(0)).double()
    ridge = (_train._RIDGE * x.square().sum(0).mean()).sqrt() * torch.eye(8).double()
    rows = torch.cat([x, ridge]), torch.cat([r, torch.zeros(8, 32).double()])
    torch.testing.assert_close(lens.maps[2][3].double(), torch.linalg.lstsq(*rows).solution, atol=1e-4, rtol=1e-4)


def test_a_model_that_norms_what_attention_writes_has_no_direct_read_out_but_can_be_trained() -> None:
    model = toy.random("gemma2")
    with pytest.raises(ValueError, match="train a lens"):
        direct(model)
    cached = _text(model)
    assert output(model).cap is not None
    lens, history = train(model, cached, estimand="additive", epochs=5, learning_rate=0.01, validation=cached)
    first, last = (history.table[history.table["step"] == step]["value"] for step in (0, history.table["step"].max()))
    assert last.iloc[-3:].mean() < 0.9 * first.mean()
    # The KL that was measured is the one to the model's own, capped, predictions.
    p = model(toy.random_tokens(model, 12, 24))[:, 8:].flatten(0, 1).log_softmax(-1)
    q = (lens.logits(model, 1, cached.activation(1)).sum(1) + lens.biases[1]).log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(last.iloc[-2], abs=1e-4)


# --- full lenses -----------------------------------------------------------------------------------------------------


def test_full_lenses_have_the_gradient_of_autograd_and_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.lenses._divergence._ROWS", 4)
    monkeypatch.setattr("interp.lenses._divergence._COLUMNS", 7)
    generator = torch.Generator().manual_seed(0)
    x, maps, bias, r, u, b_u = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 10, 3), (2, 3, 20), (2, 20), (10, 5), (5, 20), (20,))
    )
    p = (1.5 * torch.tanh((r @ u + b_u) / 1.5)).log_softmax(-1)
    weights = torch.tensor([[1.0], [3.0]]).double()

    def dense(maps: Tensor, bias: Tensor) -> Tensor:
        q = (x @ maps + bias[:, None]).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1) * weights

    def ours(maps: Tensor, bias: Tensor) -> Tensor:
        return full_divergence(x, maps, bias, r, u, b_u, cap=1.5) * weights

    inputs = (maps.requires_grad_(), bias.requires_grad_())
    for a, b in zip((ours(*inputs), *torch.autograd.grad(ours(*inputs).mean(), inputs)),
                    (dense(*inputs), *torch.autograd.grad(dense(*inputs).mean(), inputs)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda m, b: ours(m, b).mean(), inputs)
    with pytest.raises(ValueError, match="mean over the tokens"):
        ours(*inputs)[0, :2].sum().backward()


@pytest.mark.parametrize("estimand", ["additive", "independent"])
def test_a_full_lens_starts_where_the_low_rank_one_does_and_fits_at_least_as_well(estimand: Any) -> None:
    model = toy.random("gpt2")
    cached = _text(model)
    kls = {}
    for form in ("low_rank", "full"):
        _, history = train(
            model, cached, estimand=estimand, form=form, layers=[2], optimiser="lbfgs", epochs=25, validation=cached
        )  # type: ignore[call-overload]
        table = history.table
        kls[form] = [torch.tensor(table[table["step"] == step]["value"].to_numpy()) for step in (0, 25)]
    torch.testing.assert_close(kls["full"][0], kls["low_rank"][0], atol=1e-4, rtol=1e-4)  # float32
    assert (kls["full"][1][:4] < kls["full"][0][:1].max()).all()
    assert kls["full"][1].mean() < kls["low_rank"][1].mean() + 1e-3  # d_vocab 64 columns against d_model 32


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimand", ["additive", "independent"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    estimand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy.random("llama")
    cached = _text(model)
    options: dict[str, Any] = {
        "estimand": estimand, "epochs": 2, "tokens_per_step": 32, "weight_decay": 0.01,
        "validation": _text(model, seed=1),
    }  # fmt: skip
    whole, history = train(model, cached, **options)
    backward, steps = _train.Training._backward, iter(range(100))

    def stopped(self: Any, rows: Tensor) -> None:
        if next(steps) == 7:
            raise KeyboardInterrupt
        backward(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(_train.Training, "_backward", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(model, cached, **options, folder=tmp_path)
    resumed, theirs = train(model, cached, **options, folder=tmp_path)
    for layer in range(3):
        assert torch.equal(whole.maps[layer], resumed.maps[layer])
        assert torch.equal(whole.biases[layer], resumed.biases[layer])
    assert history.table.equals(theirs.table)
    with pytest.raises(ValueError, match="of a run with text="):
        train(model, _text(model, seed=2), **options, folder=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate=0.001, not 0.1"):
        train(model, cached, **options, folder=tmp_path, learning_rate=0.1)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="delete it to start again"):
        train(model, cached, **options, folder=tmp_path)


def test_an_epoch_sees_each_token_once_and_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.random("llama")
    cached = _text(model)
    seen: list[Tensor] = []
    monkeypatch.setattr(_train.Training, "_backward", lambda self, rows: seen.append(rows))
    train(model, cached, estimand="additive", layers=[0], epochs=2, tokens_per_step=50)
    epochs = torch.cat(seen).view(2, len(cached))
    assert torch.equal(epochs.sort(1).values, torch.arange(len(cached)).expand(2, -1))
    assert not torch.equal(*epochs)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy.random("llama")
    cached = _text(model)
    options: dict[str, Any] = {"estimand": "additive", "epochs": 2, "tokens_per_step": 16, "layers": [0]}
    kl, steps = _train.Training._kl, iter(range(100))

    def broken(self: Any, *given: Any) -> Tensor:
        return kl(self, *given) * (torch.nan if next(steps) == 10 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(_train.Training, "_kl", broken)
        with pytest.raises(
            FloatingPointError, match="nan at step 11.*learning_rate below 0.001.*checkpoint.safetensors"
        ):
            train(model, cached, **options, folder=tmp_path)
    lens, history = train(model, cached, **options, folder=tmp_path)
    assert history.table["value"].notna().all() and lens.meta["steps"] == 24
    steps = iter(range(10, 100))
    monkeypatch.setattr(_train.Training, "_kl", broken)
    with pytest.raises(FloatingPointError, match="nan at step 1:.*There was no checkpoint yet"):
        train(model, cached, **options, folder=tmp_path / "b")


def test_a_disk_that_is_full_costs_the_checkpoint_only(tmp_path: Path) -> None:
    model = toy.random("llama")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        lens, _ = train(model, _text(model), estimand="additive", layers=[0], folder=tmp_path / "file")
    assert lens.maps[0].isfinite().all()


def test_bad_inputs_are_said_with_their_numbers() -> None:
    model = toy.random("llama")
    cached = _text(model)
    few = cache(model, toy.random_tokens(model, 1, 30), dtype="float32")
    with pytest.raises(
        ValueError, match=r"22 tokens, and each additive lens reads 32 numbers \(1,024 parameters, and 64"
    ):
        train(model, few, estimand="additive")
    train(model, few, estimand="independent")
    with pytest.raises(ValueError, match="cache the text with this model"):
        train(toy.random("llama", seed=1), cached, estimand="additive")
    with pytest.raises(ValueError, match="cache the text with this model"):
        train(model, cached, estimand="additive", validation=_text(toy.random("llama", seed=1)))
    with pytest.raises(ValueError, match='site="resid"'):
        train(model, cache(model, toy.random_tokens(model, 3, 24), site="resid"), estimand="additive")
    with pytest.raises(ValueError, match="must be positive"):
        train(model, cached, estimand="additive", epochs=0)
    with pytest.raises(ValueError, match="leave folder out"):
        train(model, cached, estimand="additive", optimiser="lbfgs", folder="nowhere")
    with pytest.raises(ValueError, match="layers 0 to 2"):
        direct(model, [5])
    with pytest.raises(ValueError, match="no lens for layer 2"):
        direct(model, [0]).written(2, torch.zeros(4, 8), scale=torch.tensor(1.0))


def test_lenses_are_kept_and_refused_by_other_models(tmp_path: Path) -> None:
    model = toy.random("qwen2")
    z = torch.randn(5, 4, 8)
    for estimand, form in (("additive", "low_rank"), ("independent", "full")):
        lens, _ = train(model, _text(model), estimand=estimand, form=form, layers=[0, 2])  # type: ignore[call-overload]
        again = load(model, save(lens, model, tmp_path / estimand))
        assert (again.estimand, again.form, again.layers, dict(again.meta)) == (estimand, form, [0, 2], dict(lens.meta))
        assert torch.equal(again.logits(model, 2, z, heads=[3]), lens.logits(model, 2, z)[:, [3]])
    for other in (toy.random("qwen2", seed=1), toy.random("qwen2", weights="raw")):
        with pytest.raises(ValueError, match="not of"):
            load(other, tmp_path / "additive")
        with pytest.raises(ValueError, match="train the lens anew"):
            lens.logits(other, 0, z)
        with pytest.raises(ValueError, match="not of"):
            save(lens, other, tmp_path / "c")
    with pytest.raises(ValueError, match="full lens has no vectors"):
        lens.written(0, z)
    with pytest.raises(FileNotFoundError, match="holds no attention lens"):
        load(model, tmp_path)
    (tmp_path / "additive" / "attention_lens.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="train and save it again"):
        load(model, tmp_path / "additive")


def test_a_bfloat16_model_has_lenses_in_float32() -> None:
    module = toy.random_module("llama").bfloat16()
    model = interp.load(module, tokenizer=toy.tokenizer(), weights="raw", dtype="bfloat16")
    cached = _text(model)
    lens, history = train(
        model, cached, estimand="additive", layers=[1], epochs=5, learning_rate=0.01, validation=cached
    )
    values = history.table[history.table["metric"] == "validation KL"]["value"].tolist()
    assert lens.maps[1].dtype == torch.float32
    assert values[-1] < values[0]
    assert direct(model).maps[1].dtype == torch.float32
    assert attention.chosen_layers(model, [1, 1]) == [1]
