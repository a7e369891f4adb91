"""Tuned lens: gradients, layers alone and together, resume, the closed-form start, held-out gains, files, refusals."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import interp
from interp.lenses import _output, _streams, _translators, tuned
from interp.lenses._final import final_norm
from interp.lenses._output import output
from interp.lenses.cached import cache as cache_activations
from interp.lenses.logit import logit_lens
from interp.models import toy
from interp.models.hooks import run
from interp.tasks.corpus import corpus
from interp.tasks.task import Task

#: Float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
#: Biases of the unembedding (processed LayerNorm), grouped keys, one norm for two, gains about 1, a cap on logits.
CASES = [("gpt2", "processed"), ("gpt2", "raw"), ("llama", "processed"), ("phi", "raw"), ("gemma2", "raw")]

random_model = cache(lambda architecture, weights="raw": toy.random(architecture, weights=weights))


def tokens_of(model, n=8, length=24, seed=0):
    return toy.random_tokens(model, n, length, seed=seed)


def random_lens(model, layers=(0, 2), seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    d = model.d_model
    weight = scale * torch.randn(len(layers), d, d, generator=generator)
    bias = scale * torch.randn(len(layers), d, generator=generator)
    return tuned.TunedLens(tuple(layers), weight, bias, model.provenance)


def dense_kl(model, tokens, layer, weight, bias, skip):
    """Mean KL(p || q) the obvious way: whole logits, log-softmax, autograd."""
    way = output(model)
    seen = run(model, tokens, capture=[f"blocks.{layer}.hook_resid_pre"])
    h = seen.cache[f"blocks.{layer}.hook_resid_pre"][:, skip:]
    log_q = way.logits(h + torch.nn.functional.linear(h, weight, bias)).log_softmax(-1)
    log_p = seen.logits[:, skip:].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# --- the loss and its gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "weights"), CASES)
def test_the_loss_and_its_gradient_are_those_of_dense_autograd(architecture, weights):
    model = random_model(architecture, weights)
    tokens, lens = tokens_of(model), random_lens(model)
    text = _streams.streams(model, tokens, lens.layers, 3)
    (batch,) = text.everything()
    for index, layer in enumerate(lens.layers):
        own = [part[index].clone().requires_grad_() for part in (lens.weight, lens.bias)]
        loss = _translators.kl(output(model), _translators.translated(batch.hidden(layer), *own), batch).mean()
        expected = dense_kl(model, tokens, layer, *own, 3)
        np.testing.assert_allclose(float(loss.detach()), float(expected.detach()), **CLOSE)
        for mine, theirs in zip(torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)
    measured = tuned.held_out(model, lens, tokens, skip=3)
    alone = [
        float(dense_kl(model, tokens, layer, lens.weight[i], lens.bias[i], 3).detach())
        for i, layer in enumerate((0, 2))
    ]
    np.testing.assert_allclose(measured, alone, **CLOSE)


def test_the_gradient_is_that_of_finite_differences():
    # GPT-2, whose norm computes in float64 where the model is; others' norms go through float32.
    model = interp.load(toy.random_module("gpt2"), tokenizer=toy.tokenizer(), weights="raw", dtype=torch.float64)
    lens = random_lens(model, layers=(1,))
    (batch,) = _streams.streams(model, tokens_of(model, 2, 12), (1,), 3).everything()
    weight, bias = lens.weight[0].double(), lens.bias[0].double()

    def loss(w):
        return _translators.kl(output(model), _translators.translated(batch.hidden(1), w, bias), batch).mean()

    variable = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable), variable)
    for row, column in ((0, 0), (3, 17), (31, 5)):
        step = torch.zeros_like(weight)
        step[row, column] = 1e-5
        with torch.no_grad():
            slope = float(loss(weight + step) - loss(weight - step)) / 2e-5
        # The step's square, 1e-10, over losses of order 1.
        assert float(gradient[row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_under_a_cap_the_gradient_is_that_of_finite_differences(bias, monkeypatch):
    monkeypatch.setattr(_output, "_TILE", 20)  # two rows a tile
    generator = torch.Generator().manual_seed(0)
    unembed, r, y = (
        2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 10), (5, 4), (5, 4))
    )
    b = torch.randn(10, generator=generator, dtype=torch.float64) if bias else None
    way = _output.Output(lambda h: h, lambda h: h, unembed, b, 3.0)
    batch = _streams.Batch(lambda layer: r, r, r[:, 0], lambda: None)
    assert torch.autograd.gradcheck(lambda y: _translators.kl(way, y, batch), y.requires_grad_())
    assert bool((_translators.kl(way, r, batch).abs() < 1e-12).all())
    assert bool((_translators.kl(way, y, batch) > 0.1).all())


def test_zeros_are_the_logit_lens_and_the_output_is_untouched():
    model = random_model("llama", "processed")
    task = Task("x", tuple("ab"), tokens_of(model, 2, 6), "", answers=torch.tensor([3, 4]))
    zero, plain = tuned.tuned_lens(model, tuned.identity(model), task), logit_lens(model, task)
    columns = [name for name in plain.table.columns if name != "component"]
    assert zero.table[columns].equals(plain.table[columns])
    assert set(zero.table["component"]) == {"tuned"}
    lens = random_lens(model)
    found = tuned.tuned_lens(model, lens, task)
    assert sorted(set(found.table["layer"])) == [0, 2, 3]
    assert (found.filter(layer=3).table["value_forward_kl"] == 0).all()
    # By hand: the translator, then the model's own modules.
    h = run(model, task.clean, capture=["blocks.2.hook_resid_pre"]).cache["blocks.2.hook_resid_pre"]
    with torch.no_grad():
        moved = h + h @ lens.weight[1].T + lens.bias[1]
        log_q = output(model).logits(moved).log_softmax(-1)
    own = found.filter(layer=2).table
    np.testing.assert_allclose(own["value_max_probability"], log_q.amax(-1).exp().flatten(), **CLOSE)
    np.testing.assert_allclose(own.loc[own["pos"] == 5, "value"], log_q[:, 5].gather(1, task.answers[:, None])[:, 0],
                               **CLOSE)  # fmt: skip


# --- training ------------------------------------------------------------------------------------------------------


def test_one_step_of_each_optimiser_is_the_formula(monkeypatch):
    monkeypatch.setattr(_translators, "_CLIP", 0.4)
    model, n = random_model("llama"), 4
    tokens = tokens_of(model, n, 24)
    for optimiser, rate in (("sgd", 0.5), ("adam", 0.01)):
        lens, _ = tuned.train(model, tokens, layers=[1], start="identity", optimiser=optimiser, learning_rate=rate,
                              tokens_per_step=n * 16, skip=8)  # fmt: skip
        weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((32, 32), (32,)))
        grads = torch.autograd.grad(dense_kl(model, tokens, 1, weight, bias, 8), (weight, bias))
        norm = float(torch.sqrt(sum(g.square().sum() for g in grads)))
        grads = [g * 0.4 / norm for g in grads]
        assert norm > 0.5  # so that the clip is seen
        for mine, g in zip((lens.weight[0], lens.bias[0]), grads, strict=True):
            # Nesterov's first step is g + 0.9 g; Adam's is the sign, where g is far from its epsilon.
            expected = -0.1 * rate * 1.9 * g if optimiser == "sgd" else -rate * g / (g.abs() + 1e-8)
            torch.testing.assert_close(mine, expected, rtol=1e-2 if optimiser == "adam" else 1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["ridge", "identity"])
def test_layers_together_are_layers_one_by_one(start):
    model = random_model("gpt2")
    tokens = tokens_of(model)
    options = {"start": start, "tokens_per_step": 32, "epochs": 2}
    together, _ = tuned.train(model, tokens, **options)
    for layer in range(3):
        alone, _ = tuned.train(model, tokens, layers=[layer], **options)
        torch.testing.assert_close(together.weight[layer], alone.weight[0], rtol=0, atol=0)
        torch.testing.assert_close(together.bias[layer], alone.bias[0], rtol=0, atol=0)


def test_batches_inside_a_step_change_nothing(monkeypatch):
    model = random_model("gpt2", "processed")
    tokens = tokens_of(model)
    whole, _ = tuned.train(model, tokens, tokens_per_step=128)
    monkeypatch.setattr(_streams, "_ROWS", 16)
    parts, _ = tuned.train(model, tokens, tokens_per_step=128)
    # Adam divides by the gradient's own size, so that rounding of a gradient near 0 shows more than elsewhere.
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_ridge_is_the_least_squares_solution(architecture):
    model = random_model(architecture)
    tokens = tokens_of(model, 16, 24)
    text = _streams.streams(model, tokens, [1], 8)
    weight, bias = _translators.ridge(final_norm(model), text, [1])
    seen = run(model, tokens, capture=["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]).cache
    x, t = (seen[name][:, 8:].flatten(0, 1).double() for name in sorted(seen))
    if architecture == "gpt2":
        t = t - t.mean(-1, keepdim=True)  # LayerNorm does not see the mean
        sigma = t.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    else:
        sigma = t.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    w = 1 / sigma**2
    mean = (w * x).sum(0) / w.sum()
    spread = (w * (x - mean) ** 2).sum(0)

    def cost(a, b):
        error = x + x @ a.T + b - t
        return (w * error**2).sum() + _translators._RIDGE * (spread * a**2).sum()

    a, b = (part[0].double().requires_grad_() for part in (weight, bias))
    best = cost(a, b)
    # A minimum: the gradient vanishes, to the float32 in which the answer is kept.
    for gradient in torch.autograd.grad(best, (a, b)):
        assert float(gradient.abs().max()) < 1e-3 * float(best.detach())


def test_training_lowers_held_out_kl_on_a_toy_and_sgd_gets_there_too():
    model = random_model("llama", "processed")
    tokens, other = tokens_of(model, 40, 40), tokens_of(model, 10, 40, seed=1)
    plain = tuned.held_out(model, tuned.identity(model), other)
    for options in ({}, {"start": "identity", "optimiser": "sgd", "epochs": 3}):
        lens, history = tuned.train(model, tokens, validation=other, tokens_per_step=128, every=4, **options)
        found = tuned.held_out(model, lens, other)
        assert (found < 0.9 * plain).all()
        own = history.filter(metric="held-out").table
        last = own[own["step"] == own["step"].max()].sort_values("layer")
        np.testing.assert_allclose(last["value"], found)
    at_start = own[own["step"] == 0].sort_values("layer")["value"]
    np.testing.assert_allclose(at_start, plain)  # SGD began at the identity


@pytest.mark.parametrize(("architecture", "weights"), [("llama", "raw"), ("gpt2", "processed"), ("gemma2", "raw")])
def test_cached_activations_give_the_same_numbers(architecture, weights, tmp_path):
    model = random_model(architecture, weights)
    tokens, lens = tokens_of(model, 12, 24), random_lens(model)
    cached = cache_activations(model, tokens, site="resid", dtype="float32", folder=tmp_path / "a")
    np.testing.assert_allclose(
        tuned.held_out(model, lens, cached), tuned.held_out(model, lens, tokens, skip=8), **CLOSE
    )
    by_closed_form = [tuned.train(model, text, epochs=0)[0] for text in (cached, tokens)]
    # Rounding of moments, times the condition of the least squares.
    torch.testing.assert_close(*(one.weight for one in by_closed_form), rtol=1e-2, atol=1e-3)
    trained, _ = tuned.train(model, cached, tokens_per_step=64)
    assert bool((tuned.held_out(model, trained, cached) < tuned.held_out(model, by_closed_form[0], cached)).all())
    with pytest.raises(ValueError, match='site="resid"'):
        tuned.train(model, cache_activations(model, tokens, folder=tmp_path / "z"))
    some = cache_activations(model, tokens, site="resid", layers=[1], folder=tmp_path / "b")
    with pytest.raises(ValueError, match="layer 0 was not cached"):
        tuned.train(model, some)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_resumed_is_uninterrupted_bit_for_bit(optimiser, tmp_path, monkeypatch):
    model = random_model("llama")
    tokens, other = tokens_of(model), tokens_of(model, 4, 24, seed=1)
    options = {"optimiser": optimiser, "epochs": 3, "tokens_per_step": 32, "every": 3, "validation": other}
    whole, history = tuned.train(model, tokens, **options)
    original, steps = _translators.Run._update, []

    def stopping(self):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(self.step)
        return original(self)

    monkeypatch.setattr(_translators.Run, "_update", stopping)
    with pytest.raises(KeyboardInterrupt):
        tuned.train(model, tokens, folder=tmp_path, **options)
    assert steps == list(range(7))
    monkeypatch.setattr(_translators.Run, "_update", original)
    resumed, again = tuned.train(model, tokens, folder=tmp_path, **options)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)
    assert history.table.equals(again.table)
    # Another text, or another seed, is another run.
    with pytest.raises(ValueError, match="is of a run with text="):
        tuned.train(model, tokens.flip(0), folder=tmp_path, **options)
    with pytest.raises(ValueError, match="is of a run with seed=0, not 1"):
        tuned.train(model, tokens, folder=tmp_path, seed=1, **options)
    (tmp_path / _translators.CHECKPOINT).write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        tuned.train(model, tokens, folder=tmp_path, **options)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    model = random_model("llama")
    original = _translators.kl
    calls = []

    def broken(way, h, batch):
        calls.append(0)
        return original(way, h, batch) * (float("nan") if len(calls) == 12 else 1.0)

    monkeypatch.setattr(_translators, "kl", broken)
    with pytest.raises(ValueError, match=r"layer 2 is not finite in step 3.*lower learning_rate.*last good state"):
        tuned.train(model, tokens_of(model), tokens_per_step=16, every=2, folder=tmp_path)
    kept = load_file(tmp_path / _translators.CHECKPOINT)
    assert bool(kept["weight"].isfinite().all())


def test_a_trained_lens_beats_the_logit_lens_on_the_default_models_held_out_text(smol):
    text, held = corpus(smol, n_tokens=1600, seed=1).split((0.8, 0.2), seed=0)
    windows, other = (part.windows(64).tokens for part in (text, held))
    layers = [10, 28]
    lens, _ = tuned.train(smol, windows, layers=layers, epochs=0)
    found = tuned.held_out(smol, lens, other[:1])
    plain = tuned.held_out(smol, tuned.identity(smol, layers), other[:1])
    # Seen: 2.67 and 0.34 nats, in place of 19.0 and 3.69.
    assert (found < plain / 2).all()


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_lens_is_kept_with_its_model(tmp_path):
    model = random_model("llama")
    lens = random_lens(model)
    back = tuned.load(model, tuned.save(lens, model, tmp_path))
    assert torch.equal(back.weight, lens.weight)
    assert torch.equal(back.bias, lens.bias)
    assert (back.layers, dict(back.meta)) == (lens.layers, dict(lens.meta))
    for other in (random_model("gpt2"), random_model("llama", "processed")):
        with pytest.raises(ValueError, match="this tuned lens is of LlamaForCausalLM .raw weights"):
            tuned.load(other, tmp_path)
        with pytest.raises(ValueError, match="this tuned lens is of"):
            tuned.tuned_lens(other, lens, tokens_of(other))
    (tmp_path / "tuned_lens.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        tuned.load(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tuned lens"):
        tuned.load(model, tmp_path / "nothing")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "has layers 0 to 2"),
        ({"layers": []}, "name at least one"),
        ({"epochs": -1}, "give positive numbers"),
        ({"skip": 24}, "skip=24 leaves no token"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    model = random_model("llama")
    with pytest.raises(ValueError, match=message):
        tuned.train(model, tokens_of(model), **options)


def test_texts_that_do_not_do_are_refused_with_the_numbers():
    model = random_model("llama")
    with pytest.raises(ValueError, match="has 32 tokens to learn from, but a translator has 33 parameters"):
        tuned.train(model, tokens_of(model, 2, 24))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        tuned.train(model, tokens_of(model) + 60)
    mask = torch.ones(8, 24, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="of unequal length"):
        tuned.train(model, Task("padded", tuple("abcdefgh"), tokens_of(model), "", mask=mask))
    lens = random_lens(model)
    with pytest.raises(ValueError, match=r"has layers \[0, 2\], not 1"):
        tuned.tuned_lens(model, lens, tokens_of(model), layers=[1])
    with pytest.raises(ValueError, match="do not fit"):
        tuned.TunedLens((0,), lens.weight, lens.bias)
