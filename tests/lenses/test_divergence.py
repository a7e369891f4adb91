"""The engine: closed forms against dense softmaxes, autograd and finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from scipy import special, stats
from torch import Tensor

from interp.lenses import _divergence
from interp.lenses._divergence import divergence, targets

#: float64 sums of 11 to 40 terms of order 1.
EXACT = {"atol": 1e-12, "rtol": 1e-10}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several tiles and strips, the last of each incomplete: 11 tokens in strips of 4, 40 entries in tiles of 9.
    monkeypatch.setattr(_divergence, "_ROWS", 4)
    monkeypatch.setattr(_divergence, "_COLUMNS", 9)


def _case(*lenses: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, r, y, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 40), (11, 6), (*lenses, 11, 6), (*lenses, 40))
    )
    return u, 2 * r, y, b


def _dense(y: Tensor, u: Tensor, b: Tensor, p: Tensor) -> Tensor:
    log_q = (y @ u + b[..., None, :]).log_softmax(-1)
    return (p * (p.log() - log_q)).sum(-1)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_targets_are_those_of_a_dense_softmax(cap: float | None) -> None:
    u, r, _, b = _case()
    logits = r @ u + b
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    p = logits.softmax(-1)
    extra = torch.randn(40, 2, dtype=torch.float64)
    found = targets(u, b, r, cap=cap, extra=extra)
    torch.testing.assert_close(found.mean, p @ u.T, **EXACT)
    torch.testing.assert_close(found.entropy, torch.as_tensor(stats.entropy(p.numpy(), axis=1)), **EXACT)
    torch.testing.assert_close(found.total, p.sum(0), **EXACT)
    torch.testing.assert_close(found.extra, p @ extra, **EXACT)


def test_a_divergence_is_scipys_token_by_token() -> None:
    u, r, y, b = _case()
    known = targets(u, None, r, extra=b[:, None])
    p, q = (r @ u).softmax(-1).numpy(), (y @ u + b).softmax(-1).numpy()
    found = divergence(y, u, known, bias=b, expected_bias=known.extra[:, 0])
    torch.testing.assert_close(found, torch.as_tensor(special.rel_entr(p, q).sum(1)), **EXACT)
    without = divergence(y, u, known)
    torch.testing.assert_close(without, _dense(y, u, torch.zeros_like(b), torch.as_tensor(p)), **EXACT)


@pytest.mark.parametrize("lenses", [(), (3,), (2, 3)])
def test_gradients_are_those_of_autograd_through_a_dense_softmax(lenses: tuple[int, ...]) -> None:
    u, r, y, b = _case(*lenses)
    p = (r @ u).softmax(-1)
    grads = []
    for dense in (True, False):
        own_y, own_b = y.clone().requires_grad_(), b.clone().requires_grad_()
        kl = _dense(own_y, u, own_b, p) if dense else divergence(own_y, u, targets(u, None, r), bias=own_b)
        loss = (kl.mean(-1) * (1 + torch.arange(kl.mean(-1).numel()).reshape(kl.shape[:-1]))).sum()
        grads.append((loss.detach(), *torch.autograd.grad(loss, [own_y, own_b])))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_one_bias_for_all_lenses_collects_the_gradient_of_each() -> None:
    u, r, y, b = _case(3)
    p, shared = (r @ u).softmax(-1), b[0]
    grads = []
    for dense in (True, False):
        own = shared.clone().requires_grad_()
        kl = _dense(y, u, own, p) if dense else divergence(y, u, targets(u, None, r), bias=own)
        grads.append(torch.autograd.grad(kl.mean(), own)[0])
    torch.testing.assert_close(*grads, **EXACT)


def test_gradients_are_those_of_finite_differences() -> None:
    u, r, y, b = _case(2)
    known = targets(u, None, r)

    def mean(y: Tensor, b: Tensor) -> Tensor:
        return divergence(y, u, known, bias=b).mean(-1)

    assert torch.autograd.gradcheck(mean, (y.requires_grad_(), b.requires_grad_()))
    weights = torch.rand(2, 11, dtype=torch.float64)  # without a bias, tokens may weigh what they like
    assert torch.autograd.gradcheck(lambda y: divergence(y, u, known) * weights, (y,))


def test_the_model_itself_is_no_nats_away() -> None:
    u, r, *_ = _case()
    known = targets(u, None, r)
    at = r.clone().requires_grad_()
    kl = divergence(at, u, known)
    assert kl.abs().max() < 1e-12
    assert torch.autograd.grad(kl.sum(), at)[0].abs().max() < 1e-12


def test_a_trained_bias_with_unequal_weights_is_refused() -> None:
    u, r, y, b = _case()
    kl = divergence(y, u, targets(u, None, r), bias=b.requires_grad_())
    with pytest.raises(ValueError, match="mean over the tokens"):
        kl[:3].sum().backward()


def test_tiles_and_strips_do_not_matter_and_large_logits_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    u, r, y, b = _case()
    small = targets(u, b, 500 * r)
    monkeypatch.setattr(_divergence, "_ROWS", 100)
    monkeypatch.setattr(_divergence, "_COLUMNS", 100)
    for ours, theirs in zip(small, targets(u, b, 500 * r), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert (small.entropy >= -1e-12).all()
    monkeypatch.setattr(_divergence, "_SCRATCH", 40 * 8 * 2)  # strips of two tokens
    for ours, theirs in zip(small, targets(u, b, 500 * r), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_half_precision_is_computed_in_single() -> None:
    u, r, y, _ = _case()
    half = [x.bfloat16() for x in (u, r, y)]
    known = targets(half[0], None, half[1])
    found = divergence(half[2], half[0], known)
    assert found.dtype == known.mean.dtype == torch.float32
    p = (half[1].double() @ half[0].double()).softmax(-1)
    dense = _dense(half[2].double(), half[0].double(), torch.zeros(40).double(), p)
    # float32 sums of terms of order 10
    torch.testing.assert_close(found.double(), dense, atol=1e-5, rtol=1e-5)


def test_no_array_of_tokens_by_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_divergence, "_ROWS", 256)
    monkeypatch.setattr(_divergence, "_COLUMNS", 4096)
    n, d_vocab = 4000, 20_000
    u, r = torch.randn(8, d_vocab), torch.randn(n, 8)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor))
            return out

    y, b = r.clone().requires_grad_(), torch.zeros(d_vocab, requires_grad=True)
    with Watch():
        divergence(y, u, targets(u, None, r), bias=b).mean().backward()
    assert max(sizes) * 4 <= _divergence._SCRATCH < n * d_vocab * 4 / 4
